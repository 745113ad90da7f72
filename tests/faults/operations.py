"""Every operation on files below one folder that this process asks for in Python, in one place.

``install`` replaces the functions of ``os``, ``io``, ``fcntl``, ``ctypes`` and ``safetensors``
before anything else is imported. They do what they did until a ``Watch`` is set as ``watching``.
"""

import builtins
import ctypes
import errno
import fcntl
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from threading import RLock, local
from typing import Any

FICLONE = 0x40049409
SYS_RENAMEAT2 = 316
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
PATHS = ("mkdir", "rmdir", "unlink", "remove", "truncate", "chmod", "utime")
RENAMES = ("rename", "replace", "link")
ON_DESCRIPTORS = ("fsync", "fdatasync", "ftruncate", "posix_fallocate", "fchmod")
AUDITED = ("os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.truncate", "os.link", "os.symlink")


class Watch:
    """Counts operations below ``root`` and asks ``fault`` what shall become of each.

    Attributes:
        trace: kind and path of each change, in order.
        reads: how many times a file below ``root`` was read.
        unseen: changes that Python's audit events tell of and no wrapper saw.
        moment: a file for when a fault sent this process a signal.
    """

    def __init__(self, root: Path, fault: Any, disk: Any = None) -> None:
        self.root, self.fault, self.disk = os.fspath(root), fault, disk
        self.trace: list[tuple[str, str]] = []
        self.unseen: list[str] = []
        self.reads, self.moment = 0, Path(os.devnull)
        self.written: set[int] = set()
        self._lock, self._inside = RLock(), local()

    def below(self, path: str) -> bool:
        return path.startswith(self.root + "/")

    def nested(self) -> bool:
        """Whether this thread is within an operation already."""
        return getattr(self._inside, "depth", 0) > 0

    def change(
        self, kind: str, paths: tuple[str, ...], do: Callable[[], Any], half: Any = None
    ) -> Any:
        """Count a change and do it, or what the fault makes of it.

        ``half`` is of a write: its bytes, and what writes only the first so many of
        them; and True if it is of a descriptor, not of a file object of Python.
        """
        if self.nested() or not any(map(self.below, paths)):
            return do()
        with self._lock:
            self._inside.depth = 1
            try:
                path = next(p for p in paths if self.below(p))
                self.trace.append((kind, os.path.relpath(path, self.root)))
                number = len(self.trace)
                result = self.fault.change(self, number, kind, paths, do, half)
                if self.disk is not None:
                    self.disk.changed(kind, paths)
                return result
            finally:
                self._inside.depth = 0

    def read(self, path: str, do: Callable[[], Any], short: Callable[[], Any]) -> Any:
        """Count a reading, likewise; ``short`` reads less than was asked for."""
        if self.nested() or not self.below(path):
            return do()
        self.reads += 1
        return self.fault.read(self, self.reads, path, do, short)


watching: list[Watch] = []


def place(path: Any, dir_fd: int | None = None) -> str:
    """The absolute path that an argument names; of a descriptor, that of its file."""
    if isinstance(path, int):
        try:
            return os.readlink(f"/proc/self/fd/{path}")
        except OSError:
            return ""
    text = os.fsdecode(path)
    if dir_fd is not None and not os.path.isabs(text):
        text = os.path.join(place(dir_fd), text)
    text = os.path.abspath(text)
    return os.path.join(os.path.realpath(os.path.dirname(text)), os.path.basename(text))


def _change(kind: str, paths: tuple[str, ...], do: Callable[[], Any], half: Any = None) -> Any:
    return watching[-1].change(kind, paths, do, half) if watching else do()


