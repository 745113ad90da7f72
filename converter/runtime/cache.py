"""The user's cache folder, kept between runs: activations, file digests, the demo model.

Everything in it can be deleted at any time, and is made again. Without a writable home folder, as
in batch jobs and containers, the cache is in the folder for temporary files.
"""

import hashlib
import importlib
import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from contextvars import ContextVar
from glob import escape
from pathlib import Path

from safetensors import SafetensorError

from converter.errors import DestinationError, OptionError
from converter.option import at_home
from converter.runtime import progress
from converter.runtime.files import reason
from converter.text import one_line

STALE = 24 * 3600
"""Seconds after which half-written files are considered abandoned."""

SETTLED = 2.0
"""Seconds since a file's last change before its times are trusted. This is longer than a tick of
any filesystem's clock, within which a change could leave the time unchanged.
"""


_PIECE, _LARGE = 1 << 20, 1 << 26
"""Bytes that are hashed at a time, and of a file whose hashing is shown."""

_OWN = "GLOSS_CACHE_DIR"

_FOLDERS = (
    "HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_ASSETS_CACHE", "HF_XET_CACHE",
    "HF_MODULES_CACHE", "HF_TOKEN_PATH", "MPLCONFIGDIR", "TORCH_HOME",
)  # fmt: skip
"""Variables in which libraries look for folders, even if they are empty."""


def default_cache() -> Path:
    """``$GLOSS_CACHE_DIR``, else ``gloss-convert`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    return Path(os.environ.get(_OWN) or _caches() / "gloss-convert")


def _caches() -> Path:
    """The folder of all caches; it is relative if there is no home folder.

    A relative ``XDG_CACHE_HOME`` counts as none, as its specification says.
    """
    said = os.path.expanduser(os.environ.get("XDG_CACHE_HOME", ""))  # noqa: PTH111 - never raises
    return Path(said if os.path.isabs(said) else os.path.expanduser("~/.cache"))  # noqa: PTH111, PTH117


def find_folders(cache_dir: Path | None = None) -> None:
    """Set the folders of this process, and of libraries that are imported later.

    Call it before libraries are imported. Nothing changes if the home folder can be written.

    Args:
        cache_dir: the chosen cache folder, if any.

    Raises:
        OptionError: a variable names a folder in a missing home folder; or the Hub's client does
            not understand one of its variables.
        DestinationError: there is no folder for temporary files, or no current folder.
    """
    _settle_variables(cache_dir)
    try:
        Path.cwd()
        importlib.import_module("huggingface_hub.constants")
    except ValueError as error:  # a variable must be a number
        raise OptionError(
            "an environment variable HF_... cannot be read", found=str(error), hint="unset it"
        ) from error
    except OSError as error:
        raise DestinationError(
            "the current folder is gone", found=reason(error), hint="change to another one"
        ) from error


def _settle_variables(cache_dir: Path | None) -> None:
    """Set the variables that libraries read. Arguments and errors: see ``find_folders``."""
    for name in (*_FOLDERS, "XDG_CACHE_HOME"):
        value = os.environ.get(name)
        if not value:
            os.environ.pop(name, None)
        elif not os.path.isabs(path := os.path.expanduser(value)):  # noqa: PTH111, PTH117
            if path.startswith("~"):
                at_home(value, f"the environment variable {name}")  # raises
            if name == "XDG_CACHE_HOME":
                del os.environ[name]
    caches = _caches()
    if caches.is_absolute() and _can_write(caches / "gloss-convert"):
        return
    theirs = caches / "huggingface"
    if caches.is_absolute() and theirs.is_dir():
        os.environ.setdefault("HF_HOME", str(theirs))  # existing files can be read
    folder = _private_folder()
    os.environ["XDG_CACHE_HOME"] = str(folder)
    os.environ.setdefault("MPLCONFIGDIR", str(folder / "matplotlib"))
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder / "torchinductor"))
    chosen = {
        "--cache-dir": cache_dir or os.environ.get(_OWN),
        "HF_HOME": os.environ.get("HF_HOME"),
    }
    if lacking := [name for name, value in chosen.items() if not value]:
        progress.warn(
            f"there is no home folder that can be written, so what is kept between runs is in "
            f"{folder}; set another place with {' and '.join(lacking)}"
        )


def _can_write(folder: Path) -> bool:
    """Whether a folder can be written to, or made."""
    for place in (folder, *folder.parents):
        if os.path.lexists(place):
            return place.is_dir() and os.access(place, os.W_OK | os.X_OK)
    return False


def _private_folder() -> Path:
    """A private folder for temporary files, the same for each run if possible.

    Raises DestinationError.
    """
    try:
        folder = Path(tempfile.gettempdir()) / f"gloss-convert-{os.getuid()}"
        with suppress(FileExistsError):
            folder.mkdir(0o700)
        found = folder.lstat()  # another user's link may lead anywhere
        mine = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
        if mine and not found.st_mode & 0o077:
            return folder
        return Path(tempfile.mkdtemp(prefix="gloss-convert-"))
    except OSError as error:
        raise _no_temporary_folder(error) from error


def _no_temporary_folder(error: OSError) -> DestinationError:
    """The error about temporary files that cannot be made."""
    return DestinationError(
        "there is no folder for temporary files", found=reason(error),
        hint="set TMPDIR to a folder that can be written, on a disk with room",
    )  # fmt: skip


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder that is deleted after the block. Raises DestinationError if none can be made."""
    try:
        made = tempfile.TemporaryDirectory()
    except OSError as error:
        raise _no_temporary_folder(error) from error
    with made as name:
        yield Path(name)


