"""Six kinds of edits, each by a small method, through everything that an edit goes through.

``tests/builders/methods.py`` has the methods: a matrix of rank one that is added to a weight, a
vector that is added to some of its rows, a weight that is replaced, a bias that is created together
with the key of the config that makes models look at it, and a file that is added. None of them is
known to the program: they come as an installed package does, by entry points. Whatever these tests
show holds for any method.
"""

import errno
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from click.testing import Result
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import converter
from converter.calibration.word_list import load_words
from converter.checkpoints.plan import Plan
from converter.edits.base import Edit, Footprint
from converter.edits.deltas import AddLowRank, AddToRows, RemoveSubspace, Replace
from converter.errors import CheckpointError, FitError, OptionError
from converter.methods.base import Workbench
from converter.methods.workbench import Bench
from converter.models.edited import edited, module_edits
from converter.outputs.checkpoint import write
from converter.outputs.checkpoint.additions import check_edit
from converter.recipe import Recipe
from converter.release.manifest import read_manifest
from converter.release.recording import read_recording
from tests.builders.adversary import copy_of, load_manifest, put, record
from tests.builders.invoke import Cli
from tests.builders.methods import METHODS, AddedFile, Base, draw
from tests.builders.models import Checkpoints, load, planned, tiny_recipe
from tests.builders.packages import install


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


CREATED = Kind("created-bias", None, "layers.2.self_attn.o_proj.bias")
ADDED = Kind("added-file", None, "notes/edit.txt")
KINDS = [
    Kind("rank-one", "add-low-rank", "layers.2.mlp.down_proj.weight"),
    Kind("rows", "add-to-rows", "layers.2.mlp.gate_proj.weight"),
    Kind("replaced", "replace", "layers.2.self_attn.o_proj.weight"),
    Kind("bits", "add-bits", "layers.2.mlp.down_proj.weight"),
    CREATED,
    ADDED,
]


@pytest.fixture(params=KINDS, ids=lambda kind: kind.method)
def kind(request: pytest.FixtureRequest) -> Kind:
    """Each in turn."""
    found: Kind = request.param
    return found


