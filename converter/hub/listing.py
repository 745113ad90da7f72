"""What the Hub says of a repo: its commit and its files, if that can be believed."""

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from converter.errors import SourceError
from converter.text import is_one_line

_REPO_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(@[^\s@]+)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")

Kind = Literal["model", "dataset"]

MAX_FILES = 200_000
"""Of a repo; the Hub advises against more than half of it."""


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


def repo_of(kind: Kind, info: Any, asked: str | None) -> Repo:
    """The repo of an answer, a ``ModelInfo`` or the like.

    Raises:
        SourceError: it names no commit, more files than a repo has, one twice, or one that does not
            lie in it.
    """
    repo_id, commit, siblings = str(info.id), str(info.sha), info.siblings or []
    _believe(_REPO_ID.fullmatch(repo_id), kind, f"the name {repo_id}")
    _believe(_COMMIT.fullmatch(commit), kind, f"the commit {commit}")
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
    """Whether a name from a list is that of a file within a folder, on every system."""
    parts = name.split("/")
    return is_one_line(name) and "\\" not in name and not {"", ".", ".."}.intersection(parts)
