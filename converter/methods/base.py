"""Methods: frozen dataclasses whose fields are their options, in modules beside this one.

A method says from the headers what it will change (``footprint``), then fits an edit to a model
(``fit``). It never opens a file and does not know where the model is: all it may use is a
``Workbench``. A new one is a line in ``known.METHODS``, or a package with an entry point; see
``runtime.registry``.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import isfinite
from typing import Any, ClassVar, Literal, Protocol, TypeVar, get_args

import msgspec
from torch import Tensor

from converter.calibration.calibration_models import Calibration, Contrast, Training
from converter.calibration.instances import Instance, Instances, Lesson
from converter.calibration.statistics import Activations, Request
from converter.calibration.word_list import WordList
from converter.checkpoints.architectures.architecture import Dimensions
from converter.checkpoints.plan import Plan
from converter.checkpoints.weights import Weight
from converter.edits.base import FAULT, Edit, Footprint
from converter.edits.deltas import is_dense
from converter.errors import FitError
from converter.manifest import SubspaceEvidence
from converter.methods.known import Factors as Factors
from converter.methods.known import Layers as Layers
from converter.models.resident import Model
from converter.runtime import strict_json

Aim = Literal["toxicity", "defence"]
"""What an edit is for, and examined for: toxic words become less probable, or answers to harmful
requests become refusals."""


class Workbench(Protocol):
    """What a method may use of a model and of the texts that it is fitted to."""

    @property
    def plan(self) -> Plan:
        """The structure of the checkpoint."""

    @property
    def words(self) -> WordList:
        """The offensive words."""

    @property
    def instances(self) -> Instances:
        """Harmful requests with a safe and an unsafe answer; for the aim ``defence``."""

    @property
    def gains(self) -> Mapping[int, Tensor]:
        """Layer -> (D,) float32: what the norm after its FFN multiplies by; empty without one."""

    def load(self) -> Model:
        """The unedited model with its tokenizer, in memory or streamed; nothing may change it."""

    def activations(self, request: Request) -> Activations:
        """What the model makes of the texts, from a forward pass or a cache."""

    def contrast(self, training: Training) -> Contrast:
        """What two calibration models, trained on either side of the pairs, make of them.

        Raises OptionError or SourceError if the model is not in memory as a whole.
        """

    def calibrate(self, training: Training, names: Collection[str]) -> Mapping[str, Calibration]:
        """A calibration model of the neutral sides, given or trained, and of the toxic ones.

        Args:
            training: how; of one that is given, only its depth counts.
            names: of the tensors of the model's that are wanted of each.

        Raises OptionError or SourceError if the model is not in memory as a whole.
        """

    def weight(self, weight: Weight) -> Tensor:
        """W (O, I) float32, read from its shard, however it is stored; a bias is (O, 1)."""

    def decode(self, directions: Tensor, count: int) -> list[tuple[str, ...]]:
        """The ``count`` tokens nearest to each of the directions (C, D), the nearest first."""

    def single_token_share(self) -> float:
        """Which share of the word list are single tokens of the model."""

    def masked(self, token: str) -> str:
        """A token as it may be written down: with stars if it is offensive and that is asked."""


@dataclass(frozen=True, slots=True)
class Proposal:
    """What a fit gives: an edit for each strength, and as much of nothing to compare it with.

    Attributes:
        strengths: one or more, ascending, such as ranks or step sizes.
        is_free: whether the most effective of them within the perplexity budget is to be chosen;
            if not, it is the last.
        edit: the edit of a strength; also of strengths between those listed, where that makes
            sense.
        control: an edit of a strength and a seed, of the same kind, tensors and size, that knows
            nothing of toxicity. The guard compares with it.
        evidence: what the method keeps in the manifest to show how it came to its edits, as JSON.
        tensors: the same in the edit's file.
        neutral_energy: share of what neutral text writes that the edit of a strength takes away,
            or None if that is not known.
        compared: name -> another edit of a strength, such as a part of this one by itself, that the
            guard measures beside it and does not judge by.
        with_factors: the same fit with other ``Factors``, controls included, which costs no pass
            over texts: what a search varies. None if the method has no factors.
        with_layers: likewise, the same fit of some of its layers only, controls included. None if
            the method cannot leave layers out, or has factors.
        lesson: the instances that the fit has seen, with the aim ``defence``; else None. The guard
            keeps them out of what it measures on.
        control_kinds: what the controls are of the seeds 0, 1 and so on, over and over, in words
            that follow "under". With the aim ``toxicity`` the edit has to beat each kind.

    Raises:
        FitError: a part of it is of another type, or cannot be kept.
    """

    strengths: Sequence[float]
    is_free: bool
    edit: Callable[[float], Edit]
    control: Callable[[float, int], Edit]
    evidence: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    neutral_energy: Callable[[float], float | None] = lambda strength: None
    with_factors: "Callable[[Factors], Proposal] | None" = None
    with_layers: "Callable[[Layers], Proposal] | None" = None
    lesson: Lesson | None = None
    control_kinds: tuple[str, ...] = ("the controls",)
    compared: Mapping[str, Callable[[float], Edit]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Strengths become plain numbers, evidence what its JSON says."""
        try:
            strengths, evidence = _kept(self)
        except (TypeError, ValueError, AttributeError, msgspec.ValidationError) as error:
            raise FitError(
                "what the fit proposes", found=str(error), hint=FAULT,
                expected="ascending finite strengths, evidence as JSON, plain tensors, and kinds "
                "of controls by name",
            ) from error  # fmt: skip
        object.__setattr__(self, "strengths", strengths)
        object.__setattr__(self, "evidence", evidence)


