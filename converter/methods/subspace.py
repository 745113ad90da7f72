"""What methods share that take a subspace out of down-projections.

Letters: N pairs, D hidden size, C candidates, R rank. Rows are samples or candidates; a basis is
(D, R) with orthonormal columns. Everything is float64: the matrices are small beside the model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from msgspec.structs import replace
from torch import Tensor

from converter.calibration.linear_algebra import (
    extend,
    random_basis,
    remove,
    shared_directions,
    top_right_singular_vectors,
)
from converter.calibration.statistics import Activations
from converter.checkpoints.plan import Plan
from converter.checkpoints.weights import Weight
from converter.edits.base import Edit, Footprint
from converter.edits.deltas import RemoveSubspace
from converter.errors import FitError, OptionError
from converter.manifest import Candidate, SubspaceEvidence, to_json
from converter.methods.base import Layers, Proposal, Workbench
from converter.methods.post_norms import after_norm, before_norm

MAX_RANK = 8
"""Fitted if the rank is left to be chosen; larger ones bought nothing where they were tried."""

RANKS = (1, 2, 3, 4, 6, MAX_RANK)
"""Among which a rank is chosen."""

SPARED = 16
"""Leading neutral directions that random subspaces spare, as GloSS does by default."""

NOTHING = 1e-6
"""A share of the differences' norm that is rounding error rather than a difference."""


