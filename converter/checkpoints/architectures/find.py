"""The architecture of a checkpoint by its config: a data file's hints, inference, and the proof.

A data file is a TOML file beside this module for one ``model_type``. It is needed only if inference
fails. ``blocks`` names the list of decoder layers, ``ffns`` the feed-forward networks in a layer.
The proof is the same.
"""

import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from functools import cache, lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from converter.checkpoints.architectures import library
from converter.checkpoints.architectures.architecture import Architecture
from converter.checkpoints.architectures.inference import NO_FFN, Hints, infer
from converter.checkpoints.architectures.kind import (
    ENCODER,
    ENCODER_DECODER,
    NO_LANGUAGE_MODEL,
    brings_code,
    check_kind,
    not_text,
)
from converter.checkpoints.architectures.known_models import AUTO_CLASSES, model_types
from converter.checkpoints.architectures.proof import prove
from converter.checkpoints.architectures.tiny import NoTinyModelError
from converter.errors import CheckpointError
from converter.text import describe_value

_FOLDER = files("converter").joinpath("checkpoints/architectures")

_DRAFT = "gloss architectures --infer SOURCE prints a draft of the data file that would settle it"

_MAX_LAYERS = 10_000
"""The most layers; the deepest models have a few hundred."""


def find_architecture(config: Mapping[str, Any], folder: Path | None = None) -> Architecture:
    """Describe a model by its parsed ``config.json``, and prove the description.

    Args:
        config: of the checkpoint.
        folder: of the file, for code of its own; see ``kind.allow_own_code``.

    Raises:
        CheckpointError: the model does not continue text, transformers does not know it, or the
            description cannot be made or proved.
    """
    own = _with_own_code(config, folder)
    return _proved(json.dumps(config, sort_keys=True, default=str), str(own) if own else None)


def find_renaming(config: Mapping[str, Any], folder: Path | None = None) -> library.Renaming:
    """Tensor of a checkpoint -> the weight of the model that it makes. Raises as
    ``find_architecture``.
    """
    read, trusted = _read(config, _with_own_code(config, folder))
    kind, _ = _class_of(config, read, trusted)
    return library.Renaming(library.on_meta(kind, read))


def _with_own_code(config: Mapping[str, Any], folder: Path | None) -> Path | None:
    """The folder, if code in it may run and is that of a model."""
    return folder if brings_code(config) else None


@lru_cache(maxsize=256)
def _proved(text: str, folder: str | None) -> Architecture:
    config = json.loads(text)
    read, trusted = _read(config, Path(folder) if folder else None)
    kind, auto_class = _class_of(config, read, trusted)
    hints, by = hints_of(config["model_type"])
    try:
        model = library.on_meta(kind, read)
    except Exception as error:  # a class may raise anything on a config
        raise CheckpointError(
            f"{kind.__name__} cannot be built from config.json",
            found=_first_line(error),
            hint="install the package that it asks for"
            if isinstance(error, ImportError)
            else "check that the source loads with from_pretrained",
        ) from error
    try:
        inferred = infer(kind, read, auto_class, hints, model)
        return replace(inferred.architecture, proof=prove(inferred, by))
    except Exception as error:  # ours are ValueErrors; a class may raise anything
        settled = not isinstance(error, NoTinyModelError) and str(error) != NO_FFN
        raise CheckpointError(
            f"the architecture of {kind.__name__} is not known",
            expected="a feed-forward network in its layers that can be found and proved",
            found=_first_line(error),
            hint=_DRAFT if settled else None,
        ) from error


def _read(config: Mapping[str, Any], folder: Path | None) -> tuple[Any, bool]:
    """The config object, and whether code of its own may run."""
    trusted = folder is not None
    check_kind(config, trusted)
    try:
        read = library.read_config(config, folder, trusted)
    except Exception as error:  # a config class may raise anything on wrong values
        raise _unusable(config, error) from error
    count = getattr(library.text_config(read), "num_hidden_layers", 1)
    if type(count) is int and not 0 < count <= _MAX_LAYERS:
        raise CheckpointError(
            "config.json: the number of layers", expected=f"from 1 to {_MAX_LAYERS:,}",
            found=f"{count:,}",
        )  # fmt: skip
    return read, trusted


@cache
def data_files() -> dict[str, Hints]:
    """The hints of all data files, by ``model_type``. Raises ValueError for an author's mistake."""
    found = {}
    for entry in sorted(_FOLDER.iterdir(), key=str):
        if entry.name.endswith(".toml") and entry.name != "examples.toml":
            data = tomllib.loads(entry.read_text("utf-8"))
            if unknown := set(data) - {"model_type", "blocks", "ffns", "left_alone"}:
                raise ValueError(f"{entry.name}: unknown keys {sorted(unknown)}")
            found[data["model_type"]] = Hints(
                data.get("blocks", ""), tuple(data.get("ffns", ())), data.get("left_alone", "")
            )
    return found


def hints_of(model_type: str) -> tuple[Hints, str]:
    """The hints of a data file for a model, and the name of the description."""
    hints = data_files().get(model_type)
    return (hints, f"{model_type}.toml") if hints else (Hints(), "inference")


def _class_of(config: Mapping[str, Any], read: Any, trusted: bool) -> tuple[Any, str]:
    """The class of a model and the auto class that loads it.

    The class that the config names, if an auto class knows it; else the class of the first auto
    class that knows the config. For a wrapper, auto classes that read more than text come first.
    """
    named = config.get("architectures")
    names = {n for n in named if isinstance(n, str)} if isinstance(named, list) else set()
    wrapper = library.text_config(read) is not read
    order = AUTO_CLASSES[1:] + AUTO_CLASSES[:1] if wrapper else AUTO_CLASSES
    found = {auto: library.class_of(read, auto, trusted) for auto in order}
    known = [(kind, auto) for auto, kind in found.items() if kind is not None]
    known.sort(key=lambda each: each[0].__name__ not in names)
    encoder = config["model_type"] in model_types("AutoModelForMaskedLM")
    what = ""
    if getattr(read, "is_encoder_decoder", False):
        what = ENCODER_DECODER
    elif encoder and not getattr(read, "is_decoder", False):
        what = ENCODER
    elif not known:
        what = NO_LANGUAGE_MODEL
    if what:
        raise not_text(f"a model of type {describe_value(config['model_type'])}", what)
    return known[0]


def _unusable(config: Mapping[str, Any], error: Exception) -> CheckpointError:
    return CheckpointError(
        "config.json is not what transformers expects of "
        f"{describe_value(config.get('model_type'))}",
        expected="values that its class accepts", found=_first_line(error),
    )  # fmt: skip


def _first_line(error: Exception) -> str:
    """The message of an error in one line; for a config's check, the line after its name."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if re.search(r"[Vv]alidation.*:$", lines[0]) and len(lines) > 1:
        lines = lines[1:]
    text = " ".join(lines[0].split())[:300]
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"
