"""The journal of finished shards, from which the next run continues.

A text file with a JSON object on each line: first a digest of everything that the shards' bytes
depend on, then for each finished shard its record and those of its edits. A line is appended and
flushed after its shard is; the last one may be torn. A record only counts if the sha256 of its
shard agrees.
"""

import hashlib
import os
from collections.abc import Callable, Container, Mapping
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Protocol

import msgspec
import torch

from converter.checkpoints.safetensors.rewrite import ShardRecord
from converter.checkpoints.source import Source
from converter.edits.base import Edit
from converter.edits.engine import Engine
from converter.manifest import EditedTensor, FileRecord
from converter.outputs.claim import Claim
from converter.runtime import progress
from converter.runtime.cache import sha256_of, sync
from converter.version import __version__


class Done(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A finished shard: its digests, and its edits."""

    record: ShardRecord
    edits: tuple[EditedTensor, ...]


class _Line(Done, frozen=True):
    """The same, as a line of the file."""

    shard: str


class Receiver(Protocol):
    """Gets each finished shard.

    Attributes:
        at_a_time: the most shards on disk at a time, or None.
    """

    @property
    def at_a_time(self) -> int | None: ...

    def before(self, users: Mapping[str, set[str]]) -> dict[str, Done]:
        """The finished shards among those in ``users``; the others are deleted.

        ``users`` is that of ``checkpoint.write.users_of``: of shards that one job has to write,
        all are finished or none.
        """

    def finished(self, shard: str, done: Done) -> None:
        """A shard is on disk. Called by the thread that wrote it, before it continues."""


class Journal:
    """The ``Receiver`` of a run that writes to a folder.

    Args:
        path: of the file.
        folder: with the shards.
        key: a digest of everything that the bytes of the shards depend on, besides the source's.
        digests: returns the present sha256 of the source's shards, if shards are files.
    """

    at_a_time: int | None = None

    def __init__(
        self, path: Path, folder: Path, key: str, digests: Callable[[], Mapping[str, str]]
    ) -> None:
        self._path, self._folder, self._key = path, folder, key
        self._digests, self._lock = digests, Lock()

    @classmethod
    def of(cls, claim: Claim, source: Source, edit: Edit, engine: Engine) -> "Journal":
        """The journal of an edit that is written to a claimed destination."""
        key = _key_of(edit, engine, source.original_files())
        digests: Callable[[], Mapping[str, str]] = dict if source.originals else source.digests
        return cls(claim.journal, claim.part, key, digests)

    def before(self, users: Mapping[str, set[str]]) -> dict[str, Done]:
        """Check the shards that an earlier run finished, and start the journal again.

        A shard that needs another one counts only if that one does.
        """
        known = {name: done for name, done in self._read().items() if name in users}
        if known:
            digests = self._digests()
            known = {n: done for n, done in known.items() if self._is_whole(n, done, digests)}
            known = {n: done for n, done in known.items() if users[n] <= known.keys()}
            progress.note(f"  {len(known)} of {len(users)} shards are finished already")
        keep_only(self._folder, known)
        part = self._path.with_name(f"{self._path.name}.new")
        part.write_bytes(_encoded({"key": self._key}, *known.values()))
        sync(part)
        part.replace(self._path)
        return dict(known)

    def finished(self, shard: str, done: Done) -> None:
        for folder in (self._folder, self._path.parent):
            sync(folder)  # the shard is on disk under its name before it counts
        with self._lock, self._path.open("ab") as file:
            file.write(_encoded(_Line(done.record, done.edits, shard)))
            file.flush()
            os.fsync(file.fileno())

    def _read(self) -> dict[str, _Line]:
        """The records of the file, if it is of the same edit."""
        try:
            first, *lines = self._path.read_bytes().split(b"\n")
            if msgspec.json.decode(first) != {"key": self._key}:
                return {}
        except (OSError, ValueError, RecursionError):
            return {}
        found = {}
        for text in lines:
            try:
                line = msgspec.json.decode(text, type=_Line)
            except (ValueError, RecursionError):
                break  # torn
            found[line.shard] = line
        return found

    def _is_whole(self, shard: str, done: Done, digests: Mapping[str, str]) -> bool:
        path = self._folder / shard
        return (
            digests.get(shard, done.record.source_sha256) == done.record.source_sha256
            and path.is_file()
            and path.stat().st_size == done.record.nbytes
            and sha256_of(path) == done.record.sha256
        )


def keep_only(folder: Path, names: Container[str]) -> None:
    """Delete all files below a folder except these, and then empty folders."""
    for parent, _, files in os.walk(folder, topdown=False):
        for name in files:
            if (Path(parent) / name).relative_to(folder).as_posix() not in names:
                (Path(parent) / name).unlink()
        if Path(parent) != folder:
            with suppress(OSError):
                Path(parent).rmdir()


def _key_of(edit: Edit, engine: Engine, originals: Mapping[str, FileRecord]) -> str:
    """A sha256 of everything that the bytes of the shards depend on, besides the source's.

    ``originals`` are the files from which virtual shards are made.
    """
    what = {
        "tool": __version__, "torch": str(torch.__version__), "device": engine.device,
        "rounding": engine.rounding, "edit": edit.digest(), "originals": originals,
    }  # fmt: skip
    return hashlib.sha256(msgspec.json.encode(what, order="deterministic")).hexdigest()


def _encoded(*lines: object) -> bytes:
    return b"".join(msgspec.json.encode(line) + b"\n" for line in lines)