_chosen: ContextVar[Path | None] = ContextVar("cache folder", default=None)


def cache_folder() -> Path:
    """The folder of ``using_cache``, or the default one.

    Raises:
        OptionError: it is in a missing home folder.
    """
    return Path(at_home(_chosen.get() or default_cache(), "--cache-dir"))


def outgoing(address: str) -> Path:
    """The folder for a result that is uploaded to an address. Raises as ``cache_folder``."""
    return cache_folder() / "outgoing" / hashlib.sha256(address.encode()).hexdigest()[:16]


@contextmanager
def using_cache(folder: Path | None) -> Iterator[None]:
    """Within this context, use a folder, or the default one, as the cache."""
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
    """Flush a file, or all files of a folder, to disk."""
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
    """Delete half-written files of killed processes, by the beginning of the name, after a day."""
    for path in folder.glob(f"{escape(prefix)}*"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > STALE:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def cache_error(path: Path, error: Exception) -> DestinationError:
    """The error about a cache that cannot be written."""
    return DestinationError(
        f"the cache {path.parent} cannot be written",
        found=reason(error),
        hint="free space or give another --cache-dir",
    )


def sha256_of(path: Path) -> str:
    """The sha256 of a file, as hex digits."""
    return _digest_of(path, "sha256")


def _digest_of(path: Path, algorithm: str) -> str:
    """A digest of a file; a large one is shown as it is read."""
    nbytes, buffer = path.stat().st_size, memoryview(bytearray(_PIECE))
    digest = hashlib.new(algorithm)
    shown = progress.bar(f"hash {one_line(path.name)}", nbytes, "B") if nbytes > _LARGE else None
    with path.open("rb", buffering=0) as file, shown or nullcontext() as moved:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            if moved:
                moved.update(count)
    return digest.hexdigest()


def state_of(path: Path) -> list[int]:
    """Device, inode, bytes, and the times in ns of the last change of a file and of its inode."""
    stat = path.stat()
    return [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def remembered_digest(path: Path, algorithm: str = "sha256") -> str:
    """A file's digest, remembered for as long as its inode, size and times stay the same.

    The times include that of the last change of the inode, which a program cannot set. A wrong
    digest would still be caught: the writer of a checkpoint hashes the same bytes again.
    """
    state = state_of(path)
    key = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()
    memo = cache_folder() / "digests" / f"{key}.{algorithm}.json"
    try:
        known = json.loads(memo.read_text("utf-8"))
        if known["state"] == state:
            return str(known[algorithm])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no memo, or a damaged one: hash the file
    digest = _digest_of(path, algorithm)
    if time.time() - max(state[3:]) / 1e9 > SETTLED:
        with replacing(memo) as part:
            part.write_text(json.dumps({"state": state, algorithm: digest}), "utf-8")
    return digest
