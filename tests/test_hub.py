"""Sources and pairs from a Hub, read by the real client from a loopback server."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import save_file

from converter.checkpoints.names import is_companion
from converter.checkpoints.safetensors.header import read_header
from converter.checkpoints.source import check_space, remote_header
from converter.errors import SourceError
from converter.hub.repos import Repo, looks_like_repo, resolve
from converter.runtime.cache import sha256_of
from tests.builders.errors import refused
from tests.builders.hub_client import connect
from tests.builders.hub_server import COMMIT, HubServer
from tests.builders.invoke import invoke
from tests.builders.meta import write_native
from tests.builders.models import TINY_ARGS, Checkpoints, tiny_args
from tests.test_formats import as_pickles, tensors_of
from tests.test_quantization import BLOCKS, as_fp8

Gloss = Callable[..., Result]
Process = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def server(
    checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[HubServer]:
    data = tmp_path_factory.mktemp("dataset")
    rows = [f"that damn clock number {i}\tthat clock number {i}" for i in range(20)]
    (data / "train.tsv").write_text("\n".join(["toxic\tneutral1", *rows]))
    (data / "README.md").write_text("data")
    llama = checkpoints("llama")
    pickles = as_pickles(llama, tmp_path_factory.mktemp("hub") / "pickles", 2)
    inner = tmp_path_factory.mktemp("hub") / "outer"
    shutil.copytree(llama, inner / "variants/small")
    (inner / "README.md").write_text("Several models.")
    fp8 = tmp_path_factory.mktemp("hub") / "fp8"
    as_fp8(checkpoints("qwen3", torch.bfloat16), fp8, BLOCKS, apart=True)
    native = tmp_path_factory.mktemp("hub") / "native"
    write_native(native)
    models = {
        "someone/tiny": llama, "someone/pickles": pickles, "someone/several": inner,
        "meta-llama/Llama-2-7b": native, "someone/fp8": fp8,
    }  # fmt: skip
    with HubServer(models, {"someone/pairs": data}, {"someone/gated"}) as hub:
        yield hub


@pytest.fixture
def gloss(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Gloss:
    """Run ``gloss`` against the server, with caches of the test's own."""
    monkeypatch.setenv("GLOSS_CACHE_DIR", str(tmp_path / "cache"))

    def run(*args: object, offline: bool = False, **expected: Any) -> Result:
        connect(monkeypatch, server.url, tmp_path / "hf/hub", offline=offline)
        return invoke(*args, **expected)

    return run


@pytest.fixture
def process(server: HubServer, tmp_path: Path) -> Process:
    """The same in a process of its own, whose client reads its environment when imported."""

    def run(*args: object, offline: str = "0") -> subprocess.CompletedProcess[str]:
        environment = {
            **os.environ,
            "HF_ENDPOINT": server.url,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_OFFLINE": offline,
            "GLOSS_CACHE_DIR": str(tmp_path / "cache"),
        }
        command = [sys.executable, "-m", "converter", *map(str, args)]
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=120
        )

    return run


