"""Outputs: where the result goes. A folder becomes real only when it is complete."""

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

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
        DestinationError: it is a file, is not empty, contains an input, lies inside one, or the
            disk is too small.
    """
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
    if target.is_dir() and any(target.iterdir()):
        if not overwrite:
            raise DestinationError(
                f"destination {destination} is not empty",
                hint="choose another, or give --overwrite to replace it",
            )
        if not (target / "config.json").is_file():
            raise DestinationError(
                f"destination {destination} is not a checkpoint",
                expected="a folder with a config.json, since --overwrite deletes what is there",
                hint="choose another folder",
            )
    parent = next(path for path in target.parents if path.exists())
    free = shutil.disk_usage(parent).free
    if nbytes > free:
        raise DestinationError(
            f"the disk of {destination} is too small",
            expected=f"{nbytes / 1e9:.2f} GB free",
            found=f"{free / 1e9:.2f} GB",
        )


@contextmanager
def staged(destination: Path) -> Iterator[Path]:
    """A new folder beside ``destination`` that takes its place if the block succeeds.

    If it does not, for whatever reason, the new folder is removed and the destination is as it
    was. A folder that is already there is replaced; ``check_destination`` has been asked first.

    Raises:
        DestinationError: the operating system refuses to write, for lack of space for example.
    """
    target = destination.resolve()
    part = target.with_name(f".{target.name}.part-{os.getpid()}")
    made = [path for path in target.parents if not path.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part.mkdir()
        yield part
        _sync(part)
        _publish(part, target)
    except OSError as error:
        raise DestinationError(
            f"destination {destination} cannot be written",
            found=error.strerror or str(error),
            hint="nothing was left behind; free space or choose another folder",
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
        for path in made:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()


def _publish(part: Path, target: Path) -> None:
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    replaced = target.is_dir()
    if replaced:
        target.rename(old)
    try:
        part.rename(target)
    except BaseException:
        if replaced:
            old.rename(target)
        raise
    _sync(target.parent)
    if replaced:
        shutil.rmtree(old)


def _sync(folder: Path) -> None:
    """Flush a folder's entries to disk, where the system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
