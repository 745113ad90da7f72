"""How a destination becomes real: held by one run, filled beside its place, moved there at once.

While a run works there is a folder ``.NAME.part`` beside the destination NAME, with ``lock``, the
new folder ``new`` and the journal of what is finished. If the process is killed it stays, and the
next run into the same destination goes on from it. What matters is flushed to disk before the step
that makes it count.
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

_LAST = (INDEX, *TRUTH, MANIFEST, SUMS)
"""Moved in last and out first, where files are moved one by one: without them it is neither."""

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


class Claim:
    """A destination that this process holds; made by ``claimed``.

    Attributes:
        destination: as it was given.
        target: the same, resolved.
        mounted: whether it is a mount point, which is filled and not replaced.
        holder: the folder ``.NAME.part``.
        torn: whether the last step has failed and could not be undone.
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

        That is one step for everybody who looks. Only a mount point, which cannot be renamed, is
        filled file by file. If the block does not succeed the destination is as it was.

        Raises:
            DestinationError: the operating system refuses to write, or there is something in the
                destination by then and ``overwrite`` does not allow to replace it.
        """
        with self._told():
            self.part.mkdir(exist_ok=True)
            yield self.part
            for folder, _, _ in os.walk(self.part, topdown=False):
                sync(Path(folder))  # what it lists; the files were flushed when written
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
        """Raise DestinationError if there is something in the destination."""
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
        """What is in the destination besides what is ours."""
        return files_not_ours(self.target) if self.target.is_dir() else []

    def _replace(self) -> None:
        if not self._content() or not _exchanged(self.part, self.target):
            if self._content():
                self.target.rename(self.holder / "old")
            self.part.rename(self.target)
        sync(self.target.parent)

    def _fill(self) -> None:
        """Move what is there aside, and the new files to its place; ``recover`` undoes both."""
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
        """Put things where they were if a run was killed in its last step."""
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
        """Delete all that is not the destination. What is renamed first is nobody's any more.

        If that fails it changes nothing about the destination, so it is a warning.
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
    """Hold a destination against other runs, and take over what a killed one has left.

    If the block fails after shards were finished, they are kept for the next run, unless what
    failed is what they hold.

    Raises:
        DestinationError: another run holds it, or it cannot be written, which
            ``check_destination`` says before; or it may not be overwritten and is not empty.
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
    """How many shards a journal names, a line each after its first; 0 without one."""
    try:
        return max(path.read_bytes().count(b"\n") - 1, 0)
    except OSError:
        return 0


def _move(paths: Iterable[Path], folder: Path, *, away: bool = False) -> None:
    """Move files to a folder, ``_LAST`` last, or first if it is ``away`` from a destination."""
    for path in sorted(paths, key=lambda path: ((path.name in _LAST) != away, path.name)):
        path.rename(folder / path.name)


def _exchanged(one: Path, other: Path) -> bool:
    """Let two folders swap names in one step; False where the operating system cannot."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    names = os.fsencode(one), os.fsencode(other)
    return bool(call(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0)


def _locked(folder: Path, destination: Path) -> int:
    """Make a folder, unless it is there, and hold the lock in it: whoever has it may rename it.

    Not by ``filelock``: it opens the file by its path and does not see that the folder was renamed,
    has no lock to give where the file system has none, and says nothing of who holds it.

    Returns:
        a descriptor; the operating system lets go of the lock when it is closed or this process
        ends, however it ends.

    Raises:
        DestinationError: another process has it, and which.
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
            continue  # who held it has renamed it between two looks
        try:
            names = {entry.name for entry in folder.iterdir()}  # who makes it begins with the lock
            if names and path.name not in names:
                raise OSError(errno.EEXIST, f"{folder.name} is there and is not of gloss-convert")
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:  # who held it has just renamed the folder
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
    """Lock an open file, and write into it who did."""
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
            raise  # those say that the file system has none
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
