"""The kind of model of a ``config.json``, from its text alone: nothing is built.

Messages name the other kinds of models.
"""

import re
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any

from converter.checkpoints.architectures import known_models
from converter.checkpoints.architectures.known_models import AUTO_CLASSES
from converter.errors import CheckpointError
from converter.text import describe_value

ENCODER = "an encoder, which does not continue text"
ENCODER_DECODER = "an encoder-decoder, of which only the decoder makes text"
NO_LANGUAGE_MODEL = "no language model that transformers can have continue text"

FUSED = "gloss_fused"
"""The type of a model that ``checkpoints.fusing`` makes."""

_BY_CLASS = (
    (r"(Eagle|Medusa|Speculator|Assistant|Draft|MTP|DFlash)",
     "a draft or assistant model, which only proposes tokens to another model"),
    (r"For(Sequence|Token)Classification|RewardModel|ForReward|ForScor",
     "a classifier or reward model, which gives scores and no text"),
    (r"Diffusion", "a diffusion model, which does not continue text token by token"),
    (r"For(MaskedLM|PreTraining|QuestionAnswering|MultipleChoice|NextSentence)|^\w*Bert\w*(?<!LMHead)Model$",
     ENCODER),
    (r"(?<!LMHead)Model$|ForTextEncoding|ForEmbedding|Retrieval",
     "a model without a head that makes text, as for embeddings"),
)  # fmt: skip
"""Pattern of class names -> description, for classes that do not continue text."""

_BY_LIST = (
    (r"SPEECH|AUDIO|_CTC_|RNNT|WAVEFORM|SPECTROGRAM|_TDT_",
     "a model of speech or sound, which does not continue text"),
    (r"IMAGE|VIDEO|VISUAL|OBJECT|SEGMENTATION|DEPTH|KEYPOINT|MASK_GENERATION|BACKBONE|POSE|POINTMAP",
     "a model of images, which does not continue text"),
    (r"TIME_SERIES", "a model of time series, which does not continue text"),
)  # fmt: skip
"""Names of transformers' lists of models by task -> description of a model that is in one of them,
and in no list of language models.
"""

_STATE_SPACE = {"mamba", "mamba2", "falcon_mamba"}
"""Types of models whose layers have no feed-forward network."""

_trusted: ContextVar[bool] = ContextVar("trusted", default=False)


def allow_own_code(trusted: bool) -> None:
    """From now on in this context, allow or forbid a checkpoint's own code to build its model.

    Every entry point calls this before it plans.
    """
    _trusted.set(trusted)


def brings_code(config: Mapping[str, Any]) -> bool:
    """Whether own code may run, and defines a model, not only a config."""
    named = config.get("auto_map")
    brings = isinstance(named, dict) and any(auto in named for auto in AUTO_CLASSES)
    return brings and _trusted.get()


def check_kind(config: Mapping[str, Any], trusted: bool) -> None:
    """Refuse models that transformers does not know, and models that are not language models.

    Args:
        config: parsed ``config.json``.
        trusted: whether the model's own code may run (``--trust-remote-code``).

    Raises:
        CheckpointError: saying what it is.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise CheckpointError(
            "config.json: model_type", expected="the name of a model that transformers knows",
            found=describe_value(model_type),
        )  # fmt: skip
    if model_type == FUSED:
        raise CheckpointError(
            f"config.json: a model of type {FUSED}", expected="a model that is one",
            found="one that gloss-convert has fused with a calibration model",
            hint="convert the model that it was made from; gloss evaluate measures this one with "
            "--base MODEL, that model",
        )  # fmt: skip
    if not trusted and not known_models.knows(model_type):
        raise _unknown(config, model_type)
    title = f"a model of type {describe_value(model_type)}"
    for name, what in _other_kinds(config, model_type, title, trusted):
        raise not_text(name, what)
    if model_type in _STATE_SPACE and not trusted:
        raise CheckpointError(
            f"{title} is a state space model, which has no feed-forward network to edit",
            expected="a model whose layers have one, as transformers have",
        )


def _other_kinds(
    config: Mapping[str, Any], model_type: str, title: str, trusted: bool
) -> Iterator[tuple[str, str]]:
    """Names in a config, with descriptions, the most telling first; none for a language model."""
    lists = known_models.lists_of(model_type)
    of_speech = any("SPEECH_SEQ" in name for name in lists)
    if config.get("is_encoder_decoder") is True and not of_speech:
        yield title, ENCODER_DECODER
    known = trusted or known_models.continues_text(model_type)
    for pattern, what in _BY_LIST if of_speech or not known else ():
        if any(re.search(pattern, each) for each in lists):
            yield title, what
    named = config.get("architectures")
    name = known_models.model_types(AUTO_CLASSES[0]).get(model_type, "")
    if isinstance(named, list) and named and isinstance(named[0], str):
        name = named[0]
    for pattern, what in _BY_CLASS:
        if re.search(pattern, name):
            yield name, what
    both = any("SEQ_TO_SEQ" in each for each in lists)
    encodes = "MODEL_FOR_MASKED_LM_MAPPING_NAMES" in lists and config.get("is_decoder") is not True
    if both and not known:
        yield title, ENCODER_DECODER
    if encodes and not (both or trusted):
        yield title, ENCODER
    if not known:
        yield title, NO_LANGUAGE_MODEL


def _unknown(config: Mapping[str, Any], model_type: str) -> CheckpointError:
    """The error about a type that transformers does not know."""
    if "auto_map" in config:
        return CheckpointError(
            f"config.json: model_type {describe_value(model_type)} is code of its own",
            expected=f"a model that transformers {known_models.version()} knows",
            hint="read the code; if you trust it, give --trust-remote-code",
        )
    made = config.get("transformers_version")
    newer = isinstance(made, str) and re.fullmatch(r"[\w.+-]{1,40}", made)
    return CheckpointError(
        "config.json: model_type",
        expected=f"one that transformers {known_models.version()} knows",
        found=describe_value(model_type),
        hint=f"it was saved with transformers {made}, the first that is known to have it"
        if newer and _later(str(made), known_models.version())
        else "upgrade transformers, or check the name",
    )


def _later(one: str, other: str) -> bool:
    def numbers(version: str) -> list[int]:
        return [int(n) for n in re.findall(r"\d+", version)[:3]]

    return numbers(one) > numbers(other)


def not_text(name: str, what: str) -> CheckpointError:
    """The error about a model that does not continue text."""
    return CheckpointError(
        f"{name} is {what}", expected="a language model that continues text",
        hint="give the checkpoint of such a model",
    )  # fmt: skip
