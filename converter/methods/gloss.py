"""GloSS: one toxic subspace for all layers, fitted on what the FFNs write.

    T_l = X+_l - X-_l                          differences of pooled FFN outputs, (N, D)
    T_l <- T_l - T_l P_l P_l^T                 P_l: directions that neutral text needs
    candidates of layer l                      mean row of T_l; first right singular vectors of T_l
    keep those with score > mean + alpha std   over all candidates of all layers
    U = leading right singular vectors         of the stacked unit candidates, (D, R)

arXiv 2505.17078 gives the scheme. Its published description leaves pooling and centering open; the
choices here, the protection of neutral directions above all, are those that were measured not to
break a small model.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from converter.activations import Activations, Request, Site
from converter.architecture import Dimensions
from converter.errors import FitError
from converter.methods import Decode, Layers
from converter.subspace import (
    Candidate,
    Subspace,
    above_threshold,
    extend,
    global_basis,
    leading_eigenvectors,
    mean_difference,
    remove,
    svd_directions,
    top_right_singular_vectors,
)
from converter.tokens import Pooling
from converter.words import WordList

NOTHING = 1e-6
"""A share of the differences' norm that is rounding error rather than a difference."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """GloSS with its options.

    Attributes:
        rank: R, dimensions removed.
        layers: used for fitting; by default from L/3 to 0.8 L, where the last layers, which cost
            perplexity and bring nothing, are left out.
        edit_layers: whose down-projections are edited; by default the same.
        site: where activations are taken: ``ffn`` or ``residual``.
        pooling: over the positions that predict a toxic token, over all, or the last.
        candidates: ``mean`` difference of each layer, its first ``svd`` directions, or both.
        num_svd: singular vectors per layer.
        ranking: the score of a candidate: ``mean-difference``, its cosine with its layer's mean
            difference, or ``vocabulary``, the share of its top tokens that are on the word list.
        alpha: standard deviations over the mean score that a candidate needs. With
            ``candidates=mean`` there is nothing to choose from and all are kept.
        protect_shared: leading eigenvectors of the layers' average neutral second moment that no
            candidate may touch. ``U`` acts on every layer, so a layer's own are not enough.
        protect_own: leading right singular vectors of the layer's own neutral side, likewise.
        top_tokens: decoded for each candidate.
        bias: ``project`` also edits the bias of an edited projection, ``keep`` leaves it.
    """

    title: ClassVar[str] = "GloSS, global toxic subspace suppression"
    paper: ClassVar[str] = "https://arxiv.org/abs/2505.17078"

    rank: int = field(default=4, metadata={"min": 1})
    layers: Layers
    edit_layers: Layers = ()
    site: Site = "ffn"
    pooling: Pooling = "predicting"
    candidates: Literal["mean", "svd", "mean+svd"] = "mean+svd"
    num_svd: int = field(default=4, metadata={"min": 1})
    ranking: Literal["mean-difference", "vocabulary"] = "mean-difference"
    alpha: float = 1.0
    protect_shared: int = field(default=16, metadata={"min": 0})
    protect_own: int = field(default=4, metadata={"min": 0})
    top_tokens: int = field(default=10, metadata={"min": 1})
    bias: Literal["project", "keep"] = "project"

    @classmethod
    def defaults(cls, dimensions: Dimensions) -> dict[str, Any]:
        """Values of the options that depend on the model."""
        count = dimensions.num_hidden_layers
        layers = tuple(range(count // 3, min(int(0.8 * count), count - 1) + 1))
        return {"layers": layers}

    def __post_init__(self) -> None:
        if not self.edit_layers:
            object.__setattr__(self, "edit_layers", self.layers)

    @property
    def edit_bias(self) -> bool:
        return self.bias == "project"

    @property
    def request(self) -> Request:
        return Request(self.site, self.pooling, self.layers, self.protect_shared > 0)

    def fit(self, activations: Activations, decode: Decode, words: WordList) -> Subspace:
        """Fit the global subspace; see the module's formulas.

        Raises:
            FitError: protection leaves nothing, no candidate is over the threshold, or fewer than
                ``rank`` are.
        """
        width = activations.neutral[self.layers[0]].shape[1]
        shared = torch.empty(width, 0, dtype=torch.float64)
        if activations.second_moment is not None and self.protect_shared:
            shared = leading_eigenvectors(activations.second_moment, self.protect_shared)
        rows, found = [], []
        for layer in self.layers:
            differences = self._protected_differences(activations, layer, shared)
            mean = mean_difference(differences)
            parts = []
            if "mean" in self.candidates:
                parts.append(("mean", mean))
            if "svd" in self.candidates:
                parts.append(("svd", svd_directions(differences, self.num_svd)[0]))
            for kind, directions in parts:
                for index, u in enumerate(directions):
                    rows.append(u)
                    found.append((layer, kind, index, float(u @ mean[0])))
        stack = torch.stack(rows)
        tokens = decode(stack, self.top_tokens)
        scores = _RANKINGS[self.ranking]([cosine for *_, cosine in found], tokens, words)
        kept = [True] * len(rows)
        if self.candidates != "mean":
            kept = above_threshold(scores, self.alpha)
        basis, values = global_basis(stack[torch.tensor(kept)], self.rank)
        return Subspace(
            dict.fromkeys(self.edit_layers, basis),
            True,
            {"U": values},
            tuple(
                Candidate(layer, kind, index, score, keep, decoded)
                for (layer, kind, index, _), score, keep, decoded in zip(
                    found, scores, kept, tokens, strict=True
                )
            ),
        )

    def _protected_differences(
        self, activations: Activations, layer: int, shared: Tensor
    ) -> Tensor:
        """T_l of the module's formulas, (N, D) float64."""
        neutral = activations.neutral[layer].double()
        if min(neutral.shape) <= self.protect_own + self.num_svd:
            raise FitError(
                f"layer {layer} has too few pairs or dimensions",
                expected=f"more than {self.protect_own + self.num_svd}",
                found=f"{list(neutral.shape)}",
                hint="lower -o protect_own and -o num_svd",
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


def _by_mean_difference(
    cosines: list[float], tokens: list[tuple[str, ...]], words: WordList
) -> list[float]:
    return cosines


def _by_vocabulary(
    cosines: list[float], tokens: list[tuple[str, ...]], words: WordList
) -> list[float]:
    if not all(tokens):
        raise FitError(
            "the directions cannot be decoded, so they cannot be ranked by vocabulary",
            expected="an unembedding stored as plain numbers",
            hint="use -o ranking=mean-difference",
        )
    return [sum(token in words for token in decoded) / len(decoded) for decoded in tokens]


_RANKINGS: Mapping[str, Callable[[list[float], list[tuple[str, ...]], WordList], list[float]]] = {
    "mean-difference": _by_mean_difference,
    "vocabulary": _by_vocabulary,
}
