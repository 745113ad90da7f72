"""The architecture of a checkpoint by its config: a data file's hints, inference, and the proof.

A data file, one TOML beside this module for one ``model_type``, is needed only where inference does
not see what there is: ``blocks`` names the list of decoder layers, ``ffns`` the feed-forward
networks within a layer. The proof is the same.
"""

import json
import re
import tomllib
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import replace
from functools import cache, lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from converter.checkpoints.architectures import library
from converter.checkpoints.architectures.architecture import Architecture
from converter.checkpoints.architectures.inference import NO_FFN, Hints, infer
from converter.checkpoints.architectures.proof import prove
from converter.checkpoints.architectures.tiny import NoTinyModelError
from converter.errors import CheckpointError
from converter.text import describe_value

_FOLDER = files("converter").joinpath("checkpoints/architectures")

_OTHER_KINDS = (
    (r"(Eagle|Medusa|Speculator|Assistant|Draft|MTP|DFlash)",
     "a draft or assistant model, which only proposes tokens to another model"),
    (r"For(Sequence|Token)Classification|RewardModel|ForReward|ForScor",
     "a classifier or reward model, which gives scores and no text"),
    (r"Diffusion", "a diffusion model, which does not continue text token by token"),
    (r"For(MaskedLM|PreTraining|QuestionAnswering|MultipleChoice|NextSentence)|^\w*Bert\w*(?<!LMHead)Model$",
     "an encoder, which does not continue text"),
    (r"(?<!LMHead)Model$|ForTextEncoding|ForEmbedding|Retrieval",
     "a model without a head that makes text, as for embeddings"),
)  # fmt: skip
"""Names of classes -> what they are, of those that do not continue text."""


_trusted: ContextVar[bool] = ContextVar("trusted", default=False)


def allow_own_code(trusted: bool) -> None:
    """From now on in this context, let code that comes with a checkpoint build its model, or not.

    Every entry point that plans says so before it does.
    """
    _trusted.set(trusted)


_DRAFT = "gloss architectures --infer SOURCE prints a draft of the data file that would settle it"

_MAX_LAYERS = 10_000
"""The deepest models have a few hundred."""

_ENCODER_DECODER = "an encoder-decoder, of which only the decoder makes text"


def find_architecture(config: Mapping[str, Any], folder: Path | None = None) -> Architecture:
    """Describe a model by its parsed ``config.json``, and prove the description.

    Args:
        config: of the checkpoint.
        folder: of the file, for code of its own; see ``allow_own_code``.

    Raises:
        CheckpointError: the model does not continue text, transformers does not know it, or the
            description cannot be made or proved.
    """
    own = _with_own_code(config, folder)
    return _proved(json.dumps(config, sort_keys=True, default=str), str(own) if own else None)


def find_renaming(config: Mapping[str, Any], folder: Path | None = None) -> library.Renaming:
    """Which weight of its model each tensor of a checkpoint makes. As ``find_architecture``."""
    read, trusted = _read(config, _with_own_code(config, folder))
    kind, _ = _class_of(config, read, trusted)
    return library.Renaming(library.on_meta(kind, read))


def _with_own_code(config: Mapping[str, Any], folder: Path | None) -> Path | None:
    """The folder, if code in it may run and is that of a model, and not of a config alone."""
    named = config.get("auto_map")
    brings = isinstance(named, dict) and any(auto in named for auto in library.AUTO_CLASSES)
    return folder if brings and _trusted.get() else None


@lru_cache(maxsize=256)
def _proved(text: str, folder: str | None) -> Architecture:
    config = json.loads(text)
    read, trusted = _read(config, Path(folder) if folder else None)
    kind, auto_class = _class_of(config, read, trusted)
    hints, by = hints_of(config["model_type"])
    try:
        model = library.on_meta(kind, read)
    except Exception as error:  # whatever a class makes of a config
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
    _check_type(config, trusted)
    try:
        read = library.read_config(config, folder, trusted)
    except Exception as error:  # whatever a config class makes of values that it does not like
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
    """What a data file says of a model, and by what it is described."""
    hints = data_files().get(model_type)
    return (hints, f"{model_type}.toml") if hints else (Hints(), "inference")


