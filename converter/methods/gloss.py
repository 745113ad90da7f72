"""GloSS: one toxic subspace for all layers, fitted on what the FFNs write.

    P                                       directions that neutral text needs, (D, p)
    A_l' = (I - P P^T) A_l (I - P P^T)      causal moments, (D, D), P shared by the layers;
                                            u^T A_l u is what toxic words lose without u
    V = leading eigenvectors of the sum of A_l' over layers, (D, K)
    U = V X                                 X (K, R) from the moments of single words and pieces of
                                            neutral text within V: see ``greedy_directions``

The scheme of one subspace and one projection for all layers is that of arXiv 2505.17078;
``gloss_paper`` follows it literally. Here the signal is used before the layers are cut into
candidates, and a large sum is not enough: a corpus is mostly forms of two words. The eigenvectors
of the sum remove these many times over and leave the others, or remove slang, and all informal
text, with them. The protection of neutral directions keeps the edit from destroying a small model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from converter.calibration.linear_algebra import shared_directions, turned
from converter.calibration.statistics import Moments, Request, Site
from converter.checkpoints.architectures.architecture import Dimensions
from converter.checkpoints.plan import Plan
from converter.errors import OptionError
from converter.manifest import SubspaceEvidence
from converter.methods.base import Layers, Proposal, Recorded, Workbench
from converter.methods.bounds import check_protection
from converter.methods.subspace import (
    MAX_RANK,
    Removal,
    Subspace,
    candidates_of,
    factor_of,
    indexed,
    protected_differences,
    rank_within,
)
from converter.models.batching import Pooling

_PARTS = (0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8)
"""The parts to choose from."""

_LIMIT = 1.0
"""Nats, over the saturation, up to which a word that becomes more probable counts as worse."""

_STARTS = 3
"""Leading eigenvectors from which each direction is sought."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GlobalRemoval(Removal):
    """The common part of both methods of GloSS, which remove one subspace from all layers.

    Attributes:
        layers: see ``Removal``; by default from L/4 up to 0.9 L. The last layers cost perplexity
            and bring nothing.
        edit_layers: whose down-projections are edited; by default the same.
        site: where activations are taken: ``ffn`` or ``residual``.
        pooling: of the differences, by which directions are turned to the toxic side: over the
            positions that predict a toxic token, over all, or the last.
    """

    edit_layers: Layers = field(default=(), metadata={"search": "layers"})
    site: Site = "ffn"
    pooling: Pooling = "predicting"

    @classmethod
    def defaults(cls, dimensions: Dimensions) -> dict[str, Any]:
        """Values of the options that depend on the model."""
        count = dimensions.num_hidden_layers
        first = count // 4
        return {"layers": tuple(range(first, max(int(0.9 * count), first + 1)))}

    @property
    def edited(self) -> Layers:
        """See ``Removal``."""
        return self.edit_layers or self.layers


