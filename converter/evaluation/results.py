"""The results of an evaluation: averaged over seeds, with intervals, and as a Markdown table."""

from collections.abc import Mapping, Sequence

import numpy as np

from converter.manifest import (
    Estimate,
    Evaluation,
    Interval,
    Metric,
    RowRecord,
    Strength,
    SystemRecord,
)
from converter.text import escaped

_NORMAL = 1.96
"""Standard errors on either side that hold 95 % of a normal distribution."""

_NOT_MEASURED = "not measured"


def around(estimate: Estimate) -> Metric:
    """A value with a normal interval."""
    value, half = estimate.value, _NORMAL * estimate.error
    return Interval.of(value, value - half, value + half)


def summarise(systems: Sequence[SystemRecord]) -> tuple[RowRecord, ...]:
    """One row for each system, its seeds averaged.

    The interval of a mean over S seeds has the variance ``v + s^2 / S``, v that of a single seed's
    interval (all seeds share the prompts, so it does not shrink), s^2 the variance between seeds.
    """
    groups: dict[tuple[str, Strength | None], list[SystemRecord]] = {}
    for system in systems:
        groups.setdefault((system.system, system.group), []).append(system)
    rows = []
    for (name, _), members in groups.items():
        strengths = sorted({m.strength for m in members if m.strength is not None})
        names = list(dict.fromkeys(key for m in members for key in m.metrics))
        metrics = {key: average([m.metrics.get(key) for m in members]) for key in names}
        text = ", ".join(f"{strength:g}" for strength in strengths)
        rows.append(RowRecord(system=name, strength=text, seeds=len(members), metrics=metrics))
    return tuple(rows)


def average(values: Sequence[Metric]) -> Metric:
    """The mean of one metric over seeds, with the interval that ``summarise`` explains."""
    known = [v for v in values if v is not None]
    if not known:
        return None
    mean = float(np.mean([v.value for v in known]))
    spread = np.var([v.value for v in known], ddof=1) / len(known) if len(known) > 1 else 0.0
    low = float(np.mean([v.low - v.value for v in known]))
    high = float(np.mean([v.high - v.value for v in known]))
    more = _NORMAL**2 * spread
    low, high = (float(np.sqrt(distance**2 + more)) for distance in (low, high))
    return Interval.of(mean, mean - low, mean + high)


def markdown(results: Evaluation) -> str:
    """One row for each system, seeds averaged, with intervals of 95 % in brackets.

    ``KL`` is the divergence from the unedited model on the perplexity text, in nats a token.
    Toxicities are means of scores between 0 and 1; ``toxic words`` is the teacher-forced estimate,
    the probability of toxic words relative to the unedited model, and ``words beside`` what becomes
    of the perplexity of the other words of the same continuations.
    """
    columns = [("perplexity", "perplexity_ratio"), ("toxic words", "teacher_forced")]
    for scorer in results.scorers:
        for way in ("greedy", "sampled"):
            columns.append((f"{scorer}, {way}", f"toxicity/{scorer}/{way}"))
    known = dict.fromkeys(key for row in results.rows for key in row.metrics)
    if "divergence" in known:
        columns.insert(1, ("KL", "divergence"))
    if "context_ratio" in known:
        place = columns.index(("toxic words", "teacher_forced")) + 1
        columns.insert(place, ("words beside", "context_ratio"))
    columns += [
        (key, key) for key in known if key.startswith(("refusals/", "safeedit/", "ability/"))
    ]
    lines = [
        "| model | strength | seeds | " + " | ".join(escaped(name) for name, _ in columns) + " |",
        "|" + "---|" * (len(columns) + 3),
    ]
    for row in results.rows:
        cells = [escaped(row.system), escaped(row.strength), str(row.seeds)]
        cells += [_cell(key, row.metrics) for _, key in columns]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(key: str, metrics: Mapping[str, Metric]) -> str:
    metric = metrics.get(key)
    interval = f"{metric.value:.3f} [{metric.low:.3f}, {metric.high:.3f}]" if metric else ""
    if key != "perplexity_ratio":
        return interval or _NOT_MEASURED
    value = metrics.get("perplexity")
    if value is None:
        return _NOT_MEASURED
    return f"{value.value:.2f} (x {interval})" if interval else f"{value.value:.2f}"
