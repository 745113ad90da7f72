"""Find mistakes in a request before a model library is loaded.

Loading torch and transformers takes seconds. A mistake is reported in less. So this module must not
import them, even indirectly. It finds all mistakes in one pass. Every value is checked again where
it is used, with what is known there.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from converter.calibration.datasets import FORMATS as PAIR_FORMATS
from converter.calibration.datasets import is_dataset
from converter.calibration.instances import FORMATS as INSTANCE_FORMATS
from converter.calibration.instances import load_instances
from converter.calibration.pairs import check_drawn, check_num_pairs, load_pairs, load_prose
from converter.calibration.word_list import load_words
from converter.checkpoints.architectures.kind import allow_own_code, brings_code, check_kind
from converter.checkpoints.folder import list_files
from converter.checkpoints.inventory import choose_weights
from converter.checkpoints.layout import (
    MAX_CONFIG,
    check_config,
    check_sizes,
    read_json,
    refuse_other_kinds,
)
from converter.checkpoints.names import ELSEWHERE, MANIFEST, TOKENIZER, is_native
from converter.errors import (
    CheckpointError,
    DestinationError,
    Faults,
    OptionError,
    SourceError,
    VerificationError,
)
from converter.evaluation.comparison import Comparison, naming
from converter.evaluation.known import SCORERS, check_scorer
from converter.evaluation.options import EvaluationOptions, SearchOptions
from converter.evaluation.prompts import FORMATS as PROMPT_FORMATS
from converter.evaluation.prompts import load_prompts
from converter.evaluation.searchable import (
    BETWEEN,
    HINT,
    WHY,
    check_aim,
    check_beside,
    check_recipe,
    names_of,
)
from converter.hub.addresses import (
    model_place,
    parse_address,
    repo_named,
    snapshot_of,
)
from converter.hub.store_addresses import is_store
from converter.methods.known import METHODS, SEPARATOR, MethodOption, described
from converter.methods.options import parse_factors, parse_layers, parse_value
from converter.methods.typed import share_out
from converter.outputs.destination import check_destination, check_folder
from converter.outputs.known import OUTPUTS
from converter.recipe import SELF, LocalInputs, Recipe, Settings
from converter.release.reading import find_edit, read_manifest, recorded_recipe
from converter.runtime.extras import need
from converter.text import did_you_mean, readable

_MANY = 10_000
"""The number of layers if the model's is not known."""


def look_at_recipe(
    recipe: Recipe, settings: Settings, faults: Faults, *, asks_hub: bool = True
) -> None:
    """Check a recipe: method and options, source, texts, device, packages.

    Args:
        recipe, settings: as asked for. faults: collects the mistakes.
        asks_hub: whether to check a source on the Hub.
    """
    layers = look_at_source(recipe, faults, asks_hub=asks_hub)
    with faults:
        OUTPUTS.need(recipe.output)
    look_at_method(recipe.method, recipe.options, layers, faults)
    look_at_texts(recipe, faults)
    with faults:
        if recipe.base_model is not None:
            repo_named("--base-model", recipe.base_model)
    with faults:
        _check_device(recipe.device)
    with faults:
        if settings.engine == "ray":
            need("--engine ray", "ray")
    with faults:
        if recipe.self_scorer is not None and recipe.pairs == SELF:
            check_scorer(recipe.self_scorer, "--self-scorer")
    with faults:
        if recipe.calibration is not None and not _is_papers_fusion(recipe):
            raise OptionError(
                "--calibration", expected="--method fusion -o form=paper", found=recipe.method
            )
    with faults:
        if not settings.keep_source and os.path.exists(recipe.source):  # noqa: PTH110
            raise OptionError(
                "--no-keep-source",
                expected="a source on the Hub or in a store",
                found=recipe.source,
            )


def _is_papers_fusion(recipe: Recipe) -> bool:
    """Whether a method can use a given calibration model."""
    named = {*recipe.method.split(SEPARATOR)}
    return bool(named - {*described()}) or ("fusion" in named and _has_papers_form(recipe))


def _has_papers_form(recipe: Recipe) -> bool:
    return "paper" in (recipe.options.get("form"), recipe.options.get("fusion.form"))


def _check_device(device: str) -> None:
    kind, _, number = device.partition(":")
    known = device in ("auto", "map", "cpu", "cuda") or (kind == "cuda" and number.isdigit())
    if not known:
        raise OptionError("--device", expected="auto, map, cpu, cuda or cuda:n", found=device)
    if device == "map":
        need("--device map", "accelerate")


