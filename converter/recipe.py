"""The options: ``Recipe`` decides the bytes, ``Settings`` does not affect them, ``Publication``
says where the result goes, and ``LocalInputs`` where recorded inputs are.

Each field declares one option completely; see ``converter.option``.
"""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

from converter.option import Option, Options, declared_options
from converter.text import readable

LARGEST_SEED = (1 << 63) - 1
"""A negative seed would draw what the positive one draws, and a manifest holds no larger one."""

_SIZE = re.compile(r"(\d{1,18}(?:\.\d{0,18})?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)


Subfolder = Annotated[
    str, Option("Folder inside the source that holds the checkpoint.", example="original")
]
TrustRemoteCode = Annotated[
    bool, Option("Let transformers execute code that comes with the model.")
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe(Options):
    """Everything that the result of a conversion depends on, and nothing else.

    The manifest records it, with paths cut down to file names. The device and the way of running
    the model change at least the rounding, so ``device``, ``forward``, ``forward_dtype`` and
    ``batch_size`` belong to it.
    """

    # fmt: off
    source: Annotated[str, Option(
        "Model to convert: a folder with a checkpoint, a .gguf file, a Hub repo id with an "
        "optional @revision or its address, the address of a prefix in an object store, or the "
        "word demo.",
        flag="SOURCE", example="HuggingFaceTB/SmolLM2-360M", place=True,
    )]
    method: Annotated[str, Option(
        "Method that makes the edit (gloss methods lists them). Join several with + to apply them "
        "one after the other.", example="profs",
    )] = "gloss"
    options: Annotated[dict[str, str], Option(
        "Option of the method. If more than one of several methods has it, METHOD.KEY=VALUE.",
        flag="-o", metavar="KEY=VALUE", example="rank=4",
    )] = field(default_factory=dict)
    pairs: Annotated[str, Option(
        "Pairs of toxic and neutral sentences: builtin (English), self (drawn from the model's own "
        "continuations), a .jsonl, .tsv or .csv file, or a Hub dataset id with an optional "
        "@revision, or its address.",
        example="s-nlp/paradetox", place=True,
    )] = "builtin"
    self_prompts: Annotated[str, Option(
        "Prompts that the model continues for --pairs self: builtin (English), a .jsonl or .txt "
        "file, or a Hub dataset id.",
        example="prompts.txt", place=True,
    )] = "builtin"
    self_scorer: Annotated[str | None, Option(
        "Scorer that has to agree with the word list about each continuation of --pairs self.",
        by_default="the word list alone", example="detoxify",
    )] = None
    instances: Annotated[str, Option(
        "Harmful requests with a safe and an unsafe answer, for methods that defend against them: "
        "builtin (English), a .json or .jsonl file in the format of SafeEdit, or a Hub dataset id "
        "with an optional @revision, or its address.",
        example="zjunlp/SafeEdit", place=True,
    )] = "builtin"
    num_pairs: Annotated[int | None, Option(
        "Number of pairs to draw, held-out pairs included.",
        by_default="all usable, at most 2000; 400 of self", example="1000", least=1,
    )] = None
    seed: Annotated[int, Option(
        "Seed of every random draw: of the pairs, of their split, of controls.",
        example="1", least=0, most=LARGEST_SEED,
    )] = 0
    neutral: Annotated[str, Option(
        "Ordinary prose, part of it protected from the edit and the rest for measuring perplexity: "
        "builtin (English), or a text file.",
        example="prose.txt", place=True,
    )] = "builtin"
    word_list: Annotated[str, Option(
        "Offensive words, which mark the toxic words in the pairs: builtin (English), or a text "
        "file with one word or phrase a line.",
        example="words.txt", place=True,
    )] = "builtin"
    prompts: Annotated[str, Option(
        "Prompts that the model continues, for the guard and for --evaluate: builtin (English), "
        "none, a .jsonl or .txt file, or a Hub dataset id.",
        example="allenai/real-toxicity-prompts#challenging", place=True,
    )] = "builtin"
    output: Annotated[str, Option(
        "What to write: checkpoint, the whole model, or adapter, a LoRA to load on SOURCE.",
        example="adapter",
    )] = "checkpoint"
    activations: Annotated[Path | None, Option(
        "File of activations that an earlier run has written; it replaces the forward pass.",
        example="activations.safetensors", place=True, path="file", exists=True,
    )] = None
    calibration: Annotated[Path | None, Option(
        "Folder with a calibration model, as gloss calibrate writes it, for --method fusion "
        "-o form=paper; without one it is trained.",
        by_default="it is trained", example="./calibration", place=True, path="folder", exists=True,
    )] = None
    device: Annotated[str, Option(
        "Device that computes: auto, cpu, cuda, cuda:n, or map, which spreads the model over all "
        "GPUs and the memory.",
        example="cuda:1",
    )] = "auto"
    forward_dtype: Annotated[Literal["auto", "float32", "bfloat16", "float16", "mixed"], Option(
        "Dtype of the forward pass; auto chooses by the stored dtype and the device; mixed fits in "
        "float32 and measures held-out text in bfloat16; auto does so, too, if the processor "
        "multiplies bfloat16 and all weights are stored in it.",
    )] = "auto"
    forward: Annotated[Literal["auto", "resident", "streamed"], Option(
        "How the model runs: resident, the whole model in memory; streamed, one layer at a time; "
        "auto streams a model that does not fit comfortably.",
    )] = "auto"
    batch_size: Annotated[int, Option(
        "Number of sentences in one forward pass.", example="8", least=1,
    )] = 16
    rounding: Annotated[Literal["null-space", "nearest"], Option(
        "Rounding of edited weights: null-space leaves nothing along the subspace, nearest rounds "
        "each weight for itself.",
    )] = "null-space"
    max_perplexity_ratio: Annotated[float, Option(
        "Budget: the largest allowed perplexity on held-out neutral text, after over before.",
        example="1.05", above=1,
    )] = 1.03
    guard: Annotated[bool, Option(
        "Examine the edit on held-out text before anything is written.",
    )] = True
    guard_draws: Annotated[int, Option(
        "Number of controls that the guard compares the edit with, such as random subspaces.",
        example="5", least=1,
    )] = 3
    force: Annotated[bool, Option("Write the edit even if the guard refuses it.")] = False
    mask: Annotated[bool, Option(
        "Star out offensive words in the card, in the manifest and in continuations.",
    )] = True
    base_model: Annotated[str | None, Option(
        "Hub repo id that the card and an adapter name as the base of a local SOURCE.",
        example="HuggingFaceTB/SmolLM2-360M",
    )] = None
    subfolder: Subfolder = ""
    trust_remote_code: TrustRemoteCode = False
    # fmt: on

    def record(self) -> "Recipe":
        """The recipe for a manifest, without the folders of this machine."""
        given = {
            name: getattr(self, name)
            for name, declared in declared_options(Recipe).items()
            if declared.option.place and getattr(self, name) is not None
        }
        cut = {name: type(place)(without_folders(str(place))) for name, place in given.items()}
        return replace(self, **cut)


def parse_size(text: str) -> int:
    """Bytes of a size such as ``4GB``, ``512MB``, ``1.5GiB`` or ``1000000``.

    Raises:
        ValueError: it is none; the text says what a size looks like.
    """
    found = _SIZE.fullmatch(text.strip())
    if found:
        power = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}[found[2].upper()]
        size = int(float(found[1]) * (1024 if found[3] else 1000) ** power)
        if size > 0:
            return size
    raise ValueError("a size such as 4GB or 512MB")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings(Options):
    """How this machine does the work; apart from rounding, the result does not depend on it.

    ``attention`` and, with ``forward`` auto, ``memory_limit`` decide how the model is run. The
    manifest records the outcome among the inputs of the activations.
    """

    # fmt: off
    workers: Annotated[int, Option(
        "Number of shards to edit at a time.",
        by_default="number of processors, at most 4", example="2", least=0,
    )] = 0
    engine: Annotated[Literal["local", "ray"], Option(
        "Where shards are edited: threads of this machine, or the machines of a Ray cluster that "
        "see SOURCE and DESTINATION under the same paths.",
    )] = "local"
    ray_address: Annotated[str, Option(
        "The Ray cluster to join, HOST:PORT; auto finds that of RAY_ADDRESS or of this machine.",
        example="10.0.0.1:6379",
    )] = "auto"
    memory_limit: Annotated[int | None, Option(
        "Memory to plan forward passes and the edit with.",
        by_default="the available memory", example="4GB", metavar="SIZE", least=1, parse=parse_size,
    )] = None
    attention: Annotated[Literal["auto", "eager", "sdpa", "flash_attention_2"], Option(
        "How the model computes attention; auto does what its config says, or sdpa where that is "
        "not installed.",
    )] = "auto"
    keep_source: Annotated[bool, Option(
        "Keep the files fetched from the Hub or a store; otherwise delete each shard once it is "
        "edited.",
    )] = True
    # fmt: on


CLUSTER = ("engine", "ray_address")
"""The settings of commands that write shards of a new edit, and of no others."""

SELF = "self"
"""The value of ``pairs`` for pairs drawn from the model itself."""

_WORDS = ("demo", "builtin", SELF)
"""Words that never mean a path."""


def without_folders(text: str) -> str:
    """A path cut down to its file name; repo ids and ``_WORDS`` stay.

    A file name that equals one of these words gets a ``./``, to remain a path. A ``#FIELD`` after a
    path stays.
    """
    path = Path(text)
    place, sign, field = text.partition("#")
    if place and sign and not path.exists() and Path(place).exists():
        return without_folders(place) + sign + field
    if text in _WORDS or not (path.is_absolute() or path.exists() or text.startswith((".", "~"))):
        return text
    name = readable(path.resolve().name)
    return f"./{name}" if name in _WORDS else name


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationOptions(Options):
    """How a calibration model is trained."""

    # fmt: off
    side: Annotated[Literal["neutral", "toxic"], Option(
        "Side of the pairs that is learnt; toxic makes a control.",
    )] = "neutral"
    depth: Annotated[int, Option(
        "Layers of the calibration model: the first ones of the model.", example="2", least=1,
    )] = 3
    tokens: Annotated[int, Option(
        "Tokens to predict in training; the texts are repeated as often as needed.",
        example="100000", least=1,
    )] = 40_000
    rate: Annotated[float, Option(
        "Learning rate of AdamW at the first step; it falls to 0.", example="0.001", above=0,
    )] = 0.005
    minutes: Annotated[float | None, Option(
        "Time limit of the training. If it ends the training, the result depends on the machine.",
        by_default="no limit", example="10", above=0,
    )] = None
    # fmt: on


@dataclass(frozen=True, slots=True, kw_only=True)
class PublicationOptions(Options):
    """How a result is published."""

    # fmt: off
    private: Annotated[bool | None, Option(
        "Visibility of a new repo; an existing one keeps its own.",
        flag="--private/--public", by_default="private",
    )] = None
    branch: Annotated[str | None, Option(
        "Branch to commit to; it is created if it is missing.", by_default="main", example="detox",
    )] = None
    create_pr: Annotated[bool, Option("Open a pull request instead.")] = False
    message: Annotated[str | None, Option(
        "Message of the commit.", by_default="one that names the source", example="Rank 2",
    )] = None
    # fmt: on


@dataclass(frozen=True, slots=True, kw_only=True)
class Publication(PublicationOptions):
    """Where a result is published, and how.

    Attributes:
        repo_id: ``owner/name``; without an owner, that of the token.
        exists: whether the repo is there; known after ``publishing.check_rights``.
    """

    repo_id: str
    exists: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalInputs(Options):
    """Where the inputs of a recorded conversion are.

    None if an input is not local. ``trust_remote_code`` is never taken from a manifest.
    """

    # fmt: off
    source: Annotated[str | None, Option(
        "Place of the recorded source, if it was local, or if a copy is to be used.",
        example="./base",
        place=True,
    )] = None
    pairs: Annotated[str | None, Option(
        "With --refit: place of the recorded file of pairs.", example="pairs.tsv", place=True,
    )] = None
    self_prompts: Annotated[str | None, Option(
        "With --refit: place of the recorded file of prompts for pairs.", example="prompts.txt",
        place=True,
    )] = None
    instances: Annotated[str | None, Option(
        "With --refit: place of the recorded file of instances.", example="instances.json",
        place=True,
    )] = None
    neutral: Annotated[str | None, Option(
        "With --refit: place of the recorded neutral text.", example="prose.txt", place=True,
    )] = None
    word_list: Annotated[str | None, Option(
        "With --refit: place of the recorded word list.", example="words.txt", place=True,
    )] = None
    prompts: Annotated[str | None, Option(
        "With --refit: place of the recorded file of prompts.", example="prompts.txt", place=True,
    )] = None
    activations: Annotated[Path | None, Option(
        "With --refit: file of activations that the recorded fit was given.",
        example="activations.safetensors", path="file", exists=True,
    )] = None
    trust_remote_code: TrustRemoteCode = False
    # fmt: on
