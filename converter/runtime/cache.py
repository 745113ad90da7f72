"""What is kept between runs, in the user's cache folder: activations, file digests, the demo model.

Everything in it can be deleted at any time; it is made again.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from glob import escape
from pathlib import Path

from safetensors import SafetensorError

from converter.errors import DestinationError
from converter.runtime.files import reason

STALE = 24 * 3600
"""Seconds after which something half-written is nobody's any more."""

SETTLED = 2.0
"""Seconds since a file's last change before its times are trusted: coarser than any clock of a
filesystem, so a change within one tick of the clock cannot hide behind an unchanged time."""


def default_cache() -> Path:
    """``$GLOSS_CACHE_DIR``, else ``gloss-convert`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    if own := os.environ.get("GLOSS_CACHE_DIR"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gloss-convert"


_chosen: ContextVar[Path | None] = ContextVar("cache folder", default=None)


def cache_folder() -> Path:
    """The folder of ``using_cache``, or the default one."""
    return _chosen.get() or default_cache()


@contextmanager
def using_cache(folder: Path | None) -> Iterator[None]:
    """Let a folder, or the default one, be the cache while this lasts."""
    token = _chosen.set(folder)
    try:
        yield
    finally:
        _chosen.reset(token)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A sibling to write into; it becomes ``path`` if the block succeeds, and is removed if not.

    Raises:
        DestinationError: the cache cannot be written.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        discard_stale(path.parent, f".{path.name}.")
        yield part
        flush(part)
        part.replace(path)
    except (OSError, SafetensorError) as error:
        raise cache_error(path, error) from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Let a file, or all files of a folder, be on disk before they count as being there."""
    for each in (path, *path.rglob("*")):
        sync(each)


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def discard_stale(folder: Path, prefix: str) -> None:
    """Delete what killed processes have left half-written, under names that begin so, a day ago."""
    for path in folder.glob(f"{escape(prefix)}*"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > STALE:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def cache_error(path: Path, error: Exception) -> DestinationError:
    """The one sentence about a cache that cannot be written."""
    return DestinationError(
        f"the cache {path.parent} cannot be written",
        found=reason(error),
        hint="free space or give another --cache-dir",
    )


def sha256_of(path: Path) -> str:
    """The sha256 of a file, as hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def state_of(path: Path) -> list[int]:
    """Device, inode, bytes, and the times in ns of the last change of a file and of its inode."""
    stat = path.stat()
    return [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def remembered_digest(path: Path, algorithm: str = "sha256") -> str:
    """A file's digest, remembered for as long as its inode, size and times stay the same.

    The times include that of the last change of the inode, which a program cannot set. A wrong
    answer would still be caught: who writes a checkpoint hashes the same bytes again while they are
    read.
    """
    state = state_of(path)
    key = hashlib.sha256(str(path.resolve()).encode()).hexdigest()
    memo = cache_folder() / "digests" / f"{key}.{algorithm}.json"
    try:
        known = json.loads(memo.read_text())
        if known["state"] == state:
            return str(known[algorithm])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no memo, or one that is damaged: the file itself is the truth
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, algorithm).hexdigest()
    if time.time() - max(state[3:]) / 1e9 > SETTLED:
        with replacing(memo) as part:
            part.write_text(json.dumps({"state": state, algorithm: digest}))
    return digest
