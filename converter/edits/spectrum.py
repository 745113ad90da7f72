"""What was done to one tensor: how large the change is, of which rank, and along which directions.

The change C = B - A of a matrix (N, M) is read in blocks of rows, twice:

    Y = C Omega          Omega (M, s) random; ||A||, ||C|| and the noise on the way
    X = Q^T C            Q (N, s) an orthonormal basis of Y

The singular values of X are the leading ones of C or a little less (Halko, Martinsson and Tropp,
SIAM Review 53, 2011, section 4), so none is made up. Memory is s (N + M) numbers and a block.

**Rank.** B is rounded to its dtype, which alone makes C of full rank. An element that changed was
rounded by at most half a unit in its last place, with the variance of a uniform error. A matrix of
independent errors with these variances has a largest singular value of about the norm of the
largest row of standard deviations plus that of the largest column (Bandeira and van Handel, Annals
of Probability 44, 2016). A singular value counts if it exceeds ``SAFETY`` times that. One smaller
than about ||noise|| / sqrt(s), which the sketch drowns, may be missed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import RawIOBase
from math import isfinite, prod, sqrt

import torch
from torch import Tensor

from converter.checkpoints.safetensors.header import TensorInfo, read_exactly
from converter.checkpoints.safetensors.rewrite import to_tensor
from converter.edits.rounding_bounds import half_ulp

CAP = 16
"""The largest rank that is told; more is ``more than CAP``."""

SKETCH = CAP + 8
"""Columns of Omega."""

SAFETY = 4.0
"""How far the noise is taken to reach. Errors are not quite independent of what was rounded: where
corrections are smaller than half a unit they are lost together. 3.5 times the bound below was seen,
at rank 1 and width 16,384, where a third of the elements did not change at all."""

STRIP = 1 << 18
"""Elements of a block."""


@dataclass(frozen=True, slots=True)
class Spectrum:
    """The change of one tensor; of several matrices (experts), their largest rank.

    Attributes:
        relative_change: ||B - A|| / ||A||, Frobenius; None if one holds NaN or Inf, or A is zero.
        rank: of the part above the noise; ``CAP + 1`` for more than ``CAP``; None if unknown.
        singular_values: of the change over ||A||, the leading ones, of the matrix with that rank.
        noise: what rounding may reach among them, over ||A||, too.
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

    def rows(self, start: int, stop: int, width: int) -> Tensor:
        """Rows of the tensor seen as (-1, width), as stored."""
        size = self.info.nbytes // max(prod(self.info.shape), 1)
        self.file.seek(self.info.start + start * width * size)
        data = read_exactly(self.file, (stop - start) * width * size, self.info.name)
        part = TensorInfo(self.info.name, self.info.dtype, (stop - start, width), 0, 0)
        return to_tensor(data, part)


@dataclass(slots=True)
class Sums:
    """What is added up over the matrices of a tensor."""

    before: float = 0.0
    change: float = 0.0
    inside: float = 0.0


def spectrum(before: Place, after: Place, basis: Tensor | None, axis: int | None) -> Spectrum:
    """Compare two tensors of one shape whose dtypes are floating-point numbers.

    Args:
        before, after: A and B.
        basis: U (D, R) with orthonormal columns.
        axis: of length D, the last or the last but one; None without a basis.

    Raises:
        CheckpointError: a file ends early.
    """
    count, height, width = matrices_of(before.info.shape)
    last = axis is not None and axis == len(before.info.shape) - 1 and width > 1
    U, sums = None if basis is None or axis is None else basis.double(), Sums()
    worst: tuple[float, Tensor, float] = (-1.0, torch.zeros(0), 0.0)
    for number in range(count):
        first = number * height

        def blocks(first: int = first) -> Iterator[tuple[slice, Tensor, Tensor]]:
            step = max(STRIP // max(width, 1), 1)
            for i in range(0, height, step):
                j = min(i + step, height)
                a, b = (p.rows(first + i, first + j, width) for p in (before, after))
                yield slice(i, j), a, b

        values, noise = _matrix(blocks, height, width, U, last, sums)
        rank = float((values > noise).sum()) if isfinite(sums.change) else 0.0
        if rank > worst[0]:
            worst = rank, values, noise
    norm = sqrt(sums.before)
    if not (isfinite(sums.change) and isfinite(norm)):
        return Spectrum(None, None, (), 0.0, None)
    rank, values, noise = worst
    share = sums.inside / sums.change if sums.change else 0.0
    return Spectrum(
        relative_change=sqrt(sums.change) / norm if norm else None,
        rank=min(int(rank), CAP + 1),
        singular_values=tuple((values[:CAP] / (norm or 1.0)).tolist()),
        noise=noise / (norm or 1.0),
        in_span=None if U is None else share,
    )


def matrices_of(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """A tensor's shape as a number of matrices (N, M): experts come first, a vector is a column."""
    if len(shape) < 2:
        return 1, prod(shape), 1
    if len(shape) == 3:
        return shape[0], shape[1], shape[2]
    return 1, shape[0], prod(shape[1:])


Blocks = Callable[[], Iterator[tuple[slice, Tensor, Tensor]]]
"""Reads two matrices side by side: rows, and both as stored."""


def _matrix(
    blocks: Blocks, height: int, width: int, U: Tensor | None, last: bool, sums: Sums
) -> tuple[Tensor, float]:
    """The singular values of one matrix's change, descending, and how far noise reaches."""
    generator = torch.Generator().manual_seed(0)
    size = min(SKETCH, height, width)
    omega = torch.randn(width, size, generator=generator, dtype=torch.float64)
    Y = torch.zeros(height, size, dtype=torch.float64)
    columns = torch.zeros(width, dtype=torch.float64)
    along = torch.zeros(0 if U is None or last else U.shape[1], width, dtype=torch.float64)
    widest = before = change = inside = 0.0
    for rows, a, b in blocks():
        old = a.double()
        C = b.double() - old
        Y[rows] = C @ omega
        before += float(old.square().sum())
        change += float(C.square().sum())
        variances = torch.where(C != 0, half_ulp(b).square() / 3, 0.0)
        widest = max(widest, float(variances.sum(1).max()))
        columns += variances.sum(0)
        if U is not None and last:
            inside += float((C @ U).square().sum())
        elif U is not None:
            along.addmm_(U[rows].T, C)
    sums.before += before
    sums.change += change
    sums.inside += inside + float(along.square().sum())
    if not isfinite(change) or not size:
        return torch.zeros(size), 0.0
    Q, X = torch.linalg.qr(Y).Q, torch.zeros(size, width, dtype=torch.float64)
    for rows, a, b in blocks():
        X.addmm_(Q[rows].T, b.double().sub_(a.double()))
    noise = SAFETY * (sqrt(widest) + sqrt(float(columns.max())))
    return torch.linalg.svdvals(X), noise
