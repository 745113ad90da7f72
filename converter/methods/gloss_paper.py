"""GloSS as in its paper: candidates of each layer, ranked, in one analysis.

    P_l                                     directions that neutral text needs, (D, p)
    T_l = (X+_l - X-_l) (I - P_l P_l^T)     differences of pooled FFN outputs, (N, D)
    candidates of layer l: first eigenvectors of its causal moment A_l', or the mean row of T_l, or
                           its first right singular vectors
    keep those with score > mean + alpha std over all of them
    U = leading right singular vectors of the stacked candidates, (D, R)

arXiv 2505.17078. Its description leaves pooling and centering open, and has neither the protection
P nor causal moments (see ``gloss``). ``-o candidates=mean+svd -o ranking=vocabulary -o
protect_shared=0 -o protect_own=0`` does without both.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor

from converter.calibration.linear_algebra import (
    eigen_directions,
    mean_difference,
    remove,
    shared_directions,
    svd_directions,
    top_right_singular_vectors,
    turned,
)
from converter.calibration.statistics import Activations, Request
from converter.checkpoints.plan import Plan
from converter.errors import FitError, OptionError
from converter.manifest import Candidate, Kind, SubspaceEvidence
from converter.methods.base import Proposal, Recorded, Workbench
from converter.methods.bounds import check_protection
from converter.methods.gloss import GlobalRemoval
from converter.methods.subspace import Subspace, protected_differences, rank_within
from converter.runtime import progress


@dataclass(frozen=True, slots=True)
class Evidence:
    """The data for a ranking signal.

    Attributes:
        rows: (C, D) float64, unit candidates, turned to the toxic side.
        layers: of each candidate.
        differences: layer -> T_l (N, D) float64, toxic minus neutral, protected.
        causal: layer -> A_l (D, D); see ``collect.causal_moments``. Empty if not requested.
        bench: decodes candidates, and has the word list.
        top_tokens: how many tokens to decode.
    """

    rows: Tensor
    layers: tuple[int, ...]
    differences: Mapping[int, Tensor]
    causal: Mapping[int, Tensor]
    bench: Workbench
    top_tokens: int

    def cosines(self, directions: Mapping[int, Tensor]) -> list[float]:
        """The cosine of each candidate with the unit direction (D,) of its layer."""
        pairs = zip(self.rows, self.layers, strict=True)
        return [float(u @ directions[layer]) for u, layer in pairs]


def _causal(evidence: Evidence) -> list[float]:
    """u^T A_l u: nats (natural-log units) that toxic words lose, to first order, without u in its
    layer.
    """
    pairs = zip(evidence.rows, evidence.layers, strict=True)
    return [float(u @ evidence.causal[layer].double() @ u) for u, layer in pairs]


def _mean_difference(evidence: Evidence) -> list[float]:
    """cos(u, mean row of T_l)."""
    return evidence.cosines({n: mean_difference(T)[0] for n, T in evidence.differences.items()})


_RIDGE = 0.1
"""Share of the mean variance that is added to every variance, since there are fewer pairs than
dimensions.
"""


def _linear_probe(evidence: Evidence) -> list[float]:
    """cos(u, w_l), w_l the direction that separates T_l best from its mirror image (Fisher).

        w ~ (S + ridge tr(S) / D I)^-1 m      m, S: mean and covariance of the rows of T_l

    A pair is classified by the sign of w^T (x+ - x-), so the probe is trained on differences.
    """
    probes = {}
    for layer, T in evidence.differences.items():
        mean = T.mean(0)
        S = (T - mean).T @ (T - mean) / len(T)
        S = S + _RIDGE * S.trace() / len(S) * torch.eye(len(S), dtype=S.dtype)
        probes[layer] = torch.nn.functional.normalize(torch.linalg.solve(S, mean), dim=0)
    return evidence.cosines(probes)


_LITTLE = 0.5
"""Share of the word list that must be single tokens for a useful ranking by vocabulary."""


def _vocabulary(evidence: Evidence) -> list[float]:
    """The share of listed words among the tokens decoded from u: GloSS as published.

    Raises:
        FitError: the candidates cannot be decoded.
    """
    bench = evidence.bench
    if (share := bench.single_token_share()) < _LITTLE:
        progress.warn(
            f"only {share:.0%} of the word list are single tokens of this model, so ranking by "
            "vocabulary says little; the other rankings do not depend on it"
        )
    tokens = bench.decode(evidence.rows, evidence.top_tokens)
    if not all(tokens):
        raise FitError(
            "the directions cannot be decoded, so they cannot be ranked by vocabulary",
            expected="an unembedding stored as plain numbers",
            hint="use -o ranking=mean-difference",
        )
    return [sum(token in bench.words for token in decoded) / len(decoded) for decoded in tokens]


RANKINGS: Mapping[str, Callable[[Evidence], list[float]]] = {
    "causal": _causal,
    "linear-probe": _linear_probe,
    "mean-difference": _mean_difference,
    "vocabulary": _vocabulary,
}
"""Ranking signals: each gives every candidate a number, larger for more toxic. It may raise
FitError. Only ``causal`` needs a gradient."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method(GlobalRemoval):
    """GloSS as published, with its options.

    Attributes:
        layers, edit_layers, site, pooling: see ``GlobalRemoval``.
        candidates: of each layer: ``causal`` directions, the ``mean`` difference, the first ``svd``
            directions of the differences, or both of these.
        per_layer: causal or singular directions of each layer.
        ranking: the signal of ``RANKINGS`` that scores candidates.
        alpha: standard deviations over the mean score that a candidate needs. If all scores are
            equal (``candidates=mean`` with ``ranking=mean-difference``) all are kept.
        weights: of kept candidates in the stack: by ``score`` or ``equal``.
        protect_shared, protect_own: see ``gloss``.
    """

    title: ClassVar[str] = "GloSS as published, candidates of each layer"
    paper: ClassVar[str] = "https://arxiv.org/abs/2505.17078"

    candidates: Literal["causal", "mean", "svd", "mean+svd"] = "causal"
    per_layer: int = field(default=4, metadata={"min": 1, "max": "hidden_size"})
    ranking: str = field(default="causal", metadata={"names": lambda: list(RANKINGS)})
    alpha: float = field(default=1.0, metadata={"min": -1000, "max": 1000})
    weights: Literal["score", "equal"] = "score"
    protect_shared: int = field(default=16, metadata={"min": 0, "max": "hidden_size"})
    protect_own: int = field(default=4, metadata={"min": 0, "max": "hidden_size"})

    def fit(self, bench: Workbench) -> Proposal:
        """Fit the global subspace; see the module's formulas.

        Raises:
            FitError: protection leaves nothing, no candidate is over the threshold, or fewer than
                ``rank`` are.
        """
        gradient = "causal" in (self.candidates, self.ranking)
        seen = bench.activations(
            Request(self.site, self.pooling, self.layers, self.protect_shared > 0, gradient)
        )
        shared = shared_directions(seen.second_moment, self.protect_shared, seen.width)
        rows: list[Tensor] = []
        places: list[tuple[int, Kind, int]] = []
        differences = {}
        for layer in self.layers:
            T = protected_differences(seen, layer, shared, self.protect_own, self.per_layer)
            differences[layer] = T
            for kind, directions in self._candidates(seen, layer, T, shared):
                rows.extend(directions)
                places.extend((layer, kind, index) for index in range(len(directions)))
        stack, layers = torch.stack(rows), tuple(layer for layer, *_ in places)
        evidence = Evidence(stack, layers, differences, seen.causal, bench, self.top_tokens)
        scores = RANKINGS[self.ranking](evidence)
        kept = above_threshold(scores, self.alpha)
        basis, values = self._basis(stack, torch.tensor(scores), torch.tensor(kept))
        candidates = [
            Candidate(layer=layer, kind=kind, index=index, score=score, kept=keep, tokens=())
            for (layer, kind, index), score, keep in zip(places, scores, kept, strict=True)
        ]
        subspace = Subspace(dict.fromkeys(self.edited, basis), {"U": values}, candidates, stack)
        return self.propose(bench, subspace, seen.second_moment)

    def _implied(self, told: SubspaceEvidence, found: Recorded) -> dict[str, Any]:
        scores = [candidate.score for candidate in told.candidates]
        kept, rows = above_threshold(scores, self.alpha), found.tensors["candidates"]
        _, values = self._basis(rows.double(), torch.tensor(scores), torch.tensor(kept))
        kinds = [
            {"layer": layer, "kind": kind, "index": index}
            for layer in self.layers
            for kind, count in self._counts.items()
            for index in range(count)
        ]
        places = [{"kept": keep, **place} for keep, place in zip(kept, kinds, strict=True)]
        return {"singular_values": {"U": values.tolist()}, "candidates": places}

    def _check_sizes(self, plan: Plan) -> None:
        check_protection(
            plan.dimensions, self.rank or 1, self.per_layer, self.protect_shared, self.protect_own
        )
        most = len(self.layers) * sum(self._counts.values())
        if self.rank and self.rank > most:
            raise OptionError(
                "-o rank", expected=f"at most {most}, the candidates of {len(self.layers)} layers",
                found=str(self.rank), hint="lower it, or raise -o per_layer",
            )  # fmt: skip

    @property
    def _counts(self) -> dict[Kind, int]:
        """The number of candidates of each kind in a layer."""
        return {
            kind: 1 if kind == "mean" else self.per_layer
            for kind in cast(list[Kind], self.candidates.split("+"))
        }

    def _candidates(
        self, seen: Activations, layer: int, T: Tensor, shared: Tensor
    ) -> list[tuple[Kind, Tensor]]:
        """Unit rows of one layer by kind, turned to the toxic side."""
        if self.candidates == "causal":
            A = remove(remove(seen.causal[layer], shared).T, shared)
            return [("causal", eigen_directions(A, self.per_layer, T.mean(0)))]
        parts: list[tuple[Kind, Tensor]] = []
        if "mean" in self.candidates:
            parts.append(("mean", mean_difference(T)))
        if "svd" in self.candidates:
            parts.append(("svd", svd_directions(T, self.per_layer)[0]))
        return parts

    def _basis(self, rows: Tensor, scores: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """U and singular values of the kept rows."""
        rows, scores = rows[kept], scores[kept]
        if self.weights == "score" and (scores > 0).any():
            rows = rows * scores.clamp(min=0).sqrt()[:, None]
        return global_basis(rows, self.rank)


_EQUAL = 1e-9
"""Scores that differ by less than this share of the largest count as equal."""


def above_threshold(scores: Sequence[float], alpha: float) -> list[bool]:
    """Whether each score exceeds mean + alpha * std of all (population std).

    The threshold rule of GloSS (arXiv 2505.17078). If all scores are equal, all are kept.

    Raises:
        FitError: none does.
    """
    values = torch.tensor(scores, dtype=torch.float64)
    if values.max() - values.min() <= _EQUAL * values.abs().max():
        return [True] * len(scores)
    threshold = values.mean() + alpha * values.std(correction=0)
    kept = [bool(v > threshold) for v in values]
    if not any(kept):
        raise FitError(
            "no candidate direction is over the threshold",
            expected=f"a score over {threshold:.4f} (mean + {alpha} standard deviations)",
            found=f"a highest score of {values.max():.4f}",
            hint="lower -o alpha",
        )
    return kept


def global_basis(candidates: Tensor, rank: int | None) -> tuple[Tensor, Tensor]:
    """The leading subspace of stacked candidates, by uncentred principal component analysis.

    Args:
        candidates: (C, D) rows; the length of a row is its weight.
        rank: R, number of columns; None for the default number.

    Returns:
        U (D, R) float32 with orthonormal columns, each turned so that the candidates have a
        positive sum along it, and all singular values.

    Raises:
        FitError: the candidates span fewer than ``rank`` dimensions.
    """
    spanned = int(torch.linalg.matrix_rank(candidates.double()))
    rank = rank_within(
        rank,
        spanned,
        than="the candidates allow",
        which=f", the dimensions that {len(candidates)} candidates span",
        hint="lower -o rank, or lower -o alpha to keep more candidates",
    )
    vectors, values = top_right_singular_vectors(candidates, rank)
    rows = turned(vectors.T, candidates.double().sum(0))
    return rows.T.float().contiguous(), values
