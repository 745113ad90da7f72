"""Measure a model, what it was made from, and other systems; or an edit before it is written."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from converter.calibration.word_list import load_words
from converter.checkpoints.names import MANIFEST
from converter.checkpoints.resolve import resolve
from converter.checkpoints.source import Source
from converter.edits.base import Edit
from converter.entrypoints.convert import prepare
from converter.entrypoints.delivery import Evaluate
from converter.errors import OptionError
from converter.evaluation.compare import evaluate
from converter.evaluation.comparison import Comparison, parse_systems
from converter.evaluation.fit import Fitted
from converter.evaluation.measure import load_battery, load_whole
from converter.evaluation.options import EvaluationOptions
from converter.evaluation.refusals import recorded_lesson
from converter.evaluation.systems import CONTROLS, Fits, System, edited_layers
from converter.hub.addresses import settled
from converter.manifest import EDITED, Evaluation, Manifest
from converter.methods.base import Method
from converter.methods.typed import check_plain
from converter.methods.workbench import Bench
from converter.models.loading import load_tokenizer
from converter.models.resident import LanguageModel, choose_device
from converter.outputs.base import output_of
from converter.outputs.record_checks import edit_of, recorded_edit
from converter.recipe import Recipe, Settings, without_folders
from converter.release.manifest import read_manifest
from converter.release.recording import read_recording
from converter.runtime import progress


def evaluate_model(
    recipe: Recipe,
    comparison: Comparison,
    asked: EvaluationOptions,
    settings: Settings,
    edited: str | None,
    results: Path | None = None,
) -> Evaluation:
    """Measure the source of a recipe, what was made from it, and what is fitted on it.

    Args:
        recipe: of the fits; its source is the unedited model. Options of a method that is not its
            own have that method's name before them.
        comparison: what is measured beside.
        asked: what is measured.
        settings: how this machine does it.
        edited: a model that was made from the source.
        results: a file that is written anew after every system.

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
    given = [_made(edited, EDITED, bench)] if edited else []
    given += _others(comparison, bench)
    return evaluate(bench, battery, comparison, given, results)


def _check_plain(recipe: Recipe, comparison: Comparison) -> None:
    """Refuse options without a method's name if their method, --method, is not measured.

    Where a control is, they say what it is a control of: then it is a warning. Where nothing is
    fitted, they are those of a conversion, whose recipe this is.

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
    """The systems that are in folders, manifests and repos, by the names of these."""
    return [_made(place, without_folders(place), bench) for place in comparison.places]


def _made(place: str, name: str, bench: Bench) -> System:
    """A model that was made from the unedited one, with its weights; an adapter, or a manifest by
    itself, is what it says, through hooks.

    Raises:
        ConverterError: one of its children; it has another tokenizer, or an edit by itself is one
            of other weights.
    """
    path, recording = Path(place), None
    is_folder = (path / MANIFEST).is_file()
    if (is_folder and not output_of(read_manifest(path).run.output).has_shards) or (
        path.is_file() and path.suffix == Path(MANIFEST).suffix
    ):
        recording = read_recording(path)
    if recording is not None:
        if not _is_source_of(recording.manifest, bench.source):
            raise OptionError(
                f"{place} is an edit of other weights than those of {bench.source.name}",
                hint="give the model that it was made from as --base",
            )
        return _recorded(name, recording.manifest, recording.edit(bench.plan), None)
    how, folder = replace(bench.how, trust_remote_code=False), resolve(place).folder
    if load_tokenizer(folder).get_vocab() != bench.vocabulary.tokenizer.get_vocab():
        raise OptionError(
            f"{place} and --base have different tokenizers",
            hint="give the model that SOURCE was made from as --base",
        )
    load = partial(load_whole, place, bench.device, bench.dtype, how)
    if not (folder / MANIFEST).is_file():
        return System(name, load=load)
    manifest = read_manifest(folder)
    if not _is_source_of(manifest, bench.source):
        progress.warn(
            f"{name} was made from other weights than those of {bench.source.name}, so what is "
            "measured is not the effect of its edit alone"
        )
    return _recorded(name, manifest, edit_of(manifest, recorded_edit(folder, manifest)), load)


def _is_source_of(manifest: Manifest, source: Source) -> bool:
    """Whether the weights of a source are those that a manifest's edit was made for."""
    weights = {*source.shards, *(path.name for path in source.originals)}
    found = {digest for name, digest in source.digests().items() if name in weights}
    return found <= {file.sha256 for file in manifest.source.all_files.values()}


def _recorded(
    name: str, manifest: Manifest, edit: Edit, load: Callable[[], LanguageModel] | None
) -> System:
    """What a manifest says of its edit."""
    bias = any(tensor.role.endswith("_bias") for tensor in manifest.edited)
    strength, layers = manifest.choice.strength, tuple(manifest.layers)
    lesson = recorded_lesson(manifest)
    return System(name, None, strength, edit, load, layers, bias, lesson=lesson)


def own_recipe(recipe: Recipe, systems: Sequence[str]) -> Recipe:
    """A recipe without the options of systems that are measured beside its edit.

    Raises OptionError; see ``typed_for``.
    """
    comparison = Comparison(parse_systems(systems), [recipe.seed])
    return replace(recipe, options=comparison.typed(recipe.method, recipe))


def evaluation_of(
    asked: EvaluationOptions, systems: Sequence[str], recipe: Recipe, settings: Settings
) -> Evaluate:
    """What a conversion that evaluates does between the fit and the writing.

    What is named is loaded now, so that whatever is missing is missed at once, and systems that
    could not be fitted are refused when it is given the bench, before its model is loaded.

    Args:
        recipe: of the conversion, whose options may also be of the systems; see ``own_recipe``.
    """
    names, options = parse_systems(systems), recipe.options
    device = choose_device(recipe.device)
    battery = load_battery(asked, recipe.prompts, device, recipe.seed, settings.attention)

    comparison = Comparison(names, [recipe.seed])

    def prepared(bench: Bench) -> Callable[[Fitted, Method], Evaluation]:
        def run(fitted: Fitted, method: Method) -> Evaluation:
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