def look_at_method(
    method: str, options: Mapping[str, str], layers: int | None, faults: Faults
) -> None:
    """Check methods and their options, if the methods are built in.

    Args:
        method: as typed.
        options: as typed.
        layers: number of the model's layers; None if it is not known.
        faults: gets what is wrong.
    """
    names = method.split(SEPARATOR)
    known = True
    for name in names:
        with faults:
            known = False
            METHODS.need(name)
            known = True
    if len({*names}) < len(names):
        with faults:
            raise OptionError("--method", expected="different methods", found=method)
        return
    if not known or {*names} - {*described()}:
        return  # the options of a package are only known from its code
    for typed, text in options.items():
        with faults:
            _check_option(names, typed, text, layers)


def _check_option(names: Sequence[str], typed: str, text: str, layers: int | None) -> None:
    """Raise OptionError if none of the methods has an option, or its value is invalid."""
    known = {name: described()[name].options for name in names}
    every = {key for options in known.values() for key in options}
    key = typed.rpartition(".")[2] if len(names) > 1 else typed
    if key not in every:
        raise OptionError(
            f"-o {typed}: method {SEPARATOR.join(names)}", expected=", ".join(sorted(every)),
            found=typed, hint=did_you_mean(key, every) or _owner(key),
        )  # fmt: skip
    if len(names) > 1:
        shared = share_out({name: {*own} for name, own in known.items()}, {typed: text})
        names = [name for name in names if shared[name]]
    check_value(key, text, known[names[0]][key], layers)


def _owner(key: str) -> str | None:
    """A hint that names the methods with an option."""
    owners = [name for name, each in described().items() if key in each.options]
    return f"it is an option of {' and '.join(owners)}" if owners else None


def check_value(key: str, text: str, option: MethodOption, layers: int | None) -> None:
    """Raise OptionError if a typed value is invalid for an option of a method."""
    if option.kind == "layers":
        parse_layers(key, text, layers or _MANY)
    elif option.kind == "factors":
        parse_factors(key, text, layers or _MANY)
    elif option.choices and text not in option.choices:
        hint = did_you_mean(text, option.choices)
        raise OptionError(f"-o {key}", expected=" or ".join(option.choices), found=text, hint=hint)
    elif option.kind != "choice":
        value = parse_value(key, text, option.hint)
        if option.least is not None and value is not None and value < option.least:
            raise OptionError(f"-o {key}", expected=f"at least {option.least:g}", found=text)


def look_at_texts(recipe: Recipe, faults: Faults) -> None:
    """Check the files of texts that a recipe names, except those on the Hub."""
    local = recipe.pairs != SELF and not is_dataset(recipe.pairs, PAIR_FORMATS)
    reads = local and (recipe.pairs != "builtin" or recipe.num_pairs is not None)
    words = None
    with faults:
        if reads or recipe.word_list != "builtin":
            words = load_words(recipe.word_list)
    with faults:
        if recipe.neutral != "builtin":
            load_prose(recipe.neutral)
    with faults:
        check_drawn(recipe)
    with faults:
        check_num_pairs(recipe.num_pairs)
        if words is not None and reads:
            load_pairs(recipe.pairs, words, recipe.num_pairs, recipe.seed)
    with faults:
        if recipe.prompts not in ("none", "builtin"):
            _look_at_prompts(recipe.prompts)
    with faults:
        if recipe.self_prompts != "builtin" and recipe.pairs == SELF:
            _look_at_prompts(recipe.self_prompts)
    with faults:
        given = recipe.instances
        known = [described().get(name) for name in recipe.method.split(SEPARATOR)]
        wanted = given != "builtin" and any(not each or each.aim == "defence" for each in known)
        if wanted and not is_dataset(given, INSTANCE_FORMATS):
            load_instances(given)


def _look_at_prompts(origin: str) -> None:
    there = os.path.exists(origin)  # noqa: PTH110
    place = origin if there else origin.partition("#")[0]
    if not is_dataset(place, PROMPT_FORMATS):
        load_prompts(origin, None, 0)


def look_at_source(recipe: Recipe, faults: Faults, *, asks_hub: bool = True) -> int | None:
    """Check the names and the config of a source, but not its weights.

    Returns:
        its number of layers; None if it is not known.
    """
    allow_own_code(recipe.trust_remote_code)
    found: list[int | None] = [None]
    with faults:
        if not recipe.source.strip():
            raise SourceError("SOURCE is empty", expected="a folder, a file, a repo id, or demo")
        source, subfolder = model_place(recipe.source, recipe.subfolder)
        path = Path(source)
        if source == "demo":
            return None
        if _is_file(path):
            if not source.lower().endswith(".gguf"):
                raise SourceError(
                    f"{source} is a file",
                    expected="a folder with a checkpoint, a .gguf file or a repo id",
                    hint="give the folder that it is in",
                )
            need(f"the GGUF file {path.name}", "gguf")
            return None
        if path.is_dir():
            if not (path / subfolder).is_dir():
                raise SourceError(f"{source} has no folder {subfolder}", hint="check --subfolder")
            top = path if subfolder else None
            _look_at_folder(recipe.source, path / subfolder, top, faults, found)
        else:
            if not is_store(source):
                parse_address(source, "model")  # refuses an invalid name of a repo
            if asks_hub:
                _look_at_remote(source, subfolder, faults, found)
    return found[0]


