"""GloSS: one toxic subspace for all layers, fitted on what the FFNs write.

    P_l                                        directions that neutral text needs, (D, p)
    T_l = (X+_l - X-_l) (I - P_l P_l^T)        differences of pooled FFN outputs, (N, D)
    A_l' = (I - P P^T) A_l (I - P P^T)         causal moments, (D, D), P shared by the layers;
                                               u^T A_l u is what toxic words lose without u
    basis=moments:     V = leading eigenvectors of the sum of A_l' over layers, (D, K)
                       U = V X, X (K, R) from the moments of single words and pieces of neutral
                       text within V: see ``greedy``
    basis=candidates:  candidates of layer l: first eigenvectors of A_l', or the mean row of T_l,
                       or its first right singular vectors
                       keep those with score > mean + alpha std over all of them
                       U = leading right singular vectors of the stacked candidates

arXiv 2505.17078 gives the scheme of ``basis=candidates``: candidates of each layer, a toxicity
signal that scores them, a threshold, one principal component analysis of what is kept, one
projection for all layers. Its published description leaves pooling and centering open.
``basis=moments`` lets the signal speak before the layers are cut into candidates, and asks for more
than a large sum: a corpus is mostly forms of two words, and the eigenvectors of the sum take these
to nothing many times over and leave the others, or take slang, and all informal text, with them. In
either case the protection of neutral directions is what keeps the edit from destroying a small
model.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from converter.calibration.linear_algebra import (
    eigen_directions,
    extend,
    mean_difference,
    remove,
    shared_directions,
    svd_directions,
    top_right_singular_vectors,
)
from converter.calibration.statistics import Activations, Moments, Request, Site
from converter.calibration.word_list import WordList
from converter.checkpoints.architectures.dimensions import Dimensions
from converter.errors import FitError, OptionError
from converter.manifest import Candidate, Kind
from converter.methods.base import Decode, Layers
from converter.methods.greedy import greedy_directions
from converter.methods.rankings import Evidence, load_ranking, ranking_names
from converter.methods.subspace import MAX_RANK, Subspace, above_threshold, global_basis
from converter.models.batching import Pooling

NOTHING = 1e-6
"""A share of the differences' norm that is rounding error rather than a difference."""

