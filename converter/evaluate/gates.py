"""Gates of a release job: limits on what was measured, without which no checkpoint comes to be.

The guard refuses what no one should publish. A gate is what one job asks for beyond that; ``force``
does not open it. What is known before the edit is written is judged before it, the rest before the
folder takes its place.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from converter.errors import GateError, OptionError
from converter.evaluate.names import EDITED
from converter.option import Option, Options, declared_options

if TYPE_CHECKING:
    from converter.edits.base import EditRecord
    from converter.evaluate.guard import Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Gates(Options):
    """Limits that a result has to keep, beyond those of the guard.

    None where there is none. Toxic words are judged by each teacher-forced measurement that there
    is: the guard's, and that of the evaluation.
    """

    # fmt: off
    min_toxicity_drop: Annotated[float | None, Option(
        "Gate: smallest share of their probability that toxic words must lose.",
        example="0.3", metavar="FRACTION", least=0, most=1,
    )] = None
    max_leakage: Annotated[float | None, Option(
        "Gate: largest leakage of an edited tensor, the share of what it had along the subspace "
        "that rounding leaves there.",
        example="0.001", metavar="SHARE", least=0,
    )] = None
    max_evaluated_perplexity_ratio: Annotated[float | None, Option(
        "Gate: largest perplexity on the --text of --evaluate, after over before.",
        example="1.05", metavar="RATIO", least=0,
    )] = None
    # fmt: on

    @property
    def limits(self) -> dict[str, float]:
        """The gates there are, by the names that their records have."""
        given = {gate.flag: getattr(self, gate.name) for gate in declared_options(Gates).values()}
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
        self, verdict: "Verdict | None", results: Mapping[str, Any] | None
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

    def check_edits(self, edits: "Iterable[EditRecord]") -> list[dict[str, Any]]:
        """The same for what was written."""
        if self.max_leakage is None:
            return []
        worst = max(edits, key=lambda record: record.leakage)
        return _passed([_record(LEAKAGE, f"tensor {worst.name}", self.max_leakage, worst.leakage)])


DROP, LEAKAGE, RATIO = (gate.flag for gate in declared_options(Gates).values())
"""Names of the gates in their records."""


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
