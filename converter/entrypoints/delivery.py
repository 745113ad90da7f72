"""What becomes of the result of a conversion, beside its bytes."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from converter.entrypoints.stream_push import Streaming
from converter.evaluation.fit import Fitted
from converter.evaluation.gates import Gates
from converter.manifest import Evaluation, Manifest
from converter.methods.base import Method
from converter.methods.workbench import Bench
from converter.release.signing import Signer

Evaluate = Callable[[Bench, Fitted, Method], Evaluation]
"""Measures an edit before it is written; the results."""

Pictures = Callable[[Manifest, Path], list[Path]]
"""Draws what a manifest says into a folder that holds the edit's file; the files drawn."""


def no_pictures(manifest: Manifest, folder: Path) -> list[Path]:
    return []


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """How a result is judged, shown, signed and published.

    Attributes:
        overwrite: replace a checkpoint that is already at the destination.
        gates: limits on what is measured, beyond the guard's.
        evaluation: measures the edit before it is written; its results go into the manifest.
        pictures: draws into the new folder what the card then shows.
        signer: signs the folder once it is verified.
        stream: publishes the shards as they are finished; the destination gets all else.
    """

    overwrite: bool = False
    gates: Gates = field(default_factory=Gates)
    evaluation: Evaluate | None = None
    pictures: Pictures = no_pictures
    signer: Signer | None = None
    stream: Streaming | None = None
