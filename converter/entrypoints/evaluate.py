"""Measure a model, what it was made from, and controls; or an edit before it is written."""

from dataclasses import replace
from pathlib import Path

from converter.calibration.word_list import load_words
from converter.checkpoints.names import MANIFEST
from converter.checkpoints.resolve import resolve
from converter.entrypoints.convert import prepare
from converter.entrypoints.delivery import Evaluate
from converter.errors import OptionError
from converter.evaluation.compare import evaluate
from converter.evaluation.fit import Fitted
from converter.evaluation.measure import load_battery, load_whole
from converter.evaluation.options import EvaluationOptions
from converter.evaluation.refusals import recorded_lesson
from converter.evaluation.systems import Comparison, System, edited_layers, parse_controls
from converter.hub.addresses import settled
from converter.manifest import EDITED, Evaluation
from converter.methods.base import Method
from converter.methods.workbench import Bench
from converter.models.resident import LanguageModel, choose_device
from converter.outputs.record_checks import edit_of, recorded_edit
from converter.recipe import Recipe, Settings
from converter.release.manifest import read_manifest


def evaluate_model(
    recipe: Recipe,
    comparison: Comparison,
    asked: EvaluationOptions,
    settings: Settings,
    edited: str | None,
    partial: Path | None = None,
) -> Evaluation:
    """Measure the source of a recipe, controls that are fitted on it, and what was made from it.

    Args:
        recipe: of the fits; its source is the unedited model.
        comparison: what is fitted and measured beside.
        asked: what is measured.
        settings: how this machine does it.
        edited: a model that was made from the source.
        partial: a file that is written anew after every system.

    Raises:
        ConverterError: one of its children says what is wrong.
    """
    if recipe.activations is not None:
        raise OptionError("--activations is of one draw of the pairs; gloss evaluate takes its own")
    recipe = settled(recipe)
    device = choose_device(recipe.device)
    battery = load_battery(asked, device, recipe.seed, settings.attention)
    source, plan, _ = prepare(recipe)
    words = load_words(recipe.word_list)
    bench = Bench.of(recipe, source, plan, words, device, settings)
    bench.forward.need_resident()
    model = reference = None
    if edited:
        model, reference = _load_edited(edited, bench)
    return evaluate(bench, battery, comparison, model, reference, partial)


def _load_edited(name: str, bench: Bench) -> tuple[LanguageModel, System]:
    """An edited model, and its edit if its manifest says what it is."""
    model = load_whole(name, bench.device, bench.dtype, replace(bench.how, trust_remote_code=False))
    if model.tokenizer.get_vocab() != bench.vocabulary.tokenizer.get_vocab():
        raise OptionError(
            f"{name} and --base have different tokenizers",
            hint="give the model that SOURCE was made from as --base",
        )
    folder = resolve(name).folder
    if not (folder / MANIFEST).is_file():
        return model, System(EDITED)
    manifest = read_manifest(folder)
    edit = edit_of(manifest, recorded_edit(folder, manifest))
    bias = any(tensor.role.endswith("_bias") for tensor in manifest.edited)
    strength, layers = manifest.choice.strength, tuple(manifest.layers)
    lesson = recorded_lesson(manifest)
    return model, System(EDITED, None, strength, edit, layers, bias, lesson=lesson)


def evaluation_of(
    asked: EvaluationOptions, controls: str, recipe: Recipe, settings: Settings
) -> Evaluate:
    """What a conversion that evaluates does between the fit and the writing.

    What is named is loaded now, so that whatever is missing is missed at once.
    """
    names = parse_controls(controls)
    battery = load_battery(asked, choose_device(recipe.device), recipe.seed, settings.attention)

    def run(bench: Bench, fitted: Fitted, method: Method) -> Evaluation:
        seed, strength = bench.recipe.seed, fitted.choice.strength
        comparison = Comparison(names, [seed], ())
        layers, bias = edited_layers(method, bench.plan)
        lesson = fitted.proposal.lesson
        reference = System(EDITED, seed, strength, fitted.edit, layers, bias, lesson=lesson)
        return evaluate(bench, battery, comparison, None, reference)

    return run