@dataclass(frozen=True, slots=True)
class Recorded:
    """What is recorded of a method's fit, as far as it can be checked without a model.

    Attributes:
        plan: of the source.
        edit: of this method alone.
        strength, evidence: as recorded.
        tensors: of the edit's file, that the method has kept; by the names of ``Proposal.tensors``.
        weight: W (O, I) float32 as the method found it, to the rounding of its dtype; None if no
            weights are at hand, as with an adapter without its source.
    """

    plan: Plan
    edit: Edit
    strength: float
    evidence: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    weight: Callable[[Weight], Tensor] | None


def _kept(proposal: Proposal) -> tuple[tuple[float, ...], dict[str, Any]]:
    """Strengths and evidence as they are kept. Raises errors of many kinds if they cannot be."""
    strengths = tuple(map(_number, proposal.strengths))
    if not strengths or any(a >= b for a, b in pairwise(strengths)):
        raise ValueError(f"strengths {list(strengths)}")
    evidence = strict_json.plain(dict(proposal.evidence))
    if "candidates" in evidence:
        msgspec.convert(evidence, SubspaceEvidence)
    kinds = proposal.control_kinds
    if not isinstance(kinds, tuple) or not kinds or not all(type(kind) is str for kind in kinds):
        raise ValueError(f"kinds of controls {str(kinds)[:80]}")
    for name, tensor in proposal.tensors.items():
        if not (name.isprintable() and is_dense(tensor)):
            raise ValueError(f"tensor {name}")
    return strengths, evidence


def _number(value: Any) -> float:
    """A finite number of a built-in type, 64 bits long. Raises TypeError or ValueError."""
    if hasattr(value, "item"):  # of NumPy or PyTorch
        value = value.item()
    is_long = type(value) is int and abs(value) >= 1 << 63
    if type(value) not in (int, float) or is_long or not isfinite(value):
        raise ValueError(f"{str(value)[:80]!r} in place of a number")
    return value  # type: ignore[no-any-return]


