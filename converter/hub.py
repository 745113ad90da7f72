"""Reading from the Hugging Face Hub: a revision becomes a commit, and all reads are at it."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from glob import escape
from pathlib import Path
from typing import Literal

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
    NotASafetensorsRepoError,
    OfflineModeIsEnabled,
    OIDCError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    SafetensorsParsingError,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from converter.errors import OptionError, SourceError
from converter.header import Header, TensorInfo

_REPO_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(@[^\s@]+)?")

Kind = Literal["model", "dataset"]


@dataclass(frozen=True, slots=True)
class Repo:
    """A Hub repo at a commit.

    Attributes:
        kind: ``model`` or ``dataset``.
        repo_id: ``owner/name``; after a renaming, the new one.
        revision: as asked for, or None.
        commit: what it resolved to.
        sizes: file name -> bytes; empty when the Hub was not asked because we are offline.
        sha256: file name -> digest, of files in large file storage.
        gated: whether its terms have to be accepted before it can be downloaded.
    """

    kind: Kind
    repo_id: str
    revision: str | None
    commit: str
    sizes: dict[str, int]
    sha256: dict[str, str] = field(default_factory=dict)
    gated: bool = False


def looks_like_repo(text: str) -> bool:
    """Whether ``text`` can be a repo id with an optional ``@revision``, rather than a path."""
    return _REPO_ID.fullmatch(text) is not None and not text.startswith(".")


def check_repo_id(option: str, text: str) -> None:
    """Raise OptionError if ``text`` cannot be a repo id."""
    try:
        validate_repo_id(text)
    except HFValidationError as error:
        raise OptionError(option, expected="a repo id such as owner/name", found=text) from error


@contextmanager
def plain_errors(kind: Kind, name: str) -> Iterator[None]:
    """Turn what the client raises into one sentence about the repo ``name``.

    Raises:
        SourceError: gated, missing, offline, or the Hub answered with an error.
    """
    what = f"{kind} {name}"
    local = "folder" if kind == "model" else "file"
    try:
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
    except (NotASafetensorsRepoError, SafetensorsParsingError) as error:
        raise SourceError(f"{what}: unreadable safetensors header", found=str(error)) from error
    except (HTTPError, OSError) as error:  # what is left of the network: no route, a broken pipe
        raise SourceError(
            f"{what} cannot be read from the Hub",
            found=str(error) or type(error).__name__,
            hint=f"there is no local {local} of that name either; check the network and the disk "
            "of HF_HOME, or give a path",
        ) from error


def resolve(kind: Kind, text: str) -> Repo:
    """Resolve ``owner/name[@revision]`` to a commit and list its files.

    Without a network, or with HF_HUB_OFFLINE, a repo that is in the client's cache is used.

    Raises:
        SourceError: see ``plain_errors``.
    """
    repo_id, _, revision = text.partition("@")
    asked = revision or None
    with plain_errors(kind, text):
        try:
            info = HfApi().repo_info(repo_id, repo_type=kind, revision=asked, files_metadata=True)
        except OfflineModeIsEnabled:
            return Repo(kind, repo_id, asked, _cached(kind, repo_id, asked).name, {})
    siblings = getattr(info, "siblings", None) or []
    sizes = {entry.rfilename: entry.size or 0 for entry in siblings}
    digests = {entry.rfilename: str(entry.lfs.sha256) for entry in siblings if entry.lfs}
    gated = bool(getattr(info, "gated", False))
    return Repo(kind, str(info.id), asked, str(info.sha), sizes, digests, gated)


def download(repo: Repo, names: Iterable[str], *, first: bool = False) -> Path:
    """Fetch files of a repo at its commit into the client's cache; their folder is returned.

    Args:
        repo: resolved.
        names: files.
        first: ask for the revision by its name, as the first call should: the client then remembers
            what it means, and a later run finds it offline.

    Raises:
        SourceError: see ``plain_errors``; or the revision has moved since it was resolved.
    """
    with plain_errors(repo.kind, repo.repo_id):
        if not repo.sizes:
            return _cached(repo.kind, repo.repo_id, repo.commit)
        folder = Path(
            snapshot_download(
                repo.repo_id,
                repo_type=repo.kind,
                revision=repo.revision if first else repo.commit,
                allow_patterns=[escape(name) for name in names],
            )
        )
    if folder.name != repo.commit:
        raise SourceError(
            f"{repo.kind} {repo.repo_id} changed while it was read",
            expected=f"commit {repo.commit}",
            found=folder.name,
            hint="run again, or name a commit after @",
        )
    return folder


def _cached(kind: Kind, repo_id: str, revision: str | None) -> Path:
    """What the client's cache holds of a revision, complete or not."""
    try:
        return Path(
            snapshot_download(repo_id, repo_type=kind, revision=revision, local_files_only=True)
        )
    except IncompleteSnapshotError as error:  # we never fetch a repo whole
        return Path(error.snapshot_path)


def forget(path: Path) -> None:
    """Delete a downloaded file from the client's cache: the link of the snapshot and the blob."""
    blob = path.resolve()
    path.unlink(missing_ok=True)
    blob.unlink(missing_ok=True)


def remote_header(repo: Repo, name: str) -> Header:
    """The header of one safetensors file, by range requests; no weights are fetched.

    Raises:
        SourceError: see ``plain_errors``.
    """
    with plain_errors(repo.kind, repo.repo_id):
        parsed = HfApi().parse_safetensors_file_metadata(repo.repo_id, name, revision=repo.commit)
    end = max((info.data_offsets[1] for info in parsed.tensors.values()), default=0)
    start = repo.sizes[name] - end
    tensors = {
        key: TensorInfo(
            key,
            info.dtype,
            tuple(info.shape),
            start + info.data_offsets[0],
            start + info.data_offsets[1],
        )
        for key, info in parsed.tensors.items()
    }
    return Header(start, repo.sizes[name], tensors)
