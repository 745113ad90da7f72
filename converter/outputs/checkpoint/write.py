"""An edited checkpoint: output shard i is a function of source shard i, the rest are copies."""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from threading import BoundedSemaphore, Event, Lock
from typing import Any

import torch

from converter.checkpoints.formats.virtual import index_text
from converter.checkpoints.names import INDEX
from converter.checkpoints.plan import Plan
from converter.checkpoints.safetensors.rewrite import ShardRecord, rewrite
from converter.checkpoints.source import Source
from converter.checkpoints.weights import Weight
from converter.edits.apply import Changes, changes_of
from converter.edits.base import Edit, EditRecord
from converter.edits.engine import Engine, quiet_blas
from converter.errors import CheckpointError
from converter.outputs.staging.journal import Done, Receiver
from converter.runtime import progress
from converter.runtime.threads import ThreadPool


@dataclass(frozen=True, slots=True)
class Written:
    """What was written.

    Attributes:
        shards: file name -> digests of source and output; empty if none was written.
        copies: file name -> sha256 and bytes of a file that was copied.
        made: the same, of a file that the source lacks.
        edits: a record for each edited tensor, in order of layer.
    """

    shards: Mapping[str, ShardRecord]
    copies: Mapping[str, tuple[str, int]]
    made: Mapping[str, tuple[str, int]]
    edits: tuple[EditRecord, ...]


def write_checkpoint(
    source: Source,
    plan: Plan,
    edit: Edit,
    targets: tuple[Weight, ...],
    folder: Path,
    engine: Engine,
    keep_source: bool = True,
    receiver: Receiver | None = None,
) -> Written:
    """Rewrite the shards, some at a time, then copy the small files, index and config last.

    Args:
        source: its shards are fetched as they come, the next one while others are edited.
        plan: of that source.
        edit: what happens to ``targets``.
        targets: the tensors that must change.
        folder: holds nothing but shards that ``receiver`` may know.
        engine: how many at a time, and how.
        keep_source: if not, shards fetched from the Hub are deleted once they are edited.
        receiver: knows shards that are finished already, is told of each that is written, and
            may delete it.

    Raises:
        CheckpointError: a shard is malformed, or a target was left unchanged.
        OptionError: the engine's memory is too little.
        OSError: the folder cannot be written.
    """
    records: list[EditRecord] = []
    users = users_of(source, targets)
    before = receiver.before(users) if receiver else {}
    for done in before.values():
        records += done.edits
    changes = changes_of(source, edit, targets, engine, records)
    rank = max((U.shape[1] for t in targets if (U := edit.basis(t)) is not None), default=0)
    shards_at_a_time = 1 if source.serial else len(source.shards)
    if receiver and receiver.at_a_time:
        shards_at_a_time = min(shards_at_a_time, receiver.at_a_time)
    workers = engine.workers_for(shards_at_a_time, targets, rank)
    with progress.bar("edit", plan.nbytes, "B") as bar:
        job = Rewriting(source, changes, users, folder, engine, bar, keep_source)
        if receiver:
            job.then(lambda shard, record: receiver.finished(shard, _done(records, shard, record)))
        shards = job.run(workers, {shard: done.record for shard, done in before.items()})
    if len(records) != len(targets):
        raise CheckpointError(
            "not every down-projection of the chosen layers was edited",
            expected=f"{len(targets)} tensors",
            found=f"{len(records)}",
        )
    copies = {
        name: copy_file(path, folder / name)
        for name, path in source.small.items()
        if name != "config.json"
    }
    made = {}
    if source.virtual_shards is None and source.weight_map is not None:
        copies[INDEX] = copy_file(source.folder / INDEX, folder / INDEX)
    elif source.virtual_shards is not None and source.weight_map is not None:
        (folder / INDEX).write_text(index_text(source.virtual_shards), "utf-8")
        made[INDEX] = file_entry(folder / INDEX)
    copies["config.json"] = copy_file(source.folder / "config.json", folder / "config.json")
    records.sort(key=lambda record: (record.layer, record.name))
    return Written(shards, copies, made, tuple(records))


def _done(records: list[EditRecord], shard: str, record: ShardRecord) -> Done:
    """A shard that is written, with what was edited in it."""
    return Done(record, tuple(edit for edit in list(records) if edit.shard == shard))


class Checkpoint:
    """This output, as ``outputs.registry`` has it."""

    implied: Mapping[str, str] = {}
    unused: tuple[str, ...] = ()
    write = staticmethod(write_checkpoint)

    def check(self, plan: Plan, targets: tuple[Weight, ...]) -> None:
        """Whatever can be planned can be written as a checkpoint."""

    def nbytes(self, plan: Plan, targets: tuple[Weight, ...], rank: int) -> int:
        return plan.nbytes

    def companions(self, source: Source) -> list[str]:
        return list(source.small)

    def at_a_time(self, source: Source) -> int:
        return 1 if source.serial else len(source.shards)


