"""What a run that ended too early has finished is not done again, and only one run writes."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result

from converter.checkpoints.safetensors import rewrite as shard_files
from converter.errors import DestinationError
from converter.outputs.checkpoint import shard_job
from converter.outputs.claim import Claim, claimed
from converter.runtime import progress
from tests.builders.errors import refused
from tests.builders.invoke import Cli
from tests.builders.models import TINY_ARGS, Checkpoints, make_checkpoint, tiny_args
from tests.test_formats import as_pickles
from tests.test_quantization import BLOCKS, as_fp8

MEASURED = ("README.md", "SHA256SUMS", "gloss_manifest.json")
"""They hold seconds, or the sha256 of what does."""


class Rewrites:
    """Notes which shards are written; the one named ``fails`` is half written, and then no more."""

    def __init__(self, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cli = cli
        self.names: list[str] = []
        self.fails: str | None = None
        rewrite = shard_files.rewrite

        def note(reading: Any, target: Path, *args: Any, **more: Any) -> Any:
            if target.name == self.fails:
                target.write_bytes(b"half")
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.names.append(target.name)
            return rewrite(reading, target, *args, **more)

        monkeypatch.setattr(shard_job, "rewrite", note)

    def run(self, *args: object, fails: str | None = None, **expected: Any) -> Result:
        """A conversion; what is expected is as for ``cli``."""
        self.names.clear()
        self.fails = fails
        return self.cli("convert", *args, "--workers", 1, **expected)


@pytest.fixture
def rewrites(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> Rewrites:
    return Rewrites(cli, monkeypatch)


def shards_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.safetensors") if "gloss" not in path.name)


def content(folder: Path) -> dict[str, Any]:
    """Every file of a checkpoint; of the manifest, what is not measured."""
    files: dict[str, Any] = {
        p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and p.name not in MEASURED
    }
    manifest = json.loads((folder / "gloss_manifest.json").read_text())
    del manifest["measurements"]
    return files | {"manifest": manifest}


def test_finished_shards_are_kept_and_not_written_again(
    checkpoints: Checkpoints, cli: Cli, tmp_path: Path, rewrites: Rewrites
) -> None:
    source, out = checkpoints("llama"), tmp_path / "out"
    shards = shards_of(source)
    cli("convert", source, tmp_path / "whole", *TINY_ARGS, code=0)
    failed = rewrites.run(source, out, *TINY_ARGS, fails=shards[3], code=7)
    assert "finished shards kept in .out.part for the next run: 3" in failed.stderr
    assert not out.exists()
    places = {name: (tmp_path / ".out.part/new" / name).stat().st_ino for name in shards[:3]}
    again = rewrites.run(source, out, *TINY_ARGS, code=0)
    assert f"3 of {len(shards)} shards are finished already" in again.stderr
    assert rewrites.names == shards[3:]
    assert {name: (out / name).stat().st_ino for name in shards[:3]} == places
    assert content(out) == content(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "whole"]


@pytest.mark.parametrize("what", ["bytes", "size", "missing", "journal", "torn", "source", "rank"])
def test_what_is_not_certain_is_written_again(
    what: str, checkpoints: Checkpoints, cli: Cli, tmp_path: Path, rewrites: Rewrites
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(checkpoints("llama"), source)
    shards = shards_of(source)
    rewrites.run(source, out, *TINY_ARGS, fails=shards[2], code=7)
    holder, args, again = tmp_path / ".out.part", TINY_ARGS, shards[1:]
    second, journal = holder / "new" / shards[1], holder / "journal.jsonl"
    if what == "bytes":
        data = bytearray(second.read_bytes())
        data[-1] ^= 1
        second.write_bytes(data)
    elif what == "size":
        second.write_bytes(second.read_bytes()[:-1])
    elif what == "missing":
        second.unlink()
    elif what == "journal":
        journal.unlink()
        again = shards
    elif what == "torn":
        journal.write_bytes(journal.read_bytes()[:-20])
    elif what == "source":  # a change of one weight, after the activations were taken
        data = bytearray((source / shards[1]).read_bytes())
        data[-4:] = bytes(4)
        (source / shards[1]).write_bytes(data)
        again = shards  # for the activations are others, and the subspace with them
    else:
        args, again = tiny_args(rank=3), shards
    rewrites.run(source, out, *args, code=0)
    assert rewrites.names == again
    cli("convert", source, tmp_path / "whole", *args, code=0)
    assert content(out) == content(tmp_path / "whole")


KILL = """
import os, signal, sys
from converter.cli.convert import convert_command
from converter.outputs.checkpoint import shard_job
rewrite, done = shard_job.rewrite, []
def deadly(*args, **more):
    if len(done) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    done.append(rewrite(*args, **more))
    return done[-1]
