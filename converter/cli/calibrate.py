"""The command ``gloss calibrate``."""

from dataclasses import dataclass

from converter.cli.command import Answer, command, quiet_libraries
from converter.cli.convert import Destination, Overwrite
from converter.cli.fields import Part
from converter.cli.recipe import RecipePart
from converter.option import Options
from converter.recipe import CalibrationOptions, Recipe

_UNUSED = (
    "method", "options", "instances", "output", "activations", "forward", "batch_size", "rounding",
    "max_perplexity_ratio", "guard", "guard_draws", "force", "mask", "base_model",
)  # fmt: skip
"""Options of a recipe that do not bear on a calibration model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place(Options):
    """Where a calibration model goes."""

    destination: Destination
    overwrite: Overwrite = False


@command(
    "calibrate",
    recipe=RecipePart(without=_UNUSED),
    place=Part(_Place),
    asked=Part(CalibrationOptions),
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
