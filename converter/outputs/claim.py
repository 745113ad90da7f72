"""Claim a destination: one run holds it, fills a folder beside it, and moves that into its place.

During a run there is a folder ``.NAME.part`` beside the destination NAME, with ``lock``, the new
folder ``new`` and the journal of finished shards. If the process is killed, the folder stays, and
the next run into the same destination continues from it. Files are flushed to disk before the step
that relies on them.
"""

import ctypes
import errno
import fcntl
import json
import os
import secrets
import shutil
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from converter.checkpoints.names import INDEX, MANIFEST, SUMS
from converter.errors import ConverterError, DestinationError, GateError, VerificationError
from converter.outputs.destination import TRUTH, files_not_ours, holder_of, sweep
from converter.runtime import progress
from converter.runtime.cache import sync

JOURNAL = "journal.jsonl"
"""See ``outputs.journal``."""

LAST = (INDEX, *TRUTH, MANIFEST, SUMS)
"""Moved in last and out first, if files move one by one: without them a folder is no output."""

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


class Claim:
    """A destination that this process holds; made by ``claimed``.

    Attributes:
        destination: as it was given.
        target: the same, resolved.
        mounted: whether it is a mount point, which is filled and not replaced.
        holder: the folder ``.NAME.part``.
        torn: whether the last step failed and could not be undone.
    """

    def __init__(self, destination: Path) -> None:
        self.destination, self.target = destination, destination.resolve()
        self.mounted = os.path.ismount(self.target)
        self.holder = holder_of(self.target)
        self.torn = False

    @property
    def part(self) -> Path:
        """The folder under construction."""
        return self.holder / "new"

    @property
    def journal(self) -> Path:
        return self.holder / JOURNAL

    @contextmanager
    def staged(self, overwrite: bool) -> Iterator[Path]:
        """The folder under construction, which takes the place of the destination in the end.

        The replacement is one atomic step, except for a mount point, which cannot be renamed and is
        filled file by file. If the block fails, the destination is unchanged.

        Raises:
            DestinationError: the operating system refuses to write, or the destination is not empty
                by then and ``overwrite`` is not set.
        """
        with self._told():
            self.part.mkdir(exist_ok=True)
            yield self.part
            for folder, _, _ in os.walk(self.part, topdown=False):
                sync(Path(folder))  # its entries; the files were flushed when written
            if not overwrite:
                self.check_empty("it was filled meanwhile; choose another folder")
            try:
                (self._fill if self.mounted else self._replace)()
            except BaseException:
                self.torn = True
                self.recover()
                self.torn = False
                raise

    def check_empty(self, hint: str) -> None:
        """Raise DestinationError if the destination is not empty."""
        if self._content():
            raise DestinationError(f"destination {self.destination} is not empty", hint=hint)

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DestinationError(
                f"destination {self.destination} cannot be written",
                found=error.strerror or str(error),
                hint="no half-written checkpoint is there; free space or choose another folder",
            ) from error

    def _content(self) -> list[Path]:
        """The destination's files, without those of a run."""
        return files_not_ours(self.target) if self.target.is_dir() else []

    def _replace(self) -> None:
        if not self._content() or not _exchanged(self.part, self.target):
            if self._content():
                self.target.rename(self.holder / "old")
            self.part.rename(self.target)
        sync(self.target.parent)

    def _fill(self) -> None:
        """Move the old files aside, and the new files to their place; ``recover`` undoes both."""
        old = self.holder / "old"
        old.mkdir()
        sync(self.holder)
        _move(self._content(), old, away=True)
        sync(old)
        (self.holder / "filling").touch()
        sync(self.holder)
        _move(self.part.iterdir(), self.target)
        sync(self.target)

    def recover(self) -> None:
        """Undo the last step of a killed run."""
        old, filling = self.holder / "old", self.holder / "filling"
        if self.mounted and filling.exists():
            _move(self._content(), self.part, away=True)
            sync(self.part)
            filling.unlink()
            sync(self.holder)
        if old.exists():
            if self.mounted:
                _move(old.iterdir(), self.target)
            elif not self._content():
                if self.target.exists():
                    self.target.rmdir()
                old.rename(self.target)
            sync(self.target.parent)
            shutil.rmtree(old, ignore_errors=True)

    def discard(self) -> None:
        """Delete the work folder. It is renamed first, so that no other run can pick it up half
        deleted.

        A failure is only a warning, since the destination is complete.
        """
        trash = self.holder.with_name(f"{self.holder.name}-{secrets.token_hex(4)}")
        try:
            with suppress(FileNotFoundError):
                self.holder.rename(trash)
            sweep(self.holder)
        except OSError as error:
            progress.warn(f"{self.holder.name} could not be deleted: {error.strerror}")


