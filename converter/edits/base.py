"""What happens to the weights.

An ``Edit`` knows what becomes of a weight and of what it gives; it knows no files. Throughout, W is
(D, F) with the hidden size first, however it is stored: a Conv1D weight is transposed on the way in
and out, a bias has F = 1.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Protocol, cast

from torch import Tensor

from converter.checkpoints.weights import Weight
from converter.edits.subspace_file import basis_name
from converter.manifest import EditedRole, EditedTensor, Lora, Requantized


class Edit(Protocol):
    """What a method makes of a model."""

    def basis(self, target: Weight) -> Tensor | None:
        """U (D, R), orthonormal columns, that is taken out of a weight; None: it stays as it is."""

    def basis_name(self, layer: int) -> str:
        """What the subspace's file calls the basis of a layer."""

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
        shared: whether all layers have the same basis.
    """

    bases: Mapping[int, Tensor]
    bias: bool = True
    shared: bool = True

    def basis(self, target: Weight) -> Tensor | None:
        if target.is_bias and not self.bias:
            return None
        return self.bases.get(target.layer)

    def basis_name(self, layer: int) -> str:
        return basis_name(layer, shared=self.shared)

    def output(self, layer: int, f: Tensor, bias: Tensor | None) -> Tensor:
        basis = self.bases.get(layer)
        if basis is None:
            return f
        written = f if self.bias or bias is None else f - bias
        U = basis.to(f.device)
        return f - ((written.float() @ U) @ U.T).to(f.dtype)


def edited_tensor(
    target: Weight,
    basis: str,
    norms: Mapping[str, float],
    digests: tuple[str, str | None],
    *,
    requantized: Requantized | None = None,
    lora: Lora | None = None,
) -> EditedTensor:
    """The record of an edit of one tensor.

    Args:
        target: the tensor.
        basis: name of the one that it lost.
        norms: of ``Projector.norms``.
        digests: its sha256 before, and after if it changes.
        requantized: what became of its scales.
        lora: the adapter's part.
    """
    norm, removed = norms["W"] or 1.0, norms["P"]
    return EditedTensor(
        name=target.info.name,
        shard=target.shard,
        layer=target.layer,
        role=cast(EditedRole, target.recorded_role),
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
        basis=basis,
    )


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
