"""The half of the small Hub that is written to: accounts, repos, large files, commits."""

import base64
import hashlib
import json
import shutil
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from tests.builders.hub_repos import (
    LARGE,
    READER,
    TOKEN,
    Account,
    Entry,
    Repo,
    Request,
    body_of,
    entry_of,
)
from tests.builders.hub_xet import xet_hash_of


@dataclass
class Fault:
    """What goes wrong: requests whose ``METHOD path`` contains ``route``, ``times`` of them.

    ``status`` 0 breaks the connection in the middle of what is sent, -1 never answers.
    """

    route: str
    status: int
    times: int = 1000
    body: dict[str, Any] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)


class Dropped(Exception):  # noqa: N818 - it is what was asked for
    """The connection was broken; there is nothing to answer."""


@dataclass
class Uploads:
    """State of what was written. Files in large storage are in ``root/objects``.

    Attributes:
        chunk: bytes of a part, above which files are sent in parts.
        xet: a folder that hf_xet uses as its storage, or None.
        origins: gives the files of a repo that is only read.
        ignored: files that a .gitignore leaves out.
        stuck: set when a fault of status -1 has begun.
    """

    root: Path
    origins: Callable[[str], dict[str, Entry]] = lambda repo_id: {}
    chunk: int | None = None
    xet: Path | None = None
    repos: dict[str, Repo] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    ignored: set[str] = field(default_factory=set)
    stuck: threading.Event = field(default_factory=threading.Event)
    sent: list[str] = field(default_factory=list)
    accounts: dict[str, Account] = field(default_factory=lambda: {
        TOKEN: Account("someone", "write", {"acme": "write", "readers": "read"}),
        READER: Account("someone", "read"),
    })  # fmt: skip

    def __post_init__(self) -> None:
        self.objects = self.root / "objects"
        self.objects.mkdir(parents=True)
        self.url = ""

    def account(self, request: Request) -> Account | None:
        return self.accounts.get(request.headers.get("Authorization", "").removeprefix("Bearer "))

    def answer(self, request: Request, path: str) -> tuple[int, Any, dict[str, str]] | None:
        """What to answer; None if it is not for us."""
        for fault in self.faults:
            if fault.route in f"{request.command} {path}" and fault.times > 0:
                fault.times -= 1
                return self._fail(request, fault)
        if request.command == "PUT":
            return self._put(request, path)
        body = b"".join(body_of(request)) if request.command == "POST" else b""
        account = self.account(request)
        parts = path.strip("/").split("/")
        if path == "/api/whoami-v2":
            return (200, account.whoami(), {}) if account else (401, {"error": "no such token"}, {})
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}, {}
        if path == "/api/repos/create":
            return self._create(account, json.loads(body))
        if ".git/info/lfs" in path:
            return 200, self._batch(json.loads(body)), {}
        if parts[0] == "objects":
            return self._completed(parts, json.loads(body))
        if len(parts) < 5 or parts[:2] != ["api", "models"]:
            return None
        repo_id, verb = "/".join(parts[2:4]), parts[4]
        revision = unquote(parts[5]) if len(parts) > 5 else "main"
        if verb == "lfs-files":
            return self._duplicate(repo_id, json.loads(body))
        repo = self.repos.get(repo_id)
        if repo is None:
            return None
        if verb in ("commit", "branch", "preupload", "auth-check", "xet-write-token"):
            proposed = "create_pr" in request.path
            if account is None or not (account.may_write(repo_id) or proposed):
                return 403, {"error": "Forbidden"}, {}
        if verb == "auth-check":
            return 200, {}, {}
        if verb == "branch":
            known = revision in repo.refs
            repo.refs.setdefault(revision, repo.refs["main"])
            return (409 if known else 200), {}, {}
        if verb.startswith("xet-") and self.xet is not None:
            token = {"accessToken": "x", "exp": int(time.time()) + 3600}
            headers = {"X-Xet-Cas-Url": f"local://{self.xet}", "X-Xet-Access-Token": "x"}
            headers["X-Xet-Token-Expiration"] = str(token["exp"])
            return 200, token | {"casUrl": f"local://{self.xet}"}, headers
        commit = repo.find(revision)
        if commit is None:
            return 404, {"error": "no such revision"}, {"X-Error-Code": "RevisionNotFound"}
        if verb == "preupload":
            there, asked = repo.commits[commit], json.loads(body)["files"]
            return 200, {"files": [self._mode(file, there.get(file["path"])) for file in asked]}, {}
        if verb == "commit":
            lines = [json.loads(line) for line in body.splitlines()]
            return self._commit(repo_id, revision, lines, "create_pr" in request.path)
        if verb == "paths-info":
            return 200, [e.listed(n) for n, e in repo.commits[commit].items() if n in str(body)], {}
        return None

    def _fail(self, request: Request, fault: Fault) -> tuple[int, Any, dict[str, str]]:
        if fault.status > 0:
            b"".join(body_of(request))
            return fault.status, fault.body, fault.headers
        next(body_of(request, 1000), None)
        if fault.status < 0:
            self.stuck.set()
            time.sleep(600)
        request.close_connection = True
        request.connection.shutdown(socket.SHUT_RDWR)
        raise Dropped

    def _create(self, account: Account | None, asked: dict[str, Any]) -> tuple[int, Any, Any]:
        assert account is not None
        repo_id = f"{asked['organization'] or account.name}/{asked['name']}"
        if not account.may_write(repo_id):
            return 403, {"error": "You may not create a repo there"}, {}
        url = {"url": f"{self.url}/{repo_id}"}
        if repo_id in self.repos:
            return 409, {"error": "You already created this model repo", **url}, {}
        self.repos[repo_id] = Repo(asked.get("visibility") == "private")
        return 200, url, {}

    def _mode(self, file: dict[str, Any], there: Entry | None) -> dict[str, Any]:
        """How a file is to be sent, and what is there in its place."""
        large = file["path"].endswith(LARGE)
        mode: dict[str, Any] = {"uploadMode": "lfs" if large else "regular"}
        mode |= {"shouldIgnore": file["path"] in self.ignored}
        oid = {"oid": there.sha256 if there.large else there.git} if there else {}
        return {"path": file["path"], **mode, **oid}

    def _batch(self, asked: dict[str, Any]) -> dict[str, Any]:
        """LFS: where to send what is not there yet, whole or in parts."""
        answers = []
        for file in asked["objects"]:
            oid, size = file["oid"], file["size"]
            answer = {"oid": oid, "size": size}
            if not (self.objects / oid).exists():
                place = f"{self.url}/objects/{oid}"
                verify = {"href": f"{place}/verify"}
                upload: dict[str, Any] = {"href": place}
                if self.chunk and size > self.chunk:
                    count = -(-size // self.chunk)
                    parts = {str(n): f"{place}/{n}?signed=secret" for n in range(1, count + 1)}
                    upload = {"href": f"{place}/complete/{count}"}
                    upload["header"] = {"chunk_size": str(self.chunk), **parts}
                answer["actions"] = {"upload": upload, "verify": verify}
            answers.append(answer)
        return {"transfer": "multipart" if self.chunk else "basic", "objects": answers}

    def _put(self, request: Request, path: str) -> tuple[int, Any, dict[str, str]]:
        """An object, or a part of one; it is there once all of it is."""
        _, oid, *part = path.strip("/").split("/")
        target = self.objects / ".".join([oid, *part])
        arriving = target.with_name(f"{target.name}.arriving")
        with arriving.open("wb") as file:
            for piece in body_of(request):
                file.write(piece)
        self.sent.append(target.name)
        arriving.rename(target)
        return 200, {}, {"ETag": '"part"'}

    def _completed(self, parts: list[str], asked: dict[str, Any]) -> tuple[int, Any, Any]:
        """``complete``: the parts become an object. ``verify``: it is what was announced."""
        _, oid, verb, *count = parts
        if verb == "complete":
            with (self.objects / f"{oid}.arriving").open("wb") as file:
                for n in range(1, int(count[0]) + 1):
                    part = self.objects / f"{oid}.{n}"
                    file.write(part.read_bytes())
                    part.unlink()
            (self.objects / f"{oid}.arriving").rename(self.objects / oid)
            return 200, {}, {}
        found = entry_of(self.objects / oid)
        good = (found.sha256, found.size) == (asked["oid"], asked["size"])
        return (200 if good else 400), {}, {}

    def _duplicate(self, repo_id: str, asked: dict[str, Any]) -> tuple[int, Any, Any]:
        """Copy files in large storage from a repo to another one."""
        known = {entry.sha256: entry for entry in self.origins(repo_id).values()}
        for file in asked["files"]:
            content = known[file["sha256"]].content
            assert content is not None
            shutil.copyfile(content, self.objects / file["sha256"])
        return 200, {"failed": []}, {}

    def _commit(
        self, repo_id: str, revision: str, lines: list[dict[str, Any]], proposed: bool
    ) -> tuple[int, Any, Any]:
        repo = self.repos[repo_id]
        files = dict(repo.commits[repo.refs[revision]])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                data = base64.b64decode(value["content"])
                path = self.objects / hashlib.sha256(data).hexdigest()
                path.write_bytes(data)
                files[value["path"]] = entry_of(path)
            elif line["key"] == "lfsFile":
                found = self._stored(value)
                if found is None:
                    return 400, {"error": f"{value['path']} points to no file"}, {}
                files[value["path"]] = found
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        answer: dict[str, Any] = {}
        if proposed:
            repo.pulls += 1
            revision = f"refs/pr/{repo.pulls}"
            answer["pullRequestUrl"] = f"{self.url}/{repo_id}/discussions/{repo.pulls}"
        commit = repo.add(revision, files)
        url = f"{self.url}/{repo_id}/commit/{commit}"
        return 200, {"success": True, "commitOid": commit, "commitUrl": url, **answer}, {}

    def _stored(self, value: dict[str, Any]) -> Entry | None:
        """A file in large storage, that of LFS or Xet's."""
        path = self.objects / value["oid"]
        if path.exists():
            found = entry_of(path)
            return Entry(found.size, found.sha256, "0" * 40, True, None, path)
        hashed = self.xet and xet_hash_of(self.xet, value["oid"])
        return Entry(value["size"], value["oid"], "0" * 40, True, hashed, None) if hashed else None
