"""What a row of the streaming bench takes, seen from outside its process.

Linux only: it reads /proc.
"""

import os
import select
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar
from unittest.mock import patch

Found = TypeVar("Found")

INTERVAL = 0.002
"""Seconds between two looks at a process's memory."""

OWN = (b"RssAnon:", b"RssShmem:")
"""Memory that no file stands behind; Python's ``mmap(-1, n)`` is in the second."""

MAPPED = b"RssFile:"
"""Pages of files that are mapped and in memory: the kernel can drop and read them again."""


@dataclass(frozen=True, slots=True)
class Taken:
    """What one run of a row took.

    Attributes:
        wall: seconds from the word to go until every output file is flushed to disk.
        cpu: seconds, user and system, of the process and its children; threads of the kernel that
            write the page cache to disk are in nobody's.
        others: CPU seconds of all else on the machine meanwhile: those threads, and whoever else
            works there, who should not.
        peak: bytes of memory that no file stands behind, above those of the same process when it
            had imported its modules and was waiting.
        peak_mapped: the same with mapped files.
        written: bytes that the process caused to be written to disk.
    """

    wall: float
    cpu: float
    others: float
    peak: int
    peak_mapped: int
    written: int

    def __str__(self) -> str:
        return (
            f"{self.wall:.2f} s, CPU {self.cpu:.2f} s, of others {self.others:.2f} s, "
            f"{self.peak / 1e6:.0f} MB, with mapped files {self.peak_mapped / 1e6:.0f} MB"
        )


def measure(command: Sequence[str], out: Path) -> Taken:
    """Run a process that speaks as ``tests/bench/rows.py`` does.

    Raises:
        SystemExit: it failed; with the end of what it said.
    """
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(
            command,
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env={**os.environ, **quiet},
        )
        try:
            return _measure(child, out)
        except EOFError:
            child.wait()
            errors.seek(0)
            said = errors.read().decode(errors="replace")
            raise SystemExit(f"{command[2]} failed:\n{said[-3000:]}") from None
        finally:
            child.communicate()


def _measure(child: subprocess.Popen[bytes], out: Path) -> Taken:
    assert child.stdin is not None
    assert child.stdout is not None
    _answer(child)
    watched, written = Watched(child.pid), _write_bytes(child.pid)
    idle = watched.memory()
    peaks, busy, start = idle, _busy(), time.perf_counter()
    child.stdin.write(b"go\n")
    while not select.select([child.stdout], [], [], INTERVAL)[0]:
        now = watched.memory()
        peaks = max(peaks[0], now[0]), max(peaks[1], now[1])
    cpu = float(_answer(child))
    files = [path for path in out.rglob("*") if path.is_file()]
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    wall, busy = time.perf_counter() - start, _busy() - busy
    watched.close()
    after = _write_bytes(child.pid)
    size = sum(path.stat().st_size for path in files)
    return Taken(
        wall=wall,
        cpu=cpu,
        others=busy - cpu,
        peak=peaks[0] - idle[0],
        peak_mapped=peaks[1] - idle[1],
        written=size if written is None or after is None else after - written,
    )


def _answer(child: subprocess.Popen[bytes]) -> str:
    assert child.stdout is not None
    line = child.stdout.readline()
    if not line:
        raise EOFError
    return line.decode()


class Watched:
    """A process whose memory is looked at again and again.

    Files of /proc stay open: opening them would take ten times as long as reading them, and the
    bench would take a tenth of a processor from what it measures.
    """

    def __init__(self, pid: int) -> None:
        self._status = os.open(f"/proc/{pid}/status", os.O_RDONLY)
        self._children = os.open(f"/proc/{pid}/task/{pid}/children", os.O_RDONLY)
        self._below: dict[int, Watched] = {}

    def memory(self, parent: bytes = b"") -> tuple[int, int]:
        """Bytes of it and of all below it, without and with mapped files; 0 once it ended.

        A child that still has its parent's name has not begun its program: their memory is one.
        """
        try:
            status = os.pread(self._status, 4096, 0)
            children = os.pread(self._children, 4096, 0)
        except ProcessLookupError:
            return 0, 0
        name = status.partition(b"\n")[0]
        if name == parent or MAPPED not in status:
            return 0, 0
        own = sum(_kilobytes(status, key) for key in OWN)
        mapped = own + _kilobytes(status, MAPPED)
        for pid in map(int, children.split()):
            with suppress(FileNotFoundError):
                below = self._below.get(pid) or self._below.setdefault(pid, Watched(pid))
                more = below.memory(name)
                own, mapped = own + more[0], mapped + more[1]
        return own, mapped

    def close(self) -> None:
        for file in (self._status, self._children):
            os.close(file)
        for below in self._below.values():
            below.close()


def _kilobytes(status: bytes, key: bytes) -> int:
    return 1024 * int(status[status.index(key) + len(key) :].split(None, 1)[0])


def _busy() -> float:
    """CPU seconds of the whole machine so far, but for those of this process."""
    user, nice, system, _, _, irq, softirq, steal = map(
        int, Path("/proc/stat").read_text().split(maxsplit=9)[1:9]
    )
    ticks = user + nice + system + irq + softirq + steal
    return ticks / os.sysconf("SC_CLK_TCK") - time.process_time()


def _write_bytes(pid: int) -> int | None:
    """Bytes that a process and its ended children had written to disk; None if it is not told."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/io").read_text().splitlines():
            if line.startswith("write_bytes:"):
                return int(line.split()[1])
    return None


def apart(job: Callable[..., Found], *args: object, **variables: str) -> Found:
    """What a job gives in a new process, whose environment has these variables, too."""
    context = get_context("spawn")
    with patch.dict(os.environ, variables), ProcessPoolExecutor(1, context) as pool:
        return pool.submit(job, *args).result()


def anonymous() -> int:
    """Bytes of anonymous memory of this process now."""
    return _kilobytes(Path("/proc/self/status").read_bytes(), OWN[0])


def peak_of(job: Callable[[], object]) -> int:
    """Bytes of anonymous memory that a job takes above what this process has."""
    idle, peak, done = anonymous(), 0, threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, anonymous())
            time.sleep(0.0003)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        job()
    finally:
        done.set()
        thread.join()
    return peak - idle
