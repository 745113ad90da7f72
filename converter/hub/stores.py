"""Read from an object store: any address that fsspec knows, such as ``s3://bucket/prefix``.

Objects are fetched by ranges into a folder of the cache. Its name is a digest of the address and
the listing (names, sizes and ETags), so that a replaced object is never taken for the former one.
The store's own client finds credentials, endpoint and region, such as by ``AWS_PROFILE``; an
address has none.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from threading import Lock
from typing import Any, ClassVar

from converter.errors import ConverterError, OptionError, SourceError, is_out_of_memory
from converter.hub.repos import MAX_FILES, is_inside
from converter.runtime import progress
from converter.runtime.cache import cache_folder, replacing
from converter.runtime.extras import need
from converter.text import readable

_PIECE, _AT_ONCE = 1 << 23, 4
"""Bytes of a request, and requests at a time; a fetch holds as many pieces in memory."""

_LARGE = 1 << 26
"""Bytes of an object whose fetching is shown."""

_VERSIONS = ("ETag", "etag", "md5Hash", "content_md5", "mtime", "modificationTime", "created")
"""Keys of a listing that tell two contents of an object apart, best first."""

_FETCHING = Lock()


@dataclass(frozen=True, slots=True)
class Store:
    """The objects below a prefix, as they were listed.

    Attributes:
        address: without credentials.
        files: the file system of fsspec.
        prefix: of all objects, as ``files`` names it.
        sizes: object, without the prefix -> bytes.
        versions: the same -> its ETag, or what the store has instead; of objects that have one.
        key: a digest of the address and this listing.
        sha256: empty: a listing has no sha256.
    """

    room: ClassVar[str] = "give a --cache-dir on a larger disk"

    address: str
    files: Any
    prefix: str
    sizes: dict[str, int]
    versions: dict[str, str]
    key: str
    sha256: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The last part of the prefix, or the bucket."""
        return readable(self.prefix.rpartition("/")[2]) or self.address

    def download(self, names: Iterable[str], *, first: bool = False) -> Path:
        """Fetch objects into the cache, and return their folder; ``first`` has no effect.

        Raises:
            SourceError: as ``plain_errors``, or an object differs from the listing.
            DestinationError: the cache cannot be written.
        """
        folder = cache_folder() / "stores" / self.key
        with _FETCHING:
            for name in names:
                if name in self.sizes and not (folder / name).is_file():
                    with replacing(folder / name) as part:
                        self._fetch(name, part)
        return folder

    def read(self, name: str, start: int, end: int) -> bytes:
        """The bytes of an object from ``start`` up to ``end``.

        Raises SourceError: as ``plain_errors``, or the object breaks off.
        """
        with plain_errors(f"{self.address}/{name}"):
            found = bytes(self.files.cat_file(f"{self.prefix}/{name}", start=start, end=end))
        if len(found) != end - start:
            raise self._other(name, f"{start + len(found):,} bytes")
        return found

    def _fetch(self, name: str, path: Path) -> None:
        size = self.sizes[name]
        starts = range(0, size, _PIECE)
        shown = progress.bar(f"fetch {name}", size, "B") if size > _LARGE else None
        with (
            path.open("wb") as file,
            shown or nullcontext() as moved,
            progress.ThreadPool(_AT_ONCE) as pool,
        ):
            for place in range(0, len(starts), _AT_ONCE):
                pieces = starts[place : place + _AT_ONCE]
                for data in pool.map(lambda n: self.read(name, n, min(n + _PIECE, size)), pieces):
                    file.write(data)
                    if moved:
                        moved.update(len(data))
        with plain_errors(f"{self.address}/{name}"):
            found = self.files.info(f"{self.prefix}/{name}")
        version = _version(found) or "unknown"
        if found["size"] != size or version not in ("unknown", self.versions.get(name, version)):
            raise self._other(name, f"{found['size']:,} bytes, version {version}")

    def _other(self, name: str, found: str) -> SourceError:
        """The error about an object that differs from the listing."""
        version = self.versions.get(name)
        return SourceError(
            f"{self.address}/{name} changed while it was read",
            expected=f"{self.sizes[name]:,} bytes" + (f", version {version}" if version else ""),
            found=found, hint="run again once nobody writes there",
        )  # fmt: skip


