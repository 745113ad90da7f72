"""The campaign: ``python -m tests.faults`` tries all operations and prints what it counted."""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.faults import circumstances, system
from tests.faults.campaign import (
    FAILING,
    Count,
    bad_reads,
    errors,
    half_writes,
    kills,
    power_cuts,
    slow_devices,
)
from tests.faults.scenes import Scene, make_root, scenes, working_folder
from tests.faults.zygote import Zygote

Campaign = Callable[[Scene, int | None], Count]

MOUNTS = {"tmpfs": 64, "ext4": 64, "xfs": 400}
"""File systems to repeat the first scenes on, and their megabytes; xfs shares blocks."""

SMALL = 2
"""Megabytes of the disk that becomes full."""


def failing(what: str) -> Campaign:
    return lambda scene, size: errors(scene, what, size)


CAMPAIGNS: dict[str, Campaign] = {
    "killed before each operation": kills,
    "killed within each write": half_writes,
    "power lost before each operation": power_cuts,
    "signal before each operation and reading": circumstances.interrupted,
    **{what: failing(what) for what in FAILING},
    "EIO at each reading": bad_reads,
    "source lost before each operation": circumstances.lost_sources,
    "source lost before each reading": circumstances.lost_while_reading,
    "slow devices and a storm of signals": lambda scene, size: slow_devices(scene),
    "no permission": lambda scene, size: circumstances.no_permission(scene),
    "files of limited size": circumstances.file_sizes,
    "little memory": circumstances.little_memory,
}

OTHERS = ("killed", "power", "disk full", "EIO", "read-only", "signal")
"""Beginnings of the campaigns that all scenes go through; the rest does not differ between them."""


def main() -> int:
    """Parse, loop, sum up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scene", action="append", help="only this one; may be repeated")
    parser.add_argument("--campaign", action="append", help="only those whose name begins so")
    parser.add_argument("--sample", type=int, help="how many of each are tried; all without")
    parser.add_argument("--folder", type=Path, help="where to work")
    parser.add_argument("--mounts", action="store_true", help="only those that mount (needs root)")
    parser.add_argument("--all", action="store_true", help="both with and without mounts")
    given = parser.parse_args()
    total, start = Count(), time.monotonic()
    with working_folder(given.folder) as folder, Zygote() as zygote:
        if not given.mounts:
            total.add(_scenes(folder / "plain", zygote, given))
        if given.mounts or given.all:
            total.add(_mounts(folder, zygote, given))
    print(f"all: {total.text()}; {len(total.broken)} broken; {time.monotonic() - start:.0f} s")
    return 1 if total.broken else 0


def _scenes(root: Path, zygote: Zygote, given: argparse.Namespace) -> Count:
    """Every scene through its campaigns."""
    total = Count()
    made = scenes(make_root(root, zygote), zygote)
    for place, name in enumerate(given.scene or made):
        scene = made[name]
        scene.prepare()
        print(f"{name}: {len(scene.undisturbed.trace)} operations", flush=True)
        for title, campaign in CAMPAIGNS.items():
            wanted = given.campaign or (("",) if place == 0 else OTHERS)
            if title.startswith(tuple(wanted)):
                _report(title, campaign(scene, given.sample), total)
        if system.has_strace() and not given.campaign:
            ended, calls = system.traced(scene)
            same = ended.code == 0 and calls == system.counted(scene, ended)
            print(f"  strace sees {calls.total()} calls, {'the same' if same else calls}")
            if not same:
                total.broken.append(f"{name}: strace sees others: {calls}, {ended.said}")
    return total


def _report(title: str, count: Count, total: Count) -> None:
    print(f"  {title}: {count.text()}", flush=True)
    for broken in count.broken[:20]:
        print(f"    BROKEN {broken}", flush=True)
    total.add(count)


def _mounts(folder: Path, zygote: Zygote, given: argparse.Namespace) -> Count:
    """Kills on other file systems, a disk that is really full, a real mount point."""
    total = Count()
    for kind, megabytes in MOUNTS.items():
        with _mounted(folder / kind, kind, megabytes) as root:
            if root is None:
                continue
            made = scenes(make_root(root, zygote), zygote)
            for name in ("new", "overwrite"):
                made[name].prepare()
                clones = sum(k == "clone" for k, _ in made[name].undisturbed.trace)
                print(f"{name} on {kind}: {clones} clones asked for")
                _report("killed", kills(made[name], given.sample), total)
    for kind in ("tmpfs", "ext4"):
        root = make_root(folder / f"full-{kind}", zygote)
        scene = scenes(root, zygote)["new"]
        scene.fixed = True
        with _mounted(scene.place, kind, SMALL if kind == "tmpfs" else 4 * SMALL) as place:
            if place is not None:
                scene.prepare()
                full = circumstances.filled_disk(scene, given.sample)
                _report(f"a full disk, {kind}", full, total)
    root = make_root(folder / "point", zygote)
    for name in ("mount point", "mount point over"):
        scene = scenes(root, zygote)[name]
        scene.settings = {}
        with _mounted(scene.out, "tmpfs", SMALL * 4) as place:
            if place is not None:
                scene.prepare()
                _report(f"a real {name}, killed", kills(scene, given.sample), total)
    return total


@contextmanager
def _mounted(folder: Path, kind: str, megabytes: int) -> Iterator[Path | None]:
    """The folder with a file system in it, or None where that is not possible."""
    folder.mkdir(exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(circumstances.mounted(folder, kind, megabytes))
        except OSError as error:
            print(f"{kind} not tried: {error.strerror}")
            yield None
        else:
            yield folder


if __name__ == "__main__":
    sys.exit(main())
