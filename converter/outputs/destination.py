"""Outputs: where the result goes. Here it is asked whether it can go there."""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from converter.errors import DestinationError
from converter.outputs.staging.claim import TRUTH, files_not_ours, interrupted, unfinished_bytes


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
    if nbytes > free + unfinished_bytes(target):
        raise DestinationError(
            f"the disk of {destination} is too small",
            expected=f"{nbytes / 1e9:.2f} GB free",
            found=f"{free / 1e9:.2f} GB",
        )


def _is_checkpoint(folder: Path) -> bool:
    """Whether a folder looks as if a conversion could have made it, so that it may be deleted."""
    return (
        any((folder / name).is_file() for name in TRUTH)
        and any(folder.glob("*.safetensors"))
        and not (folder / ".git").exists()
    )
