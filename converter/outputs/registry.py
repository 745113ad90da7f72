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
)
"""Name -> a class like ``Output``."""


def output_of(name: str) -> Output:
    """An output by its name. Raises OptionError if there is none, or its package is broken."""
    output: Output = OUTPUTS.load(name)()
    return output
