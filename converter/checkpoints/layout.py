"""Read and check the small files of a checkpoint.

transformers builds the model of a config before it looks at the weights, and some keys make it read
or run other things than the edited files.
"""

import codecs
import json
import re
import stat
from collections.abc import Collection, Iterator, Mapping, Set
from pathlib import Path
from typing import Any

from converter.checkpoints.intact import readable, refuse_placeholder
from converter.checkpoints.names import (
    CARD,
    MANIFEST,
    MAX_COMPANION,
    PICTURE,
    TOKENIZER,
    UNFINISHED,
)
from converter.errors import CheckpointError
from converter.runtime import strict_json
from converter.runtime.files import AS_UTF8, decode, reason, start_of
from converter.text import describe_value

MAX_CONFIG = 16_000_000
"""The most bytes of a config or a card: some have lists of labels and layers of one or two million
bytes.
"""

MAX_INDEX = 100_000_000
"""The most bytes of an index, as for a shard's header: a million names fit."""

_MAX_PARTS = 1_000_000
"""The most lists and objects in a JSON file; an index has three."""

_MAX_NESTING = 32
"""The deepest nesting of a config; real ones have five or six levels."""

_LOADED = TOKENIZER | {
    CARD, MANIFEST, "chat_template.jinja", "chat_template.json", "config.json",
    "generation_config.json", "params.json", "preprocessor_config.json", "processor_config.json",
}  # fmt: skip
"""Files beside the weights that we or transformers read whole, in any size."""

_LARGE = ("tokenizer.json", "vocab.json", MANIFEST)
"""Those that take a second to parse; their readers check them."""

_LIMITS = (
    (re.compile(r"depth|.*layers?|.*experts"), 10_000, "layers or experts"),
    (re.compile("num_labels"), 100_000, "labels of a classifier"),
    (re.compile(r"(.*_)?(vocab|hidden|intermediate|ffn|embedding|state|kernel|patch|image)_size|"
                r".*(_dim|_heads?|_positions|_embeddings|_rank)|n_(embd|inner|ctx)"),
     1 << 24, "a size of a model"),
)  # fmt: skip
"""Keys of counts -> the largest value: the deepest models have a few hundred layers, and the
longest text is 10,485,760 tokens.
"""

_KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation",
            "_experts_implementation")  # fmt: skip
"""Keys that can name a repo of compiled code, which transformers would fetch and run."""

_KNOWN_KERNEL = re.compile(r"(paged\|)?kernels-community/[^/]+")
"""Attention kernels that many configs name; no model runs with them here."""


_OTHER_KINDS = {
    "model_index.json": "a diffusion pipeline",
    "modules.json": "a model of sentence embeddings",
}
"""Files of models that are not language models -> description."""


def refuse_other_kinds(name: str, files: Collection[str]) -> None:
    """Raise CheckpointError if the files of a source show that it is not a model that continues
    text.
    """
    for file, what in _OTHER_KINDS.items():
        if file in files:
            raise CheckpointError(
                f"{name} is {what}, as its {file} says",
                expected="a language model that continues text",
            )


def check_sizes(sizes: Mapping[str, int]) -> None:
    """Raise CheckpointError if a file that is read whole is too large; ``sizes`` are the bytes of a
    source's files, by name.
    """
    for file in sorted(_LOADED & sizes.keys()):
        most = MAX_CONFIG if file in (CARD, "config.json") else MAX_COMPANION
        if sizes[file] > most:
            raise _too_large(file, sizes[file], most)


def check_content(name: str, path: Path) -> None:
    """Raise CheckpointError if a file that is read or copied is a placeholder.

    HTML and Markdown files are not checked for looking like HTML or text.
    """
    if name.endswith(UNFINISHED):
        raise CheckpointError(
            f"{name} is an unfinished download", hint="finish it, or delete the file"
        )
    with readable(name):
        start = start_of(path)
    if not name.lower().endswith((".htm", ".html", ".md")) or start.startswith(b"version "):
        refuse_placeholder(start, name, may_be_empty=name not in _LOADED - {CARD})
    if name in _LOADED and name.endswith(".json"):
        _refuse_mark(start, name)
        if name not in _LARGE:
            read_json(path)


def _refuse_mark(start: bytes, name: str) -> None:
    """Raise CheckpointError if JSON begins with a byte order mark, which transformers refuses."""
    if start.startswith(codecs.BOM_UTF8):
        raise CheckpointError(
            f"{name} begins with a byte order mark", expected="JSON in plain UTF-8",
            hint="save it as UTF-8 without one, for example with: sed -i '1s/^\\xEF\\xBB\\xBF//'",
        )  # fmt: skip


def _too_large(name: str, size: int, most: int) -> CheckpointError:
    return CheckpointError(
        f"{name} is too large", expected=f"at most {most:,} bytes", found=f"{size:,}"
    )


