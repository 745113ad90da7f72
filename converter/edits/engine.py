"""How a checkpoint is rewritten: workers, memory, device and rounding."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod

import torch

from converter.checkpoints.safetensors.direct_writer import BUFFER, BUFFERS
from converter.checkpoints.weights import Weight
from converter.edits.editor import BLOCK, STRIP, Rounding
from converter.errors import OptionError

_MOST_WORKERS = 4
"""The most shards at a time by default: disks gain little from more streams."""


@dataclass(frozen=True, slots=True)
class Engine:
    """Settings of a rewrite. Only ``device`` and ``rounding`` affect the bytes.

    Attributes:
        workers: shards at a time; 0 chooses.
        memory_limit: bytes that buffers and matrices may take, or None.
        device: where edits are computed.
        rounding: ``null-space`` or ``nearest``; see ``edits.editor``.
    """

    workers: int = 0
    memory_limit: int | None = None
    device: str = "cpu"
    rounding: Rounding = "null-space"

    def workers_for(self, shards: int, targets: Iterable[Weight], rank: int) -> int:
        """Shards to rewrite at a time.

        Raises:
            OptionError: not even one fits in ``memory_limit``.
        """
        wanted = self.workers or min(_processors(), _MOST_WORKERS)
        if self.memory_limit is not None:
            each = _worker_memory(targets, rank)
            if each > self.memory_limit:
                raise OptionError(
                    "--memory-limit is too small for the edit",
                    expected=f"at least {each / 1e6:.0f} MB",
                    found=f"{self.memory_limit / 1e6:.0f} MB",
                )
            wanted = min(wanted, self.memory_limit // each)
        return max(min(wanted, shards), 1)

    def expected_memory(self, shards: int, targets: Iterable[Weight], rank: int) -> int:
        """Expected peak bytes of the edit, besides Python itself. Raises as ``workers_for``."""
        chosen = list(targets)
        return self.workers_for(shards, chosen, rank) * _worker_memory(chosen, rank)


def _processors() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _worker_memory(targets: Iterable[Weight], rank: int) -> int:
    """Expected peak bytes of rewriting one shard: its buffers, and the largest edit.

    A matrix (D, F) needs five (R, F) in float64 (P, L and intermediate results), and a block of its
    rows as read and as written. A strip of it needs up to 64 bytes an element, including memory
    kept by the allocator and the threads. A matrix in FP8, or one whose hidden size is its last
    axis, is held whole, or in blocks of that size.
    """
    edits = [0]
    for target in targets:
        shape, axis = target.info.shape, target.axis
        width = prod(shape[axis + 1 :])
        rows = 2 * BLOCK * width * target.info.nbytes // max(prod(shape), 1)
        whole = 24 * prod(shape) if target.scales else 0
        edits.append(5 * 8 * rank * width + rows + whole)
    return BUFFER * BUFFERS + 64 * STRIP + max(edits)


@contextmanager
def quiet_blas(workers: int) -> Iterator[int]:
    """Within this context, each of ``workers`` threads may use its share of the processors.

    Every worker has a second thread that hashes and writes. Without the limit, each would start as
    many BLAS threads as there are processors, which wait for each other. Yields the number of
    threads that a worker must set for itself, since PyTorch's setting is per thread.
    """
    before = torch.get_num_threads()
    share = max(_processors() // (2 * workers), 1)
    torch.set_num_threads(share)
    try:
        yield share
    finally:
        torch.set_num_threads(before)
