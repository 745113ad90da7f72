"""Gates of a release job: limits on the measurements. A checkpoint is written only if all hold.

The guard refuses edits that should never be published. A gate is an additional limit of one job;
``force`` does not override it. A gate is judged before the edit is written if its measurement is
known by then, else before the folder takes its place.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isnan, nan
from typing import Annotated

from converter.errors import GateError, OptionError
from converter.manifest import (
    EDITED,
    DefenceRecord,
    EditedTensor,
    Estimate,
    Evaluation,
    GateRecord,
    GuardRecord,
    Metric,
)
from converter.option import Option, Options, declared_options


@dataclass(frozen=True, slots=True, kw_only=True)
class Gates(Options):
    """Limits on a result beyond those of the guard.

    None means no limit. Toxic words, and the other words of their texts, are judged by every
    teacher-forced measurement: the guard's headline (or without one, its held-out pairs), and the
    evaluation. Refusals are judged by the guard's measurements.
    """

    # fmt: off
    min_toxicity_drop: Annotated[float | None, Option(
        "Gate: smallest share of their probability that toxic words must lose.",
        example="0.3", metavar="FRACTION", least=0, most=1,
    )] = None
    max_leakage: Annotated[float | None, Option(
        "Gate: largest leakage of an edited tensor: the share of its part along the subspace that "
        "rounding leaves.",
        example="0.001", metavar="SHARE", least=0,
    )] = None
    max_evaluated_perplexity_ratio: Annotated[float | None, Option(
        "Gate: largest perplexity on the --text of --evaluate, after over before.",
        example="1.05", metavar="RATIO", least=0,
    )] = None
    max_informal_perplexity_ratio: Annotated[float | None, Option(
        "Gate: largest perplexity of the other words of toxic text, after over before.",
        example="1.15", metavar="RATIO", least=0,
    )] = None
    min_defence: Annotated[float | None, Option(
        "Gate: smallest rise of log p of refusals of unseen harmful requests, in nats (natural-log "
        "units) a token.",
        example="0.3", metavar="NATS", least=0,
    )] = None
    max_over_refusal: Annotated[float | None, Option(
        "Gate: largest rise of log p of refusals of harmless questions, as a share of that of "
        "harmful requests.",
        example="0.5", metavar="SHARE", least=0,
    )] = None
    # fmt: on

    @property
    def limits(self) -> dict[str, float]:
        """All gates, by the names in their records."""
        given = {gate.flag: getattr(self, gate.name) for gate in declared_options(Gates).values()}
        return {name: limit for name, limit in given.items() if limit is not None}

    def require_measurements(self, *, words: bool, ratio: bool) -> None:
        """Check that every gate will have its measurement.

        Args:
            words: whether the probability of toxic words, and that of the others beside them, will
                be measured at all.
            ratio: whether the evaluation will measure perplexity.

        Raises:
            OptionError: a gate would have nothing to judge by.
        """
        for gate in (DROP, INFORMAL):
            if gate in self.limits and not words:
                judges = "the guard, or --evaluate with --passages"
                raise OptionError(f"{gate} has no measurement", expected=judges)
        if self.max_evaluated_perplexity_ratio is not None and not ratio:
            raise OptionError(f"{RATIO} has no measurement", expected="--evaluate with --text")

    def require_subspace(self, kinds: Iterable[str]) -> None:
        """Check that an edit of these kinds has a leakage. Raises OptionError."""
        if self.max_leakage is not None and _REMOVALS.isdisjoint(kinds):
            raise OptionError(
                f"{LEAKAGE} has no measurement", expected="a method that takes a subspace out"
            )

    def require_defence(self, *, measured: bool) -> None:
        """Check that refusals will be measured, if a gate needs it. Raises OptionError."""
        for name, limit in ((DEFENCE, self.min_defence), (OVER_REFUSAL, self.max_over_refusal)):
            if limit is not None and not measured:
                raise OptionError(
                    f"{name} has no measurement",
                    expected="the guard, and a method that is for defence",
                )

    def check_effect(
        self, guard: GuardRecord | None, evaluation: Evaluation | None
    ) -> tuple[GateRecord, ...]:
        """Judge the measured effect of the edit on the model.

        Raises:
            GateError: one is not passed.
            OptionError: one has no measurement.
        """
        metrics: Mapping[str, Metric] = {}
        for system in evaluation.systems if evaluation else ():
            if system.system == EDITED:
                metrics = system.metrics
        self.require_measurements(
            words=guard is not None or "teacher_forced" in metrics,
            ratio="perplexity_ratio" in metrics,
        )
        records = []
        if (least := self.min_toxicity_drop) is not None:
            if guard is not None:
                drop = 1 - guard.words.teacher_forced.value
                records.append(GateRecord(gate=DROP, by="guard", limit=least, measured=drop))
            if "teacher_forced" in metrics:
                drop = 1 - _value(metrics["teacher_forced"])
                records.append(GateRecord(gate=DROP, by="evaluation", limit=least, measured=drop))
        if (most := self.max_informal_perplexity_ratio) is not None:
            beside: dict[str, Estimate | Metric] = {}
            if guard is not None:
                beside["guard"] = guard.words.context_ratio
            if "teacher_forced" in metrics:
                beside["evaluation"] = metrics.get("context_ratio")
            for by, found in beside.items():
                ratio = nan if found is None else found.value
                records.append(GateRecord(gate=INFORMAL, by=by, limit=most, measured=ratio))
        if (most := self.max_evaluated_perplexity_ratio) is not None:
            ratio = _value(metrics["perplexity_ratio"])
            records.append(GateRecord(gate=RATIO, by="evaluation", limit=most, measured=ratio))
        return _passed([*records, *self._refusals(guard)])

    def _refusals(self, guard: GuardRecord | None) -> Iterator[GateRecord]:
        """The gates of refusals, with the guard's measurements. Raises OptionError."""
        defence = guard.defence if guard else None
        self.require_defence(measured=defence is not None)
        for name, limit in ((DEFENCE, self.min_defence), (OVER_REFUSAL, self.max_over_refusal)):
            if limit is not None and defence is not None:
                found = refusals_of(defence, name)
                yield GateRecord(gate=name, by="guard", limit=limit, measured=found)

    def check_edits(self, edits: Iterable[EditedTensor]) -> tuple[GateRecord, ...]:
        """The same for the written tensors."""
        if (most := self.max_leakage) is None:
            return ()
        left = {tensor.name: tensor.measures.get("leakage") for tensor in edits}
        known = {name: share for name, share in left.items() if share is not None}
        name = max(known, key=known.__getitem__)
        return _passed(
            [GateRecord(gate=LEAKAGE, by=f"tensor {name}", limit=most, measured=known[name])]
        )


