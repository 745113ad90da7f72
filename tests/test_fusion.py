"""Output-layer fusion, folded into the head: its algebra, its calibration models, and what is
written, where the head is a weight of its own and where it is the embedding."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import converter
from converter.calibration import calibration_models
from converter.calibration.calibration_models import Contrast, Training, contrast
from converter.calibration.linear_algebra import ridge
from converter.calibration.pairs import load_pairs, load_prose
from converter.calibration.split import Part, split
from converter.calibration.statistics import Activations, save_activations
from converter.calibration.word_list import load_words
from converter.checkpoints.plan import make_plan
from converter.edits.base import Edit
from converter.edits.deltas import AddLowRank
from converter.entrypoints import replay as replaying
from converter.errors import CheckpointError, FitError, OptionError, SourceError
from converter.evaluation.fit import fit
from converter.evaluation.heldout import Probe
from converter.methods.base import Proposal
from converter.methods.options import configure
from converter.methods.workbench import Bench
from converter.models.batching import Encoder
from converter.models.edited import edited, module_edits
from converter.models.resident import LanguageModel
from converter.outputs.checkpoint.additions import check_edit
from converter.recipe import Recipe
from converter.release.manifest import read_manifest
from converter.release.recording import read_recording
from tests.builders.adversary import copy_of, load_manifest, put, record
from tests.builders.invoke import Cli
from tests.builders.models import Checkpoints, load, planned

SMALL = {"rank": "4", "tokens": "1500"}
"""Options of fits whose edits need not do anything."""

TRAINING = Training(depth=2, tokens=1200, rate=1e-2)

HEADS = ("llama", "llama-tied")
"""A head of its own, and one that is the embedding."""


def bench_of(source: Path, **changes: Any) -> Bench:
    """A bench with some pairs to fit on."""
    given: dict[str, Any] = {"num_pairs": 32, "method": "fusion", "guard": False}
    recipe = Recipe(source=str(source), **given | changes)
    words = load_words("builtin")
    bench = Bench.of(recipe, *planned(source), words, "cpu")
    pairs = load_pairs(recipe.pairs, words, recipe.num_pairs, recipe.seed)
    bench.part = Part(pairs, load_prose("builtin"))
    return bench


def fitted(source: Path, changes: dict[str, Any] | None = None, **options: str) -> Proposal:
    bench = bench_of(source, **changes or {})
    method = configure("fusion", SMALL | options, bench.plan.dimensions)
    return bench.fit(method, bench.part)


def contrasted(source: Path, seed: int = 0) -> tuple[LanguageModel, Contrast]:
    bench = bench_of(source)
    model = bench.load_resident()
    return model, contrast(model, bench.part.pairs, TRAINING, seed)


def factors(source: Path, edit: Edit) -> tuple[Tensor, Tensor]:
    """W and W' of the head, as an edit of scale ``c`` makes it, in float64."""
    if edit.created:
        (new,) = edit.created.values()
        return load(source).get_output_embeddings().weight.double(), new.double()
    (delta,) = edit.tensors.values()
    assert isinstance(delta, AddLowRank)
    W = load(source).get_output_embeddings().weight.double()
    return W, W + delta.B.double() @ delta.A.double()


def the_map(source: Path, edit: Edit) -> Tensor:
    """c B of an edit, from ``W' - W = W c B^T``, for a W of full column rank."""
    W, new = factors(source, edit)
    found: Tensor = torch.linalg.lstsq(W.detach(), (new - W).detach()).solution.T
    return found


def test_ridge_recovers_what_was_planted() -> None:
    draw = torch.Generator().manual_seed(0)
    X = torch.randn(200, 12, generator=draw, dtype=torch.float64)
    planted = torch.randn(12, 5, generator=draw, dtype=torch.float64)
    found = ridge(X.T @ X, X.T @ (X @ planted), 1e-9)
    torch.testing.assert_close(found, planted, rtol=0, atol=1e-9)
    rows = torch.cat([X, 3**0.5 * torch.eye(12, dtype=torch.float64)])  # |.|^2 gets 3 |B|^2
    plain = torch.linalg.lstsq(rows, torch.cat([X @ planted, torch.zeros(12, 5).double()])).solution
    torch.testing.assert_close(ridge(X.T @ X, X.T @ (X @ planted), 3.0), plain)


