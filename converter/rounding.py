"""How far a weight that was projected and rounded may be from the exact projection."""

from math import sqrt

import torch
from torch import Tensor

from converter.edit import columns

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
    exponent = torch.frexp(x.float() if x.dtype != torch.float64 else x).exponent
    normal = torch.ldexp(torch.full(x.shape, info.eps / 4, dtype=torch.float64), exponent)
    return torch.where(x.abs() < info.tiny, info.eps * info.tiny / 2, normal)


def rounding_bound(W: Tensor, norm: float) -> float:
    """An upper bound on ||U^T W||_F for W (D, F) that is a projection, rounded to its dtype.

    Let P be the exact projection of the source's weight, so U^T P = 0, and W = P + E.
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


def is_projection(found: Tensor, original: Tensor, basis: Tensor) -> bool:
    """Whether each element of ``found`` is that of W - U (U^T W), rounded to its dtype.

    The reference is computed in float64. An element may be off by half a unit in its last place,
    and by the float32 arithmetic before it: ``SLACK`` sqrt(D) u (|W_ij| + ||U_i|| ||W_j||), with
    row i of U and column j of W, which bound the sums that give the correction.
    """
    U = basis.double()
    for new, old in zip(
        torch.split(found, columns(found), 1), torch.split(original, columns(found), 1), strict=True
    ):
        W = old.double()
        exact = W - U @ (U.T @ W)
        scale = W.abs() + U.norm(dim=1)[:, None] * W.norm(dim=0)
        allowed = half_ulp(new) + SLACK * sqrt(W.shape[0]) * U32 * scale
        if not bool(((new.double() - exact).abs() <= allowed).all()):
            return False
    return True
