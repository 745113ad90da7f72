"""The tables of an evaluation, as Markdown: the measurements, and systems at equal cost.

A strength is a rank for one method and the length of a vector for another, so systems can only be
compared at equal cost. Each is measured at some strengths. Between these, and between the weakest
and the unedited model, the probability of toxic words is interpolated along the cost. A system that
was measured at one strength is left out: a line from no edit to one strength says little.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from converter.evaluation.results import average
from converter.manifest import UNEDITED, Evaluation, Interval, Metric, SystemRecord
from converter.text import escaped

_NOT_MEASURED = "not measured"

COSTS = {
    "perplexity_ratio": ("perplexity", (1.01, 1.02, 1.05)),
    "context_ratio": ("words beside", (1.05, 1.10, 1.20)),
}
"""Metric -> its name for people, and the ratios at which systems are compared."""


def markdown(results: Evaluation) -> str:
    """One row for each system, seeds averaged, with intervals of 95 % in brackets.

    ``KL`` is the divergence from the unedited model on the perplexity text, in nats a token.
    Toxicities are means of scores between 0 and 1, with the difference from the unedited model on
    the same prompts and its interval; ``toxic words`` is the teacher-forced estimate,
    the probability of toxic words relative to the unedited model, and ``words beside`` the
    perplexity of the other words of the same continuations, also relative.
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
    return "\n\n".join(filter(None, ["\n".join(lines), equal_cost_table(results.systems)]))


def _cell(key: str, metrics: Mapping[str, Metric]) -> str:
    metric = metrics.get(key)
    interval = f"{metric.value:.3f} [{metric.low:.3f}, {metric.high:.3f}]" if metric else ""
    change = metrics.get(key.replace("toxicity/", "toxicity_change/", 1))
    if metric and change and change is not metric:
        return f"{metric.value:.3f} ({change.value:+.3f} [{change.low:+.3f}, {change.high:+.3f}])"
    if key != "perplexity_ratio":
        return interval or _NOT_MEASURED
    value = metrics.get("perplexity")
    if value is None:
        return _NOT_MEASURED
    return f"{value.value:.2f} (x {interval})" if interval else f"{value.value:.2f}"


def at_cost(systems: Sequence[SystemRecord], metric: str, ratio: float) -> Metric:
    """The probability of toxic words of one system where ``metric`` has a ratio.

    Linear between the measured strengths of each seed, averaged over seeds; the ends of the
    interval are interpolated as the value is. None if no seed has been measured on either side:
    nothing is extrapolated.

    Args:
        systems: all measurements of it.
    """
    found: list[Metric] = []
    for seed in dict.fromkeys(system.seed for system in systems):
        points = [(1.0, 1.0, 1.0, 1.0)]
        for each in systems:
            cost, toxic = (each.metrics.get(key) for key in (metric, "teacher_forced"))
            if each.seed == seed and cost is not None and toxic is not None:
                points.append((cost.value, toxic.value, toxic.low, toxic.high))
        costs, *values = np.array(sorted(points)).T
        if costs[0] <= ratio <= costs[-1]:
            found.append(Interval.of(*(float(np.interp(ratio, costs, line)) for line in values)))
    return average(found)


def equal_cost_table(systems: Sequence[SystemRecord]) -> str:
    """A Markdown table, systems by row, costs by column; empty unless two systems have a value."""
    columns = [(metric, ratio) for metric, (_, ratios) in COSTS.items() for ratio in ratios]
    rows = {
        name: [at_cost(members, *column) for column in columns]
        for name, members in systems_of(systems).items()
        if len({member.seed for member in members}) < len(members)
    }
    rows = {name: cells for name, cells in rows.items() if any(cells)}
    if len(rows) < 2:
        return ""
    heads = [f"{COSTS[metric][0]} x {ratio:.2f}" for metric, ratio in columns]
    lines = [
        f"Toxic words at equal cost, interpolated between the strengths that were measured:\n\n"
        f"| model | {' | '.join(heads)} |", "|" + "---|" * (len(heads) + 1),
    ]  # fmt: skip
    for name, cells in rows.items():
        texts = (f"{m.value:.3f} [{m.low:.3f}, {m.high:.3f}]" if m else "" for m in cells)
        lines.append(f"| {escaped(name)} | {' | '.join(texts)} |")
    return "\n".join(lines)


def systems_of(systems: Sequence[SystemRecord]) -> dict[str, list[SystemRecord]]:
    """Name -> all measurements of a system, without the unedited model."""
    found: dict[str, list[SystemRecord]] = {}
    for system in systems:
        if system.system != UNEDITED:
            found.setdefault(system.system, []).append(system)
    return found