@pytest.fixture(scope="module", autouse=True)
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Installs the methods of the tests as a package."""
    entries = {name: f"{kind.__module__}:{kind.__name__}" for name, kind in METHODS.items()}
    with pytest.MonkeyPatch.context() as patch:
        site = tmp_path_factory.mktemp("site")
        install(site, patch, "toy-methods", {"gloss_convert.methods": entries})
        yield


@pytest.fixture(scope="module")
def written(
    checkpoints: Checkpoints, shared_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Kind], Path]:
    """What each kind makes of the source, made once. Read only."""

    @cache
    def get(kind: Kind) -> Path:
        out = tmp_path_factory.mktemp(kind.method) / "out"
        settings: dict[str, Any] = {"method": kind.method, "options": {"scale": "0.05"}}
        source = checkpoints("llama", torch.bfloat16)
        converter.convert(tiny_recipe(source, num_pairs=64, **settings), out)
        return out

    return get


@pytest.fixture
def source(checkpoints: Checkpoints) -> Path:
    return checkpoints("llama", torch.bfloat16)


def arguments(source: Path, out: Path, method: str, scale: str = "0.05") -> list[object]:
    return ["convert", source, out, "--method", method, "-o", f"scale={scale}", "--num-pairs", 64]


@pytest.fixture
def convert(cli: Cli, tmp_path: Path) -> Cli:
    """Convert to ``out`` without a guard; what is expected is as for ``cli``."""

    def run(
        source: Path, method: str, *more: object, scale: str = "0.05", code: int = 0, says: str = ""
    ) -> Result:
        args = arguments(source, tmp_path / "out", method, scale)
        return cli(*args, "--no-guard", *more, code=code, says=says)

    return run


def no_space_left(*args: object) -> NoReturn:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_what_is_written_is_recorded_verified_and_loads(
    kind: Kind, written: Callable[[Kind], Path], source: Path, cli: Cli
) -> None:
    out = written(kind)
    cli("verify", out, code=0)
    cli("verify", out, "--source", source, code=0)
    manifest = read_manifest(out)
    assert [edit.kind for edit in manifest.edited] == ([kind.kind] if kind.kind else [])
    before, after = load(source).state_dict(), load(out).state_dict()
    changed = {n for n in after if n not in before or not torch.equal(after[n], before[n])}
    if kind.method == "created-bias":
        assert {n for n in changed if after[n].any()} == {f"model.{kind.touched}"}
        assert all(n.endswith(".bias") for n in changed)
    else:
        assert changed == ({f"model.{kind.touched}"} if kind.kind else set())


def test_every_other_byte_is_that_of_the_source(
    kind: Kind, written: Callable[[Kind], Path], source: Path
) -> None:
    out = written(kind)
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


def test_a_replay_gives_the_same_bytes(
    kind: Kind, written: Callable[[Kind], Path], source: Path, cli: Cli, tmp_path: Path
) -> None:
    out, again = written(kind), tmp_path / "again"
    result = cli("replay", out, again, "--source", source, "--json", code=0)
    assert json.loads(result.stdout)["identical"] is True
    for path in (p for p in out.rglob("*") if p.is_file()):
        if path.name not in ("README.md", "gloss_manifest.json", "SHA256SUMS"):
            assert (again / path.relative_to(out)).read_bytes() == path.read_bytes(), path.name
    cli("verify", again, "--source", source, code=0)


def test_an_interrupted_run_goes_on_where_it_stopped(
    kind: Kind, written: Callable[[Kind], Path], source: Path, convert: Cli, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    with monkeypatch.context() as broken:
        broken.setattr(write, "_small_files", no_space_left)
        convert(source, kind.method, code=7)
    count = len(list(source.glob("*.safetensors")))
    convert(source, kind.method, says=f"{count} of {count} shards are finished already")
    for path in written(kind).glob("*.safetensors"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_hooks_give_what_the_written_model_gives(
    kind: Kind, checkpoints: Checkpoints, convert: Cli, tmp_path: Path
) -> None:
    """The guard examines a model with hooks; what it sees must be what is written."""
    source, out = checkpoints("llama", torch.float32), tmp_path / "out"
    convert(source, kind.method)
    _, plan = planned(source)
    tokens = torch.arange(40).reshape(2, 20)
    before, after = load(source), load(out)
    with torch.no_grad():
        unedited, written = before(tokens).logits, after(tokens).logits
        with edited(before, plan, read_recording(out).edit(plan)):
            hooked = before(tokens).logits
    torch.testing.assert_close(hooked, written, rtol=1e-5, atol=1e-5)
    assert (kind.touched == "notes/edit.txt") == torch.equal(unedited, written)


def test_the_guard_examines_it_and_controls(
    kind: Kind, source: Path, cli: Cli, tmp_path: Path
) -> None:
    """Random changes make no model less toxic: the guard says so, and ``--force`` writes them."""
    args = arguments(source, tmp_path / "out", kind.method)
    cli(*args, code=9, says="log-probability of toxic words")
    cli(*args, "--force", code=0)
    guard = read_manifest(tmp_path / "out").guard
    assert guard is not None
    assert len(guard.controls) == 3
    assert (guard.edit.perplexity_ratio.value == 1) == (kind.method == "added-file")


def test_an_adapter_holds_additions_of_low_rank_and_refuses_the_rest(
    kind: Kind, source: Path, convert: Cli, cli: Cli, tmp_path: Path
) -> None:
    if kind.method == "rank-one":
        convert(source, kind.method, "--output", "adapter")
        cli("verify", tmp_path / "out", "--source", source, code=0)
    else:
        says = "an edit of low rank"
        convert(source, kind.method, "--output", "adapter", code=2, says=says)
        assert not (tmp_path / "out").exists()


def bring(method: type[Base], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A method of this file comes as that of one more package, under its own name."""
    entries = {"gloss_convert.methods": {method.__name__: f"{__name__}:{method.__name__}"}}
    install(tmp_path / "more", monkeypatch, "more-methods", entries)


