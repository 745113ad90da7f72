"""gloss-convert: make a language model less toxic by editing its checkpoint.

What can be imported from here is the public interface for Python; it does what the commands do:

    import converter

    recipe = converter.Recipe(source="HuggingFaceTB/SmolLM2-360M", method="profs")
    print(converter.plan(recipe)["edited_layers"])
    manifest = converter.convert(recipe, "out")
    assert converter.verify("out") == []

Nothing here prints or exits: what goes wrong is raised as a ``ConverterError``, and what a run
tells while it works are records of the logger ``converter``. Everything else in this package may
change from version to version.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from converter.version import __version__

if TYPE_CHECKING:
    from converter.api import convert, diff, evaluate, load_edit, plan, replay, verify
    from converter.edits.base import Edit
    from converter.errors import (
        CheckpointError,
        ConverterError,
        DataError,
        DestinationError,
        FitError,
        GateError,
        GuardError,
        OptionError,
        PublishError,
        SourceError,
        VerificationError,
    )
    from converter.evaluation.options import EvaluationOptions
    from converter.manifest import Evaluation, Manifest
    from converter.recipe import Recipe, Settings

_MODULES = {
    "api": ("convert", "diff", "evaluate", "load_edit", "plan", "replay", "verify"),
    "edits.base": ("Edit",),
    "errors": (
        "CheckpointError", "ConverterError", "DataError", "DestinationError", "FitError",
        "GateError", "GuardError", "OptionError", "PublishError", "SourceError",
        "VerificationError",
    ),
    "evaluation.options": ("EvaluationOptions",),
    "manifest": ("Evaluation", "Manifest"),
    "recipe": ("Recipe", "Settings"),
}  # fmt: skip
"""Module -> public names in it, loaded when they are asked for: torch takes a second."""

_PLACES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "CheckpointError", "ConverterError", "DataError", "DestinationError", "Edit", "Evaluation",
    "EvaluationOptions", "FitError", "GateError", "GuardError", "Manifest", "OptionError",
    "PublishError", "Recipe", "Settings", "SourceError", "VerificationError", "__version__",
    "convert", "diff", "evaluate", "load_edit", "plan", "replay", "verify",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
