"""The common part of methods that remove a subspace from down-projections.

Letters: N pairs, D hidden size, C candidates, R rank. Rows are samples or candidates; a basis is
(D, R) with orthonormal columns. Everything is float64: the matrices are small beside the model.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import msgspec
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
from converter.edits.deltas import RemoveOblique, RemoveSubspace, WeakenSubspace, removal_of
from converter.errors import FitError, OptionError
from converter.manifest import Candidate, Kind, SubspaceEvidence, to_json
from converter.methods.base import Factors, Layers, Proposal, Recorded, Workbench
from converter.methods.behind_norm import removal_behind

MAX_RANK = 8
"""The rank that is fitted if it is to be chosen; larger ones gained nothing in experiments."""

_RANKS = (1, 2, 3, 4, 6, MAX_RANK)
"""The ranks to choose from."""

_SPARED = 16
"""Leading neutral directions that random subspaces spare, as GloSS does by default."""

_NOTHING = 1e-6
"""Below this share of the differences' norm, a difference is rounding error."""


@dataclass(frozen=True, slots=True)
class Subspace:
    """A fitted subspace.

    Attributes:
        bases: edited layer -> (D, R) float32, orthonormal columns, the most important first.
        singular_values: of the matrix from which the basis was taken; one tensor under the key
            ``U``, or one for each layer under ``U.layer``.
        candidates: all of them, in order of layer, not decoded yet.
        rows: (C, D), their directions, unit vectors.
    """

    bases: Mapping[int, Tensor]
    singular_values: Mapping[str, Tensor]
    candidates: Iterable[Candidate]
    rows: Tensor


def candidates_of(layer: int, kind: Kind, scores: Iterable[float]) -> list[Candidate]:
    """Candidates of one layer and kind that are all kept."""
    return [
        Candidate(layer=layer, kind=kind, index=index, score=score, kept=True, tokens=())
        for index, score in enumerate(scores)
    ]


def rank_within(rank: int | None, most: int, *, than: str, which: str, hint: str) -> int:
    """The given rank, or the rank to fit: ``MAX_RANK``, if possible.

    Raises:
        FitError: it is over ``most``, or that is 0; ``than``, ``which`` and ``hint`` say why.
    """
    wanted = rank or min(MAX_RANK, most)
    if not 1 <= wanted <= most:
        raise FitError(
            f"rank {wanted} is larger than {than}",
            expected=f"at most {most}{which}",
            found=str(wanted),
            hint=hint,
        )
    return wanted


