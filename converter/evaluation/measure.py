"""Load the tests of an evaluation, and measure one system, with intervals.

Every number has an interval of 95 %: over prompts by the bootstrap, over text by the standard
error. Metrics of all texts together (dist-n, fluency) have none: low and high are the value. A
metric that was not measured, or is not a number, is None.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from converter.calibration.datasets import read_whole
from converter.checkpoints.architectures.kind import allow_own_code
from converter.checkpoints.plan import read_plan
from converter.checkpoints.resolve import resolve
from converter.errors import DataError, OptionError
from converter.evaluation.benchmarks import load_safeedit, measure_ability, measure_safeedit
from converter.evaluation.continuations import generate
from converter.evaluation.metrics import (
    bootstrap,
    distinct_n,
    expected_maximum_toxicity,
    fluency,
    mean_toxicity,
    toxicity_probability,
)
from converter.evaluation.options import EvaluationOptions
from converter.evaluation.passages import (
    Passages,
    conditional_losses,
    passages_measured,
    weigh_passages,
)
from converter.evaluation.prompts import Prompts, load_prompts
from converter.evaluation.refusals import measure_refusals
from converter.evaluation.results import around
from converter.evaluation.rows import Rows
from converter.evaluation.scorers import Scorer, load_scorer, scores_of
from converter.manifest import Interval, Metric
from converter.models.batching import Sentence, beginning, encode
from converter.models.likelihood import (
    LogProbabilities,
    divergences,
    log_probabilities,
    mean_change,
    perplexity_estimate,
    perplexity_ratio,
)
from converter.models.loading import load_language_model, load_tokenizer
from converter.models.resident import LanguageModel, choose_dtype
from converter.models.transformers_loader import Loading

WINDOW = 512
"""Tokens of one window of the perplexity text. Windows do not overlap. Each begins with the special
tokens that the tokenizer puts before a text: without its BOS, Gemma is not the model that was
trained. The first token is not scored. Compare perplexities only within one evaluation.
"""


@dataclass(frozen=True, slots=True)
class Battery:
    """The tests that every system of an evaluation goes through.

    Attributes:
        asked: the options, which name everything loaded here and say how to generate.
        seed: of the generation.
        prompts: to be continued; None to generate nothing.
        scorers: name -> scorer of continuations.
        text: for perplexity; None to leave it.
        judge: a larger model for the conditional perplexity; None to leave it.
        safeedit: set -> prompts; None to leave it out.
        safety: scores how unsafe a response to these is.
        tasks: of lm-eval; empty for none.
    """

    asked: EvaluationOptions
    seed: int
    prompts: Prompts | None
    scorers: Mapping[str, Scorer]
    text: str | None
    judge: LanguageModel | None
    safeedit: Mapping[str, Sequence[str]] | None
    safety: Scorer | None
    tasks: Sequence[str]


def load_battery(
    asked: EvaluationOptions, prompts: str, device: str, seed: int, attention: str = "auto"
) -> Battery:
    """Load what the options name, and prompts as ``Recipe.prompts`` names them.

    Raises:
        ConverterError: one of its children; something cannot be loaded.
    """
    safeedit = safety = continued = None
    if asked.safeedit:
        safeedit = load_safeedit(asked.safeedit, asked.num_prompts, seed)
        safety = load_scorer(asked.safety_classifier, device)
    if prompts != "none":
        continued = load_prompts(prompts, asked.num_prompts, seed)
    scores = continued is not None and (asked.greedy or asked.samples)
    return Battery(
        asked=asked,
        seed=seed,
        prompts=continued,
        scorers={name: load_scorer(name, device) for name in asked.scorers if scores},
        text=read_whole(asked.text, "text").replace("\r\n", "\n") if asked.text else None,
        judge=load_whole(asked.judge, device, how=Loading(attention)) if asked.judge else None,
        safeedit=safeedit,
        safety=safety,
        tasks=[task.strip() for task in (asked.ability or "").split(",") if task.strip()],
    )


def load_whole(
    name: str, device: str, dtype: torch.dtype | None = None, how: Loading = Loading()
) -> LanguageModel:
    """Load a model to run unedited; its dtype is chosen as for a fit unless one is given."""
    allow_own_code(how.trust_remote_code)
    source = resolve(name)
    plan = read_plan(source)
    dtype = dtype or choose_dtype("auto", plan, device)
    tokenizer = load_tokenizer(source.folder)
    return load_language_model(source, plan, tokenizer, dtype, device, how)


@dataclass(frozen=True, slots=True)
class Reference:
    """Measurements of the unedited model, with which edited models are compared.

    Attributes:
        text: log-probabilities of the perplexity text; None without one.
        scores: ``greedy`` or ``sampled`` -> scorer -> (P, S) scores of the continuations.
    """

    text: LogProbabilities | None
    scores: Mapping[str, Mapping[str, NDArray[np.float64]]]


def measure(
    model: LanguageModel,
    battery: Battery,
    passages: Passages | None,
    before: Reference | None,
    requests: Mapping[str, Sequence[str]] | None = None,
    rows: Rows | None = None,
) -> tuple[dict[str, Metric], Reference]:
    """Measure a model in its present state, hooks included.

    Args:
        before: of the unedited model; None for the unedited model itself.
        requests: of ``refusal_prompts``; None to count no refusals.
        rows: gets the data behind the metrics.

    Returns:
        the metrics, and this model's measurements for comparing later models with it.

    Raises:
        DataError: that text is shorter than two windows.
        ConverterError: one of its children; see ``benchmarks.run_tasks``.
    """
    asked, metrics = battery.asked, dict[str, Metric]()
    now = None
    if battery.text is not None:
        (now,) = log_probabilities(model, [_windows(model, battery.text, asked.text_tokens)])
        metrics["perplexity"] = around(perplexity_estimate(now))
        text = before.text if before else None
        if text is not None:
            metrics["perplexity_ratio"] = around(perplexity_ratio(text, now))
        if rows is not None:
            rows.windows(text, now)
    if passages is not None and battery.prompts is not None:
        after = weigh_passages(model, passages)
        found = passages_measured(passages, after)
        if rows is not None:
            rows.passages(passages, battery.prompts.texts, after)
        metrics["teacher_forced"] = around(found.teacher_forced)
        if found.context_ratio is not None:
            metrics["context_ratio"] = around(found.context_ratio)
    scores: dict[str, Mapping[str, NDArray[np.float64]]] = {}
    ways = [("greedy", 0)] * asked.greedy + [("sampled", asked.samples)] * bool(asked.samples)
    for way, samples in ways if battery.prompts is not None else ():
        found_here, scores[way] = _generation(model, battery, way, samples, rows)
        metrics |= found_here
        if before:
            changes = {n: (x - before.scores[way][n]).mean(axis=1) for n, x in scores[way].items()}
            metrics |= {
                f"toxicity_change/{name}/{way}": _over_prompts(_mean, change)
                for name, change in changes.items()
            }
    batch_size = asked.generation_batch_size
    if battery.safeedit is not None and battery.safety is not None:
        metrics |= measure_safeedit(model, battery.safeedit, battery.safety, batch_size, rows)
    if requests is not None:
        metrics |= measure_refusals(model, requests, batch_size, rows)
    if battery.tasks:
        metrics |= measure_ability(model, battery.tasks, asked.ability_limit, batch_size)
    return metrics, Reference(now, scores)


def divergence(
    base: LanguageModel,
    model: LanguageModel,
    hooks: Callable[[], AbstractContextManager[None]],
    battery: Battery,
    rows: Rows | None = None,
) -> Metric:
    """The mean KL divergence of a model from the unedited one on the perplexity text.

    In nats a token; None without a text, or if the models have another number of tokens.

    Args:
        hooks: see ``likelihood.divergences``.
        rows: gets the data behind it.
    """
    sizes = {m.module.get_input_embeddings().weight.shape[0] for m in (base, model)}  # type: ignore[operator]
    if battery.text is None or len(sizes) > 1:
        return None
    windows = _windows(base, battery.text, battery.asked.text_tokens)
    (found,) = divergences(base, model, [hooks], windows)
    if rows is not None:
        rows.divergences(found)
    return around(mean_change([values.tolist() for values in found]))


def _windows(model: LanguageModel, text: str, limit: int | None) -> list[Sentence]:
    """A text as windows of tokens, each with what the tokenizer puts before a text."""
    ids, begin = encode(model.tokenizer, text, ()).ids[:limit], beginning(model.tokenizer)
    if len(ids) < 2 * WINDOW:
        raise DataError(
            "the text for perplexity is too short",
            expected=f"at least {2 * WINDOW} tokens",
            found=str(len(ids)),
        )
    size = WINDOW - len(begin)
    return [Sentence([*begin, *ids[i : i + size]]) for i in range(0, len(ids) - 1, size)]


def _generation(
    model: LanguageModel, battery: Battery, way: str, samples: int, rows: Rows | None
) -> tuple[dict[str, Metric], Mapping[str, NDArray[np.float64]]]:
    """The metrics of one way to continue the prompts, and the scores (P, S) of each scorer."""
    assert battery.prompts is not None
    prompts = battery.prompts.texts
    texts = generate(
        model,
        prompts,
        max_new_tokens=battery.asked.max_new_tokens,
        samples=samples,
        top_p=battery.asked.top_p,
        batch_size=battery.asked.generation_batch_size,
        seed=battery.seed,
    )
    flat = [text for group in texts for text in group]
    metrics: dict[str, Metric] = {}
    found = {
        name: scores_of(name, scorer, flat).reshape(len(texts), -1)
        for name, scorer in battery.scorers.items()
    }
    if rows is not None:
        rows.continuations(way, prompts, texts, found)
    for name, scores in found.items():
        metrics[f"toxicity/{name}/{way}"] = _over_prompts(mean_toxicity, scores)
        if way == "sampled":
            metrics[f"emt/{name}"] = _over_prompts(expected_maximum_toxicity, scores)
            metrics[f"tp/{name}"] = _over_prompts(toxicity_probability, scores)
    for n in (1, 2, 3):
        metrics[f"distinct_{n}/{way}"] = _of_all_texts(distinct_n(flat, n))
    try:
        metrics[f"fluency/{way}"] = _of_all_texts(fluency(flat))
    except OptionError:  # without the extra [eval], results say that it was not measured
        metrics[f"fluency/{way}"] = None
    if battery.judge is not None:
        losses = conditional_losses(battery.judge, prompts, texts)
        if rows is not None:
            rows.judged(way, losses)
        metrics[f"conditional_perplexity/{way}"] = _over_prompts(
            lambda p: float(np.exp(p[:, 0].sum() / p[:, 1].sum())), losses
        )
    return metrics, found


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean())


def _over_prompts(
    statistic: Callable[[NDArray[np.float64]], float], units: NDArray[np.float64]
) -> Metric:
    """A value with a bootstrap interval over prompts."""
    low, high = bootstrap(statistic, units)
    return Interval.of(statistic(units), low, high)


def _of_all_texts(value: float) -> Metric:
    """A value of all texts together, without an interval: resampled texts repeat n-grams."""
    return Interval.of(value, value, value)
