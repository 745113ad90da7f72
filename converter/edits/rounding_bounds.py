"""Bounds on the distance of an edited and rounded weight from the exact edit."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from io import RawIOBase
from math import sqrt
from typing import Self

import torch
from torch import Tensor

from converter.checkpoints.safetensors.header import DTYPES, TensorInfo, to_bytes
from converter.checkpoints.safetensors.rewrite import Region
from converter.edits.deltas import Delta
from converter.edits.editor import BLOCK, PUSH, Rows
from converter.edits.storage import Matrix, dequantize, matrices, spread, whole
from converter.manifest import EditedTensor

SLACK = 8.0
"""Factor on the probabilistic bound sqrt(D) u for a float32 sum of D products (Higham and Mary,
SIAM J. Sci. Comput. 41, 2019): at 8 a correct sum exceeds it with negligible probability."""

_U32 = 2.0**-24
"""Unit roundoff of float32, in which weights in FP8 are edited; others are edited in float64, which
PyTorch rounds to 16 bits by way of float32."""


def half_ulp(x: Tensor) -> Tensor:
    """Half the distance from |x| to the next larger value of its dtype, in float64.

    A number that is rounded to nearest, with the result x, is at most this far from x. For
    |x| = m 2^e with 1/2 <= m < 1 the distance is eps 2^(e-1). For subnormal x it is eps times the
    smallest normal number.
    """
    info = torch.finfo(x.dtype)
    wide = x.float() if x.dtype != torch.float64 else x
    exponent = torch.frexp(wide).exponent
    normal = torch.ldexp(torch.full(x.shape, info.eps / 4, dtype=torch.float64), exponent)
    return torch.where(wide.abs() < info.tiny, info.eps * info.tiny / 2, normal)


class Stored:
    """An edited tensor on disk, before or after the edit; open during use.

    Args:
        opened: opens a shard.
        tensor: its record.
        infos: tensor name -> entry in its shard's header.
    """

    def __init__(
        self,
        opened: Callable[[str], RawIOBase],
        tensor: EditedTensor,
        infos: Mapping[str, TensorInfo],
    ) -> None:
        fp8, self._axis, self._files = tensor.requantized, tensor.axis, ExitStack()
        places = [(tensor.shard, tensor.name)] + ([(fp8.shard, fp8.scales)] if fp8 else [])
        self._digests = [hashlib.sha256() for _ in places]
        self._regions = [
            Region(self._files.enter_context(opened(shard)), infos[name], [digest])
            for (shard, name), digest in zip(places, self._digests, strict=True)
        ]
        self._block = fp8.block if fp8 else (1, 1)
        self.dtype = DTYPES[self._regions[0].info.dtype]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._files.close()

    def matrices(self) -> Iterator[tuple[Matrix, Rows | None]]:
        """Its matrices, (D, F) each. For an FP8 weight, which is held as a whole, also a function
        that returns the distance to the next larger value for some rows, float64.
        """
        if len(self._regions) == 1:
            yield from ((matrix, None) for matrix in matrices(self._regions[0], self._axis))
            return
        q, scale = map(whole, self._regions)
        W = dequantize(q, scale, self._block)
        steps = spread(scale, q.shape, self._block)
        yield Matrix.of(W), lambda i, j: 2 * half_ulp(q[i:j]) * steps[i:j]

    @property
    def digests(self) -> tuple[str, str | None]:
        """sha256 of tensor and scale, once all matrices were read."""
        first, *rest = (digest.hexdigest() for digest in self._digests)
        return first, rest[0] if rest else None


def _blocks(count: int) -> Iterator[tuple[int, int]]:
    """Blocks of rows of a matrix, small enough for the memory of intermediate results."""
    return ((start, min(start + BLOCK, count)) for start in range(0, count, BLOCK))


def left_along(stored: Stored, basis: Tensor) -> tuple[float, float, float]:
    """``||U^T W||``, the sum of the squares of half units in the last place of W, and ``||W||``.

    U is the basis (O, R); R is 0 for edits that remove no subspace.
    """
    U, left, units, squares = basis.double(), 0.0, 0.0, 0.0
    for matrix, _ in stored.matrices():
        P = torch.zeros(U.shape[1], matrix.width, dtype=torch.float64)
        for i, j in _blocks(len(U)):
            W = matrix.rows(i, j)
            P.addmm_(U[i:j].T, W.double())
            squares += float(W.double().square().sum())
            units += float(half_ulp(W).square().sum())
        left += float(P.square().sum())
    return sqrt(left), units, sqrt(squares)


def sha256_undone(stored: Stored, delta: Delta, height: int) -> str | None:
    """The sha256 of the original W (O, I) on disk, from W', O the height; None if it cannot be
    known.
    """
    digest = hashlib.sha256()
    for matrix, _ in stored.matrices():
        columns = slice(matrix.first, matrix.first + matrix.width)
        for i, j in [(0, height)] if matrix.transposed else _blocks(height):
            W = delta.undone(matrix.rows(i, j), slice(i, j), columns)
            if W is None:
                return None
            digest.update(to_bytes(W.T if matrix.transposed else W))
    return digest.hexdigest()


def rounding_bound(units: float, hidden_size: int, norm: float) -> float:
    """An upper bound on ||U^T W - (1 - a) U^T W0||_F for the edit W (O, I) of W0, to nearest.

    Let P be the exact edit, so U^T P = (1 - a) U^T W0, and W = P + E. Then ||U^T E|| <= ||E||,
    since U has orthonormal columns. E has two parts: the final rounding, at most half a unit in the
    last place of each element, and the arithmetic before it. Its sums over O products, if in
    float32, err by at most ``SLACK`` sqrt(O) u of the norms involved, the largest of which is that
    of the weight before the edit. Rounding errors are not independent of U: corrections smaller
    than half a unit are lost together.

    Args:
        units: the sum of their squares, of ``left_along``.
        hidden_size: O.
        norm: ||W||_F before the edit, from the manifest.
    """
    return sqrt(units) + SLACK * sqrt(hidden_size) * _U32 * norm


def check_rounded(
    after: Stored, before: Stored, delta: Delta, height: int, *, nearest: bool
) -> tuple[tuple[int, int] | None, dict[str, float]]:
    """Check that each element of W' is that of ``delta.exact``, rounded to its dtype.

    The reference is computed in float64. An element may differ by half a unit in its last place. In
    16 bits, if a subspace is removed and rounding is not ``nearest``, it may differ by a whole unit
    plus ``PUSH`` machine epsilons of the root mean square of its column of W, as ``editor``
    promises; in FP8, by the distance between neighbouring values there. The arithmetic before it,
    if in float32, adds ``SLACK`` sqrt(O) u (|W_ij| + ``delta.terms``).

    Both tensors, W' and W (O, I), O the height, are always read to the end.

    Returns:
        the first block of rows with a wrong element, or None; and the norms of
        ``editor.Editor.norms``.
    """
    work, wrong = delta.to("cpu", torch.float64), None
    U = torch.zeros(height, 0) if work.protects is None else work.protects
    U, sums = U.double(), dict.fromkeys(("W", "P", "change", "error", "left"), 0.0)
    feedback = delta.protects is not None and not nearest and after.dtype.itemsize == 2
    margin = PUSH * torch.finfo(after.dtype).eps if feedback else 0.0
    for (new, step), (old, _) in zip(after.matrices(), before.matrices(), strict=True):
        columns = slice(old.first, old.first + old.width)
        P, left = torch.zeros(2, U.shape[1], old.width, dtype=torch.float64)
        squares = torch.zeros(old.width, dtype=torch.float64)
        for i, j in _blocks(height):
            W = old.rows(i, j).double()
            P.addmm_(U[i:j].T, W)
            squares += W.square().sum(0)
        for i, j in _blocks(height):
            W, found = old.rows(i, j).double(), new.rows(i, j)
            terms = work.terms(slice(i, j), columns, squares.sqrt())
            allowed = SLACK * sqrt(height) * _U32 * (W.abs() + terms)
            allowed += half_ulp(found) * (1 + feedback) if step is None else step(i, j)
            allowed += margin * (squares / height).sqrt()
            exact = work.exact(W, slice(i, j), columns, P * work.factor, torch.empty_like(W))
            off = exact.sub_(found.double()).abs_()
            if wrong is None and not bool((off <= allowed).all()):
                wrong = i, j
            left.addmm_(U[i:j].T, found.double())
            sums["change"] += float((found.double() - W).square().sum())
            sums["error"] += float(off.square().sum())
        sums["W"] += float(squares.sum())
        sums["P"] += float(P.square().sum())
        sums["left"] += float((left - (1 - work.factor) * P).square().sum())
    return wrong, {name: sqrt(value) for name, value in sums.items()}
