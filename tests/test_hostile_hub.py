"""A server that lies: what it says of a repo, of a file, and of the bytes that it sends."""

import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from converter.checkpoints.source import remote_header
from converter.errors import CheckpointError, SourceError
from converter.hub import limits as hub_guard
from converter.hub import repos as hub
from tests.builders.errors import refused
from tests.builders.hub_client import connect
from tests.builders.hub_server import COMMIT, HubServer, send, send_json

Request = BaseHTTPRequestHandler
Lie = Callable[[Request, str], bool]

MARKS = {"X-Repo-Commit": COMMIT, "ETag": '"x1"'}
CONFIG, WEIGHTS = b'{"model_type": "llama"}', b"0123456789"


class LyingServer(HubServer):
    """Asks ``lie`` first, with the request and its path; true if that has answered."""

    lie: Lie = staticmethod(lambda request, path: False)
    tokens: list[str]

    def answer(self, request: Request) -> None:
        self.tokens.append(request.headers.get("Authorization", ""))
        if not self.lie(request, request.path):
            super().answer(request)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LyingServer]:
    """A repo of two files, and a client in this process that asks for it."""
    folder = tmp_path / "repo"
    folder.mkdir()
    (folder / "config.json").write_bytes(CONFIG)
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    server = LyingServer({"someone/tiny": folder})
    server.tokens = []
    with server:
        connect(monkeypatch, server.url, tmp_path / "a/b/c/d/cache")
        monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnopqrstuvwxyz")
        yield server


def listed(files: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """The answer about a repo."""
    info = {"id": "someone/tiny", "sha": COMMIT, "siblings": files, "tags": [], "downloads": 0}
    return {**info, "private": False, "disabled": False, "likes": 0, **more}


FILES = [
    {"rfilename": "config.json", "size": len(CONFIG)},
    {"rfilename": "model.safetensors", "size": len(WEIGHTS)},
]


Noticed = Callable[..., None]


@pytest.fixture
def noticed(server: LyingServer, tmp_path: Path) -> Noticed:
    """Reading the repo from a server that lies ends in an error of these fields, in one line.

    Nothing may be written but the repo and the cache.
    """

    def check(lie: Lie, *names: str, **fields: str) -> None:
        server.lie = lie
        with refused(SourceError, **fields) as caught:
            read(names)
        assert str(caught.value).isprintable()
        cache = tmp_path / "a/b/c/d/cache"
        written = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert all(path.is_relative_to(cache) or path.parent.name == "repo" for path in written)

    return check


def answering(
    body: Any, at: str = "/resolve/", status: int = 200, headers: Mapping[str, str] = MARKS
) -> Lie:
    """This, as JSON unless it is bytes, to whatever has ``at`` in its path."""

    def lie(request: Request, path: str) -> bool:
        if at not in path:
            return False
        if isinstance(body, bytes):
            send(request, status, body, dict(headers))
        else:
            send_json(request, body)
        return True

    return lie


def repo_of(size: int) -> hub.Repo:
    """With weights of so many bytes."""
    return hub.Repo("model", "someone/tiny", None, COMMIT, {"model.safetensors": size})


def read(names: tuple[str, ...]) -> Path:
    """A repo resolved and fetched."""
    repo = hub.resolve("model", "someone/tiny")
    return repo.download(names or list(repo.sizes), first=True)


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (listed([{"rfilename": "../x", "size": 1}]), "the file name ../x"),
        (listed([{"rfilename": "/etc/x", "size": 1}]), "the file name /etc/x"),
        (listed([{"rfilename": "a\\x", "size": 1}]), r"the file name a\x"),
        (listed([{"rfilename": "a//x", "size": 1}]), "the file name a//x"),
        (listed([{"rfilename": "a\x1b[2J", "size": 1}]), "the file name a\x1b[2J"),
        (listed(2 * FILES), "the file config.json twice"),
        (listed(FILES, sha="../../x"), "the commit ../../x"),
        (listed(FILES, sha=None), "the commit None"),
        (listed(FILES, id="../../x"), "the name ../../x"),
        (listed([{"rfilename": "x", "size": -1}]), "x of -1 bytes"),
        (listed([{"rfilename": "x", "size": "1"}]), "x of 1 bytes"),
        (listed([{"rfilename": "x", "size": 1, "lfs": {"sha256": "..", "size": 1,
          "pointerSize": 1}}]), "x with sha256 .."),
        (listed([{"rfilename": 7, "size": 1}]), "the file name 7"),
    ],
)  # fmt: skip
def test_a_listing_that_no_hub_gives_is_refused(answer: Any, found: str, noticed: Noticed) -> None:
    what = "what the Hub answers cannot be that of a model"
    noticed(answering(answer, at=""), what=what, found=found)


