"""What an evaluation measures with: prompts, scorers, texts and models, all loaded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from converter.checkpoints.plan import make_plan
from converter.checkpoints.resolve import resolve
from converter.errors import DataError
from converter.evaluation.benchmarks import load_safeedit
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
        asked: the options, which name all that is loaded here and say how to generate.
        seed: of the generation.
        prompts: to be continued; None to generate nothing.
        scorers: name -> scorer of continuations.
        text: for perplexity; None to leave it.
        judge: a larger model for the conditional perplexity; None to leave it.
        safeedit: set -> prompts; None to leave it out.
        safety: says how unsafe a response to these is.
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


def load_battery(asked: EvaluationOptions, device: str, seed: int) -> Battery:
    """Load what the options name.

    Raises:
        ConverterError: one of its children says which of them cannot be had.
    """
    safeedit = safety = prompts = None
    if asked.safeedit:
        safeedit = load_safeedit(asked.safeedit, asked.num_prompts, seed)
        safety = load_scorer(asked.safety_classifier, device)
    if asked.prompts != "none":
        prompts = load_prompts(asked.prompts, asked.num_prompts, seed)
    scores = prompts is not None and (asked.greedy or asked.samples)
    return Battery(
        asked=asked,
        seed=seed,
        prompts=prompts,
        scorers={name: load_scorer(name, device) for name in asked.scorers if scores},
        text=_text(asked.text),
        judge=load_whole(asked.judge, device) if asked.judge else None,
        safeedit=safeedit,
        safety=safety,
        tasks=[task.strip() for task in (asked.ability or "").split(",") if task.strip()],
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