def _is_file(path: Path) -> bool:
    try:
        return path.exists() and not path.is_dir()
    except OSError as error:
        raise SourceError(f"{str(path)[:80]} cannot be read", found=error.strerror) from error


def _look_at_folder(
    source: str, place: Path, top: Path | None, faults: Faults, found: list[int | None]
) -> None:
    """See ``look_at_source``; the result goes into ``found``."""
    try:
        sizes = list_files(place, top)
    except OSError as error:
        raise SourceError(f"{source[:80]} cannot be read", found=error.strerror) from error
    kept = snapshot_of(place)
    name = kept.repo_id if kept else readable(place.resolve().name)
    if not sizes:
        return  # ``resolve`` says what an empty folder may be
    refuse_other_kinds(name, sizes)
    check_sizes(sizes)
    if is_native(sizes.keys()):
        return
    if ELSEWHERE in sizes:  # an adapter, which is refused for its name alone
        choose_weights(name, place, sizes.keys())
    with faults:
        choose_weights(name, place, sizes.keys())
    _look_at_config(name, sizes.keys(), place / "config.json", faults, found)


def _look_at_remote(source: str, subfolder: str, faults: Faults, found: list[int | None]) -> None:
    from converter.hub.remotes import find_remote  # the import takes half a second

    remote = find_remote(source)
    inside = f"{subfolder.strip('/')}/" if subfolder else ""
    sizes = {n.removeprefix(inside): s for n, s in remote.sizes.items() if n.startswith(inside)}
    if not sizes or is_native(sizes.keys()):
        return  # offline, or no such folder, as ``resolve`` says
    refuse_other_kinds(remote.name, sizes)
    check_sizes(sizes)
    folder = Path()
    if "config.json" in sizes:
        folder = remote.download([f"{inside}config.json"], first=True) / inside
    _look_at_config(remote.name, sizes.keys(), folder / "config.json", faults, found)


def _look_at_config(
    name: str, files: Iterable[str], path: Path, faults: Faults, found: list[int | None]
) -> None:
    """Check the config among some files, and that there is a tokenizer."""
    files = {*files}
    if not TOKENIZER & files:
        with faults:
            raise CheckpointError(
                f"{name} has no tokenizer", expected="tokenizer.json or the like beside the weights"
            )
    if "config.json" not in files:
        raise CheckpointError(f"{name} has no config.json", hint="give a complete checkpoint")
    config = read_json(path, MAX_CONFIG)
    check_config(config)
    check_kind(config, brings_code(config))
    found[0] = _layers(config)


