"""What happens to one weight.

An ``Edit`` looks at a weight and answers with a change or with nothing; it knows no files.
``apply`` carries the change out and measures it. Throughout, W is (D, F) with the hidden size
first, in float32 (float64 if it is stored so), however it is stored: a Conv1D weight is
transposed on the way in and out, a bias has F = 1.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite, sqrt
from typing import Protocol

import torch
from torch import Tensor

from converter.errors import CheckpointError
from converter.header import to_bytes
from converter.plan import Target
from converter.quantization import dequantize, quantize

FP8_AIM = 1e-3
"""Share of what was along the subspace that rounding a weight to FP8 aims to leave there, at most;
rounding to bfloat16 leaves as much."""


@dataclass(frozen=True, slots=True)
class LowRank:
    """A change ``W + B A`` with B (D, R) and A (R, F), the two factors of a LoRA adapter."""

    B: Tensor
    A: Tensor


class Edit(Protocol):
    """What a method makes of a model."""

    def delta(self, target: Target, W: Tensor) -> LowRank | None:
        """The change of one weight W (D, F), on the device where it is to be computed."""

    def output(self, layer: int, f: Tensor, bias: Tensor | None) -> Tensor:
        """The same as seen from outside: what the down-projection gives after the edit.

        Args:
            layer: whose.
            f: (..., D), what it gives now, in any dtype.
            bias: (D,) of the projection, or None.
        """


@dataclass(frozen=True, slots=True)
class Projection:
    """Removes a subspace from what a layer writes: ``W - U (U^T W)``, so B = -U and A = U^T W.

    The factors are kept apart: the D x D projector is never formed.

    Attributes:
        bases: layer -> U (D, R) float32 with orthonormal columns.
        bias: whether biases are projected too. If they are not, the layer still writes a constant
            along U.
    """

    bases: Mapping[int, Tensor]
    bias: bool = True

    def delta(self, target: Target, W: Tensor) -> LowRank | None:
        basis = self.bases.get(target.layer)
        if basis is None or (target.role == "down_proj_bias" and not self.bias):
            return None
        U = basis.to(W)
        return LowRank(-U, U.T @ W)

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
        energy_removed: ||B A||^2 / ||W||^2, before rounding; for a projection, the share of the
            weight's squared norm that lay in the subspace.
        leakage: ||B^T W'|| / ||B^T W|| after rounding: what is left along the subspace. It is 0 in
            exact arithmetic; rounding to bf16 leaves about 1e-3.
        requantized: for a weight in FP8, ||W' - (W + B A)|| / ||W||, what storing it again cost on
            top of the edit, and what became of its scales; else None.
    """

    name: str
    shard: str
    layer: int
    role: str
    axis: int
    shape: tuple[int, ...]
    dtype: str
    sha256_before: str
    sha256_after: str
    norm: float
    relative_change: float
    energy_removed: float
    leakage: float
    requantized: "Requantized | None"


@dataclass(frozen=True, slots=True)
class Requantized:
    """The part of an ``EditRecord`` about FP8; ``block`` is how many rows and columns share one."""

    error: float
    scales: str
    shard: str
    block: tuple[int, int]
    sha256_before: str
    sha256_after: str


@dataclass(frozen=True, slots=True)
class Edited:
    """A changed tensor, of the shape and dtype that it had, on the CPU; so its scales, if any."""

    tensor: Tensor
    scale: Tensor | None
    record: EditRecord


def output_first(tensor: Tensor, axis: int) -> Tensor:
    """A stored tensor as W (D, F): the hidden axis first, all others flattened."""
    return tensor.movedim(axis, 0).reshape(tensor.shape[axis], -1)


def apply(
    edit: Edit, target: Target, tensor: Tensor, device: str, scale: Tensor | None = None
) -> Edited | None:
    """Edit one tensor.

    Args:
        edit: what to do.
        target: which tensor it is.
        tensor: as stored, on the CPU.
        device: where to compute.
        scale: of a weight in FP8, as stored.

    Returns:
        None if the edit leaves it alone.

    Raises:
        CheckpointError: the tensor holds NaN or Inf, or would after the edit.
    """
    block = target.scales.block if target.scales else (1, 1)
    wide = torch.promote_types(tensor.dtype, torch.float32) if scale is None else torch.float32
    values = tensor if scale is None else dequantize(tensor, scale, block)
    W = output_first(values.to(device, wide), target.axis)
    norm = norm_of(W)
    if not isfinite(norm):
        raise CheckpointError(
            f"tensor {target.info.name} of {target.shard} holds NaN or Inf",
            hint="the source is damaged; get an intact copy",
        )
    change = edit.delta(target, W)
    if change is None:
        return None
    exact = torch.addmm(W, change.B, change.A)
    new_scale, error = None, 0.0
    if scale is None:
        rounded = exact.to(tensor.dtype)
        del exact
        W_new = rounded.to(wide)
    else:
        allowed = FP8_AIM * norm_of(change.A)
        rounded, new_scale = quantize(exact, scale.to(device), block, change.B, allowed)
        new_scale = new_scale.cpu()
        W_new = dequantize(rounded, new_scale.to(device), block)
        error = norm_of(W_new, exact) / (norm or 1.0)
    leakage = norm_of(change.B.T @ W_new) / (norm_of(change.B.T @ W) or 1.0)
    if not isfinite(leakage):
        raise CheckpointError(
            f"tensor {target.info.name} overflows {target.info.dtype} when it is edited"
        )
    moved = tensor.movedim(target.axis, 0).shape
    new = rounded.reshape(moved).movedim(0, target.axis).cpu().contiguous()
    record = EditRecord(
        name=target.info.name,
        shard=target.shard,
        layer=target.layer,
        role=target.role,
        axis=target.axis,
        shape=target.info.shape,
        dtype=target.info.dtype,
        sha256_before=_sha256(tensor),
        sha256_after=_sha256(new),
        norm=norm,
        relative_change=norm_of(W_new, W) / (norm or 1.0),
        energy_removed=(norm_of(change.A) / (norm or 1.0)) ** 2,
        leakage=leakage,
        requantized=_requantized(target, error, scale, new_scale),
    )
    return Edited(new, new_scale, record)


def _requantized(
    target: Target, error: float, scale: Tensor | None, new_scale: Tensor | None
) -> Requantized | None:
    if target.scales is None or scale is None or new_scale is None:
        return None
    place = target.scales
    return Requantized(
        error, place.info.name, place.shard, place.block, _sha256(scale), _sha256(new_scale)
    )


def _sha256(tensor: Tensor) -> str:
    return hashlib.sha256(to_bytes(tensor)).hexdigest()


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