class _Stopped(Exception):  # noqa: N818 - it is not an error
    """Raised in a worker when another one has failed."""


class Rewriting:
    """The shards being rewritten, some at a time; see ``write_checkpoint``."""

    def __init__(
        self,
        source: Source,
        changes: Changes,
        users: Mapping[str, set[str]],
        folder: Path,
        engine: Engine,
        bar: Any,
        keep_source: bool,
    ) -> None:
        self.source, self.changes, self.folder = source, changes, folder
        self.engine, self.bar, self.keep_source = engine, bar, keep_source
        self.users, self.waiting = users, {shard: set(users[shard]) for shard in users}
        self.lock, self.stop = Lock(), Event()
        self.after: Callable[[str, ShardRecord], None] = lambda shard, record: None

    def then(self, after: Callable[[str, ShardRecord], None]) -> None:
        """Call ``after`` for each shard once it is written, in the thread that wrote it."""
        self.after = after

    def run(self, workers: int, before: Mapping[str, ShardRecord]) -> dict[str, ShardRecord]:
        """Rewrite the shards that were not ``before``; the records of all, in order.

        If one fails, the others stop soon and its error is raised.
        """
        free = BoundedSemaphore(workers)
        futures: dict[str, Future[ShardRecord]] = {}
        for shard, record in before.items():
            self.bar.update(record.nbytes)
            self.let_go(shard)
        with (
            quiet_blas(workers) as threads,
            ThreadPool(workers, "edit", torch.set_num_threads, (threads,)) as pool,
        ):
            try:
                for shard in fetched(
                    self.source, [s for s in self.source.shards if s not in before]
                ):
                    free.acquire()
                    if self.stop.is_set():
                        break
                    self.bar.set_postfix_str(shard)
                    futures[shard] = pool.submit(self._work, shard)
                    futures[shard].add_done_callback(lambda done: free.release())
                wait(futures.values())
            except BaseException:  # Ctrl-C too, which must not leave threads that write
                self.stop.set()
                raise
        errors = [error for future in futures.values() if (error := future.exception())]
        for error in sorted(errors, key=lambda error: isinstance(error, _Stopped)):
            raise error
        new = {shard: future.result() for shard, future in futures.items()}
        return {shard: before.get(shard) or new[shard] for shard in self.source.shards}

    def _work(self, shard: str) -> ShardRecord:
        engine = self.engine
        try:
            with _stream(engine.device), self.source.open(shard) as file:
                record = rewrite(
                    file, self.folder / shard, self.changes[shard], self._advance,
                    digests=engine.digests, direct=engine.direct, clone=engine.clone,
                )  # fmt: skip
            self.after(shard, record)
            self.let_go(shard)
        except BaseException:
            self.stop.set()
            raise
        return record

    def _advance(self, count: int) -> None:
        if self.stop.is_set():
            raise _Stopped
        with self.lock:
            self.bar.update(count)

    def let_go(self, shard: str) -> None:
        """Delete the shards that only this one still needed, unless the source is to be kept."""
        with self.lock:
            for name in sorted(self.users[shard]):
                self.waiting[name].discard(shard)
                if not self.waiting[name] and not self.keep_source:
                    self.source.drop(name)


def _stream(device: str) -> Any:
    """On a GPU every worker has a stream, so that copies of one overlap with sums of another."""
    if device == "cpu":
        return nullcontext()
    return torch.cuda.stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]


def users_of(source: Source, targets: tuple[Weight, ...]) -> dict[str, set[str]]:
    """Shard -> the shards that cannot be written without it: an FP8 weight may need two."""
    users = {shard: {shard} for shard in source.shards}
    for target in targets:
        if target.scales:
            users[target.shard].add(target.scales.shard)
            users[target.scales.shard].add(target.shard)
    return users


def fetched(source: Source, shards: Sequence[str]) -> Iterator[str]:
    """The shards in order, each on disk; the next one is fetched while one is used."""
    with ThreadPool(1) as pool:
        ahead = [pool.submit(source.fetch, [shard]) for shard in shards[:1]]
        for place, shard in enumerate(shards):
            current = ahead.pop()
            if place + 1 < len(shards):
                ahead.append(pool.submit(source.fetch, [shards[place + 1]]))
            current.result()
            yield shard


def copy_file(source: Path, target: Path) -> tuple[str, int]:
    """Copy a small file and flush it to disk; its sha256 and size."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        reading = source.open("rb")
    except OSError as error:
        raise CheckpointError(f"{source.name} cannot be read", found=error.strerror) from error
    with reading, target.open("xb") as writing:
        shutil.copyfileobj(reading, writing)
    return file_entry(target)


def file_entry(path: Path) -> tuple[str, int]:
    """Flush a file to disk; its sha256 and size."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return digest, file.tell()