class Method(Protocol):
    """A method with its options set: a frozen dataclass whose fields are the options.

    An option is ``Layers``, ``Factors``, ``int``, ``float``, ``bool``, ``str`` or a ``Literal``;
    None, where it may be that, is typed as ``auto``. The ``metadata`` of its field may have
    ``min``, the smallest number, ``above``, which every number must be larger than, ``max``, the
    largest number or ``hidden_size`` or ``num_hidden_layers`` for that of the model, to which a
    default is cut down, or ``names``, a function that returns the texts to choose from; with
    ``unsaid`` the option is left out of manifests where it is empty, and ``search`` says what
    ``gloss search`` does with it; see ``evaluation.search_space``. An option that neither the field
    nor ``defaults`` gives a value has to be typed.

    One for defence may have a method ``learns(known: Instances)``, which gives the instances that a
    fit will have seen, or raises OptionError: options are then refused before a model is loaded.

    Attributes:
        title: for people.
        paper: URL of its description.
        strength: what its strengths are called, such as ``rank``: the name of the option that sets
            one.
        aim: an ``Aim``, which may be left out: ``toxicity``.
        trains: whether it trains calibration models, for which the model must be in memory as a
            whole; may be left out: False.
        implied: a function of a ``Recorded``, which may be left out: name -> what the recorded edit
            makes of the strength and of a part of the evidence, which ``gloss verify`` compares.
            It may raise FitError, saying what of the record contradicts the edit.
    """

    title: ClassVar[str]
    paper: ClassVar[str]
    strength: ClassVar[str]

    @classmethod
    def defaults(cls, dimensions: Dimensions) -> dict[str, Any]:
        """Values of the options that depend on the model; those that are typed come first."""

    def footprint(self, plan: Plan) -> Footprint:
        """What will change, from the headers alone.

        Raises:
            OptionError: the model lacks a tensor, a role or a route that the method needs.
        """

    def fit(self, bench: Workbench) -> Proposal:
        """Fit to what the bench gives; nothing is written. Raises FitError."""


def aim_of(method: Method) -> Aim:
    """What the edits of a method are for. Raises FitError if it says something else."""
    aim: Aim = getattr(method, "aim", "toxicity")
    if aim not in get_args(Aim):
        raise FitError(
            f"the aim of {method.title}", hint=FAULT,
            expected=" or ".join(get_args(Aim)), found=str(aim),
        )  # fmt: skip
    return aim


def learnt_by(method: Method, known: Instances) -> tuple[Instance, ...]:
    """The instances that a fit of a method for defence will have seen; none if it does not say.

    Raises OptionError if its options ask for some that there are not.
    """
    learns = getattr(method, "learns", None)
    return tuple(learns(known)) if learns else ()


def footprint_of(method: Method, plan: Plan) -> Footprint:
    """What a method says that it will change. Raises as ``Method.footprint``, and FitError."""
    return _returned(method.footprint(plan), Footprint, method)


def proposal_of(method: Method, bench: Workbench) -> Proposal:
    """What the fit of a method gives, whose edits are looked at before they are used.

    Raises:
        FitError: as the method does, or it gives something else.
    """
    return _checked(_returned(method.fit(bench), Proposal, method), method, bench)


def _checked(proposal: Proposal, method: Method, bench: Workbench) -> Proposal:
    """See ``proposal_of``."""
    others, fewer = proposal.with_factors, proposal.with_layers

    def checked(edit: Any) -> Edit:
        found = _returned(edit, Edit, method)
        found.check(bench.plan)
        return found

    def energy(strength: float) -> float | None:
        found = proposal.neutral_energy(strength)
        try:
            return None if found is None else _number(found)
        except (TypeError, ValueError) as error:
            raise FitError("the neutral energy of an edit", found=str(error), hint=FAULT) from error

    return dataclasses.replace(
        proposal,
        edit=lambda strength: checked(proposal.edit(strength)),
        control=lambda strength, seed: checked(proposal.control(strength, seed)),
        neutral_energy=energy,
        with_factors=others and (lambda factors: _checked(others(factors), method, bench)),
        with_layers=fewer and (lambda layers: _checked(fewer(layers), method, bench)),
    )


_Part = TypeVar("_Part", Edit, Footprint, Proposal)


def _returned(value: Any, kind: type[_Part], method: Method) -> _Part:
    if isinstance(value, kind):
        return value
    raise FitError(
        f"{method.title} gives something else", hint=FAULT,
        expected=kind.__name__, found=type(value).__name__,
    )  # fmt: skip
