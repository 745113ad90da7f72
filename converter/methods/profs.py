"""ProFS: a toxic subspace for each layer, fitted on the residual stream.

    T_l = X+_l - X-_l                       differences of pooled hidden states, (N, D)
    T_l <- T_l - T_l P_l P_l^T              P_l: first right singular vectors of X-_l
    U_l = first R right singular vectors    of T_l, (D, R)

arXiv 2405.13967 (ICLR 2025). The paper edits the down-projections of the upper layers: 10-23 of
GPT-2 Medium's 24, 15-31 of Mistral's 32.
"""

from dataclasses import dataclass, field
from itertools import product
from typing import Any, ClassVar, Literal

import torch

from converter.activations import Activations, Request, Site
from converter.architecture import Dimensions
from converter.errors import FitError
from converter.methods import Decode, Layers
from converter.subspace import (
    Candidate,
    Subspace,
    remove,
    svd_directions,
    top_right_singular_vectors,
)
from converter.tokens import Pooling
from converter.words import WordList


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """ProFS with its options.

    Attributes:
        rank: dimensions removed from each layer; by default the paper's 2 for a hidden size below
            4096 (GPT-2 Medium) and 10 from there on (6-7B models).
        layers: fitted and edited; by default from 5/12 L to the last, as in the paper.
        site, pooling: as in GloSS; the paper's are ``residual`` and ``mean``.
        center: singular vectors of the neutral side that are removed first; without any, the
            perplexity of GPT-2 rises from 35 to over 1160 (paper).
        top_tokens: decoded for each direction.
        bias: ``project`` also edits the bias of an edited projection, ``keep`` leaves it.
    """

    title: ClassVar[str] = "ProFS, projection filter for subspaces"
    paper: ClassVar[str] = "https://arxiv.org/abs/2405.13967"

    rank: int = field(metadata={"min": 1})
    layers: Layers
    site: Site = "residual"
    pooling: Pooling = "mean"
    center: int = field(default=1, metadata={"min": 0})
    top_tokens: int = field(default=10, metadata={"min": 1})
    bias: Literal["project", "keep"] = "project"

    @classmethod
    def defaults(cls, dimensions: Dimensions) -> dict[str, Any]:
        """Values of the options that depend on the model."""
        count = dimensions.num_hidden_layers
        return {
            "rank": 10 if dimensions.hidden_size >= 4096 else 2,
            "layers": tuple(range(count * 5 // 12, count)),
        }

    @property
    def edit_layers(self) -> Layers:
        return self.layers

    @property
    def edit_bias(self) -> bool:
        return self.bias == "project"

    @property
    def request(self) -> Request:
        return Request(self.site, self.pooling, self.layers, False)

    def fit(self, activations: Activations, decode: Decode, words: WordList) -> Subspace:
        """Fit one basis for each layer.

        Raises:
            FitError: ``rank`` and ``center`` ask for more directions than there are, or the sides
                are the same.
        """
        spectrum, found = {}, []
        for layer in self.layers:
            neutral = activations.neutral[layer]
            if self.rank + self.center > min(neutral.shape):
                raise FitError(
                    f"rank {self.rank} is larger than the candidates allow",
                    expected=f"at most {min(neutral.shape) - self.center} in layer {layer}",
                    found=str(self.rank),
                    hint="lower -o rank or give more pairs",
                )
            center, _ = top_right_singular_vectors(neutral, self.center)
            differences = remove(activations.toxic[layer] - neutral, center)
            directions, spectrum[f"U.{layer}"] = svd_directions(differences, self.rank)
            found.append(directions)
        tokens = decode(torch.cat(found), self.top_tokens)
        return Subspace(
            {
                layer: directions.T.float().contiguous()
                for layer, directions in zip(self.layers, found, strict=True)
            },
            False,
            spectrum,
            tuple(
                Candidate(layer, "svd", i, float(values[i] / values[0]), True, decoded)
                for (layer, i), decoded in zip(
                    product(self.layers, range(self.rank)), tokens, strict=True
                )
                for values in (spectrum[f"U.{layer}"],)
            ),
        )
