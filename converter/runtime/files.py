"""Files read whole, if they are files and not larger than what is read can be."""

import os
import stat
from pathlib import Path

MAX_TEXT = 256_000_000
"""Bytes of prose, of a word list or of a manifest; the largest manifests have a fiftieth of it."""

MAX_LINE = 1_000_000
"""Characters of a sentence or of a paragraph; more is no text."""


def read_file(path: Path, most: int = MAX_TEXT) -> bytes:
    """The bytes of a regular file; a pipe would be waited for, a device may never end.

    Raises:
        OSError: it is none, or is larger, or cannot be read; ``strerror`` says so.
    """
    with open(path, "rb", opener=_open) as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(most + 1)
    if len(data) > most:
        raise OSError(0, f"{max(size, len(data)):,} bytes, more than {most:,}", str(path))
    return data


def _open(path: str, flags: int) -> int:
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
