"""The command ``gloss calibrate``."""

from dataclasses import dataclass

from converter.cli.command import Answer, command, quiet_libraries
from converter.cli.convert import Destination, Overwrite
from converter.cli.fields import Part
from converter.cli.recipe import RecipePart
from converter.errors import Faults
from converter.option import Options
from converter.recipe import CalibrationOptions, Recipe, Settings

_UNUSED = (
    "method", "options", "instances", "output", "activations", "forward", "batch_size", "rounding",
    "max_perplexity_ratio", "guard", "guard_draws", "force", "mask", "base_model",
)  # fmt: skip
"""Options of a recipe that do not affect a calibration model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place(Options):
    """The destination of a calibration model."""

    destination: Destination
    overwrite: Overwrite = False


def _look(*, recipe: Recipe, place: _Place, asked: CalibrationOptions, faults: Faults) -> None:
    """Find all mistakes in the request before torch is loaded."""
    from converter.entrypoints import first_look

    first_look.look_at_recipe(recipe, Settings(), faults)
    first_look.look_at_destination(recipe, place.destination, place.overwrite, faults)


@command(
    "calibrate",
    recipe=RecipePart(without=_UNUSED),
    place=Part(_Place),
    asked=Part(CalibrationOptions),
    look=_look,
    examples=("gloss calibrate SOURCE ./calibration --minutes 10",),
)
def calibrate_command(recipe: Recipe, place: _Place, asked: CalibrationOptions) -> Answer:
    """Train a calibration model for --method fusion -o form=paper, in the folder DESTINATION.

    It is the first layers of SOURCE with its embedding and head, trained on the neutral sides of
    the pairs that a conversion with the same pairs and seed fits on. With --tokens alone, the same
    inputs give the same bytes on one machine.
    """
    from converter.entrypoints.calibrate import describe, write_calibration

    quiet_libraries()
    record = write_calibration(recipe, place.destination, asked, overwrite=place.overwrite)
    return Answer(*describe(record, place.destination))
