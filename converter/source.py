"""Where a checkpoint comes from: a folder, a file, or a Hub repo at a commit.

Whatever it is, its small files are in a folder, and its shards read like safetensors.
"""

import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import ModelCardData

from converter import hub
from converter.architecture import find_architecture
from converter.cache import remembered_digest
from converter.demo import REPO_ID as DEMO
from converter.demo import demo_folder
from converter.errors import CheckpointError, SourceError
from converter.formats import Shards, VirtualShard, gguf, native, pickled
from converter.header import Header, header_of
from converter.layout import (
    CARD,
    INDEX,
    TOKENIZER,
    WEIGHTS,
    Format,
    choose_format,
    is_companion,
    read_card,
    read_index,
    read_json,
)

READERS = 8
"""Headers that are read at a time; a model may have hundreds of shards on a network disk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A checkpoint to read.

    Attributes:
        name: repo id, or the folder's own name; never a path.
        folder: holds the small files and, unless they are made from ``originals``, the shards,
            those of a Hub repo once they are fetched.
        config: parsed ``config.json``.
        shards: safetensors file names, sorted.
        weight_map: of the index, or None for a single file.
        companions: the other small files that belong to the model, relative to ``folder``.
        recipes: how to make the shards of a checkpoint that is not safetensors; else None.
        originals: files in another format that the shards are made from.
        repo: where it was downloaded from, or None.
        inside: the subfolder of the repo, with a slash at the end, or empty.
        base: repo id of the model that this is, as far as it is known.
        card: front matter of its model card; empty when it has none.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    shards: tuple[str, ...]
    weight_map: Mapping[str, str] | None
    companions: tuple[str, ...]
    recipes: Shards | None = None
    originals: tuple[Path, ...] = ()
    repo: hub.Repo | None = None
    inside: str = ""
    base: str | None = None
    card: ModelCardData

    @property
    def files(self) -> list[Path]:
        """The folder and what is read from it; links in it may lead elsewhere."""
        names = (*(() if self.recipes else self.shards), *self.companions)
        given = {path.parent for path in self.originals} if self.recipes else ()
        return [self.folder, *given, *(self.folder / name for name in names), *self.originals]

    def open(self, shard: str) -> RawIOBase:
        """A shard, open for reading as safetensors; it is fetched first if it is on the Hub only.

        Raises:
            CheckpointError: it cannot be read.
            SourceError: it cannot be fetched.
        """
        if self.recipes is not None:
            return VirtualShard(self.recipes[shard])
        self.fetch([shard])
        try:
            return (self.folder / shard).open("rb", buffering=0)
        except OSError as error:
            raise CheckpointError(f"{shard} cannot be read", found=error.strerror) from error

    def headers(self) -> dict[str, Header]:
        """The header of every shard, from disk, or by range requests while it is only on the Hub.

        Raises:
            CheckpointError: a shard is missing, truncated or malformed.
            SourceError: the Hub cannot be read.
        """
        with ThreadPoolExecutor(READERS) as pool:  # what takes time is waiting for the network
            return dict(zip(self.shards, pool.map(self._header, self.shards), strict=True))

    def _header(self, shard: str) -> Header:
        if self.repo and self._missing(shard):
            return hub.remote_header(self.repo, self.inside + shard)
        with self.open(shard) as file:
            return header_of(file, shard)

    def _missing(self, shard: str) -> bool:
        """Whether a shard is on the Hub and not on disk."""
        known = self.repo is not None and self.recipes is None and bool(self.repo.sizes)
        return known and not (self.folder / shard).exists()

    def fetch(self, shards: Iterable[str] | None = None) -> None:
        """Make sure that these shards, or all, are on disk.

        Raises:
            SourceError: the Hub cannot be read, or the disk is too small.
        """
        wanted = self.shards if shards is None else shards
        missing = [shard for shard in wanted if self._missing(shard)]
        if self.repo is not None and missing:
            names = [self.inside + shard for shard in missing]
            _check_space(self.repo, names, self.folder, self.name)
            hub.download(self.repo, names)

    def drop(self, shard: str) -> None:
        """Delete a fetched shard from the Hub client's cache, once it is not needed any more."""
        if self.repo is not None and self.recipes is None:
            hub.forget(self.folder / shard)

    def drop_originals(self) -> None:
        """The same for files in another format, which are needed until all shards are written."""
        for path in self.originals:
            if self.repo is not None and path.exists():
                hub.forget(path)

    def digests(self, cache: Path) -> dict[str, str]:
        """sha256 of everything a forward pass reads: weights, config and tokenizer files."""
        small = ["config.json", *(n for n in self.companions if n in TOKENIZER)]
        paths = {name: self.folder / name for name in small}
        found: dict[str, str] = {}
        if self.originals:
            found = {n: entry["sha256"] for n, entry in self.original_files(cache).items()}
        else:
            if self.repo:  # the Hub knows them
                digests = {s: self.repo.sha256.get(self.inside + s) for s in self.shards}
                found = {s: sha for s, sha in digests.items() if sha and self._missing(s)}
            self.fetch(shard for shard in self.shards if shard not in found)
            paths |= {shard: self.folder / shard for shard in self.shards}
        found |= {n: remembered_digest(p, cache) for n, p in paths.items() if n not in found}
        return dict(sorted(found.items()))

    def original_files(self, cache: Path) -> dict[str, Any]:
        """Name, sha256 and bytes of each of ``originals``."""
        return {
            path.name: {"sha256": remembered_digest(path, cache), "bytes": path.stat().st_size}
            for path in self.originals
        }


