"""The architecture of a checkpoint by its config: a data file's hints, inference, and the proof.

A data file, one TOML beside this module for one ``model_type``, is needed only where inference does
not see what there is: ``blocks`` names the list of decoder layers, ``ffns`` the feed-forward
networks within a layer. The proof is the same.
"""

import json
import re
import tomllib
from collections.abc import Mapping
from functools import cache, lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from converter.checkpoints.architectures import library
from converter.checkpoints.architectures.architecture import Architecture
from converter.checkpoints.architectures.inference import Hints, Inferred, infer
from converter.checkpoints.architectures.proof import Proof, prove
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


def find_architecture(
    config: Mapping[str, Any], folder: Path | None = None, trust_remote_code: bool = False
) -> Architecture:
    """Describe a model by its parsed ``config.json``, and prove the description.

    Args:
        config: of the checkpoint.
        folder: of the file, for code of its own.
        trust_remote_code: whether that may run.

    Raises:
        CheckpointError: the model does not continue text, transformers does not know it, or the
            description cannot be made or proved.
    """
    return inferred_of(config, folder, trust_remote_code).architecture


def inferred_of(
    config: Mapping[str, Any], folder: Path | None = None, trust_remote_code: bool = False
) -> Inferred:
    """The same with what the description was made from. Raises as ``find_architecture``."""
    own = trust_remote_code and "auto_map" in config
    text = json.dumps(config, sort_keys=True, default=str)
    return _proved(text, str(folder) if own and folder else None)


@lru_cache(maxsize=64)
def _proved(text: str, folder: str | None) -> Inferred:
    config = json.loads(text)
    trusted = folder is not None
    _check_type(config, trusted)
    try:
        read = library.read_config(config, Path(folder) if folder else None, trusted)
    except Exception as error:  # whatever a config class makes of values that it does not like
        raise _unusable(config, error) from error
    kind, auto_class = _class_of(config, read, trusted)
    hints, by = hints_of(config["model_type"])
    try:
        inferred = infer(kind, read, auto_class, hints)
        proof = prove(inferred)
    except Exception as error:  # ours are ValueErrors; a class may raise anything
        raise CheckpointError(
            f"the architecture of {kind.__name__} is not known",
            expected="a feed-forward network in its layers that can be found and proved",
            found=_first_line(error),
            hint="gloss architectures --infer SOURCE prints a draft of the data file that would "
            "settle it",
        ) from error
    object.__setattr__(inferred.architecture, "evidence", _evidence(by, proof))
    return inferred


def _evidence(by: str, proof: Proof) -> dict[str, Any]:
    return {
        "described_by": by,
        "transformers": library.version(),
        "proved_layers": proof.layers,
        "proved_tensors": proof.tensors,
        "largest_error": proof.error,
        "largest_left": proof.left,
    }


@cache
def data_files() -> dict[str, Hints]:
    """The hints of all data files, by ``model_type``. Raises ValueError for an author's mistake."""
    found = {}
    for entry in sorted(_FOLDER.iterdir(), key=str):
        if entry.name.endswith(".toml") and entry.name != "examples.toml":
            data = tomllib.loads(entry.read_text("utf-8"))
            if unknown := set(data) - {"model_type", "blocks", "ffns"}:
                raise ValueError(f"{entry.name}: unknown keys {sorted(unknown)}")
            found[data["model_type"]] = Hints(data.get("blocks", ""), tuple(data.get("ffns", ())))
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
        raise _not_text(model_type, "an encoder-decoder, of which only the decoder makes text")
    named = config.get("architectures")
    name = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""
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
    for auto, kind in found.items():
        if kind is not None and kind.__name__ in names:
            return kind, auto
    for auto, kind in found.items():
        if kind is not None:
            if re.search(_OTHER_KINDS[0][0] + "|Diffusion", kind.__name__):
                what = _OTHER_KINDS[2 if "Diffusion" in kind.__name__ else 0][1]
                raise _not_text(kind.__name__, what)
            masked = config["model_type"] in library.model_types("AutoModelForMaskedLM")
            if masked and not getattr(read, "is_decoder", False):
                raise _not_text(kind.__name__, "an encoder, which does not continue text")
            if getattr(read, "is_encoder_decoder", False):
                raise _not_text(
                    kind.__name__, "an encoder-decoder, of which only the decoder makes text"
                )
            return kind, auto
    model_type = config["model_type"]
    encoder = model_type in library.model_types("AutoModelForMaskedLM")
    raise _not_text(
        f"model_type {describe_value(model_type)}",
        "an encoder, which does not continue text" if encoder
        else "no language model that transformers can have continue text",
    )  # fmt: skip


def _unusable(config: Mapping[str, Any], error: Exception) -> CheckpointError:
    return CheckpointError(
        "config.json is not what transformers expects of "
        f"{describe_value(config.get('model_type'))}",
        expected="values that its class accepts", found=_first_line(error),
    )  # fmt: skip


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    text = " ".join(lines[0].split())[:300]
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"
