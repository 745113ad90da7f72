"""Write an edited checkpoint: output shard i depends only on source shard i; other files are
copies.
"""

from collections.abc import Container, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, wait
from threading import BoundedSemaphore, Event, Lock
from typing import Any

from msgspec.structs import replace

from converter.checkpoints.names import INDEX
from converter.checkpoints.safetensors.rewrite import ShardRecord
from converter.checkpoints.source import Source
from converter.checkpoints.weights import Weight
from converter.edits.apply import WeightEdit
from converter.edits.edit_file import stored_names
from converter.edits.engine import quiet_blas
from converter.errors import CheckpointError, SourceError
from converter.manifest import EditedTensor, FileRecord
from converter.outputs.base import WriteJob, Written, copy_file, make_file
from converter.outputs.checkpoint.additions import Shards, index_of, patched_text, write_extra
from converter.outputs.checkpoint.shard_job import (
    ShardJob,
    ShardResult,
    edit_packed,
    edit_shards,
    packed,
)
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
        OptionError: the engine's memory is too little, or other processes cannot do the job.
        SourceError: a GPU is out of memory, or a process that edits shards was lost.
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
    """Write all shards of the source, and return their records and those of the edited tensors."""
    source, receiver = job.source, job.receiver
    users = users_of(source, weights)
    before = receiver.before(users) if receiver else {}
    most = at_a_time(source)
    if receiver and receiver.at_a_time:
        most = min(most, receiver.at_a_time)
    workers = job.engine.workers_for(most, weights, job.edit.rank)
    with progress.bar("edit", job.plan.nbytes, "B") as bar:
        done = Rewriting(job, users, bar).run(workers, before)
    return (
        {shard: done[shard].record for shard in source.shards},
        [edit for each in done.values() for edit in each.edits],
    )


def _small_files(
    job: WriteJob, shards: Shards
) -> tuple[dict[str, FileRecord], dict[str, FileRecord]]:
    """Copy or make all files except the shards, and return the records of both."""
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


_LOOK = 0.5
"""Seconds after which it is asked whether an executor's job is still wanted."""


class _Stopped(Exception):  # noqa: N818 - it is not an error
    """Raised in a worker when another one has failed."""


class Rewriting:
    """The shards being rewritten, some at a time; see ``write_checkpoint``."""

    def __init__(self, job: WriteJob, users: Mapping[str, set[str]], bar: Any) -> None:
        self.job, self.source, self.bar = job, job.source, bar
        self.users, self.waiting = users, {shard: set(users[shard]) for shard in users}
        self.done: dict[str, Done] = {}
        self.lock, self.stop = Lock(), Event()

    def run(self, workers: int, before: Mapping[str, Done]) -> dict[str, Done]:
        """Rewrite the shards that were not finished ``before``; what was done in all.

        If one fails, the others stop soon and its error is raised.
        """
        free, futures = BoundedSemaphore(workers), list[Future[None]]()
        for shard, done in before.items():
            self.bar.update(done.record.nbytes)
            self._keep(shard, done)
        with quiet_blas(workers) as threads, ThreadPool(workers, "edit") as pool:
            jobs = jobs_of(self.job, self.users, before, threads)
            last = {job.source.shards[-1]: job for job in jobs}
            try:
                for shard in fetched(self.source, [s for job in jobs for s in job.source.shards]):
                    if shard not in last:
                        continue
                    free.acquire()
                    if self.stop.is_set():
                        break
                    self.bar.set_postfix_str(shard)
                    futures.append(pool.submit(self._work, last[shard]))
                    futures[-1].add_done_callback(lambda done: free.release())
                wait(futures)
            except BaseException:  # Ctrl-C too, which must not leave threads that write
                self.stop.set()
                raise
        errors = [error for future in futures if (error := future.exception())]
        for error in sorted(errors, key=lambda error: isinstance(error, _Stopped)):
            raise error
        return self.done

    def _work(self, job: ShardJob) -> None:
        """Do a job in this thread, or wait until the executor has done it."""
        try:
            if self.job.executor is None:
                edit_shards(job, self._advance, self._finished)
            else:
                result = self._sent(job, self.job.executor)
                for text in result.warnings:
                    progress.warn(text)
                for shard, done in result.done.items():
                    self._finished(shard, done)
                    with self.lock:
                        self.bar.update(done.record.nbytes)
        except BaseException:
            self.stop.set()
            raise

    def _sent(self, job: ShardJob, executor: Executor) -> ShardResult:
        """What an executor makes of a job. One that has begun is waited for: it writes."""
        try:
            future = executor.submit(edit_packed, packed(job))
            while not wait([future], _LOOK).done:
                if self.stop.is_set() and future.cancel():
                    raise _Stopped
            return future.result()
        except BrokenExecutor as error:
            raise SourceError(
                "a process that edits shards was lost",
                hint="its memory may have run out; run again with fewer workers, and it goes on "
                "from the shards that are finished",
            ) from error

    def _finished(self, shard: str, done: Done) -> None:
        if self.job.receiver:
            self.job.receiver.finished(shard, done)
        self._keep(shard, done)

    def _keep(self, shard: str, done: Done) -> None:
        self.done[shard] = done
        self.release_shard(shard)

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


def users_of(source: Source, weights: tuple[Weight, ...]) -> dict[str, set[str]]:
    """Shard -> the shards that one job has to write, itself among them.

    An FP8 weight and its scales may be in two; computed apart they might not fit each other.
    """
    users = {shard: {shard} for shard in source.shards}
    for weight in weights:
        if weight.scales:
            both = users[weight.shard] | users[weight.scales.shard]
            users.update(dict.fromkeys(both, both))
    return users


def jobs_of(
    job: WriteJob, users: Mapping[str, set[str]], before: Container[str], threads: int
) -> list[ShardJob]:
    """The jobs of a writing, in order of their first shards, without those finished ``before``."""
    weights = job.weights
    names = stored_names(job.edit, {weight.info.name: weight.layer for weight in weights})
    edits: dict[str, list[WeightEdit]] = {shard: [] for shard in job.source.shards}
    for weight in weights:
        name = weight.info.name
        edit = WeightEdit(weight, job.edit.tensors[name], names[name], job.engine)
        edits[weight.shard].append(edit)
    groups = dict.fromkeys(tuple(sorted(users[shard])) for shard in job.source.shards)
    return [
        ShardJob(
            job.source.part(group),
            tuple(edit for shard in group for edit in edits[shard]),
            job.folder,
            job.engine.device,
            threads,
        )
        for group in groups
        if group[0] not in before
    ]


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