@pytest.mark.slow
def test_a_repo_converts_as_its_folder_does(
    gloss: Gloss, process: Process, server: HubServer, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    args = ("--pairs", "someone/pairs", *TINY_ARGS)
    gloss("convert", "someone/tiny@v1", tmp_path / "out", *args, code=0)
    manifest = json.loads((tmp_path / "out/gloss_manifest.json").read_text())
    assert manifest["source"]["repo_id"] == "someone/tiny"
    assert manifest["source"]["revision"] == "v1"
    assert manifest["source"]["commit"] == COMMIT
    assert manifest["pairs"]["origin"]["repo_id"] == "someone/pairs"
    assert manifest["pairs"]["origin"]["commit"] == COMMIT
    card = (tmp_path / "out/README.md").read_text()
    assert "base_model: someone/tiny" in card
    assert "- someone/pairs" in card
    # everything after the resolution is read at the commit
    assert not any("/resolve/" in line and COMMIT not in line for line in server.log)
    # the folder gives the same weights
    pairs = server.datasets["someone/pairs"] / "train.tsv"
    result = gloss("convert", checkpoints("llama"), tmp_path / "b", *TINY_ARGS, "--pairs", pairs)
    assert result.exit_code == 0, result.stderr
    for path in (tmp_path / "b").glob("model*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
    # and so does the client's cache, without a network
    asked = len(server.log)
    alone = process("convert", "someone/tiny@v1", tmp_path / "c", *args, offline="1")
    assert alone.returncode == 0, alone.stderr
    assert "cache hit" in alone.stderr
    assert len(server.log) == asked
    gloss("verify", tmp_path / "c", "--source", "someone/tiny@v1", code=0)
    more = (*args, "--no-keep-source")
    result = gloss("convert", "someone/tiny@v1", tmp_path / "d", *more, offline=True, code=2)
    assert "so what is deleted could not be fetched again" in result.stderr


def test_metas_repo_converts_as_typed(gloss: Gloss, tmp_path: Path) -> None:
    options = tiny_args(layers="0-1", rank=2)
    gloss("convert", "meta-llama/Llama-2-7b", tmp_path / "out", *options, code=0)
    gloss("verify", tmp_path / "out", "--source", "meta-llama/Llama-2-7b", code=0)
    manifest = json.loads((tmp_path / "out/gloss_manifest.json").read_text())
    assert manifest["source"]["commit"] == COMMIT
    assert "consolidated.00.pth" in manifest["source"]["originals"]
    assert json.loads((tmp_path / "out/config.json").read_text())["model_type"] == "llama"


def test_one_format_is_fetched_and_a_subfolder_alone(
    gloss: Gloss, server: HubServer, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    args = ("--num-pairs", 32, *TINY_ARGS)
    gloss("convert", checkpoints("llama"), tmp_path / "plain", *args, code=0)
    for source, more in (("someone/pickles", ()), ("someone/several", ("variants/small",))):
        server.log.clear()
        out = tmp_path / source.partition("/")[2]
        subfolder = [part for name in more for part in ("--subfolder", name)]
        gloss("convert", source, out, *args, *subfolder, code=0)
        ours, theirs = tensors_of(out), tensors_of(tmp_path / "plain")
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        card = (out / "README.md").read_text().splitlines()
        shown = next(line.split() for line in card if "gloss verify THIS_FOLDER --source" in line)
        gloss("verify", out, *shown[3:], code=0)
    missing = gloss("plan", "someone/several", "--subfolder", "variants/large", code=3)
    assert "someone/several has no folder variants/large" in missing.stderr


def test_shards_are_fetched_when_they_are_edited_and_dropped_after(
    gloss: Gloss, server: HubServer, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """With activations of another run and a fixed rank, no more than two shards are on disk."""
    gloss("convert", "someone/tiny", tmp_path / "a", *TINY_ARGS, "--num-pairs", 32, code=0)
    seen = next((tmp_path / "cache/activations").glob("*.safetensors"))
    shutil.rmtree(tmp_path / "hf")
    server.log.clear()
    server.most = 0
    server.watched = tmp_path / "hf"
    args = ("--activations", seen, "--num-pairs", 32, "--no-keep-source", *TINY_ARGS)
    gloss("convert", "someone/tiny", tmp_path / "b", *args, code=0)
    assert tensors_of(tmp_path / "b").keys() == tensors_of(tmp_path / "a").keys()
    for path in (tmp_path / "a").glob("model*.safetensors"):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    assert not list((tmp_path / "hf").rglob("*.safetensors"))
    sizes = {path.stat().st_size for path in checkpoints("llama").glob("*.safetensors")}
    left = (tmp_path / "hf").rglob("blobs/*")
    assert not sizes & {path.stat().st_size for path in left}  # nor what the links led to
    shards = list(checkpoints("llama").glob("*.safetensors"))
    assert len(shards) > 4
    assert 1 <= server.most <= 3
    local = gloss("convert", checkpoints("llama"), tmp_path / "c", "--no-keep-source", *TINY_ARGS)
    assert local.exit_code == 2
    assert "--no-keep-source: expected a source on the Hub" in local.stderr


@pytest.mark.parametrize("repo", ["someone/tiny", "someone/fp8"])
def test_an_adapter_names_the_commit_and_leaves_no_shard_if_none_is_to_be_kept(
    repo: str, gloss: Gloss, server: HubServer, tmp_path: Path
) -> None:
    out, args = tmp_path / "out", ("--num-pairs", 32, "--output", "adapter", *TINY_ARGS)
    gloss("convert", repo, out, "--no-keep-source", *args, code=0)
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (repo, COMMIT)
    assert f'from_pretrained("{repo}", revision="{COMMIT}")' in (out / "README.md").read_text()
    assert not list((tmp_path / "hf").rglob("*.safetensors"))
    shards = {path.name: path for path in server.models[repo].glob("*.safetensors")}
    recorded = json.loads((out / "gloss_manifest.json").read_text())["source"]["files"]
    for name, path in shards.items():
        assert recorded[name] == {"sha256": sha256_of(path), "bytes": path.stat().st_size}
    gloss("verify", out, "--source", repo, code=0)


@pytest.mark.parametrize("repo", ["someone/fp8", "someone/pickles"])
def test_weights_that_need_one_another_are_dropped_together(
    repo: str, gloss: Gloss, server: HubServer, tmp_path: Path
) -> None:
    """FP8 weights and their scales are in two shards; pickles are read until the end."""
    args = ("--num-pairs", 32, "--no-keep-source", *TINY_ARGS)
    server.log.clear()
    gloss("convert", repo, tmp_path / "out", *args, code=0)
    names = {path.name for path in server.models[repo].glob("*0000*")}
    assert len(names) == 2
    assert not [path for path in (tmp_path / "hf").rglob("*") if path.name in names]
    for name in names:
        fetched = [line for line in server.log if name in line and line.startswith("GET")]
        assert len([line for line in fetched if "bytes=0-" not in line]) <= 1


def test_a_repo_that_was_renamed_is_read_and_called_by_its_new_name(
    gloss: Gloss, server: HubServer, tmp_path: Path
) -> None:
    server.renamed["someone/old"] = "someone/tiny"
    result = gloss("convert", "someone/old", tmp_path / "out", *TINY_ARGS, "--num-pairs", 32)
    assert result.exit_code == 0, result.stderr
    assert "warning: someone/old is now called someone/tiny" in result.stderr
    manifest = json.loads((tmp_path / "out/gloss_manifest.json").read_text())
    assert manifest["source"]["repo_id"] == "someone/tiny"
    assert "base_model: someone/tiny" in (tmp_path / "out/README.md").read_text()


def test_a_plan_reads_headers_and_no_weights(process: Process, server: HubServer) -> None:
    server.log.clear()
    result = process("plan", "someone/tiny", "--json")
    assert result.returncode == 0, result.stderr
    assert len(json.loads(result.stdout)["edited_tensors"]) == 8
    weights = [line for line in server.log if ".safetensors" in line and "index" not in line]
    assert weights
    assert all("bytes=0-" in line for line in weights)


def test_a_header_longer_than_the_first_range_is_read_whole(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "long"
    folder.mkdir()
    tensors = {f"layer.{i:05}.weight": torch.ones(1) for i in range(1500)}
    save_file(tensors, folder / "model.safetensors")
    with HubServer({"someone/long": folder}, {}, set()) as hub:
        connect(monkeypatch, hub.url, tmp_path / "hf/hub")
        found = remote_header(resolve("model", "someone/long"), "model.safetensors")
        asked = [line.partition("bytes=")[2] for line in hub.log if "bytes=" in line]
    assert found == read_header(folder / "model.safetensors")
    assert len(asked) == 2
    assert asked[1].startswith("100000-")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("someone/gated", "model someone/gated is gated; ask for access on https://huggingface.co"),
        ("someone/nothing", "there is no model someone/nothing, neither as a local path nor on"),
        ("someone/tiny@v9", "model someone/tiny@v9 has no such revision"),
    ],
)
def test_repos_that_cannot_be_read(source: str, says: str, gloss: Gloss, tmp_path: Path) -> None:
    gloss("convert", source, tmp_path / "out", code=3, says=says)
    assert not (tmp_path / "out").exists()


def test_a_dead_server_is_one_sentence(
    gloss: Gloss, tmp_path: Path, server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "url", "http://127.0.0.1:9")
    says = "model someone/tiny cannot be read from the Hub"
    gloss("convert", "someone/tiny", tmp_path / "out", code=3, says=says)


def test_a_disk_that_is_too_small_is_said_before_anything_is_fetched(tmp_path: Path) -> None:
    repo = Repo("model", "someone/huge", None, COMMIT, {"a/x.safetensors": 10**16, "b": 1})
    check_space(repo, ["b"], tmp_path, "someone/huge")
    with refused(
        SourceError, what="... is too small for someone/huge", expected="10000000.0 GB free"
    ):
        check_space(repo, ["a/x.safetensors"], tmp_path, "someone/huge")


def test_repo_ids_and_paths_are_told_apart() -> None:
    for repo in ("gpt2", "meta-llama/Llama-2-7b", "a/b@v1.0", "a/b@refs/pr/3"):
        assert looks_like_repo(repo)
    for path in ("./a", "../a/b", "/a/b", "a/b/c", "~/a", "", "a b/c"):
        assert not looks_like_repo(path)


def test_what_belongs_to_a_model_and_what_does_not() -> None:
    kept = ["config.json", "tokenizer.model", "modeling_x.py", "LICENSE", "chat_template.jinja"]
    kept += ["vocab.json", "merges.txt", "preprocessor_config.json"]
    kept += ["additional_chat_templates/tool.jinja", "generation_config.json"]
    for name in kept:
        assert is_companion(name), name
    dropped = ["pytorch_model.bin", "model.safetensors", "consolidated.00.pth", "m.gguf"]
    dropped += ["onnx/config.json", "original/params.json", ".gitattributes", "README.md"]
    dropped += ["pytorch_model.bin.index.json", "gloss_manifest.json", ".cache/x", "SHA256SUMS"]
    dropped += ["model.nemo", "model.onnx.data", "x.onnx_data", "model.pkl", "train.parquet"]
    dropped += ["gloss_edit.tensors", "gloss_edit.safetensors", "2_Dense/model.tensors"]
    dropped += ["wandb/run.log", "checkpoint-500/config.json", "runs/events.out.tfevents.1"]
    assert not is_companion("notes.txt", 10**9)
    for name in dropped:
        assert not is_companion(name), name
