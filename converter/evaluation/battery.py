"""What an evaluation measures with: prompts, scorers, texts and models, all loaded."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from converter.checkpoints.plan import make_plan
from converter.checkpoints.resolve import resolve
from converter.errors import DataError
from converter.evaluation.benchmarks.run import Benchmarks
from converter.evaluation.benchmarks.safeedit import load_safeedit
from converter.evaluation.options import EvaluationOptions
from converter.evaluation.prompts import Prompts, load_prompts
from converter.evaluation.scorers import Scorer, load_scorer
from converter.models.build import load_language_model, stored_dtype
from converter.models.loading import load_tokenizer
from converter.models.resident import LanguageModel, choose_dtype


@dataclass(frozen=True, slots=True)
class Battery:
    """The tests that every system of an evaluation goes through.

    Attributes:
        prompts: to be continued; None to generate nothing.
        scorers: name -> scorer of continuations.
        greedy: whether the greedy continuation is scored.
        samples: drawn continuations of each prompt that are scored; 0 for none.
        max_new_tokens, top_p, batch_size, seed: of the generation.
        text: for perplexity; None to leave it.
        text_tokens: of it that are used; None for all.
        judge: a larger model for the conditional perplexity; None to leave it.
        benchmarks: with prompts of their own.
    """

    prompts: Prompts | None
    scorers: Mapping[str, Scorer]
    greedy: bool
    samples: int
    max_new_tokens: int
    top_p: float
    batch_size: int
    seed: int
    text: str | None
    text_tokens: int | None
    judge: LanguageModel | None = None
    benchmarks: Benchmarks = field(default_factory=Benchmarks)


def load_battery(asked: EvaluationOptions, device: str, seed: int) -> Battery:
    """Load what the options name.

    Raises:
        ConverterError: one of its children says which of them cannot be had.
    """
    safeedit = asked.safeedit and load_safeedit(asked.safeedit, asked.num_prompts, seed)
    benchmarks = Benchmarks(
        [task.strip() for task in (asked.ability or "").split(",") if task.strip()],
        asked.ability_limit,
        safeedit or None,
        load_scorer(asked.safety_classifier, device) if safeedit else None,
    )
    prompts = None
    if asked.prompts != "none":
        prompts = load_prompts(asked.prompts, asked.num_prompts, seed)
    scores = prompts is not None and (asked.greedy or asked.samples)
    return Battery(
        prompts=prompts,
        scorers={name: load_scorer(name, device) for name in asked.scorers if scores},
        greedy=asked.greedy,
        samples=asked.samples,
        max_new_tokens=asked.max_new_tokens,
        top_p=asked.top_p,
        batch_size=asked.generation_batch_size,
        seed=seed,
        text=_text(asked.text),
        text_tokens=asked.text_tokens,
        judge=load_whole(asked.judge, device) if asked.judge else None,
        benchmarks=benchmarks,
    )


def _text(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path.name} cannot be read", found=str(error)) from error


def load_whole(
    name: str, device: str, dtype: torch.dtype | None = None, spread: bool = False
) -> LanguageModel:
    """A model to run as it is; its dtype is chosen as for a fit unless one is given."""
    source = resolve(name)
    plan = make_plan(source.config, source.weight_map, source.headers())
    dtype = dtype or choose_dtype("auto", stored_dtype(plan), device)
    tokenizer = load_tokenizer(source.folder)
    return load_language_model(source, plan, tokenizer, dtype, device, spread=spread)
