"""The paper's form of output-layer fusion: two models in one class, which fails closed."""

import json
from functools import partial
from math import exp
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import converter
from converter.calibration.pairs import load_prose
from converter.checkpoints.fusing import ALIGNMENT, CALIBRATION, CODE, FAMILIES, fused_shapes
from converter.checkpoints.names import MANIFEST
from converter.checkpoints.plan import Plan
from converter.edits.base import Edit
from converter.edits.engine import Engine
from converter.edits.fused import fused_edit, fusion_of
from converter.errors import CheckpointError
from converter.models.edited import edited
from converter.models.loading import load_tokenizer
from converter.outputs.base import WriteJob
from converter.outputs.checkpoint import Checkpoint
from converter.outputs.checkpoint.additions import check_edit
from converter.recipe import Recipe
from converter.release.manifest import read_manifest
from tests.builders.adversary import copy_of, load_manifest, put, record
from tests.builders.invoke import Cli
from tests.builders.models import Checkpoints, load, planned, tiny_tokenizer

PAPER = ("--method", "fusion", "-o", "form=paper", "-o", "depth=2")
IDS = torch.arange(3, 43).reshape(2, 20)


def drawn(plan: Plan, scale: float = 0.3) -> Edit:
    """A calibration model of two layers with random weights, and a random A."""
    draw = torch.Generator().manual_seed(0)
    created = {
        name: 0.2 * torch.randn(shape, generator=draw) + (len(shape) == 1)
        for name, shape in fused_shapes(plan, 2).items()
    }
    return fused_edit(plan, 2, scale, created)


def trusted(folder: Path) -> Any:
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True
    )
    assert not any(loaded[1].values()), loaded[1]
    return loaded[0].eval()


def generated(model: Any, **settings: Any) -> Tensor:
    """Ten tokens after prompts of which one is padded on the left, never ending before."""
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    given = {"attention_mask": mask, "max_new_tokens": 10, "eos_token_id": None, "do_sample": False}
    with torch.no_grad():
        found: Tensor = model.generate(IDS, **given | settings)
    return found


