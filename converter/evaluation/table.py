"""The results of an evaluation as a Markdown table."""

from collections.abc import Mapping

from converter.manifest import Evaluation, Interval, Metric
from converter.text import escaped

NOT_MEASURED = "not measured"


def markdown(results: Evaluation) -> str:
    """One row for each system, seeds averaged, with intervals of 95 % in brackets.

    Toxicities are means of scores between 0 and 1; ``toxic words`` is the teacher-forced estimate,
    the probability of toxic words relative to the unedited model.
    """
    columns = [("perplexity", "perplexity_ratio"), ("toxic words", "teacher_forced")]
    for scorer in results.scorers:
        for way in ("greedy", "sampled"):
            columns.append((f"{scorer}, {way}", f"toxicity/{scorer}/{way}"))
    known = dict.fromkeys(key for row in results.rows for key in row.metrics)
    columns += [(key, key) for key in known if key.startswith(("safeedit/", "ability/"))]
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
    if key == "perplexity_ratio":
        value, ratio = metrics.get("perplexity"), metrics.get(key)
        if value is None:
            return NOT_MEASURED
        text = f"{value.value:.2f}"
        return text if ratio is None else f"{text} (x {_interval(ratio)})"
    metric = metrics.get(key)
    return NOT_MEASURED if metric is None else _interval(metric)


def _interval(metric: Interval) -> str:
    return f"{metric.value:.3f} [{metric.low:.3f}, {metric.high:.3f}]"
