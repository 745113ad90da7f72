"""A random subspace, the control beside every method: it knows nothing of toxicity.

    U = orthonormal basis of  (I - P P^T) G      G (D, R) Gaussian, P what GloSS protects by default

The guard refuses it. It is here so that it can be measured like any other method.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from converter.calibration.linear_algebra import random_basis, shared_directions
from converter.calibration.statistics import Request
from converter.checkpoints.architectures.dimensions import Dimensions
from converter.methods import gloss
from converter.methods.base import Proposal, Workbench
from converter.methods.subspace import Removal, Subspace, candidates_of, rank_within


@dataclass(frozen=True, slots=True, kw_only=True)
class Method(Removal):
    """A random subspace with its options.

    Attributes:
        layers: by default those of GloSS.
        draw: the seed.
        protect_shared: leading neutral directions that are spared; see GloSS.
    """

    title: ClassVar[str] = "random subspace, a control"
    paper: ClassVar[str] = "https://arxiv.org/abs/2505.17078"

    draw: int = field(default=0, metadata={"min": 0})
    protect_shared: int = field(default=16, metadata={"min": 0})

    @classmethod
    def defaults(cls, dimensions: Dimensions) -> dict[str, Any]:
        """Values of the options that depend on the model."""
        return gloss.Method.defaults(dimensions)

    def fit(self, bench: Workbench) -> Proposal:
        """Draw a basis. Nothing is fitted."""
        seen = bench.activations(Request("ffn", "predicting", self.layers, self.protect_shared > 0))
        spared = shared_directions(seen.second_moment, self.protect_shared, seen.width)
        rank = rank_within(
            self.rank,
            seen.width - spared.shape[1],
            than="the dimensions allow",
            which=", which protection leaves",
            hint="lower -o rank or -o protect_shared",
        )
        basis = random_basis(seen.width, rank, self.draw, spared)
        candidates = candidates_of(self.layers[0], "random", [0.0] * rank)
        subspace = Subspace(dict.fromkeys(self.layers, basis), {}, candidates, basis.T)
        return self.propose(bench, subspace, seen.second_moment)
