"""Faults from outside of the process: other users, small disks, little memory, lost sources."""

import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.faults.campaign import Count, check_sentence, one, sample
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
    scene.reset()
    count.tried += 1
    try:
        ended = scene.run(fault=fault)
        shutil.rmtree(source, ignore_errors=True)
        shutil.copytree(pristine, source)
        scene.source = stamps(source)
        check_sentence(ended.code, ended.said, f"{scene.name} {when}")
        scene.check_untouched(f"{when} ({ended.said.strip()[-300:]})")
        count.survived += 1
        finished, redone = scene.resume(when)
        count.finished, count.redone = count.finished + finished, count.redone + redone
        count.resumed += 1
    except Broken as error:
        count.broken.append(str(error))


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
                fault = {"do": "signal", "number": int(number), what: at}
                _interrupt(scene, count, f"signal {number} {what} {at}", fault, 128 + number)
    return count


def _interrupt(scene: Scene, count: Count, when: str, fault: dict[str, Any], code: int) -> None:
    scene.reset()
    count.tried += 1
    try:
        ended = scene.run(fault=fault)
        check_stopped(ended, code, f"{scene.name} {when}")
        scene.check_untouched(when)
        count.survived += 1
        finished, redone = scene.resume(when)
        count.finished, count.redone = count.finished + finished, count.redone + redone
        count.resumed += 1
        count.slowest = max(count.slowest, ended.seconds)
    except Broken as error:
        count.broken.append(str(error))


def check_stopped(ended: Ended, code: int, when: str) -> None:
    """A run that was interrupted says so and how to go on, or was over already.

    Raises:
        Broken: it does not, or takes longer than a second.
    """
    if ended.seconds > 1:
        raise Broken(f"{when}: took {ended.seconds:.1f} s to end")
    if "Traceback" in ended.said or "Exception ignored" in ended.said:
        raise Broken(f"{when}: a traceback: {ended.said[-1500:]}")
    if ended.code != 0 and (ended.code != code or "same command" not in ended.said):
        raise Broken(f"{when}: ended with {ended.code}: {ended.said[-600:]}")


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
        count.tried += 1
        scene.reset()
        mode = path.stat().st_mode & 0o777
        try:
            path.chmod(0o555 if path == scene.place else 0)
            ended = scene.run(powerless=True)
            path.chmod(mode)
            check_sentence(ended.code, ended.said, f"{scene.name}: {when}")
            if ended.code not in (3, 4) and ended.code != code:
                raise Broken(f"{scene.name}: {when}: exit code {ended.code}: {ended.said}")
            scene.check_untouched(when)
            count.survived += 1
            scene.resume(when)
            count.resumed += 1
        except Broken as error:
            count.broken.append(str(error))
        finally:
            path.chmod(mode)
    return count


def filled_disk(scene: Scene, size: int | None = None) -> Count:
    """A real disk becomes full before each operation; afterwards there is space again."""
    count, filler = Count(), scene.place / "filler"
    for at in sample(len(scene.undisturbed.trace), size):
        when = f"really full from {at} on"
        scene.reset()
        count.tried += 1
        try:
            ended = scene.run(
                fault={"do": "source", "at": at, "action": "fill", "source": str(filler)}
            )
            filler.unlink(missing_ok=True)
            check_sentence(ended.code, ended.said, f"{scene.name} {when}")
            scene.check_untouched(when)
            count.survived += 1
            finished, redone = scene.resume(when)
            count.finished, count.redone = count.finished + finished, count.redone + redone
            count.resumed += 1
        except Broken as error:
            count.broken.append(str(error))
    return count


@contextmanager
def mounted(folder: Path, kind: str, megabytes: int) -> Iterator[None]:
    """A small file system at a folder: ``tmpfs``, or ``ext4`` or ``xfs`` in a file.

    Raises:
        OSError: this user may not, or the programs are missing.
    """
    image = folder.with_name(f"{folder.name}.{kind}")
    if kind == "tmpfs":
        command = [
            "mount",
            "-t",
            "tmpfs",
            "-o",
            f"size={megabytes}m,mode=755",
            "tmpfs",
            str(folder),
        ]
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
