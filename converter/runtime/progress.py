"""The progress of a run: stages with seconds and memory, notes, warnings, bars.

Notes and warnings are records of the logger ``converter``, of level INFO and WARNING; seconds and
tracebacks are of level DEBUG. Without a handler nothing is printed. The current ``Progress`` keeps
warnings, seconds and memory, and says whether bars are shown. Without one, everything here works
and nothing is kept or shown. A thread has the caller's ``Progress`` only if it belongs to a
``ThreadPool``.

Whoever runs a model over texts, or reads much of a file, opens the bar that counts it
(``tests/test_every_command.py`` looks for it); what cannot be counted is named by ``doing``, or is
the stage. On a terminal a ``Clock`` shows both.
"""

import logging
import resource
import sys
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Never, ParamSpec, TypeVar

from tqdm import tqdm

from converter.runtime.clock import Clock, columns_of
from converter.runtime.memory import number_in
from converter.text import one_line, redacted

P = ParamSpec("P")
T = TypeVar("T")

LOG = logging.getLogger("converter")
LOG.addHandler(logging.NullHandler())  # or Python prints warnings where nobody has asked for them

_NARROW = 60
"""Columns below which a bar is its name, its share, what is left, and no more."""


@dataclass(slots=True)
class Progress:
    """The messages and measurements of a run so far.

    Attributes:
        shows_bars: whether bars appear on standard error.
        seconds: of each stage.
        memory: the largest resident set during each stage, in bytes; where the system cannot tell
            (anything but Linux), the largest of the process so far.
        warnings: in order.
        bars: the open bars, the innermost last.
        within: seconds of the stages that have ended inside the current one.
        peak: the largest resident set of the current stage before the last one inside it.
        doing: what is being done and since when, by ``time.monotonic``; the innermost last.
        clock: which shows that, where bars are shown.
    """

    shows_bars: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    bars: "list[tqdm[Never]]" = field(default_factory=list)
    within: float = 0.0
    peak: int = 0
    doing: list[tuple[str, float]] = field(default_factory=list)
    clock: Clock | None = None


_current: ContextVar[Progress | None] = ContextVar("progress", default=None)


def current() -> Progress:
    """The ``Progress`` of this context, or a new, unused one."""
    return _current.get() or Progress()


@contextmanager
def recording(*, shows_bars: bool = False) -> Iterator[Progress]:
    """Collect the messages of the block in one ``Progress``: the current one if there is one.

    Args:
        shows_bars: of a new one.
    """
    if (outer := _current.get()) is not None:
        yield outer
        return
    told = Progress(shows_bars)
    token = _current.set(told)
    if shows_bars and sys.stderr is not None:
        told.clock = Clock(
            sys.stderr, lambda: told.bars, lambda: told.doing[-1] if told.doing else None
        )
    try:
        with told.clock or nullcontext():
            yield told
    finally:
        _current.reset(token)


class ThreadPool(ThreadPoolExecutor):
    """A pool whose threads do each piece of work in a copy of the context that submitted it.

    So the current ``Progress`` and the cache folder are those of the run. Other threads have none.
    """

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        return super().submit(copy_context().run, partial(fn, *args, **kwargs))


def note(text: str) -> None:
    """Log a progress line."""
    LOG.info("%s", text)


def warn(text: str) -> None:
    """Log a warning, and keep it for the summary."""
    current().warnings.append(text)
    LOG.warning("%s", text)


def trace(error: BaseException) -> None:
    """Log the traceback of an error, at level DEBUG."""
    LOG.debug("%s", type(error).__name__, exc_info=error)


@contextmanager
def stage(name: str, title: str) -> Iterator[None]:
    """Announce a stage and add the seconds it took to ``seconds[name]``.

    The seconds and the memory of a stage inside another count for the inner one only.
    """
    note(title)
    with doing(title):
        yield from _timed(name)


def _timed(name: str) -> Iterator[None]:
    """See ``stage``."""
    progress, start = current(), time.perf_counter()
    before, progress.within = progress.within, 0.0
    peak, progress.peak = max(progress.peak, peak_memory()), 0
    _forget_peak()
    try:
        yield
    finally:
        took = time.perf_counter() - start
        progress.seconds[name] = progress.seconds.get(name, 0.0) + took - progress.within
        progress.within = before + took
        progress.memory[name] = max(progress.memory.get(name, 0), progress.peak, peak_memory())
        progress.peak = peak
        _forget_peak()
        LOG.debug("  %s: %.2f s", name, took)


@contextmanager
def doing(title: str) -> Iterator[None]:
    """Name on the terminal what is done in the block, for as long as no bar is open there."""
    told = current().doing
    told.append((one_line(redacted(title)), time.monotonic()))
    try:
        yield
    finally:
        told.pop()


@contextmanager
def bar(title: str, total: int, unit: str) -> Iterator["tqdm[Never]"]:
    """A progress bar on standard error, which ``advance`` moves; ``unit`` ``B`` counts bytes.

    Args:
        title: what is counted; it may quote strangers.
        total: what it will have been moved by in the end, so that what is left can be estimated.
        unit: of that.
    """
    progress = current()
    columns = columns_of(sys.stderr) if progress.shows_bars else 80
    title = one_line(redacted(title))
    if progress.clock:
        progress.clock.hide()
    with tqdm(
        desc=title if len(title) <= columns // 2 else f"{title[: columns // 2 - 3]}...",
        total=total,
        unit=unit,
        unit_scale=unit == "B",
        unit_divisor=1000,
        leave=False,
        disable=not progress.shows_bars,
        file=sys.stderr,
        ncols=columns,
        smoothing=0,  # what is left by the mean of all, since pieces differ
        bar_format="{desc} {percentage:3.0f}% {remaining} left {bar}"
        if columns < _NARROW
        else None,
    ) as shown:
        progress.bars.append(shown)
        try:
            yield shown
        finally:
            progress.bars = [each for each in progress.bars if each is not shown]


def each(items: Collection[T], title: str, unit: str) -> Iterator[T]:
    """The items, with a bar that counts those that whoever asks for them is done with."""
    with bar(title, len(items), unit) as shown:
        for item in items:
            yield item
            shown.update(1)


@contextmanager
def aside() -> Iterator[None]:
    """Take bars off the terminal while a line is printed, which would end up behind them."""
    if not current().shows_bars:
        yield
        return
    with tqdm.external_write_mode(sys.stderr):
        yield


def advance(count: int) -> None:
    """Move the innermost open bar; nothing happens without one."""
    if bars := current().bars:
        bars[-1].update(count)


def peak_memory() -> int:
    """The largest resident set of this process, in bytes, since ``_forget_peak`` if it can."""
    kilobytes = number_in(Path("/proc/self/status"), "VmHWM")
    if kilobytes is not None:
        return kilobytes * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _forget_peak() -> None:
    """Let Linux begin a new maximum: 5 in clear_refs, see proc(5)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", "utf-8")