class Watched(io.FileIO):
    """A file opened by ``open``."""

    def __init__(self, file: Any, mode: str, closefd: bool = True, opener: Any = None) -> None:
        self._changes, self._place = mode != "rb", place(file)
        start = super().__init__
        if self._changes and not isinstance(file, int):
            _change("open", (self._place,), lambda: start(file, mode, closefd, opener))
        else:
            start(file, mode, closefd, opener)

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        put = super().write
        done: int = _change(
            "write",
            (place(self.fileno()),),
            lambda: put(data),
            (len(view), lambda n: put(view[:n])),
        )
        return done

    def truncate(self, size: int | None = None) -> int:
        cut = super().truncate
        done: int = _change("truncate", (place(self.fileno()),), lambda: cut(size))
        return done

    def close(self) -> None:
        done = super().close
        if self.closed or not self._changes:
            done()
        else:
            _change("close", (place(self.fileno()),), done)

    def readinto(self, buffer: Any) -> int | None:
        view, get = memoryview(buffer).cast("B"), super().readinto
        less = max(len(view) // 2, 1)
        count: int | None = self._read(lambda: get(view), lambda: get(view[:less]))
        return count

    def read(self, size: int | None = -1) -> bytes:
        get = super().read
        if size is None or size < 0:
            return self.readall()
        data: bytes = self._read(lambda: get(size), lambda: get(max(size // 2, 1)))
        return data

    def readall(self) -> bytes:
        get = super().readall
        return self._read(get, get) or b""

    def _read(self, do: Callable[[], Any], short: Callable[[], Any]) -> Any:
        return watching[-1].read(self._place, do, short) if watching else do()


def _open(
    file: Any, mode: str = "r", buffering: int = -1, encoding: str | None = None,
    errors: str | None = None, newline: str | None = None, closefd: bool = True, opener: Any = None,
) -> Any:  # fmt: skip
    """``io.open`` over a ``Watched`` file."""
    path = "" if isinstance(file, int) else place(file)
    if not watching or not (watching[-1].below(path) if path else True):
        return _plain_open(file, mode, buffering, encoding, errors, newline, closefd, opener)
    raw = Watched(file, mode.replace("t", "").replace("b", "").replace("U", "") + "b"
                  if "+" not in mode else mode.replace("t", ""), closefd, opener)  # fmt: skip
    if buffering == 0:
        return raw
    if "+" in mode:
        buffered: Any = io.BufferedRandom(raw)
    else:
        buffered = io.BufferedReader(raw) if "r" in mode else io.BufferedWriter(raw)
    if "b" in mode:
        return buffered
    text: Any = io.TextIOWrapper(buffered, encoding, errors, newline, buffering == 1)
    text.mode = mode
    return text


_plain_open = io.open


def _wrap_paths(name: str) -> None:
    plain = getattr(os, name)

    def changed(path: Any, *args: Any, **named: Any) -> Any:
        where = place(path, named.get("dir_fd"))
        kind = "unlink" if name == "remove" else name
        return _change(kind, (where,), lambda: plain(path, *args, **named))

    setattr(os, name, changed)


def _wrap_rename(name: str) -> None:
    plain = getattr(os, name)

    def renamed(source: Any, target: Any, **named: Any) -> Any:
        paths = place(source, named.get("src_dir_fd")), place(target, named.get("dst_dir_fd"))
        kind = "rename" if name == "replace" else name
        return _change(kind, paths, lambda: plain(source, target, **named))

    setattr(os, name, renamed)


def _wrap_descriptor(name: str) -> None:
    plain = getattr(os, name)

    def changed(file: Any, *args: Any) -> Any:
        number = file if isinstance(file, int) else file.fileno()
        kind = {"fdatasync": "fsync", "posix_fallocate": "fallocate"}.get(name, name)
        return _change(kind, (place(number),), lambda: plain(file, *args))

    setattr(os, name, changed)


def _wrap_writes() -> None:
    plain_open, plain_close, plain_write, plain_pwrite = os.open, os.close, os.write, os.pwrite

    def opened(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        def do() -> int:
            number = plain_open(path, flags, mode, dir_fd=dir_fd)
            if watching:
                watching[-1].written.add(number)
            return number

        if not flags & WRITING:
            return plain_open(path, flags, mode, dir_fd=dir_fd)
        number: int = _change("open", (place(path, dir_fd),), do)
        return number

    def closed(number: int) -> None:
        if not watching or number not in watching[-1].written:
            return plain_close(number)
        watching[-1].written.discard(number)
        return _change("close", (place(number),), lambda: plain_close(number))  # type: ignore[no-any-return]

    def put(number: int, data: Any, do: Callable[[Any], int]) -> int:
        view = memoryview(data).cast("B")
        half = (len(view), lambda n: do(view[:n]), True)
        done: int = _change("write", (place(number),), lambda: do(data), half)
        return done

    def write(number: int, data: Any) -> int:
        return put(number, data, lambda part: plain_write(number, part))

    def pwrite(number: int, data: Any, offset: int) -> int:
        return put(number, data, lambda part: plain_pwrite(number, part, offset))

    os.open, os.close, os.write, os.pwrite = opened, closed, write, pwrite  # type: ignore[assignment]


def _wrap_copies(name: str, target: int) -> None:
    """``target``: which argument the file is that is written to."""
    plain = getattr(os, name)

    def copied(*args: Any, **named: Any) -> Any:
        return _change("copy", (place(args[target]),), lambda: plain(*args, **named))

    setattr(os, name, copied)


class _Function:
    """A function of the C library; what is set on it reaches it."""

    def __init__(self, name: str, plain: Any) -> None:
        self.__dict__.update(name=name, plain=plain)

    def __setattr__(self, key: str, value: Any) -> None:
        setattr(self.plain, key, value)

    def __getattr__(self, key: str) -> Any:
        return getattr(self.plain, key)

    def __call__(self, *args: Any) -> Any:
        def plain() -> Any:
            return self.plain(*args)

        given = [getattr(arg, "value", arg) for arg in args]
        name = self.name
        if name == "syscall" and given[0] == SYS_RENAMEAT2:
            name, given = "renameat2", given[1:]
        try:
            if name == "fallocate":
                return _change("fallocate", (place(given[0]),), plain)
            if name == "renameat2":
                paths = place(given[1]), place(given[3])
                return _change("exchange" if given[4] & 2 else "rename", paths, plain)
        except OSError as error:  # injected: C says it otherwise
            ctypes.set_errno(error.errno or errno.EIO)
            return -1
        return plain()


def _wrap_c() -> None:
    class Library(ctypes.CDLL):
        def __getattr__(self, name: str) -> Any:
            plain = super().__getattr__(name)
            if name in ("fallocate", "renameat2", "syscall"):
                return _Function(name, plain)
            return plain

        def __getitem__(self, name: Any) -> Any:
            return super().__getitem__(name)

    ctypes.CDLL = Library  # type: ignore[misc]
    plain = fcntl.ioctl

    def ioctl(file: Any, request: int, *args: Any) -> Any:
        number = file if isinstance(file, int) else file.fileno()
        if request != FICLONE:
            return plain(file, request, *args)
        return _change("clone", (place(number),), lambda: plain(file, request, *args))

    fcntl.ioctl = ioctl


def wrap_safetensors() -> None:
    """Its writer is in Rust: one operation."""
    from importlib import import_module

    module: Any = import_module("safetensors.torch")
    plain = module.serialize_file

    def written(tensors: Any, filename: Any, metadata: Any = None) -> Any:
        def do() -> Any:
            return plain(tensors, filename, metadata)

        return _change("serialize", (place(filename),), do)

    module.serialize_file = written


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if not watching or watching[-1].nested():
        return
    if event == "open":
        path, _, flags = args
        if isinstance(path, int) or path is None or not flags & WRITING:
            return
    elif event not in AUDITED:
        return
    watch, path = watching[-1], args[0]
    if watch.below(place(path)):
        watch.unseen.append(f"{event} {path}")


def install() -> None:
    """Replace the functions; done once, before the product is imported."""
    for name in PATHS:
        _wrap_paths(name)
    for name in RENAMES:
        _wrap_rename(name)
    for name in ON_DESCRIPTORS:
        _wrap_descriptor(name)
    _wrap_copies("sendfile", 0)
    _wrap_copies("copy_file_range", 1)
    _wrap_writes()
    _wrap_c()
    io.open = builtins.open = _open
    sys.addaudithook(_audit)
