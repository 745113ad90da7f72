"""A checkpoint to read: small files in a folder, and shards that read like safetensors."""

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from io import RawIOBase
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import ModelCardData
from torch import Tensor

from converter.checkpoints.formats.virtual import Shards, VirtualFile, VirtualShard
from converter.checkpoints.intact import readable
from converter.checkpoints.names import TOKENIZER
from converter.checkpoints.safetensors.header import (
    Header,
    TensorInfo,
    header_of,
    length_of,
    parse_header,
    read_header,
)
from converter.checkpoints.safetensors.rewrite import read_tensor
from converter.errors import CheckpointError, SourceError
from converter.hub.remotes import Remote
from converter.hub.repos import Repo, forget
from converter.hub.stores import Store
from converter.manifest import FileRecord
from converter.runtime.cache import remembered_digest, state_of
from converter.runtime.progress import ThreadPool

_READERS = 8
"""Headers read in parallel; a model may have hundreds of shards on a network disk."""

_FIRST = 100_000
"""Bytes of a remote shard that are requested first: nearly all headers fit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A checkpoint to read.

    Attributes:
        name: repo id, or the folder's own name; never a path.
        folder: holds the small files, and the shards unless they are made from ``originals``;
            remote shards are there once they are fetched.
        config: parsed ``config.json``.
        shards: safetensors file names, sorted.
        weight_map: of the index, or None for a single file.
        companions: the model's other small files, relative to ``folder``.
        drawn: pictures of an earlier edit, which are not copied.
        extras: other safetensors files, which are copied and not edited.
        left_out: files that are neither read nor copied; a hidden folder counts as one.
        above: licence files of the folder or repo above the checkpoint's subfolder.
        virtual_shards: how to make the shards of a checkpoint that is not safetensors; else None.
        originals: files in another format that the shards are made from.
        states: name of an original -> its ``cache.state_of`` before it was opened.
        serial: see ``Translated``.
        remote: where it is fetched from, or None.
        inside: the subfolder of that, with a slash at the end, or empty.
        base: repo id of this model, if it is known.
        base_commit: of that repo, if it was downloaded from there.
        card: front matter of its model card; empty when it has none.
        virtual: the opened shards of ``virtual_shards``.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    shards: tuple[str, ...]
    weight_map: Mapping[str, str] | None
    companions: tuple[str, ...]
    drawn: tuple[str, ...] = ()
    extras: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    above: tuple[Path, ...] = ()
    virtual_shards: Shards | None = None
    originals: tuple[Path, ...] = ()
    states: Mapping[str, list[int]] = field(default_factory=dict)
    serial: bool = False
    remote: Remote | None = None
    inside: str = ""
    base: str | None = None
    base_commit: str | None = None
    card: ModelCardData
    virtual: dict[str, VirtualFile] = field(default_factory=dict)

    def part(self, shards: Iterable[str]) -> "Source":
        """Some shards that are on disk, and no more than it takes to read them."""
        return replace(
            self, shards=tuple(shards), config={}, weight_map=None, companions=(), drawn=(),
            extras=(), left_out=(), above=(), remote=None, card=ModelCardData(),
        )  # fmt: skip

    @property
    def repo(self) -> Repo | None:
        """The repo of the Hub that it is fetched from, or None."""
        return self.remote if isinstance(self.remote, Repo) else None

    @property
    def versions(self) -> dict[str, str]:
        """File -> its ETag, or what the store has instead; empty for a source elsewhere."""
        known = self.remote.versions if isinstance(self.remote, Store) else {}
        here = self.inside
        return {n.removeprefix(here): v for n, v in known.items() if n.startswith(here)}

    @property
    def small(self) -> dict[str, Path]:
        """The files that are copied unchanged: name in the output -> path.

        Remote ``extras`` must be fetched first.
        """
        here = {name: self.folder / name for name in (*self.companions, *self.extras)}
        return here | {path.name: path for path in self.above}

    @property
    def files(self) -> list[Path]:
        """The folder and the files read from it; links in it may lead elsewhere."""
        if self.virtual_shards:
            weights = [path.parent for path in self.originals]
        else:
            weights = [self.folder / name for name in self.shards]
        return [self.folder, *weights, *self.small.values(), *self.originals]

    @property
    def gated(self) -> bool:
        """Whether the Hub or the card requires the acceptance of terms before a download."""
        said = any(key.startswith("extra_gated_") for key in vars(self.card))
        return said or (self.repo is not None and self.repo.gated)

    def open(self, shard: str) -> RawIOBase:
        """A shard, open for reading as safetensors; it is fetched first if it is remote.

        Raises CheckpointError if it cannot be read, SourceError if it cannot be fetched.
        """
        if self.virtual_shards is not None:
            if shard not in self.virtual:
                self.virtual[shard] = VirtualFile(self.virtual_shards[shard])
            return VirtualShard(self.virtual[shard])
        self.fetch([shard])
        with readable(shard):
            return (self.folder / shard).open("rb", buffering=0)

    def read(self, shard: str, info: TensorInfo) -> Tensor:
        """One tensor, as stored. Raises CheckpointError or SourceError, as ``open``."""
        with self.open(shard) as file:
            return read_tensor(file, info)

    def headers(self) -> dict[str, Header]:
        """The header of every shard: from disk, or by range requests for shards not fetched yet.

        Raises CheckpointError if a shard is missing or malformed, SourceError if the remote fails.
        """
        with ThreadPool(_READERS) as pool:  # the time is spent waiting for the network
            return dict(zip(self.shards, pool.map(self._header, self.shards), strict=True))

    def _header(self, shard: str) -> Header:
        if self.virtual_shards is None:
            return header_at(self.folder, shard, self.remote, self.inside)
        with self.open(shard) as file:
            return header_of(file, shard)

    def _missing(self, shard: str) -> bool:
        """Whether a shard, or one of the extras, is remote and not on disk."""
        made = self.virtual_shards is not None and shard not in self.extras
        known = self.remote is not None and bool(self.remote.sizes) and not made
        return known and not (self.folder / shard).exists()

    @property
    def nbytes_of_extras(self) -> int:
        """Bytes of all extras."""
        known = self.remote.sizes if self.remote else {}
        sizes = (known.get(self.inside + name) for name in self.extras)
        paths = (self.folder / name for name in self.extras)
        return sum(size or path.stat().st_size for size, path in zip(sizes, paths, strict=True))

    def fetch(self, shards: Iterable[str] | None = None) -> None:
        """Fetch these shards or extras, or all shards, if they are not on disk.

        Raises SourceError if the remote cannot be read, or the disk is too small.
        """
        wanted = self.shards if shards is None else shards
        names = [self.inside + shard for shard in wanted if self._missing(shard)]
        if self.remote is not None and names:
            check_space(self.remote, names, self.folder, self.name)
            self.remote.download(names)

    def drop(self, shard: str) -> None:
        """Delete a fetched shard, or one of the extras, from the cache."""
        if self.remote is not None and (self.virtual_shards is None or shard in self.extras):
            forget(self.folder / shard)

    def drop_originals(self) -> None:
        """Delete fetched files in another format, after all shards are written."""
        for path in self.originals:
            if self.remote is not None and path.exists():
                forget(path)

    def digests(self) -> dict[str, str]:
        """sha256 of everything a forward pass reads: weights, config and tokenizer files.

        Raises as ``open``.
        """
        names = ["config.json", *(n for n in self.companions if n in TOKENIZER)]
        found: dict[str, str] = {}
        if self.originals:
            found = {name: file.sha256 for name, file in self.original_files().items()}
        else:
            if self.remote:  # the Hub knows them
                digests = {s: self.remote.sha256.get(self.inside + s) for s in self.shards}
                found = {s: sha for s, sha in digests.items() if sha and self._missing(s)}
            unknown = [shard for shard in self.shards if shard not in found]
            self.fetch(unknown)
            names += unknown
        found |= {name: _digest(self.folder / name) for name in names}
        return dict(sorted(found.items()))

    def original_files(self) -> dict[str, FileRecord]:
        """The record of each of ``originals``, by name.

        Raises CheckpointError if one is gone, or is not the file that was opened.
        """
        found = {}
        for path in self.originals:
            if path.exists() and state_of(path) != self.states.get(path.name):
                raise CheckpointError(
                    f"{path.name} changed while it was read", hint="run the same command again"
                )
            found[path.name] = FileRecord(sha256=_digest(path), nbytes=path.stat().st_size)
        return found


def _digest(path: Path) -> str:
    """``remembered_digest`` of a file of the source. Raises CheckpointError."""
    with readable(path.name):
        return remembered_digest(path)


def check_space(remote: Remote, names: Iterable[str], folder: Path, name: str) -> None:
    """Raise SourceError if files of ``remote`` that ``folder`` lacks do not fit on its disk."""
    missing = (n for n in names if not (folder / PurePosixPath(n).name).exists())
    needed = sum(remote.sizes.get(n, 0) for n in missing)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise SourceError(
            f"the disk of the cache is too small for {name}",
            expected=f"{needed / 1e9:.1f} GB free",
            found=f"{free / 1e9:.1f} GB",
            hint=remote.room,
        )


def header_at(folder: Path, name: str, remote: Remote | None = None, inside: str = "") -> Header:
    """The header of a safetensors file: from the folder, or else from the remote.

    Raises CheckpointError, or SourceError as ``remote_header``.
    """
    if remote and remote.sizes and not (folder / name).exists():
        return remote_header(remote, inside + name)
    return read_header(folder / name)


def remote_header(remote: Remote, name: str) -> Header:
    """The header of one remote safetensors file, by range requests; no weights are fetched.

    Raises:
        SourceError: it cannot be read, or breaks off.
        CheckpointError: it is not well-formed safetensors.
    """
    size = remote.sizes[name]
    start = remote.read(name, 0, min(_FIRST, size))
    length = length_of(start, size, name)
    if 8 + length > len(start):
        start += remote.read(name, len(start), 8 + length)
    return parse_header(start[8 : 8 + length], size, name)
