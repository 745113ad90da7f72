"""gloss-convert: make a language model less toxic by editing its checkpoint.

This is the public interface for Python. It does the same as the commands:

    import converter

    recipe = converter.Recipe(source="HuggingFaceTB/SmolLM2-360M", method="profs")
    print(converter.plan(recipe)["edited_layers"])
    manifest = converter.convert(recipe, "out")
    assert converter.verify("out") == []

Nothing here prints or exits. Errors are raised as ``ConverterError``, and progress goes to the
logger ``converter``. Everything else in this package may change from version to version.
"""

from typing import TYPE_CHECKING, Any

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
from converter.version import __version__

if TYPE_CHECKING:
    from converter.api import convert, diff, evaluate, load_edit, plan, replay, verify
    from converter.edits.base import Edit

__all__ = [
    "CheckpointError", "ConverterError", "DataError", "DestinationError", "Edit", "Evaluation",
    "EvaluationOptions", "FitError", "GateError", "GuardError", "Manifest", "OptionError",
    "PublishError", "Recipe", "Settings", "SourceError", "VerificationError", "__version__",
    "convert", "diff", "evaluate", "load_edit", "plan", "replay", "verify",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import the other names of ``__all__`` on first use, since importing torch takes a second."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from converter.runtime.cache import find_folders

    find_folders()
    from converter import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
