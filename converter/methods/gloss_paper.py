"""GloSS to the letter of its paper: candidates of each layer, ranked, in one analysis.

    P_l                                     directions that neutral text needs, (D, p)
    T_l = (X+_l - X-_l) (I - P_l P_l^T)     differences of pooled FFN outputs, (N, D)
    candidates of layer l: first eigenvectors of its causal moment A_l', or the mean row of T_l, or
                           its first right singular vectors
    keep those with score > mean + alpha std over all of them
    U = leading right singular vectors of the stacked candidates, (D, R)

arXiv 2505.17078. Its published description leaves pooling and centering open, and knows neither the
protection P nor causal moments (see ``gloss``); ``-o candidates=mean+svd -o ranking=vocabulary -o
protect_shared=0 -o protect_own=0`` is without both.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from converter.calibration.linear_algebra import (
    eigen_directions,
    mean_difference,
    remove,
    shared_directions,
    svd_directions,
)
from converter.calibration.statistics import Activations, Request, Site
from converter.checkpoints.architectures.dimensions import Dimensions
from converter.manifest import Candidate, Kind
from converter.methods import gloss
from converter.methods.base import Layers, Proposal, Workbench
from converter.methods.rankings import Evidence, load_ranking, ranking_names
from converter.methods.subspace import (
    MAX_RANK,
    Removal,
    Subspace,
    above_threshold,
    global_basis,
    protected_differences,
)
from converter.models.batching import Pooling
from converter.runtime import progress

LITTLE = 0.5
"""Share of the word list that must be single tokens for a ranking by vocabulary to say much."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method(Removal):
    """GloSS as published, with its options.

    Attributes:
        layers, edit_layers, site, pooling, protect_shared, protect_own: see ``gloss``.
        candidates: of each layer: ``causal`` directions, the ``mean`` difference, the first ``svd``
            directions of the differences, or both of these.
        per_layer: causal or singular directions of each layer.
        ranking: the signal that scores candidates, a module of ``methods.rankings``.
        alpha: standard deviations over the mean score that a candidate needs. If all scores are
            equal (``candidates=mean`` with ``ranking=mean-difference``) all are kept.
        weights: of kept candidates in the stack: by ``score`` or ``equal``.
    """

    title: ClassVar[str] = "GloSS as published, candidates of each layer"
    paper: ClassVar[str] = "https://arxiv.org/abs/2505.17078"

    edit_layers: Layers = ()
    site: Site = "ffn"
    pooling: Pooling = "predicting"
    candidates: Literal["causal", "mean", "svd", "mean+svd"] = "causal"
    per_layer: int = field(default=4, metadata={"min": 1})
    ranking: str = field(default="causal", metadata={"names": ranking_names})
    alpha: float = 1.0
    weights: Literal["score", "equal"] = "score"
    protect_shared: int = field(default=16, metadata={"min": 0})
    protect_own: int = field(default=4, metadata={"min": 0})

    @classmethod
    def defaults(cls, dimensions: Dimensions) -> dict[str, Any]:
        """Values of the options that depend on the model."""
        return gloss.Method.defaults(dimensions)

    @property
    def edited(self) -> Layers:
        """See ``Removal``."""
        return self.edit_layers or self.layers

    def fit(self, bench: Workbench) -> Proposal:
        """Fit the global subspace; see the module's formulas.

        Raises:
            FitError: protection leaves nothing, no candidate is over the threshold, or fewer than
                ``rank`` are.
        """
        gradient = self.candidates == "causal" or load_ranking(self.ranking).NEEDS_GRADIENT
        seen = bench.activations(
            Request(self.site, self.pooling, self.layers, self.protect_shared > 0, gradient)
        )
        width = seen.neutral[self.layers[0]].shape[1]
        shared = shared_directions(seen.second_moment, self.protect_shared, width)
        rows: list[Tensor] = []
        places: list[tuple[int, Kind, int]] = []
        differences = {}
        for layer in self.layers:
            T = protected_differences(seen, layer, shared, self.protect_own, self.per_layer)
            differences[layer] = T
            for kind, directions in self._candidates(seen, layer, T, shared):
                rows.extend(directions)
                places.extend((layer, kind, index) for index in range(len(directions)))
        stack = torch.stack(rows)
        tokens = bench.decode(stack, self.top_tokens)
        layers = tuple(layer for layer, *_ in places)
        if self.ranking == "vocabulary" and (share := bench.single_token_share()) < LITTLE:
            progress.warn(
                f"only {share:.0%} of the word list are single tokens of this model, so ranking by "
                "vocabulary says little; the other rankings do not depend on it"
            )
        evidence = Evidence(stack, layers, differences, seen.causal, tokens, bench.words)
        scores = load_ranking(self.ranking).score(evidence)
        kept = above_threshold(scores, self.alpha)
        basis, values = self._basis(stack, torch.tensor(scores), torch.tensor(kept))
        candidates = tuple(
            Candidate(layer=layer, kind=kind, index=index, score=score, kept=keep, tokens=decoded)
            for (layer, kind, index), score, keep, decoded in zip(
                places, scores, kept, tokens, strict=True
            )
        )
        subspace = Subspace(
            dict.fromkeys(self.edited, basis), {"U": values}, candidates, stack.float()
        )
        return self.propose(bench, subspace, seen.second_moment)

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
        """U and singular values of the kept rows; as wide as it can be if no rank is given."""
        rows, scores = rows[kept], scores[kept]
        if self.weights == "score" and (scores > 0).any():
            rows = rows * scores.clamp(min=0).sqrt()[:, None]
        rank = self.rank or min(MAX_RANK, int(torch.linalg.matrix_rank(rows)))
        return global_basis(rows, rank)
