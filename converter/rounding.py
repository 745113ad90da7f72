"""How far a weight that was projected and rounded may be from the exact projection."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import RawIOBase
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from converter.edit import columns, output_first
from converter.header import TensorInfo, to_bytes
from converter.quantization import dequantize, spread
from converter.shards import read_tensor

SLACK = 8.0
"""Factor on the probabilistic bound sqrt(D) u for a float32 sum of D products (Higham and Mary,
SIAM J. Sci. Comput. 41, 2019): at 8 a correct sum exceeds it with negligible probability."""

U32 = 2.0**-24
"""Unit roundoff of float32, in which edits are computed."""


def half_ulp(x: Tensor) -> Tensor:
    """Half the distance from |x| to the next larger value of its dtype, in float64.

    This is the largest error that rounding to nearest can have made where it gave x. With
    |x| = m 2^e, 1/2 <= m < 1, the distance is eps 2^(e-1), and below the normal numbers it is
    eps times the smallest of them.
    """
    info = torch.finfo(x.dtype)
    wide = x.float() if x.dtype != torch.float64 else x
    exponent = torch.frexp(wide).exponent
    normal = torch.ldexp(torch.full(x.shape, info.eps / 4, dtype=torch.float64), exponent)
    return torch.where(wide.abs() < info.tiny, info.eps * info.tiny / 2, normal)


@dataclass(frozen=True, slots=True)
class Stored:
    """An edited tensor as it is on disk, before or after.

    Attributes:
        tensor, scale: as stored; the scale of a weight in FP8.
        W: (D, F), what they stand for.
        step: of a weight in FP8, gives the distance to the next larger value, float64, for some
            columns; else None.
    """

    tensor: Tensor
    scale: Tensor | None
    W: Tensor
    step: Callable[[slice], Tensor] | None

    @property
    def digests(self) -> tuple[str, str | None]:
        """sha256 of tensor and scale."""
        first, *rest = (
            hashlib.sha256(to_bytes(part)).hexdigest()
            for part in (self.tensor, self.scale)
            if part is not None
        )
        return first, rest[0] if rest else None


def read_stored(
    opened: Callable[[str], RawIOBase], entry: Mapping[str, Any], infos: Mapping[str, TensorInfo]
) -> Stored:
    """Read an edited tensor.

    Args:
        opened: opens a shard.
        entry: of the manifest's ``edited``.
        infos: tensor name -> entry in its shard's header.
    """
    with opened(entry["shard"]) as file:
        tensor = read_tensor(file, infos[entry["name"]])
    fp8 = entry["requantized"]
    if fp8 is None:
        return Stored(tensor, None, output_first(tensor, entry["axis"]), None)
    with opened(fp8["shard"]) as file:
        scale = read_tensor(file, infos[fp8["scales"]])
    block = fp8["block"]

    def step(part: slice) -> Tensor:
        return 2 * half_ulp(tensor[:, part]) * spread(scale, tensor.shape, block, part)

    return Stored(tensor, scale, dequantize(tensor, scale, block), step)


def rounding_bound(W: Tensor, norm: float) -> float:
    """An upper bound on ||U^T W||_F for W (D, F) that is a projection, rounded to its dtype.

    It is for rounding to nearest. Let P be the exact projection of the source's weight, so
    U^T P = 0, and W = P + E.
    ||U^T W|| = ||U^T E|| <= ||E||, since U has orthonormal columns. E has two parts: the final
    rounding, at most half a unit in the last place of each element, and the float32 arithmetic
    before it, whose sums over D products err by at most ``SLACK`` sqrt(D) u of the norms involved,
    the largest of which is that of the weight before the edit. The bound cannot assume that
    rounding errors are independent of U: corrections smaller than half a unit are lost together.

    Args:
        W: as stored.
        norm: ||W||_F before the edit, from the manifest.
    """
    squares = sum(float(half_ulp(block).square().sum()) for block in torch.split(W, columns(W), 1))
    return sqrt(squares) + SLACK * sqrt(W.shape[0]) * U32 * norm


def is_projection(
    found: Tensor,
    original: Tensor,
    basis: Tensor,
    step: Callable[[slice], Tensor] | None = None,
    nearest: bool = True,
) -> bool:
    """Whether each element of ``found`` is that of W - U (U^T W), rounded to its dtype.

    The reference is computed in float64. An element may be off by half a unit in its last place;
    in 16 bits and not rounded to ``nearest``, by a whole one and one machine epsilon of the root
    mean square of its column of W, as ``projector`` promises; in FP8 by ``step``, the distance of
    the values that it has there; and by the float32 arithmetic before it:
    ``SLACK`` sqrt(D) u (|W_ij| + ||U_i|| ||W_j||), with row i of U and column j of W, which bound
    the sums that give the correction.
    """
    U = basis.double()
    width = columns(found)
    for start in range(0, found.shape[1], width):
        part = slice(start, start + width)
        new, W = found[:, part], original[:, part].double()
        exact = W - U @ (U.T @ W)
        scale = W.abs() + U.norm(dim=1)[:, None] * W.norm(dim=0)
        rounding = half_ulp(new) if step is None else step(part)
        if step is None and not nearest and new.dtype.itemsize == 2:
            rounding = 2 * rounding + torch.finfo(new.dtype).eps * W.square().mean(0).sqrt()
        allowed = rounding + SLACK * sqrt(W.shape[0]) * U32 * scale
        if not bool(((new.double() - exact).abs() <= allowed).all()):
            return False
    return True