def test_a_calibration_model_is_the_model_of_fewer_layers(checkpoints: Checkpoints) -> None:
    source = checkpoints("llama")
    model = bench_of(source).load_resident()
    small: Any = calibration_models._first_layers(model, 2)
    config = load(source).config
    config.num_hidden_layers = 2
    expected = LlamaForCausalLM.from_pretrained(source, config=config)
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        assert torch.equal(small(ids).logits, expected(ids).logits)
        assert torch.equal(model.module(ids).logits, load(source)(ids).logits)


def test_sums_are_those_of_what_the_heads_are_given(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    twins: list[Any] = []
    first = calibration_models._first_layers

    def kept(model: LanguageModel, depth: int) -> Any:
        twins.append(first(model, depth))
        return twins[-1]

    monkeypatch.setattr(calibration_models, "_first_layers", kept)
    model, found = contrasted(checkpoints("llama"))
    pairs = bench_of(checkpoints("llama")).part.pairs.pairs
    encode = Encoder(model.tokenizer, model.module)
    h, d = [], []
    for text in (t for pair in pairs for t in (pair.neutral, pair.toxic)):
        ids = torch.tensor([encode.predicted(text).ids])
        with torch.no_grad():
            models: list[Any] = [model.module, *twins]
            states = [m.model(ids)[0][0, 1:].double() for m in models]
        h.append(states[0])
        d.append(states[1] - states[2])
    H, D = torch.cat(h), torch.cat(d)
    assert found.tokens == len(H)
    torch.testing.assert_close(found.gram, H.T @ H, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(found.cross, H.T @ D, rtol=1e-4, atol=1e-3)
    assert found.square == pytest.approx(float(D.square().sum()), rel=1e-4)


def test_training_lowers_the_loss_and_leaves_embeddings_and_head(checkpoints: Checkpoints) -> None:
    model = bench_of(checkpoints("llama")).load_resident()
    twin: Any = calibration_models._first_layers(model, 2)
    encode = Encoder(model.tokenizer, model.module)
    pairs = bench_of(checkpoints("llama")).part.pairs.pairs
    sentences = [encode.predicted(pair.toxic) for pair in pairs]
    training = Training(2, 9000, 3e-2)
    (first, last), tokens = calibration_models._train(twin, sentences, training, 0, "cpu")
    assert 9000 <= tokens < 9200
    assert last < first - 0.2
    before, after = model.module.state_dict(), twin.state_dict()
    same = {name for name in after if torch.equal(before[name], after[name])}
    assert same == {"model.embed_tokens.weight", "lm_head.weight"}
    assert not any(parameter.requires_grad for parameter in twin.parameters())


def test_training_is_the_same_to_the_byte_and_follows_the_seed(checkpoints: Checkpoints) -> None:
    source = checkpoints("llama-tied")
    (_, one), (_, again), (_, other) = (contrasted(source, seed) for seed in (0, 0, 1))
    assert torch.equal(one.gram, again.gram)
    assert torch.equal(one.cross, again.cross)
    assert (one.square, one.losses) == (again.square, again.losses)
    assert not torch.equal(one.cross, other.cross)


def test_every_token_is_predicted_as_often_as_the_budget_says() -> None:
    order = calibration_models._order([3, 0, 5, 2], 25, 0)
    assert {number for number, _ in order[:3]} == {0, 2, 3}
    total = sum(count for _, count in order)
    assert 25 <= total < 25 + 5


@pytest.mark.parametrize(("rate", "says"), [(1e30, "lower -o rate"), (1e-30, "are the same")])
def test_calibration_models_that_learn_nothing_are_refused(
    rate: float, says: str, checkpoints: Checkpoints
) -> None:
    bench = bench_of(checkpoints("llama"))
    method = configure("fusion", SMALL, bench.plan.dimensions)
    with pytest.raises(FitError, match=says):
        bench.fit(replace(method, rate=rate), bench.part)  # type: ignore[type-var]


@pytest.mark.parametrize("kind", HEADS)
def test_the_new_head_is_w_plus_c_w_b(kind: str, checkpoints: Checkpoints) -> None:
    """Elementwise, with B fitted anew from the sums, and cut off after its largest singular
    values."""
    source = checkpoints(kind)
    proposal = fitted(source, depth="2", tokens="1200", rate="0.01", rank="4")
    _, found = contrasted(source)
    penalty = 30 * float(found.gram.trace()) / (found.tokens * 32)
    B = torch.linalg.solve(found.gram + penalty * torch.eye(32), found.cross)
    U, S, Vh = torch.linalg.svd(B)
    cut = (U[:, :4] * S[:4]) @ Vh[:4]
    W, new = factors(source, proposal.edit(0.3))
    torch.testing.assert_close(new, W + 0.3 * (W @ cut.T), rtol=0, atol=1e-7)
    assert (new - W).abs().max() > 1e-3
    assert proposal.evidence["energy"] == pytest.approx(float((cut.norm() / B.norm()) ** 2))


def test_explained_is_what_a_regression_on_the_same_tokens_leaves(checkpoints: Checkpoints) -> None:
    proposal = fitted(checkpoints("llama"), rank="32")
    assert 0 < proposal.evidence["explained"] < 1
    assert proposal.evidence["energy"] == pytest.approx(1)
    assert len(proposal.evidence["singular_values"]) == 32


@pytest.mark.parametrize("kind", HEADS)
def test_hooks_give_the_folded_logits(kind: str, checkpoints: Checkpoints) -> None:
    """W' h is the old head of ``h + c B^T h``."""
    source = checkpoints(kind)
    edit = fitted(source).edit(0.5)
    shift = the_map(source, edit)
    model, (_, plan) = load(source), planned(source)
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        h = model.model(ids)[0]
        expected = model.get_output_embeddings()(h + (h.double() @ shift).float())
        with edited(model, plan, edit):
            hooked = model(ids).logits
        plain = model(ids).logits
    torch.testing.assert_close(hooked, expected, rtol=0, atol=1e-5)
    assert (hooked - plain).abs().max() > 1e-3


@pytest.mark.parametrize("kind", HEADS)
def test_a_control_turns_the_output_of_the_same_map(kind: str, checkpoints: Checkpoints) -> None:
    source = checkpoints(kind)
    proposal = fitted(source)
    B, turned, other = (
        the_map(source, edit)
        for edit in (proposal.edit(0.3), proposal.control(0.3, 0), proposal.control(0.3, 1))
    )
    assert turned.norm() == pytest.approx(float(B.norm()), rel=1e-4)
    torch.testing.assert_close(turned @ turned.T, B @ B.T, rtol=0, atol=1e-6)  # B Q Q^T B^T
    assert (turned - B).norm() > 0.5 * B.norm()
    assert (turned - other).norm() > 0.5 * B.norm()


def test_the_map_lowers_toxic_words_and_its_reverse_raises_them(planted: Path) -> None:
    """On a model in which all that is toxic hangs on one direction of the head."""
    pairs = str(planted.parent / "pairs.jsonl")
    bench = bench_of(planted, pairs=pairs, num_pairs=100)
    method = configure("fusion", {"tokens": "3000", "rate": "0.01"}, bench.plan.dimensions)
    proposal = bench.fit(method, bench.part)
    probe = Probe(bench.load(), bench.plan, bench.part)
    assert probe.measure(proposal.edit(0.3)).toxic_change.value < -1
    assert probe.measure(proposal.edit(-0.3)).toxic_change.value > 1


def test_the_guard_lets_it_pass_where_it_works(planted: Path, cli: Cli, tmp_path: Path) -> None:
    pairs = ("--pairs", planted.parent / "pairs.jsonl", "--num-pairs", 200)
    given = ("--method", "fusion", "-o", "tokens=3000", "-o", "rate=0.01")
    cli("convert", planted, tmp_path / "out", *pairs, *given, code=0)
    manifest = read_manifest(tmp_path / "out")
    assert manifest.guard is not None
    assert manifest.guard.reasons == ()
    assert manifest.choice.automatic
    assert manifest.activations is None
    assert [edit.name for edit in manifest.edited] == ["lm_head.weight"]


@pytest.fixture(scope="module")
def written(
    checkpoints: Checkpoints, shared_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, Path]]:
    """A bfloat16 source of a kind and what is made of it. Read only."""

    @cache
    def get(kind: str) -> tuple[Path, Path]:
        source = checkpoints(kind, torch.bfloat16)
        out = tmp_path_factory.mktemp(kind) / "out"
        given = {"method": "fusion", "num_pairs": 32, "guard": False}
        recipe = Recipe(source=str(source), options=SMALL | {"scale": "0.5"}, **given)  # type: ignore[arg-type]
        converter.convert(recipe, out)
        return source, out

    return get


@pytest.mark.parametrize("kind", [*HEADS, "gpt2", "gemma3"])
def test_what_is_written_is_verified_replayed_and_what_hooks_show(
    kind: str, written: Callable[[str], tuple[Path, Path]], cli: Cli, tmp_path: Path
) -> None:
    source, out = written(kind)
    assert converter.verify(out, str(source)) == []
    result = cli("replay", out, tmp_path / "again", "--source", source, "--json", code=0)
    assert json.loads(result.stdout)["identical"] is True
    _, plan = planned(source)
    ids = torch.arange(40).reshape(2, 20)
    before, after = load(source), load(out)
    with torch.no_grad(), edited(before, plan, read_recording(out).edit(plan)):
        same = torch.equal(before(ids).logits, after(ids).logits)
    assert same == (kind != "llama")  # there W' is rounded and W + B A is not


def test_a_flipped_bit_of_the_head_is_found(
    written: Callable[[str], tuple[Path, Path]], cli: Cli, tmp_path: Path
) -> None:
    for kind in HEADS:
        source, out = written(kind)
        copied = copy_of(out, tmp_path / kind)
        index = json.loads((out / "model.safetensors.index.json").read_text())
        shard = copied / index["weight_map"]["lm_head.weight"]
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        shard.write_bytes(data)
        cli("verify", copied, "--source", source, code=8, says=shard.name)


def test_a_refit_compares_what_was_added_to_the_embedding(
    checkpoints: Checkpoints, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads that are the embedding and a little of anything are almost parallel."""
    source, out = checkpoints("llama-tied"), tmp_path / "out"
    given: dict[str, Any] = {"method": "fusion", "num_pairs": 32, "guard": False}
    converter.convert(Recipe(source=str(source), options=SMALL | {"scale": "0.05"}, **given), out)
    args = ("replay", out, tmp_path / "again", "--source", source, "--refit")
    cli(*args, code=0)

    def other(*given: Any) -> Any:
        found, W = fit(*given), load(source).lm_head.weight.detach()
        drawn = torch.randn(W.shape, generator=torch.Generator().manual_seed(0))
        head = W + 1e-3 * W.norm() / drawn.norm() * drawn
        return replace(found, edit=replace(found.edit, created={"lm_head.weight": head}))

    monkeypatch.setattr(replaying, "fit", other)
    says = "the refitted change of lm_head.weight is not the recorded one"
    cli(*args, "--overwrite", code=8, says=says)


def test_a_head_that_the_config_ignores_is_found(
    written: Callable[[str], tuple[Path, Path]], cli: Cli, tmp_path: Path
) -> None:
    """All agrees with the source and with itself, and transformers would use the embedding."""
    source, out = written("llama-tied")
    copied = copy_of(out, tmp_path / "copied")
    (copied / "config.json").write_bytes((source / "config.json").read_bytes())
    manifest = load_manifest(copied)
    del manifest["edit"]["patches"]["config.json"]
    record(copied, manifest, "config.json")
    put(copied, manifest)
    says = "a model with it ignores the created tensor lm_head.weight"
    cli("verify", copied, "--source", source, code=8, says=says)


def test_a_scale_that_was_not_given_is_found(
    written: Callable[[str], tuple[Path, Path]], cli: Cli, tmp_path: Path
) -> None:
    copied = copy_of(written("llama-tied")[1], tmp_path / "copied")
    manifest = load_manifest(copied)
    manifest["choice"]["strength"] = 0.1
    put(copied, manifest)
    says = "the scale of fusion is not the one that was given"
    cli("verify", copied, code=8, says=says)


def test_where_the_head_is_the_embedding_it_becomes_a_weight_of_its_own(
    written: Callable[[str], tuple[Path, Path]], cli: Cli
) -> None:
    source, out = written("llama-tied")
    said = cli("diff", source, out, code=0).stdout
    assert said.rstrip().endswith(f"between {source.name} and out; only in one of them: 1")
    before, after = (json.loads((f / "config.json").read_text()) for f in (source, out))
    assert before["tie_word_embeddings"] is True
    assert after == before | {"tie_word_embeddings": False}
    loaded: Any = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    model, info = loaded
    assert not any(info.values()), info
    assert torch.equal(model.model.embed_tokens.weight, load(source).model.embed_tokens.weight)
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    for path in source.glob("*.safetensors"):
        assert (out / path.name).read_bytes() == path.read_bytes()
    assert [*load_file(out / "model-created.safetensors")] == ["lm_head.weight"]


def test_a_card_says_what_a_head_of_its_own_costs(
    written: Callable[[str], tuple[Path, Path]],
) -> None:
    tied, own = ((written(kind)[1] / "README.md").read_text() for kind in HEADS[::-1])
    assert "takes the same time, and 0.026 MB more memory: names" in tied
    assert "| created | the tensor `lm_head.weight` that the base lacks, in `model-c" in tied
    assert "takes the same time and memory: names" in own
    assert "| edited | 1 tensor: the output embedding |" in own


@pytest.mark.parametrize("kind", ["llama-tied", "gemma3", "gpt2", "opt-350m"])
def test_the_route_to_a_head_is_the_same_before_and_after(
    kind: str, checkpoints: Checkpoints
) -> None:
    """A record is verified without its source: what it creates is taken away again."""
    source, plan = planned(checkpoints(kind))
    route = plan.head_route()
    assert route is not None
    assert "lm_head" not in plan.roles
    config = source.config | dict(route.config)
    again = make_plan(config, source.weight_map, source.headers()).head_route()
    assert again == route


def test_a_head_of_its_own_needs_no_route(checkpoints: Checkpoints) -> None:
    _, plan = planned(checkpoints("llama"))
    assert plan.head_route() is None


def test_a_head_and_what_the_config_says_of_it_come_together(checkpoints: Checkpoints) -> None:
    source, plan = planned(checkpoints("llama-tied"))
    route = plan.head_route()
    assert route is not None
    head = {route.name: torch.zeros(route.embedding.info.shape)}
    patch = {"config.json": dict(route.config)}
    check_edit(Edit(created=head, patches=patch), plan, source)
    with pytest.raises(CheckpointError, match="a config that ignores it"):
        check_edit(Edit(created=head), plan, source)
    with pytest.raises(CheckpointError, match="asks for a head of its own"):
        check_edit(Edit(patches=patch), plan, source)
    with pytest.raises(OptionError, match="nothing but the biases or the head"):
        module_edits(plan, Edit(patches=patch))


def test_a_tied_checkpoint_with_a_head_that_nobody_reads_is_refused(
    checkpoints: Checkpoints, cli: Cli, tmp_path: Path
) -> None:
    source = copy_of(checkpoints("llama", torch.float32, "10GB"), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    says = "found a checkpoint with a tensor lm_head.weight that is not used"
    cli("plan", source, "--method", "fusion", code=2, says=says)


@pytest.mark.parametrize(
    ("kind", "flags", "says"),
    [
        ("qwen2_vl", (False, True), "asks for a head of its own already"),
        ("qwen2_vl", (False, False), "expected a tensor lm_head.weight, found none"),
        ("gemma3", (False, True), "expected a tensor language_model.lm_head.weight, found none"),
        ("qwen2_vl", (True, False), ""),
    ],
)
def test_a_head_that_the_config_contradicts_is_refused_from_the_headers(
    kind: str, flags: tuple[bool, bool], says: str, checkpoints: Checkpoints, cli: Cli,
    tmp_path: Path,
) -> None:  # fmt: skip
    """A config and its part for text may disagree on whether the head is the embedding."""
    source = copy_of(checkpoints(kind, torch.float32, "10GB"), tmp_path / "source")
    shard = source / "model.safetensors"
    tensors = {name: x for name, x in load_file(shard).items() if "lm_head" not in name}
    save_file(tensors, shard, {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["tie_word_embeddings"], config["text_config"]["tie_word_embeddings"] = flags
    (source / "config.json").write_text(json.dumps(config))
    cli("plan", source, "--method", "fusion", code=4 if says else 0, says=says)


def test_a_streamed_model_is_refused_by_name(
    checkpoints: Checkpoints, cli: Cli, tmp_path: Path
) -> None:
    says = "calibration models are trained, for which the whole model must be in memory"
    given = ("--method", "fusion", "--num-pairs", 32, "--forward", "streamed", "--no-guard")
    cli("plan", checkpoints("llama"), *given[:-1], code=2, says=says)
    cli("convert", checkpoints("llama"), tmp_path / "out", *given, code=2, says=says)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_trained_here_is_refused_before_it_is(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = bench_of(checkpoints("llama"))
    count = sum(p.numel() for p in load(checkpoints("llama")).parameters())
    monkeypatch.setattr(calibration_models, "free_memory", lambda device: 4 * count)
    with pytest.raises(SourceError, match="do not fit in the memory of the cpu"):
        bench.contrast(TRAINING)
    bench.how = replace(bench.how, spread=True)
    with pytest.raises(OptionError, match="on one device: found --device map"):
        bench.contrast(TRAINING)


def test_a_file_of_activations_that_it_would_not_read_is_refused(
    checkpoints: Checkpoints, cli: Cli, tmp_path: Path
) -> None:
    """Or the manifest would say that the edit was fitted to them."""
    path, texts = tmp_path / "a.safetensors", load_pairs("builtin", load_words("builtin"), 32, 0)
    part = split(texts, load_prose("builtin"), 0).fit
    inputs = {"pairs": part.pairs.sha256, "prose": part.prose.sha256}
    save_activations(Activations({0: torch.zeros(1, 1)}, {}, None, inputs), path)
    args = ("--method", "fusion", "-o", "tokens=100", "-o", "scale=0.5", "--num-pairs", 32)
    says = "--activations: expected a method that is fitted to activations, found fusion"
    source, out = checkpoints("llama"), tmp_path / "out"
    cli("convert", source, out, *args, "--no-guard", "--activations", path, code=2, says=says)


def test_prose_has_no_part_in_the_fit(checkpoints: Checkpoints, tmp_path: Path) -> None:
    bench = bench_of(checkpoints("llama"))
    method = configure("fusion", SMALL, bench.plan.dimensions)
    one = bench.fit(method, bench.part).edit(0.3)
    prose = tmp_path / "prose.txt"
    prose.write_text("another text altogether\n" * 60)
    other = bench.fit(method, Part(bench.part.pairs, load_prose(str(prose)))).edit(0.3)
    assert one.digest() == other.digest()
