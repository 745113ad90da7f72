"""The JSON of a safetensors header, read one entry at a time.

A header may have 100 MB, and a JSON parser makes twenty times that of it before anybody can look.
Here every entry is checked before the next one is read, so what is held is the names and numbers of
tensors, and what is no header is refused where it stops being one.
"""

import json
import re
import sys
from collections.abc import Iterator
from typing import Annotated

import msgspec

from converter.runtime.strict_json import unique
from converter.text import one_line

MAX_AXES = 64
"""Of a tensor; PyTorch has no more."""

MAX_ENTRY = 4096
"""Bytes of an entry: a dtype, two offsets and 64 axes take half of it at most."""

MAX_NAME = 4096
"""Bytes of a tensor's name; the longest are near 100."""

METADATA = "__metadata__"

_Count = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
"""A number of a header that is a count and nothing like it (true, 2.0, 1e999, -1)."""

Entry = tuple[str, str, tuple[int, ...], int, int]
"""Name, dtype, shape, and byte offsets of start and end."""

_SPACE = rb"[ \t\n\r]*+"
_STRING = rb'"([^"\\\x00-\x1f]*+(?:\\[^\x00-\x1f][^"\\\x00-\x1f]*+)*+)"'
_OPEN = re.compile(rb"\{" + _SPACE + rb"(\}?)")
_KEY = re.compile(_SPACE + _STRING + _SPACE + b":" + _SPACE)
_VALUE = re.compile(_STRING)
_BODY = re.compile(rb"\{[^{}]{0,%d}+\}" % MAX_ENTRY)
_NEXT = re.compile(_SPACE + rb"([,}])")
_END = re.compile(_SPACE + rb"\Z")
_PAIR = _SPACE + _STRING + _SPACE + b":" + _SPACE + _STRING + _SPACE
_METADATA = re.compile(rb"null|\{(?:" + _SPACE + rb"|" + _PAIR + rb"(?:," + _PAIR + rb")*+)\}")


def read_entries(raw: bytes | bytearray, data_start: int) -> Iterator[Entry]:
    """The tensors of a header, in its order; offsets count from the beginning of the file.

    Raises:
        ValueError: it is not the JSON of a header; the text says why.
    """
    text = _Text(raw)
    for name in text.keys():  # noqa: SIM118 - it reads them
        if name == METADATA:
            text.skip_metadata()
        else:
            yield name, *_numbers(text.take(_BODY).group(), name, data_start)
    text.take(_END)


class _Text:
    """A header, and how far it has been read."""

    def __init__(self, raw: bytes | bytearray) -> None:
        self.raw, self.place = raw, 0

    def take(self, pattern: re.Pattern[bytes]) -> re.Match[bytes]:
        """What comes next, if it is this. Raises ValueError."""
        found = pattern.match(self.raw, self.place)
        if found is None:
            raise ValueError(_said(pattern, self.place))
        self.place = found.end()
        return found

    def keys(self) -> Iterator[str]:
        """The keys of an object; whoever gets one reads its value before asking for the next."""
        if self.take(_OPEN)[1]:
            return
        names: set[str] = set()
        while True:
            name = _decoded(self.take(_KEY)[1])
            if not 0 < len(name) <= MAX_NAME or not name.isprintable():
                raise ValueError(f"the name of tensor {one_line(name, 80)} is not plain text")
            if name in names:
                raise ValueError("the header names a key twice")
            names.add(name)
            yield name
            if self.take(_NEXT)[1] == b"}":
                return

    def skip_metadata(self) -> None:
        """What a file says of itself: strings by name, or nothing."""
        said = self.take(_METADATA).group()
        if b"\\" not in said:
            said.decode("utf-8")
            return
        for found in _VALUE.finditer(said):
            _decoded(found[1])


def _said(pattern: re.Pattern[bytes], place: int) -> str:
    if pattern is _BODY:
        return "the header has an entry without dtype, shape or offsets"
    if pattern is _OPEN and not place:
        return "the header is not a JSON object"
    return f"the header is not JSON from its byte {place:,} on"


def _decoded(raw: bytes) -> str:
    """A string of JSON. Raises ValueError if it is no Unicode."""
    if b"\\" not in raw:
        return raw.decode("utf-8")
    text: str = json.loads(b'"' + raw + b'"')
    text.encode("utf-8")  # half of a pair cannot be
    return text


class _Entry(msgspec.Struct, frozen=True, gc=False):
    """What the format says of one tensor; keys that the format does not know are ignored."""

    dtype: str
    shape: Annotated[tuple[_Count, ...], msgspec.Meta(max_length=MAX_AXES)]
    data_offsets: tuple[_Count, _Count]


_ENTRY = msgspec.json.Decoder(_Entry)
_UNIQUE = json.JSONDecoder(object_pairs_hook=unique)

_QUOTES = 8
"""Quotation marks of an entry that has each key of ``_Entry`` once, and no others."""


def _numbers(raw: bytes, name: str, data_start: int) -> tuple[str, tuple[int, ...], int, int]:
    """Dtype, shape, start and end of a tensor."""
    try:
        entry = _ENTRY.decode(raw)
        if raw.count(b'"') != _QUOTES:  # msgspec takes the last of two equal keys
            _UNIQUE.decode(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        what = f"the header has an entry without dtype, shape or offsets: that of tensor {name}"
        raise ValueError(what) from error
    start, end = entry.data_offsets
    return sys.intern(entry.dtype), entry.shape, data_start + start, data_start + end