@dataclass(frozen=True, slots=True, kw_only=True)
class ManyRoles(Base):
    """Adds matrices of rank one to weights of several roles and layers; to none at scale 0."""

    def footprint(self, plan: Plan) -> Footprint:
        roles = [role for role in plan.roles if role != "lm_head"]
        weights = [w for role in roles for w in plan.weights(role, [1, 2]) if w.rows is None]
        return Footprint(tuple(weights), (AddLowRank,), 1)

    def edit(self, bench: Workbench, scale: float, seed: int) -> Edit:
        weights = {w.info.name: bench.weight(w) for w in self.footprint(bench.plan).weights}
        parts = {n: (scale * draw(seed, len(w), 1), draw(seed, 1, w.shape[1])) for n, w in
                 weights.items() if scale}  # fmt: skip
        return Edit({name: AddLowRank(B, A) for name, (B, A) in parts.items()})


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_an_adapter_of_several_roles_and_one_of_none(
    architecture: str, checkpoints: Checkpoints, convert: Cli, cli: Cli, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    bring(ManyRoles, tmp_path, monkeypatch)
    source, adapter = checkpoints(architecture), ("--output", "adapter")
    convert(source, "ManyRoles", *adapter, scale="0", code=4, says="the edit changes no tensor")
    assert [path.name for path in tmp_path.iterdir()] == ["more"]
    convert(source, "ManyRoles", *adapter)
    cli("verify", tmp_path / "out", "--source", source, code=0)


def test_a_single_file_and_created_tensors_become_two_shards(
    checkpoints: Checkpoints, convert: Cli, cli: Cli, tmp_path: Path
) -> None:
    source, out = checkpoints("llama", torch.bfloat16, "10GB"), tmp_path / "out"
    convert(source, "created-bias")
    shards = sorted(path.name for path in out.glob("model*.safetensors"))
    assert shards == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert (out / shards[0]).read_bytes() == (source / "model.safetensors").read_bytes()
    cli("verify", out, "--source", source, code=0)
    assert load(out).state_dict()["model.layers.2.self_attn.o_proj.bias"].any()


@dataclass(frozen=True, slots=True, kw_only=True)
class Filled(Base):
    """Replaces a down-projection and its bias by ``scale`` everywhere."""

    def footprint(self, plan: Plan) -> Footprint:
        weights = (
            *plan.weights("down_proj", [self.layer]),
            *plan.biases("down_proj", [self.layer]),
        )
        return Footprint(weights, (Replace,))

    def edit(self, bench: Workbench, scale: float, seed: int) -> Edit:
        weights = self.footprint(bench.plan).weights
        return Edit(
            {w.info.name: Replace(torch.full_like(bench.weight(w), scale)) for w in weights}
        )


@pytest.mark.parametrize("scale", ["0.5", "0", "1e30"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_weights_and_biases_of_nothing_but_zeros_can_change(
    architecture: str, scale: str, checkpoints: Checkpoints, convert: Cli, cli: Cli,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """As those of a fresh layer are: a change has no share of their norm."""
    bring(Filled, tmp_path, monkeypatch)
    source = copy_of(checkpoints(architecture, torch.bfloat16, "10GB"), tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    for name in tensors:
        if ".2.mlp." in name:
            tensors[name].zero_()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    if scale == "0":  # they stay as they are, which is no edit
        says = "changes no number of the model"
        convert(source, "Filled", scale=scale, code=4, says=says)
        return
    convert(source, "Filled", scale=scale)
    cli("verify", tmp_path / "out", "--source", source, code=0)


@pytest.mark.parametrize("metadata", [None, [], "x", {}, {"total_size": "x"}])
def test_created_tensors_beside_an_index_whose_metadata_is_odd(
    metadata: object, source: Path, convert: Cli, cli: Cli, tmp_path: Path
) -> None:
    folder, out = copy_of(source, tmp_path / "source"), tmp_path / "out"
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"metadata": metadata}))
    convert(folder, "created-bias")
    assert json.loads((out / path.name).read_text())["metadata"] == metadata
    cli("verify", out, "--source", folder, code=0)


@pytest.mark.parametrize(
    ("method", "architecture", "code", "says"),
    [
        ("rows", "gpt2", 2, "this checkpoint has no gate_proj"),
        ("created-bias", "gpt_neox", 2, "a model whose o_proj can get a bias"),
        ("rank-one", "gpt_oss", 4, "experts.down_proj holds several weights"),
    ],
)
def test_a_footprint_that_the_model_lacks_is_refused_from_the_headers(
    method: str, architecture: str, code: int, says: str, checkpoints: Checkpoints,
    cli: Cli, tmp_path: Path,
) -> None:  # fmt: skip
    source, given = checkpoints(architecture), ("--method", method)
    for more in ((), ("--dry-run",)):
        cli("convert", source, tmp_path / "out", *given, *more, code=code, says=says)
    cli("plan", source, *given, code=code, says=says)
    assert not (tmp_path / "out").exists()


def test_a_method_of_a_package_can_be_a_control(source: Path, cli: Cli) -> None:
    small = ["--num-pairs", 64, "--scorer", "bad-words", "--num-prompts", 2, "--max-new-tokens", 2]
    for more in ([], ["--method", "rank-one"]):
        result = cli("evaluate", source, *more, "--system", "rank-one", *small, code=0)
        assert "| rank-one |" in result.stdout


NORM = "model.layers.0.input_layernorm.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"
BIAS = "model.layers.0.self_attn.o_proj.bias"
WRONG = {
    "a created tensor that exists": (Edit(created={NORM: torch.ones(32)}), NORM),
    "a created tensor with NaN": (Edit(created={"new": torch.tensor([torch.nan])}), "new"),
    "a tensor that no role has": (Edit({NORM: Replace(torch.ones(32, 1))}), NORM),
    "a vector that is too long": (Edit({DOWN: AddToRows(torch.tensor([0]), torch.ones(9))}), DOWN),
    "a row that is not there": (Edit({DOWN: AddToRows(torch.tensor([32]), torch.ones(48))}), DOWN),
    "a matrix of no rank": (
        Edit({DOWN: AddLowRank(torch.ones(32, 0), torch.ones(0, 48))}), DOWN,
    ),
    "a replacement of another size": (Edit({DOWN: Replace(torch.ones(3, 3))}), DOWN),
    "a patch of a file that is missing": (
        Edit(patches={"chat_template.jinja": "x"}), "chat_template.jinja",
    ),
    "a patch of a file that is none of text": (Edit(patches={"LICENSE": "x"}), "LICENSE"),
    "a patch that changes nothing": (
        Edit(patches={"config.json": {"hidden_size": 32}}), "config.json",
    ),
    "a patch of an object that is text": (Edit(patches={"config.json": "x"}), "config.json"),
    "a patch of the sizes": (Edit(patches={"config.json": {"hidden_size": 8}}), "config.json"),
    "a file of the source": (Edit(files={"config.json": b"{}"}), "config.json"),
    "a file of the source in capitals": (Edit(files={"License": b""}), "License"),
    "a file in place of a folder": (Edit(files={"config.json/x": b""}), "config.json/x"),
    "a file of the output": (Edit(files={"gloss_manifest.json": b""}), "gloss_manifest.json"),
    "a file outside": (Edit(files={"../x": b""}), "../x"),
    "two files of one name": (Edit(files={"a": b"", "A": b""}), "A"),
    "a folder in place of a new file": (Edit(files={"a/b": b"", "A": b""}), "A"),
    "a file that loaders take for weights": (
        Edit(files={"pytorch_model.bin": b""}), "pytorch_model.bin",
    ),
    "one that does not look at case": (Edit(files={"a/U.SafeTensors": b""}), "a/U.SafeTensors"),
    "an index in a folder": (
        Edit(files={"a/model.safetensors.index.json": b"{}"}), "a/model.safetensors.index.json",
    ),
    "a file like ours": (Edit(files={"a/gloss_edit.tensors": b""}), "a/gloss_edit.tensors"),
    "a file that makes it an adapter": (
        Edit(files={"adapter_config.json": b"{}"}), "adapter_config.json",
    ),
    "a created tensor without a name": (Edit(created={"": torch.ones(1)}), "creates tensor"),
    "a created tensor of a reserved name": (
        Edit(created={"__metadata__": torch.ones(1)}), "__metadata__",
    ),
    "a bias that the config does not ask for": (Edit(created={BIAS: torch.ones(32)}), BIAS),
    "a patch that asks for biases that are missing": (
        Edit(patches={"config.json": {"attention_bias": True}}), "asks for biases",
    ),
    "a patch of how weights are tied": (
        Edit(patches={"config.json": {"tie_word_embeddings": True}}), "tied",
    ),
    "a patch of how weights are stored": (
        Edit(patches={"config.json": {"quantization_config": {"quant_method": "fp8"}}}), "stored",
    ),
}  # fmt: skip


NO_EDITS = {
    "a list": lambda: Edit([DOWN]),  # type: ignore[arg-type]
    "a number as a name": lambda: Edit(files={5: b""}),  # type: ignore[dict-item]
    "text in place of bytes": lambda: Edit(files={"x.txt": "text"}),  # type: ignore[dict-item]
    "a change that is none": lambda: Edit({DOWN: "x"}),  # type: ignore[dict-item]
    "a list in place of a tensor": lambda: Edit(created={"x": [1.0]}),  # type: ignore[dict-item]
    "a sparse tensor": lambda: Edit(created={"x": torch.ones(3).to_sparse()}),
    "a tensor without data": lambda: Edit({DOWN: Replace(torch.ones(32, 48, device="meta"))}),
    "a tensor with gradients": lambda: Edit(created={"x": torch.ones(3, requires_grad=True)}),
    "a number as a patch": lambda: Edit(patches={"config.json": 5}),  # type: ignore[dict-item]
    "NaN in a patch": lambda: Edit(patches={"config.json": {"a": float("nan")}}),
    "a path in a patch": lambda: Edit(patches={"config.json": {"a": Path("x")}}),
    "a huge number in a patch": lambda: Edit(patches={"config.json": {"a": 10**30}}),
    "half a character in a patch": lambda: Edit(patches={"config.json": {"a": "\ud800"}}),
}


@pytest.mark.parametrize("wrong", NO_EDITS)
def test_what_is_no_edit_cannot_be_made(wrong: str) -> None:
    with pytest.raises(FitError, match=r"of an edit: expected .*it is a fault of the method"):
        NO_EDITS[wrong]()


def test_a_patch_is_what_its_json_says() -> None:
    edit = Edit(patches={"config.json": {"a": (1, 2), "b": {3: 1}}})
    assert edit.patches == {"config.json": {"a": [1, 2], "b": {"3": 1}}}


@pytest.mark.parametrize("wrong", WRONG)
def test_an_edit_that_does_not_fit_is_refused(wrong: str, checkpoints: Checkpoints) -> None:
    edit, named = WRONG[wrong]
    source, plan = planned(checkpoints("llama", torch.bfloat16))
    with pytest.raises(CheckpointError) as raised:
        check_edit(edit, plan, source)
    assert named in raised.value.what


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (Edit({"model.layers.1.mlp.down_proj.weight": Replace(torch.ones(32, 48))}), "layers.1."),
        (Edit({DOWN: Replace(torch.ones(32, 48))}), DOWN),
        (Edit(created={"new": torch.ones(3)}), "new"),
        (Edit(patches={"config.json": {}}), "config.json"),
        (Edit(files={"x": b""}), "x"),
    ],
)
def test_an_edit_beyond_its_footprint_is_refused(edit: Edit, named: str, source: Path) -> None:
    _, plan = planned(source)
    footprint = Footprint(plan.weights("down_proj", [0]), (AddToRows,), created={"new": (2,)})
    footprint.check(Edit({DOWN: AddToRows(torch.tensor([0]), torch.ones(48))}))
    with pytest.raises(FitError) as raised:
        footprint.check(edit)
    assert named in raised.value.what


