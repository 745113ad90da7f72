"""A sign of life on a terminal, once a second.

A bar moves when a piece of work is done, and a piece may take long; other work is not counted at
all. A thread draws the newest bar again, whose time goes on, or, where there is none, a line that
names what is being done and for how long.
"""

import os
import time
from collections.abc import Callable, Sequence
from threading import Event, Lock, Thread
from typing import Never, Self, TextIO

from tqdm import tqdm
from tqdm.utils import disp_trim

_EVERY = 1.0
"""Seconds from one sign of life to the next."""


class Clock:
    """Draws on a stream, from when it is entered until it is left.

    Args:
        stream: a terminal.
        bars: gives those that are open, the newest last.
        doing: gives what is being done and since when, by ``time.monotonic``; no words, or None,
            for nothing that is to be shown.
    """

    def __init__(
        self,
        stream: TextIO,
        bars: "Callable[[], Sequence[tqdm[Never]]]",
        doing: Callable[[], tuple[str, float] | None],
    ) -> None:
        self._stream, self._bars, self._doing = stream, bars, doing
        self._line: tqdm[Never] | None = None
        self._lock, self._over = Lock(), Event()
        self._thread = Thread(target=self._run, name="clock", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join(_EVERY)  # not for ever: it may wait for tqdm's lock, lost by an interrupt

    def hide(self) -> None:
        """Take the line away, before a bar takes its place."""
        with self._lock:
            self._close()

    def _run(self) -> None:
        while not self._over.wait(_EVERY):
            with self._lock:
                if not self._over.is_set():
                    self._draw()
        self.hide()

    def _draw(self) -> None:
        doing = self._doing()
        if bars := self._bars():
            self._close()
            bars[-1].refresh()
        elif doing is None or not doing[0]:
            self._close()
        else:
            title, since = doing
            text = f"{title} {_clock(time.monotonic() - since)}"
            if self._line is None:
                self._line = tqdm(bar_format="{desc}", leave=False, file=self._stream)
            self._line.set_description_str(disp_trim(text, columns_of(self._stream)))

    def _close(self) -> None:
        if self._line is not None:
            self._line.close()
            self._line = None


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes:02}:{rest:02}"


def columns_of(stream: TextIO) -> int:
    """The columns that a line may have: one less than the terminal, where the cursor stays."""
    try:
        columns = int(os.environ.get("COLUMNS", 0)) or os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):  # no terminal, or COLUMNS is no number
        columns = 0
    return max(columns or 80, 10) - 1
