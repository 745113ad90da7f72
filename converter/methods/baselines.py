"""Baselines for GloSS: ProFS, and a random subspace."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from converter.calibration.linear_algebra import (
    extend,
    random_basis,
    remove,
    shared_directions,
    svd_directions,
    top_right_singular_vectors,
)
from converter.calibration.statistics import Request, Site
from converter.checkpoints.architectures.architecture import Dimensions
from converter.checkpoints.plan import Plan
from converter.errors import FitError
from converter.manifest import SubspaceEvidence
from converter.methods.base import Proposal, Recorded, Workbench
from converter.methods.bounds import check_orthogonal
from converter.methods.gloss import GlobalRemoval
from converter.methods.subspace import (
    Removal,
    Subspace,
    candidates_of,
    check_basis,
    indexed,
    rank_within,
)
from converter.models.batching import Pooling
from converter.recipe import LARGEST_SEED


@dataclass(frozen=True, slots=True, kw_only=True)
class Profs(Removal):
    """ProFS: a toxic subspace for each layer, fitted on the residual stream.

        T_l = X+_l - X-_l                       differences of pooled hidden states, (N, D)
        T_l <- T_l - T_l P_l P_l^T              P_l: first right singular vectors of X-_l
        U_l = first R right singular vectors    of T_l, (D, R)

    arXiv 2405.13967 (ICLR 2025). The paper edits the down-projections of the upper layers: 10-23 of
    GPT-2 Medium's 24, 15-31 of Mistral's 32.

    Attributes:
        rank: of each layer, see ``Removal``; the paper has 2 for GPT-2 Medium and 10 for 6-7B
            models.
        layers: by default from 5/12 L to the last, as in the paper.
        site, pooling: as in GloSS; the paper's are ``residual`` and ``mean``.
        center: singular vectors of the neutral side that are removed first; without any, the
            perplexity of GPT-2 rises from 35 to over 1160 (paper).
        protect_shared: leading neutral directions of all layers that are removed too; none in the
            paper, 16 in GloSS.
    """

    title: ClassVar[str] = "ProFS, projection filter for subspaces"
    paper: ClassVar[str] = "https://arxiv.org/abs/2405.13967"

    site: Site = "residual"
    pooling: Pooling = "mean"
    center: int = field(default=1, metadata={"min": 0, "max": "hidden_size"})
    protect_shared: int = field(default=0, metadata={"min": 0, "max": "hidden_size"})

    @classmethod
    def defaults(cls, dimensions: Dimensions) -> dict[str, Any]:
        """Values of the options that depend on the model."""
        count = dimensions.num_hidden_layers
        return {"layers": tuple(range(count * 5 // 12, count))}

    def fit(self, bench: Workbench) -> Proposal:
        """Fit one basis for each layer.

        Raises:
            FitError: ``rank`` and ``center`` ask for more directions than there are, or the sides
                are the same.
        """
        seen = bench.activations(
            Request(self.site, self.pooling, self.layers, self.protect_shared > 0)
        )
        shared = shared_directions(seen.second_moment, self.protect_shared, seen.width)
        most = min(seen.neutral[self.layers[0]].shape) - self.center - shared.shape[1]
        rank = rank_within(
            self.rank,
            most,
            than="the candidates allow",
            which=", which protection leaves of pairs and dimensions",
            hint="lower -o rank or give more pairs",
        )
        bases, values, candidates = {}, {}, []
        for layer in self.layers:
            neutral = seen.neutral[layer]
            center = extend(shared, top_right_singular_vectors(neutral, self.center)[0])
            differences = remove(seen.toxic[layer] - neutral, center)
            bases[layer], found = svd_directions(differences, rank)
            values[f"U.{layer}"] = found
            candidates += candidates_of(layer, "svd", (found[:rank] / found[0]).tolist())
        subspace = Subspace(
            {layer: rows.T.float().contiguous() for layer, rows in bases.items()},
            values,
            candidates,
            torch.cat(list(bases.values())),
        )
        return self.propose(bench, subspace, seen.second_moment)

    def _check_sizes(self, plan: Plan) -> None:
        check_orthogonal(
            plan.dimensions,
            rank=self.rank or 1, center=self.center, protect_shared=self.protect_shared,
        )  # fmt: skip

    def _implied(self, told: SubspaceEvidence, found: Recorded) -> dict[str, Any]:
        values, count = told.singular_values, len(told.candidates) // len(self.layers)
        parts = found.tensors["candidates"].reshape(len(self.layers), count, -1)
        check_basis(found, dict(zip(self.layers, parts, strict=True)))
        return {
            "candidates": [
                {"layer": layer, "kind": "svd", "index": i, "kept": True,
                 "score": values[f"U.{layer}"][i] / values[f"U.{layer}"][0]}
                for layer in self.layers
                for i in range(count)
            ]
        }  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomSubspace(Removal):
    """A random subspace: the control for every method, without knowledge of toxicity.

        U = orthonormal basis of  (I - P P^T) G      G (D, R) Gaussian, P what GloSS protects

    The guard refuses it. As a method, it can be measured like any other.

    Attributes:
        layers: by default those of GloSS.
        draw: the seed.
        protect_shared: leading neutral directions that are spared; see GloSS.
    """

    title: ClassVar[str] = "random subspace, a control"
    paper: ClassVar[str] = "https://arxiv.org/abs/2505.17078"

    draw: int = field(default=0, metadata={"min": 0, "max": LARGEST_SEED})
    protect_shared: int = field(default=16, metadata={"min": 0, "max": "hidden_size"})

    @classmethod
    def defaults(cls, dimensions: Dimensions) -> dict[str, Any]:
        """Values of the options that depend on the model."""
        return GlobalRemoval.defaults(dimensions)

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

    def _check_sizes(self, plan: Plan) -> None:
        check_orthogonal(plan.dimensions, rank=self.rank or 1, protect_shared=self.protect_shared)

    def _implied(self, told: SubspaceEvidence, found: Recorded) -> dict[str, Any]:
        rows = found.tensors["candidates"]
        check_basis(found, dict.fromkeys(self.layers, rows))
        drawn = random_basis(rows.shape[1], len(rows), self.draw, rows[:0].T.double()).T
        if not self.protect_shared and not torch.allclose(rows, drawn, atol=1e-5):
            raise FitError("the basis is not the one that is drawn with the seed", found="another")
        same = {"layer": self.layers[0], "kind": "random", "kept": True, "score": 0.0}
        return {"candidates": indexed(told, **same)}
