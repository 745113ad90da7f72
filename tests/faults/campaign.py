"""Loops over all operations of a scene, or a sample of them, with one fault each."""

import errno
import signal
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.faults.scenes import Broken, Scene
from tests.faults.zygote import Ended

VARIANTS = ("lost", "kept", "zeros", "torn")
"""How the power goes; see ``power``."""

SAID = {
    errno.ENOSPC: ("No space left", "too small"),
    errno.EIO: ("Input/output error", "cannot be read"),
}


@dataclass
class Count:
    """What a campaign found.

    Attributes:
        tried: faults that were put in.
        survived: invariants held right after.
        resumed: the next run gave the undisturbed result.
        finished: shards that an interrupted run had finished, of all of them.
        redone: how many of those the next run wrote again.
        slowest: seconds from a signal to the end of the process.
        broken: what did not hold.
    """

    tried: int = 0
    survived: int = 0
    resumed: int = 0
    finished: int = 0
    redone: int = 0
    slowest: float = 0.0
    broken: list[str] = field(default_factory=list)

    def add(self, other: "Count") -> None:
        """Sum up."""
        for name in ("tried", "survived", "resumed", "finished", "redone"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.slowest = max(self.slowest, other.slowest)
        self.broken += other.broken

    def text(self) -> str:
        kept = self.finished - self.redone
        text = f"{self.tried} tried, {self.survived} survived, {self.resumed} resumed identical"
        if self.finished:
            text += f"; {kept} of {self.finished} finished shards recognised and not redone"
        return text + (f"; at most {self.slowest:.2f} s to stop" if self.slowest else "")


def sample(count: int, size: int | None, start: int = 1) -> Sequence[int]:
    """``size`` of the numbers 1 to ``count``, evenly spread; all without ``size``."""
    if size is None or size >= count:
        return range(1, count + 1)
    if size == 1:
        return [(start + count) // 2]
    return sorted({start + (count - start) * i // (size - 1) for i in range(size)})


def points(scene: Scene, kinds: Iterable[str] = ()) -> list[int]:
    """The numbers of all operations, or of those of some kinds."""
    wanted = set(kinds)
    trace = enumerate(scene.undisturbed.trace, 1)
    return [number for number, (kind, _) in trace if not wanted or kind in wanted]


def attempt(
    scene: Scene, count: Count, when: str, run: Callable[[], Ended], *, redoes: bool = True
) -> None:
    """One run with a fault, the invariants, the next run; what is broken goes into ``count``.

    Args:
        run: does the run, and looks at how it ended.
        redoes: whether the next run may write finished shards again.
    """
    scene.reset()
    count.tried += 1
    try:
        ended = run()
        scene.check_untouched(f"{when} ({ended.said.strip()[-300:]})")
        count.survived += 1
        finished, redone = scene.resume(when)
        count.finished, count.redone = count.finished + finished, count.redone + redone
        if redone and not redoes:
            raise Broken(f"{scene.name} {when}: {redone} of {finished} finished shards redone")
        count.resumed += 1
        count.slowest = max(count.slowest, ended.seconds)
    except Broken as error:
        count.broken.append(str(error))


def one(scene: Scene, count: Count, when: str, code: int | None, **asked: Any) -> None:
    """One attempt that redoes nothing.

    Args:
        code: minus the signal of a run that is killed; None: an error, or success all the same.
    """

    def run() -> Ended:
        ended = scene.run(**asked)
        if code is None:
            check_sentence(ended, f"{scene.name} {when}")
        elif ended.code != code:
            raise Broken(f"{scene.name} {when}: ended with {ended.code}: {ended.said[-600:]}")
        return ended

    attempt(scene, count, when, run, redoes=False)


def check_sentence(ended: Ended, when: str) -> None:
    """A run that failed says why in one sentence and no traceback.

    Raises:
        Broken: it does not.
    """
    code, said = ended.code, ended.said
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    if code == -signal.SIGABRT or (code == 127 and "cannot allocate memory for thread" in said):
        return  # a library in C has ended the process for want of memory: as good as a kill
    if "Traceback" in said or "Exception ignored" in said:
        raise Broken(f"{when}: a traceback: {said[-1500:]}")
    if code not in (0, 3, 4, 5, 7, 8):
        raise Broken(f"{when}: exit code {code}: {said[-600:]}")
    if (code != 0) != (len(lines) == 1):
        raise Broken(f"{when}: exit code {code}, and {len(lines)} sentences: {said[-600:]}")


def kills(scene: Scene, size: int | None = None) -> Count:
    """Killed before each operation."""
    count = Count()
    for at in sample(len(scene.undisturbed.trace), size):
        one(scene, count, f"killed at {at}", -9, fault={"do": "kill", "at": at})
    return count


def half_writes(scene: Scene, size: int | None = None) -> Count:
    """Killed in the middle of each write."""
    count, writes = Count(), points(scene, ["write"])
    for place in sample(len(writes), size):
        at = writes[place - 1]
        one(scene, count, f"killed within {at}", -9, fault={"do": "half", "at": at})
    return count


def power_cuts(scene: Scene, size: int | None = None, variants: Iterable[str] = VARIANTS) -> Count:
    """The power goes before each operation, in each variant."""
    count, asked = Count(), {"leave": ["source", "kept", "older", "newer"]}
    for variant in variants:
        for at in sample(len(scene.undisturbed.trace), size):
            fault = {"do": "power", "at": at, "variant": variant, "seed": at}
            one(scene, count, f"power {variant} at {at}", -9, fault=fault, **asked)
    return count


FAILING = {
    "disk full": (errno.ENOSPC, ("write", "fallocate", "open", "mkdir", "serialize"), True),
    "one write fails for lack of space": (errno.ENOSPC, ("write", "fallocate"), False),
    "quota": (errno.EDQUOT, ("write",), True),
    "EIO at write": (errno.EIO, ("write",), False),
    "EIO at fsync": (errno.EIO, ("fsync",), False),
    "EIO at close": (errno.EIO, ("close",), False),
    "EIO at rename": (errno.EIO, ("rename", "exchange"), False),
    "EIO at open": (errno.EIO, ("open", "mkdir"), False),
    "EIO at unlink": (errno.EIO, ("unlink", "rmdir"), False),
    "read-only": (errno.EROFS, ("open", "mkdir", "rename", "unlink", "exchange"), True),
}
"""Errors, which operations return them, and whether all later ones do, too."""


def errors(scene: Scene, what: str, size: int | None = None) -> Count:
    """Each operation of some kinds fails."""
    number, kinds, sticky = FAILING[what]
    count, chosen = Count(), points(scene, kinds)
    for place in sample(len(chosen), size) if chosen else ():
        at = chosen[place - 1]
        fault = {"do": "error", "at": at, "errno": number, "kinds": kinds, "sticky": sticky}
        one(scene, count, f"{what} at {at} {scene.undisturbed.trace[at - 1]}", None, fault=fault)
    return count


def bad_reads(scene: Scene, size: int | None = None) -> Count:
    """Each reading of the source, the cache or the new files fails."""
    count = Count()
    for at in sample(scene.undisturbed.reads, size):
        fault = {"do": "error", "read_at": at, "errno": errno.EIO}
        one(scene, count, f"EIO at reading {at}", None, fault=fault)
    return count


def slow_devices(scene: Scene) -> Count:
    """Short writes and readings, and a storm of signals: nothing may fail for them."""
    count = Count()
    asked: dict[str, dict[str, Any]] = {
        "short writes": {"fault": {"do": "short"}},
        "short readings": {"fault": {"short_reads": True}},
        "a signal each millisecond": {"storm": 0.001},
    }
    for when, settings in asked.items():
        one(scene, count, when, 0, **settings)
    one(scene, count, "writes that take nothing", 7, fault={"do": "zero"})
    return count
