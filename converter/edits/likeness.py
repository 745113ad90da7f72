"""Compare two edits, each kind of change in its own terms.

Subspaces are compared by their principal angles, since a basis may turn within its subspace. Any
other change X of a weight is compared as a whole, X with X', not by its factors.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import asin, degrees, sqrt

import torch
from torch import Tensor

from converter.edits.deltas import AddLowRank, AddToRows, Delta


@dataclass(frozen=True, slots=True)
class Likeness:
    """Two changes X and X' of a weight, or two new tensors; norms are Frobenius norms.

    Attributes:
        kind: of the change; ``created`` of a new tensor.
        distance: ||X' - X|| / ||X||.
        cosine: <X, X'> / (||X|| ||X'||).
    """

    kind: str
    distance: float
    cosine: float

    @property
    def degrees(self) -> float:
        """The angle between two changes of equal length at this distance."""
        return 2 * degrees(asin(self.distance / 2)) if self.distance <= 2 else 180.0

    @classmethod
    def of(cls, kind: str, one: float, other: float, product: float) -> "Likeness":
        """The comparison, from ``<X, X>``, ``<X', X'>`` and ``<X, X'>``."""
        between = max(one + other - 2 * product, 0.0)
        if between <= _ROUNDING * max(one, other):
            return cls(kind, 0.0, 1.0)
        distance = sqrt(between / one) if one else float("inf")
        return cls(kind, distance, product / sqrt(one * other) if one * other else 0.0)


_ROUNDING = 1e-14
"""Precision of the squares of norms in float64: a distance of 1e-7 counts as none."""


def likeness(one: Delta, other: Delta, weight: Callable[[], Tensor]) -> Likeness:
    """Compare two changes of a weight, of one kind that removes no subspace.

    ``weight`` returns W (O, I) in its stored dtype, which changes of bits and replacements need.
    """
    if isinstance(one, AddLowRank) and isinstance(other, AddLowRank):

        def product(a: AddLowRank, b: AddLowRank) -> float:
            return float(((a.B.double().T @ b.B.double()) * (a.A.double() @ b.A.double().T)).sum())

        return Likeness.of(one.kind, product(one, one), product(other, other), product(one, other))
    if isinstance(one, AddToRows) and isinstance(other, AddToRows):
        common = int(torch.isin(one.rows, other.rows).sum())
        v, w = one.v.double(), other.v.double()
        squares = len(one.rows) * float(v @ v), len(other.rows) * float(w @ w)
        return Likeness.of(one.kind, *squares, common * float(v @ w))
    W = weight()
    new = (delta.whole(W).double() - W.double() for delta in (one, other))
    return tensors_alike(one.kind, *new)


def tensors_alike(kind: str, one: Tensor, other: Tensor) -> Likeness:
    """Compare two tensors of one shape."""
    x, y = one.double().flatten(), other.double().flatten()
    return Likeness.of(kind, float(x @ x), float(y @ y), float(x @ y))


def principal_angles(a: Tensor, b: Tensor) -> Tensor:
    """The principal angles between two subspaces, in degrees, ascending.

    The singular values of ``A^T B`` are their cosines, and those of ``B - A A^T B`` their sines.
    Below 45 degrees the sine is taken: cosines near 1 cannot tell small angles apart.

    Args:
        a: (D, R) of full rank; made orthonormal here, since float32 columns are orthonormal only to
            1e-7.
        b: (D, S), S at most R.

    Returns:
        (S,) float64.
    """
    A, B = (torch.linalg.qr(basis.double()).Q for basis in (a, b))
    inside = A.T @ B
    cosines = torch.linalg.svdvals(inside).clamp(max=1)
    sines = torch.linalg.svdvals(B - A @ inside).clamp(max=1).flip(0)
    angles = torch.where(sines < cosines, sines.asin(), cosines.acos())
    return torch.rad2deg(angles)
