"""An edited checkpoint: output shard i is a function of source shard i, the rest are copies."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import nullcontext
from threading import BoundedSemaphore, Event, Lock
from typing import Any

import torch
from msgspec.structs import replace

from converter.checkpoints.names import INDEX
from converter.checkpoints.safetensors.rewrite import ShardRecord, rewrite
from converter.checkpoints.source import Source
from converter.checkpoints.weights import Weight
from converter.edits.apply import Changes, changes_of
from converter.edits.engine import quiet_blas
from converter.errors import CheckpointError
from converter.manifest import EditedTensor, FileRecord
from converter.outputs.base import WriteJob, Written, copy_file, make_file
from converter.outputs.checkpoint.additions import Shards, index_of, patched_text, write_extra
from converter.outputs.journal import Done
from converter.runtime import progress
from converter.runtime.progress import ThreadPool


def at_a_time(source: Source) -> int:
    """Shards that may be worked on at a time."""
    return 1 if source.serial else len(source.shards)


def write_checkpoint(job: WriteJob) -> Written:
    """Rewrite the shards, some at a time, then the small files, index and config last.

    Raises:
        CheckpointError: a shard is malformed, or a weight was left unchanged.
        OptionError: the engine's memory is too little.
        OSError: the folder cannot be written.
    """
    source, weights = job.source, job.weights
    records, edits = _rewrite_shards(job, weights)
    if len(edits) != len(weights):
        raise CheckpointError(
            "not every tensor of the edit was edited",
            expected=f"{len(weights)} tensors",
            found=f"{len(edits)}",
        )
    shards = Shards.of(source.shards, bool(job.edit.created))
    extra, created = write_extra(job.folder, shards, job.edit)
    copies, made = _small_files(job, shards)
    edits = [replace(edit, shard=shards.output(edit.shard)) for edit in edits]
    edits.sort(key=lambda edit: (edit.layer, edit.name))
    return Written(records, copies, made, tuple(edits), shards.renamed, extra, created)


def _rewrite_shards(
    job: WriteJob, weights: tuple[Weight, ...]
) -> tuple[dict[str, ShardRecord], list[EditedTensor]]:
    """Write all shards of the source; their records, and those of the edited tensors."""
    source, receiver = job.source, job.receiver
    users = users_of(source, weights)
    before = receiver.before(users) if receiver else {}
    changes = changes_of(source, job.edit, weights, job.engine)
    most = at_a_time(source)
    if receiver and receiver.at_a_time:
        most = min(most, receiver.at_a_time)
    workers = job.engine.workers_for(most, weights, job.edit.rank)
    with progress.bar("edit", job.plan.nbytes, "B") as bar:
        rewriting = Rewriting(job, changes, users, bar)
        records = rewriting.run(workers, {shard: done.record for shard, done in before.items()})
    edits = [edit for done in before.values() for edit in done.edits]
    return records, edits + [edit for found in changes.values() for edit in found.edits]


def _small_files(
    job: WriteJob, shards: Shards
) -> tuple[dict[str, FileRecord], dict[str, FileRecord]]:
    """Copy or make all files but the shards; what was copied, and what was made."""
    source, folder, edit = job.source, job.folder, job.edit
    copies: dict[str, FileRecord] = {}
    made = {name: make_file(folder / name, content) for name, content in edit.files.items()}
    for name, path in source.small.items():
        if name not in edit.patches and name != "config.json":
            source.fetch([name] if name in source.extras else [])
            copies[name] = copy_file(path, folder / name)
            if name in source.extras and not job.keep_source:
                source.drop(name)
    created = {name: tensor.nbytes for name, tensor in edit.created.items()}
    index = index_of(source, job.plan, shards, created)
    if index is not None:
        made[INDEX] = make_file(folder / INDEX, index.encode())
    elif source.weight_map is not None:
        copies[INDEX] = copy_file(source.folder / INDEX, folder / INDEX)
    for name in sorted(edit.patches, key=lambda name: name == "config.json"):
        text = patched_text(name, edit.patches[name], source)
        made[name] = make_file(folder / name, text.encode())
    if "config.json" not in edit.patches:  # last: without it the folder is no checkpoint
        copies["config.json"] = copy_file(source.folder / "config.json", folder / "config.json")
    return copies, made


class _Stopped(Exception):  # noqa: N818 - it is not an error
    """Raised in a worker when another one has failed."""


class Rewriting:
    """The shards being rewritten, some at a time; see ``write_checkpoint``."""

    def __init__(
        self, job: WriteJob, changes: Mapping[str, Changes], users: Mapping[str, set[str]], bar: Any
    ) -> None:
        self.job, self.source, self.changes, self.bar = job, job.source, changes, bar
        self.users, self.waiting = users, {shard: set(users[shard]) for shard in users}
        self.lock, self.stop = Lock(), Event()

    def run(self, workers: int, before: Mapping[str, ShardRecord]) -> dict[str, ShardRecord]:
        """Rewrite the shards that were not ``before``; the records of all, in order.

        If one fails, the others stop soon and its error is raised.
        """
        free = BoundedSemaphore(workers)
        futures: dict[str, Future[ShardRecord]] = {}
        for shard, record in before.items():
            self.bar.update(record.nbytes)
            self.release_shard(shard)
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
        changes, receiver = self.changes[shard], self.job.receiver
        try:
            with _stream(self.job.engine.device), self.source.open(shard) as file:
                target = self.job.folder / shard
                record = rewrite(file, target, changes.tensors, self._advance)
            if receiver:
                receiver.finished(shard, Done(record, tuple(changes.edits)))
            self.release_shard(shard)
        except BaseException:
            self.stop.set()
            raise
        return record

    def _advance(self, count: int) -> None:
        if self.stop.is_set():
            raise _Stopped
        with self.lock:
            self.bar.update(count)

    def release_shard(self, shard: str) -> None:
        """Delete the shards that only this one still needed, unless the source is to be kept."""
        with self.lock:
            for name in sorted(self.users[shard]):
                self.waiting[name].discard(shard)
                if not self.waiting[name] and not self.job.keep_source:
                    self.source.drop(name)


def _stream(device: str) -> Any:
    """On a GPU every worker has a stream, so that copies of one overlap with sums of another."""
    if device == "cpu":
        return nullcontext()
    return torch.cuda.stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]


def users_of(source: Source, weights: tuple[Weight, ...]) -> dict[str, set[str]]:
    """Shard -> the shards that cannot be written without it: an FP8 weight may need two."""
    users = {shard: {shard} for shard in source.shards}
    for weight in weights:
        if weight.scales:
            users[weight.shard].add(weight.scales.shard)
            users[weight.scales.shard].add(weight.shard)
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