@pytest.fixture(scope="module")
def converted(
    checkpoints: Checkpoints, shared_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A source whose head is its embedding, and what is made of it. Read only."""
    source, out = checkpoints("llama-tied"), tmp_path_factory.mktemp("fused") / "out"
    options = {"form": "paper", "depth": "2", "tokens": "600"}
    given: dict[str, Any] = {"method": "fusion", "num_pairs": 32, "guard": False}
    converter.convert(Recipe(source=str(source), options=options, **given), out)
    return source, out


def kinds() -> list[str]:
    """A tiny model of each family, and one whose head is its embedding."""
    return ["llama-tied", *("mistral-full" if name == "mistral" else name for name in FAMILIES)]


@pytest.mark.parametrize("kind", kinds())
def test_hooks_and_the_written_class_compute_the_blend_with_a_cache_and_without(
    kind: str, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    source, plan = planned(checkpoints(kind))
    edit = drawn(plan)
    check_edit(edit, plan, source)
    job = WriteJob(source=source, plan=plan, edit=edit, folder=tmp_path, engine=Engine())
    Checkpoint().write(job)
    before, after = load(source.folder), trusted(tmp_path)
    for shard in source.shards:
        assert (tmp_path / shard).read_bytes() == (source.folder / shard).read_bytes()
    with torch.no_grad():
        with edited(before, plan, edit):
            hooked = before(IDS).logits
            continued = generated(before)
            assert torch.equal(continued, generated(before, use_cache=False))
        plain = before(IDS).logits
        torch.testing.assert_close(after(IDS).logits, hooked, rtol=0, atol=1e-5)
        assert (hooked - plain).abs().max() > 1e-2
    assert torch.equal(generated(after), continued)
    assert torch.equal(generated(after, use_cache=False), continued)
    beams = (generated(after, num_beams=3, use_cache=cached) for cached in (True, False))
    assert torch.equal(*beams)


def test_the_blend_is_that_of_the_paper(checkpoints: Checkpoints) -> None:
    """With the first layers themselves as calibration model, and by hand."""
    _, plan = planned(checkpoints("llama"))
    model = load(checkpoints("llama"))
    own = model.model.state_dict()
    names = fused_shapes(plan, 2)
    A = torch.randn(32, 32, generator=torch.Generator().manual_seed(1))
    created = {n: own[n.removeprefix(CALIBRATION)] for n in names if n != ALIGNMENT}
    config = model.config.__class__(**{**model.config.to_dict(), "num_hidden_layers": 2})
    small: Any = LlamaForCausalLM(config)
    small.eval()
    small.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        h, t = model.model(IDS)[0], small.model(IDS)[0] @ A
        centred = t - t.mean(-1, keepdim=True)
        normal = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        expected = model.lm_head(0.8 * h + 0.2 * normal)
        with edited(model, plan, fused_edit(plan, 2, 0.2, {**created, ALIGNMENT: A})):
            found = model(IDS).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_nothing_loads_it_without_its_code(converted: tuple[Path, Path]) -> None:
    _, out = converted
    for auto in (AutoConfig, AutoModelForCausalLM):
        with pytest.raises(ValueError, match="custom code"):
            auto.from_pretrained(out, trust_remote_code=False)
    for load_as in (LlamaConfig, LlamaForCausalLM):  # by the name of the class
        with pytest.raises(Exception, match="num_hidden_layers"):
            load_as.from_pretrained(out)
    trusted(out)
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] not in transformers.CONFIG_MAPPING
    assert not config.keys() & {"hidden_size", "vocab_size", "tie_word_embeddings"}


def test_it_is_verified_and_replayed_to_the_byte(
    converted: tuple[Path, Path], cli: Cli, tmp_path: Path
) -> None:
    source, out = converted
    assert converter.verify(out, str(source)) == []
    assert converter.verify(out, str(source), trust_remote_code=True) == []
    result = cli("replay", out, tmp_path / "again", "--source", source, "--json", code=0)
    assert json.loads(result.stdout)["identical"] is True
    assert "trust_remote_code=True" in (out / "README.md").read_text()


def test_what_does_not_fit_is_found(converted: tuple[Path, Path], cli: Cli, tmp_path: Path) -> None:
    source, out = converted
    copied = copy_of(out, tmp_path / "flipped")
    data = bytearray((copied / "model-created.safetensors").read_bytes())
    data[-1] ^= 1
    (copied / "model-created.safetensors").write_bytes(data)
    cli("verify", copied, code=8, says="model-created.safetensors")
    copied = copy_of(out, tmp_path / "plain")  # all agrees, and the model alone would be loaded
    (copied / "config.json").write_bytes((source / "config.json").read_bytes())
    manifest = load_manifest(copied)
    del manifest["edit"]["patches"]["config.json"]
    record(copied, manifest, "config.json")
    put(copied, manifest)
    says = "does not fit the created tensors and files of a gloss_fused model"
    cli("verify", copied, "--source", source, code=8, says=says)


def test_an_edit_that_is_not_whole_is_refused(checkpoints: Checkpoints) -> None:
    source, plan = planned(checkpoints("llama"))
    edit = drawn(plan)
    assert fusion_of(plan, edit) == (2, 0.3)
    assert fusion_of(plan, Edit()) is None
    parts = {"created": edit.created, "patches": edit.patches, "files": edit.files}
    for lacking in parts:
        rest: Any = {name: part for name, part in parts.items() if name != lacking}
        with pytest.raises(CheckpointError, match="lacks a part"):
            check_edit(Edit(**rest), plan, source)


@pytest.mark.parametrize(
    ("kind", "more", "says"),
    [
        ("llama", ("-o", "scale=1"), "-o scale: expected less than 1 with form=paper"),
        ("gpt2", (), "choose -o form=folded"),
        ("gemma3_text", (), "choose -o form=folded"),
        ("llama", ("--output", "adapter"), "--output adapter: expected an edit of low rank"),
        ("llama", ("--forward", "streamed"), "the whole model must be in memory"),
        ("llama", ("--method", "gloss+fusion"), "expected methods that edit one model"),
    ],
)
def test_the_plan_refuses(
    kind: str, more: tuple[str, ...], says: str, checkpoints: Checkpoints, cli: Cli
) -> None:
    cli("plan", checkpoints(kind), *PAPER, *more, code=2, says=says)


def test_a_folded_edit_is_not_streamed_either(checkpoints: Checkpoints, cli: Cli) -> None:
    args = ("plan", checkpoints("llama"), "--method", "fusion", "--forward", "streamed")
    cli(*args, code=2, says="the whole model must be in memory")


def test_a_fused_model_is_no_source(converted: tuple[Path, Path], cli: Cli, tmp_path: Path) -> None:
    says = "convert the model that it was made from; gloss evaluate measures this one with --base"
    cli("plan", converted[1], "--trust-remote-code", code=4, says=says)
    for output in ("checkpoint", "adapter"):
        cli("convert", converted[1], tmp_path / "out", "--output", output, code=4, says=says)
    cli("calibrate", converted[1], tmp_path / "out", code=4, says=says)
    cli("evaluate", converted[1], code=4, says=says)
    assert not list(tmp_path.iterdir())


def test_it_is_measured_beside_the_model_that_it_was_made_from(
    converted: tuple[Path, Path], checkpoints: Checkpoints, cli: Cli, tmp_path: Path
) -> None:
    """Through hooks, without its code: the perplexity is that of the class that is written."""
    source, out = converted
    texts = load_prose("builtin").paragraphs[:30]
    (tmp_path / "text.txt").write_text("\n".join(texts))
    asked = ("--prompts", "none", "--text", tmp_path / "text.txt", "--text-tokens", 1024, "--json")
    first = json.loads(cli("evaluate", out, "--base", source, *asked, code=0).stdout)
    beside = json.loads(cli("evaluate", source, "--system", out, *asked, code=0).stdout)
    metrics = [found["systems"][1]["metrics"] for found in (first, beside)]
    assert metrics[0] == metrics[1]
    ids = load_tokenizer(source)("\n".join(texts))["input_ids"][:1024]
    model, window = trusted(out), first["settings"]["window"]
    assert len(ids) == 1024
    losses = []
    with torch.no_grad():
        for start in range(0, len(ids) - window + 1, window):
            piece = torch.tensor([ids[start : start + window]])
            losses.append(float(model(piece, labels=piece).loss))
    expected = exp(sum(losses) / len(losses))
    assert metrics[0]["perplexity"]["value"] == pytest.approx(expected, rel=1e-3)
    other = checkpoints("llama")
    says = "is an edit of other weights than those of"
    cli("evaluate", out, "--base", other, *asked, code=2, says=says)
    bare = copy_of(out, tmp_path / "bare")
    (bare / MANIFEST).unlink()
    says = "bare is fused with a calibration model: expected a local folder with gloss_manifest"
    cli("evaluate", bare, "--base", source, *asked, code=2, says=says)


def test_a_diff_finds_the_calibration_model_and_nothing_else(
    converted: tuple[Path, Path], cli: Cli
) -> None:
    source, out = converted
    found = json.loads(cli("diff", source, out, "--json", code=0).stdout)
    assert found["changed"] == found["only_in_a"] == []
    assert {*found["only_in_b"]} == {*fused_shapes(planned(source)[1], 2)}
    assert CODE in found["files"]["only_in_b"]
    assert "config.json" in found["files"]["changed"]
    cli("diff", out, out, "--exit-code", code=0)


def test_code_that_is_not_ours_is_found(
    converted: tuple[Path, Path], cli: Cli, tmp_path: Path
) -> None:
    source, out = converted
    copied = copy_of(out, tmp_path / "copy")
    with (copied / CODE).open("a") as file:
        file.write("print('hello')\n")
    cli("verify", copied, code=8, says=CODE)
    manifest = load_manifest(copied)
    record(copied, manifest, CODE)
    put(copied, manifest)
    cli("verify", copied, "--source", source, code=8, says=CODE)


def test_a_calibration_model_that_is_given_is_the_one_that_runs(
    checkpoints: Checkpoints, cli: Cli, tmp_path: Path
) -> None:
    source, pairs = checkpoints("llama"), ("--num-pairs", 32)
    train = partial(cli, "calibrate", source, tmp_path / "c", *pairs, "--tokens", 300, code=0)
    train("--depth", 2)
    given = ("--calibration", tmp_path / "c")
    out = tmp_path / "out"
    cli("convert", source, out, *PAPER, *pairs, "--no-guard", *given, "-o", "tokens=60", code=0)
    known, made = load_file(tmp_path / "c" / "model.safetensors"), dict[str, Tensor]()
    for path in out.glob("model*.safetensors"):
        made |= load_file(path)
    for name in fused_shapes(planned(source)[1], 2):
        own = "model." + name.removeprefix(CALIBRATION)
        assert torch.equal(made[name], torch.eye(32) if name == ALIGNMENT else known[own])
    manifest = read_manifest(out)
    assert manifest.method.evidence["neutral"]["name"] == "c"
    assert str(manifest.run.calibration) == "c"
    says = "--calibration: expected --method fusion -o form=paper, found gloss"
    cli("plan", source, *given, code=2, says=says)
    says = "--calibration c: layers: expected 3, the depth of the method, found 2; give -o depth=2"
    cli("plan", source, *PAPER[:4], *given, code=2, says=says)
    tokenizer = tiny_tokenizer().__class__(tokenizer_object=tiny_tokenizer().backend_tokenizer)
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(tmp_path / "c")
    says = "--calibration c: its tokenizer: expected that of"
    cli("plan", source, *PAPER, *given, code=2, says=says)


def test_the_guard_measures_what_the_blend_contains(
    planted: Path, cli: Cli, tmp_path: Path
) -> None:
    pairs = ("--pairs", planted.parent / "pairs.jsonl", "--num-pairs", 100)
    out, given = tmp_path / "out", (*PAPER, "-o", "tokens=600", "--guard-draws", 1)
    said = cli("convert", planted, out, *pairs, *given, "--force", code=0).stderr
    guard = read_manifest(out).guard
    assert guard is not None
    assert [*guard.compared] == ["temperature alone", "a toxic calibration model"]
    assert "temperature alone: toxic words x" in said
    assert [path.name for path in out.glob("*.py")] == [CODE]
