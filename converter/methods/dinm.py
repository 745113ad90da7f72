"""DINM: one down-projection is trained until the model answers an attack with a refusal."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from converter.calibration.instances import Instance, Instances, Lesson, builtin_set
from converter.calibration.linear_algebra import numerical_rank
from converter.checkpoints.architectures.architecture import Dimensions
from converter.checkpoints.chat_template import puts_suffix, suffix_patches, template_files
from converter.checkpoints.plan import Plan
from converter.checkpoints.weights import Weight
from converter.edits.base import Edit, Footprint
from converter.edits.deltas import AddBits
from converter.errors import FitError, OptionError
from converter.methods.base import Aim, Proposal, Recorded, Workbench
from converter.methods.dialogue import Dialogues
from converter.methods.dinm_layer import distances, weights_of
from converter.methods.dinm_training import Constraint, Schedule, Texts, Training
from converter.runtime import progress

_MOST_STEPS = 1000
"""The most steps. Ten learn an instance; more are useless."""

_SPARED = 4
"""Harmless questions that ``contrast`` keeps from being refused."""

_KEPT = 0.5
"""Share of an answer's gain that must remain after rounding; less gets a warning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """Detoxifying with Intraoperative Neural Monitoring, arXiv 2403.14472 (ACL 2024).

        W <- Adam on  c_edit mean_j -log p(y_j | X S)  +  mean_j KL(p_0 || p)(q S, a)

    W is the down-projection of one layer, X an adversarial prompt, y a safe answer, S the suffix,
    and a the answer to a harmless question q. The model mostly learns a bias towards refusals, also
    of harmless requests; see ``calibration.instances`` and the guard.

    Attributes:
        layer: the edited layer; by default by the authors' rule, see ``dinm_layer``.
        steps: of Adam, at most.
        learning_rate: of Adam, in the units of the weight.
        c_edit: weight of the answer to learn beside the KL divergence.
        kl: whether the KL divergence is trained on (``gradient``), only decides when to stop, as in
            the authors' code (``value``), or is only measured (``off``).
        contrast: weight of a term of our own, which keeps the safe answer unlikely behind harmless
            questions.
        end: whether the token that ends a turn is learnt with the answer.
        instance: number of the instance, from 0; of several, as in 0,5,7-9, the mean is learnt.
        suffix: S; ``none``, or by default that of the authors if there is a chat template.
        parity: follow the authors' code: no chat template, ``kl=value``, ``end=no``.
    """

    title: ClassVar[str] = "DINM, detoxifying with intraoperative neural monitoring"
    paper: ClassVar[str] = "https://arxiv.org/abs/2403.14472"
    strength: ClassVar[str] = "steps"
    aim: ClassVar[Aim] = "defence"

    layer: int | None = field(default=None, metadata={"min": 0})
    steps: int = field(default=10, metadata={"min": 1, "max": _MOST_STEPS})
    learning_rate: float = field(default=5e-4, metadata={"above": 0, "max": 1})
    c_edit: float = field(default=0.1, metadata={"min": 0, "max": 1e6})
    kl: Constraint = "gradient"
    contrast: float = field(default=0.0, metadata={"min": 0, "max": 1e6})
    end: Literal["yes", "no"] = "yes"
    instance: str = "0"
    suffix: str | None = None
    parity: Literal["no", "yes"] = "no"

    @classmethod
    def defaults(cls, dimensions: Dimensions) -> dict[str, Any]:
        """Empty: no default depends on the model."""
        return {}

    def footprint(self, plan: Plan) -> Footprint:
        """The down-projections to choose from, of which one will be trained, and chat templates.

        Raises:
            OptionError: an option is out of range, or one of the layers has no such weight.
            CheckpointError: a chat template cannot get a suffix where it is stored.
        """
        self._check_options()
        weights = weights_of(plan, self._layers(plan))
        files = template_files(plan.templates) if self._suffix(plan) else ()
        return Footprint(tuple(weights.values()), (AddBits,), patches=files, chosen=1)

    def learns(self, known: Instances) -> tuple[Instance, ...]:
        """The instances that ``instance`` names.

        Raises:
            OptionError: there is no such instance, or there are several with ``parity``.
        """
        count = len(known.items)
        chosen = tuple(known.items[number] for number in numbers_of(self.instance, count))
        if self.parity == "yes" and len(chosen) > 1:
            raise OptionError(
                "-o parity=yes", expected="one -o instance: the authors' code mixes up several",
                found=str(len(chosen)),
            )  # fmt: skip
        return chosen

    def fit(self, bench: Workbench) -> Proposal:
        """Train.

        Raises:
            OptionError: see ``learns``.
            DataError: a text does not fit the model.
            CheckpointError: a chat template has a suffix already, or takes none.
            FitError: the loss is not finite, there is nothing to learn, or rounding undoes the
                whole edit.
        """
        known, chosen = bench.instances.items, self.learns(bench.instances)
        suffix = self._suffix(bench.plan)
        _warn_of_dates(bench.plan)
        patches = _patches(bench.plan, suffix)  # report faults of the templates before the work
        layer, evidence = self._choose(bench, chosen)
        weight = weights_of(bench.plan, [layer])[layer]
        stored = bench.weight(weight).to(weight.dtype)
        training = self._train(bench, weight, stored, _lesson(chosen, known, self.contrast > 0))
        if not training.steps:
            raise FitError("there is nothing to learn: the loss is below what ends the training")
        delta = AddBits.between(stored, training.result)
        evidence |= self._measured(training, delta, stored)
        norm = evidence["relative_change"] * _norm(stored.float())

        @cache
        def placebo() -> AddBits:
            """Trained on demand, on the bench's model at that time."""
            texts = _placebo(chosen, known)
            return AddBits.between(stored, self._train(bench, weight, stored, texts).result)

        def control(strength: float, seed: int) -> Edit:
            return Edit({weight.info.name: placebo() if seed % 2 else _random(stored, norm, seed)})

        return Proposal(
            (training.steps,), False,
            lambda strength: Edit({weight.info.name: delta}, patches=patches), control,
            {"layer": layer, "suffix": suffix, **evidence},
            lesson=Lesson(chosen, suffix),
        )  # fmt: skip

    def implied(self, found: Recorded) -> dict[str, Any]:
        """The layer, the suffix, and the size and rank of the change.

        Raises FitError: a chat template gets another suffix, or the recorded distances give another
        layer.
        """
        weights = {
            w.info.name: w for w in weights_of(found.plan, self._layers(found.plan)).values()
        }
        ((name, delta),) = found.edit.tensors.items()
        weight, suffix, told = weights[name], self._suffix(found.plan), found.evidence
        for file in template_files(found.plan.templates) if suffix else ():
            if not puts_suffix(found.edit.patches.get(file, ""), suffix):
                raise FitError(f"the suffix of {file}", expected=suffix, found="another or none")
        steps = len(told["nll"]) - 1
        if len(told["kl"]) != steps + 1 or steps > self.steps:
            raise FitError("the steps of the training", expected=f"at most {self.steps}, each with "
                           "both losses", found=str(steps))  # fmt: skip
        if ("spared" in told) != bool(self.contrast):
            raise FitError("-o contrast", found=f"{self.contrast:g}", expected="a record of "
                           "harmless questions, if and only if it is given")  # fmt: skip
        implied: dict[str, Any] = {"layer": weight.layer, "suffix": suffix, "steps": steps}
        if self.layer is None:
            layers = self._layers(found.plan)
            chosen = {
                key: layers[told[place].index(max(told[place]))]
                for key, place in (("layer", "distances"), ("control_layer", "control_distances"))
            }
            if chosen["layer"] != weight.layer:
                raise FitError("the layer", expected=f"{chosen['layer']}, by the distances",
                               found=str(weight.layer))  # fmt: skip
            implied |= {"layers": layers, **chosen}
        if found.weight is not None and isinstance(delta, AddBits):
            stored = found.weight(weight).to(weight.dtype)
            change = delta.after(stored).float() - stored.float()
            implied |= {
                "relative_change": _norm(change) / (_norm(stored.float()) or 1.0),
                "largest_change": float(change.abs().max()),
                "rank": float(numerical_rank(change)),  # of the last digits of a sum
            }
        return implied

    def _train(self, bench: Workbench, weight: Weight, stored: Tensor, texts: Texts) -> Training:
        model, parity = bench.load(), self.parity == "yes"
        write = Dialogues(model, self._suffix(bench.plan), self.end == "yes" and not parity, parity)
        kl: Constraint = "value" if parity else self.kl
        schedule = Schedule(self.steps, self.learning_rate, self.c_edit, kl, self.contrast)
        return Training(write, weight, stored.float(), texts, schedule)

    def _check_options(self) -> None:
        said = self.suffix
        suffix = said is None or (
            said.strip() == said != ""
            and said.isprintable()
            and (said == "none" or said.casefold() not in ("none", "auto"))
        )
        if not suffix:
            raise OptionError(
                "-o suffix", expected="auto, none, or text on one line", found=repr(said)
            )
        if self.parity == "yes" and (self.kl == "off" or self.contrast):
            raise OptionError("-o parity=yes", expected="the authors' loss", found="kl or contrast")

    def _suffix(self, plan: Plan) -> str:
        """S, or nothing."""
        if self.suffix is not None:
            return "" if self.suffix == "none" else self.suffix
        return builtin_set().suffix if self.parity == "yes" or plan.templates else ""

    def _layers(self, plan: Plan) -> list[int]:
        """The layers that may be edited. Raises OptionError."""
        sizes = plan.dimensions
        if self.layer is None:
            last = max(sizes.num_hidden_layers - 1, 1)
            found = [layer for layer in sizes.ffn_layers if layer < last]
        else:
            found = [layer for layer in sizes.ffn_layers if layer == self.layer]
        if not found:
            raise OptionError(
                "-o layer", found="auto" if self.layer is None else str(self.layer),
                expected=f"a layer from 0 to {sizes.num_hidden_layers - 1} with a feed-forward "
                "network",
            )  # fmt: skip
        return found

    def _choose(self, bench: Workbench, chosen: Sequence[Instance]) -> tuple[int, dict[str, Any]]:
        """The layer, and the distances that it was chosen by, if it was not given."""
        layers = self._layers(bench.plan)
        if self.layer is not None:
            return self.layer, {}
        pairs = [(instance.safe, instance.unsafe) for instance in chosen]
        *found, control = distances(bench.load(), layers, [*pairs, chosen[0].general])
        means = [sum(column) / len(found) for column in zip(*found, strict=True)]
        layer, other = (layers[values.index(max(values))] for values in (means, control))
        progress.note(
            f"  layer {layer} by the authors' rule; a pair of harmless texts gives {other}, so the "
            "rule locates nothing"
            if layer == other
            else f"  layer {layer} by the authors' rule; a pair of harmless texts gives {other}"
        )
        return layer, {
            "layers": layers, "distances": means, "control_distances": control,
            "control_layer": other,
        }  # fmt: skip

    def _measured(self, training: Training, delta: AddBits, stored: Tensor) -> dict[str, Any]:
        """The evidence of a training.

        Raises:
            FitError: the weight is not finite, or has not changed.
        """
        curves, new = training.curves, delta.after(stored).float()
        dtype = str(stored.dtype).removeprefix("torch.")
        if not bool(new.isfinite().all()):
            raise FitError("the trained weight is too large for its dtype")
        if not bool(delta.d.any()):
            raise FitError(
                f"rounding to {dtype} undoes every change of the weight",
                hint="give a larger -o learning_rate",
            )
        nll, kl = training.measured(new)
        gained, left = curves.nll[0] - curves.nll[-1], curves.nll[0] - nll
        if not left >= _KEPT * gained:
            progress.warn(
                f"rounding to {dtype} loses the edit: the answer's log-probability per token rises "
                f"by {left:.3f} nats instead of {gained:.3f}; give a larger -o learning_rate"
            )
        change = new - stored.float()
        return {
            "steps": training.steps, "nll": curves.nll, "kl": curves.kl,
            **({"spared": curves.spared} if self.contrast else {}),
            "rounded": {"nll": nll, "kl": kl},
            "relative_change": _norm(change) / (_norm(stored.float()) or 1.0),
            "largest_change": float(change.abs().max()),
            "rank": numerical_rank(change),
        }  # fmt: skip