@dataclass(frozen=True, slots=True, kw_only=True)
class Removal:
    """The common base of methods that remove a subspace from down-projections.

    Attributes:
        rank: R, dimensions removed; by default the most effective number within the perplexity
            budget.
        layers: fitted and, unless ``edited`` says otherwise, edited.
        top_tokens: decoded for each direction, for the manifest; no more of them than there are.
        factors: how much of the subspace is taken out of each layer; all of it by default.
        bias: ``project`` also edits the bias of an edited projection. With ``keep`` a layer still
            writes a constant along U.
    """

    strength: ClassVar[str] = "rank"

    rank: int | None = field(default=None, metadata={"min": 1, "max": "hidden_size"})
    layers: Layers
    top_tokens: int = field(default=10, metadata={"min": 1, "max": 1000})
    factors: Factors = field(default=(), metadata={"unsaid": True, "search": "factors"})
    bias: Literal["project", "keep"] = "project"

    @property
    def edited(self) -> Layers:
        """The layers whose down-projections change."""
        return self.layers

    def footprint(self, plan: Plan) -> Footprint:
        """The down-projections of the layers whose factor is not 0.

        Raises:
            OptionError: a mixture of experts with biases that are to be kept; factors of another
                number of layers, of layers that are not edited, or 0 in all that are; more
                directions than the model has room for.
        """
        self._check_sizes(plan)
        self._check_factors(plan, self.factors)
        weights = self._weights(plan, self.factors)
        sparse = plan.dimensions.sparse_layers
        if self.bias == "keep" and any(bias.layer in sparse for bias in plan.biases("down_proj")):
            raise OptionError(
                "-o bias=keep",
                expected="bias=project for experts with biases",
                found="keep",
                hint="what a mixture gives holds its biases as the router weighs them, so an edit "
                "that keeps them could not be examined",
            )
        kinds = dict.fromkeys(
            RemoveOblique if weight.layer in plan.post_norms
            else WeakenSubspace if factor_of(self.factors, weight.layer) * self._most < 1
            else RemoveSubspace
            for weight in weights
        )  # fmt: skip
        return Footprint(weights, tuple(kinds), self.rank or MAX_RANK)

    def _check_sizes(self, plan: Plan) -> None:
        """Refuse directions that no fit to this model can find. Raises OptionError."""

    def _check_factors(self, plan: Plan, factors: Factors) -> None:
        """Refuse factors that do not fit the layers. Raises OptionError."""
        count = plan.dimensions.num_hidden_layers
        if not factors:
            return
        if len(factors) != count or not all(0 <= factor <= 1 for factor in factors):
            raise OptionError(
                "-o factors", found=str(list(factors)),
                expected=f"a number from 0 to 1 for each of {count} layers",
            )  # fmt: skip
        others = [n for n in range(count) if n not in self.edited and factors[n] != 1]
        if others and len({*factors}) > 1:
            raise OptionError(
                "-o factors", found=f"one for layer {others[0]}",
                expected=f"layers that are edited: {', '.join(map(str, self.edited))}",
            )  # fmt: skip
        if not any(factors[layer] for layer in self.edited):
            raise OptionError("-o factors", expected="one that is not 0", found="0 in each layer")

    def propose(self, bench: Workbench, subspace: Subspace, moment: Tensor | None) -> Proposal:
        """Offer a fitted subspace by rank: the first columns of every basis, by the factors.

        Args:
            bench: with the model.
            subspace: in the space of what the FFNs give.
            moment: (D, D) neutral second moment averaged over layers, or None if it is not known;
                controls then spare nothing.
        """
        bases, gains = subspace.bases, bench.gains
        width, widest = next(iter(bases.values())).shape
        spared = shared_directions(moment, min(_SPARED, width // 8), width)
        evidence, tensors = self._evidence(bench, subspace, width)

        def offer(factors: Factors) -> Proposal:
            self._check_factors(bench.plan, factors)

            def size(strength: float) -> tuple[int, Factors]:
                (rank, part), count = self.taken(strength), bench.plan.dimensions.num_hidden_layers
                shares = (part * factor_of(factors, layer) for layer in range(count))
                return min(rank, widest), tuple(shares)

            def edit(strength: float) -> Edit:
                rank, shares = size(strength)
                leading = {n: U[:, :rank] for n, U in bases.items()}
                return self._edit(bench.plan, leading, shares, gains)

            def control(strength: float, seed: int) -> Edit:
                rank, shares = size(strength)
                drawn = dict.fromkeys(self.edited, random_basis(width, rank, seed, spared))
                return self._edit(bench.plan, drawn, shares, gains)

            def energy(strength: float) -> float | None:
                if moment is None:
                    return None
                rank, shares = size(strength)
                return max(
                    a * (2 - a) * neutral_energy(U[:, :rank], moment)
                    for a, U in ((shares[n], U) for n, U in bases.items())
                )

            return Proposal(
                self._strengths(widest), self._is_free, edit, control, evidence, tensors, energy,
                offer,
            )  # fmt: skip

        return offer(self.factors)

    def taken(self, strength: float) -> tuple[int, float]:
        """The rank, or a larger number where all that is fitted counts, and the part taken out."""
        return int(strength), 1.0

    @property
    def _most(self) -> float:
        """The largest part that a strength takes out."""
        return 1.0

    @property
    def _is_free(self) -> bool:
        return self.rank is None

    def _strengths(self, widest: int) -> Sequence[float]:
        """Of a fit of so many directions."""
        ranks = {rank for rank in _RANKS if rank <= widest}
        return sorted(ranks if self.rank is None else {*ranks, widest})

    def implied(self, found: Recorded) -> dict[str, Any]:
        """The width, and of the candidates what options and basis say. Raises FitError."""
        told = msgspec.convert(found.evidence, SubspaceEvidence)
        decoded = {len(candidate.tokens) for candidate in told.candidates}
        if not decoded <= {0, min(self.top_tokens, found.plan.architecture.embedding_shape[0])}:
            raise FitError(
                "-o top_tokens", expected=f"{max(decoded)}, as recorded", found=f"{self.top_tokens}"
            )
        return {"hidden_size": found.plan.dimensions.hidden_size, **self._implied(told, found)}

    def _implied(self, told: SubspaceEvidence, found: Recorded) -> dict[str, Any]:
        """The same of one method. Raises FitError."""
        return {}

    def _weights(self, plan: Plan, factors: Factors) -> tuple[Weight, ...]:
        """The down-projections, and their biases if they change, in order of layer."""
        found = plan.weights("down_proj", self.edited)
        if self.bias == "project":
            found += plan.biases("down_proj", self.edited)
        left = (weight for weight in found if factor_of(factors, weight.layer))
        return tuple(sorted(left, key=lambda weight: weight.layer))

    def _edit(
        self, plan: Plan, bases: Mapping[int, Tensor], factors: Factors, gains: Mapping[int, Tensor]
    ) -> Edit:
        shared: dict[int, Tensor] = {}  # of bases that layers share
        known: dict[tuple[int, float, int | None], RemoveSubspace] = {}
        deltas = {}
        for weight in self._weights(plan, factors):
            layer, basis = weight.layer, bases[weight.layer]
            behind, a = layer if layer in gains else None, factor_of(factors, layer)
            key = basis.data_ptr(), a, behind
            if key not in known:
                U = shared.setdefault(basis.data_ptr(), basis.contiguous())
                known[key] = (
                    removal_of(U, a) if behind is None else removal_behind(U, gains[layer], a)
                )
            deltas[weight.info.name] = known[key]
        return Edit(deltas)

    def _evidence(
        self, bench: Workbench, subspace: Subspace, width: int
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The evidence of a fit for the manifest and the edit's file."""
        decoded = bench.decode(subspace.rows, self.top_tokens)
        evidence = SubspaceEvidence(
            hidden_size=width,
            singular_values={n: tuple(x.tolist()) for n, x in subspace.singular_values.items()},
            candidates=tuple(
                replace(candidate, tokens=tuple(map(bench.masked, tokens)))
                for candidate, tokens in zip(subspace.candidates, decoded, strict=True)
            ),
        )
        rows = subspace.rows.float().contiguous()
        return to_json(evidence), _tensors(evidence) | {"candidates": rows}


def factor_of(factors: Factors, layer: int) -> float:
    """How much of a subspace is taken out of a layer, from 0 to 1."""
    return factors[layer] if factors else 1.0


def indexed(told: SubspaceEvidence, **same: Any) -> list[dict[str, Any]]:
    """Candidates that are numbered through within their layer and kind, with ``same`` in each."""
    seen: Counter[tuple[int, str]] = Counter()
    found = []
    for candidate in told.candidates:
        place = candidate.layer, candidate.kind
        found.append({"index": seen[place], **same})
        seen[place] += 1
    return found


def check_basis(found: Recorded, rows: Mapping[int, Tensor]) -> None:
    """Raise FitError unless the basis of each layer begins as its recorded candidates (R, D) do.

    Behind a norm bases are turned by its gains, which are not at hand: then nothing is said.
    """
    if found.plan.post_norms:
        return
    layers = {weight.info.name: weight.layer for weight in found.plan.targets}
    for name, delta in found.edit.tensors.items():
        U, mine = delta.protects, rows[layers[name]]
        if U is None or not torch.equal(U, mine[: U.shape[1]].T):
            raise FitError(
                f"the basis of tensor {name}", expected="the first of the recorded candidates",
                found="another one",
            )  # fmt: skip


def _tensors(evidence: SubspaceEvidence) -> dict[str, Tensor]:
    """What the edit's file keeps once more of the evidence in the manifest."""
    tensors = {
        "scores": torch.tensor([candidate.score for candidate in evidence.candidates]),
        "score_layers": torch.tensor([candidate.layer for candidate in evidence.candidates]),
    }
    values = evidence.singular_values
    return tensors | {f"singular_values.{name}": torch.tensor(values[name]) for name in values}


def check_evidence(evidence: SubspaceEvidence, tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of tensors of the edit's file that are not as the manifest's evidence says.

    Those of the edit itself are not among them.
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
    """``(X+ - X-) (I - P P^T)`` of a layer, (N, D) float64: the protected differences of the two
    sides.

    Args:
        activations, layer: of the pairs, and which.
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
    if left.norm() < _NOTHING * differences.norm():
        raise FitError(
            f"protecting {protected.shape[1]} of {protected.shape[0]} dimensions leaves "
            f"nothing of what tells the two sides apart in layer {layer}",
            hint="lower -o protect_shared and -o protect_own",
        )
    return left