shard_job.rewrite = deadly
convert_command(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_fused_model_is_gone_on_with_after_a_kill(
    checkpoints: Checkpoints, cli: Cli, tmp_path: Path, rewrites: Rewrites
) -> None:
    source, out, shards = checkpoints("llama"), tmp_path / "out", shards_of(checkpoints("llama"))
    fused = ("--method", "fusion", "-o", "form=paper", "-o", "depth=2", "-o", "tokens=300")
    args = (*fused, "--num-pairs", 32, "--no-guard", "--workers", 1)
    command = [sys.executable, "-c", KILL, *map(str, (source, out, *args))]
    killed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not out.exists()
    again = rewrites.run(source, out, *args[:-2], code=0)
    assert f"3 of {len(shards)} shards are finished already" in again.stderr
    assert rewrites.names == shards[3:]
    cli("convert", source, tmp_path / "whole", *args, code=0)
    assert content(out) == content(tmp_path / "whole")
    assert "modeling_gloss_fused.py" in content(out)
    cli("verify", out, "--source", source, code=0)


def test_a_source_that_changes_between_two_runs_is_noticed_without_a_forward_pass(
    checkpoints: Checkpoints, cli: Cli, tmp_path: Path, rewrites: Rewrites, shared_cache: Path
) -> None:
    """With activations of a file the edit is the same, and the shards are not."""
    source = shutil.copytree(checkpoints("llama"), tmp_path / "source")
    shards, before = shards_of(source), set(shared_cache.glob("activations/*"))
    args = (*TINY_ARGS, "--seed", 91)
    cli("convert", source, tmp_path / "whole", *args, code=0)
    (kept,) = set(shared_cache.glob("activations/*")) - before
    args = (*args, "--activations", kept)
    rewrites.run(source, tmp_path / "out", *args, fails=shards[2], code=7)
    data = bytearray((source / shards[1]).read_bytes())
    data[-1] ^= 1
    (source / shards[1]).write_bytes(data)
    result = rewrites.run(source, tmp_path / "out", *args)
    assert rewrites.names == shards[1:]
    assert result.exit_code == 4
    assert f"{shards[1]} is not the file that the activations were taken from" in result.stderr


def test_shards_that_need_each_other_count_together(
    checkpoints: Checkpoints, cli: Cli, tmp_path: Path, rewrites: Rewrites
) -> None:
    """A weight in FP8 in one shard, its scales in another."""
    plain = checkpoints("qwen3", torch.bfloat16)
    source = as_fp8(plain, tmp_path / "fp8", BLOCKS, apart=True)
    shards = shards_of(source)
    args = (source, tmp_path / "out", *TINY_ARGS)
    rewrites.run(*args, fails=shards[-1], code=7)
    assert len(rewrites.names) == len(shards) - 1
    rewrites.run(*args, code=0)
    assert 1 < len(rewrites.names) <= len(shards)
    cli("verify", tmp_path / "out", "--source", source, code=0)


def test_shards_made_from_another_format_are_gone_on_with(
    checkpoints: Checkpoints, cli: Cli, tmp_path: Path, rewrites: Rewrites
) -> None:
    source = as_pickles(checkpoints("llama"), tmp_path / "source", 2)
    args = (source, tmp_path / "out", *TINY_ARGS)
    first, second = (f"model-{number:05d}-of-00002.safetensors" for number in (1, 2))
    rewrites.run(*args, fails=second, code=7)
    rewrites.run(*args, code=0)
    assert rewrites.names == [second]
    assert first in shards_of(tmp_path / "out")
    cli("verify", tmp_path / "out", "--source", source, code=0)


def test_the_same_run_again_finds_its_result(
    checkpoints: Checkpoints, tmp_path: Path, rewrites: Rewrites
) -> None:
    args = (checkpoints("llama"), tmp_path / "out", *TINY_ARGS)
    rewrites.run(*args, code=0)
    (tmp_path / ".out.part/new").mkdir(parents=True)  # killed before it was deleted
    (tmp_path / ".out.part/lock").touch()
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    rewrites.run(*args, code=0, says="is the result of this run already")
    assert rewrites.names == []
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("killed", [False, True])
def test_the_same_run_again_finds_its_result_in_a_mount_point(
    killed: bool, checkpoints: Checkpoints, tmp_path: Path, rewrites: Rewrites,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Also if a run was killed when all files were in their place, and this was not yet noted."""
    out = tmp_path / "out"
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == out)
    args = (checkpoints("llama"), out, *TINY_ARGS)
    with monkeypatch.context() as patch:
        if killed:
            patch.setattr(Claim, "discard", lambda claim: None)
        rewrites.run(*args, code=0)
    before = content(out)
    assert (out / ".out.part/filling").exists() == killed
    again = rewrites.run(*args, code=0)
    assert ("is the result of this run already" in again.stderr) == (not killed)
    assert rewrites.names == []
    assert content(out) == before
    assert not (out / ".out.part").exists()


HOLD = """
import sys, time
from pathlib import Path
from converter.outputs.claim import claimed
with claimed(Path(sys.argv[1]), False):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_run_is_told_who_holds_the_destination(
    checkpoints: Checkpoints, cli: Cli, tmp_path: Path
) -> None:
    """And once that process is killed, nobody does."""
    out = tmp_path / "out"
    args = ("convert", checkpoints("llama"), out, *TINY_ARGS)
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(out)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        refused = cli(*args)
        process.send_signal(signal.SIGKILL)
    assert refused.exit_code == 7
    assert "is held by another run: found process" in refused.stderr
    assert f"process {process.pid} on " in refused.stderr
    assert not out.exists()
    assert (tmp_path / ".out.part").is_dir()
    cli(*args, code=0)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_holder_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / ".out.part").symlink_to(elsewhere)
    with (
        refused(DestinationError, what="...cannot be written", found=".out.part is a link"),
        claimed(tmp_path / "out", False),
    ):
        pytest.fail("it was claimed")
    assert list(elsewhere.iterdir()) == []


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    """Even one that is named as ours would be."""
    (tmp_path / ".out.part").mkdir()
    (tmp_path / ".out.part/mine").write_text("mine")
    with (
        refused(DestinationError, found=".out.part exists and was not made by gloss-convert"),
        claimed(tmp_path / "out", False),
    ):
        pytest.fail("it was claimed")
    assert (tmp_path / ".out.part/mine").read_text() == "mine"


def test_a_file_system_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(file: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with progress.recording() as told, claimed(tmp_path / "out", False):
        pass
    assert "has no locks" in told.warnings[0]


def test_names_as_long_as_a_file_system_takes_them(tmp_path: Path) -> None:
    out = tmp_path / ("n" * 255)
    with claimed(out, False) as claim, claim.staged(False) as part:
        (part / "config.json").write_text("{}")
    assert [p.name for p in tmp_path.iterdir()] == [out.name]


def test_what_another_run_left_counts_as_free(
    tmp_path: Path, checkpoints: Checkpoints, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is gone on with, or deleted."""
    source = checkpoints("llama")
    usage, needed = shutil.disk_usage(tmp_path), sum(p.stat().st_size for p in source.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed // 2))
    args = ("convert", source, tmp_path / "out", *TINY_ARGS)
    assert "is too small" in cli(*args).stderr
    (tmp_path / ".out.part/new").mkdir(parents=True)
    (tmp_path / ".out.part/new/stale").write_bytes(bytes(needed))
    (tmp_path / ".out.part/lock").touch()
    cli(*args, code=0)


STOP = """
import os, signal, sys, threading, time
import torch
signal.signal(signal.SIGINT, signal.default_int_handler)
from converter.cli.convert import convert_command
from converter.methods import workbench as fitting
def slow(*args, **more):
    print("working", flush=True)
    x = torch.ones(20_000_000)
    while True:
        torch.sort(x)  # a step that takes a while
    return x
fitting.extract = slow
convert_command(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_step_that_takes_long_does_not_keep_a_run_alive(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    args = [checkpoints("llama"), tmp_path / "out", *TINY_ARGS, "--cache-dir", tmp_path / "cache"]
    with subprocess.Popen(
        [sys.executable, "-c", STOP, *map(str, args)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "working\n"
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
        seconds = time.monotonic() - start
    assert process.returncode == 130, errors
    assert "stopped by SIGINT" in errors
    assert "the same command again goes on" in errors
    assert seconds < 5  # a second on a machine that has nothing else to do


def test_planted_checkpoints_of_one_file_are_written_anew(
    tmp_path: Path, rewrites: Rewrites
) -> None:
    source = make_checkpoint(tmp_path / "source", shard="5GB")
    args = (source, tmp_path / "out", *TINY_ARGS)
    rewrites.run(*args, fails="model.safetensors", code=7)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]
    rewrites.run(*args, code=0)


def test_the_cache_loses_what_killed_processes_left_there(tmp_path: Path) -> None:
    from converter.runtime.cache import replacing

    old, new, other = (tmp_path / name for name in (".memo.json.1", ".memo.json.2", ".ssh"))
    for path in (old, new, other):
        path.write_text("half")
    for path in (old, other):
        os.utime(path, (1e9, 1e9))
    with replacing(tmp_path / "memo.json") as part:
        part.write_text("whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".memo.json.2", ".ssh", "memo.json"]


@pytest.mark.parametrize("moment", ["between the renames", "after both", "moving out", "moving in"])
def test_a_last_step_that_was_killed_is_undone(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The destination is then the old one, whole; or the new one, if it was in its place."""
    out, holder = tmp_path / "out", tmp_path / ".out.part"
    old, new = {"a": "old", "config.json": "old"}, {"b": "new", "config.json": "new"}
    there, aside, part = {}, old, new
    if moment == "after both":
        there, part = new, {}
    if moment.startswith("moving"):
        monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == out)
        holder = out / ".out.part"
        there, aside = {"a": "old"}, {"config.json": "old"}
    if moment == "moving in":
        there, aside, part = {"b": "new"}, old, {"config.json": "new"}
    for folder, files in ((out, there), (holder / "old", aside), (holder / "new", part)):
        if files:
            folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text)
    (holder / "lock").touch()
    if moment == "moving in":
        (holder / "filling").touch()
    with claimed(out, True) as claim:
        found = {path.name: path.read_text() for path in out.iterdir() if path.is_file()}
        assert found == (new if moment == "after both" else old)
        if moment != "after both":
            assert {path.name: path.read_text() for path in claim.part.iterdir()} == new
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert not (out / ".out.part").exists()


def test_a_mount_point_that_is_filled_never_has_a_config_without_all_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, names = tmp_path / "out", ("a.safetensors", "b.safetensors", "config.json", "x.json")
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == out)
    out.mkdir()
    for name in names:
        (out / name).write_text("old")
    seen: list[set[str]] = []
    rename = Path.rename

    def watched(self: Path, target: Path) -> Path:
        seen.append({path.name for path in out.iterdir()})
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", watched)
    with claimed(out, True) as claim, claim.staged(True) as part:
        for name in names:
            (part / name).write_text("new")
    assert len(seen) >= 2 * len(names)
    assert all(set(names[:2]) <= found for found in seen if "config.json" in found)
