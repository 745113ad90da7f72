"""Measure the change of one tensor: its size, its rank, and its directions.

The change C = B - A of a matrix (N, M) is read in blocks of rows, twice:

    Y = C Omega          Omega (M, s) random; ||A||, ||C|| and the noise on the way
    X = Q^T C            Q (N, s) an orthonormal basis of Y

The singular values of X are the leading ones of C or a little less (Halko, Martinsson and Tropp,
SIAM Review 53, 2011, section 4), so none is made up. Memory is s (N + M) numbers and a block.

**Rank.** B is rounded to its dtype, which alone makes C of full rank. An element that changed was
rounded by at most half a unit in its last place, with the variance of a uniform error. A matrix of
independent errors with these variances has a largest singular value of about the norm of the
largest row of standard deviations plus that of the largest column (Bandeira and van Handel, Annals
of Probability 44, 2016). A singular value counts if it exceeds ``_SAFETY`` times that. One smaller
than about ||noise|| / sqrt(s), which is lost in the sketch's noise, may be missed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from io import RawIOBase
from math import isfinite, prod, sqrt

import torch
from torch import Tensor

from converter.checkpoints.safetensors.header import TensorInfo
from converter.checkpoints.safetensors.rewrite import read_rows
from converter.edits.rounding_bounds import half_ulp

CAP = 16
"""The largest rank that is reported; a larger one is ``more than CAP``."""

_SKETCH = CAP + 8
"""Columns of Omega."""

_SAFETY = 4.0
"""Factor on the bound of the noise. Errors are not quite independent of the rounded values:
corrections smaller than half a unit are lost together. 3.5 times the bound was seen, at rank 1 and
width 16,384, where a third of the elements did not change at all.
"""

_STRIP = 1 << 18
"""Elements of a block."""


@dataclass(frozen=True, slots=True)
class Spectrum:
    """The change of one tensor; of several matrices (experts), their largest rank.

    Attributes:
        relative_change: ||B - A|| / ||A||, Frobenius; None if one holds NaN or Inf, or A is zero.
        rank: of the part above the noise; ``CAP + 1`` for more than ``CAP``; None if unknown.
        singular_values: of the change over ||A||, the leading ones, of the matrix with that rank.
        noise: the largest of them that rounding may cause, also over ||A||.
        in_span: share of ||B - A||^2 that lies in the span of a basis; None without one.
    """

    relative_change: float | None
    rank: int | None
    singular_values: tuple[float, ...]
    noise: float
    in_span: float | None


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor in an open file."""

    file: RawIOBase
    info: TensorInfo


def spectrum(before: Place, after: Place, basis: Tensor | None, axis: int | None) -> Spectrum:
    """Compare two tensors of one shape whose dtypes are floating-point numbers.

    Args:
        before, after: A and B.
        basis: U (D, R) with orthonormal columns.
        axis: of length D, the last or the last but one; None without a basis.

    Raises:
        CheckpointError: a file ends early.
    """
    count, height, width = _matrices_of(before.info.shape)
    last = axis is not None and axis == len(before.info.shape) - 1 and width > 1
    U = None if basis is None or axis is None else basis.double()
    flat = [
        Place(place.file, replace(place.info, shape=(count * height, width)))
        for place in (before, after)
    ]
    sums = torch.zeros(3, dtype=torch.float64)
    worst: tuple[float, Tensor, float] = (-1.0, torch.zeros(0), 0.0)
    for number in range(count):
        rows = range(number * height, (number + 1) * height)
        values, noise, added = _matrix(flat, rows, width, U, last)
        sums += added
        rank = float((values > noise).sum()) if sums[1].isfinite() else 0.0
        if rank > worst[0]:
            worst = rank, values, noise
    whole, change, inside = sums.tolist()
    norm = sqrt(whole)
    if not (isfinite(change) and isfinite(norm)):
        return Spectrum(None, None, (), 0.0, None)
    rank, values, noise = worst
    share = inside / change if change else 0.0
    return Spectrum(
        relative_change=sqrt(change) / norm if norm else None,
        rank=min(int(rank), CAP + 1),
        singular_values=tuple((values[:CAP] / (norm or 1.0)).tolist()),
        noise=noise / (norm or 1.0),
        in_span=None if U is None else share,
    )


def _matrices_of(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """A tensor's shape as a number of matrices (N, M): experts come first, a vector is a column."""
    if len(shape) < 2:
        return 1, prod(shape), 1
    if len(shape) == 3:
        return shape[0], shape[1], shape[2]
    return 1, shape[0], prod(shape[1:])


def _blocks(
    sides: Sequence[Place], rows: range, width: int
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Blocks of rows of two tensors: the rows, and both blocks as stored."""
    step = max(_STRIP // max(width, 1), 1)
    for i in range(0, len(rows), step):
        part = rows[i : i + step]
        a, b = (read_rows(side.file, side.info, part.start, part.stop) for side in sides)
        yield slice(i, i + len(part)), a, b


def _matrix(
    sides: Sequence[Place], rows: range, width: int, U: Tensor | None, last: bool
) -> tuple[Tensor, float, Tensor]:
    """For the change of one matrix: the singular values, descending, and the bound of the noise.

    For all matrices of a tensor, also ||A||^2, ||C||^2, and the part of the latter in the span of
    U.
    """
    height, generator = len(rows), torch.Generator().manual_seed(0)
    size = min(_SKETCH, height, width)
    omega = torch.randn(width, size, generator=generator, dtype=torch.float64)
    Y = torch.zeros(height, size, dtype=torch.float64)
    columns = torch.zeros(width, dtype=torch.float64)
    along = torch.zeros(0 if U is None or last else U.shape[1], width, dtype=torch.float64)
    widest = before = change = inside = 0.0
    for part, a, b in _blocks(sides, rows, width):
        old = a.double()
        C = b.double() - old
        Y[part] = C @ omega
        before += float(old.square().sum())
        change += float(C.square().sum())
        variances = torch.where(C != 0, half_ulp(b).square() / 3, 0.0)
        widest = max(widest, float(variances.sum(1).max()))
        columns += variances.sum(0)
        if U is not None and last:
            inside += float((C @ U).square().sum())
        elif U is not None:
            along.addmm_(U[part].T, C)
    inside += float(along.square().sum())
    sums = torch.tensor([before, change, inside], dtype=torch.float64)
    if not isfinite(change) or not size:
        return torch.zeros(size), 0.0, sums
    Q, X = torch.linalg.qr(Y).Q, torch.zeros(size, width, dtype=torch.float64)
    for part, a, b in _blocks(sides, rows, width):
        X.addmm_(Q[part].T, b.double().sub_(a.double()))
    noise = _SAFETY * (sqrt(widest) + sqrt(float(columns.max())))
    return torch.linalg.svdvals(X), noise, sums
