"""Killed, powered off, out of disk: a sample of what ``make faults`` tries at every operation."""

import errno
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults import campaign, circumstances, system
from tests.faults.campaign import Count
from tests.faults.power import Disk
from tests.faults.scenes import Scene, make_root, scenes, working_folder
from tests.faults.zygote import Zygote

Scenes = dict[str, Scene]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def zygotes() -> Iterator[tuple[Zygote, Zygote]]:
    """Two, for runs at the same time; they start while the other works."""
    with Zygote() as one, Zygote() as two:
        yield one, two


@pytest.fixture(scope="module")
def made(zygotes: tuple[Zygote, Zygote]) -> Iterator[Scenes]:
    """Every scene; ``prepared`` does its undisturbed run."""
    with working_folder() as folder:  # that of pytest may not be read by others
        yield scenes(make_root(folder / "plain", zygotes[0]), zygotes[0])


def prepared(made: Scenes, name: str) -> Scene:
    scene = made[name]
    if not scene.whole:
        scene.prepare(times=1)
    return scene


def sound(count: Count) -> None:
    """Everything that was tried was survived and gone on with."""
    assert not count.broken, "\n".join(count.broken)
    assert 0 < count.tried == count.survived == count.resumed
    assert not count.redone


def test_two_undisturbed_runs_are_the_same_and_every_change_is_counted(made: Scenes) -> None:
    scene = made["new"]
    scene.prepare(times=2)
    assert scene.undisturbed.unseen == []
    kinds = {kind for kind, _ in scene.undisturbed.trace}
    assert {"open", "write", "fsync", "rename", "mkdir", "fallocate"} <= kinds


@pytest.mark.skipif(not system.has_strace(), reason="strace is not installed")
def test_the_kernel_sees_the_same_operations(made: Scenes) -> None:
    scene = prepared(made, "new")
    ended, calls = system.traced(scene)
    assert ended.code == 0, ended.said
    assert calls == system.counted(scene, ended)


@pytest.mark.parametrize(
    ("name", "size"), [("new", 4), ("overwrite", 3), ("mount point over", 2), ("adapter", 1)]
)
def test_killed_at_any_operation(made: Scenes, name: str, size: int) -> None:
    sound(campaign.kills(prepared(made, name), size))


def test_finished_shards_are_not_done_again(made: Scenes) -> None:
    scene = prepared(made, "new")
    trace = list(enumerate(scene.undisturbed.trace, 1))
    flushed = [n for n, (kind, path) in trace if kind == "fsync" and path.endswith("journal.jsonl")]
    at = max(flushed)
    count = Count()
    campaign.one(scene, count, f"killed at {at + 1}", -9, fault={"do": "kill", "at": at + 1})
    sound(count)
    assert count.finished == 5


EVENTS: dict[str, Callable[[Scene], Count]] = {
    "killed in the middle of a write": lambda scene: campaign.half_writes(scene, 2),
    "disk full": lambda scene: campaign.errors(scene, "disk full", 1),
    "EIO at fsync": lambda scene: campaign.errors(scene, "EIO at fsync", 1),
    "EIO at rename": lambda scene: campaign.errors(scene, "EIO at rename", 1),
    "a reading that fails": lambda scene: campaign.bad_reads(scene, 1),
    "files that may not grow": lambda scene: circumstances.file_sizes(scene, 1),
    "short writes, short readings, many signals": campaign.slow_devices,
    "folders and files of somebody else": circumstances.no_permission,
    "SIGINT": lambda scene: circumstances.interrupted(scene, 1, [signal.SIGINT]),
    "SIGTERM": lambda scene: circumstances.interrupted(scene, 1, [signal.SIGTERM]),
    "SIGHUP": lambda scene: circumstances.interrupted(scene, 1, [signal.SIGHUP]),
}


@pytest.mark.parametrize("event", EVENTS)
def test_what_happens_is_survived(made: Scenes, event: str) -> None:
    sound(EVENTS[event](prepared(made, "new")))


@pytest.mark.parametrize("variant", campaign.VARIANTS)
def test_power_lost_at_any_operation(made: Scenes, variant: str) -> None:
    sound(campaign.power_cuts(prepared(made, "new"), 2, [variant]))


def test_a_source_that_is_lost_while_it_is_edited(made: Scenes) -> None:
    count = Count()
    circumstances.lose(prepared(made, "new"), count, "vanish", ".", at=7, after=circumstances.NEW)
    sound(count)


def test_a_shard_made_of_another_source_is_not_taken_for_finished(made: Scenes) -> None:
    scene, count = prepared(made, "new"), Count()
    circumstances.lose(scene, count, "replace", circumstances.SHARD, at=7, after=circumstances.NEW)
    assert not count.broken, "\n".join(count.broken)
    assert (count.resumed, count.redone) == (1, 1)


def test_a_second_run_is_told_who_works(made: Scenes, zygotes: tuple[Zygote, Zygote]) -> None:
    scene = prepared(made, "new")
    scene.reset()
    slow = {"do": "slow", "seconds": 0.02}
    child = zygotes[0].start(scene.root, scene.args, fault=slow)
    for _ in range(500):
        if scene.part().joinpath("new").is_dir():
            break
        signal.sigtimedwait([], 0.01)
    second = zygotes[1].run(scene.root, scene.args)
    assert second.code == 7, second.said
    assert f"process {child} on " in second.said
    assert zygotes[0].wait().code == 0
    scene.check_after_success("two at a time")


def a_file_of_three_bytes(root: Path) -> Disk:
    """It was opened and written, and not flushed."""
    root.mkdir()
    disk = Disk(root)
    (root / "a").write_bytes(b"abc")
    disk.changed("open", (f"{root}/a",))
    disk.changed("write", (f"{root}/a",))
    return disk


def test_the_model_of_the_disk_forgets_what_was_not_flushed(tmp_path: Path) -> None:
    """Of a file that was renamed without any fsync, each variant leaves something else."""
    for variant, left in (("lost", {}), ("kept", {"new": b""}), ("zeros", {"new": bytes(3)})):
        root = tmp_path / variant
        disk = a_file_of_three_bytes(root)
        (root / "a").rename(root / "new")
        disk.changed("rename", (f"{root}/a", f"{root}/new"))
        disk.cut(variant, 0)
        assert {path.name: path.read_bytes() for path in root.iterdir()} == left


def test_the_model_of_the_disk_keeps_what_was_flushed(tmp_path: Path) -> None:
    for variant in campaign.VARIANTS:
        root = tmp_path / variant
        disk = a_file_of_three_bytes(root)
        disk.changed("fsync", (f"{root}/a",))
        disk.changed("fsync", (str(root),))
        disk.cut(variant, 1)
        assert (root / "a").read_bytes() == b"abc"


def test_a_write_that_takes_nothing_is_an_error_and_no_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from converter.checkpoints.safetensors.direct_writer import Writer

    writer = Writer(tmp_path / "file", 3, [(3, "")], None)
    monkeypatch.setattr(os, "pwrite", lambda *args: 0)
    writer.put(memoryview(b"abc"))
    with pytest.raises(OSError, match="Input/output") as caught:
        writer.close()
    assert caught.value.errno == errno.EIO