@dataclass(frozen=True, slots=True, kw_only=True)
class Method(GlobalRemoval):
    """GloSS with its options.

    The effect on toxic words grows with the removed part, the effect on other text with its square.
    So a part of a larger subspace costs less than all of a smaller one with the same effect.

    Attributes:
        rank: R, dimensions of the subspace; by default ``MAX_RANK``, or as many as there are.
        part: how much of it is taken out, 0 to 1, in layers whose factor is 1. By default all of
            a rank that is given, and else the most effective part within the perplexity budget.
        layers, edit_layers, site, pooling: see ``GlobalRemoval``.
        per_layer: number of leading causal directions of each layer that are recorded, to compare
            the layers.
        directions: K, among which U is sought; no more of them than protection leaves.
        saturation: nats that a word may lose before more counts little.
        cost: of a nat per neutral token, in shares of toxic words.
        protect_shared: leading eigenvectors of the layers' average neutral second moment that no
            direction may touch. ``U`` acts on every layer, so a layer's own are not enough.
        protect_own: leading right singular vectors of the layer's own neutral side, which its
            differences may not touch.
    """

    title: ClassVar[str] = "GloSS, global toxic subspace suppression"
    paper: ClassVar[str] = "https://arxiv.org/abs/2505.17078"
    strength: ClassVar[str] = "part"

    part: float | None = field(default=None, metadata={"above": 0, "max": 1})
    per_layer: int = field(default=4, metadata={"min": 1, "max": "hidden_size"})
    directions: int = field(default=32, metadata={"min": 1, "max": "hidden_size"})
    saturation: float = field(default=3.0, metadata={"min": 1e-3, "max": 1e6})
    cost: float = field(default=3.0, metadata={"min": 0, "max": 1e6, "search": (1.0, 3.0, 6.0)})
    protect_shared: int = field(default=16, metadata={"min": 0, "max": "hidden_size"})
    protect_own: int = field(default=4, metadata={"min": 0, "max": "hidden_size"})

    def __post_init__(self) -> None:
        if self.rank is not None and self.part is None:
            object.__setattr__(self, "part", 1.0)

    def fit(self, bench: Workbench) -> Proposal:
        """Fit the global subspace; see the module's formulas.

        Raises:
            FitError: protection leaves nothing, or fewer than ``rank`` directions.
        """
        seen = bench.activations(
            Request(
                self.site, self.pooling, self.layers, self.protect_shared > 0, True,
                self.directions, self.protect_shared, self.per_layer,
            )
        )  # fmt: skip
        assert seen.moments is not None  # requested
        shared = shared_directions(seen.second_moment, self.protect_shared, seen.width)
        means, rows, candidates = [], [], []
        for layer in self.layers:
            T = protected_differences(seen, layer, shared, self.protect_own, self.per_layer)
            directions, scores = seen.leading[layer]
            means.append(T.mean(0))
            rows.append(turned(directions.double(), means[-1]))
            candidates += candidates_of(layer, "causal", scores.tolist())
        basis, values = self._basis(seen.moments, torch.stack(means).sum(0))
        bases = dict.fromkeys(self.edited, basis)
        subspace = Subspace(bases, {"U": values}, candidates, torch.cat(rows))
        return self.propose(bench, subspace, seen.second_moment)

    def taken(self, strength: float) -> tuple[int, float]:
        """See ``Removal``; a strength is a part of all that is fitted."""
        return self.rank or MAX_RANK, strength

    @property
    def _most(self) -> float:
        return max(self._strengths(0))

    @property
    def _is_free(self) -> bool:
        return self.part is None

    def _strengths(self, widest: int) -> Sequence[float]:
        if self.part is None:
            return _PARTS
        return [*(part for part in _PARTS if part < self.part), self.part]

    def _check_sizes(self, plan: Plan) -> None:
        check_protection(
            plan.dimensions, self.rank or 1, self.per_layer, self.protect_shared, self.protect_own
        )
        if self.rank and self.rank > self.directions:
            raise OptionError(
                "-o rank", expected=f"at most {self.directions}, the directions among which it is "
                "sought", found=str(self.rank), hint="lower it, or raise -o directions",
            )  # fmt: skip

    def _implied(self, told: SubspaceEvidence, found: Recorded) -> dict[str, Any]:
        layers = [layer for layer in self.layers for _ in range(self.per_layer)]
        weights = found.plan.find(found.edit.tensors)
        parts = {
            delta.factor / factor_of(self.factors, weights[name].layer)
            for name, delta in found.edit.tensors.items()
        }
        same = indexed(told, kind="causal", kept=True)
        return {
            "part": max(parts),  # of layers that disagree, one is not as the options say
            "candidates": [{"layer": n, **c} for n, c in zip(layers, same, strict=True)],
        }

    def _basis(self, moments: Moments, toward: Tensor) -> tuple[Tensor, Tensor]:
        """U, turned to the toxic side, and square roots of what words lose on average along V."""
        rank = rank_within(
            self.rank,
            moments.directions.shape[1],
            than="the directions among which it is sought",
            which="",
            hint="lower -o rank, or raise -o directions",
        )
        X = greedy_directions(moments, rank, self.saturation, self.cost)
        U = torch.linalg.qr(moments.directions.double() @ X).Q
        values = torch.linalg.eigvalsh(moments.words.double().mean(0)).flip(0)
        return turned(U.T, toward).T.float().contiguous(), values.clamp(min=0).sqrt()


def greedy_directions(moments: Moments, rank: int, saturation: float, cost: float) -> Tensor:
    """Directions one after the other, each the best for the words that the former ones left.

    The columns of X (K, R) minimise J one at a time, the former ones fixed. For n toxic words with
    moments M_w and m pieces of neutral text with moments M_i, all (K, K) and within K directions,
    see ``collect.moments_within``:

        q_w(X) = tr X^T M_w X                      nats that a word loses, to first order
        J(X)   = sum of  weight_w exp(-q_w / s)  +  cost  sum over kinds of text of  D(X)
        D(X)   = max(0, sum q_i) / t  +  1/2  sum q_i^2 / t       t tokens of that kind

    The first term is close to the share of toxic words that are left. It saturates: a word that has
    become improbable counts no more, so the next direction turns to others. The second bounds what
    neutral text pays: its mean loss, if it is one, and the empirical Fisher information, which is
    the divergence of the next-token distributions to second order. Both directions that neutral
    text needs and those that it seems to be better off without are costly, and what one layer takes
    and another gives back cancels.

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
    """J of ``greedy_directions``."""

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
        """The directions that the remaining words owe most to, (K, at most _STARTS)."""
        left = self.weights * self._left(self.losses(X)["words"])
        A = free.T @ torch.einsum("w,wij->ij", left, self.words) @ free
        vectors: Tensor = torch.linalg.eigh(A).eigenvectors.flip(1)[:, :_STARTS]
        return free @ vectors

    def _left(self, q: Tensor) -> Tensor:
        return torch.exp(-(q / self.saturation).clamp(min=-_LIMIT))

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
