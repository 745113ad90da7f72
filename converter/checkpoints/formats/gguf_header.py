"""The header of a GGUF file, looked through before others read it.

What reads these files makes objects for every element of a list and layers for every number, so a
small file could ask for all memory there is.
"""

import re
import struct
from io import BufferedReader
from pathlib import Path

from converter.errors import CheckpointError

MAX_FIELDS = 10_000
MAX_TENSORS = 200_000
MAX_ELEMENTS = 1 << 21
"""Of a list; the largest vocabularies have a quarter of a million words, and twice that in merges.
"""

MAX_TEXT = 16_000_000
"""Bytes of a string."""

LIMITS = (
    (re.compile(r".*\.(block|expert)_count"), 10_000),
    (re.compile(r"(?!general\.).*(_length|_count|_size|_rank)"), 1 << 24),
)
"""Endings of keys -> the most that such a number can be. Those that begin with general describe the
file: some have its number of parameters."""

SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q",
           11: "<q", 12: "<d"}  # fmt: skip
STRING, LIST = 8, 9
"""Types of values, by their numbers in the format."""


def check_header(path: Path) -> None:
    """Refuse a GGUF file whose header no model has.

    Raises:
        CheckpointError: it is none, ends early, or asks for more than there can be.
    """
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise CheckpointError(f"{path.name} is not a GGUF file", hint="fetch the file again")
        try:
            _check(file)
        except (ValueError, struct.error) as error:
            raise CheckpointError(
                f"the header of {path.name} is damaged", found=str(error),
                hint="fetch the file again",
            ) from error  # fmt: skip


def _check(file: BufferedReader) -> None:
    (version,) = _read(file, "<I")
    if version not in (2, 3):
        raise ValueError(f"version {version}, where 2 and 3 are known")
    tensors, fields = _read(file, "<QQ")
    if fields > MAX_FIELDS or tensors > MAX_TENSORS:
        raise ValueError(f"{fields:,} fields and {tensors:,} tensors")
    for _ in range(fields):
        key = _text(file)
        (kind,) = _read(file, "<I")
        _value(file, key, kind)
    for _ in range(tensors):
        name = _text(file)
        (axes,) = _read(file, "<I")
        if axes > 4:
            raise ValueError(f"tensor {name} of {axes:,} axes")
        _read(file, f"<{axes}QIQ")


def _value(file: BufferedReader, key: str, kind: int) -> None:
    if kind == STRING:
        _text(file)
    elif kind == LIST:
        _list(file, key)
    else:
        (number,) = _read(file, _scalar(kind))
        for pattern, most in LIMITS:
            if pattern.fullmatch(key) and number > most:
                raise ValueError(f"{key} is {number:,}, where at most {most:,} can be")


def _list(file: BufferedReader, key: str) -> None:
    kind, count = _read(file, "<IQ")
    if count > MAX_ELEMENTS:
        raise ValueError(f"{key} has {count:,} elements")
    if kind == STRING:
        for _ in range(count):
            _text(file)
    else:
        _read(file, f"<{count}{_scalar(kind)[1:]}")


def _scalar(kind: int) -> str:
    if kind not in SCALARS:
        raise ValueError(f"a value of the unknown type {kind}")
    return SCALARS[kind]


def _text(file: BufferedReader) -> str:
    (length,) = _read(file, "<Q")
    if length > MAX_TEXT:
        raise ValueError(f"a text of {length:,} bytes")
    return file.read(length).decode("utf-8", "replace")


def _read(file: BufferedReader, layout: str) -> tuple[int, ...]:
    """Numbers in a layout of ``struct``. Raises struct.error at the end of the file."""
    return struct.unpack(layout, file.read(struct.calcsize(layout)))
