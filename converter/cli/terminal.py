"""Notes, warnings and bars of a command, on standard error."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from converter.runtime.cache import default_cache, using_cache
from converter.runtime.console import echo
from converter.runtime.progress import LOG, Progress, recording
from converter.text.sanitize import one_line


class Terminal(logging.Handler):
    """Prints each record as one line, without what could steer a terminal."""

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.levelno >= logging.WARNING:
            echo(f"warning: {one_line(text)}", err=True)
        else:
            echo(text.replace("\n", " "), err=True)


@contextmanager
def reporting(*, quiet: bool, cache_dir: Path | None = None) -> Iterator[Progress]:
    """Print what the block tells, and let it keep things between runs in one folder.

    Args:
        quiet: warnings only; otherwise also notes, and bars if standard error is a terminal.
        cache_dir: the cache folder; None for the default one.
    """
    terminal, before = Terminal(), (LOG.level, LOG.propagate)
    LOG.setLevel(logging.WARNING if quiet else logging.INFO)
    LOG.propagate = False  # a library's handler would print the same again, and as it is
    LOG.addHandler(terminal)
    try:
        with (
            using_cache(cache_dir or default_cache()),
            recording(shows_bars=not quiet and sys.stderr.isatty()) as progress,
        ):
            yield progress
    finally:
        LOG.removeHandler(terminal)
        LOG.setLevel(before[0])
        LOG.propagate = before[1]