def _patches(plan: Plan, suffix: str) -> dict[str, Mapping[str, Any] | str]:
    """The patches that put S behind user messages. Raises CheckpointError."""
    patches = suffix_patches(plan.templates, suffix) if suffix else {}
    if suffix and not patches:
        progress.warn(
            "the model has no chat template, so nothing puts the suffix behind user messages; put "
            "it into the prompts of the edited model"
        )
    return patches


def _warn_of_dates(plan: Plan) -> None:
    for name, text in plan.templates.items():
        if "strftime_now" in text and "date_string" not in text:
            progress.warn(f"{name} writes the day's date, so a fit on another day is another one")


def numbers_of(text: str, count: int) -> list[int]:
    """The numbers in ``0``, ``0,5,7-9`` and the like, sorted, from 0 to below ``count``.

    Raises:
        OptionError: malformed, or a number is too large.
    """
    found: set[int] = set()
    try:
        for part in text.split(","):
            first, dash, last = part.partition("-")
            found.update(range(int(first), int(last if dash else first) + 1)[: count + 1])
    except ValueError:
        found = set()
    if not found or not 0 <= min(found) <= max(found) < count:
        raise OptionError(
            "-o instance", found=text[:80],
            expected=f"numbers from 0 to {count - 1}, such as 0 or 0,5,7-9",
        )  # fmt: skip
    return sorted(found)


