"""What is wrong with what was asked for, as far as it shows before a model library is loaded.

Loading torch and transformers takes seconds, and a mistake is told in less. So nothing that is
imported here imports them, and everything that is wrong is found in one go. What passes is checked
again where it is used, with what is known there.
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
from converter.errors import CheckpointError, DestinationError, Faults, OptionError, SourceError
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
from converter.hub.addresses import model_place, parse_address, repo_named, snapshot_of
from converter.methods.known import METHODS, SEPARATOR, MethodOption, described
from converter.methods.options import parse_factors, parse_layers, parse_value
from converter.methods.typed import share_out
from converter.outputs.destination import check_destination, check_folder
from converter.outputs.known import OUTPUTS
from converter.recipe import SELF, Recipe, Settings
from converter.runtime.extras import need
from converter.text import did_you_mean, readable

_MANY = 10_000
"""Layers, where it is not known how many a model has."""


def look_at_recipe(
    recipe: Recipe, settings: Settings, faults: Faults, *, asks_hub: bool = True
) -> None:
    """Look at all that a recipe names: method and options, source, texts, device, packages.

    Args:
        recipe, settings: as asked for.
        faults: gets what is wrong.
        asks_hub: whether a source on the Hub is looked at.
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
                "--no-keep-source", expected="a source on the Hub", found=recipe.source
            )


def _is_papers_fusion(recipe: Recipe) -> bool:
    """Whether a method may use a calibration model that is given."""
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
    """Look at methods and their options, as far as they are our own.

    Args:
        method: as typed.
        options: as typed.
        layers: of the model; None if it is not known how many.
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
        return  # a package says itself what its options are
    for typed, text in options.items():
        with faults:
            _check_option(names, typed, text, layers)


def _check_option(names: Sequence[str], typed: str, text: str, layers: int | None) -> None:
    """Raise OptionError if none of some methods has an option, or its value is none."""
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
    """A hint which methods have an option."""
    owners = [name for name, each in described().items() if key in each.options]
    return f"it is an option of {' and '.join(owners)}" if owners else None


def check_value(key: str, text: str, option: MethodOption, layers: int | None) -> None:
    """Raise OptionError if what was typed is no value of an option of a method."""
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
    """Look at the files of texts that a recipe names; what is on the Hub is not asked for."""
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
    """Look at the names and the config of a source, not at its weights.

    Returns:
        the number of its layers; None if that is not known.
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
            parse_address(source, "model")  # refuses what is no name of a repo
            if asks_hub:
                _look_at_repo(source, subfolder, faults, found)
    return found[0]


def _is_file(path: Path) -> bool:
    try:
        return path.exists() and not path.is_dir()
    except OSError as error:
        raise SourceError(f"{str(path)[:80]} cannot be read", found=error.strerror) from error


def _look_at_folder(
    source: str, place: Path, top: Path | None, faults: Faults, found: list[int | None]
) -> None:
    """See ``look_at_source``, whose answer goes into ``found``."""
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
    if ELSEWHERE in sizes:  # an adapter, which needs no more to be refused
        choose_weights(name, place, sizes.keys())
    with faults:
        choose_weights(name, place, sizes.keys())
    _look_at_config(name, sizes.keys(), place / "config.json", faults, found)


def _look_at_repo(source: str, subfolder: str, faults: Faults, found: list[int | None]) -> None:
    from converter.hub import repos as hub  # half a second, which others need not take

    repo = hub.resolve("model", source)
    inside = f"{subfolder.strip('/')}/" if subfolder else ""
    sizes = {n.removeprefix(inside): s for n, s in repo.sizes.items() if n.startswith(inside)}
    if not sizes or is_native(sizes.keys()):
        return  # offline, or no such folder, as ``resolve`` says
    refuse_other_kinds(repo.repo_id, sizes)
    check_sizes(sizes)
    folder = Path()
    if "config.json" in sizes:
        folder = hub.download(repo, [f"{inside}config.json"], first=True) / inside
    _look_at_config(repo.repo_id, sizes.keys(), folder / "config.json", faults, found)


def _look_at_config(
    name: str, files: Iterable[str], path: Path, faults: Faults, found: list[int | None]
) -> None:
    """Look at the config among some files, and whether there is a tokenizer."""
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
    """The number of layers that a config names in the usual way."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        count = part.get("num_hidden_layers", part.get("n_layer"))
        if type(count) is int and 0 < count < _MANY:
            return count
    return None


def look_at_destination(recipe: Recipe, destination: Path, overwrite: bool, faults: Faults) -> None:
    """Look whether a folder can be written; not at one that may hold the result already."""
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


def look_at_plots(plots: Path | None, destination: Path | None, faults: Faults) -> None:
    """Look whether pictures can be drawn, and into that folder."""
    if plots is None:
        return
    with faults:
        need("--plots", "matplotlib")
    if destination is None or not plots.resolve().is_relative_to(destination.resolve()):
        with faults:
            check_folder(plots)


def look_at_key(key: Path | None, faults: Faults) -> None:
    """Look whether there is a key to sign with, and what signs."""
    if key is None:
        return
    with faults:
        need("--sign", "model_signing")
    with faults:
        try:
            key.open("rb").close()
        except OSError as error:
            raise OptionError(f"--sign {key.name} cannot be read", found=error.strerror) from error


def look_at_evaluation(asked: EvaluationOptions, prompts: str, faults: Faults) -> None:
    """Look at what an evaluation measures with: files and packages."""
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
    """Look at what a search needs beside a recipe.

    Args:
        what: names the search.
        recipe: whose methods are searched one beside the other.
        asked: as asked for.
        faults: gets what is wrong.

    Returns:
        the recipe with the methods joined as in one edit, whose names and options are right if
        those of a search are.
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
    """Look whether a model is there that is named by a path, by how it is written."""
    with faults:
        if place.startswith(("/", ".", "~")) and not os.path.exists(place):  # noqa: PTH110
            raise SourceError(f"{what}{place} does not exist", hint="check the path")


def look_at_systems(compared: Comparison, recipe: Recipe, faults: Faults) -> None:
    """Look at the methods that are fitted beside each other, and the places of other systems."""
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
