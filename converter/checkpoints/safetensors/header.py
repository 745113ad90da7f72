"""Read and check the header of a safetensors file.

A file is 8 bytes of little-endian header length, a JSON header, and the tensors' bytes. A header
may have 100 MB, and a JSON parser would use twenty times as much memory before any check. Here
every entry is checked before the next one is read.
"""

import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from typing import Annotated

import msgspec
import torch

from converter.checkpoints.intact import readable, refuse_placeholder
from converter.errors import CheckpointError
from converter.runtime.strict_json import unique
from converter.text import one_line

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

_MAX_AXES = 64
"""The most axes of a tensor, as in PyTorch."""

_MAX_ENTRY = 4096
"""The most bytes of an entry: a dtype, two offsets and 64 axes take at most half of it."""

MAX_NAME = 4096
"""The most bytes of a tensor's name; the longest real ones are near 100."""


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
    """A parsed safetensors header; ``tensors`` in file order, ``data_start`` is the first byte of
    data.
    """

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


def header_of(file: RawIOBase, name: str) -> Header:
    """``read_header`` of an open file, whose name is for messages."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    length = length_of(read_exactly(file, min(size, 64), name), size, name)
    file.seek(8)
    return parse_header(read_exactly(file, length, "the header"), size, name)


def length_of(start: bytes | bytearray, size: int, name: str) -> int:
    """Bytes of the header of a file of ``size`` bytes that begins with ``start``.

    Raises CheckpointError if it has none, or one that is too long.
    """
    refuse_placeholder(start, name)
    length = int.from_bytes(start[:8], "little")
    if size < 8 or length > min(size - 8, MAX_HEADER):
        raise CheckpointError(
            f"{name} is truncated or not a safetensors file",
            expected=f"a header of at most {min(max(size - 8, 0), MAX_HEADER):,} bytes",
            found=f"a length field of {length:,}",
            hint="fetch the file again",
        )
    return length


def read_exactly(file: RawIOBase, count: int, name: str) -> bytearray:
    """The next bytes of a file; ``name`` is for the message. Raises CheckpointError if it ends
    early.
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

    The tensors must cover the data section exactly, without holes or overlaps. The length of each
    must agree with its dtype and shape. Names must be plain text and unique.

    Raises:
        CheckpointError: naming ``name`` and, where there is one, the tensor.
    """
    data_start = 8 + len(raw)
    try:
        tensors = sorted(_entries(raw, data_start), key=lambda info: (info.start, info.end))
    except ValueError as error:
        raise _bad(name, str(error)) from error
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
            expected = f"a shape that fits in a file, not {list(info.shape)}"
            if needed is not None:
                expected = f"{needed // 8:,} bytes for {info.dtype} {list(info.shape)}"
            what = f"tensor {info.name} has the wrong length"
            raise _bad(name, what, expected=expected, found=f"{info.nbytes:,}")
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
    """Bits of a tensor; None if this number, or an intermediate product, needs more than 64 bits,
    which safetensors also refuses.
    """
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


_SPACE = rb"[ \t\n\r]*+"
_STRING = rb'"([^"\\\x00-\x1f]*+(?:\\[^\x00-\x1f][^"\\\x00-\x1f]*+)*+)"'
_OPEN = re.compile(rb"\{" + _SPACE + rb"(\}?)")
_KEY = re.compile(_SPACE + _STRING + _SPACE + b":" + _SPACE)
_VALUE = re.compile(_STRING)
_BODY = re.compile(rb"\{[^{}]{0,%d}+\}" % _MAX_ENTRY)
_NEXT = re.compile(_SPACE + rb"([,}])")
_END = re.compile(_SPACE + rb"\Z")
_PAIR = _SPACE + _STRING + _SPACE + b":" + _SPACE + _STRING + _SPACE
_METADATA = re.compile(rb"null|\{(?:" + _SPACE + rb"|" + _PAIR + rb"(?:," + _PAIR + rb")*+)\}")


_Count = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
"""A count in a header. Raises for similar values (true, 2.0, 1e999, -1)."""


class _Entry(msgspec.Struct, frozen=True, gc=False):
    """One entry of a header; unknown keys are ignored."""

    dtype: str
    shape: Annotated[tuple[_Count, ...], msgspec.Meta(max_length=_MAX_AXES)]
    data_offsets: tuple[_Count, _Count]


_ENTRY = msgspec.json.Decoder(_Entry)
_UNIQUE = json.JSONDecoder(object_pairs_hook=unique)

_NO_ENTRY = "the header has an entry without dtype, shape or offsets"

_QUOTES = 8
"""Number of quotation marks in an entry with each key of ``_Entry`` once, and no others."""


def _entries(raw: bytes | bytearray, data_start: int) -> Iterator[TensorInfo]:
    """The tensors of a header, in its order. Raises ValueError with the fault."""
    text = _Text(raw)
    for name in text.keys():  # noqa: SIM118 - it reads them
        if name == "__metadata__":
            for string in _VALUE.finditer(text.take(_METADATA).group()):
                _decoded(string[1])
            continue
        body = text.take(_BODY).group()
        try:
            entry = _ENTRY.decode(body)
            if body.count(b'"') != _QUOTES:  # msgspec takes the last of two equal keys
                _UNIQUE.decode(body.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{_NO_ENTRY}: that of tensor {name}") from error
        start, end = (data_start + offset for offset in entry.data_offsets)
        yield TensorInfo(name, sys.intern(entry.dtype), entry.shape, start, end)
    text.take(_END)


class _Text:
    """A header, and the place up to which it has been read."""

    def __init__(self, raw: bytes | bytearray) -> None:
        self.raw, self.place = raw, 0

    def take(self, pattern: re.Pattern[bytes]) -> re.Match[bytes]:
        """What comes next, if it is this. Raises ValueError."""
        found = pattern.match(self.raw, self.place)
        if found is None:
            known = {_BODY: _NO_ENTRY, _OPEN: "the header is not a JSON object"}
            other = f"the header is not JSON from its byte {self.place:,} on"
            raise ValueError(known.get(pattern, other))
        self.place = found.end()
        return found

    def keys(self) -> Iterator[str]:
        """The keys of an object; the caller reads the value of each before the next."""
        names: set[str] = set()
        closed = self.take(_OPEN)[1] == b"}"
        while not closed:
            name = _decoded(self.take(_KEY)[1])
            if not 0 < len(name) <= MAX_NAME or not name.isprintable():
                raise ValueError(f"the name of tensor {one_line(name, 80)} is not plain text")
            if name in names:
                raise ValueError("the header names a key twice")
            names.add(name)
            yield name
            closed = self.take(_NEXT)[1] == b"}"


def _decoded(raw: bytes) -> str:
    """A JSON string. Raises ValueError if it is not valid Unicode."""
    if b"\\" not in raw:
        return raw.decode("utf-8")
    text: str = json.loads(b'"' + raw + b'"')
    text.encode("utf-8")  # a surrogate half cannot be encoded
    return text
