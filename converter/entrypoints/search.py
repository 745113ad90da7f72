"""Search the options of a method on a model, before anything is written."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from typing import Any

from converter.calibration.pairs import Pairs, Prose
from converter.calibration.split import split
from converter.calibration.statistics import cache_key
from converter.calibration.word_list import load_words
from converter.checkpoints.plan import Plan
from converter.checkpoints.source import Source
from converter.entrypoints.convert import load_texts, prepare
from converter.evaluation.fit import fit_and_measure
from converter.evaluation.headline import MOST_PROMPTS, load_headline_prompts
from converter.evaluation.options import SearchOptions
from converter.evaluation.prompts import Prompts, load_prompts
from converter.evaluation.search import Search, record_of, with_kept
from converter.evaluation.search_space import Space
from converter.evaluation.search_texts import SearchTexts
from converter.evaluation.searchable import HINT, WHY, check_recipe, each_method
from converter.hub.addresses import settled
from converter.manifest import GuardRecord, SearchRecord, SearchTrial
from converter.methods.options import configure
from converter.methods.workbench import Bench
from converter.models.placement import choose_forward
from converter.models.resident import choose_device, choose_dtype, held_out_dtype
from converter.option import declared_options
from converter.outputs.base import output_of
from converter.recipe import SELF, Recipe, Settings
from converter.runtime import progress
from converter.runtime.cache import cache_folder
from converter.version import __version__

_VERSION = 1
"""Version of the search procedure. Raise it with a change that makes kept trials invalid."""

_SHARED = ("method", "options", "seed", "max_perplexity_ratio", "batch_size", "output")
"""Fields of a recipe on which trials depend; files and texts are compared by content."""

_LIBRARIES = ("numpy", "optuna", "tokenizers", "torch", "transformers")


@dataclass(frozen=True, slots=True)
class Searched:
    """The results of a search.

    Attributes:
        recipe: with the chosen options, as if they had been typed.
        record: for a manifest.
        trials: all of them, in order.
        guard: its measurements of the chosen edit, on text that the search has not seen; None if it
            did not run.
    """

    recipe: Recipe
    record: SearchRecord
    trials: Sequence[SearchTrial]
    guard: GuardRecord | None = None

    @property
    def command(self) -> str:
        """The command that makes the chosen edit without a search."""
        return as_typed(self.recipe)


def search_model(recipe: Recipe, asked: SearchOptions, settings: Settings) -> Searched:
    """Search, and let the guard measure the chosen edit, if the recipe has a guard.

    Raises:
        ConverterError: one of its children; a GuardError if no trial is within the limits.
    """
    recipe = settled(recipe)
    run = _Run.of(recipe, asked, settings)
    found = run.search(asked.trials)
    if not recipe.guard:
        return found
    chosen, (pairs, prose) = found.recipe, run.texts
    method = configure(chosen.method, chosen.options, run.bench.plan.dimensions, run.implied)
    run.bench.unload()  # the copy holds a model of its own
    bench = replace(run.bench, recipe=chosen)
    guard = fit_and_measure(bench, method, pairs, prose).guard
    return replace(found, record=with_kept(found.record, guard), guard=guard)


def search_recipe(recipe: Recipe, asked: SearchOptions, settings: Settings) -> Searched:
    """Search for the options of a conversion, whose own guard then measures the chosen edit.

    Raises:
        ConverterError: as ``search_model``.
    """
    run = _Run.of(settled(recipe), asked, settings)
    found = run.search(asked.trials)
    run.bench.unload()
    return found


def check_search(recipe: Recipe, settings: Settings) -> tuple[Source, Plan, list[Space]]:
    """Plan a search without reading a weight.

    Raises:
        SourceError, CheckpointError, OptionError: it cannot be done.
    """
    check_recipe(recipe)
    spaces, implied = [], output_of(recipe.output).implied
    for own in each_method(recipe):
        source, plan, _ = prepare(own)
        spaces.append(Space.of(own.method, own.options, implied, plan))
    device, spread = choose_device(recipe.device), recipe.device == "map"
    held_out_dtype(recipe.forward_dtype, plan, device)  # refuses what it cannot be
    dtype = choose_dtype(recipe.forward_dtype, plan, device)
    limit = settings.memory_limit
    forward = choose_forward(recipe.forward, plan, dtype, device, limit, spread=spread)
    forward.need_resident(WHY, HINT)
    return source, plan, spaces


def load_search_prompts(recipe: Recipe, asked: SearchOptions) -> Prompts | None:
    """The prompts that the model continues for a search, none of them the guard's; or None.

    Pairs that are drawn from the model's own continuations of the same prompts need none.

    Raises:
        DataError, SourceError: they cannot be read, or none are left.
    """
    origin = asked.search_prompts
    if origin == "none" or (recipe.pairs == SELF and origin == recipe.self_prompts):
        return None
    guards = load_headline_prompts(recipe).texts if recipe.prompts != "none" else ()
    return load_prompts(
        origin, None, recipe.seed, builtin="self_prompts.txt", most=MOST_PROMPTS, without=guards
    )


@dataclass(frozen=True, slots=True)
class _Run:
    """A search, ready to begin.

    Attributes:
        texts: the texts of the fit, before the split.
        implied: options of methods by the output.
        state: the bench and the trials.
    """

    texts: tuple[Pairs, Prose]
    implied: Mapping[str, str]
    state: Search

    @property
    def bench(self) -> Bench:
        return self.state.bench

    @classmethod
    def of(cls, recipe: Recipe, asked: SearchOptions, settings: Settings) -> "_Run":
        """Read and check everything. Raises ConverterError."""
        source, plan, spaces = check_search(recipe, settings)
        prompts = load_search_prompts(recipe, asked)
        words, device = load_words(recipe.word_list), choose_device(recipe.device)
        bench = Bench.of(recipe, source, plan, words, device, settings)
        pairs, prose = load_texts(bench)
        parts = split(pairs, prose, recipe.seed)
        first = min((space.places[0] for space in spaces if space.places), default=0)

        @cache
        def texts() -> SearchTexts:
            count = len(prompts.texts) if prompts else 0
            with progress.stage("draw", f"continuing {count} prompts of the search, unedited"):
                return SearchTexts(bench, parts.choose, prompts, first)

        known = {
            "search_version": _VERSION,
            "program": __version__,
            "files": dict(source.digests()),
            "recipe": {name: getattr(recipe, name) for name in _SHARED},
            "texts": [pairs.sha256, prose.sha256, words.sha256, prompts and prompts.sha256],
            "device": bench.device.partition(":")[0],
            "dtypes": [str(bench.dtype), str(bench.held_out)],
            "attention": bench.how.attention,
            "libraries": {name: version(name) for name in _LIBRARIES},
        }
        journal = cache_folder() / "searches" / f"{cache_key(known)}.log"
        implied = output_of(recipe.output).implied
        return cls((pairs, prose), implied, Search(bench, spaces, parts, texts, journal))

    def search(self, trials: int) -> Searched:
        """Run the trials and choose. Raises ConverterError."""
        state, recipe = self.state, self.bench.recipe
        with progress.stage("search", f"searching: {trials} trials of {recipe.method}"):
            try:
                tried = state.run(trials)
            except KeyboardInterrupt:
                progress.warn(
                    f"{len(state.tried)} of {trials} trials are kept; the same command goes on "
                    "from there"
                )
                raise
            record = record_of(tried, state.texts(), self.bench)
        chosen = record.chosen
        recipe = replace(recipe, method=chosen.method, options=chosen.options)
        return Searched(recipe, record, [each.trial for each in tried])


def as_typed(recipe: Recipe) -> str:
    """A recipe as a command line, without options that have their default."""
    words = ["gloss-convert", recipe.source, "DESTINATION"]
    for name, declared in declared_options(Recipe).items():
        value: Any = getattr(recipe, name)
        if name == "source" or value == declared.default:
            continue
        if declared.kind is dict:
            for key, text in value.items():
                words += [declared.flag, f"{key}={text}"]
        elif declared.kind is bool:
            words.append(declared.label if value else f"--no-{declared.label[2:]}")
        else:
            words += [declared.label, str(value)]
    return shlex.join(words)
