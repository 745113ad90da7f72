"""The edit as a LoRA adapter: peft and transformers make of it what the edit is."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import Result
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftConfig, PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from converter.checkpoints.names import EDIT_FILE
from converter.checkpoints.plan import Plan
from converter.checkpoints.resolve import resolve
from converter.checkpoints.safetensors.header import read_header
from converter.checkpoints.source import Source
from converter.edits.base import Edit
from converter.edits.edit_file import load_bases
from converter.edits.engine import Engine
from converter.edits.storage import dequantize
from converter.entrypoints.convert import convert
from converter.entrypoints.verify import verify
from converter.errors import CheckpointError
from converter.evaluation import fit as fitting
from converter.evaluation.guard import examine
from converter.methods.base import Proposal
from converter.models.edited import edited
from converter.models.loading import load_language_model
from converter.outputs.adapter import Adapter
from converter.outputs.adapter.write import (
    CONFIG,
    WEIGHTS,
    tensor_names,
    write_adapter,
)
from converter.outputs.base import WriteJob, Written, sha256_of_tensor
from converter.release.manifest import read_manifest
from converter.release.recording import read_recording
from tests.builders.adversary import forged, load_manifest, put, reseal
from tests.builders.edits import removal
from tests.builders.errors import refused
from tests.builders.invoke import Cli
from tests.builders.meta import write_native
from tests.builders.models import (
    FFN,
    HIDDEN,
    MIXTURES,
    OTHER_LAYOUTS,
    TINY,
    TINY_ARGS,
    TINY_MODELS,
    Checkpoints,
    architecture_of,
    load,
    planned,
    tiny_config,
    tiny_recipe,
)
from tests.builders.planted import planted_args
from tests.test_convert import UNPROTECTED, save_planted
from tests.test_formats import as_pickles, tensors_of
from tests.test_quantization import BLOCKS, as_fp8
from tests.test_verify import flip

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
"""peft 0.21 asks for a name that transformers 5 deprecates."""

LAYERS = (2, 3, 4)
LOADED = ["llama", "llama-tied", "gpt2", "gemma2", "gemma3", "gpt_neox", "opt", "falcon", "phi",
          "gptj", "olmo2", "qwen2_vl"]  # fmt: skip
"""Linear and Conv1D, with biases and without, a norm after the FFN, wrappers of images."""


def adapter_of(source: Path, out: Path, **changed: Any) -> Path:
    convert(tiny_recipe(source, output="adapter", **changed), out)
    return out


def bases_of(out: Path) -> dict[int, Tensor]:
    """Layer -> the basis that a folder's manifest says was taken out there."""
    bases = load_bases(out / EDIT_FILE)
    return {entry.layer: bases[entry.tensors["U"]] for entry in read_manifest(out).edited}


def edit_of(out: Path, plan: Plan) -> Edit:
    """These bases taken out of the down-projections of a checkpoint, biases left alone."""
    if plan.post_norms:  # obliquely, with tensors of its own for each layer
        return read_recording(out).edit(plan)
    return removal(plan, bases_of(out), bias=False)


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(2, 300, (3, 20), generator=torch.Generator().manual_seed(0))


def difference(a: Tensor, b: Tensor) -> float:
    """The largest, over the largest."""
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("kind", LOADED)
@torch.no_grad()
def test_peft_makes_the_edit_of_it(
    kind: str, checkpoints: Checkpoints, tmp_path: Path, ids: Tensor
) -> None:
    source = checkpoints(kind)
    out = adapter_of(source, tmp_path / "out")
    found, plan = planned(source)
    edit = edit_of(out, plan)
    assert {weight.layer for weight in plan.find(edit.tensors).values()} == set(LAYERS)
    original = load(source)
    plain = original(ids).logits
    with edited(original, plan, edit):
        expected = original(ids).logits
    assert difference(plain, expected) > 1e-3

    adapted = PeftModel.from_pretrained(load(source), out)
    assert difference(adapted(ids).logits, expected) < 1e-6
    assert torch.equal(adapted.unload()(ids).logits, plain)
    merged = PeftModel.from_pretrained(load(source), out).merge_and_unload()
    assert difference(merged(ids).logits, expected) < 1e-6
    native = load(source)
    native.load_adapter(str(out))
    assert difference(native(ids).logits, expected) < 1e-6

    assert verify(out, found) == []