def open_store(address: str) -> Store:
    """List the objects of an address.

    Args:
        address: of ``store_address``.

    Raises:
        OptionError: the package for this kind of store is missing.
        SourceError: as ``plain_errors``; or there is no object, or one with an impossible name.
    """
    files, prefix = file_system(address)
    with plain_errors(address):
        objects = objects_below(files, prefix)
    if prefix in objects:
        raise SourceError(
            f"{address} is a single object", expected="the prefix of a checkpoint's files",
            hint="give the part before it; a .gguf file is read from disk",
        )  # fmt: skip
    if not objects:
        raise SourceError(f"there is nothing below {address}", hint="check bucket and prefix")
    wrong = next((name for name in objects if not is_inside(name)), None)
    if wrong is not None or len(objects) > MAX_FILES:
        raise SourceError(
            f"{address} is no checkpoint",
            expected=f"at most {MAX_FILES:,} objects with plain names",
            found=f"{len(objects):,}" if wrong is None else f"the name {wrong}",
        )  # fmt: skip
    sizes = {name: int(entry["size"]) for name, entry in objects.items()}
    versions = {name: found for name, entry in objects.items() if (found := _version(entry))}
    listed = json.dumps([address, sizes, versions], sort_keys=True)
    key = hashlib.sha256(listed.encode()).hexdigest()[:32]
    return Store(address, files, prefix, sizes, versions, key)


def objects_below(files: Any, prefix: str) -> dict[str, Any]:
    """The objects below a prefix: name without it -> entry of the listing.

    An object that stands for a folder does not count. Raises what the client raises.
    """
    files.invalidate_cache()
    listed = files.find(prefix, detail=True)
    files.invalidate_cache()  # later questions are about the objects as they are then
    below = {path.removeprefix(f"{prefix}/"): entry for path, entry in listed.items()}
    return {n: e for n, e in below.items() if e["type"] == "file" and n and not n.endswith("/")}


def file_system(address: str) -> tuple[Any, str]:
    """The file system of fsspec for an address, and the path in it.

    Raises:
        OptionError: its package is missing.
        SourceError: it cannot be set up, for lack of an option or of credentials.
    """
    from fsspec.core import url_to_fs
    from fsspec.registry import known_implementations

    scheme = address.partition("://")[0]
    if scheme in ("s3", "s3a"):
        need(address, "s3fs")
    with plain_errors(address):
        try:
            files, path = url_to_fs(address)
        except ImportError as error:
            raise OptionError(
                f"{address} needs another package",
                found=known_implementations.get(scheme, {}).get("err") or str(error),
            ) from error
    return files, path.rstrip("/")


def _version(entry: Mapping[str, Any]) -> str:
    """The ETag of an object, or else another mark of its content; empty if the store has none."""
    found = next((entry[key] for key in _VERSIONS if entry.get(key)), "")
    return str(found.timestamp() if isinstance(found, datetime) else found).strip('"')


@contextmanager
def plain_errors(
    address: str, kind: type[ConverterError] = SourceError, doing: str = "read"
) -> Iterator[None]:
    """Turn the exceptions of a store's client into one sentence about the address.

    Args:
        address: of a prefix or an object.
        kind: raised if it is not there, there is no right to it, or the store does not answer.
        doing: what cannot be done: ``read`` or ``written``.
    """
    try:
        yield
    except ConverterError:
        raise
    except Exception as error:  # each client has an error tree of its own
        if is_out_of_memory(error):
            raise
        said = " ".join(str(error).split())[:200] or type(error).__name__
        what, hint = f"{address} cannot be {doing}", "check the address, the network and endpoint"
        if isinstance(error, FileNotFoundError):
            what, hint = f"{address} is not there", "check bucket and prefix"
        elif isinstance(error, PermissionError) or "redentials" in type(error).__name__:
            what, hint = f"{what}: no right to it", "check the credentials, such as AWS_PROFILE"
        raise kind(what, found=said, hint=hint) from error
