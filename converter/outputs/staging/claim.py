"""How a destination becomes real: held by one run, filled beside its place, moved there at once.

While a run works there is a folder ``.NAME.part`` beside the destination NAME, with ``lock``, the
new folder ``new`` and the journal of what is finished. If the process is killed it stays, and the
next run into the same destination goes on from it. What matters is flushed to disk before the step
that makes it count.
"""

import ctypes
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from converter.errors import ConverterError, DestinationError, GateError, VerificationError
from converter.outputs.staging.lock import locked
from converter.runtime import progress
from converter.runtime.cache import sync

JOURNAL = "journal.jsonl"
"""See ``outputs.staging.journal``."""

LONGEST = 240
"""Bytes of a file name that leave room for ours around it; file systems take 255."""

TRUTH = ("config.json", "adapter_config.json")
"""A checkpoint or an adapter has one of them."""

LAST = ("model.safetensors.index.json", *TRUTH, "gloss_manifest.json", "SHA256SUMS")
"""Moved in last and out first, where files are moved one by one: without them it is neither."""

RENAME_EXCHANGE = 2
AT_FDCWD = -100


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

        Args:
            overwrite: whether what is there by then may be replaced.

        Raises:
            DestinationError: the operating system refuses to write, for lack of space for example,
                or something else was written to the destination meanwhile.
        """
        with self._told():
            self.part.mkdir(exist_ok=True)
            yield self.part
            sync_tree(self.part)
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
        """Put things where they were if a run was killed in the middle of its last step."""
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

    Args:
        destination: asked about before with ``check_destination``.
        overwrite: whether what is there may be replaced.

    Raises:
        DestinationError: another run holds it, or it cannot be written.
    """
    claim = Claim(destination)
    made = [path for path in claim.target.parents if not path.exists()]
    lock, keep = None, False
    try:
        with claim._told():
            claim.holder.parent.mkdir(parents=True, exist_ok=True)
            for path in made:
                sync(path.parent)
            lock = locked(claim.holder, destination)
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


def holder_of(target: Path) -> Path:
    """The folder ``.NAME.part`` of a resolved destination: in it, if it is a mount point."""
    name = target.name
    if len(os.fsencode(name)) > LONGEST:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return (target if os.path.ismount(target) else target.parent) / f".{name}.part"


def files_not_ours(target: Path) -> list[Path]:
    """What is in a folder, but for what runs into it have left there while it is a mount point."""
    ours = holder_of(target)
    return [p for p in target.iterdir() if p != ours and not _is_trash(p, ours)]


def unfinished_bytes(target: Path) -> int:
    """Bytes beside a resolved destination that the next run goes on from or deletes."""
    try:
        files = (holder_of(target) / "new").rglob("*")
        return sum(path.stat().st_size for path in files if path.is_file())
    except OSError:  # another run works there; who asks for the lock will be told
        return 0


def interrupted(target: Path) -> bool:
    """Whether a run was killed while it changed a destination, so that its content is in between.

    ``recover`` mends that.
    """
    return any((holder_of(target) / name).exists() for name in ("old", "filling"))


def finished_in(path: Path) -> int:
    """How many shards a journal names, a line each after its first; 0 without one."""
    try:
        return max(path.read_bytes().count(b"\n") - 1, 0)
    except OSError:
        return 0


def sweep(holder: Path) -> None:
    """Delete what was discarded beside a ``.NAME.part``."""
    for path in holder.parent.iterdir():
        if _is_trash(path, holder):
            shutil.rmtree(path, ignore_errors=True)


def _is_trash(path: Path, holder: Path) -> bool:
    pattern = re.escape(holder.name) + "-[0-9a-f]{8}"
    return path.parent == holder.parent and re.fullmatch(pattern, path.name) is not None


def _move(paths: Iterable[Path], folder: Path, *, away: bool = False) -> None:
    """Move files to a folder, ``LAST`` last; ``away``: out of a destination, so ``LAST`` first."""
    for path in sorted(paths, key=lambda path: ((path.name in LAST) != away, path.name)):
        path.rename(folder / path.name)


def _exchanged(one: Path, other: Path) -> bool:
    """Let two folders swap names in one step; False where the operating system cannot."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    names = os.fsencode(one), os.fsencode(other)
    return bool(call(AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_EXCHANGE) == 0)


def sync_tree(folder: Path) -> None:
    """Flush the entries of a folder and of all below it; the files were flushed when written."""
    for path, _, _ in os.walk(folder, topdown=False):
        sync(Path(path))
