"""The files of a source's folder, as far as they may be read.

Small files of a source are copied into what is published. So a link among them must not lead out of
the source: it could name any file of this machine. It may lead to what the Hub's client keeps, as
folders that it downloaded to once did: files there have digests for names, which nobody can guess.
The model's weights may be linked from elsewhere, as people do to save room: of them only tensors go
on. Pipes, sockets and devices are refused: opening a named pipe would wait for ever.
"""

import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from converter.checkpoints.names import BOOKKEEPING, is_read
from converter.errors import CheckpointError
from converter.text import is_one_line

_MAX_DEPTH = 32
"""Folders within one another in a source."""


def list_files(folder: Path, home: Path | None = None) -> dict[str, int]:
    """Every file below a folder and its size, in bytes.

    What is in hidden and in linked folders is left out, and these are listed with a slash at the
    end; of what git and file systems have of their own, nothing is. The folder is in the source
    ``home``, or is the source.

    Raises:
        CheckpointError: a name is not plain text; something is no file; or a link leads nowhere,
            or out of the source.
        OSError: a folder cannot be read.
    """
    found = {}
    inside = folder.resolve(), *_allowed((home or folder).resolve())
    for entry, name in _entries(folder):
        if not is_one_line(name):  # a name that is not UTF-8 is not, either
            raise CheckpointError(f"the file name {name!r} is not plain text")
        path = Path(entry.path)
        if path.is_dir():  # hidden, or by a link
            found[f"{name}/"] = 0
            continue
        if entry.is_symlink() and is_read(name):
            _check_link(path, name, inside)
        if not path.exists():
            continue  # a link to nothing, of what is not copied
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            kinds = {stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
            raise CheckpointError(
                f"{name} is no file",
                expected="files and folders",
                found=kinds.get(stat.S_IFMT(status.st_mode), "a device"),
                hint="remove it from the source",
            )
        found[name] = status.st_size
    return dict(sorted(found.items(), key=lambda item: PurePosixPath(item[0]).parts))


def _entries(folder: Path) -> Iterator[tuple["os.DirEntry[str]", str]]:
    """What is below a folder, with names relative to it; of folders, those that are not read."""
    waiting = [("", 0)]
    while waiting:
        inside, depth = waiting.pop()
        with os.scandir(folder / inside) as entries:
            for entry in entries:
                if entry.name in BOOKKEEPING:
                    continue
                name = f"{inside}{entry.name}"
                if not entry.is_dir(follow_symlinks=False) or entry.name.startswith("."):
                    yield entry, name
                elif depth < _MAX_DEPTH:
                    waiting.append((f"{name}/", depth + 1))
                else:
                    what = f"the source has more than {_MAX_DEPTH} folders within one another"
                    raise CheckpointError(what, found=name, hint="give the folder of the model")


def _allowed(home: Path) -> Iterator[Path]:
    """Where links of a source may lead: into it, and where the Hub's client keeps content, which
    ``snapshots/COMMIT/FILE`` links to in ``blobs``."""
    yield home
    for parent in (home, *home.parents):
        if parent.name == "snapshots":
            yield parent.with_name("blobs")


def check_links(home: Path, names: Iterable[str]) -> None:
    """Raise CheckpointError if one of these files of a folder is a link that leads out of it."""
    inside = tuple(_allowed(home.resolve()))
    for name in names:
        if (home / name).is_symlink():
            _check_link(home / name, name, inside)


def _check_link(path: Path, name: str, inside: tuple[Path, ...]) -> None:
    """Raise CheckpointError if a link leads nowhere, or to none of some folders."""
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: in a circle
        what = f"{name} is a link that leads nowhere"
        raise CheckpointError(what, hint="remove it, or put the file in its place") from error
    blobs = target.parent
    if blobs.name == "blobs" and blobs.parent.name.startswith("models--"):
        return  # of a model in the cache of the Hub's client
    if not any(target.is_relative_to(folder) for folder in inside):
        raise CheckpointError(
            f"{name} is a link that leads out of the source",
            expected="a file, or a link within the source",
            hint="it would be published as a file of the model; if it is one, put a copy in its "
            "place",
        )
