"""Methods: frozen dataclasses whose fields are their options, in modules beside this one.

A method states from the headers what it will change (``footprint``), then fits an edit to a model
(``fit``). It may use only its ``Workbench``: it never opens a file and does not know where the
model is. A new one is a line in ``known.METHODS``, or a package with an entry point; see
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
"""The purpose of an edit, and so of its examination: toxic words become less probable, or answers
to harmful requests become refusals.
"""


class Workbench(Protocol):
    """The parts of a model and its texts that a method may use."""

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
        """Layer -> (D,) float32: the gains of the norm after its FFN; empty without one."""

    def load(self) -> Model:
        """The unedited model with its tokenizer, in memory or streamed; nothing may change it."""

    def activations(self, request: Request) -> Activations:
        """The model's activations on the texts, from a forward pass or a cache."""

    def contrast(self, training: Training) -> Contrast:
        """Compare two calibration models, one trained on each side of the pairs.

        Raises OptionError or SourceError if the model is not in memory as a whole.
        """

    def calibrate(self, training: Training, names: Collection[str]) -> Mapping[str, Calibration]:
        """A calibration model of the neutral sides, given or trained, and of the toxic ones.

        Args:
            training: how; for a given model, only its depth counts.
            names: of the tensors to return from each.

        Raises OptionError or SourceError if the model is not in memory as a whole.
        """

    def weight(self, weight: Weight) -> Tensor:
        """W (O, I) float32, read from its shard, however it is stored; a bias is (O, 1)."""

    def decode(self, directions: Tensor, count: int) -> list[tuple[str, ...]]:
        """The ``count`` tokens nearest to each of the directions (C, D), the nearest first."""

    def single_token_share(self) -> float:
        """The share of the word list that are single tokens of the model."""

    def masked(self, token: str) -> str:
        """A token for the record, with stars if it is offensive and the run masks words."""


@dataclass(frozen=True, slots=True)
class Proposal:
    """The result of a fit: an edit for each strength, and controls to compare it with.

    Attributes:
        strengths: one or more, ascending, such as ranks or step sizes.
        is_free: whether to choose the most effective strength within the perplexity budget; if not,
            the last one is taken.
        edit: the edit of a strength; also of strengths between those listed, if that makes sense.
        control: an edit of a strength and a seed, of the same kind, tensors and size, that uses no
            knowledge of toxicity. The guard compares with it.
        evidence: a record of how the method found its edits, as JSON for the manifest.
        tensors: evidence as tensors, for the edit's file.
        neutral_energy: share of the squared norm of neutral activations that the edit of a strength
            removes, or None if that is not known.
        compared: name -> another edit of a strength, such as a part of this one alone, that the
            guard measures but does not judge by.
        with_factors: the same fit with other ``Factors``, controls included, without a pass over
            texts; used by a search. None if the method has no factors.
        with_layers: likewise, the same fit of some of its layers only, controls included. None if
            the method cannot leave layers out, or has factors.
        lesson: the instances that the fit has seen, with the aim ``defence``; else None. The guard
            does not measure on them.
        control_kinds: the kinds of the controls of seeds 0, 1 and so on, repeated in turn, in words
            that follow "under". With the aim ``toxicity``, the edit must beat each kind.

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
        """Normalise: strengths become plain numbers, and evidence is read back from its JSON."""
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
    """The record of a method's fit, as far as it can be checked without a model.

    Attributes:
        plan: of the source.
        edit: of this method alone.
        strength, evidence: as recorded.
        tensors: those that the method has kept in the edit's file, by the names of
            ``Proposal.tensors``.
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
    """Strengths and evidence in recorded form. Raises errors of many kinds if they have none."""
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
    None, if it is allowed, is typed as ``auto``. The ``metadata`` of its field may have ``min``,
    the smallest number; ``above``, a bound that every number must exceed; ``max``, the largest
    number, or ``hidden_size`` or ``num_hidden_layers`` of the model, to which a default is cut
    down; ``names``, a function that returns the texts to choose from; ``unsaid``, which leaves an
    empty option out of manifests; and ``search``, which says how ``gloss search`` varies it (see
    ``evaluation.search_space``). An option must be typed if neither the field nor ``defaults`` has
    a value.

    A method for defence may have a function ``learns(known: Instances)``, which returns the
    instances that a fit will see, or raises OptionError. Wrong options are then refused before a
    model is loaded.

    Attributes:
        title: for people.
        paper: URL of its description.
        strength: the name of its strength, such as ``rank``, and of the option that sets it.
        aim: an ``Aim``, which may be left out: ``toxicity``.
        trains: whether it trains calibration models, for which the whole model must be in memory;
            may be left out: False.
        implied: a function of a ``Recorded``, which may be left out. It returns name -> value of
            the strength and of parts of the evidence, as computed from the recorded edit; ``gloss
            verify`` compares them. It may raise FitError if the record contradicts the edit.
    """

    title: ClassVar[str]
    paper: ClassVar[str]
    strength: ClassVar[str]

    @classmethod
    def defaults(cls, dimensions: Dimensions) -> dict[str, Any]:
        """Defaults that depend on the model; typed values replace them."""

    def footprint(self, plan: Plan) -> Footprint:
        """State from the headers alone what will change.

        Raises:
            OptionError: the model lacks a tensor, a role or a route that the method needs.
        """

    def fit(self, bench: Workbench) -> Proposal:
        """Fit to the activations of the bench; nothing is written. Raises FitError."""


def aim_of(method: Method) -> Aim:
    """The aim of a method. Raises FitError if it is not an ``Aim``."""
    aim: Aim = getattr(method, "aim", "toxicity")
    if aim not in get_args(Aim):
        raise FitError(
            f"the aim of {method.title}", hint=FAULT,
            expected=" or ".join(get_args(Aim)), found=str(aim),
        )  # fmt: skip
    return aim


def learnt_by(method: Method, known: Instances) -> tuple[Instance, ...]:
    """The instances that a fit of a method for defence will see; none if it does not say.

    Raises OptionError if its options name an instance that does not exist.
    """
    learns = getattr(method, "learns", None)
    return tuple(learns(known)) if learns else ()


def footprint_of(method: Method, plan: Plan) -> Footprint:
    """The checked footprint of a method. Raises as ``Method.footprint``, and FitError."""
    return _returned(method.footprint(plan), Footprint, method)


def proposal_of(method: Method, bench: Workbench) -> Proposal:
    """The proposal of a method's fit, whose edits are checked before use.

    Raises:
        FitError: as the method does, or it returns something else.
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
