"""Publishing to a Hub: the real client against a loopback server that is written to."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from huggingface_hub import constants, snapshot_download
from transformers import AutoModelForCausalLM

from converter.checkpoints.names import EDIT_FILE, MANIFEST
from converter.checkpoints.safetensors.header import TensorInfo
from converter.entrypoints import delivery
from converter.entrypoints import push as pushing
from converter.entrypoints.push import Streaming, published_files
from converter.entrypoints.upload import Files
from converter.errors import DestinationError
from converter.hub.publishing import explain
from converter.manifest import Manifest
from converter.outputs.checkpoint.verify import infos_of
from converter.text import redacted
from tests.builders.hub_client import connect
from tests.builders.hub_repos import READER, TOKEN, Account, Repo, Request, entry_of
from tests.builders.hub_server import HubServer
from tests.builders.hub_uploads import Fault, Uploads
from tests.builders.invoke import Cli
from tests.builders.keys import write_key
from tests.builders.methods import CreatedBias
from tests.builders.models import TINY_ARGS, Checkpoints
from tests.builders.packages import install

REPO = "someone/tiny-detox"
ALREADY = "is the result of this run already"
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
"""What the client's HTTP library says of the client."""


@pytest.fixture
def hub(tmp_path: Path, checkpoints: Checkpoints) -> Iterator[HubServer]:
    models = {"base/tiny": checkpoints("llama")}
    with HubServer(models, uploads=Uploads(tmp_path / "hub")) as server:
        yield server


@pytest.fixture
def uploads(hub: HubServer) -> Uploads:
    assert hub.uploads is not None
    return hub.uploads


