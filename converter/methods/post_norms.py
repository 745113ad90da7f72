"""Norms after the FFN: what reaches the residual stream is not what the down-projection gives.

    f = diag(g) rms(W h)        g = weight + offset, (D,);  rms divides by a scalar of each token

U lies in the space of f. Removing U from what W gives leaves most of it in f, because g turns it:
``U^T f`` is ``(diag(g) U)^T W h`` over that scalar. So W is projected along ``orth(diag(g) U)``,
and nothing of f is left along U, whatever the scalar.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from converter.checkpoints.plan import Plan
from converter.checkpoints.source import Source

Gains = Mapping[int, Tensor]
"""Layer -> g (D,) float32 of the norm after its FFN; empty for models without such norms."""


def read_gains(plan: Plan, source: Source) -> Gains:
    """The gains of all layers, from a source's shards."""
    gains = {}
    for layer, (shard, info) in plan.post_norms.items():
        gains[layer] = source.read(shard, info).float() + plan.architecture.norm_offset
    return gains


def before_norm(bases: Mapping[int, Tensor], gains: Gains) -> Mapping[int, Tensor]:
    """Bases of what the FFNs give as their counterparts before the norm of each layer.

    The columns of a smaller rank remain the first of those of a larger one.
    """
    return {n: before_norm_basis(U, gains[n]) if n in gains else U for n, U in bases.items()}


def after_norm(bases: Mapping[int, Tensor], gains: Gains) -> Mapping[int, Tensor]:
    """The reverse: the subspaces that nothing is left of behind the norm."""
    backwards = {n: torch.where(g == 0, 0, 1 / g) for n, g in gains.items()}
    return before_norm(bases, backwards)


def before_norm_basis(basis: Tensor, gain: Tensor) -> Tensor:
    """``orth(diag(g) U)`` for U (D, R) and g (D,), float32; its columns keep their direction."""
    Q, R = torch.linalg.qr(gain.double()[:, None] * basis.double())
    signs = torch.where(R.diagonal() < 0, -1.0, 1.0).double()
    turned: Tensor = Q * signs
    return turned.float().contiguous()
