"""Measure a model, its edited copy and other systems; or an edit before it is written."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from converter.calibration.word_list import load_words
from converter.entrypoints.convert import prepare
from converter.entrypoints.delivery import Evaluate
from converter.entrypoints.made import made
from converter.errors import OptionError
from converter.evaluation.compare import evaluate
from converter.evaluation.comparison import Comparison, parse_systems
from converter.evaluation.fit import Fitted
from converter.evaluation.measure import load_battery
from converter.evaluation.options import EvaluationOptions
from converter.evaluation.systems import CONTROLS, Fits, System, edited_layers
from converter.hub.addresses import settled
from converter.manifest import EDITED, Evaluation
from converter.methods.base import Method
from converter.methods.typed import check_plain
from converter.methods.workbench import Bench
from converter.models.resident import choose_device
from converter.recipe import Recipe, Settings, without_folders
from converter.runtime import progress


def evaluate_model(
    recipe: Recipe,
    comparison: Comparison,
    asked: EvaluationOptions,
    settings: Settings,
    edited: str | None,
    results: Path | None = None,
    continuations: Path | None = None,
) -> Evaluation:
    """Measure the source of a recipe, its edited copy, and methods fitted to it.

    Args:
        recipe: of the fits; its source is the unedited model. Options of other methods begin with
            the method's name.
        comparison: the other systems to measure.
        asked: what to measure.
        settings: how this machine does it.
        edited: a model made from the source.
        results: a file that is rewritten after every system.
        continuations: a file for the data behind the numbers; see ``evaluation.rows``.

    Raises:
        ConverterError: one of its children says what is wrong.
    """
    if recipe.activations is not None:
        raise OptionError("--activations is of one draw of the pairs; gloss evaluate takes its own")
    recipe = settled(recipe)
    _check_plain(recipe, comparison)
    device = choose_device(recipe.device)
    battery = load_battery(asked, recipe.prompts, device, recipe.seed, settings.attention)
    own = replace(recipe, options=comparison.typed(recipe.method, recipe))
    source, plan, _ = prepare(own)
    words = load_words(recipe.word_list)
    bench = Bench.of(recipe, source, plan, words, device, settings)
    bench.forward.need_resident()
    given = [made(edited, EDITED, bench)] if edited else []
    given += _others(comparison, bench)
    with bench.keeping():
        return evaluate(bench, battery, comparison, given, results, continuations)


def _check_plain(recipe: Recipe, comparison: Comparison) -> None:
    """Refuse options without a method's name if the method of --method is not measured.

    If a control is measured, such options define what it is a control of: then it is only a
    warning. If nothing is fitted, the options belong to a conversion with this recipe.

    Raises OptionError; see ``check_plain``.
    """
    methods = [system.methods for system in comparison.fitted]
    if not methods:
        return
    try:
        check_plain(recipe.options, recipe.method, methods)
    except OptionError as error:
        if not {*CONTROLS} & {*methods}:
            raise
        progress.warn(f"{error}; nothing but the layers and biases of controls follows from it")


def _others(comparison: Comparison, bench: Bench) -> list[System]:
    """The systems in folders, manifests and repos, by their places."""
    return [made(place, without_folders(place), bench) for place in comparison.places]


def own_recipe(recipe: Recipe, systems: Sequence[str]) -> Recipe:
    """A recipe without the options of the other systems that are measured.

    Raises OptionError; see ``typed_for``.
    """
    comparison = Comparison(parse_systems(systems), [recipe.seed])
    return replace(recipe, options=comparison.typed(recipe.method, recipe))


def evaluation_of(
    asked: EvaluationOptions, systems: Sequence[str], recipe: Recipe, settings: Settings
) -> Evaluate:
    """The evaluation of a conversion, between the fit and the writing.

    Scorers and texts are loaded now, so that a missing one is reported at once. Systems that cannot
    be fitted are refused when the evaluation gets the bench, before its model is loaded.

    Args:
        recipe: of the conversion, whose options may also be of the systems; see ``own_recipe``.
    """
    names, options = parse_systems(systems), recipe.options
    device = choose_device(recipe.device)
    battery = load_battery(asked, recipe.prompts, device, recipe.seed, settings.attention)

    comparison = Comparison(names, [recipe.seed])

    def prepared(bench: Bench) -> Callable[[Fitted, Method], Evaluation]:
        def run(fitted: Fitted, method: Method) -> Evaluation:
            bench.unload()  # the copy holds a model of its own
            own = replace(bench, recipe=replace(bench.recipe, options=options))
            strength, lesson = fitted.choice.strength, fitted.proposal.lesson
            layers, bias = edited_layers(method, bench.plan, fitted.edit)
            edit = System(
                EDITED, recipe.seed, strength, fitted.edit, None, layers, bias, lesson=lesson
            )
            return evaluate(own, battery, comparison, [edit, *_others(comparison, own)])

        Fits(replace(bench, recipe=replace(bench.recipe, options=options)), comparison).check(None)
        return run

    return prepared