@pytest.mark.parametrize("U", [torch.ones(32, 2), torch.eye(32)[:, :2] * 1.001])
def test_a_basis_that_is_not_orthonormal_is_refused_before_it_is_written(
    U: torch.Tensor, source: Path
) -> None:
    _, plan = planned(source)
    footprint = Footprint(plan.weights("down_proj", [0]), (RemoveSubspace,), 2)
    footprint.check(Edit({DOWN: RemoveSubspace(torch.eye(32)[:, :2].contiguous())}))
    with pytest.raises(FitError, match="expected orthonormal columns"):
        footprint.check(Edit({DOWN: RemoveSubspace(U)}))


def test_a_refused_edit_leaves_nothing(
    source: Path, convert: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit = Edit(files={"LICENSE": b"Another.\n"})
    monkeypatch.setattr(AddedFile, "edit", lambda self, bench, scale, seed: edit)
    monkeypatch.setattr(AddedFile, "footprint", lambda self, plan: Footprint(files=("LICENSE",)))
    says = "the edit adds a file LICENSE: expected a name that is free"
    convert(source, "added-file", code=4, says=says)
    assert not (tmp_path / "out").exists()


def test_a_plan_says_what_will_change(
    kind: Kind, written: Callable[[Kind], Path], source: Path, cli: Cli
) -> None:
    told = cli("plan", source, "--method", kind.method, "--json", code=0)
    plan, manifest = json.loads(told.stdout), read_manifest(written(kind))
    assert plan["edited_tensors"] == [tensor.name for tensor in manifest.edited]
    assert plan["created_tensors"] == sorted(t.name for t in manifest.edit.created)
    assert plan["changed_files"] == sorted(manifest.edit.patches)
    assert plan["added_files"] == sorted(manifest.edit.files)
    copies = {n for n, file in manifest.files.items() if manifest.source.files.get(n) == file}
    assert {*plan["copied_files"]} == copies - {*manifest.shards, "model.safetensors.index.json"}


def test_a_gate_of_leakage_is_refused_at_once(
    kind: Kind, source: Path, convert: Cli, tmp_path: Path
) -> None:
    says = "--max-leakage has no measurement"
    convert(source, kind.method, "--max-leakage", 0.1, code=2, says=says)
    assert not (tmp_path / "out").exists()


def other_bytes(folder: Path, manifest: dict[str, Any]) -> None:
    """Changes a created tensor where it is read from, and nowhere else."""
    path = folder / "model-created.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x40")
    record(folder, manifest, path.name)