def read_index(path: Path) -> dict[str, str]:
    """Tensor name -> shard file name, as an index says.

    Raises:
        CheckpointError: there is none, a tensor is repeated, or a shard's name is not a plain file
            name of its format, equals another up to case, or is one of ours.
    """
    weight_map = read_json(path, MAX_INDEX, unique=True).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path.name} has no weight_map", hint="fetch the file again")
    ending = f".{path.name.removesuffix('.index.json').rpartition('.')[2]}"
    known: set[str] = set()
    folded: dict[str, str] = {}
    for tensor, shard in weight_map.items():
        if isinstance(shard, str) and shard in known:
            continue
        if not isinstance(shard, str) or Path(shard).name != shard or shard in ("", ".", ".."):
            raise CheckpointError(
                f"{path.name} places tensor {tensor} outside the folder",
                expected="a plain file name",
                found=repr(shard)[:200],
                hint="put all shards beside the index, and their names into it",
            )
        # its name must also be fit for a file that we write
        plain = shard.isprintable() and "\\" not in shard and len(shard.encode()) <= 255
        if not plain or not shard.endswith(ending) or shard.startswith((".", "gloss_")):
            raise CheckpointError(
                f"{path.name} places tensor {tensor} in a file that cannot be a shard",
                expected=f"the name of a {ending} file", found=repr(shard)[:200],
                hint="rename the file, and change its name in the index",
            )  # fmt: skip
        if (other := folded.setdefault(shard.casefold(), shard)) != shard:
            raise CheckpointError(f"{path.name} has shards that differ by case: {other}, {shard}")
        known.add(shard)
    return weight_map


def two_copies(tensor: str, given: str | None, files: Set[str]) -> CheckpointError:
    """The error about a tensor in two files, of which the index names ``given``, or neither.

    transformers takes the one that the index names. Other programs may take the other one, which
    was not edited.
    """
    if given not in files:
        return CheckpointError(
            f"tensor {tensor} is in two files: {', '.join(sorted(files))}",
            expected=f"it in {given}, as the index says" if given else "it in one of them",
            hint="get an intact copy, or save the model again with save_pretrained",
        )
    (stale,) = files - {given}
    return CheckpointError(
        f"tensor {tensor} is in two files", expected=f"it in {given} only, as the index says",
        found=f"another copy in {stale}",
        hint=f"delete the tensor from {stale}, or save the model again with save_pretrained",
    )  # fmt: skip


def read_json(path: Path, most: int = MAX_COMPANION, *, unique: bool = False) -> dict[str, Any]:
    """The JSON object in a file; ``unique`` refuses repeated keys.

    Raises CheckpointError if it is missing, unreadable, larger than ``most`` bytes, or not an
    object.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path.name} is no file")
        if status.st_size > most:
            raise _too_large(path.name, status.st_size, most)
        data = path.read_bytes()
        refuse_placeholder(data, path.name)
        _refuse_mark(data, path.name)
        text = decode(data)
        if text.count("[") + text.count("{") > _MAX_PARTS:  # each takes twenty times its two bytes
            raise CheckpointError(f"{path.name} has more than {_MAX_PARTS:,} lists and objects")
        value = json.loads(text, object_pairs_hook=strict_json.unique if unique else None)
    except (OSError, ValueError, RecursionError) as error:
        hint = AS_UTF8 if isinstance(error, UnicodeError) else None
        raise CheckpointError(
            f"{path.name} cannot be read as JSON", found=reason(error), hint=hint
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path.name} is not a JSON object", found=type(value).__name__)
    return value


def _levels(value: dict[str, Any]) -> Iterator[list[Any]]:
    """An object, the objects and lists in it, those in them, and so on."""
    level: list[Any] = [value]
    while level:
        yield level
        level = [
            child
            for part in level
            for child in (part.values() if isinstance(part, dict) else part)
            if isinstance(child, (dict, list))
        ]


def check_config(config: dict[str, Any]) -> None:
    """Refuse impossible values of ``config.json``, before it is used.

    Raises CheckpointError for counts beyond ``_LIMITS``, other weights than those that are edited,
    code from elsewhere, or a nesting that no config has.
    """
    for depth, level in enumerate(_levels(config)):
        if depth == _MAX_NESTING:
            raise CheckpointError(
                "config.json is nested too deeply", expected=f"{_MAX_NESTING} levels or fewer"
            )
        for part in level:
            if isinstance(part, dict):
                for key, value in part.items():
                    _check_key(key, value)


def _check_key(key: str, value: Any) -> None:
    if key == "transformers_weights" and value:
        raise CheckpointError(
            "config.json: transformers_weights names other weights than those that are edited",
            hint="remove it, or the other weights",
        )
    if key in ("dtype", "torch_dtype") and isinstance(value, str) and value.startswith("torch."):
        raise CheckpointError(
            f"config.json: {key}", expected=f"{value.removeprefix('torch.')}", found=value,
            hint="transformers knows dtypes without the name of the library; correct it",
        )  # fmt: skip
    names = list(value.values()) if isinstance(value, dict) else [value]  # of each part, or of all
    if key.endswith("attn_implementation"):
        names = [n for n in names if not (isinstance(n, str) and _KNOWN_KERNEL.fullmatch(n))]
    if key in _KERNELS and any("/" in describe_value(name) for name in names):
        raise CheckpointError(
            f"config.json: {key} asks for compiled code from elsewhere",
            expected="the name of an implementation, such as sdpa", found=describe_value(value),
            hint="remove it",
        )  # fmt: skip
    for pattern, most, what in _LIMITS:
        if type(value) is int and pattern.fullmatch(key) and value > most:
            raise CheckpointError(
                f"config.json: {key}", expected=f"{what}, at most {most:,}",
                found=describe_value(value),
            )  # fmt: skip


def drawn_before(folder: Path) -> set[str]:
    """The pictures that an earlier conversion drew into a folder, by its manifest.

    They show that earlier edit. Empty if there is no readable manifest.
    """
    try:
        manifest = read_json(folder / MANIFEST)
        made = manifest["files"].keys() - manifest["source"]["files"].keys()
    except (CheckpointError, KeyError, TypeError, AttributeError):
        return set()
    return {name for name in made if name.endswith(PICTURE)}
