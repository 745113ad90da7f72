"""The header of a safetensors file, read and checked by itself.

A file is 8 bytes of little-endian header length, a JSON header, and the tensors' bytes.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path

import torch

from converter.checkpoints.safetensors.header_json import read_entries
from converter.errors import CheckpointError

MAX_HEADER = 100_000_000
"""The limit of the safetensors format on a header, in bytes."""

FLOATS = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""The dtypes that are plain floating-point numbers."""

DTYPES = FLOATS | {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
}
"""The dtypes of the format that PyTorch has."""

BITS = {name: 8 * dtype.itemsize for name, dtype in DTYPES.items()}
BITS |= {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
"""Bits per element of the dtypes of the format (safetensors 0.8)."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a header. ``start`` and ``end`` are byte offsets in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Header:
    """A parsed safetensors header; ``tensors`` in file order, ``data_start`` where they begin."""

    data_start: int
    size: int
    tensors: dict[str, TensorInfo]


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file, and the file's size against it.

    Raises:
        CheckpointError: the file is missing, truncated, or not well-formed safetensors.
    """
    with readable(path.name), path.open("rb", buffering=0) as file:
        return header_of(file, path.name)


@contextmanager
def readable(name: str) -> Iterator[None]:
    """Raise CheckpointError where the operating system cannot read a file of that name."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{name} cannot be read", found=error.strerror) from error


def header_of(file: RawIOBase, name: str) -> Header:
    """``read_header`` of an open file, whose name is for messages."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    length = length_of(read_exactly(file, min(size, 32), name), size, name)
    file.seek(8)
    return parse_header(read_exactly(file, length, "the header"), size, name)


def length_of(start: bytes | bytearray, size: int, name: str) -> int:
    """Bytes of the header of a file of ``size`` bytes that begins with ``start``.

    Raises:
        CheckpointError: it has none, or a longer one than can be.
    """
    refuse_pointer(start, name)
    length = int.from_bytes(start[:8], "little")
    if size < 8 or length > min(size - 8, MAX_HEADER):
        raise CheckpointError(
            f"{name} is truncated or not a safetensors file",
            expected=f"a header of at most {min(max(size - 8, 0), MAX_HEADER):,} bytes",
            found=f"a length field of {length:,}",
            hint="fetch the file again",
        )
    return length


def refuse_pointer(start: bytes | bytearray, name: str) -> None:
    """Raise CheckpointError if a file that begins so is what git-lfs leaves in the place of it."""
    if start.startswith(b"version https://git"):
        what = f"{name} is a pointer of git-lfs, not the file itself"
        raise CheckpointError(what, hint="run 'git lfs pull' in the source")


def read_exactly(file: RawIOBase, count: int, name: str) -> bytearray:
    """The next bytes of a file; ``name`` says of what.

    Raises:
        CheckpointError: it ends early, or cannot be read.
    """
    data = bytearray(count)
    fill(file, memoryview(data), name)
    return data


def fill(file: RawIOBase, view: memoryview, name: str) -> memoryview:
    """``read_exactly`` into a buffer, which is returned."""
    done = 0
    with readable(name):
        while done < len(view):
            got = file.readinto(view[done:])
            if not got:
                what = f"the file ends in the middle of {name}"
                raise CheckpointError(what, hint="fetch it again")
            done += got
    return view


def parse_header(raw: bytes | bytearray, size: int, name: str) -> Header:
    """Parse the JSON of a header for a file of ``size`` bytes, and check it against the format.

    The tensors must cover the data section exactly, without holes or overlaps, and each must be
    as long as its dtype and shape say. Names must be plain text, each there once.

    Raises:
        CheckpointError: naming ``name`` and, where there is one, the tensor.
    """
    data_start = 8 + len(raw)
    try:
        tensors = [TensorInfo(*entry) for entry in read_entries(raw, data_start)]
    except ValueError as error:
        raise _bad(name, str(error)) from error
    tensors.sort(key=lambda info: (info.start, info.end))
    position = data_start
    for info in tensors:
        if info.start != position or info.end < info.start:
            raise _bad(
                name,
                f"tensor {info.name} leaves a hole or an overlap",
                expected=f"a start at byte {position:,}",
                found=f"{info.start:,} to {info.end:,}",
            )
        bits = BITS.get(info.dtype)
        if bits is not None and (needed := _bits(info.shape, bits)) != info.nbytes * 8:
            raise _bad(
                name,
                f"tensor {info.name} has the wrong length",
                expected=f"{needed // 8:,} bytes for {info.dtype} {list(info.shape)}"
                if needed is not None
                else f"a shape that fits in a file, not {list(info.shape)}",
                found=f"{info.nbytes:,}",
            )
        position = info.end
    if position != size:
        raise _bad(
            name,
            "the file is truncated or has bytes after its last tensor",
            expected=f"{position:,} bytes",
            found=f"{size:,}",
        )
    return Header(data_start, size, {info.name: info for info in tensors})


def _bad(name: str, what: str, **details: str) -> CheckpointError:
    return CheckpointError(f"{name}: {what}", hint="fetch the file again", **details)


def _bits(shape: Iterable[int], each: int) -> int | None:
    """Bits of a tensor; None if their number, or one on the way to it, has more than 64 digits in
    base 2, which safetensors refuses, too."""
    total = 1
    for count in (*shape, each):
        total *= count
        if total >= 1 << 64:
            return None
    return total


def to_bytes(tensor: torch.Tensor) -> memoryview:
    """The raw little-endian bytes of a tensor, without a copy if it is contiguous on the CPU."""
    flat = tensor.detach().cpu().contiguous().flatten()
    array = flat.view(torch.uint8).numpy()
    return memoryview(array) if array.size else memoryview(b"")  # type: ignore[arg-type]
