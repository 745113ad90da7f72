"""Publishing a checkpoint: upload every file, then make one commit of all, then look at it.

Nothing is visible before the commit. What was uploaded is not sent again by the next attempt: the
Hub knows files in large storage by their sha256, and with Xet also parts of them.
"""

import hashlib
import warnings
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
)
from huggingface_hub.hf_api import RepoFile

from converter.checkpoints.layout import read_card
from converter.checkpoints.names import CARD, MANIFEST, SIGNATURE, SUMS
from converter.entrypoints.stale_files import leftovers
from converter.entrypoints.verify import verify
from converter.errors import ConverterError, PublishError, VerificationError
from converter.hub.publication import Publication
from converter.hub.publishing import open_repo, plain_refusals, refuses_copies
from converter.manifest import Manifest
from converter.release.licences import licence_name, warn_of_name
from converter.release.manifest import read_manifest_bytes
from converter.runtime import progress
from converter.text.secrets import redacted
from converter.version import __version__

LARGEST_REGULAR = 16_000_000
"""Bytes; the Hub takes files up to 10 MB without large storage and knows them by their git id."""


Files = Mapping[str, tuple[Path, str | None]]
"""Name in the repo -> path, and sha256 as far as it is known."""


@dataclass(frozen=True, slots=True)
class Published:
    """What is on the Hub now.

    Attributes:
        repo_id: ``owner/name``.
        commit: its id.
        url: of the commit.
        pull_request: its URL, if one was opened.
    """

    repo_id: str
    commit: str
    url: str
    pull_request: str | None

    def record(self) -> dict[str, Any]:
        return asdict(self)

    def stands(self, error: ConverterError) -> None:
        """Let an error that came after the commit say that it was made."""
        error.hint = "; ".join(filter(None, [f"commit {self.url} was made and stays", error.hint]))


@dataclass(frozen=True, slots=True)
class Copyable:
    """A file that a repo on the Hub has already.

    Attributes:
        repo_id, commit, name: where.
        local: gives the same file on disk, once, if the Hub will not copy it.
    """

    repo_id: str
    commit: str
    name: str
    local: AbstractContextManager[Path]


@dataclass(frozen=True, slots=True)
class Expected:
    """A file that the commit must hold; ``git`` is the id of its content, if it is small."""

    sha256: str
    size: int
    git: str | None


class Upload:
    """Files on their way into one commit; ``send`` may be called from several threads.

    Args:
        place: of ``check_rights``; the repo and the branch are made here where they are missing.

    Raises:
        PublishError: from every method.
    """

    def __init__(self, place: Publication) -> None:
        self.place, self._api, self._lock = place, HfApi(), Lock()
        self._adds: dict[str, CommitOperationAdd] = {}
        self._copies: dict[str, Copyable] = {}
        self._expected: dict[str, Expected] = {}
        with plain_refusals(place.repo_id):
            open_repo(place)

    def send(self, files: Files) -> None:
        """Upload files, or keep them for the commit if they are small; they may then be deleted.

        Args:
            files: name in the repo -> path, and sha256 as far as it is known.
        """
        adds = {n: CommitOperationAdd(n, str(path)) for n, (path, _) in files.items()}
        with plain_refusals(self.place.repo_id):
            self._api.preupload_lfs_files(
                self.place.repo_id, list(adds.values()),
                revision=self.place.branch, create_pr=self.place.create_pr, num_threads=3,
            )  # fmt: skip
        for name, (path, known) in files.items():
            found = adds[name].upload_info.sha256.hex()
            if known is not None and found != known:
                raise _changed(name, known, found)
            size, git = adds[name].upload_info.size, None
            if size <= LARGEST_REGULAR:
                data = path.read_bytes()
                if (again := hashlib.sha256(data).hexdigest()) != found:
                    raise _changed(name, found, again)
                git = git_id(data)
                if adds[name].path_or_fileobj != b"":  # not uploaded: it goes into the commit
                    adds[name].path_or_fileobj = data
            with self._lock:
                self._adds[name], self._expected[name] = adds[name], Expected(found, size, git)

    def copy(self, name: str, sha256: str, size: int, origin: Copyable) -> None:
        """Let the Hub copy a file that it has; it must be in large storage there."""
        with self._lock:
            self._copies[name], self._expected[name] = origin, Expected(sha256, size, None)

    def commit(self, message: str) -> Published:
        """Make one commit of all files, and see that it holds them.

        ``leftovers`` are deleted by it; other files that are there are left alone, and said. What
        the Hub refuses to copy is uploaded, and then the commit is made.
        """
        with plain_refusals(self.place.repo_id):
            deletes = self._stale()
            try:
                info = self._commit(message, deletes)
            except Exception as error:
                if not self._copies or not refuses_copies(self.place.repo_id, error):
                    raise
                said = redacted(" ".join(str(error).split())[:120])
                progress.note(f"  the Hub does not copy untouched shards ({said}): uploading")
                self._send_copies()
                info = self._commit(message, deletes)
        published = Published(self.place.repo_id, info.oid, info.commit_url, info.pr_url)
        try:
            with plain_refusals(self.place.repo_id):
                self._check(info.oid)
        except PublishError as error:
            published.stands(error)
            raise
        return published

    def _commit(self, message: str, deletes: Iterable[CommitOperationDelete]) -> CommitInfo:
        copies = [
            CommitOperationCopy(origin.name, name, origin.commit, origin.repo_id, "model")
            for name, origin in self._copies.items()
        ]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            info = self._api.create_commit(
                self.place.repo_id,
                [*self._adds.values(), *copies, *deletes],
                commit_message=self.place.message or message,
                revision=self.place.branch,
                create_pr=self.place.create_pr,
            )
        for warning in caught:
            progress.warn(redacted(" ".join(str(warning.message).split())))
        return info

    def _send_copies(self) -> None:
        """Upload from disk what the Hub would not copy."""
        copies, self._copies = self._copies, {}
        for name, origin in copies.items():
            with origin.local as path:
                self.send({name: (path, self._expected[name].sha256)})

    def _files(self, revision: str | None) -> dict[str, RepoFile]:
        tree = self._api.list_repo_tree(self.place.repo_id, recursive=True, revision=revision)
        return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}

    def _stale(self) -> list[CommitOperationDelete]:
        there = self._files(self.place.branch)
        stale = leftovers(self._api, self.place, there, self._expected)
        known = {*stale, *self._expected}
        kept = [name for name in there if name not in known and not name.startswith(".")]
        if stale:
            progress.warn(f"deleted by this commit, of an earlier model: {', '.join(stale)}")
        if kept:
            progress.note(f"  also in {self.place.repo_id}, left alone: {', '.join(kept[:10])}")
        return [CommitOperationDelete(name) for name in stale]

    def _check(self, commit: str) -> None:
        """Compare what the Hub lists of a commit with what was sent."""
        found, wrong = self._files(commit), []
        for name, file in self._expected.items():
            there = found.get(name)
            if there is None or there.size != file.size:
                wrong.append(name)
            elif there.lfs is not None:
                wrong += [name] if there.lfs.sha256 != file.sha256 else []
            elif there.blob_id != file.git:
                wrong.append(name)
        if wrong:
            raise PublishError(
                f"commit {commit} of {self.place.repo_id} does not hold what was uploaded",
                found=f"other content, or none, of {', '.join(wrong[:5])}",
                hint="look for rules in .gitignore there, and run the same command again",
            )


