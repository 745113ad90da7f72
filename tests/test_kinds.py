"""Five kinds of edits, each by a small method, through everything that an edit goes through.

``tests/builders/methods.py`` has the methods: a matrix of rank one that is added to a weight, a
vector that is added to some of its rows, a weight that is replaced, a bias that is created together
with the key of the config that makes models look at it, and a file that is added. None of them is
known to the program; whatever these tests show holds for any method.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result

from converter.methods import base
from converter.release.manifest import read_manifest
from tests.builders.methods import METHODS
from tests.builders.models import load

Cli = Callable[..., Result]


@dataclass(frozen=True)
class Kind:
    """What is special about one kind of edit.

    Attributes:
        method: its name.
        kind: of its delta, as the manifest has it; None if it changes no tensor of the source.
        touched: end of the name of the tensor or file that it changes or adds.
    """

    method: str
    kind: str | None
    touched: str


KINDS = [
    Kind("rank-one", "add-low-rank", "layers.2.mlp.down_proj.weight"),
    Kind("rows", "add-to-rows", "layers.2.mlp.gate_proj.weight"),
    Kind("replaced", "replace", "layers.2.self_attn.o_proj.weight"),
    Kind("created-bias", None, "layers.2.self_attn.o_proj.bias"),
    Kind("added-file", None, "notes/edit.txt"),
]
EACH = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.method)


@pytest.fixture(autouse=True)
def methods(monkeypatch: pytest.MonkeyPatch) -> None:
    """The program knows the methods of the tests as if they were its own."""
    known = {name: f"{kind.__module__}:{kind.__name__}" for name, kind in METHODS.items()}
    monkeypatch.setattr(base, "METHODS", base.METHODS | known)


def run(cli: Cli, *args: object, code: int = 0) -> Result:
    result = cli(*args)
    assert result.exit_code == code, result.stderr or result.stdout
    return result


def convert(cli: Cli, source: Path, out: Path, kind: Kind, *more: object) -> Path:
    run(cli, "convert", source, out, "--method", kind.method, "-o", "scale=0.05",
        "--num-pairs", 64, "--no-guard", *more)  # fmt: skip
    return out


@pytest.fixture
def source(checkpoints: Callable[..., Path]) -> Path:
    return (
        checkpoints("mistral-biased", torch.bfloat16)
        if False
        else checkpoints("llama", torch.bfloat16)
    )


@EACH
def test_what_is_written_is_recorded_verified_and_loads(
    kind: Kind, source: Path, cli: Cli, tmp_path: Path
) -> None:
    out = convert(cli, source, tmp_path / "out", kind)
    run(cli, "verify", out)
    run(cli, "verify", out, "--source", source)
    manifest = read_manifest(out)
    assert [edit.kind for edit in manifest.edited] == ([kind.kind] if kind.kind else [])
    before, after = load(source).state_dict(), load(out).state_dict()
    changed = {n for n in after if n not in before or not torch.equal(after[n], before[n])}
    if kind.method == "created-bias":
        assert {n for n in changed if after[n].any()} == {f"model.{kind.touched}"}
        assert all(n.endswith(".bias") for n in changed)
    else:
        assert changed == ({f"model.{kind.touched}"} if kind.kind else set())


@EACH
def test_every_other_byte_is_that_of_the_source(
    kind: Kind, source: Path, cli: Cli, tmp_path: Path
) -> None:
    out = convert(cli, source, tmp_path / "out", kind)
    other = {path.name for path in source.iterdir() if path.is_file()} - {"README.md"}
    differ = {name for name in other if (out / name).read_bytes() != (source / name).read_bytes()}
    shards = {name for name in differ if name.endswith(".safetensors")}
    assert len(shards) == (1 if kind.kind else 0)
    patched = {
        "created-bias": {"config.json", "model.safetensors.index.json"},
        "added-file": {"generation_config.json"},
    }
    assert differ - shards == patched.get(kind.method, set())
    if kind.method == "created-bias":
        old, new = ((f / "config.json").read_text() for f in (source, out))
        assert new == old.replace('"attention_bias": false', '"attention_bias": true')


@EACH
def test_a_flipped_byte_is_found_and_named(
    kind: Kind, source: Path, cli: Cli, tmp_path: Path
) -> None:
    out = convert(cli, source, tmp_path / "out", kind)
    if kind.method == "added-file":
        (out / kind.touched).write_text("scale 0.06\n")
        named = kind.touched
    else:
        named = f"model.{kind.touched}"
        index = json.loads((out / "model.safetensors.index.json").read_text())
        path = out / index["weight_map"][named]
        length = int.from_bytes(path.read_bytes()[:8], "little")
        entry = json.loads(path.read_bytes()[8 : 8 + length])[named]
        data = bytearray(path.read_bytes())
        data[8 + length + entry["data_offsets"][0] + 5] ^= 0x10
        path.write_bytes(data)
    assert named in run(cli, "verify", out, code=8).stdout


@EACH
def test_a_replay_gives_the_same_bytes(kind: Kind, source: Path, cli: Cli, tmp_path: Path) -> None:
    out = convert(cli, source, tmp_path / "out", kind)
    again = tmp_path / "again"
    result = run(cli, "replay", out, again, "--source", source, "--json")
    assert json.loads(result.stdout)["identical"] is True
    for path in (p for p in out.rglob("*") if p.is_file()):
        if path.name not in ("README.md", "gloss_manifest.json", "SHA256SUMS"):
            assert (again / path.relative_to(out)).read_bytes() == path.read_bytes(), path.name
    run(cli, "verify", again, "--source", source)


@EACH
def test_an_interrupted_run_goes_on_where_it_stopped(
    kind: Kind, source: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = convert(cli, source, tmp_path / "whole", kind)
    from converter.outputs.checkpoint import write

    def broken(*args: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(write, "_small_files", broken)
    out = tmp_path / "out"
    args = ("convert", source, out, "--method", kind.method, "-o", "scale=0.05",
            "--num-pairs", 64, "--no-guard")  # fmt: skip
    run(cli, *args, code=7)
    monkeypatch.undo()
    methods_again(monkeypatch)
    count = len(list(source.glob("*.safetensors")))
    assert f"{count} of {count} shards are finished already" in run(cli, *args).stderr
    for path in whole.glob("*.safetensors"):
        assert (out / path.name).read_bytes() == path.read_bytes()


def methods_again(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {name: f"{kind.__module__}:{kind.__name__}" for name, kind in METHODS.items()}
    monkeypatch.setattr(base, "METHODS", base.METHODS | known)
