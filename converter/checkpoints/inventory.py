"""Sort the files of a source: weights, extra weights, and files that are left out.

The index says which files hold the weights; names decide only without an index. All other files are
copied or reported: nothing of a source is silently left out.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from converter.checkpoints.layout import read_index
from converter.checkpoints.names import (
    ELSEWHERE,
    OTHER_WEIGHTS,
    UNFINISHED,
    WEIGHTS,
    Format,
    is_native,
    is_replaced,
    may_be_extra,
    weight_files,
)
from converter.errors import CheckpointError
from converter.text import few

if TYPE_CHECKING:
    from converter.checkpoints.safetensors.header import Header


@dataclass(frozen=True, slots=True)
class Weights:
    """The files that hold the weights of a folder or repo.

    Attributes:
        format: that they are read in.
        files: their names, in order.
        weight_map: tensor name -> file, as the index says; None if there is no index.
    """

    format: Format
    files: tuple[str, ...]
    weight_map: dict[str, str] | None = None


def choose_weights(name: str, folder: Path, known: Set[str]) -> Weights:
    """Find the files of the weights: the parts of Meta's layout if there is nothing else, since it
    has no config.json; else safetensors if there are any.

    Args:
        name: of the source, for messages.
        folder: holds the indexes.
        known: names of all files.

    Raises:
        CheckpointError: two sets of weights in one format, an index without its files, or no
            readable weights.
    """
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
        return Weights("native", tuple(weight_files(known)))
    for kind, (single, index) in WEIGHTS.items():
        if index not in known:
            if single in known:
                return Weights(kind, (single,))
            continue
        weight_map = read_index(folder / index)
        files = tuple(sorted(set(weight_map.values())))
        if single in known and files != (single,):
            raise CheckpointError(
                f"{name} has two sets of weights: {single} and {index}",
                hint=f"transformers takes {single} alone; rename it, in {index}, too"
                if single in files
                else f"loaders differ in which they take; remove {single}, or {index}",
            )
        if {*files} - known:
            raise _missing(index, files, known)
        return Weights(kind, files, weight_map)
    raise _unreadable(name, known)


def _missing(index: str, files: tuple[str, ...], known: Set[str]) -> CheckpointError:
    """The error about an index that names missing files: downloads did not finish, or it is another
    model's index.
    """
    missing = [file for file in files if file not in known]
    ending = PurePosixPath(missing[0]).suffix
    unfinished = [n for n in known if n.endswith(UNFINISHED) and n.startswith(tuple(missing))]
    others = sorted(n for n in known - {*files} if n.endswith(ending) and "/" not in n)
    hint = "fetch the missing files"
    if len(others) >= len(missing) and not unfinished:
        hint += f", or the index of those that are there: {few(others)}"
    return CheckpointError(
        f"the index names {few(missing)}",
        expected=f"every file that {index} names",
        found=f"only {few(unfinished)}, whose download did not finish" if unfinished
        else "no such file",
        hint=hint,
    )  # fmt: skip


_SET = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.(safetensors|bin)")
_VARIANT = re.compile(r"(model|pytorch_model)\.[^.]+\.(safetensors|bin)")

_NEW_INDEX = (
    "fetch it, or make it: python -c \"import glob, json, safetensors as s; json.dump({'metadata': "
    "{}, 'weight_map': {k: f for f in glob.glob('*-of-*.safetensors') for k in s.safe_open(f, "
    "'np').keys()}}, open('model.safetensors.index.json', 'w'))\""
)
"""The hint for a missing index."""


def _unreadable(name: str, known: Set[str]) -> CheckpointError:
    """The error about files that are not the weights of a checkpoint, or not all of them."""
    others = sorted(n for n in known if n.lower().endswith(OTHER_WEIGHTS) and "/" not in n)
    gguf = [n for n in others if n.endswith(".gguf")]
    unfinished = sorted(n for n in known if n.endswith(UNFINISHED))
    what, hint = "has no weights that can be read", "use a checkpoint in one of these formats"
    inside = sorted(str(PurePosixPath(n).parent) for n in known if n.endswith("/config.json"))
    native = [n for n in others if n.startswith("consolidated")]
    if sets := [match for n in others if n not in native and (match := _SET.fullmatch(n))]:
        return _incomplete_set(name, sets)
    if variant := next(filter(None, map(_VARIANT.fullmatch, others)), None):
        what = f"has a variant of the weights only: {variant[0]}"
        whole = f"{variant[1]}.{variant[2]}"
        hint = f"rename it to {whole}, or download the model without a variant"
    elif native and native[0].endswith(".safetensors"):
        what = f"has weights in Mistral's own layout only: {few(native)}"
        hint = "get config.json and model*.safetensors of the same model"
        if native == weight_files(native):
            hint += ", or keep params.json alone beside it, without config.json"
    elif [n for n in others if n.startswith("adapter_model.")]:
        what, hint = "has an adapter only", "give the model that it belongs to"
    elif len(others) == 1 and others[0].endswith(".safetensors"):
        hint = f"if {others[0]} is the whole model, rename it to model.safetensors"
    elif gguf:
        hint = f"give the file {gguf[0]} itself as SOURCE"
    elif inside and not others:
        hint = f"give --subfolder {inside[-1]}"
    elif unfinished:
        hint = f"the download of {few(unfinished)} did not finish; fetch it again"
    return CheckpointError(
        f"{name} {what}",
        expected=", ".join(chain(*WEIGHTS.values())) + ", or consolidated.* with params.json",
        found=few(others) or "no weights at all",
        hint=hint,
    )


def _incomplete_set(name: str, found: list[re.Match[str]]) -> CheckpointError:
    """The error about shards that are incomplete or have no index; a single file needs none."""
    first = found[0]
    stem, count, ending = first[1], int(first[3]), first[4]
    numbers = {int(match[2]) for match in found if match.group(1, 3, 4) == first.group(1, 3, 4)}
    missing = [f"{n:05d}" for n in range(1, min(count, 100_000) + 1) if n not in numbers]
    single, index = WEIGHTS["safetensors" if ending == "safetensors" else "pickled"]
    if missing:
        return CheckpointError(
            f"{name} has not all shards of {stem}", expected=f"{count:,} shards and {index}",
            found=f"no number {few(missing)}", hint="fetch the whole folder",
        )  # fmt: skip
    what, hint = f"{name} has no {index}", _NEW_INDEX
    if count == 1:
        what, hint = f"{name} has no {single}", f"rename {first[0]} to {single}"
    elif ending != "safetensors":
        hint = "fetch it, or save the model again with save_pretrained"
    return CheckpointError(
        what, expected=f"{single}, or {index} and its shards",
        found=few(sorted(match[0] for match in found)), hint=hint,
    )  # fmt: skip


def extra_weights(
    weights: Weights,
    names: Callable[[], Iterable[str]],
    sizes: Mapping[str, int],
    read: "Callable[[str], Header]",
) -> tuple[str, ...]:
    """The safetensors files beside a model that hold none of its tensors.

    A file with a tensor of the model, or another form of one of its weights, does not count. Nor
    does a set of files of half of the model's size or more: that is the model under other names.

    Args:
        weights: of the model.
        names: returns the names of its tensors.
        sizes: bytes of all files of the source, by name.
        read: returns the header of a file.

    Raises:
        CheckpointError: a file is damaged.
    """
    others = [n for n in sizes if may_be_extra(n, sizes.keys()) and n not in weights.files]
    stems = {name.rpartition(".")[0] for name in names()} if others else set()
    sets: dict[str, list[str]] = {}
    for name in others:
        sets.setdefault(re.sub(r"\d+", "", name), []).append(name)
    most = sum(sizes[name] for name in weights.files) / 2
    return tuple(
        name
        for group in sets.values()
        if sum(sizes[n] for n in group) < most
        for name in group
        if stems.isdisjoint(tensor.rpartition(".")[0] for tensor in read(name).tensors)
    )


def left_out(sizes: Mapping[str, int], kept: Set[str]) -> tuple[str, ...]:
    """The files of a source that are neither read nor copied, by name.

    A hidden folder counts as one name. ``kept`` are the files that are read or copied.
    """
    found = set[str]()
    for name in sizes:
        if name not in kept and not is_replaced(name):
            hidden = re.match(r"((?:[^/]+/)*?\.[^/]+/)", name)
            found.add(hidden[1] if hidden else name)
    return tuple(sorted(found))
