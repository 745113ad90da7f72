"""Read from the Hugging Face Hub: a revision becomes a commit, and all reads use this commit."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from glob import escape
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub import HfApi, hf_hub_url, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    OIDCError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from converter.errors import SourceError
from converter.hub.addresses import COMMIT, REPO_ID, Kind, parse_address
from converter.hub.limits import NETWORK_ERRORS, AnswerError, guard_session, meter, read_range
from converter.runtime.cache import sha256_of
from converter.text import is_one_line

_SHA256 = re.compile(r"[0-9a-f]{64}")

MAX_FILES = 200_000
"""The most files of a repo; the Hub advises against more than half of it."""


@dataclass(frozen=True, slots=True)
class Repo:
    """A Hub repo at a commit.

    Attributes:
        repo_id: ``owner/name``; after a renaming, the new one.
        revision: as asked for, or None.
        commit: what it resolved to.
        sizes: file name -> bytes; empty when the Hub was not asked because we are offline.
        sha256: file name -> digest, of files in large file storage.
        gated: whether its terms must be accepted before a download.
    """

    kind: Kind
    repo_id: str
    revision: str | None
    commit: str
    sizes: dict[str, int]
    sha256: dict[str, str] = field(default_factory=dict)
    gated: bool = False

    room: ClassVar[str] = "set HF_HOME to a larger disk"

    @property
    def name(self) -> str:
        return self.repo_id

    def download(self, names: Iterable[str], *, first: bool = False) -> Path:
        """Fetch files of a repo at its commit into the client's cache, and return their folder.

        Args:
            names: files.
            first: ask for the revision by its name, as the first call should: the client then
                remembers its commit, and a later run finds it offline.

        Raises:
            SourceError: see ``plain_errors``; or the revision has moved since it was resolved, or a
                file differs from the listed one.
        """
        wanted = list(names)
        with plain_errors(self.kind, self.repo_id):
            if not self.sizes:
                return _cached(self.kind, self.repo_id, self.commit)
            known = _known(self, wanted)
            folder = Path(
                snapshot_download(
                    self.repo_id,
                    repo_type=self.kind,
                    revision=self.revision if first else self.commit,
                    allow_patterns=[escape(name) for name in wanted],
                    tqdm_class=meter(sum(self.sizes.get(name, 0) for name in wanted)),
                )
            )
        if folder.name != self.commit:
            raise SourceError(
                f"{self.kind} {self.repo_id} changed while it was read",
                expected=f"commit {self.commit}",
                found=folder.name,
                hint="run again, or name a commit after @",
            )
        _check_content(self, folder, [name for name in wanted if name not in known])
        return folder

    def read(self, name: str, start: int, end: int) -> bytes:
        """The bytes of a file at the commit from ``start`` up to ``end``.

        ``HfFileSystem`` is not used: it holds everything that is sent (``Response.content``), even
        beyond its request, and takes the whole file for the range if a server has no ranges; its
        streams request no end.

        Raises SourceError: see ``plain_errors``; or the file breaks off.
        """
        url = hf_hub_url(self.repo_id, name, repo_type=self.kind, revision=self.commit)
        with plain_errors(self.kind, self.repo_id):
            found = read_range(url, start, end)
        if len(found) < end - start:
            raise SourceError(
                f"{name} of {self.kind} {self.repo_id} breaks off",
                expected=f"{self.sizes[name]:,} bytes, as the Hub lists",
                found=f"the end after {start + len(found):,}",
                hint="run again",
            )
        return found


@contextmanager
def plain_errors(kind: Kind, name: str) -> Iterator[None]:
    """Turn the client's exceptions into one sentence about the repo ``name``.

    Raises:
        SourceError: gated, missing, offline, or the Hub answered with an error.
    """
    what = f"{kind} {name}"
    local = "folder" if kind == "model" else "file"
    try:
        guard_session()
        yield
    except GatedRepoError as error:
        raise SourceError(
            f"{what} is gated",
            hint=f"ask for access on https://huggingface.co/{name.partition('@')[0]} "
            "and log in with 'hf auth login' or HF_TOKEN",
        ) from error
    except RevisionNotFoundError as error:
        raise SourceError(
            f"{what} has no such revision", hint="check what follows the @"
        ) from error
    except RepositoryNotFoundError as error:
        raise SourceError(
            f"there is no {what}, neither as a local path nor on the Hub",
            hint="check the name; for a private repo, log in with 'hf auth login' or HF_TOKEN",
        ) from error
    except OIDCError as error:  # HF_OIDC_RESOURCE is set and the job has no identity
        raise SourceError(
            f"{what}: no token from the identity of this job", found=str(error)
        ) from error
    except HFValidationError as error:
        raise SourceError(
            f"{what} is neither an existing path nor a repo id", hint="check the spelling"
        ) from error
    except (OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
        raise SourceError(
            f"{what} is not in the local cache and the Hub cannot be asked",
            hint=f"there is no local {local} of that name either; unset HF_HUB_OFFLINE, check the "
            "network, or give a path",
        ) from error
    except (HfHubHTTPError, EntryNotFoundError) as error:
        raise SourceError(f"{what}: the Hub refused", found=str(error).split("\n")[0]) from error
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise SourceError(  # the client expects answers to be well-formed
            f"{what}: what the Hub answers makes no sense",
            found=str(error) if isinstance(error, AnswerError) else repr(error),
            hint="check HF_ENDPOINT and the network",
        ) from error
    except NETWORK_ERRORS as error:  # the remaining network errors: no route, a broken pipe
        raise SourceError(
            f"{what} cannot be read from the Hub",
            found=str(error) or type(error).__name__,
            hint=f"there is no local {local} of that name either; check the network and the disk "
            "of HF_HOME, or give a path",
        ) from error


def resolve(kind: Kind, text: str) -> Repo:
    """Resolve ``owner/name[@revision]``, or an address, to a commit and list its files.

    Without a network, or with HF_HUB_OFFLINE, the client's cache is used.

    Raises:
        SourceError: see ``parse_address`` and ``plain_errors``.
    """
    place = parse_address(text, kind)
    repo_id, asked = place.repo_id, place.revision
    with plain_errors(kind, place.name):
        try:
            info = HfApi().repo_info(repo_id, repo_type=kind, revision=asked, files_metadata=True)
        except OfflineModeIsEnabled:
            return Repo(kind, repo_id, asked, _cached(kind, repo_id, asked).name, {})
    return repo_of(kind, info, asked)


def repo_of(kind: Kind, info: Any, asked: str | None) -> Repo:
    """The repo in an answer, a ``ModelInfo`` or the like.

    Raises:
        SourceError: it names no commit, too many files, a file twice, or a file outside of the
            repo.
    """
    repo_id, commit, siblings = str(info.id), str(info.sha), info.siblings or []
    _believe(REPO_ID.fullmatch(repo_id), kind, f"the name {repo_id}")
    _believe(COMMIT.fullmatch(commit), kind, f"the commit {commit}")
    _believe(len(siblings) <= MAX_FILES, kind, f"a list of {len(siblings):,} files")
    sizes: dict[str, int] = {}
    digests = {}
    for entry in siblings:
        name, size = entry.rfilename, entry.size or 0
        _believe(isinstance(name, str) and is_inside(name), kind, f"the file name {name}")
        _believe(name not in sizes, kind, f"the file {name} twice")
        _believe(type(size) is int and size >= 0, kind, f"{name} of {size} bytes")
        sizes[name] = size
        if entry.lfs:
            digests[name] = str(entry.lfs.sha256)
            _believe(_SHA256.fullmatch(digests[name]), kind, f"{name} with sha256 {digests[name]}")
    return Repo(kind, repo_id, asked, commit, sizes, digests, bool(getattr(info, "gated", False)))


def _believe(is_possible: object, kind: Kind, what: str) -> None:
    if not is_possible:
        raise SourceError(
            f"what the Hub answers cannot be that of a {kind}", found=what, hint="check HF_ENDPOINT"
        )


def is_inside(name: str) -> bool:
    """Whether a name from a list is a file within a folder, on every system."""
    parts = name.split("/")
    return is_one_line(name) and "\\" not in name and not {"", ".", ".."}.intersection(parts)


def _known(repo: Repo, names: Iterable[str]) -> set[str]:
    """The files that are already in the client's cache; they are not checked again."""
    try:
        folder = _cached(repo.kind, repo.repo_id, repo.commit)
    except LocalEntryNotFoundError:
        return set()
    return {name for name in names if (folder / name).is_file()}


