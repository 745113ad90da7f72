"""Keep the result of each batch until the run succeeds, so that a stopped run can continue.

A piece is the result of one batch. Its name is a hash of everything that it depends on within the
run: the batch, the edits under which the model computed, the dtype, and the kind of result. The
name of a run's folder is a hash of the rest: source, recipe, device and libraries. The folder is
deleted when the run succeeds. A process holds its folder by a lock on a file in it, so that no
other process uses or deletes it.
"""

import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from contextvars import ContextVar
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn

from converter.checkpoints.safetensors.header import to_bytes
from converter.runtime import progress
from converter.runtime.cache import STALE, cache_error, cache_folder

_DIGEST = hashlib.sha256().digest_size

_LOCK = "lock"


class Pieces:
    """Named groups of tensors in a folder that one process holds.

    Attributes:
        folder: of the files.
        module: the unedited model whose results are kept; no other model's are.
        edits: digests of the edits under which the module computes now.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.module: nn.Module | None = None
        self.edits: tuple[str, ...] = ()
        self._whole = set[str]()

    def name(self, kind: str, *parts: object) -> str:
        """The name of a result of the module, as it computes now.

        Args:
            kind: of the result.
            parts: inputs of the result: tensors, which count by their bytes, and texts or numbers.
        """
        assert self.module is not None
        dtype = next(self.module.parameters()).dtype
        digest = hashlib.sha256(repr((kind, str(dtype), self.edits)).encode())
        for part in parts:
            if isinstance(part, Tensor):
                digest.update(f"{part.dtype} {list(part.shape)}".encode())
                digest.update(to_bytes(part.cpu().contiguous()))
            else:
                digest.update(f"{part!r}\n".encode())
        return digest.hexdigest()

    def room(self) -> int:
        """The bytes that pieces may take: half of the disk that is free without them."""
        used = sum(path.stat().st_size for path in self.folder.iterdir())
        return (shutil.disk_usage(self.folder).free + used) // 2

    def __contains__(self, name: str) -> bool:
        """Whether there is a whole piece. A piece of an earlier run is checked once."""
        if name not in self._whole:
            try:
                data = memoryview((self.folder / name).read_bytes())
            except OSError:
                return False
            if hashlib.sha256(data[_DIGEST:]).digest() != data[:_DIGEST]:
                return False  # the machine went down while it was written
            self._whole.add(name)
        return True

    def get(self, name: str) -> dict[str, Tensor]:
        """An existing piece, on the CPU. Raises DestinationError if it cannot be read."""
        try:
            return safetensors.torch.load((self.folder / name).read_bytes()[_DIGEST:])
        except (OSError, SafetensorError) as error:
            raise cache_error(self.folder / name, error) from error

    def put(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep a piece. Raises DestinationError if the folder cannot be written."""
        data = safetensors.torch.save({n: x.cpu().contiguous() for n, x in tensors.items()})
        part = self.folder / f".{name}"
        try:
            part.write_bytes(hashlib.sha256(data).digest() + data)
            part.replace(self.folder / name)
        except OSError as error:
            with suppress(OSError):
                part.unlink()
            raise cache_error(self.folder, error) from error
        self._whole.add(name)

    def drop(self, name: str) -> None:
        """Delete a piece, if there is one."""
        self._whole.discard(name)
        with suppress(OSError):
            (self.folder / name).unlink()


_now: ContextVar[Pieces | None] = ContextVar("pieces", default=None)


def pieces_of(module: nn.Module) -> Pieces | None:
    """The pieces of the run, if the module is the one whose results it keeps."""
    pieces = _now.get()
    return pieces if pieces is not None and pieces.module is module else None


@contextmanager
def pieces_for(module: nn.Module) -> Iterator[Pieces]:
    """The pieces of the run; or temporary ones, if the run keeps none of this module."""
    if pieces := pieces_of(module):
        yield pieces
        return
    with temporary_pieces() as own:
        own.module = module
        yield own


@contextmanager
def under(module: nn.Module, digest: str) -> Iterator[None]:
    """Within this context, the module computes with one more edit, which has this digest."""
    pieces = pieces_of(module)
    if pieces is None:
        yield
        return
    before, pieces.edits = pieces.edits, (*pieces.edits, digest)
    try:
        yield
    finally:
        pieces.edits = before


@contextmanager
def keeping(key: str) -> Iterator[Pieces]:
    """Within this context, keep pieces, and use those of a stopped run of the same key.

    Another run of this key that goes on at the same time does not share them. They are deleted if
    the block succeeds, and else by a later run of another key, after a day.

    Raises:
        DestinationError: the cache cannot be written.
    """
    place = cache_folder() / "pieces" / key
    with _held(place) as held:
        _discard_stale(place.parent)
        with nullcontext(Pieces(place)) if held else temporary_pieces() as pieces:
            if {path.name for path in pieces.folder.iterdir()} - {_LOCK}:
                progress.note("  continuing from the results of a stopped run")
            token = _now.set(pieces)
            try:
                yield pieces
            finally:
                _now.reset(token)
        if held:
            _delete(place)


@contextmanager
def temporary_pieces() -> Iterator[Pieces]:
    """Pieces that are deleted after the block, whatever happens in it.

    Raises:
        DestinationError: the cache cannot be written.
    """
    folder = cache_folder() / "pieces"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        made = tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True)
    except OSError as error:
        raise cache_error(folder, error) from error
    with made as name, _held(Path(name)):
        yield Pieces(Path(name))


@contextmanager
def _held(place: Path) -> Iterator[bool]:
    """Hold a folder, which only its user can read, and which is made if it is missing.

    Yields whether it is held: another process may have it, or it cannot be written, or the file
    system has no locks.
    """
    lock, held = None, False
    with suppress(OSError):
        place.mkdir(0o700, parents=True, exist_ok=True)
        lock = os.open(place / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held = os.path.samestat(os.fstat(lock), (place / _LOCK).stat())
    try:
        yield held
    finally:
        if lock is not None:
            os.close(lock)


def _discard_stale(folder: Path) -> None:
    """Delete the folders in which nothing was kept for a day and that no process holds."""
    for place in folder.glob("*"):
        with suppress(OSError):
            if time.time() - place.stat().st_mtime > STALE:
                with _held(place) as held:
                    if held:
                        _delete(place)


def _delete(place: Path) -> None:
    """Delete a held folder; the lock last, so that nobody finds half of the pieces."""
    with suppress(OSError):
        for path in sorted(place.iterdir(), key=lambda path: path.name == _LOCK):
            path.unlink()
        place.rmdir()
