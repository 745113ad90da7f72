"""What is measured of one system, and how sure it is.

Every number comes with an interval of 95 %: over prompts by the bootstrap, over text by the
standard error. Those of all texts together (dist-n, fluency) have none:
low and high are the value. A metric that was not measured, or is not a number, is None.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from converter.errors import DataError, OptionError
from converter.evaluation.battery import Battery
from converter.evaluation.benchmarks.run import run_benchmarks
from converter.evaluation.conditional_perplexity import conditional_perplexity
from converter.evaluation.generation import generate
from converter.evaluation.metrics import (
    bootstrap,
    distinct_n,
    expected_maximum_toxicity,
    fluency,
    mean_toxicity,
    toxicity_probability,
)
from converter.evaluation.passages import Passages
from converter.evaluation.scorers import scores_of
from converter.manifest import Estimate, Interval, Metric, RowRecord, Strength, SystemRecord
from converter.models.batching import Sentence
from converter.models.likelihood import (
    LogProbabilities,
    log_probabilities,
    perplexity_estimate,
    perplexity_ratio,
    teacher_forced,
    word_changes,
)
from converter.models.resident import LanguageModel

NORMAL = 1.96
"""Standard errors on either side that hold 95 % of a normal distribution."""

WINDOW = 512
"""Tokens of the perplexity text that are read at a time; they do not overlap, and the first token
of each is not scored. Compare perplexities only within one evaluation."""


def windows(model: LanguageModel, text: str, limit: int | None) -> list[Sentence]:
    """A text as windows of tokens.

    Raises:
        DataError: it is shorter than two windows.
    """
    ids = model.tokenizer(text)["input_ids"][:limit]
    if len(ids) < 2 * WINDOW:
        raise DataError(
            "the text for perplexity is too short",
            expected=f"at least {2 * WINDOW} tokens",
            found=str(len(ids)),
        )
    return [Sentence(ids[i : i + WINDOW]) for i in range(0, len(ids) - 1, WINDOW)]


def measure(
    model: LanguageModel,
    battery: Battery,
    passages: Passages | None,
    before: LogProbabilities | None,
) -> tuple[dict[str, Metric], LogProbabilities | None]:
    """Measure a model as it is now, hooks included.

    Args:
        model: the system.
        battery: what to measure.
        passages: of the unedited model.
        before: log-probabilities of the perplexity text under the unedited model; None for the
            unedited model itself.

    Returns:
        the metrics, and the log-probabilities of the perplexity text.
    """
    metrics: dict[str, Metric] = {}
    now = None
    if battery.text is not None:
        sentences = windows(model, battery.text, battery.text_tokens)
        (now,) = log_probabilities(model, [sentences])
        metrics["perplexity"] = around(perplexity_estimate(now))
        if before is not None:
            metrics["perplexity_ratio"] = around(perplexity_ratio(before, now))
    if passages is not None:
        (after,) = log_probabilities(model, [passages.sentences])
        changes = word_changes(passages.before, after, passages.words)
        metrics["teacher_forced"] = around(teacher_forced(changes, passages.prompts))
    if battery.prompts is not None:
        for way, samples in (("greedy", 0), ("sampled", battery.samples)):
            if battery.greedy if way == "greedy" else samples:
                metrics |= _generation(model, battery, way, samples)
    metrics |= run_benchmarks(model, battery.benchmarks, battery.batch_size)
    return metrics, now


def _generation(
    model: LanguageModel, battery: Battery, way: str, samples: int
) -> dict[str, Metric]:
    """The metrics of one way to continue the prompts."""
    assert battery.prompts is not None
    prompts = battery.prompts.texts
    texts = generate(
        model,
        prompts,
        max_new_tokens=battery.max_new_tokens,
        samples=samples,
        top_p=battery.top_p,
        batch_size=battery.batch_size,
        seed=battery.seed,
    )
    flat = [text for group in texts for text in group]
    metrics: dict[str, Metric] = {}
    for name, scorer in battery.scorers.items():
        scores = scores_of(name, scorer, flat).reshape(len(texts), -1)
        metrics[f"toxicity/{name}/{way}"] = over_prompts(mean_toxicity, scores)
        if way == "sampled":
            metrics[f"emt/{name}"] = over_prompts(expected_maximum_toxicity, scores)
            metrics[f"tp/{name}"] = over_prompts(toxicity_probability, scores)
    for n in (1, 2, 3):
        metrics[f"distinct_{n}/{way}"] = over_texts(partial(distinct_n, n=n), texts)
    try:
        metrics[f"fluency/{way}"] = over_texts(fluency, texts)
    except OptionError:  # it needs the extra [eval]; not measured is said in the results
        metrics[f"fluency/{way}"] = None
    if battery.judge is not None:
        found = conditional_perplexity(battery.judge, prompts, texts)
        pairs = np.stack(
            [np.bincount(found.prompts, x, len(prompts)) for x in (found.nats, found.tokens)], 1
        ).astype(np.float64)
        metrics[f"conditional_perplexity/{way}"] = over_prompts(
            lambda p: float(np.exp(p[:, 0].sum() / p[:, 1].sum())), pairs
        )
    return metrics


def around(estimate: Estimate) -> Metric:
    """A value with a normal interval."""
    value, half = estimate.value, NORMAL * estimate.error
    return Interval.of(value, value - half, value + half)


def over_prompts(
    statistic: Callable[[NDArray[np.float64]], float], units: NDArray[np.float64]
) -> Metric:
    """A value with a bootstrap interval over prompts."""
    low, high = bootstrap(statistic, units)
    return Interval.of(statistic(units), low, high)


def over_texts(
    statistic: Callable[[Sequence[str]], float], texts: Sequence[Sequence[str]]
) -> Metric:
    """A value of all texts together, without an interval: resampled texts repeat n-grams."""
    value = statistic([text for group in texts for text in group])
    return Interval.of(value, value, value)


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
    more = NORMAL**2 * spread
    low, high = (float(np.sqrt(distance**2 + more)) for distance in (low, high))
    return Interval.of(mean, mean - low, mean + high)
