"""What happens to the weights.

An ``Edit`` knows what becomes of a weight and of what it gives; it knows no files. Throughout, W is
(D, F) with the hidden size first, however it is stored: a Conv1D weight is transposed on the way in
and out, a bias has F = 1.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Protocol

from torch import Tensor

from converter.checkpoints.weights import Weight


class Edit(Protocol):
    """What a method makes of a model."""

    def basis(self, target: Weight) -> Tensor | None:
        """U (D, R), orthonormal columns, that is taken out of a weight; None: it stays as it is."""

    def output(self, layer: int, f: Tensor, bias: Tensor | None) -> Tensor:
        """The same as seen from outside: what the down-projection gives after the edit.

        Args:
            layer: whose.
            f: (..., D), what it gives now, in any dtype.
            bias: (D,) of the projection, or None.
        """


@dataclass(frozen=True, slots=True)
class Projection:
    """Removes a subspace from what a layer writes: ``W - U (U^T W)``.

    The D x D projector is never formed.

    Attributes:
        bases: layer -> U (D, R) float32 with orthonormal columns.
        bias: whether biases are projected too. If they are not, the layer still writes a constant
            along U.
    """

    bases: Mapping[int, Tensor]
    bias: bool = True

    def basis(self, target: Weight) -> Tensor | None:
        if target.is_bias and not self.bias:
            return None
        return self.bases.get(target.layer)

    def output(self, layer: int, f: Tensor, bias: Tensor | None) -> Tensor:
        basis = self.bases.get(layer)
        if basis is None:
            return f
        written = f if self.bias or bias is None else f - bias
        U = basis.to(f.device)
        return f - ((written.float() @ U) @ U.T).to(f.dtype)


@dataclass(frozen=True, slots=True)
class EditRecord:
    """What an edit did to one tensor; norms are Frobenius norms.

    Attributes:
        norm: ||W||, before.
        relative_change: ||W' - W|| / ||W||, after rounding to the stored dtype.
        energy_removed: ||U^T W||^2 / ||W||^2, the share of its squared norm in the subspace.
        leakage: ||U^T W'|| / ||U^T W||, what is left of it after rounding.
        rounding_error: ||W' - (W - U U^T W)|| / ||W||, what storing the result cost.
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
    sha256_before: str
    sha256_after: str | None
    norm: float
    relative_change: float
    energy_removed: float
    leakage: float
    rounding_error: float
    requantized: "Requantized | None"
    lora: "Lora | None" = None

    @classmethod
    def of(
        cls,
        target: Weight,
        norms: Mapping[str, float],
        digests: tuple[str, str | None],
        requantized: "Requantized | None" = None,
        lora: "Lora | None" = None,
    ) -> "EditRecord":
        """From the norms of ``projector.Projector.norms`` and sha256 before and after."""
        norm, removed = norms["W"] or 1.0, norms["P"]
        return cls(
            name=target.info.name,
            shard=target.shard,
            layer=target.layer,
            role=target.recorded_role,
            axis=target.axis,
            shape=target.info.shape,
            dtype=target.info.dtype,
            sha256_before=digests[0],
            sha256_after=digests[1],
            norm=norms["W"],
            relative_change=norms["change"] / norm,
            energy_removed=(removed / norm) ** 2,
            leakage=norms["left"] / (removed or 1.0),
            rounding_error=norms["error"] / norm,
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
    """||x||, or ||x - minus||, Frobenius, summed in float64 over blocks of columns of (D, F)."""
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
    """How many columns of (D, F) make a block."""
    return max(BLOCK // max(x.shape[0], 1), 1)
