"""Rewrite Rewrite safetensors files as streams: a header, then byte ranges.

A shard is rewritten in one pass. The header and every untouched tensor are copied byte for byte,
an edited tensor replaces a range of the same length, so names, order, shapes, dtypes, padding and
metadata of the source survive without being interpreted. Memory is a few buffers and the data of a
change, for any size of the shard.
"""

import hashlib
import io
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path

import torch

from converter.checkpoints.safetensors.direct_writer import BUFFER, PREFIX_DIGITS, Writer
from converter.checkpoints.safetensors.header import (
    DTYPES,
    FLOATS,
    MAX_HEADER,
    TensorInfo,
    fill,
    header_of,
    read_exactly,
)
from converter.errors import CheckpointError
from converter.runtime import progress
from converter.text import one_line

PIECE = 1 << 20
"""Bytes read and hashed at a time: few enough to be in the processor's cache for the hash."""


def to_tensor(data: bytearray | memoryview, info: TensorInfo) -> torch.Tensor:
    """``as_tensor``. Raises CheckpointError if the dtype holds no plain floating-point numbers."""
    dtype = DTYPES.get(info.dtype)
    if dtype is None or not dtype.is_floating_point:
        raise CheckpointError(
            f"tensor {info.name} cannot be read as numbers",
            expected=f"dtype {', '.join(FLOATS)}",
            found=info.dtype,
            hint="use the unquantized checkpoint of this model",
        )
    return as_tensor(data, info)


def as_tensor(data: bytearray | memoryview, info: TensorInfo) -> torch.Tensor:
    """View bytes as the tensor ``info`` describes (no copy)."""
    dtype = DTYPES[info.dtype]
    if not data:
        return torch.empty(info.shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).reshape(info.shape)


def read_rows(file: RawIOBase, info: TensorInfo, start: int, stop: int) -> torch.Tensor:
    """Rows ``start`` to ``stop`` of a tensor (R, ...) in an open shard.

    Raises CheckpointError if the file ends early, or the dtype holds no plain numbers.
    """
    row_bytes = info.nbytes // max(info.shape[0], 1)
    begin, end = info.start + start * row_bytes, info.start + stop * row_bytes
    shape = (stop - start, *info.shape[1:])
    return read_tensor(file, TensorInfo(info.name, info.dtype, shape, begin, end))


def read_tensor(file: RawIOBase, info: TensorInfo) -> torch.Tensor:
    """One whole tensor of an open shard. Raises as ``read_rows``."""
    file.seek(info.start)
    return to_tensor(read_exactly(file, info.nbytes, info.name), info)


def read_raw(file: RawIOBase, info: TensorInfo) -> torch.Tensor:
    """One whole tensor of an open shard, of any dtype."""
    file.seek(info.start)
    return as_tensor(read_exactly(file, info.nbytes, info.name), info)


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """The digests of one shard, as read and as written.

    Attributes:
        source_sha256: of the whole source file.
        sha256: of the whole output file.
        nbytes: size of both.
        prefixes: per tensor in file order, the first ``PREFIX_DIGITS`` digits of the sha256 of the
            output from its first byte to the end of that tensor. They are taken from the running
            digest, at no cost. The first that differs names the damaged tensor. The empty name
            means the header.
    """

    source_sha256: str
    sha256: str
    nbytes: int
    prefixes: dict[str, str]


class Region:
    """Reads the bytes of one tensor in an open shard, also repeatedly.

    The first reading must be in order, and feeds ``digests``.

    Attributes:
        info: the tensor's entry.
        seen: number of bytes read so far.
    """

    def __init__(
        self, file: RawIOBase, info: TensorInfo, digests: Iterable["hashlib._Hash"] = ()
    ) -> None:
        self.info, self.seen = info, 0
        self._file, self._digests = file, list(digests)
        self._scratch = bytearray()

    def read(self, start: int, count: int) -> memoryview:
        """``count`` bytes from ``start`` on, valid until the next call.

        Raises CheckpointError if the file ends early, or cannot be read.
        """
        if len(self._scratch) < count:
            self._scratch = bytearray(count)
        return self.read_into(memoryview(self._scratch)[:count], start)

    def read_into(self, view: memoryview, start: int) -> memoryview:
        """The same into a given place."""
        assert start <= self.seen, "the first reading is in order"
        self._file.seek(self.info.start + start)
        fill(self._file, view, self.info.name)
        fresh = view[self.seen - start :] if start + len(view) > self.seen else view[:0]
        for digest in self._digests:
            digest.update(fresh)
        self.seen = max(self.seen, start + len(view))
        return view

    def also_hash(self, digest: "hashlib._Hash") -> None:
        """Feed one more digest; call it before reading."""
        self._digests.append(digest)


