"""A recorded conversion done again: the same bytes, or a sentence about what differs."""

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import load_file, save_file

from converter.checkpoints.names import EDIT_FILE, MANIFEST
from converter.edits.likeness import principal_angles
from converter.release.manifest import read_manifest
from tests.builders.hub_client import connect
from tests.builders.hub_server import COMMIT, HubServer
from tests.builders.invoke import Cli
from tests.builders.models import TINY_ARGS, Checkpoints
from tests.test_formats import as_pickles
from tests.test_quantization import BLOCKS, as_fp8
from tests.test_verify import flip


@pytest.fixture
def recorded(converted: tuple[Path, Path], tmp_path: Path) -> Path:
    """A manifest and its edit under a name of their own, as in ``manifests/``."""
    shutil.copyfile(converted[1] / MANIFEST, tmp_path / "tiny.json")
    shutil.copyfile(converted[1] / EDIT_FILE, tmp_path / "tiny.tensors")
    return tmp_path / "tiny.json"


@pytest.fixture
def replay(cli: Cli, converted: tuple[Path, Path], recorded: Path, tmp_path: Path) -> Cli:
    """Replay that manifest to ``again``; what is expected is as for ``cli``."""
    return partial(cli, "replay", recorded, tmp_path / "again", "--source", converted[0])


