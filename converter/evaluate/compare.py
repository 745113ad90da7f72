"""Evaluate a model, what it was made from, and controls, on the same prompts and text."""

import hashlib
import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converter import __version__
from converter.evaluate.benchmarks.run import Metric
from converter.evaluate.measure import WINDOW, Settings, measure, summarise
from converter.evaluate.passages import draw_passages
from converter.evaluate.systems import Fits, System
from converter.methods.workbench import Bench
from converter.models.edited import edited
from converter.models.likelihood import LogProbabilities
from converter.models.resident import LanguageModel
from converter.recipe import without_folders
from converter.runtime import progress

UNEDITED, EDITED = "unedited", "edited"


@dataclass(frozen=True, slots=True)
class Comparison:
    """What to compare.

    Attributes:
        controls: methods to fit beside; see ``systems.parse_controls``.
        seeds: of their pairs.
        ranks: to measure of each; empty to choose one.
        passages: continuations of each prompt that are drawn for the teacher-forced estimate.
    """

    controls: Sequence[str]
    seeds: Sequence[int]
    ranks: Sequence[int]
    passages: int


def evaluate(
    bench: Bench,
    settings: Settings,
    comparison: Comparison,
    model: LanguageModel | None = None,
    reference: System | None = None,
    partial: Path | None = None,
) -> dict[str, Any]:
    """Measure the unedited model, an edited one if there is one, and controls.

    Args:
        bench: the unedited model, and what controls need to be fitted.
        settings: what is measured.
        comparison: with what.
        model: the edited model, with its weights, if it has been written.
        reference: the edit, to which controls are matched; without ``model`` it is measured
            through hooks. None to measure controls only.
        partial: a file that is written anew after every system, since an evaluation can be long.

    Returns:
        the results: ``settings``, ``systems`` and, averaged over seeds, ``rows``.

    Raises:
        ConverterError: one of its children; the unedited model has to be in memory as a whole.
    """
    base = bench.load_resident()
    systems: list[dict[str, Any]] = []
    passages = None
    if settings.prompts is not None and comparison.passages:
        with progress.stage("passages", "drawing continuations for the teacher-forced estimate"):
            passages = draw_passages(
                base,
                settings.prompts.texts,
                bench.words,
                samples=comparison.passages,
                max_new_tokens=settings.max_new_tokens,
                batch_size=settings.batch_size,
                seed=settings.seed,
            )
    results = {
        "tool": {"name": "gloss-convert", "version": __version__},
        "settings": describe(bench, settings, comparison, passages.count if passages else 0),
        "scorers": list(settings.scorers),
        "systems": systems,
        "rows": [],
    }
    text: LogProbabilities | None = None

    def add(system: System, written: LanguageModel | None = None) -> LogProbabilities | None:
        subject = written or base
        hooks: AbstractContextManager[None] = nullcontext()
        if system.edit is not None and written is None:
            hooks = edited(base.module, base.architecture, system.edit, system.layers)
        label = system.name + (f", rank {system.rank}" if system.rank is not None else "")
        label += f", seed {system.seed}" if system.seed is not None else ""
        with progress.stage("measure", f"measuring {label}"), hooks:
            metrics, values = measure(subject, settings, passages, text)
        systems.append(entry(system, metrics, bool(comparison.ranks)))
        results["rows"] = summarise(systems)
        if partial is not None:
            partial.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
        return values

    text = add(System(UNEDITED))
    if reference is not None:
        add(reference, model)
    fits = Fits(bench, bench.run.options, comparison.ranks)
    for system in fits.systems(comparison.controls, comparison.seeds, reference):
        add(system)
    return results


def entry(system: System, metrics: dict[str, Metric], by_rank: bool) -> dict[str, Any]:
    """One system's part of the results; those of one name and ``group`` are averaged."""
    return {
        "system": system.name,
        "group": system.rank if by_rank else None,
        "seed": system.seed,
        "rank": system.rank,
        "layers": list(system.layers),
        "options": dict(system.options),
        "metrics": metrics,
    }


def describe(
    bench: Bench, settings: Settings, comparison: Comparison, words: int
) -> dict[str, Any]:
    """What has to be known to measure the same again."""
    prompts = settings.prompts
    return {
        "source": bench.source.name,
        "controls": list(comparison.controls),
        "ranks": list(comparison.ranks),
        "device": bench.device,
        "dtype": str(bench.dtype).removeprefix("torch."),
        "word_list": bench.words.sha256,
        "neutral": without_folders(bench.run.neutral),
        "text_sha256": settings.text and hashlib.sha256(settings.text.encode()).hexdigest(),
        "pairs": without_folders(bench.run.pairs),
        "num_pairs": bench.run.num_pairs,
        "seeds": list(comparison.seeds),
        "options": dict(bench.run.options),
        "max_perplexity_ratio": bench.run.max_perplexity_ratio,
        "prompts": prompts
        and {**prompts.origin, "sha256": prompts.sha256, "count": len(prompts.texts)},
        "scorers": {name: scorer.origin for name, scorer in settings.scorers.items()},
        "samples": settings.samples,
        "max_new_tokens": settings.max_new_tokens,
        "top_p": settings.top_p,
        "generation_seed": settings.seed,
        "passages_per_prompt": comparison.passages,
        "toxic_words": words,
        "text_tokens": settings.text_tokens,
        "window": WINDOW,
    }
