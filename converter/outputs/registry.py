"""The outputs there are: our own, and those of installed packages."""

from importlib.metadata import entry_points

from converter.errors import OptionError
from converter.outputs.adapter.output import Adapter
from converter.outputs.base import Output
from converter.outputs.checkpoint.output import Checkpoint

OUTPUTS: dict[str, Output] = {"adapter": Adapter(), "checkpoint": Checkpoint()}
"""Name, as in ``Recipe.output`` -> the output."""

GROUP = "gloss_convert.outputs"
"""Entry points of other packages: name -> a class like ``Output``."""


def output_of(name: str) -> Output:
    """An output by its name.

    Raises:
        OptionError: there is none of that name, or its package cannot be loaded.
    """
    if name in OUTPUTS:
        return OUTPUTS[name]
    others = {entry.name: entry for entry in entry_points(group=GROUP)}
    if name not in others:
        raise OptionError("--output", expected=" or ".join({*OUTPUTS, *others}), found=name)
    try:
        made: Output = others[name].load()()
    except Exception as error:  # a third party's package: of any kind
        raise OptionError(
            f"--output {name}: its package cannot be loaded", found=repr(error)
        ) from error
    return made