SENSELESS = "model someone/tiny: what the Hub answers makes no sense"


@pytest.mark.parametrize("answer", [listed([{"size": 1}]), [], None])
def test_an_answer_that_is_no_listing_is_refused(answer: Any, noticed: Noticed) -> None:
    noticed(answering(answer, at=""), what=SENSELESS)


def test_a_listing_without_end_is_not_read_to_the_end(
    noticed: Noticed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_guard, "MAX_ANSWER", 1_000_000)
    noticed(endless("/api/"), found="an answer of more than 1,000,000 bytes")
    monkeypatch.setattr(hub, "MAX_FILES", 1)
    noticed(lambda request, path: False, found="a list of 2 files")


def endless(start: str) -> Lie:
    """Bytes for as long as somebody reads them, for whatever begins like this."""

    def lie(request: Request, path: str) -> bool:
        if request.command != "GET" or not path.startswith(start):
            return False
        request.send_response(200)
        request.send_header("Transfer-Encoding", "chunked")
        request.send_header("X-Repo-Commit", COMMIT)
        request.end_headers()
        piece = b"[" * 65536
        try:
            while True:
                request.wfile.write(b"10000\r\n" + piece + b"\r\n")
        except OSError:
            request.close_connection = True
        return True

    return lie


def test_a_file_without_end_is_not_fetched_to_the_end(
    noticed: Noticed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_guard, "SLACK", 1_000_000)
    found = "more than the 23 bytes that were listed"
    noticed(endless("/someone"), "config.json", found=found)
    assert not list(tmp_path.rglob("*.incomplete"))
    with refused(CheckpointError, found="a length field of 6,..."):
        remote_header(repo_of(10), "model.safetensors")


def test_a_commit_that_moves_on_is_noticed(noticed: Noticed) -> None:
    asked: list[str] = []

    def lie(request: Request, path: str) -> bool:
        if not path.startswith("/api/") or "/tree/" in path:
            return False
        asked.append(path)
        send_json(request, listed(FILES, sha=COMMIT if len(asked) == 1 else "beef" * 10))
        return True

    noticed(lie, what="model someone/tiny has no such revision")
    assert len(asked) > 1


@pytest.mark.parametrize("body", [CONFIG[:-1], CONFIG + b" ", b""])
def test_a_file_of_another_size_than_listed_is_refused_and_not_kept(
    body: bytes, noticed: Noticed, tmp_path: Path
) -> None:
    what = "config.json of model someone/tiny is not the file that the Hub lists"
    sizes = {"expected": "23 bytes", "found": f"{len(body)} bytes"}
    noticed(answering(body, at="config.json"), "config.json", what=what, **sizes)
    assert not list((tmp_path / "a").rglob("config.json"))


def test_weights_with_another_sha256_than_listed_are_refused_and_not_kept(
    noticed: Noticed, server: LyingServer, tmp_path: Path
) -> None:
    name, other = "model.safetensors", WEIGHTS[::-1]
    what = f"{name} of model someone/tiny is not the file that the Hub lists"
    expected, found = (f"sha256 {hashlib.sha256(data).hexdigest()}" for data in (WEIGHTS, other))
    noticed(answering(other, at=name), name, what=what, expected=expected, found=found)
    assert not list((tmp_path / "a").rglob(name))
    server.lie = lambda request, path: False  # the next run gets the right one
    assert (read((name,)) / name).read_bytes() == WEIGHTS


