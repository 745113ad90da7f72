"""The outputs there are."""

from converter.outputs.base import Output
from converter.runtime.registry import Registry

OUTPUTS = Registry(
    "gloss_convert.outputs",
    "--output",
    {
        "adapter": "converter.outputs.adapter.output:Adapter",
        "checkpoint": "converter.outputs.checkpoint.output:Checkpoint",
    },
    (
        "library",
        "relation",
        "implied",
        "unused",
        "has_shards",
        "own_files",
        "check",
        "nbytes",
        "companions",
        "at_a_time",
        "write",
        "verify",
    ),
)
"""Name -> a class like ``Output``."""


def output_of(name: str) -> Output:
    """An output by its name. Raises OptionError if there is none, or its package is broken."""
    kind = OUTPUTS.load(name)
    if not callable(kind):
        raise OUTPUTS.fault(name, f"it is a {type(kind).__name__}, not a class")
    output: Output = kind()
    OUTPUTS.check(name, output)
    return output
