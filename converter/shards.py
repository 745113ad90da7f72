"""safetensors files as streams: a header, then byte ranges.

A shard is rewritten in one pass. The header and every untouched tensor are copied byte for byte,
an edited tensor replaces a range of the same length, so names, order, shapes, dtypes, padding and
metadata of the source survive without being understood. Memory is one copy buffer and one edited
tensor, whatever the size of the shard.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from typing import IO

import torch

from converter.errors import CheckpointError
from converter.header import (
    DTYPES,
    FLOATS,
    MAX_HEADER,
    Header,
    TensorInfo,
    fill,
    header_of,
    read_exactly,
    to_bytes,
)

BUFFER = 8 << 20
"""Bytes copied at a time: enough that Python's cost per call vanishes, small beside a tensor."""

PREFIX_DIGITS = 16
"""Hex digits kept of a running digest: they name a damaged tensor, the full digest proves it."""


def to_tensor(data: bytearray, info: TensorInfo) -> torch.Tensor:
    """View bytes as the tensor ``info`` describes (no copy).

    Raises:
        CheckpointError: the dtype holds no plain floating-point numbers.
    """
    dtype = DTYPES.get(info.dtype)
    if dtype is None or not dtype.is_floating_point:
        raise CheckpointError(
            f"tensor {info.name} cannot be read as numbers",
            expected=f"dtype {', '.join(FLOATS)}",
            found=info.dtype,
            hint="use the unquantized checkpoint of this model",
        )
    return _view(data, info, dtype)


def _view(data: bytearray, info: TensorInfo, dtype: torch.dtype) -> torch.Tensor:
    if not data:
        return torch.empty(info.shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).reshape(info.shape)


def read_rows(file: RawIOBase, info: TensorInfo, start: int, stop: int) -> torch.Tensor:
    """Rows ``start`` to ``stop`` (of the first axis) of a tensor in an open shard.

    Raises:
        CheckpointError: the file ends early, or the dtype holds no plain numbers.
    """
    rows = info.shape[0] if info.shape else 1
    row_bytes = info.nbytes // max(rows, 1)
    file.seek(info.start + start * row_bytes)
    part = TensorInfo(info.name, info.dtype, (stop - start, *info.shape[1:]), 0, 0)
    return to_tensor(read_exactly(file, (stop - start) * row_bytes, info.name), part)


def read_tensor(file: RawIOBase, info: TensorInfo) -> torch.Tensor:
    """One whole tensor of an open shard; see ``read_rows``."""
    return read_rows(file, info, 0, info.shape[0] if info.shape else 1).reshape(info.shape)


def read_raw(file: RawIOBase, info: TensorInfo) -> torch.Tensor:
    """One whole tensor of an open shard, whatever its dtype."""
    file.seek(info.start)
    return _view(read_exactly(file, info.nbytes, info.name), info, DTYPES[info.dtype])


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """What was read and written for one shard.

    Attributes:
        source_sha256: of the whole source file.
        sha256: of the whole output file.
        nbytes: size of both.
        prefixes: per tensor in file order, the first ``PREFIX_DIGITS`` digits of the sha256 of the
            output from its first byte to the end of that tensor. They are read off the running
            digest, so they cost nothing, and the first that differs names the damaged tensor.
            The empty name stands for the header.
    """

    source_sha256: str
    sha256: str
    nbytes: int
    prefixes: dict[str, str]


Change = Callable[[torch.Tensor], torch.Tensor]
"""Maps a tensor to its replacement of the same shape and dtype."""


def rewrite(
    reading: RawIOBase,
    target: Path,
    changes: Mapping[str, Change],
    advance: Callable[[int], object] = lambda count: None,
) -> ShardRecord:
    """Copy a shard to ``target`` in one pass, replacing the tensors named in ``changes``.

    Both files are hashed on the way. There is one running digest until the first changed tensor,
    where it forks, so an untouched shard is hashed once.

    Args:
        reading: a safetensors file, open.
        target: a file that must not exist; on return it is flushed to disk.
        changes: tensor name -> function from the tensor to its replacement.
        advance: called with the number of bytes written since the last call.

    Raises:
        CheckpointError: the source is malformed or ends early, or a change raised it.
        OSError: the target cannot be written.
    """
    header = header_of(reading, target.name)
    reading.seek(0)
    with target.open("xb", buffering=0) as writing:
        read = hashlib.sha256()
        wrote = None
        prefixes = {}
        buffer = memoryview(bytearray(min(BUFFER, header.size)))
        for name, start, end in _ranges(header):
            change = changes.get(name) if name else None
            if change is None:
                for count in _chunks(end - start):
                    part = fill(reading, buffer[:count], name or "the header")
                    read.update(part)
                    if wrote is not None:
                        wrote.update(part)
                    _write(writing, part)
                    advance(count)
            else:
                data = read_exactly(reading, end - start, name)
                wrote = wrote or read.copy()
                read.update(data)
                changed = to_bytes(change(to_tensor(data, header.tensors[name])))
                wrote.update(changed)
                _write(writing, changed)
                advance(end - start)
            prefixes[name] = (wrote or read).copy().hexdigest()[:PREFIX_DIGITS]
        os.fsync(writing.fileno())
    return ShardRecord(read.hexdigest(), (wrote or read).hexdigest(), header.size, prefixes)


def _ranges(header: Header) -> Iterator[tuple[str, int, int]]:
    yield "", 0, header.data_start
    for info in header.tensors.values():
        yield info.name, info.start, info.end


def _chunks(count: int) -> Iterator[int]:
    while count > 0:
        yield min(count, BUFFER)
        count -= BUFFER


def _write(file: IO[bytes], view: memoryview) -> None:
    while view:
        view = view[file.write(view) :]


def find_damage(path: Path, prefixes: Mapping[str, str]) -> str:
    """Name the first tensor at which a shard departs from its recorded prefix digests.

    Returns:
        ``the header``, ``tensor NAME``, or ``the bytes after its last tensor``.
    """
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        length = int.from_bytes(read_exactly(file, 8, "the header"), "little")
        file.seek(0)
        size = os.fstat(file.fileno()).st_size
        if length <= min(size - 8, MAX_HEADER):
            digest.update(read_exactly(file, 8 + length, "the header"))
        if digest.hexdigest()[:PREFIX_DIGITS] != prefixes.get(""):
            return "the header"
        # The header is the recorded one, so its offsets can be trusted.
        buffer = memoryview(bytearray(BUFFER))
        for info in header_of(file, path.name).tensors.values():
            for count in _chunks(info.nbytes):
                digest.update(fill(file, buffer[:count], info.name))
            if digest.copy().hexdigest()[:PREFIX_DIGITS] != prefixes.get(info.name):
                return f"tensor {info.name}"
    return "the bytes after its last tensor"
