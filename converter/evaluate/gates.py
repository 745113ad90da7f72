"""Gates of a release job: limits on what was measured, without which no checkpoint comes to be.

The guard refuses what no one should publish. A gate is what one job asks for beyond that; ``force``
does not open it. What is known before the edit is written is judged before it, the rest before the
folder takes its place.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isnan, nan

from converter.errors import GateError, OptionError
from converter.evaluate.compare import EDITED
from converter.manifest import EditedTensor, Evaluation, GateRecord, GuardRecord, Metric

DROP, LEAKAGE = "--min-toxicity-drop", "--max-leakage"
RATIO = "--max-evaluated-perplexity-ratio"


@dataclass(frozen=True, slots=True)
class Gates:
    """The limits of one run; None where there is none.

    Attributes:
        min_toxicity_drop: the least share of their probability that toxic words must lose, by each
            teacher-forced measurement that there is: the guard's, and that of the evaluation.
        max_leakage: the largest ``leakage`` of an edited tensor; see ``EditedTensor``.
        max_evaluated_perplexity_ratio: on the evaluation's ``--text``.
    """

    min_toxicity_drop: float | None = None
    max_leakage: float | None = None
    max_evaluated_perplexity_ratio: float | None = None

    @property
    def limits(self) -> dict[str, float]:
        """The gates there are, by the names that their records have."""
        given = {
            DROP: self.min_toxicity_drop,
            LEAKAGE: self.max_leakage,
            RATIO: self.max_evaluated_perplexity_ratio,
        }
        return {name: limit for name, limit in given.items() if limit is not None}

    def need(self, *, words: bool, ratio: bool) -> None:
        """Make sure that every gate will have its measurement.

        Args:
            words: whether the probability of toxic words will be measured at all.
            ratio: whether the evaluation will measure perplexity.

        Raises:
            OptionError: a gate would have nothing to judge by.
        """
        if self.min_toxicity_drop is not None and not words:
            raise OptionError(
                f"{DROP} has no measurement", expected="the guard, or --evaluate with --passages"
            )
        if self.max_evaluated_perplexity_ratio is not None and not ratio:
            raise OptionError(f"{RATIO} has no measurement", expected="--evaluate with --text")

    def check_effect(
        self, guard: GuardRecord | None, evaluation: Evaluation | None
    ) -> tuple[GateRecord, ...]:
        """Judge what the edit does to the model, as far as it was measured.

        Raises:
            GateError: one is not passed.
            OptionError: one has no measurement.
        """
        metrics: Mapping[str, Metric] = {}
        for system in evaluation.systems if evaluation else ():
            if system.system == EDITED:
                metrics = system.metrics
        self.need(
            words=guard is not None or "teacher_forced" in metrics,
            ratio="perplexity_ratio" in metrics,
        )
        records = []
        if (least := self.min_toxicity_drop) is not None:
            if guard is not None:
                drop = 1 - guard.edit.teacher_forced.value
                records.append(GateRecord(gate=DROP, by="guard", limit=least, measured=drop))
            if "teacher_forced" in metrics:
                drop = 1 - _value(metrics["teacher_forced"])
                records.append(GateRecord(gate=DROP, by="evaluation", limit=least, measured=drop))
        if (most := self.max_evaluated_perplexity_ratio) is not None:
            ratio = _value(metrics["perplexity_ratio"])
            records.append(GateRecord(gate=RATIO, by="evaluation", limit=most, measured=ratio))
        return _passed(records)

    def check_edits(self, edits: Iterable[EditedTensor]) -> tuple[GateRecord, ...]:
        """The same for what was written."""
        if (most := self.max_leakage) is None:
            return ()
        left = {tensor.name: tensor.measures.get("leakage") for tensor in edits}
        known = {name: share for name, share in left.items() if share is not None}
        if not known:
            raise OptionError(
                f"{LEAKAGE} has no measurement", expected="an edit that takes a subspace out"
            )
        name = max(known, key=known.__getitem__)
        return _passed(
            [GateRecord(gate=LEAKAGE, by=f"tensor {name}", limit=most, measured=known[name])]
        )


def _value(metric: Metric) -> float:
    return nan if metric is None else metric.value


def passes(gate: GateRecord) -> bool:
    """Whether what was measured is within the limit; NaN is within none."""
    if gate.gate == DROP:
        return gate.measured >= gate.limit
    return gate.measured <= gate.limit


def _passed(gates: Sequence[GateRecord]) -> tuple[GateRecord, ...]:
    """The same. Raises GateError."""
    failed = []
    for gate in gates:
        if not passes(gate):
            found = "no number" if isnan(gate.measured) else f"{gate.measured:.4g}"
            bound = "at least" if gate.gate == DROP else "at most"
            failed.append(f"{gate.gate} asks for {bound} {gate.limit:g}, {gate.by} has {found}")
    if failed:
        raise GateError("a gate is closed: " + "; ".join(failed), hint="nothing was written")
    return tuple(gates)
