"""A small Hub on the loopback interface: enough of its routes for the real client.

Reading is here, for folders and for what was pushed; writing is in ``hub_uploads``.
"""

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote, urlsplit

from tests.builders.hub_repos import LARGE, Entry, entry_of
from tests.builders.hub_uploads import Dropped, Uploads

COMMIT = "c0ffee" * 6 + "c0ff"
POLL = 0.01
"""Seconds after which the server sees that it is to stop; half a second unless told."""


@dataclass
class HubServer:
    """Serves folders as repos at ``COMMIT``; ``log`` lists the requests, as ``METHOD path range``.

    Attributes:
        models, datasets: repo id -> folder.
        gated: repo ids that answer 403.
        renamed: old repo id -> new one, to which requests are redirected.
        watched, most: a client's cache, and how many shards were in it at most when asked for one.
        uploads: what can be written to, if anything.
    """

    models: dict[str, Path] = field(default_factory=dict)
    datasets: dict[str, Path] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    log: list[str] = field(default_factory=list)
    renamed: dict[str, str] = field(default_factory=dict)
    watched: Path | None = None
    most: int = 0
    uploads: Uploads | None = None

    def __enter__(self) -> Self:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.answer(self)

            do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815 - the base class asks for these names

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(POLL,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        if self.uploads:
            self.uploads.url, self.uploads.origins = self.url, self.origin
        return self

    def __exit__(self, *args: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(request.path).path)
        span = request.headers.get("Range", "")
        self.log.append(f"{request.command} {path} {span}".strip())
        if self.uploads and not self.closed(request, path):
            try:
                answer = self.uploads.answer(request, urlsplit(request.path).path)
            except Dropped:
                return
            if answer is not None:
                status, data, headers = answer
                send(request, status, json.dumps(data).encode(), JSON | headers)
                return
        parts = path.strip("/").split("/")
        if parts[0] == "api":
            kind, repo_id, rest = parts[1], "/".join(parts[2:4]), parts[4:] or ["revision", "main"]
        else:
            kind = "datasets" if parts[0] == "datasets" else "models"
            parts = parts[1:] if kind == "datasets" else parts
            repo_id, rest = "/".join(parts[:2]), parts[2:]
        folder = (self.models if kind == "models" else self.datasets).get(repo_id)
        if self.uploads and repo_id in self.uploads.repos:
            self.answer_pushed(request, repo_id, rest, span)
        elif repo_id in self.renamed:
            place = request.path.replace(repo_id, self.renamed[repo_id])
            send(request, 307, b"", {"Location": place})
        elif repo_id in self.gated:
            send(request, 403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"})
        elif folder is None:
            send(request, 401, b"", {"X-Error-Code": "RepoNotFound"})
        elif not rest or (rest[1] not in (COMMIT, "main", "v1")):
            send(request, 404, b"", {"X-Error-Code": "RevisionNotFound"})
        elif rest[0] == "revision":
            siblings = [
                {"rfilename": name, "size": size, "blobId": "0" * 40} | lfs(folder / name)
                for name, size in listing(folder)
            ]
            info: dict[str, Any] = {"id": repo_id, "sha": COMMIT, "siblings": siblings}
            info |= {"private": False, "disabled": False, "downloads": 0, "likes": 0, "tags": []}
            send_json(request, info)
        elif rest[0] == "tree":
            entries = [
                {"type": "file", "path": name, "size": size, "oid": "0" * 40}
                for name, size in listing(folder)
            ]
            send_json(request, entries)
        elif rest[0] == "paths-info":
            body = request.rfile.read(int(request.headers["Content-Length"])).decode()
            files = self.origin(repo_id)
            send_json(request, [e.listed(n) for n, e in files.items() if n in unquote(body)])
        elif rest[0] == "resolve":
            self.send_file(request, folder / "/".join(rest[2:]), span)
        else:
            send(request, 404, b"", {})

    def origin(self, repo_id: str) -> dict[str, Entry]:
        """The files of a repo that is only read; those in large storage are in Xet's, too."""
        folder = self.models[repo_id]
        return {n: entry_of(folder / n, "ab" * 32) for n, _ in listing(folder)}

    def closed(self, request: BaseHTTPRequestHandler, path: str) -> bool:
        """Whether a request is about a repo that is only read."""
        if "/lfs-files/" in path:
            return False
        parts = path.removeprefix("/api/models").strip("/").split("/")
        return "/".join(parts[:2]) in {*self.models, *self.datasets, *self.gated}

    def answer_pushed(
        self, request: BaseHTTPRequestHandler, repo_id: str, rest: list[str], span: str
    ) -> None:
        """Reading what was pushed."""
        assert self.uploads is not None
        repo = self.uploads.repos[repo_id]
        commit = repo.find("/".join(rest[1:]) if rest[0] != "resolve" else rest[1])
        if repo.private and self.uploads.account(request) is None:
            send(request, 401, b"", {"X-Error-Code": "RepoNotFound"})
        elif commit is None:
            send(request, 404, b"", {"X-Error-Code": "RevisionNotFound"})
        elif rest[0] == "revision":
            siblings = [{"rfilename": name} for name in repo.commits[commit]]
            info: dict[str, Any] = {"id": repo_id, "sha": commit, "siblings": siblings}
            send_json(request, info | {"private": repo.private, "tags": []})
        elif rest[0] == "tree":
            send_json(request, [e.listed(n) for n, e in repo.commits[commit].items()])
        else:
            entry = repo.commits[commit].get("/".join(rest[2:]))
            xet = {}
            if entry and entry.xet:
                route = f"{self.url}/api/models/{repo_id}/xet-read-token/{commit}"
                xet = {"X-Xet-Hash": entry.xet, "X-Xet-Refresh-Route": route}
                xet |= {"X-Linked-Size": str(entry.size), "X-Linked-Etag": f'"{entry.sha256}"'}
            if entry and entry.content is None:
                send(request, 200, b"", xet | {"X-Repo-Commit": commit, "ETag": '"x"'})
            else:
                path = entry.content if entry and entry.content else Path("/nowhere")
                self.send_file(request, path, span, commit)

    def send_file(
        self, request: BaseHTTPRequestHandler, path: Path, span: str, commit: str = COMMIT
    ) -> None:
        if not path.is_file():
            send(request, 404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        if self.watched and path.suffix == ".safetensors":
            self.most = max(self.most, len(list(self.watched.rglob("*.safetensors"))))
        data = path.read_bytes()
        etag = hashlib.sha256(data).hexdigest()
        headers = {"X-Repo-Commit": commit, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        if not span:
            send(request, 200, data, headers)
            return
        first, _, last = span.removeprefix("bytes=").partition("-")
        end = min(int(last or len(data) - 1), len(data) - 1)
        headers["Content-Range"] = f"bytes {first}-{end}/{len(data)}"
        send(request, 206, data[int(first) : end + 1], headers)


def listing(folder: Path) -> list[tuple[str, int]]:
    return sorted(
        (p.relative_to(folder).as_posix(), p.stat().st_size)
        for p in folder.rglob("*")
        if p.is_file()
    )


def lfs(path: Path) -> dict[str, Any]:
    """What the Hub says of a file in large file storage."""
    if path.suffix not in LARGE:
        return {}
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    return {"lfs": {"sha256": digest, "size": len(data), "pointerSize": 130}}


JSON = {"Content-Type": "application/json", "ETag": 'W/"c5a-MYX/vhcSM8wC+lEDgxOoT7BrYXo"'}
"""Headers of lists and the like; the real Hub's ETags have slashes in them there, too."""


def send_json(request: BaseHTTPRequestHandler, data: object) -> None:
    send(request, 200, json.dumps(data).encode(), JSON)


def send(
    request: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str]
) -> None:
    request.send_response(status)
    for name, value in headers.items():
        request.send_header(name, value)
    request.send_header("Content-Length", str(len(body)))
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(body)