DROP, LEAKAGE, RATIO, INFORMAL, DEFENCE, OVER_REFUSAL = (
    gate.flag for gate in declared_options(Gates).values()
)
"""Names of the gates in their records."""

_REMOVALS = {"remove-subspace", "weaken-subspace", "remove-oblique"}
"""Kinds of edits that have a leakage."""

_AT_LEAST = (DROP, DEFENCE)
"""Gates whose limit is the smallest."""


def refusals_of(defence: DefenceRecord, gate: str) -> float:
    """The measurement of one of the gates of refusals."""
    found = defence.edit
    return found.harmful.value if gate == DEFENCE else found.over_refusal


def _value(metric: Metric) -> float:
    return nan if metric is None else metric.value


def passes(gate: GateRecord) -> bool:
    """Whether a measurement is within the limit; NaN is within none."""
    if gate.gate in _AT_LEAST:
        return gate.measured >= gate.limit
    return gate.measured <= gate.limit


def _passed(gates: Sequence[GateRecord]) -> tuple[GateRecord, ...]:
    """The same. Raises GateError."""
    failed = []
    for gate in gates:
        if not passes(gate):
            found = "no number" if isnan(gate.measured) else f"{gate.measured:.4g}"
            bound = "at least" if gate.gate in _AT_LEAST else "at most"
            failed.append(f"{gate.gate} asks for {bound} {gate.limit:g}, {gate.by} has {found}")
    if failed:
        raise GateError("release gate failed: " + "; ".join(failed), hint="nothing was written")
    return tuple(gates)
