"""One commit on the Hub: upload every file, commit them all at once, then check the commit.

Nothing is visible before the commit. The next attempt does not send uploaded files again: the Hub
recognises files in large storage by their sha256, and with Xet also parts of them.
"""

import hashlib
import warnings
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
)
from huggingface_hub.hf_api import RepoFile

from converter.checkpoints.layout import read_json
from converter.checkpoints.names import MANIFEST, SIGNATURE
from converter.errors import CheckpointError, ConverterError, PublishError
from converter.hub.publishing import open_repo, plain_refusals, refuses_copies
from converter.recipe import Publication
from converter.runtime import progress
from converter.runtime.cache import temporary_folder
from converter.text import redacted
from converter.version import __version__

_LARGEST_REGULAR = 16_000_000
"""Bytes; the Hub takes files up to 10 MB without large storage and knows them by their git id."""

_LOADED = (".safetensors", ".safetensors.index.json", "adapter_config.json")
"""Endings of files in the repo's main folder that belong to a model only if its manifest lists
them. A loader would read the leftovers of an earlier model; transformers prefers an adapter to a
model.
"""

Files = Mapping[str, tuple[Path, str | None]]
"""Name in the repo -> path, and sha256 if it is known."""


@dataclass(frozen=True, slots=True)
class Published:
    """A published commit, its URL, and the URL of a pull request if one was opened."""

    repo_id: str
    commit: str
    url: str
    pull_request: str | None

    def stands(self, error: ConverterError) -> None:
        """Make an error after the commit name the commit."""
        error.hint = "; ".join(filter(None, [f"commit {self.url} was made and stays", error.hint]))


@dataclass(frozen=True, slots=True)
class Copyable:
    """A file that a repo on the Hub has already.

    Attributes:
        repo_id, commit, name: where.
        local: provides the same file on disk, once, if the Hub does not copy it.
    """

    repo_id: str
    commit: str
    name: str
    local: AbstractContextManager[Path]


@dataclass(frozen=True, slots=True)
class _Expected:
    """A file that the commit must hold; ``git`` is the id of its content, if it is small."""

    sha256: str
    size: int
    git: str | None


class Upload:
    """Files on their way into one commit; ``send`` may be called from several threads.

    Args:
        place: of ``check_rights``. A missing repo or branch is created here.

    Raises:
        PublishError: from every method.
    """

    def __init__(self, place: Publication) -> None:
        self.place, self._api, self._lock = place, HfApi(), Lock()
        self._adds: dict[str, CommitOperationAdd] = {}
        self._copies: dict[str, Copyable] = {}
        self._expected: dict[str, _Expected] = {}
        with plain_refusals(place.repo_id):
            open_repo(place)

    def send(self, files: Files) -> None:
        """Upload files, or keep them for the commit if they are small; they may then be deleted."""
        adds = {n: CommitOperationAdd(n, str(path)) for n, (path, _) in files.items()}
        with plain_refusals(self.place.repo_id):
            self._api.preupload_lfs_files(
                self.place.repo_id, list(adds.values()),
                revision=self.place.branch, create_pr=self.place.create_pr, num_threads=3,
            )  # fmt: skip
        for name, (path, known) in files.items():
            found = adds[name].upload_info.sha256.hex()
            if known is not None and found != known:
                raise changed(name, known, found)
            size, git = adds[name].upload_info.size, None
            if size <= _LARGEST_REGULAR:
                data = path.read_bytes()
                if (again := hashlib.sha256(data).hexdigest()) != found:
                    raise changed(name, found, again)
                content = b"blob %d\0" % len(data) + data  # the header that git hashes
                git = hashlib.sha1(content, usedforsecurity=False).hexdigest()
                if adds[name].path_or_fileobj != b"":  # not uploaded: it goes into the commit
                    adds[name].path_or_fileobj = data
            with self._lock:
                self._adds[name], self._expected[name] = adds[name], _Expected(found, size, git)

    def copy(self, name: str, sha256: str, size: int, origin: Copyable) -> None:
        """Let the Hub copy a file that it has; it must be in large storage there."""
        with self._lock:
            self._copies[name], self._expected[name] = origin, _Expected(sha256, size, None)

    def commit(self, source: str) -> Published:
        """Make one commit of all files, with a message that names the source, and check its
        contents.

        The commit deletes the files of an earlier version. Other files stay, and a message names
        them. Files that the Hub refuses to copy are uploaded before the commit.
        """
        with plain_refusals(self.place.repo_id):
            deletes = self._stale()
            message = self.place.message or f"{source}, edited by gloss-convert {__version__}"
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
                commit_message=message,
                revision=self.place.branch,
                create_pr=self.place.create_pr,
            )
        for warning in caught:
            progress.warn(redacted(" ".join(str(warning.message).split())))
        return info

    def _send_copies(self) -> None:
        """Upload from disk the files that the Hub did not copy."""
        copies, self._copies = self._copies, {}
        for name, origin in copies.items():
            with origin.local as path:
                self.send({name: (path, self._expected[name].sha256)})

    def _files(self, revision: str | None) -> dict[str, RepoFile]:
        tree = self._api.list_repo_tree(self.place.repo_id, recursive=True, revision=revision)
        return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}

    def _stale(self) -> list[CommitOperationDelete]:
        """Deletions of files that belong to an earlier version, and not to the new one.

        These are weights, a signature, and the files that the repo's manifest lists.
        """
        there = self._files(self.place.branch)
        listed = self._listed() if MANIFEST in there else set()
        others = [name for name in there if name not in self._expected]
        stale = [name for name in others if name in listed or _is_loaded(name)]
        kept = [name for name in others if name not in stale and not name.startswith(".")]
        if stale:
            progress.warn(f"deleted by this commit, of an earlier model: {', '.join(stale)}")
        if kept:
            progress.note(f"  also in {self.place.repo_id}, left alone: {', '.join(kept[:10])}")
        return [CommitOperationDelete(name) for name in stale]

    def _listed(self) -> set[str]:
        """The files that the branch's present manifest lists; none if it is malformed."""
        place = self.place
        with temporary_folder() as folder:
            path = self._api.hf_hub_download(
                place.repo_id, MANIFEST, revision=place.branch, local_dir=folder
            )
            try:
                files = read_json(Path(path)).get("files")
            except CheckpointError:
                return set()
        if not isinstance(files, dict):
            return set()
        return {name for name in files if not name.startswith(".")}  # none is .gitattributes

    def _check(self, commit: str) -> None:
        """Compare the Hub's list of a commit's files with the files that were sent."""
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


def _is_loaded(name: str) -> bool:
    return name == SIGNATURE or ("/" not in name and name.endswith(_LOADED))


def changed(name: str, expected: str, found: str) -> PublishError:
    """The error that says so."""
    return PublishError(
        f"{name} changed while it was uploaded", expected=f"sha256 {expected[:16]}...",
        found=f"{found[:16]}...", hint="run gloss verify on the folder",
    )  # fmt: skip
