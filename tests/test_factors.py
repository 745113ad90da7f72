"""A subspace weakened by a factor of each layer, W - a U (U^T W), from the option to verify."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from converter.checkpoints.names import EDIT_FILE
from converter.checkpoints.resolve import resolve
from converter.edits.base import Edit
from converter.edits.deltas import RemoveSubspace
from converter.edits.edit_file import load_bases, load_edit_tensors
from converter.entrypoints.convert import convert
from converter.entrypoints.verify import verify
from converter.errors import OptionError
from converter.methods.options import configure, parse_factors
from converter.models.edited import edited
from converter.outputs.adapter.write import WEIGHTS, tensor_names
from converter.outputs.base import sha256_of_tensor
from converter.release.manifest import read_manifest
from converter.release.recording import read_recording
from tests.builders.adversary import load_manifest, put, record, reseal
from tests.builders.errors import refused
from tests.builders.invoke import Cli
from tests.builders.models import TINY, TINY_ARGS, Checkpoints, load, planned, tiny_recipe
from tests.test_formats import tensors_of
from tests.test_quantization import BLOCKS, as_fp8
from tests.test_subspace import DIMENSIONS, PLAN, fit, planted, with_moments

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
"""peft 0.21 asks for a name that transformers 5 deprecates."""

TYPED = "2:0.5,3:0.75"
"""Of the layers 2 to 4, which the tiny models are edited in; layer 4 loses the whole subspace."""

FACTORS = {2: 0.5, 3: 0.75, 4: 1.0}


def weakened(source: Path, out: Path, **changed: Any) -> Path:
    """A conversion with these factors, in float32 or whatever the source has."""
    convert(tiny_recipe(source, options={**TINY, "factors": TYPED}, **changed), out)
    return out


@pytest.fixture(scope="module")
def made(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A bfloat16 Llama and its conversion. Read only."""
    source = checkpoints("llama", torch.bfloat16)
    return source, weakened(source, tmp_path_factory.mktemp("weakened") / "out")