@dataclass(frozen=True, slots=True)
class Subspace:
    """A fitted subspace.

    Attributes:
        bases: edited layer -> (D, R) float32, orthonormal columns, the most important first.
        singular_values: of the matrix from which the basis was taken; one tensor under the key
            ``U``, or one for each layer under ``U.layer``.
        candidates: all of them, in order of layer.
        rows: (C, D) float32, their directions, unit vectors.
    """

    bases: Mapping[int, Tensor]
    singular_values: Mapping[str, Tensor]
    candidates: tuple[Candidate, ...]
    rows: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Removal:
    """What all methods have that take a subspace out of down-projections.

    Attributes:
        rank: R, dimensions removed; by default the most effective number within the perplexity
            budget.
        layers: fitted and, unless ``edited`` says otherwise, edited.
        top_tokens: decoded for each direction, for the manifest.
        bias: ``project`` also edits the bias of an edited projection. With ``keep`` a layer still
            writes a constant along U.
    """

    strength: ClassVar[str] = "rank"

    rank: int | None = field(default=None, metadata={"min": 1})
    layers: Layers
    top_tokens: int = field(default=10, metadata={"min": 1})
    bias: Literal["project", "keep"] = "project"

    @property
    def edited(self) -> Layers:
        """The layers whose down-projections change."""
        return self.layers

    def footprint(self, plan: Plan) -> Footprint:
        """The down-projections of the layers.

        Raises:
            OptionError: a mixture of experts with biases that are to be kept.
        """
        weights = self._weights(plan)
        sparse = plan.dimensions.sparse_layers
        if self.bias == "keep" and any(bias.layer in sparse for bias in plan.biases("down_proj")):
            raise OptionError(
                "-o bias=keep",
                expected="bias=project for experts with biases",
                found="keep",
                hint="what a mixture gives holds its biases as the router weighs them, so an edit "
                "that keeps them could not be examined",
            )
        return Footprint(weights, (RemoveSubspace,), self.rank or MAX_RANK)

    def propose(self, bench: Workbench, subspace: Subspace, moment: Tensor | None) -> Proposal:
        """Offer a fitted subspace by rank: the first columns of every basis.

        Args:
            bench: with the model.
            subspace: in the space of what the FFNs give.
            moment: (D, D) neutral second moment averaged over layers, or None if it is not known;
                controls then spare nothing.
        """
        gains = bench.gains
        bases = before_norm(subspace.bases, gains)
        width, widest = next(iter(bases.values())).shape
        spared = shared_directions(moment, min(SPARED, width // 8), width)

        def edit(rank: float) -> Edit:
            return self._edit(bench.plan, {n: U[:, : int(rank)] for n, U in bases.items()})

        def control(rank: float, seed: int) -> Edit:
            basis = random_basis(width, int(rank), seed, spared)
            return self._edit(bench.plan, before_norm(dict.fromkeys(self.edited, basis), gains))

        def energy(rank: float) -> float | None:
            if moment is None:
                return None
            written = after_norm({n: U[:, : int(rank)] for n, U in bases.items()}, gains)
            return max(neutral_energy(U, moment) for U in written.values())

        free = self.rank is None
        ranks = [rank for rank in RANKS if rank <= widest]
        if not free:
            ranks = sorted({*ranks, widest})
        evidence, tensors = _evidence(bench, subspace, width)
        return Proposal(ranks, free, edit, control, evidence, tensors, energy)

    def _weights(self, plan: Plan) -> tuple[Weight, ...]:
        """The down-projections, and their biases if they change, in order of layer."""
        found = plan.weights("down_proj", self.edited)
        if self.bias == "project":
            found += plan.biases("down_proj", self.edited)
        return tuple(sorted(found, key=lambda weight: weight.layer))

    def _edit(self, plan: Plan, bases: Mapping[int, Tensor]) -> Edit:
        whole: dict[int, RemoveSubspace] = {}  # of bases that layers share
        deltas = {}
        for weight in self._weights(plan):
            basis = bases[weight.layer]
            known = whole.setdefault(basis.data_ptr(), RemoveSubspace(basis.contiguous()))
            deltas[weight.info.name] = known
        return Edit(deltas)


def _evidence(
    bench: Workbench, subspace: Subspace, width: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What the manifest and the edit's file keep of a fit."""
    candidates, values = subspace.candidates, subspace.singular_values
    evidence = SubspaceEvidence(
        hidden_size=width,
        singular_values={name: tuple(found.tolist()) for name, found in values.items()},
        candidates=tuple(
            replace(candidate, tokens=tuple(map(bench.masked, candidate.tokens)))
            for candidate in candidates
        ),
    )
    return to_json(evidence), _tensors(evidence) | {"candidates": subspace.rows}


def _tensors(evidence: SubspaceEvidence) -> dict[str, Tensor]:
    """What the edit's file keeps once more of the evidence in the manifest."""
    tensors = {
        "scores": torch.tensor([candidate.score for candidate in evidence.candidates]),
        "score_layers": torch.tensor([candidate.layer for candidate in evidence.candidates]),
    }
    values = evidence.singular_values
    return tensors | {f"singular_values.{name}": torch.tensor(values[name]) for name in values}


def check_evidence(evidence: SubspaceEvidence, tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of tensors of the edit's file that are not as the manifest says.

    Args:
        evidence: of the manifest.
        tensors: of the file, without those of the edit itself.
    """
    expected = _tensors(evidence)
    rows = tensors.get("candidates", torch.empty(0))
    shape = (len(evidence.candidates), evidence.hidden_size)
    wrong = [] if tuple(rows.shape) == shape else ["candidates"]
    for name in sorted({*expected, *tensors} - {"candidates"}):
        ours, theirs = tensors.get(name), expected.get(name)
        same = ours is not None and theirs is not None and ours.dtype == theirs.dtype
        if ours is None or theirs is None or not (same and torch.equal(ours, theirs)):
            wrong.append(name)
    return wrong


def neutral_energy(U: Tensor, moment: Tensor) -> float:
    """tr(U^T M U) / tr M for U (D, R) and a second moment M (D, D)."""
    U, M = U.double(), moment.double()
    return float((U * (M @ U)).sum() / torch.trace(M))


def protected_differences(
    activations: Activations, layer: int, shared: Tensor, own: int, needed: int
) -> Tensor:
    """``(X+ - X-) (I - P P^T)`` of a layer, (N, D) float64: what tells the two sides apart.

    Args:
        activations: of the pairs.
        layer: whose.
        shared: (D, p) directions of all layers that are protected.
        own: leading right singular vectors of the layer's neutral side that are, too.
        needed: directions that have to be left.

    Raises:
        FitError: there are too few pairs or dimensions, or protection leaves nothing.
    """
    neutral = activations.neutral[layer].double()
    if min(neutral.shape) <= own + needed:
        raise FitError(
            f"layer {layer} has too few pairs or dimensions",
            expected=f"more than {own + needed}",
            found=f"{list(neutral.shape)}",
            hint="lower -o protect_own and -o per_layer",
        )
    protected = extend(shared, top_right_singular_vectors(neutral, own)[0])
    differences = activations.toxic[layer].double() - neutral
    left = remove(differences, protected)
    if left.norm() < NOTHING * differences.norm():
        raise FitError(
            f"protecting {protected.shape[1]} of {protected.shape[0]} dimensions leaves "
            f"nothing of what tells the two sides apart in layer {layer}",
            hint="lower -o protect_shared and -o protect_own",
        )
    return left


EQUAL = 1e-9
"""Scores that differ by less than this share of the largest are equal."""


def above_threshold(scores: Sequence[float], alpha: float) -> list[bool]:
    """Which scores exceed mean + alpha * std of all of them (population std).

    The threshold rule of GloSS (arXiv 2505.17078). Scores that are all equal say nothing, and all
    are kept.

    Raises:
        FitError: none does.
    """
    values = torch.tensor(scores, dtype=torch.float64)
    if values.max() - values.min() <= EQUAL * values.abs().max():
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


def global_basis(candidates: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The leading subspace of stacked candidates, by uncentred principal component analysis.

    Args:
        candidates: (C, D) rows, each as long as it should count.
        rank: R, columns wanted.

    Returns:
        U (D, R) float32 with orthonormal columns, each turned so that the candidates have a
        positive sum along it, and all singular values.

    Raises:
        FitError: the candidates span fewer than ``rank`` dimensions.
    """
    spanned = int(torch.linalg.matrix_rank(candidates.double()))
    if rank > spanned:
        raise FitError(
            f"rank {rank} is larger than the candidates allow",
            expected=f"at most {spanned}, the dimensions that {len(candidates)} candidates span",
            found=str(rank),
            hint="lower -o rank, or lower -o alpha to keep more candidates",
        )
    vectors, values = top_right_singular_vectors(candidates, rank)
    signs = torch.where((candidates.double() @ vectors).sum(0) < 0, -1.0, 1.0).double()
    return (vectors * signs).float().contiguous(), values
