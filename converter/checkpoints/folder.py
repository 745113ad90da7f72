"""List the files of a source's folder, and refuse unsafe links.

Small files of a source are copied into the published folder. So a link among them must not lead out
of the source: it could name any file of this machine. It may lead to the Hub client's cache, as in
its older download folders: file names there are digests, which cannot be guessed. Links to the
model's weights may lead anywhere, since only tensors of them are used. Pipes, sockets and devices
are refused: opening a named pipe would wait for ever.
"""

import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from converter.checkpoints.names import BOOKKEEPING, is_read
from converter.errors import CheckpointError
from converter.text import is_one_line

_MAX_DEPTH = 32
"""The deepest nesting of folders in a source."""


def list_files(folder: Path, home: Path | None = None) -> dict[str, int]:
    """Every file below a folder and its size, in bytes.

    Hidden and linked folders are listed with a slash at the end, without their contents. Files of
    git and of file systems are not listed. The folder is in the source ``home``, or is the source.

    Raises:
        CheckpointError: a name is not plain text; an entry is not a file; or a link leads nowhere,
            or out of the source.
        OSError: a folder cannot be read.
    """
    found = {}
    inside = folder.resolve(), *_allowed((home or folder).resolve())
    for entry, name in _entries(folder):
        if not is_one_line(name):  # this includes names that are not UTF-8
            raise CheckpointError(f"the file name {name!r} is not plain text")
        path = Path(entry.path)
        if path.is_dir():  # hidden or linked
            found[f"{name}/"] = 0
            continue
        if entry.is_symlink() and is_read(name):
            _check_link(path, name, inside)
        if not path.exists():
            continue  # a broken link among files that are not copied
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
    """The files below a folder by relative names, and the folders that are not read."""
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
    """The folders that links of a source may lead to: the source itself, and the Hub client's
    ``blobs``, to which ``snapshots/COMMIT/FILE`` links.
    """
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
    """Raise CheckpointError if a link leads nowhere, or outside of the given folders."""
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