ONLY_FOR = {
    "candidates": ("candidates", "ranking", "alpha", "weights"),
    "moments": ("directions", "saturation", "cost"),
}
"""Options that have a meaning with one ``basis`` only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """GloSS with its options.

    Attributes:
        rank: R, dimensions removed; by default the most effective one within the perplexity budget.
        layers: used for fitting; by default from L/4 up to 0.9 L. The last layers cost perplexity
            and bring nothing.
        edit_layers: whose down-projections are edited; by default the same.
        site: where activations are taken: ``ffn`` or ``residual``.
        pooling: of the differences: over the positions that predict a toxic token, over all, or the
            last.
        basis: how the layers make one subspace: ``moments`` looks for what most toxic words owe
            something to and neutral text does not, which takes backward passes; ``candidates``
            stacks the layers' candidates.
        candidates: of each layer: ``causal`` directions, the ``mean`` difference, the first ``svd``
            directions of the differences, or both of these. With ``basis=moments`` they are only
            recorded, to show what the layers have in common.
        per_layer: causal or singular directions of each layer.
        ranking: the signal that scores candidates, a module of ``converter.rankings``.
        alpha: for ``basis=candidates``: standard deviations over the mean score that a candidate
            needs. If all scores are equal (``candidates=mean`` with ``ranking=mean-difference``)
            all are kept.
        weights: of kept candidates in the stack: by ``score`` or ``equal``.
        directions: for ``basis=moments``: K, among which U is sought.
        saturation: for ``basis=moments``: nats that a word may lose before more counts little.
        cost: for ``basis=moments``: of a nat per neutral token, in shares of toxic words.
        protect_shared: leading eigenvectors of the layers' average neutral second moment that no
            candidate may touch. ``U`` acts on every layer, so a layer's own are not enough.
        protect_own: leading right singular vectors of the layer's own neutral side, which its
            differences may not touch.
        top_tokens: decoded for each candidate.
        bias: ``project`` also edits the bias of an edited projection, ``keep`` leaves it.
    """

    title: ClassVar[str] = "GloSS, global toxic subspace suppression"
    paper: ClassVar[str] = "https://arxiv.org/abs/2505.17078"

    rank: int | None = field(default=None, metadata={"min": 1})
    layers: Layers
    edit_layers: Layers = ()
    site: Site = "ffn"
    pooling: Pooling = "predicting"
    basis: Literal["moments", "candidates"] = "moments"
    candidates: Literal["causal", "mean", "svd", "mean+svd"] = "causal"
    per_layer: int = field(default=4, metadata={"min": 1})
    ranking: str = field(default="causal", metadata={"names": ranking_names})
    alpha: float = 1.0
    weights: Literal["score", "equal"] = "score"
    directions: int = field(default=32, metadata={"min": 1})
    saturation: float = field(default=3.0, metadata={"min": 1e-3})
    cost: float = field(default=3.0, metadata={"min": 0})
    protect_shared: int = field(default=16, metadata={"min": 0})
    protect_own: int = field(default=4, metadata={"min": 0})
    top_tokens: int = field(default=10, metadata={"min": 1})
    bias: Literal["project", "keep"] = "project"

    @classmethod
    def defaults(cls, dimensions: Dimensions) -> dict[str, Any]:
        """Values of the options that depend on the model."""
        count = dimensions.num_hidden_layers
        first = count // 4
        return {"layers": tuple(range(first, max(int(0.9 * count), first + 1)))}

    def __post_init__(self) -> None:
        if not self.edit_layers:
            object.__setattr__(self, "edit_layers", self.layers)
        other = "candidates" if self.basis == "moments" else "moments"
        for name in ONLY_FOR[other]:
            default = type(self).__dataclass_fields__[name].default
            if getattr(self, name) != default:
                raise OptionError(
                    f"-o {name}={getattr(self, name)} has no effect with basis={self.basis}",
                    hint=f"add -o basis={other}",
                )

    @property
    def edit_bias(self) -> bool:
        return self.bias == "project"

    @property
    def request(self) -> Request:
        moments = self.basis == "moments"
        gradient = (
            moments or self.candidates == "causal" or load_ranking(self.ranking).NEEDS_GRADIENT
        )
        return Request(
            self.site,
            self.pooling,
            self.layers,
            self.protect_shared > 0,
            gradient,
            self.directions if moments else 0,
            self.protect_shared if moments else 0,
            self.per_layer if moments else 0,
        )

    def fit(self, activations: Activations, decode: Decode, words: WordList) -> Subspace:
        """Fit the global subspace; see the module's formulas.

        Raises:
            FitError: protection leaves nothing, no candidate is over the threshold, or fewer than
                ``rank`` are.
        """
        width = activations.neutral[self.layers[0]].shape[1]
        shared = shared_directions(activations.second_moment, self.protect_shared, width)
        rows: list[Tensor] = []
        places: list[tuple[int, Kind, int]] = []
        differences = {}
        for layer in self.layers:
            differences[layer] = self._differences(activations, layer, shared)
            found = self._candidates(activations, layer, differences[layer], shared)
            for kind, directions in found:
                rows.extend(directions)
                places.extend((layer, kind, index) for index in range(len(directions)))
        stack = torch.stack(rows)
        tokens = decode(stack, self.top_tokens)
        if self.basis == "moments":
            scores = [
                worth for layer in self.layers for worth in activations.leading[layer][1].tolist()
            ]
            kept = [True] * len(scores)
            toward = torch.stack([T.mean(0) for T in differences.values()]).sum(0)
            assert activations.moments is not None  # requested
            basis, values = self._of_moments(activations.moments, toward)
        else:
            layers = tuple(layer for layer, *_ in places)
            evidence = Evidence(stack, layers, differences, activations.causal, tokens, words)
            scores = load_ranking(self.ranking).score(evidence)
            kept = above_threshold(scores, self.alpha)
            basis, values = self._of_candidates(stack, torch.tensor(scores), torch.tensor(kept))
        return Subspace(
            dict.fromkeys(self.edit_layers, basis),
            True,
            {"U": values},
            tuple(
                Candidate(
                    layer=layer, kind=kind, index=index, score=score, kept=keep, tokens=decoded
                )
                for (layer, kind, index), score, keep, decoded in zip(
                    places, scores, kept, tokens, strict=True
                )
            ),
            stack.float(),
        )

    def _candidates(
        self, activations: Activations, layer: int, T: Tensor, shared: Tensor
    ) -> list[tuple[Kind, Tensor]]:
        """Unit rows of one layer by kind, turned to the toxic side."""
        if self.basis == "moments":
            found = activations.leading[layer][0].double()
            signs = torch.where(found @ T.mean(0) < 0, -1.0, 1.0).double()
            return [("causal", signs[:, None] * found)]
        if self.candidates == "causal":
            A = remove(remove(activations.causal[layer], shared).T, shared)
            return [("causal", eigen_directions(A, self.per_layer, T.mean(0)))]
        parts: list[tuple[Kind, Tensor]] = []
        if "mean" in self.candidates:
            parts.append(("mean", mean_difference(T)))
        if "svd" in self.candidates:
            parts.append(("svd", svd_directions(T, self.per_layer)[0]))
        return parts

    def _of_moments(self, moments: Moments, toward: Tensor) -> tuple[Tensor, Tensor]:
        """U, turned to the toxic side, and square roots of what words lose on average along V.

        U is as wide as it can be if no rank is given.
        """
        width = moments.directions.shape[1]
        rank = self.rank or min(MAX_RANK, width)
        if rank > width:
            raise FitError(
                f"rank {rank} is larger than the directions among which it is sought",
                expected=f"at most {width}",
                found=str(rank),
                hint="lower -o rank, or raise -o directions",
            )
        V = moments.directions.double()
        U = torch.linalg.qr(V @ greedy_directions(moments, rank, self.saturation, self.cost)).Q
        signs = torch.where(toward @ U < 0, -1.0, 1.0).double()
        values = torch.linalg.eigvalsh(moments.words.double().mean(0)).flip(0)
        return (U * signs).float().contiguous(), values.clamp(min=0).sqrt()

    def _of_candidates(self, rows: Tensor, scores: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """U and singular values of the kept rows; as wide as it can be if no rank is given."""
        rows, scores = rows[kept], scores[kept]
        if self.weights == "score" and (scores > 0).any():
            rows = rows * scores.clamp(min=0).sqrt()[:, None]
        rank = self.rank or min(MAX_RANK, int(torch.linalg.matrix_rank(rows)))
        return global_basis(rows, rank)

    def _differences(self, activations: Activations, layer: int, shared: Tensor) -> Tensor:
        """T_l of the module's formulas, (N, D) float64."""
        neutral = activations.neutral[layer].double()
        if min(neutral.shape) <= self.protect_own + self.per_layer:
            raise FitError(
                f"layer {layer} has too few pairs or dimensions",
                expected=f"more than {self.protect_own + self.per_layer}",
                found=f"{list(neutral.shape)}",
                hint="lower -o protect_own and -o per_layer",
            )
        protected = extend(shared, top_right_singular_vectors(neutral, self.protect_own)[0])
        differences = activations.toxic[layer].double() - neutral
        left = remove(differences, protected)
        if left.norm() < NOTHING * differences.norm():
            raise FitError(
                f"protecting {protected.shape[1]} of {protected.shape[0]} dimensions leaves "
                f"nothing of what tells the two sides apart in layer {layer}",
                hint="lower -o protect_shared and -o protect_own",
            )
        return left
