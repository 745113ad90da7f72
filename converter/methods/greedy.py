"""Directions one after the other, each the best for the words that the former ones left.

Letters: n toxic words with moments M_w, m pieces of neutral text with moments M_i, all (K, K) and
within K directions; see ``causal_moments.moments_within``. X (K, R) is what is sought.

    q_w(X) = tr X^T M_w X                          nats that a word loses, to first order
    J(X)   = sum of  weight_w exp(-q_w / s)  +  cost  sum over kinds of text of  D(X)
    D(X)   = max(0, sum q_i) / t  +  1/2  sum q_i^2 / t       t tokens of that kind

The first term is close to the share of toxic words that are left. It saturates: a word that has
become improbable counts no more, so the next direction turns to others. The second bounds what
neutral text pays: its mean loss, if it is one, and the empirical Fisher information, which is the
divergence of the next-token distributions to second order. Both directions that neutral text needs
and those that it seems to be better off without are costly, and what one layer takes and another
gives back cancels.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from converter.calibration.statistics import Moments

LIMIT = 1.0
"""Nats, over the saturation, up to which a word that becomes more probable counts as worse."""

STARTS = 3
"""Leading eigenvectors from which each direction is sought."""


def greedy_directions(moments: Moments, rank: int, saturation: float, cost: float) -> Tensor:
    """Minimise J one column at a time, the former columns fixed.

    Args:
        moments: of toxic words and of neutral text.
        rank: R, at most K.
        saturation: s, nats. First-order losses are larger than real ones, which end at the
            probability of other words.
        cost: of a nat per token of neutral text, in shares of toxic words.

    Returns:
        X (K, R) float64, orthonormal columns; those of a smaller rank are the first of them.
    """
    objective = _Objective(moments, saturation, cost)
    width = moments.directions.shape[1]
    X = torch.zeros(width, 0, dtype=torch.float64)
    for _ in range(rank):
        free = torch.linalg.qr(X, mode="complete").Q[:, X.shape[1] :]
        starts = free.T @ objective.leading(X, free)
        tried = [_minimise(objective, X, free, start) for start in starts.T]
        best = min(range(len(tried)), key=lambda i: tried[i][0])
        X = torch.cat([X, tried[best][1][:, None]], 1)
    return X


class _Objective:
    """J of the module's formulas."""

    def __init__(self, moments: Moments, saturation: float, cost: float) -> None:
        self.words = moments.words.double()
        self.weights = moments.weights.double() / moments.weights.double().sum()
        self.texts: Mapping[str, Tensor] = {k: m.double() for k, m in moments.texts.items()}
        self.tokens = moments.tokens
        self.saturation, self.cost = saturation, cost

    def losses(self, X: Tensor) -> dict[str, Tensor]:
        """q of every word and every piece of text, by kind; (n,) each."""
        outer = (X @ X.T).flatten()
        kinds = {"words": self.words, **self.texts}
        return {kind: moments.flatten(1) @ outer for kind, moments in kinds.items()}

    def leading(self, X: Tensor, free: Tensor) -> Tensor:
        """What the words that are left owe most to, (K, at most STARTS)."""
        left = self.weights * self._left(self.losses(X)["words"])
        A = free.T @ torch.einsum("w,wij->ij", left, self.words) @ free
        vectors: Tensor = torch.linalg.eigh(A).eigenvectors.flip(1)[:, :STARTS]
        return free @ vectors

    def _left(self, q: Tensor) -> Tensor:
        return torch.exp(-(q / self.saturation).clamp(min=-LIMIT))

    def __call__(self, before: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """J of former columns, given by their losses, and one more unit column x (K,)."""
        q = before["words"] + (self.words @ x) @ x
        value = (self.weights * self._left(q)).sum()
        for kind, moments in self.texts.items():
            q, t = before[kind] + (moments @ x) @ x, self.tokens[kind]
            value = value + self.cost * (q.sum().relu() + q.square().sum() / 2) / t
        return value


def _minimise(
    objective: _Objective, X: Tensor, free: Tensor, start: Tensor
) -> tuple[float, Tensor]:
    """The best unit column within ``free`` that is found from ``start``, and its J."""
    before = objective.losses(X)
    y = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [y], max_iter=100, tolerance_grad=1e-9, tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def column() -> Tensor:
        return torch.nn.functional.normalize(free @ y, dim=0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = objective(before, column())
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        x = column()
        return float(objective(before, x)), x
