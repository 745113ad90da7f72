"""Outputs: where the result goes. A folder becomes real only when it is complete."""

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp

from converter.errors import DestinationError


def check_destination(
    destination: Path, overwrite: bool, inputs: Iterable[Path], nbytes: int
) -> None:
    """Refuse a destination that cannot be written, before anything is computed.

    Args:
        destination: the folder to make.
        overwrite: whether a checkpoint that is already there may be replaced.
        inputs: files and folders that the run reads.
        nbytes: what will be written.

    Raises:
        DestinationError: it is a file, is not empty, is or contains an input or the current
            folder, lies inside an input, or the disk is too small.
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


def _check(destination: Path, overwrite: bool, inputs: Iterable[Path], nbytes: int) -> None:
    target = destination.resolve()
    for path in (path.resolve() for path in inputs):
        if target == path or target.is_relative_to(path):
            raise DestinationError(
                f"destination {destination} is the source or lies inside it",
                hint="choose a folder elsewhere",
            )
        if path.is_relative_to(target):
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
    if target.is_dir() and any(target.iterdir()):
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
    if nbytes > free:
        raise DestinationError(
            f"the disk of {destination} is too small",
            expected=f"{nbytes / 1e9:.2f} GB free",
            found=f"{free / 1e9:.2f} GB",
        )


TRUTH = ("config.json", "adapter_config.json")
"""A checkpoint or an adapter has one of them."""

LAST = ("model.safetensors.index.json", *TRUTH, "gloss_manifest.json", "SHA256SUMS")
"""Moved last where files are moved one by one: without them it is neither."""


def _is_checkpoint(folder: Path) -> bool:
    """Whether a folder looks as if a conversion could have made it, so that it may be deleted."""
    return (
        any((folder / name).is_file() for name in TRUTH)
        and any(folder.glob("*.safetensors"))
        and not (folder / ".git").exists()
    )


@contextmanager
def staged(destination: Path, overwrite: bool) -> Iterator[Path]:
    """A new folder that takes the place of ``destination`` if the block succeeds.

    It is made beside the destination and renamed, which is one step for everybody who looks. Only
    a mount point, which cannot be renamed, is filled file by file from a folder inside it. If the
    block does not succeed, for whatever reason, the new folder is removed and the destination is
    as it was.

    Args:
        destination: asked about before with ``check_destination``.
        overwrite: whether what is there by then may be replaced.

    Raises:
        DestinationError: the operating system refuses to write, for lack of space for example, or
            another run was faster.
    """
    target = destination.resolve()
    mounted = os.path.ismount(target)
    made = [path for path in target.parents if not path.exists()]
    holder = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target if mounted else target.parent
        holder = Path(mkdtemp(prefix=f".{target.name[:40]}.part-", dir=beside))
        part = holder / "new"  # with the usual permissions, which mkdtemp does not give
        part.mkdir()
        yield part
        _sync(part)
        if not overwrite and _content(target, holder):
            raise DestinationError(
                f"destination {destination} was filled meanwhile",
                hint="another run may have been faster; choose another folder",
            )
        (_fill if mounted else _replace)(part, target)
    except OSError as error:
        raise DestinationError(
            f"destination {destination} cannot be written",
            found=error.strerror or str(error),
            hint="no half-written checkpoint is there; free space or choose another folder",
        ) from error
    finally:
        if holder is not None and (target.exists() or not (holder / "old").exists()):
            shutil.rmtree(holder, ignore_errors=True)
        for path in made:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()


def _content(target: Path, holder: Path) -> list[Path]:
    """What is in the destination besides the folder that is to fill it."""
    return [path for path in target.iterdir() if path != holder] if target.is_dir() else []


def _replace(part: Path, target: Path) -> None:
    """Rename ``part`` to ``target``; a folder that is there is set aside, beside ``part``."""
    old = part.with_name("old")
    try:
        if target.is_dir():
            target.rename(old)
        part.rename(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    _sync(target.parent)


def _fill(part: Path, target: Path) -> None:
    """Move the content of ``part``, which is below ``target``, up to it; ``LAST`` comes last.

    What was there before is deleted first.
    """
    for path in _content(target, part.parent):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    for path in sorted(part.iterdir(), key=lambda path: (path.name in LAST, path.name)):
        path.rename(target / path.name)
    _sync(target)


def _sync(folder: Path) -> None:
    """Flush a folder's entries to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