def _layers(config: Mapping[str, Any]) -> int | None:
    """The number of layers by the usual keys of a config."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        count = part.get("num_hidden_layers", part.get("n_layer"))
        if type(count) is int and 0 < count < _MANY:
            return count
    return None


def look_at_destination(recipe: Recipe, destination: Path, overwrite: bool, faults: Faults) -> None:
    """Check that a folder can be written, unless it may hold the result already."""
    there = os.path.exists(recipe.source)  # noqa: PTH110 - pathlib's raises if the name is too long
    inputs = [Path(recipe.source)] if there else []
    with faults:
        try:
            done = (destination / MANIFEST).is_file()
        except OSError as error:
            raise DestinationError(
                f"destination {str(destination)[:80]} cannot be reached", found=error.strerror
            ) from error
        if not done:
            check_destination(destination, overwrite, inputs, 0)


def look_at_store(address: str, folder: Path, faults: Faults) -> None:
    """Ask a store whether a result can be uploaded to an address.

    Args:
        address: of ``store_address``.
        folder: with the result, if an earlier run has made it; then some of it may be there.
        faults: gets what is wrong.
    """
    from converter.hub.store_uploads import check_empty  # the import takes half a second

    with faults:
        made = folder.rglob("*") if (folder / MANIFEST).is_file() else ()
        check_empty(address, {path.relative_to(folder).as_posix() for path in made})


def look_at_plots(plots: Path | None, destination: Path | None, faults: Faults) -> None:
    """Check that pictures can be drawn, and into that folder."""
    if plots is None:
        return
    with faults:
        need("--plots", "matplotlib")
    if destination is None or not plots.resolve().is_relative_to(destination.resolve()):
        with faults:
            check_folder(plots)


def look_at_key(key: Path | None, faults: Faults) -> None:
    """Check that there is a key and the package that signs."""
    _look_at_file_of_key("--sign", key, faults)


def _look_at_file_of_key(option: str, key: Path | None, faults: Faults) -> None:
    if key is None:
        return
    with faults:
        need(option, "model_signing")
    with faults:
        try:
            key.open("rb").close()
        except OSError as error:
            raise OptionError(
                f"{option} {key.name} cannot be read", found=error.strerror
            ) from error


def look_at_evaluation(asked: EvaluationOptions, prompts: str, faults: Faults) -> None:
    """Check the files and packages of an evaluation."""
    scores = prompts != "none" and (asked.greedy or asked.samples > 0)
    for name in asked.scorers if scores else ():
        with faults:
            check_scorer(name, SCORERS.option)
    if scores:
        with faults:
            need("fluency", "nltk")
    with faults:
        if asked.safeedit:
            check_scorer(asked.safety_classifier, "--safety-classifier")
    with faults:
        if asked.ability:
            need("--ability", "lm_eval")


def look_at_search(what: str, recipe: Recipe, asked: SearchOptions, faults: Faults) -> Recipe:
    """Check what a search needs besides a recipe.

    Args:
        what: the name of the search in messages.
        recipe: with the methods to search.
        asked: as asked for.
        faults: gets what is wrong.

    Returns:
        the recipe with its methods joined as for one edit, so that the usual checks apply to names
        and options.
    """
    names = list(dict.fromkeys(re.split(f"[{BETWEEN}{SEPARATOR}]", recipe.method)))
    with faults:
        need(what, "optuna")
    with faults:
        check_recipe(recipe)
    with faults:
        if recipe.forward == "streamed":
            raise OptionError(
                f"{WHY} the whole model must be in memory", found="--forward streamed", hint=HINT
            )
    with faults:
        names_of(recipe)
    for name in names:
        known = described().get(name)
        with faults:
            check_aim(name, known.aim if known else "")
    with faults:
        check_beside("fusion", "fusion" in names and _has_papers_form(recipe))
    with faults:
        if asked.search_prompts not in ("none", "builtin"):
            _look_at_prompts(asked.search_prompts)
    return replace(recipe, method=SEPARATOR.join(names))


def look_at_place(what: str, place: str, faults: Faults) -> None:
    """Check that a model named by a path exists."""
    with faults:
        if place.startswith(("/", ".", "~")) and not os.path.exists(place):  # noqa: PTH110
            raise SourceError(f"{what}{place} does not exist", hint="check the path")


def look_at_systems(compared: Comparison, recipe: Recipe, faults: Faults) -> None:
    """Check the methods of an evaluation, and the places of other systems."""
    for spec in compared.fitted:
        within = Faults()
        with within:
            typed = compared.typed(spec.methods, recipe)
            look_at_method(spec.methods, {**typed, **spec.options}, None, within)
        for error in within.found:
            with faults, naming(spec):
                raise error
    for place in compared.places:
        look_at_place("--system ", place, faults)


def look_at_public_key(key: Path | None, faults: Faults) -> None:
    """Look whether there is a key to check a signature with, and what checks it."""
    _look_at_file_of_key("--key", key, faults)


def look_at_finished(folder: Path, doing: str, faults: Faults) -> None:
    """Look whether a folder has a manifest that can be read.

    Args:
        folder: what a conversion has written.
        doing: what cannot be done otherwise, such as ``published``.
        faults: gets what is wrong.
    """
    with faults:
        try:
            read_manifest(folder)
        except VerificationError as error:
            raise VerificationError(
                f"{folder.name} is not {doing}, for it is not whole", found=str(error)
            ) from error


def look_at_replay(
    manifest: Path, given: LocalInputs, destination: Path, faults: Faults, *,
    refit: bool, overwrite: bool,
) -> None:  # fmt: skip
    """Look at a recorded run: its manifest and edit, where its inputs are, the destination."""
    with faults:
        _, recorded, _, _ = find_edit(manifest)
        recipe = recorded_recipe(recorded, given, refit=refit)
        with faults:
            OUTPUTS.need(recipe.output)
        for name in recipe.method.split(SEPARATOR) if refit else ():
            with faults:
                METHODS.need(name)
        if refit:
            look_at_texts(recipe, faults)
        look_at_place("--source ", recipe.source, faults)
        look_at_destination(recipe, destination, overwrite, faults)
