"""The one way to a terminal, or to the log of a job: nothing in a text can steer either.

Names of tensors, files and tokens, and what a manifest or a server says, are chosen by strangers.
Printed as they are they could move the cursor, hide or reverse what follows, begin lines that look
like ours, or give orders to the program that keeps the log.
"""

import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import click

from converter.errors import DestinationError
from converter.manifest import to_json
from converter.runtime.cache import using_cache
from converter.runtime.files import reason
from converter.runtime.progress import LOG, Progress, aside, recording
from converter.text import one_line, readable, redacted

_ORDERS = re.compile(r"^(\s*)::|##(?=\w*\[)")
"""What GitHub, Azure and TeamCity take for an order in a line of a log."""


@contextmanager
def printing() -> Iterator[None]:
    """Let printing not fail by the terminal's encoding, nor lead into a file of a model.

    A standard stream that is closed would leave its number to the next file that is opened, and
    what libraries write to standard error would end up there. If the disk of standard output is
    full, one sentence says so.
    """
    _read_names_as_utf8()
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # it gets the lowest number that is free: this one
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    except OSError as error:
        if error.filename is not None:  # a file, not a stream
            raise
        echo(f"error: standard output cannot be written: {reason(error)}", err=True)
        sys.exit(DestinationError.exit_code)


def _read_names_as_utf8() -> None:
    """Begin again in Python's UTF-8 mode if the locale is another: tokenizers knows no other names.

    The terminal keeps the encoding that it has.
    """
    if sys.getfilesystemencoding() == "utf-8" or os.environ.get("PYTHONUTF8") == "1":
        return
    encoding = getattr(sys.stdout, "encoding", "utf-8")
    os.environ.setdefault("PYTHONIOENCODING", f"{encoding}:backslashreplace")
    os.environ["PYTHONUTF8"] = "1"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606 - this program


def echo(text: str, *, err: bool = False) -> None:
    """Print our lines, which may quote untrusted text that was made one line before.

    Standard error that cannot be written ends no run.
    """
    write("\n".join(map(_harmless, text.split("\n"))), err=err)


def write(text: str, *, err: bool = False) -> None:
    """Print a text as it is; otherwise as ``echo``."""
    try:
        with aside():
            click.echo(text, err=err)
    except (OSError, ValueError):  # the disk of a log is full, or whoever read it has gone
        if not err:
            raise


def _harmless(line: str) -> str:
    """A line with its spaces, without tokens, and with escapes for control characters."""
    line = redacted(readable(line))
    if not line.isprintable():
        line = "".join(c if c.isprintable() else one_line(c) or " " for c in line)
    return _ORDERS.sub(
        lambda found: f"{found[1]}\\x3a:" if found[1] is not None else "#\\x23", line
    )


def as_json(data: Any) -> str:
    """JSON with the letters of all languages, and escapes for what could steer a terminal, or what
    it cannot show.

    Args:
        data: may hold parts of a manifest.
    """
    text = json.dumps(data, indent=1, ensure_ascii=False, default=to_json)
    with suppress(UnicodeEncodeError):  # bytes that the locale could not decode may be letters
        text = text.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    if text.replace("\n", "").isprintable() and _can_show(text, encoding):
        return text
    return "".join(
        c if c == "\n" or (c.isprintable() and _can_show(c, encoding)) else json.dumps(c)[1:-1]
        for c in text
    )


def _can_show(text: str, encoding: str) -> bool:
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True


class _Printer(logging.Handler):
    """Prints each record as one line without control characters, and tracebacks as lines."""

    def emit(self, record: logging.LogRecord) -> None:
        for line in _lines(record):
            echo(line, err=True)


class _Writer(logging.FileHandler):
    """Adds the same lines to a file, with the time. A disk that is full ends no run."""

    def emit(self, record: logging.LogRecord) -> None:
        time = datetime.fromtimestamp(record.created).astimezone().isoformat(" ", "seconds")
        told = "".join(f"{time} {_harmless(line)}\n" for line in _lines(record))
        with suppress(OSError, ValueError):
            if self.stream:
                self.stream.write(told)
                self.stream.flush()


def _lines(record: logging.LogRecord) -> list[str]:
    """The printed form of a record."""
    text = record.getMessage()
    if record.levelno >= logging.WARNING:
        return [f"warning: {one_line(text)}"]
    traced = traceback.format_exception(record.exc_info[1]) if record.exc_info else []
    return [text.replace("\n", " "), *"".join(traced).rstrip("\n").splitlines()]


@contextmanager
def reporting(
    *,
    quiet: bool,
    cache_dir: Path | None = None,
    verbose: bool = False,
    log_file: Path | None = None,
) -> Iterator[Progress]:
    """Print the messages of the block, and set its cache folder.

    Args:
        quiet: warnings only; otherwise also notes, and bars if standard error is a terminal.
        cache_dir: the cache folder; None for the default one.
        verbose: also seconds and tracebacks.
        log_file: gets all of that, whatever is printed.
    """
    is_terminal = sys.stderr is not None and sys.stderr.isatty()
    before = (LOG.level, LOG.propagate)
    terminal: logging.Handler = _Printer()
    terminal.setLevel(logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO)
    handlers = [terminal, *([_log(log_file)] if log_file else [])]
    LOG.setLevel(logging.DEBUG if log_file else terminal.level)
    LOG.propagate = False  # a library's handler would print the same again, and as it is
    for handler in handlers:
        LOG.addHandler(handler)
    try:
        with (
            using_cache(cache_dir),
            recording(shows_bars=not quiet and is_terminal) as progress,
        ):
            yield progress
    finally:
        for handler in handlers:
            LOG.removeHandler(handler)
            handler.close()
        LOG.setLevel(before[0])
        LOG.propagate = before[1]


def _log(path: Path) -> logging.Handler:
    """What adds to a file; a file that cannot be written is said, and ends the program."""
    try:
        return _Writer(path, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        echo(f"error: --log-file {path} cannot be written: found {reason(error)}", err=True)
        sys.exit(DestinationError.exit_code)