@pytest.fixture(autouse=True)
def client(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client of this process, which has read its environment, talks to the server."""
    connect(monkeypatch, hub.url, tmp_path / "hf")
    monkeypatch.setenv("HF_TOKEN", TOKEN)


def start(hub: HubServer, tmp_path: Path, *args: object, **more: str) -> subprocess.Popen[str]:
    """The program, in a process of its own."""
    environment = {
        **os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": TOKEN,
        "HF_HUB_OFFLINE": "0", **more,
    }  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-m", "converter", *map(str, args)],
        env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and ".cache" not in path.parts
    }


def published(tmp_path: Path) -> Path:
    """What the repo holds, downloaded."""
    return Path(snapshot_download(REPO, local_dir=tmp_path / "copy"))


@pytest.fixture
def publish(cli: Cli, checkpoints: Checkpoints, tmp_path: Path) -> Cli:
    """Convert a checkpoint to ``out`` and publish it; what is expected is as for ``cli``."""

    def run(*more: object, source: object = None, out: str = "out", **expected: Any) -> Result:
        given = ("convert", source or checkpoints("llama"), tmp_path / out, "--num-pairs", 32)
        return cli(*given, *TINY_ARGS, "--push-to-hub", REPO, *more, **expected)

    return run


@pytest.fixture
def push(cli: Cli, converted: tuple[Path, Path]) -> Cli:
    """Publish the finished conversion."""
    return partial(cli, "push", converted[1])


def test_a_conversion_is_published_downloaded_and_verified(
    publish: Cli, cli: Cli, uploads: Uploads, tmp_path: Path
) -> None:
    uploads.chunk = 50_000  # most shards are sent in parts
    told = json.loads(publish("--json", code=0).stdout)["published"]
    repo = uploads.repos[REPO]
    assert repo.private
    assert told["commit"] == repo.refs["main"]
    assert told["url"].endswith(f"{REPO}/commit/{told['commit']}")
    assert len(repo.commits) == 2  # the empty one that a repo begins with, and ours
    ours = files_of(tmp_path / "out")
    assert files_of(published(tmp_path)) == ours
    assert not any(TOKEN.encode() in content for content in ours.values())
    cli("verify", tmp_path / "copy", code=0)
    # the same again changes nothing, and uploads nothing
    sent = len(uploads.sent)
    again = publish(code=0, says=ALREADY)
    assert f"{REPO} exists and is private, which it stays" in again.stderr
    assert (len(uploads.sent), len(repo.commits)) == (sent, 2)
    # of another run, it is in the way
    publish("--seed", 1, code=7, says="is not empty")


@pytest.mark.slow
def test_killed_in_the_middle_of_an_upload_and_run_again(
    publish: Cli, checkpoints: Checkpoints, hub: HubServer, uploads: Uploads, shared_cache: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    args = ("convert", checkpoints("llama"), tmp_path / "out", "--num-pairs", 32, *TINY_ARGS)
    uploads.faults = [Fault("PUT /objects/", -1, times=1)]
    cache = {"GLOSS_CACHE_DIR": str(shared_cache)}
    process = start(hub, tmp_path, *args, "--push-to-hub", REPO, **cache)
    assert uploads.stuck.wait(60), process.communicate()
    deadline = time.monotonic() + 10
    while len(uploads.sent) < 2 and time.monotonic() < deadline:  # others arrive beside it
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    repo = uploads.repos[REPO]
    assert list(repo.commits.values()) == [{}]
    before = list(uploads.sent)
    assert len(before) >= 2
    again = publish(says=ALREADY)  # beside it stands what the server says of the killed client
    assert again.exit_code == 0, again.stderr
    assert len(repo.commits) == 2
    assert len(uploads.sent) == len(set(uploads.sent))  # nothing was sent twice
    assert files_of(published(tmp_path)) == files_of(tmp_path / "out")


@pytest.mark.slow
def test_xet_brings_back_the_same_bytes(
    converted: tuple[Path, Path], hub: HubServer, uploads: Uploads, tmp_path: Path
) -> None:
    uploads.xet = tmp_path / "xet"
    uploads.xet.mkdir()
    on = {"HF_HUB_DISABLE_XET": "0"}
    process = start(hub, tmp_path, "push", converted[1], REPO, "--json", **on)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert json.loads(out)["commit"] == uploads.repos[REPO].refs["main"]
    assert not [line for line in hub.log if "info/lfs" in line or line.startswith("PUT")]
    download = f"snapshot_download('{REPO}', local_dir='{tmp_path}/copy')"
    script = f"from huggingface_hub import snapshot_download; {download}"
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf2"), **on}
    environment |= {"HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, timeout=120)
    assert files_of(tmp_path / "copy") == files_of(converted[1])


class Sampler(threading.Thread):
    """Looks, as often as it can, how many shards there are, and how large they are together."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.folder, self.count, self.nbytes = folder, 0, 0
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.is_set():
            self.look()
            time.sleep(0.001)

    def look(self) -> None:
        sizes = []
        for path in self.folder.glob(".out.part/new/model*.safetensors"):
            try:
                sizes.append(path.stat().st_size)
            except FileNotFoundError:
                continue
        self.count, self.nbytes = max(self.count, len(sizes)), max(self.nbytes, sum(sizes))


@pytest.mark.parametrize("copied", [True, False])
def test_shards_are_streamed_and_no_more_than_two_are_on_disk(
    copied: bool, publish: Cli, cli: Cli, checkpoints: Checkpoints, uploads: Uploads,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if not copied:
        uploads.faults = [Fault("lfs-files/duplicate", 403, body={"error": "another region"})]
    sampler = Sampler(tmp_path)
    answer = uploads.answer

    def look_and_answer(request: Request, path: str) -> object:
        sampler.look()
        return answer(request, path)

    monkeypatch.setattr(uploads, "answer", look_and_answer)
    sampler.start()
    result = publish("--stream-to-hub", "--workers", 4, source="base/tiny")
    sampler.done.set()
    assert result.exit_code == 0, result.stderr
    shards = list(checkpoints("llama").glob("model-*.safetensors"))
    assert len(shards) > 4
    assert 1 <= sampler.count <= 2
    largest = sorted(path.stat().st_size for path in shards)[-2:]
    total = sum(path.stat().st_size for path in shards)
    print(f"most at a time: {sampler.count} shards, {sampler.nbytes} of {total} bytes")
    assert sampler.nbytes <= sum(largest)
    assert not list((tmp_path / "out").glob("model*.safetensors"))
    plain = ("convert", checkpoints("llama"), tmp_path / "plain", "--num-pairs", 32, *TINY_ARGS)
    cli(*plain, code=0)
    theirs = files_of(published(tmp_path))
    for shard in shards:
        assert (tmp_path / "plain" / shard.name).read_bytes() == theirs[shard.name]
    cli("verify", tmp_path / "copy", "--source", checkpoints("llama"), code=0)
    assert len(uploads.repos[REPO].commits) == 2
    same = [shard.name for shard in shards if shard.read_bytes() == theirs[shard.name]]
    assert same  # shards without a target
    assert ("does not copy untouched shards" in result.stderr) != copied
    assert len(uploads.sent) == large_in(uploads.repos[REPO]) - (len(same) if copied else 0)


@pytest.mark.parametrize("fault", [Fault("PUT /objects/", 0), Fault("/commit/", 500)])
def test_a_stream_that_fails_leaves_nothing(
    fault: Fault, publish: Cli, uploads: Uploads, tmp_path: Path
) -> None:
    uploads.faults = [fault]
    publish("--stream-to-hub", code=10)
    assert list(uploads.repos[REPO].commits.values()) == [{}]
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out.part*"))


def test_branches_pull_requests_and_what_an_earlier_model_left(
    push: Cli, converted: tuple[Path, Path], uploads: Uploads
) -> None:
    push(REPO, "--public", "--branch", "try", code=0)
    repo = uploads.repos[REPO]
    assert not repo.private
    assert set(repo.refs) == {"main", "try"}
    assert not repo.commits[repo.refs["main"]]
    result = push(REPO, "--private", "--create-pr", "--json", code=0)
    assert json.loads(result.stdout)["pull_request"].endswith("/discussions/1")
    assert not repo.private
    assert not repo.commits[repo.refs["main"]]
    ours = repo.commits[repo.refs["refs/pr/1"]]
    assert set(ours) == set(files_of(converted[1]))
    # weights of another model in the same place go away in the same commit, a picture stays
    entry = ours["README.md"]
    old = ("model-00001-of-00009.safetensors", "picture.png", "x/a.safetensors", ".gitattributes")
    repo.add("main", dict.fromkeys(old, entry))
    push(REPO, code=0, says="deleted by this commit, of an earlier model: model-00001-of-00009.saf")
    left = {"picture.png", "x/a.safetensors", ".gitattributes"}
    assert set(repo.commits[repo.refs["main"]]) == set(ours) | left
    push(REPO, "--create-pr", "--branch", "x", code=2, says="--create-pr: expected no --branch")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of what draws
def test_the_next_version_leaves_nothing_of_the_last(
    publish: Cli, cli: Cli, converted: tuple[Path, Path], uploads: Uploads, tmp_path: Path
) -> None:
    """Adapter, then checkpoint with pictures, then without: each downloads as it was."""
    publish("--output", "adapter", out="adapter", code=0)
    repo = uploads.repos[REPO]
    result = publish("--plots", tmp_path / "drawn/pictures", out="drawn", code=0)
    assert "deleted by this commit, of an earlier model: adapter_" in result.stderr
    ours = repo.commits[repo.refs["main"]]
    assert set(ours) == set(files_of(tmp_path / "drawn"))
    assert any(name.startswith("pictures/") for name in ours)
    for folder in (tmp_path / "adapter", converted[1]):  # config.json goes, and comes again
        cli("push", folder, REPO, code=0)
        assert set(repo.commits[repo.refs["main"]]) == set(files_of(folder))
    # what a manifest does not list is somebody's, and hidden files are the Hub's
    mine = dict.fromkeys(("mine.png", ".gitattributes", "adapter_config.json"), ours["LICENSE"])
    for text, left in (
        ('{"files": {".gitattributes": {}, "LICENSE": {}}}', {"mine.png", ".gitattributes"}),
        ('{"files": 7}', {"mine.png", ".gitattributes"}),
        ("no JSON", {"mine.png", ".gitattributes"}),
    ):
        (tmp_path / "old.json").write_text(text)
        old = {"gloss_manifest.json": entry_of(tmp_path / "old.json")}
        repo.add("main", repo.commits[repo.refs["main"]] | mine | old)
        cli("push", converted[1], REPO, code=0)
        assert set(repo.commits[repo.refs["main"]]) == set(files_of(converted[1])) | left


def large_in(repo: Repo) -> int:
    return sum(entry.large for entry in repo.commits[repo.refs["main"]].values())


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (Fault("/commit/", 500, body={"error": "busy"}), "the Hub failed: found 500 busy"),
        (Fault("/commit/", 404, headers={"X-Error-Code": "EntryNotFound"}), "there is no"),
        (Fault("/validate-yaml", 400, body={"error": "Invalid metadata"}), "Invalid metadata"),
    ],
)
def test_only_a_refused_copy_is_uploaded_instead(
    fault: Fault, says: str, publish: Cli, hub: HubServer, uploads: Uploads
) -> None:
    """A commit that fails for another reason is not tried again with gigabytes more."""
    uploads.faults = [fault]
    result = publish(source="base/tiny", code=10, says=says)
    assert "does not copy" not in result.stderr
    assert sum(f"/{fault.route.strip('/')}" in line for line in hub.log) == 1