def _changed(name: str, expected: str, found: str) -> PublishError:
    return PublishError(
        f"{name} changed while it was uploaded", expected=f"sha256 {expected[:16]}...",
        found=f"{found[:16]}...", hint="run gloss verify on the folder",
    )  # fmt: skip


def git_id(data: bytes) -> str:
    """The name that git gives to the content of a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def published_files(folder: Path, manifest: Manifest) -> Files:
    """What is published of a checkpoint: what the manifest lists, and what cannot be listed."""
    known = manifest.digests
    own = [name for name in (CARD, MANIFEST, SUMS, SIGNATURE) if (folder / name).is_file()]
    return {n: (folder / n, known.get(n)) for n in (*known, *own)}


def default_message(manifest: Manifest) -> str:
    """Of the commit."""
    return f"{manifest.source.name}, edited by gloss-convert {__version__}"


def untouched(manifest: Manifest, folder: Path) -> dict[str, Copyable]:
    """The shards that are those of a source on the Hub, byte for byte."""
    source, inside = manifest.source, manifest.run.subfolder
    if source.repo_id is None or source.commit is None:
        return {}
    found = {}
    for name, file in manifest.shards.items():
        original = file.source or name
        theirs = source.files.get(original)
        if theirs and theirs.sha256 == file.sha256:
            there = f"{inside.strip('/')}/{original}" if inside else original
            local = nullcontext(folder / name)
            found[name] = Copyable(source.repo_id, source.commit, there, local)
    return found


def push(
    folder: Path, place: Publication, trust_remote_code: bool = False, verified: bool = False
) -> Published:
    """Publish a converted checkpoint, which is verified first.

    Args:
        folder: with a manifest.
        place: of ``check_rights``.
        trust_remote_code: see ``verify``.
        verified: it was written and verified just now.

    Raises:
        VerificationError: it is not what its manifest says; nothing was sent.
        PublishError: the Hub refuses; there is no commit, unless it says so.
    """
    seen: dict[str, str] = {}
    if not verified:
        with progress.stage("verify", f"verifying {folder.name}"):
            if problems := verify(folder, trust_remote_code=trust_remote_code, seen=seen):
                raise VerificationError(
                    f"{folder.name} is not published, for it is not whole",
                    found="; ".join(problems),
                )
    manifest, digest = read_manifest_bytes(folder)
    if digest != (verified_one := seen.get(MANIFEST, digest)):
        raise _changed(MANIFEST, verified_one, digest)
    warn_of_name(licence_name(read_card(folder / CARD)), place)
    listed = published_files(folder, manifest)
    files = {name: (path, seen.get(name, sha256)) for name, (path, sha256) in listed.items()}
    size = sum(path.stat().st_size for path, _ in files.values())
    with progress.stage("upload", f"uploading {size / 1e6:,.1f} MB to {place.repo_id}"):
        upload, copyable = Upload(place), untouched(manifest, folder)
        for name, origin in copyable.items():
            file = manifest.files[name]
            upload.copy(name, file.sha256, file.nbytes, origin)
        upload.send({name: file for name, file in files.items() if name not in copyable})
        return upload.commit(default_message(manifest))