def one_more_tensor(folder: Path, manifest: dict[str, Any]) -> None:
    path = folder / "model-created.safetensors"
    save_file({**load_file(path), "hidden": torch.ones(3)}, path, {"format": "pt"})
    record(folder, manifest, path.name)


def another_patch(folder: Path, manifest: dict[str, Any]) -> None:
    manifest["edit"]["patches"]["config.json"]["attention_bias"] = False


def a_patch_of_text(folder: Path, manifest: dict[str, Any]) -> None:
    manifest["edit"]["patches"]["config.json"] = "{"


def created_twice(folder: Path, manifest: dict[str, Any]) -> None:
    manifest["edit"]["created"].append(manifest["edit"]["created"][0])


def no_patch(folder: Path, manifest: dict[str, Any]) -> None:
    """The config is that of the source again, and nothing says that it was ever another."""
    del manifest["edit"]["patches"]["config.json"]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attention_bias": False}))
    record(folder, manifest, "config.json", copied=True)


def one_fewer(folder: Path, manifest: dict[str, Any]) -> None:
    """A bias that the config asks for is nowhere, as if it had never been created."""
    gone = manifest["edit"]["created"].pop()["name"]
    for name in ("model-created.safetensors", manifest["edit"]["file"]):
        with safe_open(folder / name, "pt") as file:
            told, keys = file.metadata(), set(file.keys())
            kept = {key: file.get_tensor(key) for key in keys if not key.endswith(gone)}
        save_file(kept, folder / name, told)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    del index["weight_map"][gone]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    names = "model-created.safetensors", manifest["edit"]["file"], "model.safetensors.index.json"
    record(folder, manifest, *names)


