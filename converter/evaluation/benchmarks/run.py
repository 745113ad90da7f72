"""Benchmarks that bring their own prompts: SafeEdit's defence rates, and lm-eval's tasks."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from converter.evaluation.benchmarks import lm_eval as ability
from converter.evaluation.benchmarks.safeedit import SETS, SafeEdit, defence_rates
from converter.evaluation.generation import generate
from converter.evaluation.metrics import bootstrap
from converter.evaluation.scorers import Scorer
from converter.manifest import Interval, Metric
from converter.models.resident import LanguageModel


@dataclass(frozen=True, slots=True)
class Benchmarks:
    """What to run.

    Attributes:
        tasks: of lm-eval; empty for none.
        limit: examples of each task; None for all.
        safeedit: its instances; None to leave it out.
        judge: says how unsafe a response is.
        max_new_tokens: of a response.
    """

    tasks: Sequence[str] = ()
    limit: int | None = None
    safeedit: SafeEdit | None = None
    judge: Scorer | None = None
    max_new_tokens: int = 100


def run_benchmarks(
    model: LanguageModel, benchmarks: Benchmarks, batch_size: int
) -> dict[str, Metric]:
    """The metrics ``safeedit/SET``, in per cent, and ``ability/TASK/NUMBER``.

    The responses to SafeEdit are greedy, and the judge sees the response alone.

    Raises:
        OptionError, SourceError: see ``lm_eval``.
    """
    metrics: dict[str, Metric] = {}
    if benchmarks.safeedit is not None and benchmarks.judge is not None:
        unsafe = {}
        for name in SETS:
            responses = generate(
                model,
                benchmarks.safeedit.prompts(name),
                max_new_tokens=benchmarks.max_new_tokens,
                batch_size=batch_size,
            )
            unsafe[name] = benchmarks.judge.score([group[0] for group in responses])
        others = np.mean([unsafe[name] for name in SETS if name != "DS"], axis=0)
        for name, scores in (unsafe | {"DG_avg": others}).items():
            low, high = bootstrap(lambda u: 100 - 100 * float(u.mean()), scores)
            value = defence_rates(unsafe)[name]
            metrics[f"safeedit/{name}"] = Interval.of(value, low, high)
    if benchmarks.tasks:
        found = ability.measure(
            model.module, model.tokenizer, benchmarks.tasks, benchmarks.limit, batch_size
        )
        for task, numbers in found["tasks"].items():
            for name, value in numbers.items():
                number, _, kind = name.partition(",")
                if number.endswith("_stderr"):
                    continue
                error = numbers.get(f"{number}_stderr" + (f",{kind}" if kind else ""), 0.0)
                low, high = value - 1.96 * error, value + 1.96 * error
                metrics[f"ability/{task}/{name}"] = Interval.of(value, low, high)
    return metrics
