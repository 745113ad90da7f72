"""A random subspace, the control beside every method: it knows nothing of toxicity.

    U = orthonormal basis of  (I - P P^T) G      G (D, R) Gaussian, P what GloSS protects by default

The guard refuses it. It is here so that it can be measured like any other method.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from converter.calibration.linear_algebra import random_basis, shared_directions
from converter.calibration.statistics import Activations, Request
from converter.calibration.word_list import WordList
from converter.checkpoints.architectures.dimensions import Dimensions
from converter.errors import FitError
from converter.manifest import Candidate
from converter.methods import gloss
from converter.methods.base import Decode, Layers
from converter.methods.subspace import MAX_RANK, Subspace


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A random subspace with its options.

    Attributes:
        rank: dimensions removed; by default the largest within the perplexity budget.
        layers: edited; by default those of GloSS.
        draw: the seed.
        protect_shared: leading neutral directions that are spared; see GloSS.
        top_tokens: decoded for each direction.
        bias: ``project`` also edits the bias of an edited projection, ``keep`` leaves it.
    """

    title: ClassVar[str] = "random subspace, a control"
    paper: ClassVar[str] = "https://arxiv.org/abs/2505.17078"

    rank: int | None = field(default=None, metadata={"min": 1})
    layers: Layers
    draw: int = field(default=0, metadata={"min": 0})
    protect_shared: int = field(default=16, metadata={"min": 0})
    top_tokens: int = field(default=10, metadata={"min": 1})
    bias: Literal["project", "keep"] = "project"

    @classmethod
    def defaults(cls, dimensions: Dimensions) -> dict[str, Any]:
        """Values of the options that depend on the model."""
        return gloss.Method.defaults(dimensions)

    @property
    def edit_layers(self) -> Layers:
        return self.layers

    @property
    def edit_bias(self) -> bool:
        return self.bias == "project"

    @property
    def request(self) -> Request:
        return Request("ffn", "predicting", self.layers, self.protect_shared > 0)

    def fit(self, activations: Activations, decode: Decode, words: WordList) -> Subspace:
        """Draw a basis. Nothing is fitted."""
        width = activations.neutral[self.layers[0]].shape[1]
        spared = shared_directions(activations.second_moment, self.protect_shared, width)
        most = width - spared.shape[1]
        rank = self.rank or min(MAX_RANK, most)
        if not 1 <= rank <= most:
            raise FitError(
                f"rank {rank} is larger than the dimensions allow",
                expected=f"at most {most}, which protection leaves",
                found=str(rank),
                hint="lower -o rank or -o protect_shared",
            )
        basis = random_basis(width, rank, self.draw, spared)
        tokens = decode(basis.T, self.top_tokens)
        return Subspace(
            dict.fromkeys(self.layers, basis),
            True,
            {},
            tuple(
                Candidate(
                    layer=self.layers[0],
                    kind="random",
                    index=index,
                    score=0.0,
                    kept=True,
                    tokens=decoded,
                )
                for index, decoded in enumerate(tokens)
            ),
            basis.T.contiguous(),
        )
