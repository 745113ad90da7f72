"""Which shards are finished, so that a run that was killed is gone on with and not begun anew.

A text file with a JSON object on each line: first what the bytes of all shards depend on, as a
digest, then for each finished shard its record and those of the edits in it. Lines are appended
and flushed after the shard is; the last one may be torn. Nothing in it is believed without the
sha256 of the file that it speaks of.
"""

import hashlib
import json
import os
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import torch

from converter import __version__
from converter.checkpoints.safetensors.header import to_bytes
from converter.checkpoints.safetensors.rewrite import ShardRecord
from converter.checkpoints.source import Source
from converter.checkpoints.weights import Weight
from converter.edits.base import Edit, EditRecord, Requantized
from converter.edits.engine import Engine
from converter.outputs.staging.claim import Claim
from converter.runtime import progress
from converter.runtime.cache import sha256_of, sync
from converter.runtime.strict_json import parse


@dataclass(frozen=True, slots=True)
class Done:
    """A finished shard: its digests, and what was edited in it."""

    record: ShardRecord
    edits: tuple[EditRecord, ...]


class Receiver(Protocol):
    """Who is told of each shard that is finished.

    Attributes:
        at_a_time: shards that may be there at a time, or None.
    """

    @property
    def at_a_time(self) -> int | None: ...

    def before(self, users: Mapping[str, set[str]]) -> dict[str, Done]:
        """Shards that are finished already; all else in the folder is deleted.

        Args:
            users: of the shards to be written, as of ``checkpoint.users_of``.
        """

    def finished(self, shard: str, done: Done) -> None:
        """A shard is on disk. Called by the thread that wrote it, which goes on afterwards."""


class Journal:
    """The ``Receiver`` of a run that writes to a folder.

    Args:
        path: of the file.
        folder: where the shards are.
        key: of ``key_of``.
        digests: gives the sha256 of the source's shards as they are now, where shards are files.
    """

    at_a_time: int | None = None

    def __init__(
        self,
        path: Path,
        folder: Path,
        key: str,
        digests: Callable[[], Mapping[str, str]],
    ) -> None:
        self._path, self._folder, self._key = path, folder, key
        self._digests, self._lock = digests, Lock()

    @classmethod
    def of(
        cls,
        claim: Claim,
        source: Source,
        edit: Edit,
        targets: Sequence[Weight],
        engine: Engine,
    ) -> "Journal":
        """The journal of an edit that is written to a claimed destination."""
        key = key_of(edit, targets, engine, source.original_files())

        def digests() -> Mapping[str, str]:
            return {} if source.originals else source.digests()

        return cls(claim.journal, claim.part, key, digests)

    def before(self, users: Mapping[str, set[str]]) -> dict[str, Done]:
        """The shards that an earlier run has finished, looked at again; the journal begins anew.

        A shard that cannot be made without another counts only if that one does.
        """
        known = {name: done for name, done in self._read().items() if name in users}
        if known:
            digests = self._digests()
            known = {n: done for n, done in known.items() if self._is_whole(n, done, digests)}
            known = {n: done for n, done in known.items() if users[n] <= known.keys()}
            progress.note(f"  {len(known)} of {len(users)} shards are finished already")
        keep_only(self._folder, known)
        part = self._path.with_name(f"{self._path.name}.new")
        text = [{"key": self._key}, *(_line(name, done) for name, done in known.items())]
        part.write_text("".join(json.dumps(line) + "\n" for line in text), "utf-8")
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(self._path)
        return known

    def finished(self, shard: str, done: Done) -> None:
        for folder in (self._folder, self._path.parent):
            sync(folder)  # the shard is on disk under its name before it counts
        with self._lock, self._path.open("ab") as file:
            file.write((json.dumps(_line(shard, done)) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())

    def _read(self) -> dict[str, Done]:
        """What the file says, if it is about the same edit."""
        try:
            first, *lines = self._path.read_text("utf-8").splitlines()
            if parse(first) != {"key": self._key}:
                return {}
        except (OSError, ValueError):
            return {}
        found = {}
        for line in lines:
            try:
                entry = parse(line)
                found[entry["shard"]] = _done(entry)
            except (ValueError, KeyError, TypeError):
                break  # torn
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
    """Delete all files below a folder but these, and the folders that are then empty."""
    for parent, _, files in os.walk(folder, topdown=False):
        for name in files:
            if (Path(parent) / name).relative_to(folder).as_posix() not in names:
                (Path(parent) / name).unlink()
        if Path(parent) != folder:
            with suppress(OSError):
                Path(parent).rmdir()


def key_of(
    edit: Edit, targets: Sequence[Weight], engine: Engine, originals: Mapping[str, Any]
) -> str:
    """A sha256 of all that the bytes of the shards depend on, besides those of the source.

    Args:
        edit: its bases count, by their bytes.
        targets: what is edited.
        engine: of its settings, those that bear on what is written.
        originals: name and sha256 of the files that shards are made from, if they are no files.
    """
    bases: dict[int, str] = {}
    for target in targets:
        basis = edit.basis(target)
        if basis is not None and target.layer not in bases:
            bases[target.layer] = hashlib.sha256(to_bytes(basis)).hexdigest()
    what = {
        "tool": __version__, "torch": torch.__version__, "device": engine.device,
        "rounding": engine.rounding, "bases": bases, "originals": dict(originals),
        "targets": [[t.info.name, t.shard, t.axis, edit.basis(t) is not None] for t in targets],
    }  # fmt: skip
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def _line(shard: str, done: Done) -> dict[str, Any]:
    edits = [asdict(edit) for edit in done.edits]
    return {"shard": shard, "record": asdict(done.record), "edits": edits}


def _done(entry: Mapping[str, Any]) -> Done:
    """The inverse of ``_line``."""
    edits = []
    for fields in entry["edits"]:
        about = fields["requantized"]
        if about is not None:
            about = Requantized(**about | {"block": tuple(about["block"])})
        known = fields | {"shape": tuple(fields["shape"]), "requantized": about}
        edits.append(EditRecord(**known))
    return Done(ShardRecord(**entry["record"]), tuple(edits))