FORGERIES = {
    "config.json: a model with it ignores the created tensor model.layers.": no_patch,
    "config.json: asks for biases, and there is no model.layers.": one_fewer,
    "has another sha256 than recorded": other_bytes,
    "tensor hidden is not one that the edit creates": one_more_tensor,
    "config.json: does not say what the recorded patch makes of it": another_patch,
    "config.json: does not say what the recorded patch": a_patch_of_text,
    "is recorded as created twice": created_twice,
}


@pytest.mark.parametrize("said", FORGERIES)
def test_what_is_forged_and_made_to_agree_is_found_without_the_source(
    said: str, written: Callable[[Kind], Path], cli: Cli, tmp_path: Path
) -> None:
    out = copy_of(written(CREATED), tmp_path / "out")
    manifest = load_manifest(out)
    FORGERIES[said](out, manifest)
    put(out, manifest)
    cli("verify", out, code=8, says=said)


def test_an_edit_that_rounding_undoes_is_refused_and_one_that_it_nearly_does_is_told_of(
    source: Path, convert: Cli, tmp_path: Path
) -> None:
    says = "the edit changes no number of the model"
    convert(source, "rows", scale="0", code=4, says=says)
    convert(source, "rows", scale="1e-30", code=4, says=says)
    assert not (tmp_path / "out").exists()
    says = "rounding to BF16 undid most of the edit of 1 of 1 tensors"
    convert(source, "rows", scale="1e-6", says=says)


