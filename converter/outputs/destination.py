"""Check the destination of a result, and clean up what runs leave beside it."""

import hashlib
import os
import re
import shutil
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from converter.errors import DestinationError

_LONGEST = 240
"""The most bytes of a name, to leave room for our additions; file systems allow 255."""

TRUTH = ("config.json", "adapter_config.json")
"""A checkpoint or an adapter has one of these files."""


def check_destination(
    destination: Path, overwrite: bool, inputs: Iterable[Path], nbytes: int
) -> None:
    """Refuse a destination that cannot be written, before anything is computed.

    Args:
        destination: the folder.
        overwrite: whether an existing checkpoint may be replaced.
        inputs: files and folders that the run reads.
        nbytes: number of bytes to write.

    Raises:
        DestinationError: it is a file or an address, is not empty, is or contains an input or the
            current folder, lies inside an input, or the disk is too small.
    """
    try:
        _check(destination, overwrite, inputs, nbytes)
    except OSError as error:
        raise DestinationError(
            f"destination {str(destination)[:80]} cannot be reached", found=error.strerror
        ) from error


def check_folder(folder: Path) -> None:
    """Refuse a folder that can be neither made nor written to, before anything is computed.

    Raises:
        DestinationError: it is below a file, or the operating system does not allow it.
    """
    try:
        target = folder.resolve()
        place = next(path for path in (target, *target.parents) if path.exists())
    except OSError as error:
        raise DestinationError(f"{folder} cannot be reached", found=error.strerror) from error
    if not place.is_dir():
        raise DestinationError(f"{folder} cannot be made", found=f"a file at {place}")
    if not os.access(place, os.W_OK):
        raise DestinationError(f"{folder} cannot be written: the folder {place} is read-only")


def check_beside(option: str, path: Path, folder: Path | None = None) -> None:
    """Refuse a file of an option that cannot be written.

    Args:
        option: as typed.
        path: of the file.
        folder: that may not contain the file, since its manifest lists every file.

    Raises:
        DestinationError: it lies in ``folder``, is a folder, or its folder does not exist.
    """
    if folder is not None and path.resolve().is_relative_to(folder.resolve()):
        raise DestinationError(
            f"{option} {path} is in {folder}, whose manifest lists every file",
            expected="a place outside of it",
        )
    if not path.parent.is_dir():
        raise DestinationError(f"the folder of {option} {path} does not exist")
    if path.is_dir():
        raise DestinationError(f"{option} {path} is a folder", hint="give the name of a file")


def _check(destination: Path, overwrite: bool, inputs: Iterable[Path], nbytes: int) -> None:
    target = destination.resolve()
    if re.match("[a-z0-9]+:/", str(destination)) and not destination.parent.is_dir():
        raise DestinationError(
            f"destination {destination} is an address", expected="a folder",
            hint="gloss push uploads a folder to an object store",
        )  # fmt: skip
    identity = cache(_identity)  # not by name: case may not matter, and a mount can have two names
    above, own = {identity(path) for path in (target, *target.parents)} - {None}, identity(target)
    for path in (path.resolve() for path in inputs):
        if target == path or identity(path) in above:
            raise DestinationError(
                f"destination {destination} is the source or lies inside it",
                hint="choose a folder elsewhere",
            )
        if own and own in map(identity, path.parents):
            raise DestinationError(
                f"destination {destination} contains the input {path.name}",
                hint="choose a folder elsewhere",
            )
    if target.exists() and not target.is_dir():
        raise DestinationError(f"destination {destination} is a file", expected="a folder")
    if Path.cwd().is_relative_to(target):
        raise DestinationError(
            f"destination {destination} is the current folder", hint="run this from another one"
        )
    if target.is_dir() and files_not_ours(target) and not interrupted(target):
        if not _is_checkpoint(target):
            raise DestinationError(
                f"destination {destination} is neither empty nor a checkpoint",
                expected="a new folder"
                if not overwrite
                else "config.json or adapter_config.json, safetensors files "
                "and no .git, since --overwrite deletes everything that is there",
                hint="choose another folder",
            )
        if not overwrite:
            raise DestinationError(
                f"destination {destination} is not empty",
                hint="choose another, or give --overwrite to delete it and write anew",
            )
    place = next(path for path in (target, *target.parents) if path.exists())
    if place == target and not os.path.ismount(target):
        place = target.parent  # it is replaced, not filled
    if not os.access(place, os.W_OK):
        raise DestinationError(f"destination {destination}: the folder {place} is read-only")
    free = shutil.disk_usage(place).free
    if nbytes > free + _unfinished_bytes(target):
        raise DestinationError(
            f"the disk of {destination} is too small",
            expected=f"{nbytes / 1e9:.2f} GB free",
            found=f"{free / 1e9:.2f} GB",
        )


def _identity(path: Path) -> tuple[int, int] | None:
    """Device and inode; None if the path does not exist."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _is_checkpoint(folder: Path) -> bool:
    """Whether a folder looks as if a conversion could have made it, so that it may be deleted."""
    return (
        any((folder / name).is_file() for name in TRUTH)
        and any(folder.glob("*.safetensors"))
        and not (folder / ".git").exists()
    )


def holder_of(target: Path) -> Path:
    """The folder ``.NAME.part`` of a resolved destination: inside it, if it is a mount point."""
    name = target.name
    if len(os.fsencode(name)) > _LONGEST:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return (target if os.path.ismount(target) else target.parent) / f".{name}.part"


def files_not_ours(target: Path) -> list[Path]:
    """The files of a folder, without those that runs leave in a mount point."""
    ours = holder_of(target)
    return [p for p in target.iterdir() if p != ours and not _is_trash(p, ours)]


def _unfinished_bytes(target: Path) -> int:
    """Bytes beside a resolved destination that the next run continues from or deletes."""
    try:
        files = (holder_of(target) / "new").rglob("*")
        return sum(path.stat().st_size for path in files if path.is_file())
    except OSError:  # another run works there; the request for the lock will report it
        return 0


def interrupted(target: Path) -> bool:
    """Whether a run was killed while it replaced a destination.

    ``Claim.recover`` repairs it.
    """
    return any((holder_of(target) / name).exists() for name in ("old", "filling"))


def sweep(holder: Path) -> None:
    """Delete discarded folders beside a ``.NAME.part``."""
    for path in holder.parent.iterdir():
        if _is_trash(path, holder):
            shutil.rmtree(path, ignore_errors=True)


def _is_trash(path: Path, holder: Path) -> bool:
    pattern = re.escape(holder.name) + "-[0-9a-f]{8}"
    return path.parent == holder.parent and re.fullmatch(pattern, path.name) is not None
