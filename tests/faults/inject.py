"""What becomes of an operation: nothing, or one of the faults."""

import os
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SPACE = ("open", "write", "fallocate", "mkdir", "serialize", "truncate", "ftruncate")
"""Operations that a full disk refuses."""


@dataclass
class Fault:
    """One fault of a run.

    Attributes:
        do: ``nothing``; ``kill`` before the operation; ``half``: write half, then kill; ``power``:
            see ``power``; ``error``; ``short``: every write takes one byte or half; ``zero``: every
            write to a descriptor takes nothing; ``slow``; ``source``: do ``action`` to it.
        at: number of the change, from 1; 0 for none.
        after: operations count from the first on whose path has this in it.
        read_at: number of the reading, likewise.
        errno: of ``error``; kinds: only these fail; sticky: all later ones fail, too.
        variant, seed: of ``power``.
        seconds: of ``slow``.
        number: of the signal that ``signal`` sends to the process.
        action, source: what is done to which file or folder.
        short_reads: every reading gives half of what was asked for.
    """

    do: str = "nothing"
    at: int = 0
    after: str = ""
    read_at: int = 0
    errno: int = 0
    kinds: list[str] = field(default_factory=list)
    sticky: bool = False
    variant: str = ""
    seed: int = 0
    seconds: float = 0.0
    number: int = 0
    action: str = ""
    source: str = ""
    short_reads: bool = False
    before: int = 0

    def change(
        self, watch: Any, number: int, kind: str, paths: tuple[str, ...],
        do: Callable[[], Any], half: Any,
    ) -> Any:  # fmt: skip
        """Do an operation, or not."""
        if self.after:
            if self.after in paths[0]:
                self.after, self.before = "", number - 1
            else:
                self.before = number
        number -= self.before
        here = number == self.at
        if self.do == "slow":
            time.sleep(self.seconds)
        elif self.do == "short" and half is not None and half[0] > 1:
            return half[1](1 if number % 2 else half[0] // 2)
        elif self.do == "zero" and half is not None and len(half) == 3:
            return 0
        elif self.do == "error":
            late = self.sticky and self.at and number >= self.at
            if (here or late) and (not self.kinds or kind in self.kinds):
                if kind == "close":
                    do()
                raise OSError(self.errno, os.strerror(self.errno), paths[0])
        elif here and self.do == "signal":
            self.send(watch)
        elif here and self.do == "source":
            act(self.action, Path(self.source))
        elif here and self.do in ("kill", "half", "power"):
            if self.do == "half" and half is not None:
                half[1](half[0] // 2)
            if self.do == "power":
                watch.disk.cut(self.variant, self.seed)
            os.kill(os.getpid(), signal.SIGKILL)
        return do()

    def send(self, watch: Any) -> None:
        """Interrupt this process, as Ctrl-C does."""
        watch.moment.write_text(str(time.monotonic()))
        os.kill(os.getpid(), self.number)

    def read(
        self, watch: Any, number: int, path: str, do: Callable[[], Any], short: Callable[[], Any]
    ) -> Any:
        """Read, or not."""
        if number == self.read_at:
            if self.do == "error":
                raise OSError(self.errno, os.strerror(self.errno), path)
            if self.do == "signal":
                self.send(watch)
            if self.do == "source":
                act(self.action, Path(self.source))
        return short() if self.short_reads else do()


def act(action: str, path: Path) -> None:
    """Do to a file or folder what happens to it in the middle of a run."""
    if action == "vanish":
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    elif action == "truncate":
        os.truncate(path, path.stat().st_size // 2)
    elif action == "replace":
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.unlink()
        path.write_bytes(data)
    elif action == "overwrite":
        with path.open("r+b") as file:
            file.seek(-64, os.SEEK_END)
            file.write(os.urandom(64))
    elif action == "forbid":
        path.chmod(0)
    elif action == "fill":
        with path.open("wb", buffering=0) as file, suppress(OSError):
            for size in (1 << 20, 1 << 12, 1):
                with suppress(OSError):
                    while file.write(bytes(size)):
                        pass
    else:
        raise AssertionError(action)
