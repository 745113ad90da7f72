"""Linear algebra of directions and subspaces: pure functions of tensors."""

import torch
from torch import Tensor

from converter.errors import FitError


def top_right_singular_vectors(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The leading right singular vectors of an uncentred matrix x (N, D).

    Returns:
        (D, count) orthonormal columns, and all min(N, D) singular values, descending.
    """
    _, values, vectors = torch.linalg.svd(x.double(), full_matrices=False)
    return vectors[:count].T, values


_SAME_DIRECTION = 0.1
"""A unit vector adds a dimension to a subspace only if its part outside is longer than this. A
shorter part is noise, and normalising it would turn noise into a direction.
"""


def extend(basis: Tensor, columns: Tensor) -> Tensor:
    """An orthonormal basis (D, a), extended by the directions that orthonormal columns (D, b) add
    to its span.
    """
    if columns.shape[1] == 0:
        return basis
    outside = columns - basis @ (basis.T @ columns)
    left, values, _ = torch.linalg.svd(outside, full_matrices=False)
    return torch.cat([basis, left[:, values > _SAME_DIRECTION]], 1)


def remove(x: Tensor, basis: Tensor) -> Tensor:
    """Project rows away from a subspace: ``x - (x P) P^T`` for x (N, D) and P (D, k)."""
    x = x.double()
    return x - (x @ basis) @ basis.T


def leading_eigenvectors(moment: Tensor, count: int) -> Tensor:
    """The eigenvectors of a symmetric (D, D) matrix with the largest eigenvalues, (D, count)."""
    vectors: Tensor = torch.linalg.eigh(moment.double()).eigenvectors
    return vectors.flip(1)[:, :count]


def ridge(gram: Tensor, cross: Tensor, penalty: float) -> Tensor:
    """B (D, K) that minimises ``|X B - Y|^2 + penalty |B|^2``, from X^T X and X^T Y.

    Args:
        gram: X^T X, (D, D).
        cross: X^T Y, (D, K).
        penalty: over 0, unless X^T X is invertible.

    Returns:
        float64.
    """
    added = penalty * torch.eye(len(gram), dtype=torch.float64)
    solution: Tensor = torch.linalg.solve(gram.double() + added, cross.double())
    return solution


def random_basis(width: int, rank: int, seed: int, spared: Tensor) -> Tensor:
    """A uniformly random subspace, as a control for fitted ones; the same on every device.

    Args:
        width, rank: D, and R, at most D - k.
        seed: of the draw.
        spared: (D, k) orthonormal columns that the subspace is orthogonal to; k may be 0.

    Returns:
        (D, R) float32 with orthonormal columns.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(width, rank, generator=generator, dtype=torch.float64)
    x = x - spared @ (spared.T @ x)
    basis: Tensor = torch.linalg.qr(x).Q
    return basis.float().contiguous()


def shared_directions(moment: Tensor | None, count: int, width: int) -> Tensor:
    """The leading neutral directions of all layers, (D, count); (D, 0) without a moment (D, D)."""
    if moment is None or count == 0:
        return torch.empty(width, 0, dtype=torch.float64)
    return leading_eigenvectors(moment, count)


def mean_difference(differences: Tensor) -> Tensor:
    """The unit vector along the mean row of (N, D), as (1, D).

    Raises:
        FitError: the mean is zero: the two sides do not differ.
    """
    mean: Tensor = differences.double().mean(0, keepdim=True)
    if not mean.any():
        raise FitError("the toxic and the neutral side have the same mean", hint="check the pairs")
    return torch.nn.functional.normalize(mean)


def svd_directions(differences: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first ``count`` right singular vectors of (N, D) as rows, turned to the toxic side.

    Returns:
        (count, D) and all singular values.

    Raises:
        FitError: all differences are zero.
    """
    vectors, values = top_right_singular_vectors(differences, count)
    if not values[0] > 0:
        raise FitError("the toxic and the neutral side are the same", hint="check the pairs")
    return turned(vectors.T, differences.double().mean(0)), values


def turned(rows: Tensor, toward: Tensor) -> Tensor:
    """Rows (K, D) with signs such that each has a component >= 0 along ``toward`` (D,)."""
    signs = torch.where(rows @ toward < 0, -1.0, 1.0).double()
    return signs[:, None] * rows


_WIDE = 1024
"""Hidden size from which iteration is clearly faster than a whole decomposition."""


def eigen_directions(matrix: Tensor, count: int, toward: Tensor) -> Tensor:
    """The eigenvectors of a symmetric (D, D) matrix with the largest eigenvalues, ``turned`` rows.

    A few of many are found by iteration (LOBPCG) from a fixed start, since there is a matrix for
    every layer.

    Returns:
        (count, D) float64.
    """
    width = len(matrix)
    if width < max(_WIDE, 3 * count):
        return turned(leading_eigenvectors(matrix, count).T, toward)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(width, count, generator=generator, dtype=torch.float64)
    found = torch.lobpcg(matrix.double(), X=start, niter=500, tol=1e-10, largest=True)
    return turned(found[1].T, toward)


def numerical_rank(A: Tensor) -> int:
    """The rank of a matrix (O, I): the number of singular values above max(O, I) times float32's
    epsilon times the largest.

    They are the roots of the eigenvalues of the smaller Gram matrix, in float64.
    """
    wide = (A if A.shape[0] <= A.shape[1] else A.T).double()
    values = torch.linalg.eigvalsh(wide @ wide.T).clamp(min=0).sqrt()
    least = max(A.shape) * torch.finfo(torch.float32).eps * values[-1]
    return int((values > least).sum())