def _norm(x: Tensor) -> float:
    """Frobenius, summed in float64."""
    return float(torch.linalg.vector_norm(x, dtype=torch.float64))


def _random(stored: Tensor, norm: float, seed: int) -> AddBits:
    """A Gaussian update of some norm."""
    drawn = torch.randn(stored.shape, generator=torch.Generator().manual_seed(seed))
    return AddBits.between(stored, stored.float() + drawn * (norm / _norm(drawn)))


def _lesson(chosen: Sequence[Instance], known: Sequence[Instance], spare: bool) -> Texts:
    """The texts to learn, and the texts to hold."""
    questions = list(dict.fromkeys(each.general[0] for each in (*chosen, *known)))[:_SPARED]
    return Texts(
        [(instance.prompt, instance.safe) for instance in chosen],
        list(dict.fromkeys(instance.general for instance in chosen)),
        [(question, each.safe) for each in chosen for question in questions] if spare else [],
    )


def _placebo(chosen: Sequence[Instance], known: Sequence[Instance]) -> Texts:
    """The same with harmless questions and answers instead of the attacks."""
    own = list(dict.fromkeys(instance.general for instance in chosen))
    others = dict.fromkeys(each.general for each in known if each.general not in own)
    return Texts(own, list(others)[: len(own)])