Change = Callable[[Region], Iterator[memoryview]]
"""Reads a tensor's bytes and yields as many new bytes, in order."""


def rewrite(
    reading: RawIOBase,
    target: Path,
    changes: Mapping[str, Change],
    advance: Callable[[int], object] = lambda count: None,
) -> ShardRecord:
    """Copy a shard to ``target`` in one pass, replacing the tensors named in ``changes``.

    Both files are hashed on the way. There is one running digest until the first changed tensor,
    where it forks, so an untouched shard is hashed once. A second thread hashes the output and
    writes it.

    Args:
        reading: a safetensors file, open.
        target: a file that must not exist; on return it is flushed to disk.
        changes: tensor name -> how its bytes change.
        advance: called with the number of bytes done since the last call.

    Raises:
        CheckpointError: the source is malformed or ends early, or a change raised it.
        OSError: the target cannot be written.
    """
    header = header_of(reading, target.name)
    ranges = [("", 0, header.data_start)]
    ranges += [(info.name, info.start, info.end) for info in header.tensors.values()]
    ends = [(end, name) for name, _, end in ranges]
    source = reading.fileno() if isinstance(reading, io.FileIO) else None
    writer = Writer(target, header.size, ends, source)
    read, prefixes = hashlib.sha256(), {}
    try:
        reading.seek(0)
        for name, start, end in ranges:
            change = changes.get(name) if name else None
            if change is None:
                _copy(reading, writer, end - start, name, read, advance)
            else:
                if writer.digest is None and end > start:
                    writer.fork(read)
                _replace(Region(reading, header.tensors[name], [read]), writer, change, advance)
                reading.seek(end)
            if writer.digest is None:
                prefixes[name] = read.hexdigest()[:PREFIX_DIGITS]
    except BaseException:
        writer.abandon()
        raise
    writer.close()
    output = (writer.digest or read).hexdigest()
    return ShardRecord(read.hexdigest(), output, header.size, prefixes | writer.prefixes)


def _copy(
    reading: RawIOBase,
    writer: Writer,
    count: int,
    name: str,
    digest: "hashlib._Hash",
    advance: Callable[[int], object],
) -> None:
    while count:
        part = fill(reading, writer.space()[: min(count, PIECE)], name or "the header")
        digest.update(part)
        writer.filled(len(part))
        advance(len(part))
        count -= len(part)


def _replace(
    region: Region, writer: Writer, change: Change, advance: Callable[[int], object]
) -> None:
    written = 0
    for data in change(region):
        writer.put(data)
        advance(len(data))
        written += len(data)
    if not written == region.seen == region.info.nbytes:
        raise AssertionError(f"the change of {region.info.name} is not of its length")


def _prefixes(file: RawIOBase, name: str, digest: "hashlib._Hash") -> Iterator[tuple[str, str]]:
    """The ``prefixes`` of a shard, as ``digest`` reads it.

    The header is parsed only after its own prefix is yielded, so that a caller can stop at a wrong
        one.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    length = int.from_bytes(read_exactly(file, min(size, 8), "the header"), "little")
    if length <= min(size - 8, MAX_HEADER):
        file.seek(0)
        digest.update(read_exactly(file, 8 + length, "the header"))
    yield "", digest.hexdigest()[:PREFIX_DIGITS]
    buffer = memoryview(bytearray(BUFFER))
    for info in header_of(file, name).tensors.values():
        for start in range(0, info.nbytes, BUFFER):
            digest.update(fill(file, buffer[: min(info.nbytes - start, BUFFER)], info.name))
        yield info.name, digest.hexdigest()[:PREFIX_DIGITS]


def find_damage(path: Path, prefixes: Mapping[str, str]) -> str:
    """Name the first tensor at which a shard differs from its recorded prefix digests.

    Returns ``the header``, ``tensor NAME``, or ``the bytes after its last tensor``.
    """
    with path.open("rb", buffering=0) as file:
        for name, prefix in _prefixes(file, path.name, hashlib.sha256()):
            if prefix != prefixes.get(name):
                return f"tensor {name}" if name else "the header"
    return "the bytes after its last tensor"


def digests_of(path: Path) -> tuple[str, dict[str, str]]:
    """The sha256 of a shard and its ``prefixes``, as in ``ShardRecord``, in one reading.

    Raises:
        CheckpointError: it is malformed, is truncated, or cannot be read.
        OSError: it cannot be opened.
    """
    digest, prefixes, read = hashlib.sha256(), dict[str, str](), 0
    with (
        path.open("rb", buffering=0) as file,
        progress.bar(f"hash {one_line(path.name)}", path.stat().st_size, "B") as shown,
    ):
        for name, prefix in _prefixes(file, path.name, digest):
            prefixes[name] = prefix
            shown.update(file.tell() - read)
            read = file.tell()
    return digest.hexdigest(), prefixes
