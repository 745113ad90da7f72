"""Write one file in order, in large aligned blocks; a second thread hashes and writes.

If the operating system allows it, the page cache is bypassed (O_DIRECT): a checkpoint is often
larger than memory and not read again soon, so caching it costs a copy and evicts other data. If the
file system can, the file starts as a clone that shares the blocks of its source (a reflink), and
only differences are written.

O_DIRECT pays: on ext4 and two cores an edit of 1.5 GB takes 1.2 times as long (1.1 to 1.3, five
rounds) if ``copy_file_range`` writes unchanged data, and 1.4 to 1.8 times with plain writes and
continuous flushing.
"""

import ctypes
import errno
import fcntl
import hashlib
import mmap
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Thread

BUFFER = 2 << 20
"""Bytes written at a time: enough to make the cost of a call negligible."""

BUFFERS = 3
"""Number of blocks: one is filled, one is written, one waits."""

_ALIGNMENT = 4096
"""Alignment of offsets, lengths and memory of direct writes; disks require this or less."""

_FICLONE = 0x40049409
"""Request of Linux to share all blocks of another file; see ioctl_ficlone(2)."""

PREFIX_DIGITS = 16
"""Number of hex digits kept of a running digest: enough to find a damaged tensor; the full digest
proves the damage.
"""


@dataclass(slots=True)
class _Block:
    """Consecutive bytes of the file, from ``start`` on; ``size`` of them are filled.

    ``first`` and ``last`` enclose, within the block, the bytes that are not the source's.
    """

    memory: mmap.mmap
    start: int = 0
    size: int = 0
    first: int = 0
    last: int = 0


