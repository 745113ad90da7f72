"""Five kinds of edits, each by a small method, through everything that an edit goes through.

``tests/builders/methods.py`` has the methods: a matrix of rank one that is added to a weight, a
vector that is added to some of its rows, a weight that is replaced, a bias that is created together
with the key of the config that makes models look at it, and a file that is added. None of them is
known to the program: they come as an installed package does, by entry points. Whatever these tests
show holds for any method.
"""

import errno
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from click.testing import Result

from converter.checkpoints.plan import make_plan
from converter.checkpoints.resolve import resolve
from converter.edits.base import Edit, Footprint
from converter.edits.deltas import AddToRows, Replace
from converter.errors import CheckpointError, FitError
from converter.models.edited import edited
from converter.outputs.checkpoint import write
from converter.outputs.checkpoint.additions import check_edit
from converter.release.manifest import read_manifest
from converter.release.recording import read_recording
from tests.builders.errors import refused
from tests.builders.methods import METHODS, AddedFile
from tests.builders.models import load
from tests.builders.packages import install

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
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installs the methods of the tests as a package."""
    entries = {name: f"{kind.__module__}:{kind.__name__}" for name, kind in METHODS.items()}
    install(tmp_path / "site", monkeypatch, "toy-methods", {"gloss_convert.methods": entries})


def run(cli: Cli, *args: object, code: int = 0) -> Result:
    result = cli(*args)
    assert result.exit_code == code, result.stderr or result.stdout
    return result


def arguments(source: Path, out: Path, kind: Kind) -> list[object]:
    return ["convert", source, out, "--method", kind.method, "-o", "scale=0.05",
            "--num-pairs", 64, "--no-guard"]  # fmt: skip


def convert(cli: Cli, source: Path, out: Path, kind: Kind, code: int = 0) -> Path:
    run(cli, *arguments(source, out, kind), code=code)
    return out


def no_space_left(*args: object) -> NoReturn:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def source(checkpoints: Callable[..., Path]) -> Path:
    return checkpoints("llama", torch.bfloat16)


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
    assert named in run(cli, "verify", out, code=8).stderr


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
    with monkeypatch.context() as broken:
        broken.setattr(write, "_small_files", no_space_left)
        out = convert(cli, source, tmp_path / "out", kind, code=7)
    count = len(list(source.glob("*.safetensors")))
    again = run(cli, *arguments(source, out, kind))
    assert f"{count} of {count} shards are finished already" in again.stderr
    for path in whole.glob("*.safetensors"):
        assert (out / path.name).read_bytes() == path.read_bytes()


@EACH
def test_hooks_give_what_the_written_model_gives(
    kind: Kind, checkpoints: Callable[..., Path], cli: Cli, tmp_path: Path
) -> None:
    """The guard examines a model with hooks; what it sees must be what is written."""
    source = checkpoints("llama", torch.float32)
    out = convert(cli, source, tmp_path / "out", kind)
    recording, resolved = read_recording(out), resolve(str(source))
    plan = make_plan(resolved.config, resolved.weight_map, resolved.headers())
    tokens = torch.arange(40).reshape(2, 20)
    before, after = load(source), load(out)
    with torch.no_grad():
        unedited, written = before(tokens).logits, after(tokens).logits
        with edited(before, plan, recording.edit(plan)):
            hooked = before(tokens).logits
    torch.testing.assert_close(hooked, written, rtol=1e-5, atol=1e-5)
    assert (kind.touched == "notes/edit.txt") == torch.equal(unedited, written)


@EACH
def test_the_guard_examines_it_and_controls(
    kind: Kind, source: Path, cli: Cli, tmp_path: Path
) -> None:
    """Random changes make no model less toxic: the guard says so, and ``--force`` writes them."""
    args = [a for a in arguments(source, tmp_path / "out", kind) if a != "--no-guard"]
    refused = run(cli, *args, code=9)
    assert "log-probability of toxic words" in refused.stderr
    run(cli, *args, "--force")
    guard = read_manifest(tmp_path / "out").guard
    assert guard is not None
    assert len(guard.controls) == 3
    assert (guard.edit.perplexity_ratio.value == 1) == (kind.method == "added-file")


@EACH
def test_an_adapter_holds_additions_of_low_rank_and_refuses_the_rest(
    kind: Kind, source: Path, cli: Cli, tmp_path: Path
) -> None:
    args = [*arguments(source, tmp_path / "out", kind), "--output", "adapter"]
    if kind.method == "rank-one":
        run(cli, *args)
        run(cli, "verify", tmp_path / "out", "--source", source)
    else:
        assert "an edit of low rank" in run(cli, *args, code=2).stderr
        assert not (tmp_path / "out").exists()


def test_a_single_file_and_created_tensors_become_two_shards(
    checkpoints: Callable[..., Path], cli: Cli, tmp_path: Path
) -> None:
    source = checkpoints("llama", torch.bfloat16, "10GB")
    out = convert(cli, source, tmp_path / "out", KINDS[3])
    shards = sorted(path.name for path in out.glob("model*.safetensors"))
    assert shards == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert (out / shards[0]).read_bytes() == (source / "model.safetensors").read_bytes()
    run(cli, "verify", out, "--source", source)
    assert load(out).state_dict()[f"model.{KINDS[3].touched}"].any()


@pytest.mark.parametrize(
    ("method", "kind", "code", "sentence"),
    [
        ("rows", "gpt2", 2, "this checkpoint has no gate_proj"),
        ("created-bias", "gpt_neox", 2, "a model whose o_proj can get a bias"),
    ],
)
def test_a_footprint_that_the_model_lacks_is_refused_from_the_headers(
    method: str, kind: str, code: int, sentence: str, checkpoints: Callable[..., Path], cli: Cli,
    tmp_path: Path,
) -> None:  # fmt: skip
    args = ["convert", checkpoints(kind), tmp_path / "out", "--method", method]
    for more in ([], ["--dry-run"]):
        assert sentence in run(cli, *args, *more, code=code).stderr
    assert sentence in run(cli, "plan", checkpoints(kind), "--method", method, code=code).stderr
    assert not (tmp_path / "out").exists()


NORM = "model.layers.0.input_layernorm.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"
OTHER = "model.layers.1.mlp.down_proj.weight"
WRONG = {
    "a created tensor that exists": (
        Edit(created={NORM: torch.ones(32)}), f"the edit creates tensor {NORM}"
    ),
    "a created tensor with NaN": (
        Edit(created={"new": torch.tensor([torch.nan])}),
        "the edit creates tensor new, which holds NaN or Inf",
    ),
    "a tensor that no role has": (
        Edit({NORM: Replace(torch.ones(32, 1))}), f"the edit of tensor {NORM} (replace) ..."
    ),
    "a vector that is too long": (
        Edit({DOWN: AddToRows(torch.tensor([0]), torch.ones(9))}),
        f"the edit of tensor {DOWN} (add-to-rows) does not fit the checkpoint",
    ),
    "a row that is not there": (
        Edit({DOWN: AddToRows(torch.tensor([32]), torch.ones(48))}),
        f"the edit of tensor {DOWN} (add-to-rows) does not fit the checkpoint",
    ),
    "a replacement of another size": (
        Edit({DOWN: Replace(torch.ones(3, 3))}),
        f"the edit of tensor {DOWN} (replace) does not fit the checkpoint",
    ),
    "a patch of a file that is missing": (
        Edit(patches={"chat_template.jinja": "x"}),
        "the edit changes the file chat_template.jinja",
    ),
    "a patch of a file that is none of text": (
        Edit(patches={"LICENSE": "x"}), "the edit changes the file LICENSE"
    ),
    "a patch that changes nothing": (
        Edit(patches={"config.json": {"hidden_size": 32}}),
        "the patch of config.json changes nothing",
    ),
    "a patch of an object that is text": (
        Edit(patches={"config.json": "x"}), "the patch of config.json does not fit it"
    ),
    "a patch of the sizes": (
        Edit(patches={"config.json": {"hidden_size": 8}}),
        "the patch of config.json changes the sizes of the model or its type",
    ),
    "a file of the source": (
        Edit(files={"config.json": b"{}"}), "the edit adds a file config.json"
    ),
    "a file of the source in capitals": (
        Edit(files={"License": b""}), "the edit adds a file License"
    ),
    "a file in place of a folder": (
        Edit(files={"config.json/x": b""}), "the edit adds a file config.json/x"
    ),
    "a file of the output": (
        Edit(files={"gloss_manifest.json": b""}), "the edit adds a file gloss_manifest.json"
    ),
    "a file outside": (Edit(files={"../x": b""}), "the edit adds a file ../x"),
    "two files of one name": (Edit(files={"a": b"", "A": b""}), "the edit adds a file A"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_an_edit_that_does_not_fit_is_refused(wrong: str, checkpoints: Callable[..., Path]) -> None:
    edit, what = WRONG[wrong]
    source = resolve(str(checkpoints("llama", torch.bfloat16)))
    plan = make_plan(source.config, source.weight_map, source.headers())
    with refused(CheckpointError, what=what):
        check_edit(edit, plan, source)


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (Edit({OTHER: Replace(torch.ones(32, 48))}), OTHER),
        (Edit({DOWN: Replace(torch.ones(32, 48))}), DOWN),
        (Edit(created={"new": torch.ones(3)}), "new"),
        (Edit(patches={"config.json": {}}), "config.json"),
        (Edit(files={"x": b""}), "x"),
    ],
)
def test_an_edit_beyond_its_footprint_is_refused(
    edit: Edit, named: str, checkpoints: Callable[..., Path]
) -> None:
    source = resolve(str(checkpoints("llama", torch.bfloat16)))
    plan = make_plan(source.config, source.weight_map, source.headers())
    footprint = Footprint(plan.weights("down_proj", [0]), (AddToRows,), created={"new": (2,)})
    footprint.check(Edit({DOWN: AddToRows(torch.tensor([0]), torch.ones(48))}))
    what = f"the method changes {named} in a way that its footprint does not have"
    with refused(FitError, what=what):
        footprint.check(edit)


def test_a_refused_edit_leaves_nothing(
    source: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit = Edit(files={"LICENSE": b"Another.\n"})
    monkeypatch.setattr(AddedFile, "edit", lambda self, bench, scale, seed: edit)
    monkeypatch.setattr(AddedFile, "footprint", lambda self, plan: Footprint(files=("LICENSE",)))
    refused = run(cli, *arguments(source, tmp_path / "out", KINDS[4]), code=4)
    assert "the edit adds a file LICENSE: expected a name that is free" in refused.stderr
    assert not (tmp_path / "out").exists()


@EACH
def test_a_gate_of_leakage_is_refused_at_once(
    kind: Kind, source: Path, cli: Cli, tmp_path: Path
) -> None:
    args = [*arguments(source, tmp_path / "out", kind), "--max-leakage", 0.1]
    assert "--max-leakage has no measurement" in run(cli, *args, code=2).stderr
    assert not (tmp_path / "out").exists()
