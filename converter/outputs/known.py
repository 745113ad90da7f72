"""The outputs by name, without importing their modules, since torch takes seconds."""

from collections.abc import Mapping

from converter.runtime.registry import Registry

OUTPUTS = Registry(
    "gloss_convert.outputs",
    "--output",
    {
        "adapter": "converter.outputs.adapter:Adapter",
        "checkpoint": "converter.outputs.checkpoint:Checkpoint",
    },
    (
        "library", "relation", "implied", "unused", "has_shards", "own_files", "check", "nbytes",
        "companions", "at_a_time", "write", "verify",
    ),
)  # fmt: skip
"""Name -> a class like ``base.Output``."""

UNUSED: Mapping[str, tuple[str, ...]] = {
    "adapter": ("rounding", "workers", "engine", "ray_address", "stream_to_hub"),
    "checkpoint": (),
}
"""Name of a built-in output -> options of the command line that have no effect with it."""