class Writer:
    """Writes a new file of known size; the caller asks for ``space`` and reports ``filled``.

    Args:
        path: must not exist.
        size: bytes of the file.
        ends: (offset, name) of the end of each part, in order.
        source: descriptor of a file of the same size to start from as a clone, or None.

    Attributes:
        digest: sha256 of the file; None if ``fork`` was never called.
        prefixes: name -> digest from the first byte to the end of that part, first digits, for the
            parts that end after the fork.

    Raises:
        OSError: the file exists, or cannot be written; the methods raise that, too.
    """

    def __init__(
        self,
        path: Path,
        size: int,
        ends: Sequence[tuple[int, str]],
        source: int | None,
    ) -> None:
        self.size, self.prefixes = size, dict[str, str]()
        self.digest: hashlib._Hash | None = None
        self._ends, self._next_end = ends, 0
        self._forked_at = size
        self._error: BaseException | None = None
        self._position = 0
        self._block: _Block | None = None
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self._direct: int | None = None
        self._cloned = source is not None and _clone(source, self._file)
        try:
            if not self._cloned:
                _allocate(self._file, size)
        except OSError:
            os.close(self._file)
            raise
        if size > BUFFER:
            self._direct = _open_direct(path)
        self._free: SimpleQueue[_Block] = SimpleQueue()
        self._full: SimpleQueue[_Block | None] = SimpleQueue()
        for _ in range(min(BUFFERS, size // BUFFER + 1)):
            memory = mmap.mmap(-1, BUFFER, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self._free.put(_Block(memory))
        self._thread = Thread(target=self._run, name=f"write {path.name}")
        self._thread.start()

    def space(self) -> memoryview:
        """A buffer for the next bytes."""
        if self._block is None:
            self._block = self._free.get()
            if self._error is not None:
                raise self._error
            self._block.start, self._block.size = self._position, 0
            self._block.first = self._block.last = 0
        room = min(BUFFER, self.size - self._block.start)
        return memoryview(self._block.memory)[self._block.size : room]

    def filled(self, count: int, changed: bool = False) -> None:
        """Report that ``count`` bytes of ``space`` are filled; ``changed``: they differ from the
        source.
        """
        block = self._block
        assert block is not None
        if changed:
            block.first = block.first if block.last else block.size
            block.last = block.size + count
        block.size += count
        self._position += count
        if block.size == BUFFER or self._position == self.size:
            self._full.put(block)
            self._block = None

    def put(self, data: memoryview) -> None:
        """Append changed bytes."""
        while data:
            space = self.space()
            count = min(len(space), len(data))
            space[:count] = data[:count]
            self.filled(count, changed=True)
            data = data[count:]

    def fork(self, digest: "hashlib._Hash") -> None:
        """From here on the file has its own digest, which continues ``digest``."""
        self.digest, self._forked_at = digest.copy(), self._position

    def close(self) -> None:
        """Return when everything is on disk."""
        self._full.put(None)
        self._thread.join()
        try:
            if self._error is not None:
                raise self._error
            os.fsync(self._file)
        finally:
            self._release()

    def abandon(self) -> None:
        """Stop without finishing the file."""
        self._error = self._error or OSError(errno.ECANCELED, os.strerror(errno.ECANCELED))
        self._full.put(None)
        self._thread.join()
        self._release()

    def _release(self) -> None:
        for descriptor in (self._file, self._direct):
            if descriptor is not None:
                os.close(descriptor)

    def _run(self) -> None:
        with ThreadPoolExecutor(1, "hash") as pool:
            while (block := self._full.get()) is not None:
                try:
                    if self._error is None:
                        with memoryview(block.memory)[: block.size] as view:
                            hashed = pool.submit(self._hash, view, block.start)
                            try:
                                self._write(view, block)  # waits for the disk meanwhile
                            finally:
                                hashed.result()
                except BaseException as error:  # raised again where the file is filled
                    self._error = error
                self._free.put(block)

    def _hash(self, view: memoryview, start: int) -> None:
        place, stop = max(self._forked_at - start, 0), len(view)
        while self._next_end < len(self._ends) and self._ends[self._next_end][0] <= start + stop:
            offset, name = self._ends[self._next_end]
            self._next_end += 1
            if self.digest is not None and offset > self._forked_at:
                self.digest.update(view[place : offset - start])
                self.prefixes[name] = self.digest.hexdigest()[:PREFIX_DIGITS]
                place = offset - start
        if self.digest is not None and place < stop:
            self.digest.update(view[place:])

    def _write(self, view: memoryview, block: _Block) -> None:
        """Write the differences from the clone, or everything; directly if aligned."""
        first, last = (block.first, block.last) if self._cloned else (0, len(view))
        first -= first % _ALIGNMENT
        last = min(last + -last % _ALIGNMENT, len(view))
        whole = last - last % _ALIGNMENT
        if self._direct is not None and whole > first:
            try:
                _write_at(self._direct, view[first:whole], block.start + first)
                first = whole
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                os.close(self._direct)  # this file system only pretends
                self._direct = None
        _write_at(self._file, view[first:last], block.start + first)


def _write_at(file: int, view: memoryview, offset: int) -> None:
    while view:
        count = os.pwrite(file, view, offset)
        if not count:  # some network file systems return 0 instead of an error
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        view, offset = view[count:], offset + count


def _clone(source: int, target: int) -> bool:
    """Make ``target`` share the blocks of ``source``; False if the file system cannot."""
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError:
        return False
    return True


def _allocate(file: int, size: int) -> None:
    """Reserve the blocks of a file, so that they are contiguous and a full disk is noticed at once.

    ``os.posix_fallocate`` would write zeros if the file system cannot reserve.
    """
    fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    if fallocate is None or not size:
        return
    fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    if fallocate(file, 0, 0, size) and ctypes.get_errno() == errno.ENOSPC:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _open_direct(path: Path) -> int | None:
    """A second descriptor that bypasses the page cache, or None."""
    flag = getattr(os, "O_DIRECT", 0)
    try:
        return os.open(path, os.O_WRONLY | flag) if flag else None
    except OSError:
        return None
