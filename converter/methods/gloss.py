"""GloSS: one toxic subspace for all layers, fitted on what the FFNs write.

    P                                       directions that neutral text needs, (D, p)
    A_l' = (I - P P^T) A_l (I - P P^T)      causal moments, (D, D), P shared by the layers;
                                            u^T A_l u is what toxic words lose without u
    V = leading eigenvectors of the sum of A_l' over layers, (D, K)
    U = V X                                 X (K, R) from the moments of single words and pieces of
                                            neutral text within V: see ``greedy``

arXiv 2505.17078 gives the scheme of one subspace and one projection for all layers; ``gloss_paper``
is its letter. Here the signal speaks before the layers are cut into candidates, and more is asked
for than a large sum: a corpus is mostly forms of two words, and the eigenvectors of the sum take
these to nothing many times over and leave the others, or take slang, and all informal text, with
them. The protection of neutral directions is what keeps the edit from destroying a small model.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from converter.calibration.linear_algebra import shared_directions
from converter.calibration.statistics import Activations, Moments, Request, Site
from converter.checkpoints.architectures.dimensions import Dimensions
from converter.errors import FitError
from converter.manifest import Candidate
from converter.methods.base import Layers, Proposal, Workbench
from converter.methods.greedy import greedy_directions
from converter.methods.subspace import (
    MAX_RANK,
    Removal,
    Subspace,
    protected_differences,
)
from converter.models.batching import Pooling


@dataclass(frozen=True, slots=True, kw_only=True)
class Method(Removal):
    """GloSS with its options.

    Attributes:
        layers: see ``Removal``; by default from L/4 up to 0.9 L. The last layers cost perplexity
            and bring nothing.
        edit_layers: whose down-projections are edited; by default the same.
        site: where activations are taken: ``ffn`` or ``residual``.
        pooling: of the differences, by which directions are turned to the toxic side: over the
            positions that predict a toxic token, over all, or the last.
        per_layer: leading causal directions of each layer that are recorded, to show what the
            layers have in common.
        directions: K, among which U is sought.
        saturation: nats that a word may lose before more counts little.
        cost: of a nat per neutral token, in shares of toxic words.
        protect_shared: leading eigenvectors of the layers' average neutral second moment that no
            direction may touch. ``U`` acts on every layer, so a layer's own are not enough.
        protect_own: leading right singular vectors of the layer's own neutral side, which its
            differences may not touch.
    """

    title: ClassVar[str] = "GloSS, global toxic subspace suppression"
    paper: ClassVar[str] = "https://arxiv.org/abs/2505.17078"

    edit_layers: Layers = ()
    site: Site = "ffn"
    pooling: Pooling = "predicting"
    per_layer: int = field(default=4, metadata={"min": 1})
    directions: int = field(default=32, metadata={"min": 1})
    saturation: float = field(default=3.0, metadata={"min": 1e-3})
    cost: float = field(default=3.0, metadata={"min": 0})
    protect_shared: int = field(default=16, metadata={"min": 0})
    protect_own: int = field(default=4, metadata={"min": 0})

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
        width = seen.neutral[self.layers[0]].shape[1]
        shared = shared_directions(seen.second_moment, self.protect_shared, width)
        means = {
            layer: protected_differences(
                seen, layer, shared, self.protect_own, self.per_layer
            ).mean(0)
            for layer in self.layers
        }
        rows = torch.cat([self._leading(seen, layer, mean) for layer, mean in means.items()])
        tokens = bench.decode(rows, self.top_tokens)
        assert seen.moments is not None  # requested
        basis, values = self._basis(seen.moments, torch.stack(list(means.values())).sum(0))
        places = [
            (layer, index, score)
            for layer in self.layers
            for index, score in enumerate(seen.leading[layer][1].tolist())
        ]
        candidates = tuple(
            Candidate(
                layer=layer, kind="causal", index=index, score=score, kept=True, tokens=decoded
            )
            for (layer, index, score), decoded in zip(places, tokens, strict=True)
        )
        subspace = Subspace(
            dict.fromkeys(self.edited, basis), {"U": values}, candidates, rows.float()
        )
        return self.propose(bench, subspace, seen.second_moment)

    def _leading(self, seen: Activations, layer: int, mean: Tensor) -> Tensor:
        """The leading causal directions of a layer as unit rows, turned to the toxic side."""
        found = seen.leading[layer][0].double()
        signs = torch.where(found @ mean < 0, -1.0, 1.0).double()
        return signs[:, None] * found

    def _basis(self, moments: Moments, toward: Tensor) -> tuple[Tensor, Tensor]:
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
