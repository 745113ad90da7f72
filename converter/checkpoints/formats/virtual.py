"""Checkpoints that are not safetensors, read as if they were.

A format says how each tensor is made from the files on disk (a ``VirtualTensor``). A
``VirtualShard`` reads like the safetensors file of such tensors, but is never written: a reader
holds one tensor at a time. So all other code sees only safetensors.
"""

import io
import json
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from converter.checkpoints.safetensors.header import DTYPES, to_bytes
from converter.errors import CheckpointError
from converter.runtime.cache import cache_error, discard_stale, flush

MAX_SHARD = 5_000_000_000
"""Bytes of an output shard, if the source has no shards to keep."""


@dataclass(frozen=True, slots=True)
class VirtualTensor:
    """A tensor that is made on demand.

    Attributes:
        dtype, shape: of the result of ``make``; known without making it.
        make: makes it, on the CPU; called each time the tensor is read.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize


Shards = Mapping[str, Sequence[VirtualTensor]]
"""Shard file name -> its tensors, in order."""


@dataclass(frozen=True, slots=True)
class Translated:
    """A checkpoint of another format.

    Attributes:
        folder: holds the small files of a Hugging Face checkpoint (config, tokenizer).
        shards: its virtual shards.
        originals: the files that the tensors are made from.
        serial: whether reading a tensor holds a whole file in memory, so that files should be read
            in turn.
    """

    folder: Path
    shards: Shards
    originals: tuple[Path, ...]
    serial: bool = False

    @property
    def weight_map(self) -> dict[str, str]:
        """Tensor name -> shard file name."""
        return {virtual.name: shard for shard, made in self.shards.items() for virtual in made}


def split_shards(tensors: Sequence[VirtualTensor], limit: int = MAX_SHARD) -> Shards:
    """Distribute tensors over shards of at most ``limit`` bytes, in their order.

    A tensor larger than that is a shard by itself. The names are those of Hugging Face.
    """
    parts: list[list[VirtualTensor]] = [[]]
    size = 0
    for virtual in tensors:
        if parts[-1] and size + virtual.nbytes > limit:
            parts.append([])
            size = 0
        parts[-1].append(virtual)
        size += virtual.nbytes
    count = len(parts)
    if count == 1:
        return {"model.safetensors": parts[0]}
    return {f"model-{n:05d}-of-{count:05d}.safetensors": p for n, p in enumerate(parts, 1)}


def index_text(shards: Shards) -> str:
    """The text of ``model.safetensors.index.json``."""
    total = sum(virtual.nbytes for made in shards.values() for virtual in made)
    weight_map = {virtual.name: shard for shard, made in shards.items() for virtual in made}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(index, indent=2) + "\n"


@contextmanager
def making(folder: Path) -> Iterator[Path]:
    """A folder to write into; it becomes ``folder``, in the cache, if the block succeeds.

    Raises DestinationError if the cache cannot be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        discard_stale(folder.parent, ".making-")
        with TemporaryDirectory(prefix=".making-", dir=folder.parent) as temporary:
            part = Path(temporary) / folder.name
            part.mkdir()
            yield part
            flush(part)
            part.rename(folder)
    except (OSError, SafetensorError) as error:
        if not folder.is_dir():  # unless another run has made it meanwhile
            raise cache_error(folder, error) from error


class VirtualFile:
    """A safetensors file that is never written: its header, and the places of its tensors.

    Wider dtypes come first, so that every tensor is aligned; the order is otherwise kept.
    """

    def __init__(self, tensors: Sequence[VirtualTensor]) -> None:
        self.tensors = sorted(tensors, key=lambda virtual: -virtual.dtype.itemsize)
        self.header = _header(self.tensors)
        sizes = (virtual.nbytes for virtual in self.tensors)
        self.starts = list(accumulate(sizes, initial=len(self.header)))


class VirtualShard(io.RawIOBase):
    """A ``VirtualFile``, open for reading; it holds one tensor at a time."""

    def __init__(self, file: VirtualFile) -> None:
        super().__init__()
        self._tensors, self._header, self._starts = file.tensors, file.header, file.starts
        self._held: tuple[int, memoryview] = (-1, memoryview(b""))
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._starts[-1]}
        self._position = max(start[whence] + offset, 0)
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        part = self._at(self._position)[: len(view)]  # to the end of a tensor at most
        view[: len(part)] = part
        self._position += len(part)
        return len(part)

    def _at(self, position: int) -> memoryview:
        """The bytes from ``position`` to the end of the tensor that it is in."""
        if position < len(self._header):
            return memoryview(self._header)[position:]
        if position >= self._starts[-1]:
            return memoryview(b"")
        place = bisect_right(self._starts, position) - 1
        if self._held[0] != place:
            self._held = (-1, memoryview(b""))  # release the old tensor before the new one is made
            self._held = (place, self._made(self._tensors[place]))
        return self._held[1][position - self._starts[place] :]

    def _made(self, virtual: VirtualTensor) -> memoryview:
        tensor = virtual.make()
        if tensor.dtype != virtual.dtype or tuple(tensor.shape) != virtual.shape:
            raise CheckpointError(
                f"tensor {virtual.name} is not what its file said",
                expected=f"{virtual.dtype} {list(virtual.shape)}",
                found=f"{tensor.dtype} {list(tensor.shape)}",
            )
        return to_bytes(tensor)


def _header(tensors: Sequence[VirtualTensor]) -> bytes:
    names = {dtype: name for name, dtype in DTYPES.items()}
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for virtual in tensors:
        if virtual.dtype not in names:
            raise CheckpointError(
                f"tensor {virtual.name} cannot be stored", expected="a dtype of safetensors",
                found=str(virtual.dtype),
            )  # fmt: skip
        entries[virtual.name] = {
            "dtype": names[virtual.dtype],
            "shape": list(virtual.shape),
            "data_offsets": [start, start + virtual.nbytes],
        }
        start += virtual.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
