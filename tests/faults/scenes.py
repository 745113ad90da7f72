"""Whole runs of the product, each in a folder of its own, and what must hold after a fault.

``root`` holds ``source``, ``cache`` and ``place``; the run writes ``place/out``.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.builders.models import TINY, make_checkpoint, tiny_args
from tests.faults.zygote import Ended, Zygote

SHARD = re.compile(r"[\w-]+\.safetensors")

State = dict[str, tuple[int, str]]
"""Relative path -> mode and sha256; empty for a folder."""


def state_of(folder: Path) -> State | None:
    """Every entry of a folder, or None if there is none."""
    if not folder.is_dir():
        return None
    found = {}
    for path in sorted(folder.rglob("*")):
        digest = "" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()
        found[path.relative_to(folder).as_posix()] = path.lstat().st_mode, digest
    return found


class Broken(AssertionError):
    """An invariant does not hold."""


@dataclass
class Scene:
    """A run that can be done again and again.

    Attributes:
        name: for people.
        zygote: which runs it.
        root: its folder.
        args: of the command.
        old: a folder that is at the destination before, or None.
        settings: of the child, see ``zygote._settle``.
        mounted: whether the destination is a mount point.
        fits: whether the cache is empty before.
        fixed: whether ``place`` is emptied and not made anew.
    """

    name: str
    zygote: Zygote
    root: Path
    args: list[str]
    old: Path | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    mounted: bool = False
    fits: bool = False
    fixed: bool = False
    whole: State = field(default_factory=dict)
    before: State | None = None
    undisturbed: Ended = field(default_factory=lambda: Ended(0, ""))

    @property
    def place(self) -> Path:
        return self.root / "place"

    @property
    def out(self) -> Path:
        return self.place / "out"

    def prepare(self, times: int = 2) -> None:
        """Do the run undisturbed, more than once, and remember what it gives."""
        self.source = stamps(self.root / "source")
        for _ in range(times):
            self.reset()
            self.before = state_of(self.out)
            self.undisturbed = self.run()
            if self.undisturbed.code:
                raise Broken(f"{self.name}: undisturbed: {self.undisturbed.said}")
            found = state_of(self.out) or {}
            if self.whole and found != self.whole:
                raise Broken(f"{self.name}: two runs differ: {_difference(found, self.whole)}")
            self.whole = found
            self.check_after_success("undisturbed")

    def reset(self) -> None:
        """As it was before the first run."""
        if self.mounted:
            self.out.mkdir(exist_ok=True)
            _empty(self.out)
        elif self.fixed:
            _empty(self.place)
        else:
            shutil.rmtree(self.place, ignore_errors=True)
            self.place.mkdir()
        if self.old is not None:
            shutil.copytree(self.old, self.out, dirs_exist_ok=True)
        shutil.rmtree(self.root / "cache", ignore_errors=True)
        if self.fits:
            (self.root / "cache").mkdir()
        else:
            shutil.copytree(self.root / "kept", self.root / "cache")

    def run(self, **asked: Any) -> Ended:
        """The run, with a fault perhaps."""
        return self.zygote.run(self.root, self.args, **(self.settings | asked))

    def part(self) -> Path:
        """The folder in which work goes on."""
        return (self.out if self.mounted else self.place) / ".out.part"

    def check_untouched(self, when: str) -> None:
        """The source is as it was; the destination is whole, or as it was, or not there."""
        if stamps(self.root / "source") != self.source:
            raise Broken(f"{self.name} {when}: the source was touched")
        found = state_of(self.out)
        if self.mounted and found is not None:
            found = {n: e for n, e in found.items() if not n.startswith(".out.part")}
            self._check_filling(found, when)
            return
        allowed = [self.before, self.whole]
        if self.settings.get("no_exchange") and (self.part() / "old").is_dir():
            allowed.append(None)
        if found not in allowed:
            known = self.whole if found else {}
            raise Broken(f"{self.name} {when}: destination: {_difference(found or {}, known)}")

    def _check_filling(self, found: State, when: str) -> None:
        """A mount point is filled file by file: what looks like a model is one."""
        for known in (self.before or {}, self.whole):
            if all(known.get(name) == entry for name, entry in found.items()):
                weights = {n for n in known if n.endswith(".safetensors")}
                if "config.json" not in found or weights <= found.keys():
                    return
        raise Broken(f"{self.name} {when}: mount point: {_difference(found, self.whole)}")

    def check_after_success(self, when: str) -> None:
        """The destination is that of an undisturbed run, and nothing lies beside it."""
        found = state_of(self.out) or {}
        if found != self.whole:
            raise Broken(f"{self.name} {when}: result: {_difference(found, self.whole)}")
        beside = sorted(
            path.name
            for path in self.place.iterdir()
            if path not in (self.out, self.place / "lost+found")
        )
        if beside:
            raise Broken(f"{self.name} {when}: beside the destination: {beside}")
        if stamps(self.root / "source") != self.source:
            raise Broken(f"{self.name} {when}: the source was touched")

    def finished(self) -> set[str]:
        """The shards that the journal of an interrupted run has."""
        journal = self.part() / "journal.jsonl"
        if not journal.is_file():
            return set()
        lines = journal.read_bytes().split(b"\n")[:-1]
        return {name for line in lines for name in SHARD.findall(line.decode("utf-8", "replace"))}

    def resume(self, when: str) -> tuple[int, int]:
        """The same run again; the shards that it found finished, and those that it redid of them.

        Raises:
            Broken: it did not end well.
        """
        known = () if state_of(self.out) == self.whole else self.finished()
        finished = {name for name in known if (self.part() / "new" / name).is_file()}
        again = self.run()
        if again.code:
            raise Broken(f"{self.name} {when}: the next run ends with {again.code}: {again.said}")
        self.check_after_success(f"{when}, then again")
        written = {Path(p).name for kind, p in again.trace if kind == "open"}
        return len(finished), len(finished & written)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name != "lost+found":
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def stamps(folder: Path) -> dict[str, tuple[int, int, str]]:
    """Of each file of the source: inode, time of its last change, sha256."""
    found = {}
    for path in sorted(folder.rglob("*")):
        stat = path.stat()
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        found[path.name] = stat.st_ino, stat.st_mtime_ns, digest
    return found


def _difference(found: State, wanted: State) -> str:
    """The names that are missing, too many or other."""
    other = sorted(n for n in found.keys() & wanted.keys() if found[n] != wanted[n])
    missing, more = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    return f"missing {missing[:4]}, too many {more[:4]}, other {other[:4]}"


def base_args(root: Path, **changes: str) -> list[str]:
    return [*tiny_args(**changes), "--num-pairs", "64", "--quiet",
            "--cache-dir", str(root / "cache")]  # fmt: skip


def make_root(root: Path, zygote: Zygote) -> Path:
    """A source of several shards, the cache of a first conversion, and an older conversion."""
    make_checkpoint(root / "source", "llama", torch.bfloat16, "30KB")
    for name in ("cache", "place"):
        (root / name).mkdir()
    for out, rank in (("older", "2"), ("newer", TINY["rank"])):
        args = [str(root / "source"), str(root / out), *base_args(root, rank=rank)]
        if (ended := zygote.run(root, args)).code:
            raise Broken(ended.said)
    shutil.copytree(root / "cache", root / "kept")
    return root


def scenes(root: Path, zygote: Zygote) -> dict[str, Scene]:
    """The runs that differ in what they write and where, by name; none is prepared yet."""
    source, out = str(root / "source"), str(root / "place" / "out")
    given, older = [source, out, *base_args(root)], root / "older"
    usual = [*given, "--workers", "1"]
    replay = ["replay", str(root / "newer"), out, "--source", source, "--quiet", "--workers", "1",
              "--cache-dir", str(root / "cache")]  # fmt: skip
    mount = {"mount": out}
    made = [
        Scene("new", zygote, root, usual),
        Scene("overwrite", zygote, root, [*usual, "--overwrite"], older),
        Scene(
            "overwrite without exchange", zygote, root, [*usual, "--overwrite"], older,
            {"no_exchange": True},
        ),
        Scene("replay", zygote, root, replay),
        Scene("replay over", zygote, root, [*replay, "--overwrite"], older),
        Scene("adapter", zygote, root, [*given, "--output", "adapter"]),
        Scene("mount point", zygote, root, usual, settings=mount, mounted=True),
        Scene(
            "mount point over", zygote, root, [*usual, "--overwrite"], older, mount, mounted=True
        ),
        Scene("with the fit", zygote, root, usual, fits=True),
    ]  # fmt: skip
    return {scene.name: scene for scene in made}


@contextmanager
def working_folder(parent: Path | None = None) -> Iterator[Path]:
    """A folder that is deleted afterwards, whatever is in it."""
    import tempfile

    with tempfile.TemporaryDirectory(dir=parent, prefix="faults-") as name:
        os.chmod(name, 0o755)
        yield Path(name).resolve()