@torch.no_grad()
def test_peft_switches_it_off_and_loads_another_beside_it(
    checkpoints: Checkpoints, tmp_path: Path, ids: Tensor
) -> None:
    source = checkpoints("llama")
    outs = [tmp_path / name for name in ("first", "second")]
    for out, options in zip(outs, ({}, {"rank": "2", "layers": "3-5"}), strict=True):
        adapter_of(source, out, options=TINY | options)
    alone = [PeftModel.from_pretrained(load(source), out)(ids).logits for out in outs]
    merged = load(source)
    for out in outs:
        merged = PeftModel.from_pretrained(merged, out).merge_and_unload()
    plain, both = load(source)(ids).logits, merged(ids).logits
    assert difference(both, plain) > difference(both, alone[0]) > 1e-3

    model = PeftModel.from_pretrained(load(source), outs[0], "first")
    model.load_adapter(str(outs[1]), "second")
    model.add_weighted_adapter(["first", "second"], [1, 1], "both", combination_type="cat")
    for name, expected in zip(("first", "second", "both"), (*alone, both), strict=True):
        model.set_adapter(name)
        assert difference(model(ids).logits, expected) < 1e-6
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, plain)
    saved: dict[str, Any] = {"selected_adapters": ["second"], "save_embedding_layers": False}
    model.save_pretrained(str(tmp_path / "again"), **saved)
    again, written = (load_file(out / WEIGHTS) for out in (tmp_path / "again/second", outs[1]))
    assert again.keys() == written.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in written.items())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@torch.no_grad()
def test_an_adapter_on_the_source_is_the_edited_checkpoint(
    kind: str, checkpoints: Checkpoints, cli: Cli, tmp_path: Path, ids: Tensor
) -> None:
    source = checkpoints(kind)
    for output in ("adapter", "checkpoint"):
        args = ("--output", output, "-o", "bias=keep", "--num-pairs", 32, *TINY_ARGS)
        cli("convert", source, tmp_path / output, *args, code=0)
    adapted = PeftModel.from_pretrained(load(source), tmp_path / "adapter")(ids).logits
    written = load(tmp_path / "checkpoint")(ids).logits
    assert difference(adapted, written) < 1e-6
    assert difference(load(source)(ids).logits, written) > 1e-3


@pytest.mark.parametrize("kind", sorted({*TINY_MODELS, *OTHER_LAYOUTS} - {*MIXTURES}))
def test_the_modules_of_an_adapter_are_linear_or_conv1d(kind: str) -> None:
    architecture = architecture_of(kind)
    with torch.device("meta"):
        model = getattr(transformers, architecture.auto_class).from_config(tiny_config(kind))
    down_proj = architecture.layer(3).ffns[0].weights[0]
    module = model.get_submodule(down_proj.module.format(layer=3))
    assert isinstance(module, Conv1D if down_proj.output_axis else nn.Linear)


@pytest.fixture
def adapt(cli: Cli, checkpoints: Checkpoints, tmp_path: Path) -> Cli:
    """Convert a tiny model of a kind to an adapter, with more arguments."""

    def run(kind: str, *args: object, **expected: Any) -> Result:
        given = ("--output", "adapter", "--num-pairs", 32, *TINY_ARGS, *args)
        return cli("convert", checkpoints(kind), tmp_path / "out", *given, **expected)

    return run


@pytest.mark.parametrize("kind", sorted(MIXTURES))
def test_mixtures_of_experts_are_refused_before_anything_is_computed(
    kind: str, checkpoints: Checkpoints, cli: Cli, adapt: Cli
) -> None:
    result = adapt(kind, code=2, says="--output adapter: expected one feed-forward network")
    assert "activations" not in result.stderr
    cli("plan", checkpoints(kind), "--output", "adapter", code=2)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_biases_cannot_be_projected_and_are_kept_if_nothing_is_said(
    kind: str, adapt: Cli, tmp_path: Path
) -> None:
    says = "-o bias=project: expected bias=keep with --output adapter"
    assert "activations" not in adapt(kind, "-o", "bias=project", code=2, says=says).stderr
    adapt(kind, code=0, says="3 biases stay as they are")
    manifest = read_manifest(tmp_path / "out")
    assert manifest.method.options["bias"] == "keep"
    assert {entry.role for entry in manifest.edited} == {"down_proj"}