def _check_type(config: Mapping[str, Any], trusted: bool) -> None:
    """Raise CheckpointError if transformers cannot know the model, or it does not make text."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise CheckpointError(
            "config.json: model_type", expected="the name of a model that transformers knows",
            found=describe_value(model_type),
        )  # fmt: skip
    if "auto_map" in config and not trusted and not library.knows(model_type):
        raise CheckpointError(
            f"config.json: model_type {describe_value(model_type)} is code of its own",
            expected=f"a model that transformers {library.version()} knows",
            hint="read the code; if you trust it, give --trust-remote-code",
        )
    if not trusted and not library.knows(model_type):
        made = config.get("transformers_version")
        newer = isinstance(made, str) and re.fullmatch(r"[\w.+-]{1,40}", made)
        raise CheckpointError(
            "config.json: model_type",
            expected=f"one that transformers {library.version()} knows",
            found=describe_value(model_type),
            hint=f"it was saved with transformers {made}, the first that is known to have it"
            if newer and _later(str(made), library.version())
            else "upgrade transformers, or check the name",
        )
    if config.get("is_encoder_decoder") is True:
        raise _not_text(f"a model of type {describe_value(model_type)}", _ENCODER_DECODER)
    named = config.get("architectures")
    name = library.model_types(library.AUTO_CLASSES[0]).get(model_type, "")
    if isinstance(named, list) and named and isinstance(named[0], str):
        name = named[0]
    for pattern, what in _OTHER_KINDS:
        if re.search(pattern, name):
            raise _not_text(name, what)


def _later(one: str, other: str) -> bool:
    def numbers(version: str) -> list[int]:
        return [int(n) for n in re.findall(r"\d+", version)[:3]]

    return numbers(one) > numbers(other)


def _not_text(name: str, what: str) -> CheckpointError:
    return CheckpointError(
        f"{name} is {what}", expected="a language model that continues text",
        hint="give the checkpoint of such a model",
    )  # fmt: skip


def _class_of(config: Mapping[str, Any], read: Any, trusted: bool) -> tuple[Any, str]:
    """The class of a model and the auto class that loads it.

    The class that the config names, if an auto class knows it; or else that of the first that
    knows the config, for a wrapper those first that read more than text.
    """
    named = config.get("architectures")
    names = {n for n in named if isinstance(n, str)} if isinstance(named, list) else set()
    wrapper = library.text_config(read) is not read
    order = library.AUTO_CLASSES[1:] + library.AUTO_CLASSES[:1] if wrapper else library.AUTO_CLASSES
    found = {auto: library.class_of(read, auto, trusted) for auto in order}
    known = [(kind, auto) for auto, kind in found.items() if kind is not None]
    known.sort(key=lambda each: each[0].__name__ not in names)
    encoder = config["model_type"] in library.model_types("AutoModelForMaskedLM")
    what = ""
    if getattr(read, "is_encoder_decoder", False):
        what = _ENCODER_DECODER
    elif encoder and not getattr(read, "is_decoder", False):
        what = "an encoder, which does not continue text"
    elif not known:
        what = "no language model that transformers can have continue text"
    if what:
        raise _not_text(f"a model of type {describe_value(config['model_type'])}", what)
    return known[0]


def _unusable(config: Mapping[str, Any], error: Exception) -> CheckpointError:
    return CheckpointError(
        "config.json is not what transformers expects of "
        f"{describe_value(config.get('model_type'))}",
        expected="values that its class accepts", found=_first_line(error),
    )  # fmt: skip


def _first_line(error: Exception) -> str:
    """What an error says, in a line; of a config's check, that after the one that names it."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if re.search(r"[Vv]alidation.*:$", lines[0]) and len(lines) > 1:
        lines = lines[1:]
    text = " ".join(lines[0].split())[:300]
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"