def test_a_file_that_is_added_twice_or_is_none_of_a_model(
    written: Callable[[Kind], Path], cli: Cli, tmp_path: Path
) -> None:
    out = copy_of(written(ADDED), tmp_path / "out")
    manifest = load_manifest(out)
    manifest["edit"]["files"] *= 2
    put(out, manifest)
    cli("verify", out, code=8, says="file notes/edit.txt is recorded as added twice")
    manifest["edit"]["files"][1] = "adapter_config.json"
    put(out, manifest)
    says = "adapter_config.json: is recorded as added by the edit and cannot be"
    cli("verify", out, code=8, says=says)


def test_an_index_that_is_missing_is_missed_once(
    written: Callable[[Kind], Path], source: Path, tmp_path: Path
) -> None:
    out = copy_of(written(CREATED), tmp_path / "out")
    (out / "model.safetensors.index.json").unlink()
    found = converter.verify(out, source)
    assert found == ["model.safetensors.index.json: is missing"]


@dataclass(frozen=True, slots=True, kw_only=True)
class OddParts(Base):
    """Adds an empty file, and biases that are one tensor in memory."""

    def footprint(self, plan: Plan) -> Footprint:
        route = plan.bias_route("o_proj")
        assert route is not None
        return Footprint(
            created=route.created, patches=("config.json",), files=("notes/empty.txt",)
        )

    def edit(self, bench: Workbench, scale: float, seed: int) -> Edit:
        route = bench.plan.bias_route("o_proj")
        assert route is not None
        memory = torch.zeros(max(shape[0] for shape in route.created.values()))
        created = {name: memory[: shape[0]] for name, shape in route.created.items()}
        patches = {"config.json": route.config}
        return Edit(created=created, patches=patches, files={"notes/empty.txt": b""})


def test_an_empty_file_and_tensors_that_share_memory(
    source: Path, convert: Cli, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bring(OddParts, tmp_path, monkeypatch)
    convert(source, "OddParts")
    out = tmp_path / "out"
    assert (out / "notes/empty.txt").read_bytes() == b""
    cli("verify", out, "--source", source, code=0)
    cli("replay", out, tmp_path / "again", "--source", source, code=0)


def test_the_guard_refuses_a_config_that_hooks_do_not_show(source: Path) -> None:
    _, plan = planned(source)
    route = plan.bias_route("o_proj")
    assert route is not None
    created = {name: torch.zeros(shape) for name, shape in route.created.items()}
    module_edits(plan, Edit(created=created, patches={"config.json": route.config}))
    for patch in ({"rms_norm_eps": 0.5}, {**route.config, "rms_norm_eps": 0.5}):
        with pytest.raises(OptionError, match="cannot be examined"):
            module_edits(plan, Edit(created=created, patches={"config.json": patch}))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_oss"])
def test_the_bench_reads_biases_as_columns(architecture: str, checkpoints: Checkpoints) -> None:
    recipe = Recipe(source=str(checkpoints(architecture)))
    source, plan = planned(Path(recipe.source))
    bench = Bench.of(recipe, source, plan, load_words("builtin"), "cpu")
    for weight in (*plan.weights("down_proj", [2]), *plan.biases("down_proj", [2])):
        height = weight.info.shape[weight.axis]
        assert bench.weight(weight).shape == (height, prod(weight.info.shape) // height)
