"""Upload files to an object store.

A store cannot rename a folder, so readers see each object as soon as it is uploaded; the order of
the files decides what they can take an unfinished upload for. A large file is sent in parts, and is
seen once all are there; the parts of a failed upload are deleted. On S3, the metadata of an object
have the sha256 of its file, by which the next attempt knows that it need not be sent again.
"""

from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converter.errors import DestinationError, PublishError
from converter.hub.stores import file_system, objects_below, plain_errors
from converter.runtime import progress
from converter.text import few

_PART, _AT_ONCE = 1 << 24, 4
"""Bytes of a part, and parts in memory at a time; S3 takes at most 10,000 parts for an object."""

Files = Mapping[str, tuple[Path, str]]
"""Object, without the prefix -> path and sha256, in the order in which they are sent."""


def check_empty(address: str, but: Container[str] = ()) -> None:
    """Ask a store whether there is anything below an address, which takes seconds.

    Args:
        address: of ``store_address``.
        but: names of objects that may be there; ``upload`` looks at them.

    Raises:
        DestinationError: there is something.
        OptionError: a package is missing.
        PublishError: the bucket is missing, there is no right to it, or there is no answer.
    """
    target = _Target.of(address)
    target.refuse([name for name in target.objects() if name not in but])


def upload(address: str, files: Files) -> None:
    """Send files to an address that has nothing below it, or only some of the same files.

    Raises:
        DestinationError: it has something else.
        OptionError: a package is missing.
        PublishError: the store refuses or breaks off, or has other sizes than were sent.
    """
    target = _Target.of(address)
    there = target.sent_before(files)
    sizes = {name: path.stat().st_size for name, (path, _) in files.items()}
    shown = progress.bar(f"upload {address}", sum(sizes.values()), "B")
    with target.sending(files), shown as bar:
        for name, (path, sha256) in files.items():
            end = bar.n + sizes[name]
            if name not in there:
                target.put(name, path, sha256, bar)
            bar.update(end - bar.n)
    found = {name: entry["size"] for name, entry in target.objects().items()}
    if wrong := sorted(name for name in sizes if found.get(name) != sizes[name]):
        raise PublishError(
            f"{address} does not have what was sent", found=f"other sizes of {few(wrong)}",
            hint="delete what is there, and run the same command again",
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Target:
    """The prefix of an address, to write to."""

    address: str
    files: Any
    prefix: str

    @classmethod
    def of(cls, address: str) -> "_Target":
        with plain_errors(address, PublishError, "written"):
            return cls(address, *file_system(address))

    @property
    def is_s3(self) -> bool:
        return "s3" in self.files.protocol

    def objects(self) -> dict[str, Any]:
        """The objects below the prefix: name -> entry of the listing."""
        with plain_errors(self.address, PublishError, "written"):
            return objects_below(self.files, self.prefix)

    def sent_before(self, files: Files) -> set[str]:
        """The files that are there already. Raises DestinationError if anything else is there."""
        there = self.objects()
        self.refuse([n for n in there if n not in files or not self._is(n, *files[n])])
        return {*there}

    def refuse(self, other: Sequence[str]) -> None:
        """Raise DestinationError if there are other objects."""
        if other:
            raise DestinationError(
                f"destination {self.address} is not empty", found=few(other),
                hint="choose another prefix, or delete what is there",
            )  # fmt: skip

    def _is(self, name: str, path: Path, sha256: str) -> bool:
        """Whether an object was made from a file, as its metadata say; only S3 has them."""
        place = f"{self.prefix}/{name}"
        with plain_errors(f"{self.address}/{name}", PublishError, "written"):
            said = self.files.metadata(place).get("sha256") if self.is_s3 else None
            return bool(said == sha256 and self.files.size(place) == path.stat().st_size)

    def put(self, name: str, path: Path, sha256: str, bar: Any) -> None:
        """Send a file, and move a bar meanwhile."""
        from fsspec.callbacks import Callback

        how: dict[str, Any] = {}
        if self.is_s3:
            how = {"Metadata": {"sha256": sha256}, "chunksize": _PART, "max_concurrency": _AT_ONCE}
        start = bar.n
        told = Callback(hooks={"bar": lambda size, value, **_: bar.update(start + value - bar.n)})
        with plain_errors(f"{self.address}/{name}", PublishError, "written"):
            self.files.put_file(str(path), f"{self.prefix}/{name}", callback=told, **how)

    @contextmanager
    def sending(self, files: Files) -> Iterator[None]:
        """Delete the parts of unfinished uploads: first those of a killed run, and those of the
        block if it fails.
        """
        self._abort(files)
        try:
            yield
        except BaseException as error:
            self._abort(files)
            if isinstance(error, PublishError):
                again = "run the same command again: what was sent is not sent twice"
                error.hint = f"{error.hint}; {again if self.is_s3 else 'delete what is there'}"
            raise

    def _abort(self, files: Files) -> None:
        if not self.is_s3:
            return
        bucket, below, _ = self.files.split_path(self.prefix)
        keys = {f"{below}/{name}".lstrip("/") for name in files}
        with suppress(Exception):  # it may be forbidden, and another error is more telling
            found = self.files.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=below)
            for each in found.get("Uploads", ()):
                if each["Key"] in keys:
                    self.files.abort_mpu(bucket, each["Key"], each["UploadId"])
