"""An edit of a checkpoint as data, and the record of what it did to each tensor."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import sqrt
from typing import Any

from torch import Tensor

from converter.checkpoints.plan import Target
from converter.edits.deltas import Delta

Patch = Mapping[str, Any] | str
"""What becomes of a text file: an RFC 7396 merge patch of a JSON object, or text that is put in
front of any other file."""


@dataclass(frozen=True, slots=True)
class Edit:
    """All that a method changes in a checkpoint, and nothing about how that is written.

    Attributes:
        tensors: name on disk -> what becomes of it.
        created: name -> a tensor that the source lacks; it is stored in its own dtype.
        patches: file of the source -> how its text changes.
        files: path -> content of a file that the source lacks.
    """

    tensors: Mapping[str, Delta] = field(default_factory=dict)
    created: Mapping[str, Tensor] = field(default_factory=dict)
    patches: Mapping[str, Patch] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Footprint:
    """What an edit will change, known from the headers alone: planned, shown and refused by it.

    Attributes:
        weights: tensors that change.
        kinds: of these changes.
        rank: largest number of columns of what is taken out or added; 0 for kinds that have none.
        created: name -> shape of a tensor that the source lacks.
        patches: files of the source whose text changes.
        files: paths of files that the source lacks.
    """

    weights: tuple[Target, ...] = ()
    kinds: tuple[type[Delta], ...] = ()
    rank: int = 0
    created: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    patches: tuple[str, ...] = ()
    files: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class EditRecord:
    """What an edit did to one tensor; norms are Frobenius norms.

    Attributes:
        kind: of the change; see ``edits.deltas``.
        norm: ||W||, before.
        relative_change: ||W' - W|| / ||W||, after rounding to the stored dtype.
        rounding_error: ||W' - exact(W)|| / ||W||, what storing the result cost.
        measures: the kind's own numbers, such as ``leakage``.
        sha256_after: None if the tensor itself stays as it is.
        requantized: what became of the scales of a weight in FP8; else None.
        lora: where the edit is, if it is in an adapter; norms are then those of W' = W + B A.
    """

    name: str
    shard: str
    layer: int
    role: str
    axis: int
    shape: tuple[int, ...]
    dtype: str
    kind: str
    sha256_before: str
    sha256_after: str | None
    norm: float
    relative_change: float
    rounding_error: float
    measures: Mapping[str, float]
    requantized: "Requantized | None"
    lora: "Lora | None" = None

    @classmethod
    def of(
        cls,
        target: Target,
        delta: Delta,
        norms: Mapping[str, float],
        digests: tuple[str, str | None],
        requantized: "Requantized | None" = None,
        lora: "Lora | None" = None,
    ) -> "EditRecord":
        """From the norms of ``editor.Editor.norms`` and sha256 before and after."""
        norm = norms["W"] or 1.0
        return cls(
            name=target.info.name,
            shard=target.shard,
            layer=target.layer,
            role=target.role,
            axis=target.axis,
            shape=target.info.shape,
            dtype=target.info.dtype,
            kind=delta.kind,
            sha256_before=digests[0],
            sha256_after=digests[1],
            norm=norms["W"],
            relative_change=norms["change"] / norm,
            rounding_error=norms["error"] / norm,
            measures=delta.measures(norms),
            requantized=requantized,
            lora=lora,
        )


@dataclass(frozen=True, slots=True)
class Requantized:
    """The part of an ``EditRecord`` about FP8; ``block`` is how many rows and columns share one."""

    scales: str
    shard: str
    block: tuple[int, int]
    sha256_before: str
    sha256_after: str


@dataclass(frozen=True, slots=True)
class Lora:
    """The part of an ``EditRecord`` about an adapter: the module in memory, and sha256 of A and B.

    Their bytes are those of the tensors in the adapter's file.
    """

    module: str
    sha256_a: str
    sha256_b: str


def norm_of(x: Tensor, minus: Tensor | None = None) -> float:
    """||x||, or ||x - minus||, Frobenius, summed in float64 over blocks of columns of (O, I)."""
    total = 0.0
    for start in range(0, x.shape[1], columns(x)):
        block = x[:, start : start + columns(x)].double()
        if minus is not None:
            block = block - minus[:, start : start + columns(x)]
        total += float(block.square().sum())
    return sqrt(total)


BLOCK = 1 << 17
"""Elements of a tensor that are held in float64 at a time."""


def columns(x: Tensor) -> int:
    """How many columns of (O, I) make a block."""
    return max(BLOCK // max(x.shape[0], 1), 1)