@pytest.fixture
def replayed(cli: Cli, tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """Convert a source and replay that: both folders."""

    def run(source: Path, *more: object) -> tuple[Path, Path]:
        out, again = tmp_path / "out", tmp_path / "again"
        cli("convert", source, out, "--num-pairs", 32, *TINY_ARGS, *more, code=0)
        cli("replay", out, again, "--source", source, code=0)
        return out, again

    return run


def alter(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def weights(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.glob("*.safetensors")}


def test_a_replay_gives_the_same_bytes_and_a_whole_folder(
    converted: tuple[Path, Path], recorded: Path, cli: Cli, tmp_path: Path
) -> None:
    source, first = converted
    for manifest, name in ((recorded, "a"), (first, "b")):
        again = tmp_path / name
        result = cli("replay", manifest, again, "--source", source, "--json", code=0)
        found = json.loads(result.stdout)
        assert (found["identical"], found["differences"]) == (True, [])
        assert found["other_files"] == []  # the card, too
        assert set(found["seconds"]) == {"plan", "edit", "verify"}  # nothing was run
        assert weights(again) == weights(first)
        cli("verify", again, "--source", source, code=0)
        then, now = read_manifest(first), read_manifest(again)
        assert now.replay_of == hashlib.sha256((first / MANIFEST).read_bytes()).hexdigest()
        assert then.measurements != now.measurements
        assert now == replace(then, measurements=now.measurements, replay_of=now.replay_of)
        done = cli("replay", manifest, again, "--source", source, "--json", code=0)
        assert "is the result of this run already" in done.stderr
        for key in ("identical", "differences", "files_compared", "other_files", "replay_of"):
            assert json.loads(done.stdout)[key] == found[key], key
    flip(again / "model-00001-of-00003.safetensors", -1)
    cli("replay", first, again, "--source", source, code=7)
    flip(again / "model-00001-of-00003.safetensors", -1)
    text = cli("replay", again, tmp_path / "c", "--source", source).stdout
    assert "byte for byte as recorded, verified" in text


def test_an_adapter_replays(
    converted: tuple[Path, Path], replayed: Callable[..., tuple[Path, Path]], cli: Cli
) -> None:
    args = ("--output", "adapter", "--base-model", "someone/tiny")
    out, again = replayed(converted[0], *args)
    for name in ("adapter_model.safetensors", "adapter_config.json", EDIT_FILE):
        assert (out / name).read_bytes() == (again / name).read_bytes()
    cli("verify", again, "--source", converted[0], code=0)


def test_an_adapter_recorded_from_the_hub_replays_from_a_copy(
    checkpoints: Checkpoints, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, args = checkpoints("llama"), ("--num-pairs", 32, *TINY_ARGS)
    with HubServer({"someone/tiny": source}) as hub, monkeypatch.context() as online:
        connect(online, hub.url, tmp_path / "hf")
        cli("convert", "someone/tiny", tmp_path / "out", "--output", "adapter", *args, code=0)
    cli("replay", tmp_path / "out", tmp_path / "again", "--source", source, code=0)
    name = "adapter_config.json"
    assert json.loads((tmp_path / "again" / name).read_text())["revision"] == COMMIT
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_licence_files_above_a_subfolder_replay(
    checkpoints: Checkpoints, replayed: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    shutil.copytree(checkpoints("llama"), tmp_path / "repo/original")
    (tmp_path / "repo/original/LICENSE").unlink()
    (tmp_path / "repo/LICENSE").write_text("terms")
    _, again = replayed(tmp_path / "repo", "--subfolder", "original")
    assert (again / "LICENSE").read_text() == "terms"


def test_names_in_a_manifest_do_not_leave_the_folder(
    recorded: Path, replay: Cli, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_text("of someone else")
    alterations: list[Callable[[dict[str, Any]], object]] = [
        lambda m: m["source"]["files"].update({"../secret": {"sha256": "0" * 64, "bytes": 1}}),
        lambda m: m["source"]["files"].update({"/etc/passwd": {"sha256": "0" * 64, "bytes": 1}}),
        lambda m: m["files"].update({"../secret": {"sha256": "0" * 64, "bytes": 1}}),
        lambda m: m["edit"].update(file="."),
        lambda m: m["edit"].update(file="../tiny.tensors"),
    ]
    whole = recorded.read_text()
    for change in alterations:
        alter(recorded, change)
        assert "sha256" not in replay(code=8).stderr  # nothing of the file is told
        recorded.write_text(whole)


def test_options_of_a_refit_are_refused_without_it(replay: Cli) -> None:
    for option in (("--pairs", "mine.tsv"), ("--max-angle", "2")):
        replay(*option, code=2, says=f"{option[0]} has no effect without --refit")


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "mixtral", "fp8", "pickled"])
def test_other_layouts_replay(
    kind: str, checkpoints: Checkpoints, replayed: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    if kind == "fp8":
        plain = checkpoints("qwen3", torch.bfloat16)
        source = as_fp8(plain, tmp_path / "fp8", BLOCKS, apart=True)
    elif kind == "pickled":
        source = as_pickles(checkpoints("llama"), tmp_path / "pickles", 2)
    else:
        source = checkpoints(kind, torch.bfloat16)
    out, again = replayed(source)
    assert weights(out) == weights(again)


def test_one_other_byte_in_the_source_is_an_error_before_any_work(
    converted: tuple[Path, Path], recorded: Path, cli: Cli, tmp_path: Path
) -> None:
    source = shutil.copytree(converted[0], tmp_path / "source")
    shard = min(source.glob("model-*.safetensors"))
    for path in (shard, source / "tokenizer.json"):
        before = path.read_bytes()
        flip(path, len(before) - 40)
        result = cli("replay", recorded, tmp_path / "again", "--source", source, code=8)
        assert "is not the one that was converted" in result.stderr
        assert f"{path.name} has sha256" in result.stderr
        assert result.stderr.count("has sha256") == 1
        assert "editing" not in result.stderr
        path.write_bytes(before)
    (source / "LICENSE").unlink()
    result = cli("replay", recorded, tmp_path / "again", "--source", source, code=8)
    assert "LICENSE is missing" in result.stderr
    assert not (tmp_path / "again").exists()


def test_an_environment_that_differs_is_named_though_the_bytes_agree(
    recorded: Path, replay: Cli, tmp_path: Path
) -> None:
    def older(manifest: dict[str, Any]) -> None:
        manifest["environment"]["libraries"]["torch"] = "1.0"
        manifest["environment"]["device"] = "NVIDIA H100"
        manifest["tool"]["version"] = "0.0.1"

    alter(recorded, older)
    result = replay("--json", code=0)
    found = json.loads(result.stdout)["differences"]
    assert [entry["what"] for entry in found] == ["gloss-convert", "device", "torch"]
    assert found[2]["recorded"] == "1.0"
    assert f"torch is {torch.__version__.partition('+')[0]}" in result.stderr
    shutil.rmtree(tmp_path / "again")
    # and it is the probable cause where they do not
    alter(recorded, lambda m: m["run"].update(rounding="nearest"))
    replay(code=8, says="the probable cause is gloss-convert")
    assert not (tmp_path / "again").exists()


def test_other_bytes_than_recorded_are_named_by_file_and_tensor(
    converted: tuple[Path, Path], recorded: Path, replay: Cli, tmp_path: Path
) -> None:
    entry = next(e for e in read_manifest(converted[1]).edited if e.layer == 3)

    def forge(manifest: dict[str, Any]) -> None:
        file = manifest["files"][entry.shard]
        file["sha256"] = "0" * 64
        names = list(file["prefixes"])
        for name in names[names.index(entry.name) :]:
            file["prefixes"][name] = "0" * 16

    alter(recorded, forge)
    before = sorted(tmp_path.iterdir())
    result = replay(code=8, says=f"{entry.shard} differs from tensor {entry.name} on")
    assert "so the manifest may be altered" in result.stderr
    assert sorted(tmp_path.iterdir()) == before


def test_what_a_manifest_cannot_know_is_asked_for(
    converted: tuple[Path, Path], recorded: Path, replay: Cli, cli: Cli, tmp_path: Path
) -> None:
    source, out = converted
    cli("replay", recorded, tmp_path / "again", code=2, says="say where it is with --source")
    cli("replay", out, out, "--source", source, "--overwrite", code=7, says="contains the input")
    flip(tmp_path / "tiny.tensors", -1)
    replay(code=8, says="tiny.tensors is not the edit that tiny.json records")
    (tmp_path / "tiny.tensors").unlink()
    replay(code=8, says=f"tiny.tensors or {EDIT_FILE} beside it")


def test_a_manifest_alone_does_not_make_code_run(recorded: Path, replay: Cli) -> None:
    alter(recorded, lambda m: m["run"].update(trust_remote_code=True))
    replay(code=2, says="executed code of its source")
    replay("--trust-remote-code", code=0)


def test_a_refit_finds_the_recorded_edit(
    converted: tuple[Path, Path], recorded: Path, replay: Cli, tmp_path: Path
) -> None:
    result = replay("--refit", "--json", code=0)
    (angles,) = json.loads(result.stdout)["angles"].values()
    assert len(angles) == 4
    assert angles[-1] < 1e-3
    assert weights(tmp_path / "again") == weights(converted[1])
    # a recorded basis that was turned by two degrees in one direction
    stored = tmp_path / "tiny.tensors"
    tensors = load_file(stored)
    U = tensors["U"]
    outside = torch.linalg.qr(torch.cat([U, torch.eye(32)[:, :1]], 1)).Q[:, -1]
    turn = math.radians(2)
    U[:, 1] = math.cos(turn) * U[:, 1] + math.sin(turn) * outside
    save_file(tensors, stored, {"format": "pt"})
    digest = hashlib.sha256(stored.read_bytes()).hexdigest()
    alter(recorded, lambda m: m["files"][EDIT_FILE].update(sha256=digest))
    shutil.rmtree(tmp_path / "again")
    replay("--refit", code=8, says="expected an angle of at most 1 degrees, found 2.000")
    assert not (tmp_path / "again").exists()
    alter(recorded, lambda m: m["pairs"].update(sha256="0" * 64))
    says = "not the texts of the recorded fit, by their sha256: pairs"
    replay("--refit", code=8, says=says)


def test_principal_angles_are_known_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(12, 6, generator=generator, dtype=torch.float64)).Q
    known = torch.tensor([1e-5, 30.0, 80.0], dtype=torch.float64)
    turns = torch.deg2rad(known)
    turned = turns.cos() * Q[:, :3] + turns.sin() * Q[:, 3:]
    mixed = turned @ torch.linalg.qr(torch.randn(3, 3, generator=generator).double()).Q
    assert torch.allclose(principal_angles(Q[:, :3], mixed), known, rtol=1e-6)
    assert float(principal_angles(Q[:, :3], Q[:, :3].float()).max()) < 1e-5


def test_a_repo_is_read_at_the_recorded_commit(
    checkpoints: Checkpoints, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    rows = [f"that damn clock number {i}\tthat clock number {i}" for i in range(20)]
    (data / "train.tsv").write_text("\n".join(["toxic\tneutral1", *rows]))
    with HubServer({"someone/tiny": checkpoints("llama")}, {"someone/pairs": data}) as server:

        def run(home: str, *args: object) -> dict[str, Any]:
            connect(monkeypatch, server.url, tmp_path / home)
            done = cli(*args, "--cache-dir", tmp_path / "cache", "--json", code=0)
            found: dict[str, Any] = json.loads(done.stdout)
            return found

        pairs = ("--pairs", "someone/pairs", *TINY_ARGS)
        run("hf", "convert", "someone/tiny@v1", tmp_path / "out", *pairs)
        server.log.clear()
        found = run("other", "replay", tmp_path / "out", tmp_path / "again", "--refit")
    assert found["commit"] == COMMIT
    assert found["angles"]["U"][-1] < 1e-3
    asked = [line for line in server.log if "someone/" in line]
    assert asked
    assert all(COMMIT in line for line in asked), asked
    assert weights(tmp_path / "out") == weights(tmp_path / "again")
