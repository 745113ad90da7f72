"""Remove a subspace from an FFN's output if a norm follows its last weight.

Gemma 2 and 3, OLMo 2 and others add

    f = diag(g) rms(W h)            g (D,) gains, rms divides by a scalar of each token

so ``U^T f`` is ``(diag(g) U)^T W h`` over that scalar, and nothing of f lies along U if nothing of
``W h`` lies along ``Q = orth(diag(g) U)``. Many changes of W do that:

    W' = W - a A (Q^T W)            A (D, R), Q^T A = I

With A = Q, the change of W is as small as can be, and that of f is ``diag(g) Q``: mostly the
channels of the largest gains, whatever U is, for gains differ a hundredfold. The change of f is
least, and along U itself, with A in proportion to ``diag(g)^-2 Q``. Channels of small gains would
then change beyond measure, and with them the scalar of the norm, hence

    A = (diag(g)^2 + mean(g^2) / D)^-1 Q,  normed so that Q^T A = I
"""

import torch
from torch import Tensor

from converter.edits.deltas import RemoveOblique


def removal_behind(U: Tensor, gains: Tensor, a: float) -> RemoveOblique:
    """The change of W that removes a share ``a`` along U from the norm's output.

    Args:
        U: (D, R) float32, orthonormal columns, in the space of the FFN's contribution.
        gains: (D,) g of the norm.
        a: 0 < a <= 1.
    """
    g = gains.double()
    Q, R = torch.linalg.qr(g[:, None] * U.double())
    Q = Q * torch.where(R.diagonal() < 0, -1.0, 1.0).double()
    weighted = Q / (g.square() + g.square().mean() / len(g))[:, None]
    A = weighted @ torch.linalg.inv(Q.T @ weighted)
    factor = torch.tensor([a], dtype=torch.float64)
    return RemoveOblique(Q.float().contiguous(), A.float().contiguous(), factor)
