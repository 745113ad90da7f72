"""How long commands say nothing: each runs on a terminal of its own, which is watched.

    python -m tests.bench.silence --columns 80 -- convert demo OUT --num-pairs 200
    python -m tests.bench.silence -- plan demo -- verify OUT

It prints, for each command, its seconds, the longest silences with what stood on the terminal
before them, and the widest line of a bar. A sign of life is any byte that is printed.
"""

import fcntl
import os
import pty
import re
import select
import struct
import sys
import termios
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

_MOVES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@dataclass(frozen=True)
class Silence:
    """A time in which nothing was printed.

    Attributes:
        seconds: how long.
        since: when it began, from the start of the command.
        after: the last line before it.
    """

    seconds: float
    since: float
    after: str


@dataclass(frozen=True)
class Watched:
    """What a command did on its terminal.

    Attributes:
        seconds: in all.
        code: that it exited with.
        silences: every one, the longest first.
        widest: columns of the widest line that a bar drew.
        text: all that was printed.
    """

    seconds: float
    code: int
    silences: list[Silence]
    widest: int
    text: str


def watch(args: Sequence[str], columns: int) -> Watched:
    """Run ``gloss`` with some arguments on a terminal of so many columns."""
    pid, terminal = pty.fork()
    if pid == 0:
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        os.execv(sys.executable, [sys.executable, "-m", "converter", *args])
    begun = last = time.monotonic()
    text, silences = "", list[Silence]()
    while True:
        ready, _, _ = select.select([terminal], [], [], 600)
        try:
            data = os.read(terminal, 1 << 16) if ready else b""
        except OSError:  # the terminal's other end is closed
            data = b""
        now = time.monotonic()
        silences.append(Silence(now - last, last - begun, _last_line(text)))
        if not data:
            break
        last, text = now, text + data.decode("utf-8", "replace")
    _, status = os.waitpid(pid, 0)
    silences.sort(key=lambda silence: -silence.seconds)
    widest = max(map(len, _bars(text)), default=0)
    return Watched(now - begun, os.waitstatus_to_exitcode(status), silences, widest, text)


def _last_line(text: str) -> str:
    lines = re.split(r"[\r\n]+", _MOVES.sub("", text[-2000:]))
    return next((line.strip() for line in reversed(lines) if line.strip()), "(nothing)")


def _bars(text: str) -> Iterator[str]:
    """What was drawn and then drawn over, from the beginning of its line."""
    for line in _MOVES.sub("", text).replace("\r\n", "\n").split("\n"):
        yield from line.split("\r")[:-1]


def commands_of(typed: Sequence[str]) -> Iterator[list[str]]:
    """The commands among words with ``--`` between them."""
    found: list[str] = []
    for word in (*typed, "--"):
        if word != "--":
            found.append(word)
        elif found:
            yield found
            found = []


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("--columns", default=80, show_default=True, help="Of the terminal.")
@click.option("--most", default=4, show_default=True, help="Silences that are printed of each.")
@click.option("--log", type=click.Path(path_type=Path), help="File to add what is printed to.")
@click.argument("typed", nargs=-1, type=click.UNPROCESSED)
def main(columns: int, most: int, log: Path | None, typed: tuple[str, ...]) -> None:
    """Watch the commands TYPED, which are parted by two dashes."""
    for args in commands_of(typed):
        seen = watch(args, columns)
        if log is not None:
            with log.open("a", encoding="utf-8", newline="") as file:
                file.write(seen.text)
        click.echo(
            f"gloss {' '.join(args)}: {seen.seconds:.1f} s, exit code {seen.code}, "
            f"bars of at most {seen.widest} columns of {columns}"
        )
        for silence in seen.silences[:most]:
            click.echo(
                f"  {silence.seconds:5.1f} s from {silence.since:6.1f} s on, "
                f"after: {silence.after[:100]}"
            )


if __name__ == "__main__":
    main()
