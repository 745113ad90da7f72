"""What a run tells, as a library and from the command line; and what threads tell of it."""

import io
import logging
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from tqdm import tqdm

from converter.cli.terminal import reporting
from converter.edits.base import Edit
from converter.edits.engine import Engine
from converter.outputs.base import WriteJob
from converter.outputs.checkpoint.write import write_checkpoint
from converter.outputs.journal import Done
from converter.runtime import clock, progress
from converter.runtime.cache import cache_folder, default_cache, using_cache
from converter.runtime.progress import ThreadPool
from tests.builders.models import Checkpoints, planned


class Terminal(io.StringIO):
    """A standard error that people look at."""

    def isatty(self) -> bool:
        return True


def tell() -> None:
    """One of each."""
    progress.note("a note")
    progress.warn("of something odd")
    with progress.stage("plan", "planning"), progress.bar("edit", 2, "B"):
        progress.advance(2)


@pytest.mark.parametrize("recorded", [False, True])
def test_a_library_prints_nothing(
    recorded: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Even if nobody has set logging up, where Python prints warnings itself."""
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    if recorded:
        with progress.recording():
            tell()
    else:
        tell()
    assert capfd.readouterr() == ("", "")


def test_a_library_logs(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "converter"):
        tell()
    assert caplog.record_tuples == [
        ("converter", logging.INFO, "a note"),
        ("converter", logging.WARNING, "of something odd"),
        ("converter", logging.INFO, "planning"),
    ]


def test_stages_and_warnings_are_kept() -> None:
    with progress.recording() as told:
        tell()
        with progress.recording() as inner:  # as of ``convert`` within a command
            tell()
        assert inner is told is progress.current()
    assert told.warnings == ["of something odd"] * 2
    assert told.seconds["plan"] > 0
    assert told.memory["plan"] > 0
    assert not progress.current().warnings
    assert progress.current() is not told


def test_the_memory_of_a_stage_is_not_that_of_one_inside_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The system's maximum begins anew: 8 before the inner stage, 90 within, 7 after."""
    peaks = iter([1, 8, 90, 7])
    monkeypatch.setattr(progress, "peak_memory", lambda: next(peaks))
    with (
        progress.recording() as told,
        progress.stage("fit", "fitting"),
        progress.stage("activations", "running"),
    ):
        pass
    assert told.memory == {"activations": 90, "fit": 8}


def test_a_command_prints(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each line once, whatever else logs, and nothing more when it is over."""
    monkeypatch.setattr(logging.getLogger(), "handlers", [logging.StreamHandler(sys.stderr)])
    before = (progress.LOG.level, list(progress.LOG.handlers))
    for quiet in (False, True):
        with reporting(quiet=quiet) as told:
            tell()
        assert told.warnings == ["of something odd"]
    assert before == (progress.LOG.level, progress.LOG.handlers)
    tell()  # as root's handler prints it
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines() == [
        "a note", "warning: of something odd", "planning",
        "warning: of something odd",
        "of something odd",
    ]  # fmt: skip


def test_the_innermost_bar_is_moved() -> None:
    with progress.recording(shows_bars=True) as told, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", Terminal())
        with progress.bar("outer", 9, "text") as outer:
            progress.advance(1)
            with progress.bar("inner", 9, "text") as inner:
                progress.advance(2)
            progress.advance(4)
        progress.advance(8)
    assert (outer.n, inner.n) == (5, 2)
    assert told.bars == []


def test_a_bar_that_is_closed_is_not_moved_in_place_of_another() -> None:
    """All bars that are not shown are equal to ``==``."""
    with progress.recording() as told, progress.bar("outer", 9, "text") as outer:
        with progress.bar("inner", 9, "text"):
            pass
        assert [id(bar) for bar in told.bars] == [id(outer)]


@pytest.mark.parametrize("quiet", [False, True])
def test_bars_are_for_a_terminal(quiet: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (Terminal, io.StringIO):
        monkeypatch.setattr(sys, "stderr", kind())
        with reporting(quiet=quiet), progress.bar("edit", 9, "text") as bar:
            assert bar.disable == (quiet or kind is not Terminal)


@pytest.mark.parametrize("columns", [20, 40, 200])
def test_no_bar_is_wider_than_the_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", str(columns))
    name = "hash a-file-whose-name-is-long.safetensors"
    with reporting(quiet=False), progress.bar(name, 10**9, "B") as bar:
        for _ in range(4):
            bar.update(10**8)
            bar.refresh()
    drawn = [len(line) for line in terminal.getvalue().split("\r")]
    assert max(drawn) == columns - 1
    assert (" left" in terminal.getvalue()) == (columns == 40)


def test_a_line_that_is_printed_is_not_behind_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "40")
    with reporting(quiet=False), progress.bar("outer", 9, "text"):
        progress.warn("a warning")
    shown = screen(terminal.getvalue())
    assert shown == ["warning: a warning", ""]


def test_what_strangers_say_steers_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress.recording(shows_bars=True) as told, progress.doing("reading \x1b[2J\nover"):
        with progress.bar("hash \x1b]0;x\x07", 9, "B"):
            pass
        assert told.doing[-1][0].isprintable()
    assert "\x1b[2J" not in terminal.getvalue()
    assert "\x1b]" not in terminal.getvalue()


def screen(text: str) -> list[str]:
    """The lines that a terminal shows, without spaces at their ends."""
    lines = []
    for line in text.split("\n"):
        shown = ""
        for part in line.split("\r"):
            shown = part + shown[len(part) :]
        lines.append(shown.rstrip())
    return lines


def drawn(monkeypatch: pytest.MonkeyPatch, shown: tuple[str, ...], times: int) -> str:
    """What a clock draws while some work is named and nothing is counted."""
    terminal, seen = Terminal(), Event()
    monkeypatch.setattr(clock, "_EVERY", 0.001)
    asked = iter(shown)

    def doing() -> tuple[str, float]:
        word = next(asked, shown[-1])
        calls.append(word)
        if len(calls) == times:
            seen.set()
        return word, time.monotonic()

    calls: list[str] = []
    with clock.Clock(terminal, list, doing):
        assert seen.wait(60)
    return terminal.getvalue()


def test_what_is_not_counted_is_named_as_long_as_it_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    text = drawn(monkeypatch, ("fitting", "fitting", "verifying"), 5)
    assert text.index("fitting 00:00") < text.index("verifying 00:00")
    assert screen(text) == [""]
    assert drawn(monkeypatch, ("",), 5) == ""  # somebody types


def test_an_interrupt_that_has_lost_the_lock_of_bars_ends_the_clock(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(clock, "_EVERY", 0.001)
    asked = Event()

    def doing() -> tuple[str, float]:
        asked.set()
        return "fitting", time.monotonic()

    lock: Any = tqdm.get_lock()  # type: ignore[no-untyped-call]
    with lock, clock.Clock(Terminal(), list, doing):  # whose thread waits for it
        assert asked.wait(60)


def test_the_newest_bar_is_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "_EVERY", 0.001)
    seen = Event()

    class Bar:
        def refresh(self) -> None:
            seen.set()

    with clock.Clock(Terminal(), lambda: [Bar()], lambda: ("fitting", 0.0)):  # type: ignore[list-item]
        assert seen.wait(60)


def test_a_thread_tells_the_run_it_works_for(tmp_path: Path) -> None:
    def work(name: str) -> Path:
        progress.warn(name)
        progress.advance(1)
        return cache_folder()

    names = ["one", "two", "three"]
    with progress.recording(shows_bars=True) as told, using_cache(tmp_path):
        with progress.bar("edit", 3, "text") as bar, ThreadPool(2) as pool:
            assert list(pool.map(work, names)) == [tmp_path] * 3
        assert bar.n == 3
        with ThreadPoolExecutor(1) as alone:  # which is why there is a ThreadPool
            assert alone.submit(work, "lost").result() != tmp_path
    assert sorted(told.warnings) == sorted(names)


class Doubtful:
    """A ``Receiver`` that has something to say of each shard."""

    at_a_time: int | None = None

    def before(self, users: Mapping[str, set[str]]) -> dict[str, Done]:
        return {}

    def finished(self, shard: str, done: Done) -> None:
        progress.warn(f"{shard} in {cache_folder()}")


def test_shards_are_written_by_threads_that_tell(checkpoints: Checkpoints, tmp_path: Path) -> None:
    source, plan = planned(checkpoints("llama"))
    out = tmp_path / "out"
    out.mkdir()
    job = WriteJob(
        source=source, plan=plan, edit=Edit(), folder=out, engine=Engine(workers=2),
        receiver=Doubtful(),
    )  # fmt: skip
    with progress.recording() as told, using_cache(tmp_path):
        write_checkpoint(job)
    assert sorted(told.warnings) == [f"{shard} in {tmp_path}" for shard in source.shards]


def test_the_cache_is_the_default_one_unless_another_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOSS_CACHE_DIR", str(tmp_path / "own"))
    with using_cache(tmp_path / "outer"):
        with reporting(quiet=True):
            assert cache_folder() == default_cache() == tmp_path / "own"
        with reporting(quiet=True, cache_dir=tmp_path / "given"):
            assert cache_folder() == tmp_path / "given"
        assert cache_folder() == tmp_path / "outer"