def test_without_biases_there_is_nothing_to_refuse(adapt: Cli) -> None:
    adapt("qwen2", "-o", "bias=project", code=0)


def test_options_without_an_effect_are_refused(adapt: Cli) -> None:
    for option, value in (("--rounding", "nearest"), ("--workers", 2)):
        says = f"{option} has no effect with --output adapter; leave it out"
        adapt("llama", option, value, code=2, says=says)


def test_the_guard_measures_the_edit_that_the_adapter_makes(
    planted: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That is the one which leaves the biases, although nothing was said about them."""
    measured: list[Edit] = []

    def examining(probe: Any, proposal: Proposal, strength: float, **named: Any) -> Any:
        measured.extend((proposal.edit(strength), proposal.control(strength, 0)))
        return examine(probe, proposal, strength, **named)

    monkeypatch.setattr(fitting, "examine", examining)
    args = (*planted_args(planted), "--output", "adapter", "--json")
    result = cli("convert", planted, tmp_path / "out", *args, code=0)
    weights = {f"model.layers.{layer}.mlp.down_proj.weight" for layer in (1, 2, 3, 4)}
    assert [set(edit.tensors) for edit in measured] == [weights, weights]
    assert {entry.name for entry in read_manifest(tmp_path / "out").edited} == weights
    found = json.loads(result.stdout)
    assert found["output"] == "adapter"
    assert found["guard"]["edit"]["teacher_forced"]["value"] < 0.5
    assert found["max_leakage"] < 1e-6


def test_a_rank_that_serving_engines_do_not_take_is_warned_about(
    checkpoints: Checkpoints, cli: Cli, tmp_path: Path
) -> None:
    args = ("--output", "adapter", "--method", "random", "--no-guard", "--num-pairs", 32)
    options = ("-o", "layers=2-4", "-o", "protect_shared=8", "-o")
    for rank, warned in ((17, True), (16, False)):
        out = tmp_path / str(rank)
        result = cli("convert", checkpoints("llama"), out, *args, *options, f"rank={rank}", code=0)
        assert ("serving engines take 16 or less" in result.stderr) == warned


@pytest.fixture(scope="module")
def made(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A bfloat16 Llama and its adapter. Read only."""
    source = checkpoints("llama", torch.bfloat16)
    return source, adapter_of(source, tmp_path_factory.mktemp("made") / "out")


def test_the_folder_holds_what_peft_writes_and_our_records(made: tuple[Path, Path]) -> None:
    source, out = made
    assert {path.name for path in out.iterdir()} == {
        WEIGHTS, CONFIG, "LICENSE", "README.md", "gloss_manifest.json",
        "gloss_edit.tensors", "SHA256SUMS",
    }  # fmt: skip
    config = json.loads((out / CONFIG).read_text())
    modules = [f"model.layers.{layer}.mlp.down_proj" for layer in LAYERS]
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (4, 4, modules)
    assert (config["base_model_name_or_path"], config["revision"]) == (None, None)
    assert not set(config) - set(asdict(LoraConfig()))  # keys that peft knows
    found = PeftConfig.from_pretrained(str(out))
    assert isinstance(found, LoraConfig)
    assert found.inference_mode
    with safe_open(out / WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    tensors = load_file(out / WEIGHTS)
    assert set(tensors) == {name for module in modules for name in tensor_names(module)}
    header = read_header(out / WEIGHTS)
    assert header.size - header.data_start == 3 * 4 * 4 * (HIDDEN + FFN)
    U = load_bases(out / EDIT_FILE)["U"].double()
    weights = tensors_of(source)
    for module in modules:
        A, B = (tensors[name].double() for name in tensor_names(module))
        W = weights[f"{module}.weight"].double()
        assert torch.equal(B, -U)
        assert torch.allclose(A, U.T @ W, rtol=2**-24, atol=1e-12)


def test_the_manifest_says_what_was_read_and_what_the_adapter_does(made: tuple[Path, Path]) -> None:
    source, out = made
    manifest = read_manifest(out)
    assert manifest.run.output == "adapter"
    shards = {path.name for path in source.glob("*.safetensors")}
    assert shards < set(manifest.source.files)
    for entry in manifest.edited:
        assert entry.sha256_after is None
        assert (entry.kind, entry.tensors) == ("remove-subspace", {"U": "U"})
        assert entry.measures["leakage"] < 1e-6
        assert entry.rounding_error < 1e-7
        assert entry.relative_change == pytest.approx(entry.measures["energy_removed"] ** 0.5)


def test_the_base_is_named(adapt: Cli, tmp_path: Path) -> None:
    adapt("llama", "--base-model", "someone/tiny", code=0)
    data = ModelCard.load(tmp_path / "out/README.md").data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == ("someone/tiny", "adapter")
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert config["base_model_name_or_path"] == "someone/tiny"


def test_a_plan_says_how_small_it_is(
    checkpoints: Checkpoints, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And so much room is asked for, not that of a model."""
    source = checkpoints("llama")
    result = cli(
        "plan", source, "--output", "adapter", "-o", "rank=4", "-o", "layers=2-4", "--json"
    )
    plan = json.loads(result.stdout)
    assert plan["bytes_to_write"] == 3 * 4 * 4 * (HIDDEN + FFN)
    assert plan["copied_files"] == ["LICENSE"]
    text = cli("plan", source, "--output", "adapter").stdout
    assert "adapter of 0.0 MB to write" in text
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 50_000))
    args = ("convert", source, tmp_path / "out", "--dry-run")
    cli(*args, code=7)
    cli(*args, "--output", "adapter", code=0)


def write(source: Source, plan: Plan, edit: Edit, folder: Path) -> None:
    folder.mkdir()
    write_adapter(WriteJob(source=source, plan=plan, edit=edit, folder=folder, engine=Engine()))


@torch.no_grad()
def test_layers_may_have_subspaces_of_different_ranks(
    checkpoints: Checkpoints, tmp_path: Path, ids: Tensor
) -> None:
    source, plan = planned(checkpoints("gpt2"))
    bases = {n: torch.linalg.qr(torch.randn(HIDDEN, n)).Q for n in LAYERS}
    edit = removal(plan, bases, bias=False)
    write(source, plan, edit, tmp_path / "out")
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    pattern = {f"transformer.h.{n}.mlp.c_proj": n for n in (2, 3)}
    assert (config["r"], config["rank_pattern"], config["alpha_pattern"]) == (4, pattern, pattern)
    original = load(source.folder)
    with edited(original, plan, edit):
        expected = original(ids).logits
    adapted = PeftModel.from_pretrained(load(source.folder), tmp_path / "out")
    assert difference(adapted(ids).logits, expected) < 1e-6


def test_shards_without_an_edited_weight_are_not_opened(
    checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, plan = planned(checkpoints("llama"))
    opened, fetched = set(), set()
    real = Source.open

    def opening(self: Source, shard: str) -> Any:
        opened.add(shard)
        return real(self, shard)

    monkeypatch.setattr(Source, "open", opening)
    monkeypatch.setattr(Source, "fetch", lambda self, shards: fetched.update(shards))
    (weight,) = plan.weights("down_proj", [2])
    edit = removal(plan, {2: torch.linalg.qr(torch.randn(HIDDEN, 2)).Q}, bias=False)
    write(source, plan, edit, tmp_path / "out")
    assert opened == fetched == {weight.shard}
    assert len(source.shards) > 2


@torch.no_grad()
@pytest.mark.parametrize("apart", [False, True], ids=["together", "apart"])
def test_fp8_weights_count_as_the_numbers_that_they_stand_for(
    apart: bool, checkpoints: Checkpoints, tmp_path: Path, ids: Tensor
) -> None:
    folder = as_fp8(checkpoints("qwen3", torch.bfloat16), tmp_path / "fp8", BLOCKS, apart=apart)
    out = adapter_of(folder, tmp_path / "out")
    source, plan = planned(folder)
    assert verify(out, source) == []
    weights, tensors = tensors_of(folder), load_file(out / WEIGHTS)
    name = "model.layers.3.mlp.down_proj"
    W = dequantize(weights[f"{name}.weight"], weights[f"{name}.weight_scale_inv"], (16, 16))
    U = bases_of(out)[3].double()
    assert torch.allclose(tensors[tensor_names(name)[0]].double(), U.T @ W.double(), atol=1e-8)
    model: Any = load_language_model(source, plan, None, torch.float32, "cpu").module
    with edited(model, plan, edit_of(out, plan)):
        expected = model(ids).logits
    plain = model(ids).logits
    model.load_adapter(str(out))
    assert difference(model(ids).logits, expected) < 1e-6
    assert difference(plain, expected) > 1e-3


def test_sources_in_other_formats(checkpoints: Checkpoints, tmp_path: Path) -> None:
    native = tmp_path / "native"
    write_native(native)
    options = TINY | {"layers": "0-1", "protect_shared": "0", "protect_own": "0", "rank": "1"}
    pickles = as_pickles(checkpoints("llama"), tmp_path / "pickles", 2)
    for folder, chosen in ((native, options), (pickles, TINY)):
        out = adapter_of(folder, tmp_path / f"{folder.name}-out", options=chosen)
        assert verify(out, resolve(str(folder))) == []
        read = read_manifest(out).source
        assert not any(name.endswith(".safetensors") for name in read.files)
        assert read.originals


def test_a_shard_that_changes_during_the_run_is_noticed(
    checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = shutil.copytree(checkpoints("llama"), tmp_path / "source")
    real = Adapter.write

    def meanwhile(self: Adapter, job: WriteJob) -> Written:
        shard = min(source.glob("*.safetensors"))
        flip(shard, shard.stat().st_size - 1)
        return real(self, job)

    monkeypatch.setattr(Adapter, "write", meanwhile)
    with refused(
        CheckpointError,
        what="model-00001-of-... is not the file that the activations were taken from",
    ):
        adapter_of(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_weight_is_named(checkpoints: Checkpoints, tmp_path: Path) -> None:
    source = shutil.copytree(checkpoints("gpt2", torch.float32, "1GB"), tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    name = "transformer.h.3.mlp.c_proj.weight"
    tensors[name][0, 0] = torch.nan
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    save_planted(tmp_path / "seen.safetensors")
    seen = {"activations": tmp_path / "seen.safetensors", "options": TINY | UNPROTECTED}
    with refused(CheckpointError, what=f"tensor {name} of model.safetensors holds NaN or Inf"):
        adapter_of(source, tmp_path / "out", **seen)


def test_an_adapter_is_overwritten_like_a_checkpoint(
    made: tuple[Path, Path], cli: Cli, tmp_path: Path
) -> None:
    source, _ = made
    out = shutil.copytree(made[1], tmp_path / "out")
    args = ("convert", source, out, "--num-pairs", 32, *TINY_ARGS)
    cli(*args, code=7)
    cli(*args, "--output", "adapter", "--overwrite", code=0)
    assert (out / CONFIG).exists()
    cli(*args, "--overwrite", code=0)
    assert not (out / CONFIG).exists()
    assert (out / "config.json").exists()


def test_an_adapter_is_no_source(made: tuple[Path, Path], cli: Cli, tmp_path: Path) -> None:
    cli("convert", made[1], tmp_path / "out", code=4, says="out is an adapter, not a model")


@pytest.fixture
def out(made: tuple[Path, Path], tmp_path: Path) -> Path:
    return shutil.copytree(made[1], tmp_path / "out")


def seal(out: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Write a manifest in which everything agrees with everything else."""
    tensors, manifest = load_file(out / WEIGHTS), load_manifest(out)
    for entry in manifest["edited"]:
        A, B = (tensors[name] for name in tensor_names(entry["lora"]["module"]))
        entry["lora"] |= {"sha256_a": sha256_of_tensor(A), "sha256_b": sha256_of_tensor(B)}
    change(manifest)
    put(out, manifest)
    reseal(out, WEIGHTS)


@pytest.mark.parametrize(
    ("part", "change", "says"),
    [
        (1, lambda B: B * (1 + 2**-20), "lora_B.weight is not that of the edit"),
        (1, lambda B: -B, "lora_B.weight is not that of the edit"),
        (0, lambda A: A * 1.01, "has another norm than recorded"),
        (0, lambda A: A.bfloat16(), "expected float32 [4, 48], found bfloat16 [4, 48]"),
        (0, lambda A: A[:3].contiguous(), "expected float32 [4, 48], found float32 [3, 48]"),
        (0, lambda A: A.flip(1).contiguous(), "is not U^T W of the source"),
        (0, lambda A: A * (1 + 2**-20), "is not U^T W of the source"),
    ],
)  # fmt: skip
def test_factors_that_are_not_those_of_the_edit_are_found_however_they_are_recorded(
    part: int, change: Callable[[Tensor], Tensor], says: str, made: tuple[Path, Path], out: Path
) -> None:
    tensors = load_file(out / WEIGHTS)
    name = tensor_names("model.layers.3.mlp.down_proj")[part]
    save_file(tensors | {name: change(tensors[name])}, out / WEIGHTS, {"format": "pt"})
    seal(out, lambda manifest: None)
    problems = verify(out, resolve(str(made[0])))
    assert any(says in problem for problem in problems), problems
    assert not any("as recorded" in problem for problem in problems)


def test_a_tensor_more_or_less_is_found(out: Path) -> None:
    tensors = load_file(out / WEIGHTS)
    name = tensor_names("model.layers.3.mlp.down_proj")[0]
    tensors["other"] = tensors.pop(name)
    save_file(tensors, out / WEIGHTS, {"format": "pt"})
    reseal(out, WEIGHTS)
    problems = verify(out)
    assert f"{WEIGHTS}: {name} is missing" in problems
    assert f"{WEIGHTS}: other is not of an edited module" in problems


@pytest.mark.parametrize(
    ("key", "value"),
    [("lora_alpha", 8), ("r", 3), ("bias", "all"), ("fan_in_fan_out", True), ("peft_type", "IA3"),
     ("target_modules", ["down_proj"]), ("revision", "main"), ("use_rslora", True),
     ("init_lora_weights", "pissa"), ("rank_pattern", {"model.layers.3.mlp.down_proj": 2})],
)  # fmt: skip
def test_a_config_that_makes_something_else_of_it_is_found(
    key: str, value: object, out: Path
) -> None:
    config = json.loads((out / CONFIG).read_text())
    (out / CONFIG).write_text(json.dumps(config | {key: value}))
    reseal(out, CONFIG)
    assert [p for p in verify(out) if p.startswith(f"{CONFIG}: {key}")]


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("sha256_before", "0" * 64, "is another one, by its sha256"),
        ("norm", 1e300, "has another norm than recorded"),
        ("lora", None, "cannot be edited by an adapter"),
        ("layer", 5, "module model.layers.3.mlp.down_proj is not of layer 5"),
        ("name", "no.such.tensor", "has no such weight"),
        ("name", "no.such.tensor", "the method's options and the list of edited tensors disagree"),
        ("kind", "replace", "cannot be edited by an adapter"),
        ("tensors", {"U": "U.9"}, "holds no U.9"),
    ],
)
def test_false_records_are_found(
    key: str, value: object, says: str, made: tuple[Path, Path], out: Path
) -> None:
    put(out, forged(load_manifest(out), ("edited", 1, key), value))
    problems = verify(out, resolve(str(made[0])))
    assert any(says in problem for problem in problems), problems


def test_another_source_is_noticed(made: tuple[Path, Path], checkpoints: Checkpoints) -> None:
    problems = verify(made[1], resolve(str(checkpoints("mistral", torch.bfloat16))))
    assert any("of the source is not the file that was converted" in p for p in problems)
    assert any("is not U^T W of the source" in p for p in problems)
