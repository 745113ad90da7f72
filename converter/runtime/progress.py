"""What a run tells the terminal while it works: stages with seconds and memory, bars, notes.

All of it goes to standard error. Bars appear only on a terminal.
"""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Never

from tqdm import tqdm

from converter.runtime.console import say
from converter.text.sanitize import shown


@dataclass
class Report:
    """Collects seconds and peak memory per stage, and warnings; prints notes unless ``quiet``.

    Attributes:
        seconds: of each stage.
        memory: the largest resident set during each stage, in bytes; where the system cannot tell
            (anything but Linux), the largest of the process so far.
    """

    quiet: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str, title: str) -> Iterator[None]:
        """Announce a stage and add the seconds it took to ``seconds[name]``; not inside another."""
        self.note(title)
        start = time.perf_counter()
        _forget_peak()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
            self.memory[name] = max(self.memory.get(name, 0), peak_memory())

    @contextmanager
    def bar(self, title: str, total: int, unit: str) -> Iterator["tqdm[Never]"]:
        """A progress bar on standard error; ``unit`` ``B`` counts bytes."""
        with tqdm(
            desc=title,
            total=total,
            unit=unit,
            unit_scale=unit == "B",
            unit_divisor=1000,
            leave=False,
            disable=self.quiet or not sys.stderr.isatty(),
            file=sys.stderr,
        ) as bar:
            yield bar

    def note(self, text: str) -> None:
        """A line for people who watch."""
        if not self.quiet:
            say(text.replace("\n", " "), err=True)

    def warn(self, text: str) -> None:
        """A line for everybody, ``quiet`` or not; it is also kept for the summary."""
        self.warnings.append(text)
        say(f"warning: {shown(text)}", err=True)


def peak_memory() -> int:
    """The largest resident set of this process, in bytes, since ``_forget_peak`` if it can."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _forget_peak() -> None:
    """Let Linux begin a new maximum: 5 in clear_refs, see proc(5)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
