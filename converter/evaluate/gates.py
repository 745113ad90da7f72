"""Gates of a release job: limits on what was measured, without which no checkpoint comes to be.

The guard refuses what no one should publish. A gate is what one job asks for beyond that; ``force``
does not open it. What is known before the edit is written is judged before it, the rest before the
folder takes its place.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from converter.edits.base import EditRecord
from converter.errors import GateError, OptionError
from converter.evaluate.compare import EDITED
from converter.evaluate.guard import Verdict

DROP, LEAKAGE = "--min-toxicity-drop", "--max-leakage"
RATIO = "--max-evaluated-perplexity-ratio"


@dataclass(frozen=True, slots=True)
class Gates:
    """The limits of one run; None where there is none.

    Attributes:
        min_toxicity_drop: the least share of their probability that toxic words must lose, by each
            teacher-forced measurement that there is: the guard's, and that of the evaluation.
        max_leakage: the largest ``leakage`` of an edited tensor; see ``edit.EditRecord``.
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
        self, verdict: Verdict | None, results: Mapping[str, Any] | None
    ) -> list[dict[str, Any]]:
        """Judge what the edit does to the model.

        Args:
            verdict: the guard's.
            results: of the evaluation.

        Returns:
            a record of each gate for the manifest.

        Raises:
            GateError: one is not passed.
            OptionError: one has no measurement.
        """
        metrics: Mapping[str, Any] = {}
        for system in results["systems"] if results else ():
            if system["system"] == EDITED:
                metrics = system["metrics"]
        self.need(
            words=verdict is not None or "teacher_forced" in metrics,
            ratio="perplexity_ratio" in metrics,
        )
        records = []
        if (least := self.min_toxicity_drop) is not None:
            if verdict is not None:
                drop = 1 - verdict.edit.teacher_forced.value
                records.append(_record(DROP, "guard", least, drop))
            if "teacher_forced" in metrics:
                words = _value(metrics["teacher_forced"])
                drop_found = None if words is None else 1 - words
                records.append(_record(DROP, "evaluation", least, drop_found))
        if (most := self.max_evaluated_perplexity_ratio) is not None:
            ratio = _value(metrics["perplexity_ratio"])
            records.append(_record(RATIO, "evaluation", most, ratio))
        return _passed(records)

    def check_edits(self, edits: Iterable[EditRecord]) -> list[dict[str, Any]]:
        """The same for what was written."""
        if self.max_leakage is None:
            return []
        worst = max(edits, key=lambda record: record.leakage)
        return _passed([_record(LEAKAGE, f"tensor {worst.name}", self.max_leakage, worst.leakage)])


def _value(metric: Mapping[str, float] | None) -> float | None:
    return None if metric is None else metric["value"]


def _record(gate: str, by: str, limit: float, measured: float | None) -> dict[str, Any]:
    return {"gate": gate, "by": by, "limit": limit, "measured": measured}


def _passed(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same. Raises GateError; what is not a number passes no gate."""
    failed = []
    for record in records:
        limit, measured = record["limit"], record["measured"]
        at_least = record["gate"] == DROP
        if measured is not None and (measured >= limit if at_least else measured <= limit):
            continue
        found = "no number" if measured is None else f"{measured:.4g}"
        bound = "at least" if at_least else "at most"
        failed.append(f"{record['gate']} asks for {bound} {limit:g}, {record['by']} has {found}")
    if failed:
        raise GateError("a gate is closed: " + "; ".join(failed), hint="nothing was written")
    return records