@pytest.fixture
def out(made: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of it, to be altered."""
    shutil.copytree(made[1], tmp_path / "copy")
    return tmp_path / "copy"


def as_matrix(tensor: Tensor, axis: int) -> Tensor:
    """Outputs first, all else behind them; float64."""
    return tensor.double().movedim(axis, 0).reshape(tensor.shape[axis], -1)


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "gpt_oss"])
@torch.no_grad()
def test_each_layer_loses_its_share_however_its_weights_are_stored(
    kind: str, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """Conv1D, biases, a norm after the FFN, experts in one tensor: file, hooks and record agree."""
    source = checkpoints(kind)
    out = weakened(source, tmp_path / "out")
    assert verify(out, resolve(str(source))) == verify(out) == []
    before, after, stored = tensors_of(source), tensors_of(out), load_edit_tensors(out / EDIT_FILE)
    manifest = read_manifest(out)
    assert manifest.factors == {2: 0.5, 3: 0.75}
    assert {entry.layer for entry in manifest.edited} == set(FACTORS)
    for entry in manifest.edited:
        W, new = (as_matrix(tensors[entry.name], entry.axis) for tensors in (before, after))
        U, a = stored[entry.tensors["U"]].double(), FACTORS[entry.layer]
        A = stored[entry.tensors.get("A", entry.tensors["U"])].double()
        exact = W - a * A @ (U.T @ W)
        assert float((new - exact).norm() / W.norm()) < 1e-6
        alone = "remove-subspace" if a == 1 else "weaken-subspace"
        assert entry.kind == ("remove-oblique" if kind == "gemma2" else alone)
    ids = torch.arange(40).reshape(2, 20)
    model, plan = load(source), planned(source)[1]
    with edited(model, plan, read_recording(out).edit(plan)):
        hooked = model(ids).logits
    torch.testing.assert_close(hooked, load(out)(ids).logits, rtol=1e-4, atol=1e-4)


def test_the_record_says_it_and_a_replay_gives_the_same_bytes(
    made: tuple[Path, Path], cli: Cli, tmp_path: Path
) -> None:
    source, out = made
    cli("verify", out, "--source", source, code=0)
    manifest = load_manifest(out)
    assert manifest["method"]["options"]["factors"] == [1.0, 1.0, 0.5, 0.75, 1.0, 1.0]
    assert "| factors | 0.5 in layer 2, 0.75 in layer 3; 1 in the others" in (
        out / "README.md"
    ).read_text("utf-8")
    assert all(entry["measures"]["leakage"] < 0.05 for entry in manifest["edited"])
    cli("replay", out, tmp_path / "again", "--source", source, code=0)
    for path in out.glob("*.safetensors"):
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
    cli("verify", tmp_path / "again", "--source", source, code=0)


def test_a_factor_of_one_in_all_layers_is_the_edit_without_factors(
    converted: tuple[Path, Path], tmp_path: Path
) -> None:
    """And that says nothing of factors, in its manifest or its edit's file."""
    source, usual = converted
    recipe = tiny_recipe(source, num_pairs=64, options={**TINY, "factors": "1"})
    convert(recipe, tmp_path / "out")
    for path in (*usual.glob("*.safetensors"), usual / EDIT_FILE):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    text = (usual / "gloss_manifest.json").read_text("utf-8")
    assert "factor" not in text
    assert "weaken" not in text


@torch.no_grad()
def test_peft_makes_the_same_of_an_adapter(checkpoints: Checkpoints, tmp_path: Path) -> None:
    source = checkpoints("gpt2")
    out = weakened(source, tmp_path / "out", output="adapter")
    assert verify(out, resolve(str(source))) == verify(out) == []
    stored, bases = load_file(out / WEIGHTS), load_bases(out / EDIT_FILE)
    for entry in read_manifest(out).edited:
        assert entry.lora is not None
        A, B = (stored[name] for name in tensor_names(entry.lora.module))
        U, a = bases[entry.tensors["U"]], FACTORS[entry.layer]
        assert torch.equal(B, (-a * U.double()).float())
        W = as_matrix(tensors_of(source)[entry.name], entry.axis)
        exact = -a * U.double() @ (U.double().T @ W)
        error = float((B.double() @ A.double() - exact).norm() / W.norm())
        assert entry.rounding_error == pytest.approx(error, rel=1e-3)
        assert entry.relative_change == pytest.approx(float(exact.norm() / W.norm()), rel=1e-6)
    ids, (_, plan) = torch.arange(40).reshape(2, 20), planned(source)
    model = load(source)
    with edited(model, plan, read_recording(out).edit(plan)):
        expected = model(ids).logits
    adapted = PeftModel.from_pretrained(load(source), out)
    torch.testing.assert_close(adapted(ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_factors_of_an_adapter_that_are_others_than_recorded_are_found(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    out = weakened(checkpoints("llama"), tmp_path / "out", output="adapter")
    manifest, tensors = load_manifest(out), load_file(out / WEIGHTS)
    entry = first_weight(manifest)
    name = tensor_names(entry["lora"]["module"])[1]
    B = tensors[name] / 0.5 * 0.6
    save_file(tensors | {name: B}, out / WEIGHTS, {"format": "pt"})
    entry["lora"]["sha256_b"] = sha256_of_tensor(B)
    put(out, manifest)
    reseal(out, WEIGHTS)
    assert any("lora_B.weight is not that of the edit" in problem for problem in verify(out))


def test_fp8_keeps_the_share_to_its_rounding(
    checkpoints: Checkpoints, cli: Cli, tmp_path: Path
) -> None:
    source = as_fp8(checkpoints("qwen3", torch.bfloat16), tmp_path / "fp8", BLOCKS)
    out = tmp_path / "out"
    cli("convert", source, out, "--num-pairs", 32, *TINY_ARGS, "-o", f"factors={TYPED}", code=0)
    cli("verify", out, code=0)
    cli("verify", out, "--source", source, code=0)
    manifest = read_manifest(out)
    assert manifest.factors == {2: 0.5, 3: 0.75}
    assert all(entry.measures["leakage"] < 0.05 for entry in manifest.edited)


def first_weight(manifest: dict[str, Any]) -> dict[str, Any]:
    """The record of the first edited matrix; a bias may have next to nothing along U."""
    entry: dict[str, Any] = next(e for e in manifest["edited"] if len(e["shape"]) == 2)
    return entry


def along_other_columns(out: Path, manifest: dict[str, Any]) -> None:
    """The first edited weight with what it has along U in reverse order: norms stay as they are."""
    entry = first_weight(manifest)
    tensors, U = load_file(out / entry["shard"]), load_bases(out / EDIT_FILE)["U"].double()
    W = tensors[entry["name"]].double()
    P = U.T @ W
    tensors[entry["name"]] = (W + U @ (P.flip(1) - P)).bfloat16()
    rewrite(out, manifest, entry, tensors)


def taken_out(out: Path, manifest: dict[str, Any]) -> None:
    """The first edited weight with nothing left along U."""
    entry = first_weight(manifest)
    tensors, U = load_file(out / entry["shard"]), load_bases(out / EDIT_FILE)["U"].double()
    W = tensors[entry["name"]].double()
    tensors[entry["name"]] = (W - U @ (U.T @ W)).bfloat16()
    rewrite(out, manifest, entry, tensors)


def rewrite(
    out: Path, manifest: dict[str, Any], entry: dict[str, Any], tensors: dict[str, Tensor]
) -> None:
    shard = out / entry["shard"]
    header = shard.read_bytes()[: 8 + int.from_bytes(shard.read_bytes()[:8], "little")]
    save_file(tensors, shard, {"format": "pt"})
    assert shard.read_bytes().startswith(header), "written as transformers had written it"
    entry["sha256_after"] = sha256_of_tensor(tensors[entry["name"]])
    record(out, manifest, entry["shard"])


def another_factor(out: Path, manifest: dict[str, Any]) -> None:
    first_weight(manifest)["measures"]["factor"] = 0.6


def no_leakage(out: Path, manifest: dict[str, Any]) -> None:
    first_weight(manifest)["measures"]["leakage"] = 0.0


def another_option(out: Path, manifest: dict[str, Any]) -> None:
    """Other factors than the edit's, wherever the manifest speaks of them."""
    manifest["run"]["options"]["factors"] = "2:0.6,3:0.75"
    manifest["method"]["options"]["factors"][2] = 0.6


def another_edit(out: Path, manifest: dict[str, Any]) -> None:
    """Other factors everywhere but in the weights."""
    entry = first_weight(manifest)
    name, tensors = entry["tensors"]["a"], load_file(out / EDIT_FILE)
    tensors[name] = torch.tensor([0.6], dtype=torch.float64)
    save_file(tensors, out / EDIT_FILE, {"format": "pt"})
    another_option(out, manifest)
    another_factor(out, manifest)
    energy = entry["measures"]["energy_removed"] / (0.5 * 1.5) * (0.6 * 1.4)
    entry["measures"]["energy_removed"] = energy
    record(out, manifest, EDIT_FILE)


@pytest.mark.parametrize(
    ("forge", "without"),
    [(another_factor, True), (another_option, True), (another_edit, True), (taken_out, True),
     (along_other_columns, False), (no_leakage, False)],
)  # fmt: skip
def test_forged_factors_are_found(
    forge: Any, without: bool, made: tuple[Path, Path], out: Path
) -> None:
    """How near each column comes to its share, and not all of them together, the source tells."""
    manifest = load_manifest(out)
    forge(out, manifest)
    put(out, manifest)
    assert bool(verify(out)) == without, verify(out)
    assert verify(out, resolve(str(made[0])))


def factors_of(edit: Edit) -> dict[int, float]:
    """Layer -> the factor of its weight, which its bias shares."""
    edit.check(PLAN)
    found: dict[int, float] = {}
    for name, weight in PLAN.find(edit.tensors).items():
        delta = edit.tensors[name]
        assert isinstance(delta, RemoveSubspace)
        assert found.setdefault(weight.layer, delta.factor) == delta.factor
    return found


def test_edit_and_controls_have_the_factors_and_share_one_basis() -> None:
    proposal = fit("gloss", with_moments(planted()), rank=2, factors="2:0.5,3:0")
    for part in (0.4, 1):
        for edit in (proposal.edit(part), proposal.control(part, 0)):
            assert factors_of(edit) == {2: part * 0.5, 4: part}, "a layer with 0 is left alone"
            assert len({id(delta.protects) for delta in edit.tensors.values()}) == 1
    whole = fit("gloss", with_moments(planted()), rank=2)
    one, other = whole.neutral_energy(1), proposal.neutral_energy(1)
    assert one == other, "the largest of the layers"
    half = fit("gloss", with_moments(planted()), rank=2, factors="0.5").neutral_energy(1)
    assert one is not None
    assert half == pytest.approx(0.75 * one)


def test_a_search_gives_other_factors_to_the_same_fit() -> None:
    proposal = fit("gloss", with_moments(planted()), rank=2)
    assert proposal.with_factors is not None
    other = proposal.with_factors((1, 1, 0.25, 0, 1, 1))
    asked = fit("gloss", with_moments(planted()), rank=2, factors="2:0.25,3:0")
    for strength in (0.3, 1):
        assert other.edit(strength).digest() == asked.edit(strength).digest()
        assert other.control(strength, 3).digest() == asked.control(strength, 3).digest()
    assert other.with_factors is not None
    assert other.with_factors(()).edit(1).digest() == proposal.edit(1).digest()
    with pytest.raises(OptionError, match="for each of 6 layers"):
        proposal.with_factors((0.5,))


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0.7", (0.7,) * 4), ("1:0.5", (1, 0.5, 1, 1)), ("0-1:0,3:1e-1", (0, 0, 1, 0.1))],
)
def test_factors_are_typed_for_all_layers_or_by_layer(
    text: str, expected: tuple[float, ...]
) -> None:
    assert parse_factors("factors", text, 4) == expected


@pytest.mark.parametrize(
    "text", ["", "x", "1.1", "-0.1", "nan", "0.5,0.6", "1:", ":1", "1:2", "9:0.5", "1-0:0.5",
             "1:0.5,1:0.6", "1:0.5,0.6", "1:0.5,"],
)  # fmt: skip
def test_factors_that_are_none_are_refused(text: str) -> None:
    with refused(OptionError, what="-o factors"):
        parse_factors("factors", text, 4)


@pytest.mark.parametrize(
    ("text", "says"),
    [("0", "one that is not 0"), ("2-4:0", "one that is not 0"), ("1:0.5", "edited: 2, 3, 4")],
)
def test_factors_without_effect_are_refused_from_the_headers(text: str, says: str) -> None:
    method = configure("gloss", {"layers": "2-4", "factors": text}, DIMENSIONS)
    with pytest.raises(OptionError, match=says):
        method.footprint(PLAN)
