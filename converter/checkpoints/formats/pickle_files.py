"""PyTorch's own files, ``pytorch_model.bin`` or its shards, read as safetensors.

They are pickles, so they are read with ``weights_only``: nothing in them is executed. Each is one
shard. It is mapped rather than read, so that only one tensor is in memory at a time.
"""

import pickle
import re
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath
from typing import Any
from zipfile import ZIP_STORED, ZipFile

import torch
from torch import Tensor

from converter.checkpoints.formats.virtual import Translated, VirtualTensor
from converter.checkpoints.intact import refuse_placeholder
from converter.checkpoints.layout import two_copies
from converter.checkpoints.names import SINGLE
from converter.errors import CheckpointError


def read_pickled(
    folder: Path,
    files: Iterable[str],
    weight_map: Mapping[str, str],
    tied: str,
) -> Translated:
    """The tensors of some files of a folder, each file a shard named like safetensors.

    Args:
        folder, files: where they are, and their names.
        weight_map: tensor name -> file name of the index; empty if there is none.
        tied: of two names for the same numbers, the one to leave out: the unembedding's, if the
            model ties its embeddings; else empty.

    Raises:
        CheckpointError: a file cannot be read without executing its contents, is truncated, holds
            other things than tensors, or lacks a tensor that the index places in it.
    """
    paths = tuple(folder / name for name in files)
    placed: dict[str, list[str]] = {}
    for name, place in weight_map.items():
        placed.setdefault(place, []).append(name)
    read_again = lru_cache(maxsize=1)(lambda path: load_tensors(path)[0])  # one file in memory
    shards, serial, seen = {}, False, dict[str, str]()
    for path in paths:
        tensors, mapped = load_tensors(path)
        for name in tensors:
            if (other := seen.setdefault(name, path.name)) != path.name:
                raise two_copies(name, weight_map.get(name), {other, path.name})
        for name in placed.get(path.name, ()):
            if name not in tensors:
                raise CheckpointError(
                    f"the index places tensor {name} in {path.name}", found="no such tensor in it",
                    hint="fetch the file and the index again",
                )  # fmt: skip
        kept = list(tensors)
        groups = _same_numbers(tensors)
        if len(groups) < len(kept) and tied:
            kept = [next((n for n in g if n != tied), g[0]) for g in groups]
        # A mapped file can stay open: it costs addresses, not memory. Other files are read again.
        again = partial(_same, tensors) if mapped else partial(read_again, path)
        serial |= not mapped
        shards[_shard_name(path.name, len(paths))] = [
            _virtual(name, tensors[name], again) for name in kept
        ]
        del tensors
    return Translated(folder, shards, paths, serial)


def _shard_name(name: str, files: int) -> str:
    """The safetensors name of a pickle file; readers look for model*.safetensors."""
    stem = name.removeprefix("pytorch_").removesuffix(".bin")
    if files == 1:
        return SINGLE
    return f"{stem if stem.startswith('model-') else f'model-{stem}'}.safetensors"


def _same(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors


def _virtual(name: str, tensor: Tensor, again: Callable[[], dict[str, Tensor]]) -> VirtualTensor:
    return VirtualTensor(name, tensor.dtype, tuple(tensor.shape), lambda: again()[name])


def load_tensors(path: Path) -> tuple[dict[str, Tensor], bool]:
    """All tensors of a file by name, and whether the file is mapped.

    Files that PyTorch wrote before version 1.6 cannot be mapped, and are read whole. Raises as
    ``read_pickled``.
    """
    try:
        with path.open("rb") as file:
            start = file.read(1024)
        refuse_placeholder(start, path.name)
        if mapped := start.startswith(b"PK"):
            _check_archive(path)
        loaded: Any = torch.load(path, mmap=mapped, weights_only=True, map_location="cpu")
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path.name} holds more than tensors, and reading it would execute code",
            found=" ".join(re.findall(r"GLOBAL (\S+)", str(error))[:1]) or _said(error),
            hint="get the model as safetensors, or save its state_dict alone",
        ) from error
    except Exception as error:  # a damaged pickle can raise anything
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
        if not (isinstance(key, str) and key.isprintable() and _is_plain(value)):
            raise CheckpointError(
                f"{path.name} is not a state_dict", expected="names and dense tensors",
                found=f"{key!r:.80}: {type(value).__name__}" if isinstance(key, str)
                else f"a name that is a {type(key).__name__}",
                hint="save the model's state_dict alone",
            )  # fmt: skip
        if (size := value.numel() * value.itemsize) > (held := value.untyped_storage().nbytes()):
            raise CheckpointError(
                f"{path.name} does not hold tensor {key}, only what it repeats",
                expected=f"{size:,} bytes", found=f"{held:,}",
                hint="save contiguous tensors",
            )  # fmt: skip
    return loaded, mapped


def _check_archive(path: Path) -> None:
    """Refuse an archive that PyTorch has not written: compressed, overlapping, or misnamed.

    A compressed part could be a thousand times as large in memory, and could not be mapped: wrong
    bytes would be read as numbers. Raises CheckpointError, or BadZipFile.
    """
    with ZipFile(path) as archive:
        entries = archive.infolist()
    names = {entry.filename for entry in entries}
    plain = all(
        entry.compress_type == ZIP_STORED and ".." not in PurePosixPath(entry.filename).parts
        for entry in entries
    )
    held = sum(entry.file_size for entry in entries)
    if not plain or len(names) < len(entries) or held > path.stat().st_size:
        raise CheckpointError(
            f"{path.name} is an archive that PyTorch has not written",
            expected="parts that are stored as they are, each once",
            hint="get the model as safetensors, or save its state_dict with torch.save",
        )


def _is_plain(value: object) -> bool:
    """Whether a value is a dense tensor."""
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        return False
    return not (value.is_quantized or value.is_meta or value.is_conj() or value.is_neg())


def _said(error: Exception) -> str:
    """The first sentence of PyTorch's message, which can fill a page."""
    return " ".join(str(error).split()).partition(". ")[0][:160] or type(error).__name__


def _same_numbers(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """The names, grouped by the same bytes of the file."""
    found: dict[tuple[object, ...], list[str]] = {}
    for name, tensor in tensors.items():
        place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset())
        key = (*place, tensor.shape, tensor.stride(), tensor.dtype)
        found.setdefault(key if tensor.numel() else (name,), []).append(name)
    return list(found.values())
