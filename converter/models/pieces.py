"""Keep the result of each batch until the run succeeds, so that a stopped run can continue.

A piece is the result of one batch. Its name is a hash of everything that it depends on within the
run: the batch, the edits under which the model computed, the dtype, and the kind of result. The
name of a run's folder is a hash of the rest: source, recipe, device and libraries. The folder is
deleted when the run succeeds.
"""

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn

from converter.checkpoints.safetensors.header import to_bytes
from converter.runtime import progress
from converter.runtime.cache import cache_error, cache_folder, discard_stale

_DIGEST = hashlib.sha256().digest_size


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
                digest.update(repr(part).encode())
        return digest.hexdigest()

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
            part.unlink(missing_ok=True)
            raise cache_error(self.folder, error) from error
        self._whole.add(name)

    def made(self, name: str, make: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """The piece of this name; if there is none, ``make`` it and keep it."""
        if name in self:
            return self.get(name)
        found = make()
        self.put(name, found)
        return found

    def drop(self, name: str) -> None:
        """Delete a piece."""
        self._whole.discard(name)
        (self.folder / name).unlink(missing_ok=True)


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

    Two runs of the same key at the same time share no pieces. The pieces are deleted if the block
    succeeds, and otherwise by a later run, after a day.

    Raises:
        DestinationError: the cache cannot be written.
    """
    folder = cache_folder() / "pieces"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        discard_stale(folder, "")
    except OSError as error:
        raise cache_error(folder / key, error) from error
    with _held(folder / key) as place:
        if any(place.iterdir()):
            progress.note("  continuing from the results of a stopped run")
        pieces = Pieces(place)
        token = _now.set(pieces)
        try:
            yield pieces
        finally:
            _now.reset(token)
        shutil.rmtree(place, ignore_errors=True)


@contextmanager
def _held(place: Path) -> Iterator[Path]:
    """Hold a folder until the end of the block; or a temporary one, if another process holds it."""
    try:
        place.mkdir(exist_ok=True)
        descriptor = os.open(place, os.O_RDONLY)
    except OSError as error:
        raise cache_error(place, error) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        still = place.is_dir() and os.path.samestat(os.fstat(descriptor), place.stat())
    except OSError:
        still = False
    try:
        if still:
            yield place
        else:
            with temporary_pieces() as own:
                yield own.folder
    finally:
        os.close(descriptor)


@contextmanager
def temporary_pieces() -> Iterator[Pieces]:
    """Pieces that are deleted after the block, whatever happens in it."""
    folder = cache_folder() / "pieces"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        made = tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True)
    except OSError as error:
        raise cache_error(folder / "x", error) from error
    with made as name:
        yield Pieces(Path(name))
