"""Everything about the result of a conversion besides its bytes; and its pictures."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from converter.checkpoints.names import EDIT_FILE
from converter.entrypoints.push import Streaming
from converter.evaluation.fit import Fitted
from converter.evaluation.gates import Gates
from converter.evaluation.plots import plot_evaluation, plot_fit
from converter.manifest import Evaluation, Manifest, SearchRecord
from converter.methods.base import Method
from converter.methods.workbench import Bench
from converter.outputs.destination import check_folder
from converter.release.signing import Signer
from converter.runtime import progress
from converter.runtime.extras import need

Evaluate = Callable[[Bench], Callable[[Fitted, Method], Evaluation]]
"""Measures an edit before it is written, and returns the results."""

Pictures = Callable[[Manifest, Path], list[Path]]
"""Draws pictures of a manifest into a folder with the edit's file, and returns their names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """How a result is judged, shown, signed and published.

    Attributes:
        overwrite: replace a checkpoint that is already at the destination.
        scratch: the destination is a folder of the cache, which is deleted once it is uploaded:
            replace everything in it but the result of the same run.
        gates: limits on what is measured, beyond the guard's.
        evaluation: measures the edit before it is written; its results go into the manifest.
        pictures: draws the card's pictures into the new folder.
        signer: signs the folder once it is verified.
        stream: uploads the shards as they are finished; the destination gets all other files.
        search: the search that found the options of the method; None if they were typed.
    """

    overwrite: bool = False
    scratch: bool = False
    gates: Gates = field(default_factory=Gates)
    evaluation: Evaluate | None = None
    pictures: Pictures | None = None
    signer: Signer | None = None
    stream: Streaming | None = None
    search: SearchRecord | None = None


def check_plots(plots: Path | None, destination: Path) -> Path | None:
    """Make sure at once that pictures can be drawn into a folder, if any are wanted.

    Returns:
        the place of the folder within the destination, or None if it is elsewhere. Pictures within
        the destination belong to the checkpoint, so they are drawn before its list of files is
        made.

    Raises:
        OptionError: matplotlib is missing.
        DestinationError: a folder elsewhere cannot be written.
    """
    if plots is None:
        return None
    need("--plots", "matplotlib")
    whole, found = destination.resolve(), plots.resolve()
    if found.is_relative_to(whole):
        return found.relative_to(whole)
    check_folder(plots)
    return None


def draw(manifest: Manifest, destination: Path, place: Path) -> list[Path]:
    """Draw a conversion in ``place``, which is absolute or relative to the destination."""
    folder = destination / place
    paths = plot_fit(manifest, destination / EDIT_FILE, folder)
    if manifest.evaluation is not None:
        paths += plot_evaluation(manifest.evaluation, folder)
    for path in paths:
        progress.note(f"  drawn: {place / path.name}")
    return paths
