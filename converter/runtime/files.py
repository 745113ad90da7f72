"""Read whole files, if they are regular and not too large."""

import codecs
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

MAX_TEXT = 256_000_000
"""The most bytes of prose, a word list or a manifest; the largest manifests have a fiftieth."""

MAX_LINE = 1_000_000
"""The most characters of a sentence or a paragraph; a longer line is not a text."""


_PLACEHOLDERS = (
    (rb"version https?://(git-lfs|hawser)\.github\.com/", "a pointer of git-lfs",
     "run 'git lfs pull' in the source"),
    (rb"(?i)(\xef\xbb\xbf)?\s*(<!doctype html|<html)", "a page of HTML",
     "fetch the file again; it may need a login"),
    (rb"(?i)(\xef\xbb\xbf)?\s*(<\?xml[^>]*>\s*)?<error>|(Entry|Repository) not found|"
     rb"Invalid (credentials|username or password)|Access to model ",
     "an error message of a server", "fetch the file again; it may need a login"),
    (rb"\0{16,}\Z", "a file of zero bytes", "the download did not finish; fetch the file again"),
)  # fmt: skip
"""Beginning of a file, what such a file is, and the hint."""

_START = 1024
"""Bytes of a file that are compared with it."""


def placeholder(start: bytes | bytearray) -> tuple[str, str] | None:
    """A description of a placeholder that begins so, and the hint; None if it seems to be the file
    itself. The caller refuses empty files.
    """
    for pattern, what, hint in _PLACEHOLDERS:
        if re.match(pattern, start[:_START]):
            return what, hint
    return None


def start_of(path: Path) -> bytes:
    """The beginning of a regular file, for ``placeholder``. Raises OSError."""
    with open(path, "rb", opener=_open_regular) as file:
        return file.read(_START)


def check_file(path: Path) -> None:
    """Raise OSError if ``read_file`` would, except for the size."""
    with open(path, "rb", opener=_open):
        pass


def read_file(path: Path, most: int = MAX_TEXT) -> bytes:
    """The bytes of a regular file. Reading a pipe would wait, and a device may never end.

    Raises:
        OSError: it is not regular, is larger, cannot be read, or is a ``placeholder``; see its
            ``strerror``.
    """
    with open(path, "rb", opener=_open) as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(most + 1)
    if len(data) > most:
        raise OSError(0, f"{max(size, len(data)):,} bytes, more than {most:,}", str(path))
    return data


def _open(path: str, flags: int) -> int:
    number = _open_regular(path, flags)
    if found := placeholder(os.pread(number, _START, 0)):
        os.close(number)
        raise OSError(0, f"{found[0]}, not the file itself; {found[1]}", path)
    return number


def _open_regular(path: str, flags: int) -> int:
    number = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise OSError(0, "not a regular file", path)
    return number


def text_lines(path: Path, newline: str | None = None) -> Iterator[str | None]:
    """The lines of a text file, one at a time; None for one of more than ``MAX_LINE`` characters.

    A byte order mark is left out, and ``newline`` is that of ``open``.

    Raises:
        OSError: as ``read_file``.
        UnicodeError: it is not UTF-8; the message names the encoding, or the place.
    """
    number = 0
    with open(path, encoding="utf-8-sig", newline=newline, opener=_open) as file:
        try:
            while line := file.readline(MAX_LINE + 1):
                number += 1
                if "\0" in line:
                    raise UnicodeError(f"a zero byte in line {number}, as in UTF-16")
                is_long = len(line) > MAX_LINE
                while len(line) > MAX_LINE and not line.endswith("\n"):
                    line = file.readline(MAX_LINE + 1)
                yield None if is_long else line
        except UnicodeDecodeError as error:
            raise UnicodeError(_not_utf8(error, number)) from error


def read_text(path: Path) -> str:
    """The whole text of such a file.

    Raises:
        OSError: as ``read_file``.
        ValueError: as ``text_lines``, or a line is too long to be one.
    """
    lines, size = [], 0
    for line in text_lines(path):
        if line is None:
            raise ValueError(f"a line of more than {MAX_LINE:,} characters")
        size += len(line)
        if size > MAX_TEXT:
            raise ValueError(f"more than {MAX_TEXT:,} characters")
        lines.append(line)
    return "".join(lines)


def decode(data: bytes) -> str:
    """The text in bytes, without a byte order mark. Raises UnicodeError, as ``text_lines``."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnicodeError(_not_utf8(error, 0)) from error


_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"), (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"), (codecs.BOM_UTF16_BE, "UTF-16"),
)  # fmt: skip
"""Byte order marks of other encodings; the first two begin like the others."""


def _not_utf8(error: UnicodeDecodeError, lines: int) -> str:
    """What the file is instead of UTF-8; ``lines`` precede the decoded bytes."""
    for mark, name in _MARKS:
        if lines == 0 and error.start == 0 and error.object.startswith(mark):
            return f"{name}, as its first bytes say"
    zero = error.object.find(b"\0", 0, error.start)
    place = error.start if zero < 0 else zero
    line = lines + error.object.count(b"\n", 0, place) + 1
    if zero >= 0:
        return f"a zero byte in line {line}, as in UTF-16"
    return f"byte 0x{error.object[place]:02x} in line {line}, which is not UTF-8"


AS_UTF8 = "save it as UTF-8, for example with: iconv -f ENCODING -t UTF-8 OLD > NEW"
"""The hint for a text in another encoding."""


def reason(error: Exception) -> str:
    """The message of one of these errors."""
    return getattr(error, "strerror", None) or str(error)
