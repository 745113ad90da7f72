"""The unit of work of an edited checkpoint: some shards, and what becomes of the weights in them.

A job is data. Threads of this process do it as it is; ``packed`` makes it bytes, for a
``concurrent.futures.Executor`` of other processes or machines that see the same folders. Whoever
does it writes the shards and nothing else: lock, journal and staging stay with who gave it.
"""

import io
import pickle
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from converter.checkpoints.safetensors.header import to_bytes
from converter.checkpoints.safetensors.rewrite import rewrite
from converter.checkpoints.source import Source
from converter.edits.apply import WeightEdit, changes_of
from converter.errors import OptionError, SourceError
from converter.outputs.journal import Done
from converter.runtime import progress

LIMIT = 1_000_000
"""Bytes that a packed job may have beside the tensors of its edit. One of ten shards has a few
tens of thousands; what has more holds weights."""


@dataclass(frozen=True, slots=True)
class ShardJob:
    """All that the bytes of some shards depend on.

    Attributes:
        source: has these shards and no others, all of them on disk; see ``Source.part``.
        edits: of all weights in them.
        folder: where they are written to.
        device: where edits are computed.
        threads: that PyTorch may use.
    """

    source: Source
    edits: tuple[WeightEdit, ...]
    folder: Path
    device: str
    threads: int


@dataclass(frozen=True, slots=True)
class ShardResult:
    """What was done.

    Attributes:
        done: shard -> its record, and those of the edits in it.
        warnings: that were told where nobody reads them.
    """

    done: Mapping[str, Done]
    warnings: tuple[str, ...] = ()


def edit_shards(
    job: ShardJob,
    advance: Callable[[int], object] = lambda count: None,
    finished: Callable[[str, Done], object] = lambda shard, done: None,
    attempt: Path | None = None,
) -> ShardResult:
    """Write the shards of a job, one after the other.

    Args:
        advance: called with the number of bytes done since the last call.
        finished: called with each shard once it is on disk.
        attempt: a folder beside ``folder`` that is nobody else's, to write into first; the shards
            of a job that was begun before are replaced. By default they must not be there.

    Raises:
        CheckpointError: a shard is malformed or damaged, or an edited tensor overflows its dtype.
        SourceError: a GPU is out of memory.
        OSError: the folder cannot be written, or such a file is there.
    """
    torch.set_num_threads(job.threads)
    changes, found = changes_of(job.source, job.edits), dict[str, Done]()
    for shard in job.source.shards:
        try:
            with _stream(job.device), job.source.open(shard) as file:
                target = (attempt or job.folder) / shard
                record = rewrite(file, target, changes[shard].tensors, advance)
        except torch.OutOfMemoryError as error:
            raise SourceError(
                f"the GPU is out of memory with the edit of {shard}",
                hint="give --workers 1, or --device cpu",
            ) from error
        if attempt:
            target.replace(job.folder / shard)
        found[shard] = Done(record, tuple(changes[shard].edits))
        finished(shard, found[shard])
    return ShardResult(found)


def _stream(device: str) -> Any:
    """On a GPU every worker has a stream, so that copies of one overlap with sums of another."""
    if device == "cpu":
        return nullcontext()
    return torch.cuda.stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]


def packed(job: ShardJob) -> bytes:
    """A job for ``edit_packed``, by plain pickle.

    Raises:
        OptionError: it is too large, or made from files that only this process can read.
    """
    refuse_made(job.source)
    file = io.BytesIO()
    packer = _Packer(file)
    packer.dump(job)
    if (extra := len(file.getvalue()) - packer.nbytes) > LIMIT:
        raise OptionError(
            f"the job of {job.source.shards[0]} is too large for another process",
            expected=f"at most {LIMIT:,} bytes beside the tensors of the edit",
            found=f"{extra:,}",
            hint="edit it in threads",
        )
    return file.getvalue()


def refuse_made(source: Source) -> None:
    """Raise OptionError if other processes cannot read the shards of a source."""
    if source.virtual_shards is not None:
        raise OptionError(
            "the shards of this source cannot be edited in other processes",
            expected="a checkpoint of safetensors files",
            found=", ".join(sorted({path.suffix for path in source.originals})),
            hint="edit it in threads, or convert it to safetensors first",
        )


def edit_packed(data: bytes) -> ShardResult:
    """Do a job of ``packed`` in another process. Raises as ``edit_shards``.

    It may be killed anywhere and done again, even twice at a time.
    """
    job: ShardJob = pickle.loads(data)  # noqa: S301 - who sends it has started this process
    parts = parts_of(job.folder)
    parts.mkdir(exist_ok=True)
    with progress.recording() as told, TemporaryDirectory(dir=parts) as attempt:
        result = edit_shards(job, attempt=Path(attempt))
    return replace(result, warnings=tuple(told.warnings))


def parts_of(folder: Path) -> Path:
    """Where what jobs of other processes have begun is; it stays there if they are killed."""
    return folder.with_name(f"{folder.name}.parts")


class _Packer(pickle.Pickler):
    """Pickles of a tensor its own bytes; PyTorch would take all that it is a view of.

    Its axes stay in their order in memory: sums are made in that order, so that it decides the last
    digits of what is recorded.
    """

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.nbytes = 0

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return NotImplemented
        dense = value.detach().cpu().clone()
        flat = dense.as_strided((dense.numel(),), (1,))
        self.nbytes += dense.nbytes
        return _tensor, (bytes(to_bytes(flat)), dense.dtype, tuple(dense.shape), dense.stride())


def _tensor(
    data: bytes, dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...]
) -> Tensor:
    if not data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=dtype).as_strided(shape, stride)
