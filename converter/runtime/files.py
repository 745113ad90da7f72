"""Files read whole, if they are files and not larger than what is read can be."""

import os
import re
import stat
from pathlib import Path

MAX_TEXT = 256_000_000
"""Bytes of prose, of a word list or of a manifest; the largest manifests have a fiftieth of it."""

MAX_LINE = 1_000_000
"""Characters of a sentence or of a paragraph; more is no text."""


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
"""Beginning of a file, what the file is then, and what to do."""

_START = 1024
"""Bytes of a file that are looked at for it."""


def placeholder(start: bytes | bytearray) -> tuple[str, str] | None:
    """What lies in the place of a file that begins so, and what to do; None if nothing shows that
    it is not the file itself. A file that may not be empty is for the caller to refuse."""
    for pattern, what, hint in _PLACEHOLDERS:
        if re.match(pattern, start[:_START]):
            return what, hint
    return None


def start_of(path: Path) -> bytes:
    """The beginning of a regular file, for ``placeholder``. Raises OSError."""
    with open(path, "rb", opener=_open_regular) as file:
        return file.read(_START)


def check_file(path: Path) -> None:
    """Raise OSError if ``read_file`` would for something else than the size."""
    with open(path, "rb", opener=_open):
        pass


def read_file(path: Path, most: int = MAX_TEXT) -> bytes:
    """The bytes of a regular file; a pipe would be waited for, a device may never end.

    Raises:
        OSError: it is none, is larger, cannot be read, or is a ``placeholder``; ``strerror`` says
            so.
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


def read_text(path: Path) -> str:
    """The text of such a file, without a byte order mark.

    Raises:
        OSError: as ``read_file``.
        ValueError: it is not UTF-8, holds a zero byte, or has a line that is none.
    """
    lines, size = [], 0
    with open(path, encoding="utf-8-sig", opener=_open) as file:
        while line := file.readline(MAX_LINE + 1):
            size += len(line)
            if len(line) > MAX_LINE:
                raise ValueError(f"a line of more than {MAX_LINE:,} characters")
            if size > MAX_TEXT:
                raise ValueError(f"more than {MAX_TEXT:,} characters")
            if "\0" in line:
                raise ValueError("a zero byte; text is to be saved as UTF-8")
            lines.append(line)
    return "".join(lines)


def reason(error: Exception) -> str:
    """What an error of these says."""
    return getattr(error, "strerror", None) or str(error)
