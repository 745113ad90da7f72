"""Read Meta's own layout of a Llama, or Mistral's of a Mistral, as a Hugging Face checkpoint.

A folder holds ``params.json``, ``tokenizer.model`` and the weights in ``consolidated.00.pth``,
``consolidated.01.pth``, ..., one for each GPU of Meta's tensor parallelism, often with md5 sums.
Names are translated, parts joined, and the rows of q and k reordered: Meta rotates neighbouring
dimensions of a head together, transformers one of the first half with one of the second. Mistral's
layout has the same names and order, in the single file ``consolidated.safetensors``.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from converter.checkpoints.formats.meta_small_files import (
    AGAIN,
    Params,
    config_of,
    keep,
    read_params,
    small_files,
)
from converter.checkpoints.formats.pickle_files import load_tensors
from converter.checkpoints.formats.virtual import (
    Translated,
    VirtualTensor,
    index_text,
    split_shards,
)
from converter.checkpoints.names import INDEX, weight_files
from converter.checkpoints.safetensors.header import read_header
from converter.errors import CheckpointError, SourceError
from converter.runtime.cache import cache_folder

_VERSION = 2
"""Version of the small files of a translation. Raise it when they change."""

CHECKLISTS = ("checklist.chk", "tokenizer_checklist.chk")
_EMBEDDING, _OUTPUT = "tok_embeddings.weight", "output.weight"

_Parts = Mapping[str, Mapping[str, Tensor]]
"""File name -> Meta's tensor name -> tensor, mapped from the file."""


@dataclass(frozen=True, slots=True)
class _Place:
    """A translated tensor; ``heads`` is the number of heads for q and k, else 0."""

    name: str
    shape: tuple[int, ...]
    heads: int = 0


def read_native(folder: Path) -> Translated:
    """Translate a folder in Meta's layout; of the weights, only names and shapes are read.

    The cache keeps the small files of the translation.

    Raises:
        CheckpointError: the source is damaged, incomplete, or contradicts itself.
        SourceError: it cannot be read, or a package is missing that reads the tokenizer.
        DestinationError: the cache cannot be written.
    """
    try:
        return _translate(folder)
    except OSError as error:
        raise SourceError(f"{folder.name} cannot be read", found=error.strerror) from error


def _translate(folder: Path) -> Translated:
    paths, small = _part_paths(folder), small_files(folder)
    params = read_params(folder / "params.json")
    parts: dict[str, dict[str, Tensor]] = {}
    for path in paths:
        tensors = _load(path)  # mapped: they take no memory until they are read
        parts[path.name] = {n: t for n, t in tensors.items() if not n.endswith("rope.freqs")}
    tied = all(_is_tied(part) for part in parts.values())
    rows = sum(part[_EMBEDDING].numel() for part in parts.values() if _EMBEDDING in part)
    vocab = params.vocab or rows // params.dim
    made = _virtual_tensors(parts, _places(params, vocab, tied), tied)
    shards = split_shards(made)
    config = config_of(params, vocab, made[0].dtype, tied)
    index = index_text(shards) if len(shards) > 1 else ""

    sizes = [(path.name, path.stat().st_size) for path in paths]
    key = hashlib.sha256(json.dumps([_VERSION, config, index, sizes, list(small)]).encode())
    for data in ((folder / "params.json").read_bytes(), *small.values()):
        key.update(hashlib.sha256(data).digest())
    kept = cache_folder() / "native" / key.hexdigest()
    if not kept.is_dir():
        keep(kept, small | ({INDEX: index.encode()} if index else {}), config, params.scaled)
    return Translated(kept, shards, (*paths, folder / "params.json"))


def _load(path: Path) -> Mapping[str, Tensor]:
    if path.suffix == ".pth":
        return load_tensors(path)[0]
    read_header(path)  # refuses what is damaged
    return load_file(path)


def check_md5(folder: Path, names: Iterable[str], digest: Callable[[Path], str]) -> None:
    """Compare files with Meta's md5 sums, if there are any.

    Args:
        folder: in Meta's layout.
        names: of the files to check; a missing or unlisted file passes.
        digest: gives the md5 of a file as hex digits.

    Raises:
        CheckpointError: a file differs, or a part is listed and missing.
    """
    _part_paths(folder)
    listed = _checklist(folder)
    for name in names:
        if name not in listed or not (folder / name).is_file():
            continue
        if (found := digest(folder / name).lower()) != listed[name]:
            what = f"{name} is damaged: its md5 is not that of the checklist"
            raise CheckpointError(what, expected=listed[name], found=found, hint=AGAIN)


def _checklist(folder: Path) -> dict[str, str]:
    """File name -> md5, from all checklists of a folder."""
    listed = {}
    for path in (folder / name for name in CHECKLISTS if (folder / name).is_file()):
        for line in path.read_text("utf-8", "replace").splitlines():
            if match := re.fullmatch(r"([0-9a-fA-F]{32}) [ *](?:\./)?(.+?)\s*", line):
                listed[match[2]] = match[1].lower()
            elif line.strip():
                what = f"{path.name} is not a list of md5 sums"
                raise CheckpointError(what, found=repr(line[:60]), hint=AGAIN + ", or remove it")
    return listed