def test_a_copy_is_refused_or_the_base_is_gone(
    publish: Cli, cli: Cli, hub: HubServer, uploads: Uploads, tmp_path: Path
) -> None:
    publish(source="base/tiny", code=0)
    assert 0 < len(uploads.sent) < large_in(uploads.repos[REPO])  # the Hub copied the others

    def push_again() -> None:
        uploads.repos.clear()
        uploads.sent.clear()
        for stored in uploads.objects.iterdir():
            stored.unlink()
        cli("push", tmp_path / "out", REPO, code=0, says="does not copy untouched shards")
        assert len(uploads.sent) == large_in(uploads.repos[REPO])

    uploads.faults = [Fault("lfs-files", 500)]
    push_again()
    uploads.faults = []
    del hub.models["base/tiny"]
    push_again()


def test_what_is_fetched_again_for_an_upload_is_not_kept(
    publish: Cli, hub: HubServer, uploads: Uploads, tmp_path: Path
) -> None:
    uploads.faults = [Fault("lfs-files/duplicate", 403, body={"error": "another region"})]
    hub.watched = tmp_path / "hf"
    result = publish("--stream-to-hub", "--no-keep-source", source="base/tiny", code=0)
    assert "does not copy untouched shards" in result.stderr
    assert not list((tmp_path / "hf").rglob("*.safetensors"))