def _check_content(repo: Repo, folder: Path, names: Iterable[str]) -> None:
    """Check that fetched files are the listed ones; delete others.

    The client compares only sizes, and only with the header of the same answer.
    """
    for name in names:
        path, listed = folder / name, repo.sha256.get(name)
        if name not in repo.sizes or not path.is_file():
            continue
        expected, found = f"{repo.sizes[name]:,} bytes", f"{path.stat().st_size:,} bytes"
        if listed and expected == found:
            expected, found = f"sha256 {listed}", f"sha256 {sha256_of(path)}"
        if expected != found:
            forget(path)
            raise SourceError(
                f"{name} of {repo.kind} {repo.repo_id} is not the file that the Hub lists",
                expected=expected, found=found, hint="run again; it was not kept",
            )  # fmt: skip


def _cached(kind: Kind, repo_id: str, revision: str | None) -> Path:
    """The files of a revision in the client's cache, complete or not."""
    try:
        return Path(
            snapshot_download(repo_id, repo_type=kind, revision=revision, local_files_only=True)
        )
    except IncompleteSnapshotError as error:  # we never fetch a whole repo
        return Path(error.snapshot_path)


def forget(path: Path) -> None:
    """Delete a downloaded file from the client's cache: the link of the snapshot and the blob."""
    blob = path.resolve()
    path.unlink(missing_ok=True)
    blob.unlink(missing_ok=True)