@pytest.mark.parametrize(
    "headers",
    [
        {"ETag": '"../../../../../../evil"'},
        {"ETag": '"FOLDER/evil"'},
        {"ETag": '".."'},
        {"X-Linked-Etag": '"a/../../b"'},
        {"X-Repo-Commit": "../../../../../evil"},
    ],
)
def test_a_header_that_leads_out_of_the_cache_is_refused(
    headers: dict[str, str], noticed: Noticed, tmp_path: Path
) -> None:
    said = {name: text.replace("FOLDER", str(tmp_path)) for name, text in headers.items()}
    noticed(answering(CONFIG, headers=MARKS | said), "config.json", what=SENSELESS)
    assert not list(tmp_path.rglob("*evil*"))


def test_a_file_that_is_gone_is_one_sentence(noticed: Noticed) -> None:
    gone = answering(b"", status=404, headers={"X-Error-Code": "EntryNotFound"})
    noticed(gone, what="model someone/tiny: the Hub refused")


def test_a_body_that_breaks_off_is_one_sentence(noticed: Noticed) -> None:
    def lie(request: Request, path: str) -> bool:
        if request.command != "GET" or "/resolve/" not in path:
            return False
        request.send_response(200)
        request.send_header("Content-Length", str(len(CONFIG)))
        request.send_header("X-Repo-Commit", COMMIT)
        request.end_headers()
        request.wfile.write(CONFIG[:5])
        request.close_connection = True
        return True

    what = "model someone/tiny cannot be read from the Hub"
    noticed(lie, "config.json", what=what)
    with refused(SourceError, what=what):
        remote_header(repo_of(10**6), "model.safetensors")


def test_a_token_does_not_travel_to_another_host(server: LyingServer) -> None:
    """Neither with a file nor with a header, wherever the Hub sends us for them."""
    seen: list[str | None] = []

    class Elsewhere(Request):
        def do_GET(self) -> None:
            seen.append(self.headers.get("Authorization"))
            send(self, 200, CONFIG, MARKS)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *args: Any) -> None:
            pass

    other = ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere)
    threading.Thread(target=other.serve_forever, args=(0.02,), daemon=True).start()
    place = f"http://localhost:{other.server_address[1]}/x"

    linked = {"X-Linked-Etag": '"x1"', "X-Linked-Size": str(len(CONFIG))}
    headers = {"Location": place, "X-Repo-Commit": COMMIT, **linked}
    server.lie = answering(b"", status=302, headers=headers)
    try:
        repo = hub.resolve("model", "someone/tiny")
        folder = repo.download(["config.json"])
        assert (folder / "config.json").read_bytes() == CONFIG
        with refused(CheckpointError, found="a length field of 6,..."):  # CONFIG as a header
            remote_header(repo, "model.safetensors")
    finally:
        other.shutdown()
        other.server_close()
    assert len(seen) >= 2
    assert set(seen) == {None}
    assert any("hf_abc" in token for token in server.tokens)  # where it belongs


def test_a_hostile_header_of_a_shard_is_read_as_a_file_would_be(server: LyingServer) -> None:
    """Whether it fits into the first part that is asked for or not, and without ranges, too."""
    folder = server.models["someone/tiny"]
    for header, what in (
        (
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
            "model.safetensors: tensor a leaves a hole or an overlap",
        ),
        (
            json.dumps({"x" * 150_000: 1}).encode(),
            "model.safetensors: the name of tensor xx... is not plain text",
        ),
    ):
        data = len(header).to_bytes(8, "little") + header + b"\0" * 4
        (folder / "model.safetensors").write_bytes(data)
        for lie in (lambda request, path: False, answering(data, at="")):
            server.lie = lie
            with refused(CheckpointError, what=what):
                remote_header(repo_of(len(data)), "model.safetensors")