def _part_paths(folder: Path) -> list[Path]:
    """The parts of the weights, in order; all up to the last one that exists or is listed."""
    found = weight_files(path.name for path in folder.iterdir())
    known = [*found, *weight_files(_checklist(folder))]
    if not all(name.endswith(".pth") for name in known):
        return [folder / name for name in found]
    last = max((int(name[-6:-4]) for name in known), default=0)
    wanted = [f"consolidated.{number:02d}.pth" for number in range(last + 1)]
    if missing := [name for name in wanted if name not in found]:
        raise CheckpointError(
            f"{missing[0]} is missing", expected=f"{len(wanted)} parts of the weights",
            found=str(len(found)), hint="fetch the whole folder",
        )  # fmt: skip
    return [folder / name for name in wanted]


def _is_tied(part: Mapping[str, Tensor]) -> bool:
    """Whether the output is the embedding: it is missing, or has the same bytes in the file under
    another name.
    """
    output, embedding = part.get(_OUTPUT), part.get(_EMBEDDING)
    if output is None or embedding is None:
        return output is None
    return output.data_ptr() == embedding.data_ptr() and output.shape == embedding.shape


def _places(params: Params, vocab: int, tied: bool) -> Iterator[tuple[str, _Place]]:
    """Meta's name of every tensor and its place, in the order in which they are written."""
    dim, ffn = params.dim, params.ffn
    queries, keys = params.head_dim * params.heads, params.head_dim * params.kv_heads
    inner = {
        "attention.wq": _Place("self_attn.q_proj", (queries, dim), params.heads),
        "attention.wk": _Place("self_attn.k_proj", (keys, dim), params.kv_heads),
        "attention.wv": _Place("self_attn.v_proj", (keys, dim)),
        "attention.wo": _Place("self_attn.o_proj", (dim, queries)),
        "feed_forward.w1": _Place("mlp.gate_proj", (ffn, dim)),
        "feed_forward.w3": _Place("mlp.up_proj", (ffn, dim)),
        "feed_forward.w2": _Place("mlp.down_proj", (dim, ffn)),
        "attention_norm": _Place("input_layernorm", (dim,)),
        "ffn_norm": _Place("post_attention_layernorm", (dim,)),
    }
    yield _EMBEDDING, _Place("model.embed_tokens.weight", (vocab, dim))
    for layer in range(params.layers):
        for name, place in inner.items():
            there = f"model.layers.{layer}.{place.name}.weight"
            yield f"layers.{layer}.{name}.weight", replace(place, name=there)
    yield "norm.weight", _Place("model.norm.weight", (dim,))
    if not tied:
        yield _OUTPUT, _Place("lm_head.weight", (vocab, dim))


def _virtual_tensors(
    parts: _Parts, places: Iterable[tuple[str, _Place]], tied: bool
) -> list[VirtualTensor]:
    """Translate every tensor. Each part must have a share of each, and nothing else."""
    made, known = [], {_OUTPUT} if tied else set()
    for name, place in places:
        for part, tensors in parts.items():
            if name not in tensors:
                raise CheckpointError(f"{part} has no tensor {name}", hint=AGAIN)
        known.add(name)
        made.append(_virtual_tensor(name, place, parts))
    for part, tensors in parts.items():
        for name in tensors:
            if name not in known:
                raise CheckpointError(
                    f"{part} has a tensor {name}, which params.json does not account for",
                    hint="only dense text models are supported, and no quantized ones",
                )
    return made


def _virtual_tensor(name: str, place: _Place, parts: _Parts) -> VirtualTensor:
    first, *others = tensors = [part[name] for part in parts.values()]
    for part, tensor in zip(parts, tensors, strict=True):
        if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise CheckpointError(
                f"{part}: tensor {name} cannot be translated",
                expected="16- or 32-bit floats", found=str(tensor.dtype),
            )  # fmt: skip
        if (tensor.shape, tensor.dtype) != (first.shape, first.dtype):
            raise CheckpointError(
                f"{part}: tensor {name} is not like that of the other parts",
                expected=f"{first.dtype} {list(first.shape)}",
                found=f"{tensor.dtype} {list(tensor.shape)}",
            )
    axis = _axis(tuple(first.shape), place.shape, len(tensors))
    if axis is None:
        raise CheckpointError(
            f"tensor {name} contradicts params.json",
            expected=f"{list(place.shape)} from {len(tensors)} part{'s' * bool(others)}",
            found=f"{list(first.shape)} in each",
            hint="one of them is of another model, or a part is missing",
        )

    def make() -> Tensor:
        whole = torch.cat(tensors, axis) if others and axis >= 0 else first
        return half_split(whole, place.heads) if place.heads else whole

    return VirtualTensor(place.name, first.dtype, place.shape, make)


def _axis(share: tuple[int, ...], whole: tuple[int, ...], parts: int) -> int | None:
    """The axis along which shares are joined; -1 if each is the whole, None if nothing fits."""
    if share == whole and (parts == 1 or len(whole) == 1):
        return -1
    for axis, size in enumerate(share):
        if (*share[:axis], size * parts, *share[axis + 1 :]) == whole:
            return axis
    return None


def half_split(weight: Tensor, heads: int) -> Tensor:
    """The rows of q or k: in each head first the even ones, then the odd ones."""
    return weight.reshape(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
