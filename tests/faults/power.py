"""What a disk holds when the power goes: only what was flushed is sure.

The model is that of a journaling file system such as ext4 (data=ordered, delayed allocation), at
its worst. A file's bytes survive as of its last fsync. A change of names (create, rename, delete)
is atomic and survives for sure only once a folder that it touches is fsync'ed; those before it that
touch the same folders survive with it, as a journal writes them in order. fsync of a file is not
taken to save its name, though ext4 does that.

What is not sure may survive or not, so the power goes in four variants:

``lost``  no unsure name change, no unsure byte;
``kept``  all name changes, no unsure byte: new files are empty, as after a rename without fsync;
``zeros`` all name changes, files as long as they were, with zeros for unsure bytes;
``torn``  some name changes, the first so many; of each file some unsure blocks of 4096.
"""

import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

BLOCK = 4096


@dataclass(eq=False)
class Node:
    """A file or a folder: what of it is on disk (``sure``, ``entries``) and its names as seen."""

    folder: bool
    mode: int
    sure: bytes = b""
    entries: dict[str, "Node"] = field(default_factory=dict)
    seen: dict[str, "Node"] = field(default_factory=dict)


@dataclass
class Pending:
    """A change of names that is not flushed: which folders it touches, and how to do it."""

    folders: set[Node]
    do: Callable[[], None]


class Disk:
    """The durable state of everything below ``root`` but the top folders ``leave``."""

    def __init__(self, root: Path, leave: tuple[str, ...] = ()) -> None:
        self.root, self.leave = root, leave
        self.top = self._scan(root, leave)
        self.pending: list[Pending] = []

    def _scan(self, path: Path, leave: tuple[str, ...] = ()) -> Node:
        mode = path.stat().st_mode & 0o7777
        if not path.is_dir():
            return Node(False, mode, path.read_bytes())
        node = Node(True, mode)
        for child in path.iterdir():
            if child.name not in leave:
                node.seen[child.name] = self._scan(child)
        node.entries = dict(node.seen)
        return node

    def _find(self, path: str) -> Node | None:
        node: Node | None = self.top
        relative = os.path.relpath(path, self.root)
        for part in () if relative == "." else Path(relative).parts:
            node = node.seen.get(part) if node else None
        return node

    def _parent(self, path: str) -> tuple[Node, str] | None:
        parent = self._find(os.path.dirname(path))
        return (parent, os.path.basename(path)) if parent else None

    def changed(self, kind: str, paths: tuple[str, ...]) -> None:
        """Note a change that was done."""
        if kind == "fsync":
            self._flush(paths[0])
        elif kind in ("open", "mkdir", "serialize"):
            self._create(paths[0])
        elif kind in ("unlink", "rmdir"):
            self._set([(paths[0], None)])
        elif kind in ("rename", "exchange", "link"):
            first, second = self._find(paths[0]), self._find(paths[1])
            gone = {"rename": None, "exchange": second, "link": first}[kind]
            self._set([(paths[0], gone), (paths[1], first)])

    def _create(self, path: str) -> None:
        real = Path(path)
        if self._find(path) is None and real.exists():
            self._set([(path, Node(real.is_dir(), real.stat().st_mode & 0o7777))])

    def _set(self, names: list[tuple[str, Node | None]]) -> None:
        places = [(*place, node) for path, node in names if (place := self._parent(path))]
        for parent, name, node in places:
            _put(parent.seen, name, node)

        def do() -> None:
            for parent, name, node in places:
                _put(parent.entries, name, node)

        self.pending.append(Pending({parent for parent, _, _ in places}, do))

    def _flush(self, path: str) -> None:
        node = self._find(path)
        if node is None:
            return
        if not node.folder:
            node.sure = Path(path).read_bytes()
            return
        touched, chosen = {node}, []
        for change in reversed(self.pending):
            if change.folders & touched:
                touched |= change.folders
                chosen.append(change)
        for change in reversed(chosen):
            change.do()
        self.pending = [change for change in self.pending if change not in chosen]

    def cut(self, variant: str, seed: int) -> None:
        """Leave below ``root`` what a disk may hold after the power went."""
        luck = random.Random(seed)
        now = {node: path.read_bytes() for path, node in self._files(self.top, self.root)}
        count = {"lost": 0, "torn": luck.randint(0, len(self.pending))}
        for change in self.pending[: count.get(variant)]:
            change.do()
        content = {node: _left(node.sure, now.get(node, b""), variant, luck) for node in now}
        for name in os.listdir(self.root):
            if name not in self.leave:
                path = self.root / name
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        self._write(self.top, self.root, content)

    def _files(self, node: Node, path: Path) -> Iterator[tuple[Path, Node]]:
        for name, child in node.seen.items():
            if child.folder:
                yield from self._files(child, path / name)
            elif (path / name).is_file():
                yield path / name, child

    def _write(self, node: Node, path: Path, content: dict[Node, bytes]) -> None:
        for name, child in node.entries.items():
            if child.folder:
                (path / name).mkdir()
                self._write(child, path / name, content)
            else:
                (path / name).write_bytes(content.get(child, child.sure))
            (path / name).chmod(child.mode)


def _put(entries: dict[str, Node], name: str, node: Node | None) -> None:
    if node is None:
        entries.pop(name, None)
    else:
        entries[name] = node


def _left(sure: bytes, now: bytes, variant: str, luck: random.Random) -> bytes:
    """What is left of a file whose flushed bytes are ``sure``."""
    if now == sure or variant in ("lost", "kept"):
        return sure
    if variant == "torn" and luck.random() < 0.3:
        return sure
    padded = sure[: len(now)].ljust(len(now), b"\0")
    if variant == "zeros":
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(sure, now)))  # noqa: B905
        return now[:same].ljust(len(now), b"\0")
    blocks = [
        (now if luck.random() < 0.5 else padded)[i : i + BLOCK] for i in range(0, len(now), BLOCK)
    ]
    return b"".join(blocks)
