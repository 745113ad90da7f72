"""What the small Hub keeps: accounts, files, and repos with their commits."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

TOKEN, READER = "hf_" + "w" * 34, "hf_" + "r" * 34
LARGE = (".safetensors", ".bin", ".pth", ".model")
"""Endings of files that go into large storage."""

Request = BaseHTTPRequestHandler


@dataclass
class Account:
    """Whose a token is: a name, organisations with roles, and what the token may do."""

    name: str
    role: str = "write"
    orgs: dict[str, str] = field(default_factory=dict)
    scoped: list[dict[str, Any]] | None = None

    def whoami(self) -> dict[str, Any]:
        orgs = [{"name": name, "roleInOrg": role} for name, role in self.orgs.items()]
        token: dict[str, Any] = {"displayName": "ci", "role": self.role}
        if self.scoped is not None:
            token["fineGrained"] = {"scoped": self.scoped}
        return {"name": self.name, "orgs": orgs, "auth": {"accessToken": token}}

    def may_write(self, repo_id: str) -> bool:
        owner = repo_id.partition("/")[0]
        return self.role != "read" and (owner == self.name or self.orgs.get(owner) == "write")


@dataclass(frozen=True)
class Entry:
    """A file of a commit; ``content`` is on disk, unless it is in Xet's storage only."""

    size: int
    sha256: str
    git: str
    large: bool
    xet: str | None
    content: Path | None

    def listed(self, name: str) -> dict[str, Any]:
        """As in a tree."""
        found: dict[str, Any] = {"type": "file", "path": name, "size": self.size, "oid": self.git}
        if self.large:
            found["lfs"] = {"oid": self.sha256, "size": self.size, "pointerSize": 130}
        return found | ({"xetHash": self.xet} if self.xet else {})


def entry_of(path: Path, xet: str | None = None) -> Entry:
    """A file of a folder."""
    data = path.read_bytes()
    git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    sha256, large = hashlib.sha256(data).hexdigest(), path.suffix in LARGE
    return Entry(len(data), sha256, git, large, xet if large else None, path)


@dataclass
class Repo:
    """A repo that can be written to: its branches, and what each commit holds."""

    private: bool
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, Entry]] = field(default_factory=dict)
    pulls: int = 0

    def __post_init__(self) -> None:
        self.add("main", {})

    def add(self, ref: str, files: dict[str, Entry]) -> str:
        """A new commit on top of a branch."""
        text = f"{sorted(files)} {ref} {len(self.commits)}"
        commit = hashlib.sha1(text.encode()).hexdigest()
        self.refs[ref], self.commits[commit] = commit, files
        return commit

    def find(self, revision: str) -> str | None:
        found = self.refs.get(revision, revision)
        return found if found in self.commits else None


def body_of(request: Request, at_most: int = 1 << 16) -> Iterator[bytes]:
    """The pieces of a request's body, sent with its length or in chunks."""
    if request.headers.get("Transfer-Encoding") == "chunked":
        while count := int(request.rfile.readline().split(b";")[0], 16):
            yield request.rfile.read(count)
            request.rfile.readline()
        request.rfile.readline()
        return
    left = int(request.headers.get("Content-Length", 0))
    while left:
        piece = request.rfile.read(min(left, at_most))
        if not piece:
            return
        left -= len(piece)
        yield piece