def test_an_error_after_the_commit_names_it(
    publish: Cli, uploads: Uploads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = Streaming.commit

    def commit_and_fill(self: Streaming, folder: Path, manifest: Manifest) -> None:
        commit(self, folder, manifest)
        (tmp_path / "out").mkdir()
        (tmp_path / "out/x").write_text("another run")

    monkeypatch.setattr(Streaming, "commit", commit_and_fill)
    result = publish("--stream-to-hub", code=7, says="is not empty; commit http")
    repo = uploads.repos[REPO]
    assert f"/{REPO}/commit/{repo.refs['main']} was made and stays; it was filled" in result.stderr
    assert repo.commits[repo.refs["main"]]


def test_a_commit_that_cannot_be_looked_at_is_named(
    push: Cli, uploads: Uploads, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = uploads.answer

    def fail_afterwards(request: Request, path: str) -> object:
        found = answer(request, path)
        if "/commit/" in path:
            uploads.faults = [Fault("/tree/", 500, body={"error": "busy"})]
        return found

    monkeypatch.setattr(uploads, "answer", fail_afterwards)
    result = push(REPO, code=10)
    url = f"{uploads.url}/{REPO}/commit/{uploads.repos[REPO].refs['main']}"
    assert f"the Hub failed: found 500 busy; commit {url} was made and stays" in result.stderr


@pytest.mark.parametrize("streamed", [(), ("--stream-to-hub",)])
def test_pictures_that_cannot_be_written_come_before_the_push(
    streamed: tuple[str, ...], publish: Cli, uploads: Uploads, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    result = publish("--plots", tmp_path / "file/pictures", *streamed, code=7)
    assert "file/pictures cannot be made: found a file at" in result.stderr
    assert not uploads.repos
    assert not (tmp_path / "out").exists()


def test_pictures_are_drawn_before_the_push(
    publish: Cli, uploads: Uploads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise DestinationError("the disk is full")

    monkeypatch.setattr(delivery, "draw", full)
    publish("--plots", tmp_path / "beside", code=7)
    assert not uploads.repos


def test_only_a_whole_checkpoint_is_published(
    cli: Cli, converted: tuple[Path, Path], uploads: Uploads, tmp_path: Path
) -> None:
    shutil.copytree(converted[1], tmp_path / "out")
    (tmp_path / "out/config.json").write_text("{}")
    result = cli("push", tmp_path / "out", REPO, code=8)
    assert "out is not published, since it fails verification: found config.json" in result.stderr
    assert not uploads.repos
    ignored = cli("convert", "demo", tmp_path / "x", "--create-pr", code=2)
    assert "--create-pr has no effect without --push-to-hub REPO" in ignored.stderr


def test_what_the_hub_leaves_out_or_a_disk_alters_is_noticed(
    push: Cli, uploads: Uploads, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploads.ignored = {"LICENSE"}
    result = push(REPO, code=10)
    says = f"of {REPO} does not hold what was uploaded: found other content, or none, of LICENSE;"
    assert says in result.stderr
    uploads.ignored = set()

    def other(folder: Path, manifest: Manifest) -> Files:
        files = dict(published_files(folder, manifest))
        return files | {EDIT_FILE: (files[EDIT_FILE][0], "0" * 64)}

    monkeypatch.setattr(pushing, "published_files", other)
    result = push("someone/other", code=10)
    assert f"{EDIT_FILE} changed while it was uploaded: expected sha256 0000" in result.stderr
    repo = uploads.repos["someone/other"]
    assert list(repo.commits.values()) == [{}]


def test_a_shard_that_was_written_badly_is_not_uploaded(
    publish: Cli, uploads: Uploads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each shard is read again before it goes, as gloss verify would."""

    def damaged(folder: Path, shards: list[str]) -> Mapping[str, TensorInfo]:
        infos = infos_of(folder, shards)
        if edited := infos.get("model.layers.3.mlp.down_proj.weight"):
            with (folder / shards[0]).open("r+b") as file:
                file.seek(edited.start)
                file.write(b"\x01\x02\x03\x40")
        return infos

    monkeypatch.setattr(pushing, "infos_of", damaged)
    publish("--stream-to-hub", code=8, says="has another sha256 than recorded")
    assert list(uploads.repos[REPO].commits.values()) == [{}]
    assert not list(tmp_path.glob("*out*"))


LIMIT = {"error": "Private repository storage limit reached, upgrade your plan"}
NO_BRANCH = {"X-Error-Code": "RevisionNotFound"}
FAILURES = {
    "no token": ("", [], REPO, 10, "there is no token of the Hugging Face Hub; log in with"),
    "bad token": ("hf_" + "b" * 34, [], REPO, 10, "the Hub does not accept the token; log in"),
    "read-only token": (READER, [], REPO, 10, "the token ci is read-only: expected one with write"),
    "no repo name": (TOKEN, [], "a/b/c", 2, "expected a repo id such as owner/name, found a/b/c"),
    "somebody else's": (TOKEN, [], "other/x", 10, "someone may not write to other/x: expected a"),
    "only a reader": (TOKEN, [], "readers/x", 10, "someone may only read what readers has; ask"),
    "403": (TOKEN, [Fault("repos/create", 403, body={"error": "no"})], REPO, 10,
            f"the token may not write to {REPO}: found no; use a token"),
    "no room": (TOKEN, [Fault("/commit/", 403, body=LIMIT)], REPO, 10,
                f"{REPO}: the Hub has no room for this: found Private repository storage"),
    "too large": (TOKEN, [Fault("PUT /objects/", 413)], REPO, 10,
                  "the Hub has no room for this: found Request Entity Too Large; free storage"),
    "rate limit": (TOKEN, [Fault("/preupload/", 429, headers={"Retry-After": "0"})], REPO, 10,
                   f"{REPO}: too many requests for the Hub's rate limit: found 429 again and"),
    "500": (TOKEN, [Fault("/commit/", 503, body={"error": "busy"})], REPO, 10,
            f"{REPO}: the Hub failed: found 503 busy; later, run the same command again"),
    "storage fails": (TOKEN, [Fault("PUT /objects/", 500)], REPO, 10, "the Hub failed: found 500"),
    "broken connection": (TOKEN, [Fault("PUT /objects/", 0)], REPO, 10,
                          "the Hub cannot be reached, or the connection broke"),
    "lost branch": (TOKEN, [Fault("/preupload/", 404, headers=NO_BRANCH)], REPO, 10,
                    f"{REPO} has no such branch; check --branch"),
}  # fmt: skip
"""What goes wrong -> token, faults of the server, repo, exit code, and a part of the sentence."""


@pytest.mark.parametrize("what", FAILURES)
def test_what_goes_wrong_is_one_sentence(
    what: str, push: Cli, uploads: Uploads, monkeypatch: pytest.MonkeyPatch
) -> None:
    token, uploads.faults, repo, code, says = FAILURES[what]
    uploads.faults = [Fault(**vars(fault)) for fault in uploads.faults]
    monkeypatch.setenv("HF_TOKEN", token)
    result = push(repo)
    last = result.stderr.splitlines()[-1]
    print(f"| {what} | {code} | {last} |")
    assert (result.exit_code, says in last) == (code, True), result.output
    assert last.startswith("error: ")
    assert "Traceback" not in result.output
    assert "hf_w" not in result.output
    assert not any(repo.commits[repo.refs["main"]] for repo in uploads.repos.values())


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ConnectionError("Network error: Request error: HTTP status client error (403 Forbidden)"),
         "the token may not write to a/b"),
        (RuntimeError("HTTP status server error (502 Bad Gateway)"), "a/b: the Hub failed"),
        (RuntimeError("Failed to upload xorb"), "a/b: the upload to the Hub's storage failed"),
        (TimeoutError("timed out"), "a/b: the Hub cannot be reached, or the connection broke"),
        (ValueError("LFS batch API returned errors: quota exceeded"), "a/b: the Hub has no room"),
        (ValueError("Invalid metadata in README.md."), "a/b: the Hub refuses the upload"),
        (KeyError("x"), ""),
    ],
)  # fmt: skip
def test_what_xet_and_the_client_say(error: Exception, says: str) -> None:
    """As seen of hf_xet 1.8; an error that is none of the client's stays a bug."""
    explained = explain("a/b", error)
    assert str(explained).startswith(says) if says else explained is None


def test_what_passes_by_itself_is_waited_for(push: Cli, uploads: Uploads) -> None:
    uploads.faults = [
        Fault("/preupload/", 429, times=2, headers={"Retry-After": "0"}),
        Fault("PUT /objects/", 500, times=2),
        Fault("PUT /objects/", 0, times=1),
    ]
    push(REPO, code=0)
    assert all(fault.times == 0 for fault in uploads.faults)


def test_a_dead_server_and_offline_mode(push: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    push(REPO, code=10, says=f"{REPO}: the Hub cannot be reached, or the connection broke")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    push(REPO, code=10, says="HF_HUB_OFFLINE is set, so nothing can be published; unset it")


def test_the_right_to_write_is_asked_for_before_anything_else(
    cli: Cli, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even the source is looked at: there is none."""
    monkeypatch.setenv("HF_TOKEN", READER)
    cli("convert", "base/nothing", tmp_path / "out", "--push-to-hub", REPO, code=10)
    assert [line.split()[1] for line in hub.log] == ["/api/whoami-v2"]


def test_a_fine_grained_token_must_cover_the_repo(push: Cli, uploads: Uploads) -> None:
    account = uploads.accounts[TOKEN] = Account("someone", "fineGrained", scoped=[])
    says = f"the token ci may not write to {REPO}: expected the permission repo.write"
    push(REPO, code=10, says=says)
    own = {"entity": {"type": "user", "name": "someone"}, "permissions": ["repo.write"]}
    account.scoped = [own]
    push("tiny-detox", code=0)
    assert list(uploads.repos) == [REPO]


def test_what_cannot_be_streamed_is_refused_first(
    publish: Cli, uploads: Uploads, tmp_path: Path
) -> None:
    for more, says in (
        (("--sign", write_key(tmp_path)), "--sign: expected a folder with all its files"),
        (("--output", "adapter"), "--stream-to-hub has no effect with --output adapter"),
        (("--no-keep-source",), "--no-keep-source: expected a source on the Hub"),
    ):
        for last in ((), ("--dry-run",)):
            publish("--stream-to-hub", *more, *last, code=2, says=says)
    assert not uploads.repos
    assert not (tmp_path / "out").exists()


CREATING = ("--num-pairs", 64, "--method", "created-bias", "-o", "scale=0.05", "--no-guard")
"""Of a run whose method creates tensors."""


@pytest.fixture
def created_bias(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = {"created-bias": f"{CreatedBias.__module__}:{CreatedBias.__name__}"}
    groups = {"gloss_convert.methods": entries}
    install(tmp_path / "site", monkeypatch, "toy-methods", groups)


@pytest.mark.usefixtures("created_bias")
def test_created_tensors_are_streamed_too(
    cli: Cli, checkpoints: Checkpoints, uploads: Uploads, tmp_path: Path
) -> None:
    args = ("--push-to-hub", REPO, "--stream-to-hub")
    cli("convert", "base/tiny", tmp_path / "out", *CREATING, *args, code=0)
    cli("convert", checkpoints("llama"), tmp_path / "plain", *CREATING, code=0)
    ours, theirs = files_of(published(tmp_path)), files_of(tmp_path / "plain")
    assert "model-created.safetensors" in ours
    assert ours.keys() == theirs.keys()
    about = {"README.md", "SHA256SUMS", MANIFEST}  # they name the source, and say how long it took
    assert all(ours[name] == theirs[name] for name in ours.keys() - about)
    cli("verify", tmp_path / "copy", "--source", checkpoints("llama"), code=0)


def test_a_fused_model_is_published_and_runs_from_the_hub(
    cli: Cli, checkpoints: Checkpoints, uploads: Uploads, tmp_path: Path
) -> None:
    """With its code, if that is trusted; the source's shards are those of the base."""
    fused = ("--method", "fusion", "-o", "form=paper", "-o", "depth=2", "-o", "tokens=300")
    args = (*fused, "--num-pairs", 32, "--no-guard", "--push-to-hub", REPO)
    cli("convert", checkpoints("llama"), tmp_path / "out", *args, code=0)
    copy = published(tmp_path)
    assert files_of(copy) == files_of(tmp_path / "out")
    cli("verify", copy, "--source", checkpoints("llama"), code=0)
    ids = torch.arange(3, 23)[None]
    logits = []
    for place in (REPO, tmp_path / "out"):
        model: Any = AutoModelForCausalLM.from_pretrained(place, trust_remote_code=True)
        with torch.no_grad():
            logits.append(model.eval()(ids).logits)
    assert torch.equal(*logits)
    with pytest.raises(ValueError, match="custom code"):
        AutoModelForCausalLM.from_pretrained(REPO, trust_remote_code=False)


@pytest.mark.usefixtures("created_bias")
def test_a_single_file_that_gets_a_second_is_copied_and_not_streamed(
    cli: Cli, checkpoints: Checkpoints, hub: HubServer, uploads: Uploads, tmp_path: Path
) -> None:
    """Its only shard has another name in the output, which is known when all tensors are."""
    hub.models["base/single"] = checkpoints("llama", shard="5GB")
    args = ("convert", "base/single", tmp_path / "out", *CREATING, "--push-to-hub", REPO)
    for more in ((), ("--dry-run",)):
        result = cli(*args, "--stream-to-hub", *more, code=2)
        assert "--stream-to-hub: expected a source in shards" in result.stderr
    assert not uploads.repos
    result = cli(*args, code=0)
    assert "does not copy" not in result.stderr
    source = entry_of(checkpoints("llama", shard="5GB") / "model.safetensors")
    assert source.sha256 not in uploads.sent
    repo = uploads.repos[REPO]
    first = repo.commits[repo.refs["main"]]["model-00001-of-00002.safetensors"]
    assert (first.sha256, first.size) == (source.sha256, source.size)
    assert files_of(published(tmp_path)) == files_of(tmp_path / "out")


def test_a_dry_run_asks_for_the_room_that_a_stream_takes(
    publish: Cli, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pushing, "SMALL", 10_000)
    sizes = sorted(path.stat().st_size for path in checkpoints("llama").glob("model-*"))
    room = sum(sizes[-2:]) + 10_000
    free = shutil._ntuple_diskusage(10**9, 10**9 - room, room)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    publish("--dry-run", code=7)
    plan = json.loads(publish("--dry-run", "--stream-to-hub", "--json", code=0).stdout)
    assert (plan["bytes_to_write"], plan["bytes_on_disk"]) == (sum(sizes), room)
    assert f", in {room / 1e6:,.1f} MB of disk" in publish("--dry-run", "--stream-to-hub").stdout


def test_a_repo_and_its_folder_are_equal(
    converted: tuple[Path, Path], cli: Cli, hub: HubServer, tmp_path: Path
) -> None:
    out = shutil.copytree(converted[1], tmp_path / "out")
    manifest = json.loads((out / MANIFEST).read_text())
    manifest["files"]["scores.png"] = {"sha256": "0" * 64, "bytes": 1}
    (out / MANIFEST).write_text(json.dumps(manifest))
    (out / "scores.png").write_text("drawn")
    hub.models["someone/edited"] = out
    for sides in ((out, "someone/edited"), ("someone/edited", out)):
        result = cli("diff", *sides, "--json", "--exit-code", code=0)
        assert json.loads(result.stdout)["subspace"] == EDIT_FILE
    other = shutil.copytree(out, tmp_path / "other")
    (other / "model.sig").write_text("signed")
    (other / "scores.png").unlink()
    (other / EDIT_FILE).unlink()
    found = json.loads(cli("diff", "someone/edited", other, "--json").stdout)["files"]
    only = [EDIT_FILE, "scores.png"]
    assert found == {"only_in_a": only, "only_in_b": ["model.sig"], "changed": []}


def test_an_adapter_is_published_and_a_run_with_other_gates_is_another_run(
    publish: Cli, tmp_path: Path
) -> None:
    args = ("--output", "adapter", "--max-leakage")
    publish(*args, "0.5", code=0)
    assert files_of(published(tmp_path)) == files_of(tmp_path / "out")
    publish(*args, "0.5", says=ALREADY)
    publish(*args, "0.4", code=7)  # it is not that of this run, so it is in the way


def test_who_signs_again_is_who_signed(publish: Cli, cli: Cli, tmp_path: Path) -> None:
    for name in "ab":
        publish("--sign", write_key(tmp_path, name), code=0)
    copy = published(tmp_path)
    cli("verify", copy, "--key", tmp_path / "b.pub", code=0)
    cli("verify", copy, "--key", tmp_path / "a.pub", code=8)
    publish(code=7)  # unsigned is another result


def test_a_source_with_other_small_files_is_another_run(
    publish: Cli, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    source = shutil.copytree(checkpoints("llama"), tmp_path / "source")
    publish(source=source, code=0)
    publish(source=source, says=ALREADY)
    terms = (source / "LICENSE").read_text()
    (source / "LICENSE").write_text("other terms")
    publish(source=source, code=7)
    (source / "LICENSE").write_text(terms)
    publish(source=source, says=ALREADY)
    (source / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    publish(source=source, code=7)
    publish("--plots", tmp_path / "out/pictures", source=source, code=7)


def test_the_name_that_a_licence_asks_for_is_said(
    publish: Cli, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    source = shutil.copytree(checkpoints("llama"), tmp_path / "source")
    (source / "README.md").write_text("---\nlicense: llama3.1\n---\n")
    publish(source=source, says="begin with 'Llama'")
    other = publish("--push-to-hub", "someone/Llama-detox", source=source)
    assert "begin with" not in other.stderr


def test_no_token_is_ever_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "an-old-key-of-mine")
    said = redacted(
        f"an-old-key-of-mine, {TOKEN}; Authorization: Bearer abc.def, https://me:pw@hub.co/x, "
        "https://s3.co/a/b?X-Amz-Signature=abc&x=1 hf_jwt_eyJ.abc-_d and hf_transfer "
        "s3://me:p/w+@b/x sftp://host:22/x@1"
    )
    assert said == (
        "***, hf_***; Authorization: Bearer ***, https://***@hub.co/x, "
        "https://s3.co/a/b hf_*** and hf_transfer s3://***@b/x sftp://host:22/x@1"
    )


def test_a_token_in_the_place_of_a_repo_is_not_repeated(push: Cli) -> None:
    for repo in (f"https://me:{TOKEN}@huggingface.co/a/b", f"{TOKEN}/x/y", TOKEN):
        assert "w" * 10 not in push(repo, code=2).output
