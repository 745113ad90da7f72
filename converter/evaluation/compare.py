"""Evaluate a model and other systems on the same prompts and text."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import chain
from pathlib import Path

from msgspec.structs import replace

from converter.calibration.instances import Lesson, builtin_set, together
from converter.evaluation.comparison import Comparison, check_names
from converter.evaluation.continuations import Draws
from converter.evaluation.headline import passages_of
from converter.evaluation.masks import masks
from converter.evaluation.measure import WINDOW, Battery, Reference, divergence, measure
from converter.evaluation.passages import Passages
from converter.evaluation.refusals import refusal_prompts
from converter.evaluation.results import summarise
from converter.evaluation.rows import Rows
from converter.evaluation.scorers import origin_of
from converter.evaluation.systems import Fits, System
from converter.manifest import (
    TOOL,
    UNEDITED,
    Evaluation,
    EvaluationSettings,
    SystemRecord,
    to_text,
)
from converter.methods.workbench import Bench
from converter.models.edited import edited
from converter.recipe import without_folders
from converter.runtime import progress


def evaluate(
    bench: Bench,
    battery: Battery,
    comparison: Comparison,
    given: Sequence[System] = (),
    kept: Path | None = None,
    continuations: Path | None = None,
) -> Evaluation:
    """Measure the unedited model, existing systems, and systems that are fitted for the comparison.

    Args:
        bench: the unedited model, and everything that a fit needs.
        comparison: the systems to fit.
        given: systems that need no fit; controls are matched to the first.
        kept: a file that is rewritten after every system, since an evaluation can be long. Where
            measurements have another dtype than fits, all systems are fitted before the first is
            measured.
        continuations: a file for the data behind the numbers; see ``rows``.

    Raises:
        ConverterError: one of its children; the unedited model has to be in memory as a whole.
    """
    fitted_names = (system.name for system in comparison.fitted)
    check_names([UNEDITED, *(system.name for system in given), *fitted_names])
    fits, first = Fits(bench, comparison), given[0] if given else None
    fits.check(first)
    fitted: Iterable[System] = fits.systems(first)
    if bench.held_out != bench.dtype:  # one model is in memory at a time
        fitted = [*fitted]
    base = bench.load_measured()
    passages = _passages(bench, battery)
    results = Evaluation(
        tool=TOOL,
        settings=_settings(bench, battery, comparison, passages),
        scorers=tuple(battery.scorers),
        systems=(),
        rows=(),
    )
    asked: dict[str, list[str]] | None = None
    if battery.asked.defence:  # its prompts leave out all lessons, so all are fitted now
        fitted = [*fitted]
        asked = refusal_prompts(base.tokenizer, _learnt([*given, *fitted]))
    reference: Reference | None = None
    rows = None
    if continuations is not None:
        rows = Rows(continuations, masks(bench.words, mask=bench.recipe.mask))
    for system in chain([System(UNEDITED)], given, fitted):
        subject = system.load() if system.load else base
        hooks: Callable[[], AbstractContextManager[None]] = nullcontext
        if system.edit is not None and not system.load:
            hooks = partial(edited, base.module, bench.plan, system.edit)
        if rows is not None:
            rows.of(system)
        with progress.stage("measure", f"measuring {system.title}"):
            with hooks():
                metrics, found = measure(subject, battery, passages, reference, asked, rows)
            if reference is not None and battery.text is not None:
                metrics["divergence"] = divergence(base, subject, hooks, battery, rows)
        reference = reference or found
        measured = SystemRecord(
            system=system.name,
            group=system.cost,
            seed=system.seed,
            strength=system.strength,
            layers=system.layers,
            options=dict(system.options),
            metrics=metrics,
        )
        systems = (*results.systems, measured)
        results = replace(results, systems=systems, rows=summarise(systems))
        if kept is not None:
            kept.write_text(to_text(results), "utf-8")
    return results


def _learnt(systems: Sequence[System]) -> Lesson | None:
    """The lessons of all systems; none of them is asked these prompts."""
    for system in systems:
        if system.lesson is not None and not system.lesson.instances:
            progress.warn(
                f"it is not known which requests {system.name} has learnt; refusals of some that "
                "it has may be counted"
            )
    return together(system.lesson for system in systems)


def _passages(bench: Bench, battery: Battery) -> Passages | None:
    """The passages of the teacher-forced estimate, if it is asked for and there are toxic words."""
    asked = battery.asked
    if battery.prompts is None or not asked.passages:
        return None
    draws = Draws(
        samples=asked.passages,
        max_new_tokens=asked.max_new_tokens,
        batch_size=asked.generation_batch_size,
        seed=battery.seed,
    )
    with progress.stage("passages", "drawing continuations for the teacher-forced estimate"):
        return passages_of(bench, battery.prompts.texts, draws)


def _settings(
    bench: Bench, battery: Battery, comparison: Comparison, passages: Passages | None
) -> EvaluationSettings:
    """The settings needed to repeat the measurement."""
    recipe, asked = bench.recipe, battery.asked
    fits_alike = bench.dtype == bench.held_out
    prompts, text = battery.prompts, battery.text
    return EvaluationSettings(
        source=bench.source.name,
        systems=tuple(without_folders(system.name) for system in comparison.systems),
        costs=tuple(comparison.costs),
        device=bench.device,
        dtype=str(bench.held_out).removeprefix("torch."),
        word_list=bench.words.sha256,
        neutral=without_folders(recipe.neutral),
        text_sha256=None if text is None else hashlib.sha256(text.encode()).hexdigest(),
        pairs=without_folders(recipe.pairs),
        num_pairs=recipe.num_pairs,
        seeds=tuple(comparison.seeds),
        options=dict(recipe.options),
        max_perplexity_ratio=recipe.max_perplexity_ratio,
        prompts=prompts.record() if prompts else None,
        scorers={name: origin_of(name, scorer) for name, scorer in battery.scorers.items()},
        samples=asked.samples,
        max_new_tokens=asked.max_new_tokens,
        top_p=asked.top_p,
        generation_seed=battery.seed,
        passages_per_prompt=asked.passages,
        toxic_words=passages.toxic_words if passages else 0,
        text_tokens=asked.text_tokens,
        window=WINDOW,
        defence_set=builtin_set().version if asked.defence else None,
        fit_dtype=None if fits_alike else str(bench.dtype).removeprefix("torch."),
    )
