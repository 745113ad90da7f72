"""Pictures of a conversion: where they go, and what they show."""

import importlib.util
from pathlib import Path

from converter.edits.edit_file import EDIT_FILE
from converter.errors import OptionError
from converter.evaluation.plots import plot_evaluation, plot_fit
from converter.manifest import Manifest
from converter.outputs.destination import check_folder
from converter.runtime import progress


def check_plots(plots: Path | None, destination: Path) -> Path | None:
    """Make sure at once that pictures can be drawn, and find out whether they belong to the result.

    Args:
        plots: a folder for pictures, if any are wanted.
        destination: of the result.

    Returns:
        where the folder is in the destination; None if it is elsewhere. Pictures in it are drawn
        before the list of files is made, and belong to the checkpoint.

    Raises:
        OptionError: matplotlib is missing.
        DestinationError: a folder elsewhere cannot be written.
    """
    if plots is None:
        return None
    require_matplotlib()
    whole, found = destination.resolve(), plots.resolve()
    if found.is_relative_to(whole):
        return found.relative_to(whole)
    check_folder(plots)
    return None


def require_matplotlib() -> None:
    """Raise OptionError at once if --plots cannot be had, rather than when all is done."""
    if importlib.util.find_spec("matplotlib") is None:
        raise OptionError("--plots needs matplotlib", hint="pip install 'gloss-convert[plot]'")


def draw(manifest: Manifest, destination: Path, place: Path) -> list[Path]:
    """Draw a conversion in ``place``, which is absolute or relative to the destination."""
    folder = destination / place
    paths = plot_fit(manifest, destination / EDIT_FILE, folder)
    if manifest.evaluation is not None:
        paths += plot_evaluation(manifest.evaluation, folder)
    for path in paths:
        progress.note(f"  drawn: {place / path.name}")
    return paths
