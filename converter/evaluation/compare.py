"""Evaluate a model, what it was made from, and controls, on the same prompts and text."""

import hashlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from msgspec.structs import replace

from converter.errors import OptionError
from converter.evaluation.battery import Battery
from converter.evaluation.measure import WINDOW, measure, summarise
from converter.evaluation.names import UNEDITED
from converter.evaluation.passages import draw_passages
from converter.evaluation.scorers import origin_of
from converter.evaluation.systems import Fits, System
from converter.manifest import (
    TOOL,
    Evaluation,
    EvaluationSettings,
    Metric,
    PromptsRecord,
    SystemRecord,
    to_text,
)
from converter.methods.workbench import Bench
from converter.models.edited import edited
from converter.models.likelihood import LogProbabilities
from converter.models.resident import LanguageModel
from converter.recipe import without_folders
from converter.runtime import progress


@dataclass(frozen=True, slots=True)
class Comparison:
    """What to compare.

    Attributes:
        controls: methods to fit beside; see ``systems.parse_controls``.
        seeds: of their pairs.
        ranks: to measure of each; empty to choose one.
        passages: continuations of each prompt that are drawn for the teacher-forced estimate.

    Raises:
        OptionError: seeds or ranks are no whole numbers, there is no seed, or a rank is below 1.
    """

    controls: Sequence[str]
    seeds: Sequence[int]
    ranks: Sequence[int]
    passages: int

    def __post_init__(self) -> None:
        if not self.seeds or any(type(seed) is not int for seed in self.seeds):
            raise OptionError("--seeds", expected="whole numbers", found=str(self.seeds))
        if any(type(rank) is not int or rank < 1 for rank in self.ranks):
            raise OptionError("--ranks", expected="whole numbers from 1", found=str(self.ranks))


def evaluate(
    bench: Bench,
    battery: Battery,
    comparison: Comparison,
    model: LanguageModel | None = None,
    reference: System | None = None,
    partial: Path | None = None,
) -> Evaluation:
    """Measure the unedited model, an edited one if there is one, and controls.

    Args:
        bench: the unedited model, and what controls need to be fitted.
        battery: what is measured.
        comparison: with what.
        model: the edited model, with its weights, if it has been written.
        reference: the edit, to which controls are matched; without ``model`` it is measured
            through hooks. None to measure controls only.
        partial: a file that is written anew after every system, since an evaluation can be long.

    Raises:
        ConverterError: one of its children; the unedited model has to be in memory as a whole.
    """
    base = bench.load_resident()
    passages = None
    if battery.prompts is not None and comparison.passages:
        with progress.stage("passages", "drawing continuations for the teacher-forced estimate"):
            passages = draw_passages(
                base,
                battery.prompts.texts,
                bench.words,
                samples=comparison.passages,
                max_new_tokens=battery.max_new_tokens,
                batch_size=battery.batch_size,
                seed=battery.seed,
            )
    results = Evaluation(
        tool=TOOL,
        settings=describe(bench, battery, comparison, passages.count if passages else 0),
        scorers=tuple(battery.scorers),
        systems=(),
        rows=(),
    )
    text: LogProbabilities | None = None

    def add(system: System, written: LanguageModel | None = None) -> LogProbabilities | None:
        nonlocal results
        subject = written or base
        hooks: AbstractContextManager[None] = nullcontext()
        if system.edit is not None and written is None:
            hooks = edited(base.module, bench.plan, system.edit)
        label = system.name + (
            f", strength {system.strength:g}" if system.strength is not None else ""
        )
        label += f", seed {system.seed}" if system.seed is not None else ""
        with progress.stage("measure", f"measuring {label}"), hooks:
            metrics, values = measure(subject, battery, passages, text)
        systems = (*results.systems, entry(system, metrics, bool(comparison.ranks)))
        results = replace(results, systems=systems, rows=summarise(systems))
        if partial is not None:
            partial.write_text(to_text(results), "utf-8")
        return values

    text = add(System(UNEDITED))
    if reference is not None:
        add(reference, model)
    fits = Fits(bench, bench.recipe.options, comparison.ranks)
    for system in fits.systems(comparison.controls, comparison.seeds, reference):
        add(system)
    return results


def entry(system: System, metrics: dict[str, Metric], by_strength: bool) -> SystemRecord:
    """One system's part of the results; those of one name and ``group`` are averaged."""
    return SystemRecord(
        system=system.name,
        group=system.strength if by_strength else None,
        seed=system.seed,
        strength=system.strength,
        layers=system.layers,
        options=dict(system.options),
        metrics=metrics,
    )


def describe(
    bench: Bench, battery: Battery, comparison: Comparison, words: int
) -> EvaluationSettings:
    """What has to be known to measure the same again."""
    recipe, prompts, text = bench.recipe, battery.prompts, battery.text
    return EvaluationSettings(
        source=bench.source.name,
        controls=tuple(comparison.controls),
        ranks=tuple(comparison.ranks),
        device=bench.device,
        dtype=str(bench.dtype).removeprefix("torch."),
        word_list=bench.words.sha256,
        neutral=without_folders(recipe.neutral),
        text_sha256=None if text is None else hashlib.sha256(text.encode()).hexdigest(),
        pairs=without_folders(recipe.pairs),
        num_pairs=recipe.num_pairs,
        seeds=tuple(comparison.seeds),
        options=dict(recipe.options),
        max_perplexity_ratio=recipe.max_perplexity_ratio,
        prompts=None
        if prompts is None
        else PromptsRecord(origin=prompts.origin, sha256=prompts.sha256, count=len(prompts.texts)),
        scorers={name: origin_of(name, scorer) for name, scorer in battery.scorers.items()},
        samples=battery.samples,
        max_new_tokens=battery.max_new_tokens,
        top_p=battery.top_p,
        generation_seed=battery.seed,
        passages_per_prompt=comparison.passages,
        toxic_words=words,
        text_tokens=battery.text_tokens,
        window=WINDOW,
    )
