"""General ability, by the tasks of EleutherAI's lm-evaluation-harness: MMLU and the like.

Source: https://github.com/EleutherAI/lm-evaluation-harness. The calls are those of its release
0.4.13. They were never run here against the harness itself, whose tasks fetch data from the Hub:
the tests replace the two names that are used, ``HFLM`` and ``simple_evaluate``.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn

from converter.errors import OptionError, SourceError


def measure(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    limit: int | None,
    batch_size: int,
) -> dict[str, Any]:
    """Run tasks on a model in memory, with the number of examples in the prompt that each asks for.

    The harness seeds the global generators, gives the tokenizer a padding token if it has none,
    and fetches the data of tasks from the Hub.

    Args:
        model: a causal language model of transformers in eval mode.
        tokenizer: its own.
        tasks: names of tasks or of groups such as ``mmlu``.
        limit: examples of each task, for a trial; None for all, which a number to publish needs.
        batch_size: examples at a time.

    Returns:
        ``lm_eval``, its version; ``limit``; and ``tasks``, for each task or group its numbers, such
        as ``acc`` and ``acc_stderr``, shares from 0 to 1 unless the task says otherwise.

    Raises:
        OptionError: lm-eval is not installed, or no task is named.
        SourceError: the harness fails: there is no such task, or its data cannot be fetched.
    """
    if not tasks:
        raise OptionError("--tasks", expected="names of tasks, such as mmlu", found="none")
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise OptionError(
            "measuring general ability needs the package lm-eval",
            hint="pip install 'gloss-convert[ability]'",
        ) from error
    try:
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        results = lm_eval.simple_evaluate(
            model=wrapped, tasks=list(tasks), limit=limit, log_samples=False
        )
    except Exception as error:  # whatever comes of tasks, data and network
        raise SourceError(
            f"lm-eval failed on {', '.join(tasks)}",
            found=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}",
            hint="'lm-eval ls tasks' lists the tasks there are",
        ) from error
    found = {**results["results"], **results.get("groups", {})}
    numbers = {name: _numbers(values) for name, values in found.items()}
    return {"lm_eval": lm_eval.__version__, "limit": limit, "tasks": numbers}


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    """``acc,none`` -> ``acc``; another filter than none stays in the name."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in values.items()
        if isinstance(value, int | float)
    }
