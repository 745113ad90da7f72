"""Faults from outside of the process: other users, small disks, little memory, lost sources."""

import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from tests.faults.campaign import Count, attempt, check_sentence, one, sample
from tests.faults.scenes import Broken, Scene, stamps
from tests.faults.zygote import Ended

SHARD = "model-00003-of-00005.safetensors"
"""One in the middle; it holds edited weights."""

NEW = ".out.part/new"

LOSSES = (
    ("vanish", "."), ("vanish", SHARD), ("truncate", SHARD), ("replace", SHARD),
    ("overwrite", SHARD), ("vanish", "config.json"), ("vanish", "tokenizer.json"),
    ("truncate", "tokenizer.json"), ("vanish", "model.safetensors.index.json"),
)  # fmt: skip
"""What happens to the source in the middle of a run."""


def first_write(scene: Scene) -> int:
    """The number of the first operation on the new folder: the fit is over."""
    paths = [path for _, path in scene.undisturbed.trace]
    return next(n for n, path in enumerate(paths, 1) if NEW in path)


def lost_sources(scene: Scene, size: int | None = None) -> Count:
    """Part of the source goes, or becomes another, before each operation after the fit."""
    count, steps = Count(), len(scene.undisturbed.trace) - first_write(scene) + 1
    for action, name in LOSSES:
        for at in sample(steps, size):
            lose(scene, count, action, name, at=at, after=NEW)
    return count


def lost_while_reading(scene: Scene, size: int | None = None) -> Count:
    """The same before each reading. A source that is another from the start is one, not a fault."""
    count = Count()
    for action, name in LOSSES:
        if action in ("replace", "overwrite"):
            continue
        for at in sample(scene.undisturbed.reads, size):
            lose(scene, count, action, name, read_at=at)
    return count


def lose(scene: Scene, count: Count, action: str, name: str, **at: Any) -> None:
    """One run whose source changes; it is put back before the next."""
    source, pristine = scene.root / "source", scene.root / "pristine"
    fault = {"do": "source", "action": action, "source": str(source / name), **at}
    when = f"{action} {name} {at}"
    if not pristine.exists():
        shutil.copytree(source, pristine)

    def run() -> Ended:
        ended = scene.run(fault=fault)
        shutil.rmtree(source, ignore_errors=True)
        shutil.copytree(pristine, source)
        scene.source = stamps(source)
        check_sentence(ended, f"{scene.name} {when}")
        return ended

    attempt(scene, count, when, run)


def interrupted(
    scene: Scene, size: int | None = None, numbers: Sequence[int] = (signal.SIGINT, signal.SIGTERM)
) -> Count:
    """A signal before each operation and each reading: gone within a second."""
    count = Count()
    for number in numbers:
        for what, end in (
            ("at", len(scene.undisturbed.trace)),
            ("read_at", scene.undisturbed.reads),
        ):
            for at in sample(end, size):
                when, asked = f"signal {number} {what} {at}", {what: at}
                attempt(scene, count, when, partial(_interrupt, scene, when, number, asked))
    return count


def _interrupt(scene: Scene, when: str, number: int, asked: dict[str, int]) -> Ended:
    """A run that was interrupted says so and how to go on, or was over already.

    Raises:
        Broken: it does not, or takes longer than a second.
    """
    ended = scene.run(fault={"do": "signal", "number": int(number), **asked})
    when = f"{scene.name} {when}"
    if ended.seconds > 1:
        raise Broken(f"{when}: took {ended.seconds:.1f} s to end")
    if "Traceback" in ended.said or "Exception ignored" in ended.said:
        raise Broken(f"{when}: a traceback: {ended.said[-1500:]}")
    if ended.code != 0 and (ended.code != 128 + number or "same command" not in ended.said):
        raise Broken(f"{when}: ended with {ended.code}: {ended.said[-600:]}")
    return ended


def file_sizes(scene: Scene, size: int | None = None) -> Count:
    """Files may not become longer than so much (RLIMIT_FSIZE)."""
    count = Count()
    longest = max(path.stat().st_size for path in (scene.root / "newer").iterdir())
    for step in sample(40, size):
        limit = longest * step // 40
        one(scene, count, f"files of {limit} bytes", None, file_size=limit)
    return count


def little_memory(scene: Scene, size: int | None = None) -> Count:
    """The address space may grow by so much (RLIMIT_AS)."""
    count = Count()
    for step in sample(40, size):
        one(scene, count, f"{step} MB more memory", None, memory=step << 20)
    return count


def no_permission(scene: Scene) -> Count:
    """The folder of the destination, the source and its shards belong to somebody else."""
    count = Count()
    for when, path, code in (
        ("a place that may not be written", scene.place, 7),
        ("a source that may not be read", scene.root / "source", 3),
        ("a shard that may not be read", scene.root / "source" / SHARD, 4),
        ("a config that may not be read", scene.root / "source" / "config.json", 4),
    ):
        attempt(scene, count, when, partial(_forbidden, scene, when, path, code))
    return count


def _forbidden(scene: Scene, when: str, path: Path, code: int) -> Ended:
    mode = path.stat().st_mode & 0o777
    path.chmod(0o555 if path == scene.place else 0)
    try:
        ended = scene.run(powerless=True)
    finally:
        path.chmod(mode)
    check_sentence(ended, f"{scene.name}: {when}")
    if ended.code not in (3, 4, code):
        raise Broken(f"{scene.name}: {when}: exit code {ended.code}: {ended.said}")
    return ended


def filled_disk(scene: Scene, size: int | None = None) -> Count:
    """A real disk becomes full before each operation; afterwards there is space again."""
    count = Count()
    for at in sample(len(scene.undisturbed.trace), size):
        when = f"really full from {at} on"
        attempt(scene, count, when, partial(_filled, scene, when, at))
    return count


def _filled(scene: Scene, when: str, at: int) -> Ended:
    filler = scene.place / "filler"
    ended = scene.run(fault={"do": "source", "at": at, "action": "fill", "source": str(filler)})
    filler.unlink(missing_ok=True)
    check_sentence(ended, f"{scene.name} {when}")
    return ended


@contextmanager
def mounted(folder: Path, kind: str, megabytes: int) -> Iterator[None]:
    """A small file system at a folder: ``tmpfs``, or ``ext4`` or ``xfs`` in a file.

    Raises:
        OSError: this user may not, or the programs are missing.
    """
    image = folder.with_name(f"{folder.name}.{kind}")
    if kind == "tmpfs":
        size = f"size={megabytes}m,mode=755"
        command = ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder)]
    else:
        with image.open("wb") as file:
            file.truncate(megabytes << 20)
        _do([f"mkfs.{kind}", "-q", str(image)])
        command = ["mount", "-o", "loop", str(image), str(folder)]
    _do(command)
    try:
        yield
    finally:
        _do(["umount", "-l", str(folder)])
        with suppress(OSError):
            image.unlink()


def _do(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(done.returncode, f"{' '.join(command)}: {done.stderr.strip()}")
