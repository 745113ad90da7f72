"""Which files make a checkpoint, and its small files, read as far as they may be believed.

transformers builds what a config asks for before it looks at the weights, and some keys make it
read or run something else than the files that are edited.
"""

import json
import re
import stat
from collections.abc import Iterator, Mapping, Set
from itertools import chain
from pathlib import Path
from typing import Any

from converter.checkpoints.names import (
    CARD,
    ELSEWHERE,
    INDEX,
    MANIFEST,
    MAX_COMPANION,
    OTHER_WEIGHTS,
    PICTURE,
    TOKENIZER,
    WEIGHTS,
    Format,
    is_native,
)
from converter.errors import CheckpointError
from converter.runtime import strict_json
from converter.text import describe_value

MAX_CONFIG = 16_000_000
"""Bytes of a config or a card: the lists of labels and layers in some have one or two million."""

MAX_INDEX = 100_000_000
"""Bytes of an index: a million names fit. As for the header of a shard."""

_MAX_PARTS = 1_000_000
"""Lists and objects in a file of JSON; an index has three."""

_MAX_NESTING = 32
"""Objects and lists within one another in a config; real ones have five or six."""

_LOADED = TOKENIZER | {
    CARD, MANIFEST, "chat_template.jinja", "chat_template.json", "config.json",
    "generation_config.json", "params.json", "preprocessor_config.json", "processor_config.json",
}  # fmt: skip
"""Files beside the weights that we or transformers read whole, whatever their size."""

_LIMITS = (
    (re.compile(r"depth|.*layers?|.*experts"), 10_000, "layers or experts"),
    (re.compile(r"(.*_)?(vocab|hidden|intermediate|ffn|embedding|state|kernel|patch|image)_size|"
                r".*(_dim|_heads?|_positions|_embeddings|_rank)|n_(embd|inner|ctx)"),
     1 << 24, "a size of a model"),
)  # fmt: skip
"""Keys of counts -> the most that there can be: the deepest models have a few hundred layers, and
the longest text is 10,485,760 tokens."""

_KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation",
            "_experts_implementation")  # fmt: skip
"""Keys that can name a repo of compiled code, which transformers would fetch and run."""

_KNOWN_KERNEL = re.compile(r"(paged\|)?kernels-community/[^/]+")
"""Attention that many configs name; no model is run with it here."""


def choose_format(name: str, sizes: Mapping[str, int]) -> Format:
    """The format that the weights of a folder or repo are read in.

    Meta's layout where it is all there is, since it comes without config.json; else safetensors if
    there are any.

    Args:
        name: of the source, for messages.
        sizes: bytes of its files, by name.

    Raises:
        CheckpointError: two sets of weights in one format, an index without its files, nothing
            that can be read, or a file that is read whole and too large for it.
    """
    kind = _format_of(name, sizes.keys())
    for file in sorted(_LOADED & sizes.keys()):
        most = MAX_CONFIG if file in (CARD, "config.json") else MAX_COMPANION
        if sizes[file] > most:
            raise _too_large(file, sizes[file], most)
    return kind


def _format_of(name: str, known: Set[str]) -> Format:
    if ELSEWHERE in known and "config.json" not in known:
        raise CheckpointError(
            f"{name} is an adapter, not a model", hint="give the model that it belongs to"
        )
    if ELSEWHERE in known:
        raise CheckpointError(
            f"{name} is a model with an adapter beside it, which transformers would apply",
            hint=f"remove {ELSEWHERE}, or merge the adapter",
        )
    if is_native(known):
        return "native"
    for kind, (single, index) in WEIGHTS.items():
        if index in known and single in known:
            raise CheckpointError(
                f"{name} has two sets of weights: {single} and {index}",
                hint="loaders differ in which they take; remove one",
            )
        if index in known or single in known:
            return kind
    others = sorted(n for n in known if n.endswith(OTHER_WEIGHTS))
    gguf = [n for n in others if n.endswith(".gguf")]
    missing, hint = "weights that can be read", "use a checkpoint in one of these formats"
    if others and all(n.endswith(".safetensors") for n in others):
        missing, hint = INDEX, "get the index file, too"
    elif gguf:
        hint = f"give the file {gguf[0]} itself as SOURCE"
    raise CheckpointError(
        f"{name} has no {missing}",
        expected=", ".join(chain(*WEIGHTS.values())) + ", or consolidated.*.pth with params.json",
        found=", ".join(others[:5]) or "no weights at all",
        hint=hint,
    )


def _too_large(name: str, size: int, most: int) -> CheckpointError:
    return CheckpointError(
        f"{name} is too large", expected=f"at most {most:,} bytes", found=f"{size:,}"
    )


def read_index(path: Path) -> dict[str, str]:
    """Tensor name -> shard file name, as an index says.

    Raises:
        CheckpointError: there is none, a tensor is there twice, or a shard is not a plain file name
            of its format, is like another but for case, or is one of ours.
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
            )
        # its name must also be fit for a file that we write
        plain = shard.isprintable() and "\\" not in shard and len(shard.encode()) <= 255
        if not plain or not shard.endswith(ending) or shard.startswith((".", "gloss_")):
            raise CheckpointError(
                f"{path.name} places tensor {tensor} in a file that cannot be a shard",
                expected=f"the name of a {ending} file", found=repr(shard)[:200],
            )  # fmt: skip
        if (other := folded.setdefault(shard.casefold(), shard)) != shard:
            raise CheckpointError(f"{path.name} has shards that differ by case: {other}, {shard}")
        known.add(shard)
    return weight_map


def read_json(path: Path, most: int = MAX_COMPANION, *, unique: bool = False) -> dict[str, Any]:
    """The JSON object in a file; ``unique`` refuses keys that are there twice.

    Raises CheckpointError if it is missing, unreadable, of more than ``most`` bytes, or no object.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path.name} is no file")
        if status.st_size > most:
            raise _too_large(path.name, status.st_size, most)
        text = path.read_text("utf-8")
        if text.count("[") + text.count("{") > _MAX_PARTS:  # each takes twenty times its two bytes
            raise CheckpointError(f"{path.name} has more than {_MAX_PARTS:,} lists and objects")
        data = json.loads(text, object_pairs_hook=strict_json.unique if unique else None)
    except (OSError, ValueError, RecursionError) as error:
        found = getattr(error, "strerror", None) or str(error)
        raise CheckpointError(f"{path.name} cannot be read as JSON", found=found) from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path.name} is not a JSON object", found=type(data).__name__)
    return data


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
    """Refuse what no ``config.json`` has, before anything is made of it.

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
    """The pictures that an earlier conversion drew into a folder, as its own manifest says.

    They show that edit. None if there is no manifest, or one that cannot be made out.
    """
    try:
        manifest = read_json(folder / MANIFEST)
        made = manifest["files"].keys() - manifest["source"]["files"].keys()
    except (CheckpointError, KeyError, TypeError, AttributeError):
        return set()
    return {name for name in made if name.endswith(PICTURE)}
