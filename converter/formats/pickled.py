"""PyTorch's own files, ``pytorch_model.bin`` or its shards, read as safetensors.

They are pickles, so they are read with ``weights_only``: nothing in them is executed. Each stays a
shard of its own, mapped rather than read, so that memory is a tensor at a time.
"""

import pickle
import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from converter.errors import CheckpointError
from converter.formats import Recipe, Translated

SINGLE = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"


def read_pickled(folder: Path, names: Iterable[str], tied: bool) -> Translated:
    """The tensors of some files, each file a shard named like safetensors.

    Args:
        folder: that the files are in.
        names: of the files.
        tied: whether the model ties its embeddings. A tensor that shares all its numbers with
            another is then left out; else it becomes a copy.

    Raises:
        CheckpointError: a file cannot be read without executing what it holds, is truncated, or
            holds something else than tensors.
    """
    paths = tuple(folder / name for name in names)
    shards = {}
    for path in paths:
        tensors = load_mapped(path)
        kept = _first_of_each(tensors) if tied else tensors
        stem = path.name.removeprefix("pytorch_").removesuffix(".bin")
        shards[f"{stem}.safetensors"] = [_recipe(path, name, tensors[name]) for name in kept]
    return Translated(folder, shards, paths)


@lru_cache(maxsize=2)
def _opened(path: Path) -> dict[str, Tensor]:
    """The file that is being read; there may be hundreds, and some cannot be mapped."""
    return load_mapped(path)


def load_mapped(path: Path) -> dict[str, Tensor]:
    """All tensors of a file by name; their numbers stay in the file until they are looked at.

    Files that PyTorch wrote before version 1.6 cannot be mapped, and are read whole.

    Raises:
        CheckpointError: as ``read_pickled``.
    """
    try:
        with path.open("rb") as file:
            start = file.read(8)
        if start == b"version ":
            raise CheckpointError(
                f"{path.name} is a pointer of git-lfs, not the file itself",
                hint="run 'git lfs pull' in the source",
            )
        mapped = start.startswith(b"PK")
        loaded: Any = torch.load(path, mmap=mapped, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path.name} holds more than tensors, and reading it would execute code",
            found=" ".join(re.findall(r"GLOBAL (\S+)", str(error))[:1]) or _said(error),
            hint="get the model as safetensors, or save its state_dict alone",
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path.name} cannot be read as a PyTorch file", found=_said(error),
            hint="fetch the file again",
        ) from error  # fmt: skip
    if not isinstance(loaded, dict):
        raise CheckpointError(
            f"{path.name} is not a state_dict", expected="names and tensors",
            found=type(loaded).__name__,
        )  # fmt: skip
    for key, value in loaded.items():
        plain = isinstance(value, Tensor) and value.layout == torch.strided
        if not isinstance(key, str) or not plain or value.is_quantized:
            raise CheckpointError(
                f"{path.name} is not a state_dict", expected="names and dense tensors",
                found=f"{key!r}: {type(value).__name__}", hint="save the model's state_dict alone",
            )  # fmt: skip
    return loaded


def _said(error: Exception) -> str:
    """The first sentence of what PyTorch says, which can be a page."""
    return " ".join(str(error).split()).partition(". ")[0][:160] or type(error).__name__


def _first_of_each(tensors: dict[str, Tensor]) -> list[str]:
    """The names without those that are another tensor's second; the embedding's comes first."""
    found: dict[tuple[object, ...], str] = {}
    for name, tensor in tensors.items():
        place: tuple[object, ...] = (tensor.untyped_storage().data_ptr(), tensor.storage_offset())
        if not tensor.numel():
            place = (name,)
        found.setdefault((*place, tensor.shape, tensor.stride(), tensor.dtype), name)
    return list(found.values())


def _recipe(path: Path, name: str, tensor: Tensor) -> Recipe:
    return Recipe(name, tensor.dtype, tuple(tensor.shape), lambda: _opened(path)[name])