def resolve(source: str, cache: Path, subfolder: str = "") -> Source:
    """Find SOURCE and read its small files.

    Args:
        source: a folder, a GGUF file, a Hub repo id with an optional ``@revision``, or ``demo``.
        cache: the user's cache folder.
        subfolder: of the folder or repo, that the checkpoint is in.

    Raises:
        SourceError: it cannot be reached.
        CheckpointError: it is not a checkpoint with a config and a tokenizer.
    """
    if not source.strip():
        raise SourceError("SOURCE is empty", expected="a folder, a file, a repo id, or demo")
    folder = demo_folder(cache) if source == "demo" else Path(source)
    try:
        if folder.is_dir():
            place = folder / subfolder
            if not place.is_dir():
                raise SourceError(f"{source} has no folder {subfolder}", hint="check --subfolder")
            base = DEMO if source == "demo" else None
            name = folder.resolve().name
            return _read(name, place, _files(place), cache, base=base)
        is_file = folder.exists()
    except OSError as error:
        raise SourceError(f"{source[:80]} cannot be read", found=error.strerror) from error
    if is_file and source.endswith(".gguf"):
        made = gguf.unpacked(folder, cache)
        return _read(folder.stem, made, _files(made), cache, originals=(folder,))
    if is_file:
        raise SourceError(
            f"{source} is a file",
            expected="a folder with a checkpoint, a .gguf file or a repo id",
            hint="give the folder that it is in",
        )
    if not hub.looks_like_repo(source):
        repo_id = source.partition("huggingface.co/")[2].strip("/")
        hint = f"give the repo id {repo_id}" if repo_id else "check the path"
        raise SourceError(f"{source} does not exist", hint=hint)
    return _resolve_repo(source, cache, subfolder)


def _resolve_repo(source: str, cache: Path, subfolder: str) -> Source:
    """A Hub repo: its small files are fetched, and weights that cannot be planned without."""
    repo = hub.resolve("model", source)
    inside = f"{PurePosixPath(subfolder)}/" if subfolder else ""
    if repo.sizes:
        sizes = {n.removeprefix(inside): s for n, s in repo.sizes.items() if n.startswith(inside)}
        if not sizes:
            raise SourceError(f"{source} has no folder {subfolder}", hint="check --subfolder")
        kind = choose_format(repo.repo_id, sizes)
        wanted = [n for n, size in sizes.items() if is_companion(n, size) or n == CARD]
        wanted += [n for n in sizes if n == WEIGHTS.get(kind, ("", ""))[1]]
        folder = hub.download(repo, [inside + name for name in wanted], first=True) / inside
        if kind != "safetensors":
            if kind == "pickled":
                find_architecture(read_json(folder / "config.json"))  # before gigabytes are fetched
            weights = [inside + n for n in _weight_files(kind, folder, list(sizes))]
            _check_space(repo, weights, folder, repo.repo_id)
            hub.download(repo, weights)
    else:
        folder = hub.download(repo, []) / inside
        sizes = _files(folder)
    return _read(repo.repo_id, folder, sizes, cache, repo=repo, inside=inside, base=repo.repo_id)


def _check_space(repo: hub.Repo, names: Iterable[str], folder: Path, name: str) -> None:
    missing = (n for n in names if not (folder / PurePosixPath(n).name).exists())
    needed = sum(repo.sizes.get(n, 0) for n in missing)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise SourceError(
            f"the disk of the Hugging Face cache is too small for {name}",
            expected=f"{needed / 1e9:.1f} GB free",
            found=f"{free / 1e9:.1f} GB",
            hint="set HF_HOME to a larger disk",
        )


def _files(folder: Path) -> dict[str, int]:
    """Every file below a folder, and its size."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file():
            if not name.isprintable():  # a name that is not UTF-8 is not printable either
                raise CheckpointError(f"the file name {name!r} is not plain text")
            found[name] = path.stat().st_size
    return found


def _weight_files(kind: Format, folder: Path, names: Iterable[str]) -> list[str]:
    """The files that hold the weights; an index is read for them."""
    if kind == "native":
        return native.weight_files(names)
    single, index = WEIGHTS[kind]
    if index not in names:
        return [single]
    listed = sorted(set(read_index(folder / index).values()))
    for name in listed:
        if name not in names:
            raise CheckpointError(f"the index names {name}", found="no such file")
    return listed


def _read(name: str, folder: Path, sizes: dict[str, int], cache: Path, **known: Any) -> Source:
    """A source whose small files are in a folder."""
    kind = choose_format(name, sizes)
    weights = _weight_files(kind, folder, list(sizes))
    translated = None
    if kind == "native":
        listed = [*weights, "params.json", "tokenizer.model"]
        native.check_md5(folder, listed, lambda path: remembered_digest(path, cache, "md5"))
        translated = native.read_native(folder, cache)
        folder, sizes = translated.folder, _files(translated.folder)
    if "config.json" not in sizes:
        raise CheckpointError(f"{name} has no config.json", hint="give a complete checkpoint")
    if not TOKENIZER.intersection(sizes):
        raise CheckpointError(
            f"{name} has no tokenizer", expected="tokenizer.json or the like beside the weights"
        )
    config = read_json(folder / "config.json")
    if kind == "pickled":
        tied = config.get("tie_word_embeddings", True) is not False
        translated = pickled.read_pickled(folder, weights, tied)
    if translated:
        shards = tuple(sorted(translated.shards))
        weight_map = translated.weight_map if len(shards) > 1 else None
        known |= {"recipes": translated.shards, "originals": translated.originals}
    else:
        shards = tuple(weights)
        weight_map = read_index(folder / INDEX) if INDEX in sizes else None
    return Source(
        name=name,
        folder=folder,
        config=config,
        shards=shards,
        weight_map=weight_map,
        companions=tuple(n for n in sizes if is_companion(n, sizes[n])),
        card=read_card(folder / CARD),
        **known,
    )