@contextmanager
def claimed(destination: Path, overwrite: bool) -> Iterator[Claim]:
    """Lock a destination against other runs, and take over the work of a killed one.

    If the block fails after shards were finished, they are kept for the next run, unless their
    verification failed.

    Raises:
        DestinationError: another run holds it; it cannot be written, which ``check_destination``
            usually reports earlier; or it is not empty and may not be overwritten.
    """
    claim = Claim(destination)
    made = [path for path in claim.target.parents if not path.exists()]
    lock, keep = None, False
    try:
        with claim._told():
            claim.holder.parent.mkdir(parents=True, exist_ok=True)
            for path in made:
                sync(path.parent)
            lock = _locked(claim.holder, destination)
            sweep(claim.holder)
            claim.recover()
        if not overwrite:
            claim.check_empty("choose another, or give --overwrite to delete it and write anew")
        yield claim
    except (VerificationError, GateError):
        raise
    except BaseException as error:
        if lock is not None and (count := finished_in(claim.journal)):
            keep = True
            kept = f"finished shards kept in {claim.holder.name} for the next run: {count}"
            if isinstance(error, ConverterError):
                error.hint = "; ".join(filter(None, [error.hint, kept]))
            else:
                progress.note(f"  {kept}")
        raise
    finally:
        if lock is not None:
            if not keep and not claim.torn:
                claim.discard()
            with suppress(OSError):
                os.close(lock)
        for path in made:
            with suppress(OSError):
                path.rmdir()


def finished_in(path: Path) -> int:
    """The number of shards in a journal, a line each after the first; 0 without a journal."""
    try:
        return max(path.read_bytes().count(b"\n") - 1, 0)
    except OSError:
        return 0


def _move(paths: Iterable[Path], folder: Path, *, away: bool = False) -> None:
    """Move files to a folder, those of ``LAST`` last, or first if ``away`` from a destination."""
    for path in sorted(paths, key=lambda path: ((path.name in LAST) != away, path.name)):
        path.rename(folder / path.name)


def _exchanged(one: Path, other: Path) -> bool:
    """Swap the names of two folders in one step; False if the operating system cannot."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    names = os.fsencode(one), os.fsencode(other)
    return bool(call(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0)


def _locked(folder: Path, destination: Path) -> int:
    """Make a folder, if it is missing, and hold the lock in it. Only the holder may rename the
    folder.

    ``filelock`` is not used: it opens the file by its path and does not notice that the folder was
    renamed, it fails on file systems without locks, and it does not name the holder.

    Returns:
        a descriptor; the operating system releases the lock when it is closed or this process ends
        in any way.

    Raises:
        DestinationError: another process has it; the message names the process.
        OSError: the folder cannot be written.
    """
    path = folder / "lock"
    while True:
        if folder.is_symlink():
            raise OSError(errno.ENOTDIR, f"{folder.name} is a link")
        try:
            folder.mkdir(exist_ok=True)
        except FileExistsError:
            if os.path.lexists(folder) and not folder.is_dir():
                raise
            continue  # the holder renamed it between the two calls
        try:
            names = {entry.name for entry in folder.iterdir()}  # a run creates the lock first
            if names and path.name not in names:
                raise OSError(
                    errno.EEXIST, f"{folder.name} exists and was not made by gloss-convert"
                )
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:  # the holder has just renamed the folder
            continue
        try:
            _lock(file, destination)
            if os.path.samestat(os.fstat(file), path.stat()):
                return file
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def _lock(file: int, destination: Path) -> None:
    """Lock an open file, and write this process's name into it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise DestinationError(
            f"destination {destination} is held by another run",
            found=_described(os.pread(file, 1000, 0)),
            hint="wait for it, or choose another folder",
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise  # errors of file systems without locks
        progress.warn(
            f"the file system of {destination} has no locks: see that only one run uses it"
        )
    me = {"pid": os.getpid(), "host": socket.gethostname(), "since": f"{datetime.now(UTC):%F %T}"}
    os.ftruncate(file, 0)
    os.write(file, json.dumps(me).encode())


def _described(who: bytes) -> str:
    try:
        known = json.loads(who)
        return f"process {known['pid']} on {known['host']} since {known['since']} UTC"
    except (ValueError, KeyError, TypeError):
        return "a process that has just begun"
