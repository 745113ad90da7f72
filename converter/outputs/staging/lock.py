"""A lock that the operating system lets go of when its process ends, however it ends.

Not by ``filelock``: it opens the file by its path and does not see that the folder was renamed, has
no lock to give where the file system has none, and says nothing of who holds it.
"""

import errno
import fcntl
import json
import os
import socket
from datetime import UTC, datetime
from pathlib import Path

from converter.errors import DestinationError
from converter.runtime import progress

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What file systems say that have none."""


def locked(folder: Path, destination: Path) -> int:
    """Make a folder, unless it is there, and hold the lock in it.

    If the file system has no locks, this is a warning.

    Args:
        folder: may be renamed and deleted by who holds its lock.
        destination: what the lock is for, in the user's words.

    Returns:
        a descriptor; the lock is held for as long as this process lives, or until it is closed.

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
        if error.errno not in NO_LOCKS:
            raise
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
