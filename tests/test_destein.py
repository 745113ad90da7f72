"""DeStein: a constant vector behind the attention, found in what is planted and baked exactly."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import converter
from converter.calibration.collect import extract
from converter.calibration.pairs import Pair, Pairs, Prose
from converter.calibration.statistics import (
    Activations,
    Request,
    load_activations,
    save_activations,
)
from converter.checkpoints.architectures import relabelling
from converter.checkpoints.architectures.find import find_architecture
from converter.edits.base import Edit
from converter.errors import DataError, FitError, OptionError
from converter.manifest import Origin
from converter.methods.base import Proposal
from converter.methods.destein import Method
from converter.methods.options import configure
from converter.models.edited import edited
from converter.models.loading import load_language_model, stream_language_model
from converter.models.resident import Model
from converter.recipe import Recipe
from converter.release.manifest import read_manifest
from converter.release.recording import read_recording
from converter.runtime import progress
from converter.runtime.cache import sha256_of
from tests.builders.adversary import copy_of, load_manifest, put, record
from tests.builders.errors import refused
from tests.builders.invoke import Cli
from tests.builders.models import (
    HIDDEN,
    LAYERS,
    NORM_AFTER,
    Checkpoints,
    load,
    planned,
    tiny_config,
    tiny_tokenizer,
)
from tests.test_subspace import Desk

HEADS, N = 4, 40
NORMS = torch.tensor([1.0, 2.0, 3.0, 4.0])
TOKENS = torch.arange(2, 42).view(2, 20)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


TOXIC, NEUTRAL = draw(1, HIDDEN), draw(2, HIDDEN)


def planted(layers: tuple[int, ...] = (1, 2, 3, 4)) -> Activations:
    """Sides that share their content; what is toxic has ``TOXIC`` as well, and small noise."""
    content = {n: draw(10 + n, N, HIDDEN) for n in layers}
    toxic = {n: x + TOXIC + 1e-3 * draw(20 + n, N, HIDDEN) for n, x in content.items()}
    return Activations(toxic, content, None, {}, norms=dict.fromkeys(layers, NORMS))


def planted_slopes() -> Activations:
    """Gradients: toxic words grow along ``TOXIC`` and what all words grow along, ``NEUTRAL``."""
    noise = {n: 1e-3 * draw(30 + n, N, HIDDEN) for n in (1, 2, 3, 4)}
    toxic = {n: x + TOXIC + NEUTRAL for n, x in noise.items()}
    neutral = {n: x.flip(0) + 2 * NEUTRAL for n, x in noise.items()}
    return Activations(toxic, neutral, None, {}, norms=dict.fromkeys(noise, NORMS))


Fit = Callable[..., Proposal]


@pytest.fixture
def fit(checkpoints: Checkpoints) -> Fit:
    """A fit to what is planted, of options as typed."""
    _, plan = planned(checkpoints("llama"))

    def run(seen: Activations, **options: object) -> Proposal:
        texts = {key: str(value) for key, value in options.items()}
        return configure("destein", texts, plan.dimensions).fit(Desk(seen, plan=plan))

    return run


def vectors(edit: Edit) -> dict[int, Tensor]:
    """Layer -> what an edit of the tiny Llama adds there; other biases must be 0."""
    ends = {f"model.layers.{n}.self_attn.o_proj.bias": n for n in range(LAYERS)}
    assert not any(x.any() for name, x in edit.created.items() if name not in ends)
    found = {ends[name]: x for name, x in edit.created.items() if name in ends}
    return {layer: x for layer, x in found.items() if x.any()}


def parts(vector: Tensor) -> Tensor:
    return vector.reshape(HEADS, -1)


def test_the_planted_direction_is_recovered_chunk_by_chunk(fit: Fit) -> None:
    found = vectors(fit(planted()).edit(0.1))
    assert sorted(found) == [1, 2, 3, 4]
    for vector in found.values():
        assert torch.allclose(parts(vector).norm(dim=1), 0.1 * NORMS, rtol=1e-5)
        along = nn.functional.cosine_similarity(parts(vector), parts(-TOXIC))
        assert float(along.min()) > 0.999


def test_as_a_whole_it_has_one_norm(fit: Fit) -> None:
    seen = replace(planted(), norms=dict.fromkeys((1, 2, 3, 4), torch.tensor([5.0])))
    found = vectors(fit(seen, scale="whole").edit(0.1))
    for vector in found.values():
        assert float(vector.norm()) == pytest.approx(0.5, rel=1e-5)
        assert float(nn.functional.cosine_similarity(vector, -TOXIC, dim=0)) > 0.999


def test_the_causal_direction_spares_what_neutral_text_needs(fit: Fit) -> None:
    seen = replace(planted_slopes(), norms=dict.fromkeys((1, 2, 3, 4), torch.ones(1)))
    options = {"direction": "causal", "scale": "whole"}
    free = TOXIC - NEUTRAL * (TOXIC @ NEUTRAL) / (NEUTRAL @ NEUTRAL)
    wanted = {"gradient": -free, "none": -(TOXIC + NEUTRAL)}
    for protect, direction in wanted.items():
        for vector in vectors(fit(seen, protect=protect, **options).edit(1.0)).values():
            assert float(nn.functional.cosine_similarity(vector, direction, dim=0)) > 0.999
    (vector, *_) = vectors(fit(seen, **options).edit(1.0)).values()
    assert abs(float(vector @ NEUTRAL)) < 0.01 * float(NEUTRAL.norm())


@pytest.mark.parametrize("direction", ["paired", "causal"])
def test_a_negative_alpha_and_for_pairs_swapped_sides_turn_the_vector_round(
    direction: str, fit: Fit
) -> None:
    seen = planted() if direction == "paired" else planted_slopes()
    proposal = fit(seen, direction=direction)
    plus, minus = vectors(proposal.edit(0.1)), vectors(proposal.edit(-0.1))
    assert all(torch.equal(plus[n], -minus[n]) for n in (1, 2, 3, 4))
    if direction == "paired":
        other = vectors(fit(replace(seen, toxic=seen.neutral, neutral=seen.toxic)).edit(0.1))
        assert all(torch.equal(plus[n], -other[n]) for n in (1, 2, 3, 4))


def test_the_options_say_what_is_asked_of_the_model(checkpoints: Checkpoints) -> None:
    _, plan = planned(checkpoints("llama"))

    def asked(seen: Activations, **options: str) -> Request:
        desk = Desk(seen, plan=plan)
        configure("destein", {"layers": "1-4", **options}, plan.dimensions).fit(desk)
        (request,) = desk.asked
        return request

    paper = asked(planted())
    assert (paper.site, paper.pooling, paper.layers) == ("attention", "last8", (1, 2, 3, 4))
    assert (paper.chunks, paper.slopes, paper.second_moment) == (HEADS, False, False)
    assert all("What follows is" in prompt for prompt in paper.prompts)
    assert len({*paper.prompts}) == 2
    bare = asked(planted(), prompt="none", pooling="mean")
    assert bare == replace(paper, prompts=("", ""), pooling="mean")
    assert asked(planted(), prompt="only") == replace(paper, bare=True)
    causal = asked(planted_slopes(), direction="causal")
    assert causal == replace(paper, prompts=("", ""), pooling="predicting", slopes=True)


def test_prompts_alone_have_no_toxic_words_to_ask_for(checkpoints: Checkpoints) -> None:
    _, plan = planned(checkpoints("llama"))
    for options in ({"direction": "causal"}, {"pooling": "predicting"}):
        with refused(OptionError, what="-o prompt=only", hint="prompts alone have no toxic words"):
            configure("destein", {"prompt": "only", **options}, plan.dimensions).footprint(plan)


def test_strengths_are_a_grid_or_the_one_that_is_typed(fit: Fit) -> None:
    free, typed = fit(planted()), fit(planted(), alpha=0.03)
    assert free.is_free
    assert (free.strengths[0], free.strengths[-1]) == (0.005, 0.16)
    ratios = [b / a for a, b in zip(free.strengths, free.strengths[1:], strict=False)]
    assert ratios == pytest.approx([2**0.5] * len(ratios), rel=0.01)
    assert (typed.is_free, typed.strengths) == (False, (0.03,))


def test_a_control_has_the_norms_and_no_direction(fit: Fit) -> None:
    proposal = fit(planted())
    edit, one, other = (vectors(e) for e in (
        proposal.edit(0.1), proposal.control(0.1, 0), proposal.control(0.1, 1),
    ))  # fmt: skip
    for layer in (1, 2, 3, 4):
        norms = parts(edit[layer]).norm(dim=1)
        assert torch.allclose(parts(one[layer]).norm(dim=1), norms, rtol=1e-5)
        assert not torch.equal(one[layer], other[layer])
        assert torch.equal(one[layer], vectors(proposal.control(0.1, 0))[layer])
    along = [nn.functional.cosine_similarity(edit[n], one[n], dim=0) for n in one]
    assert abs(float(sum(along))) < 1


def test_what_the_record_keeps_makes_the_edit_again(fit: Fit) -> None:
    proposal = fit(planted())
    steps, norms = proposal.tensors["steps"], proposal.tensors["norms"]
    found = vectors(proposal.edit(0.04))
    assert torch.allclose(0.04 * steps, torch.stack(list(found.values())))
    assert torch.equal(norms, NORMS.expand(4, -1))
    told = proposal.evidence["layers"]["2"]
    assert told["z_norm"] == pytest.approx(float(TOXIC.norm()), rel=1e-3)
    assert told["split_cosine"] > 0.999
    assert told["chunks_left_alone"] == 0


def without(seen: Activations, chunks: int) -> Activations:
    """The same with the first chunks of both sides alike."""
    end = chunks * HIDDEN // HEADS
    toxic = {n: torch.cat([seen.neutral[n][:, :end], x[:, end:]], 1) for n, x in seen.toxic.items()}
    return replace(seen, toxic=toxic)


def test_a_chunk_that_tells_nothing_is_left_alone_and_said(
    fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(progress, "warn", said.append)
    found = vectors(fit(without(planted(), 1)).edit(0.1))
    assert [text.partition(" of the att")[0] for text in said] == ["4 of 16 chunks"]
    for vector in found.values():
        assert torch.allclose(
            parts(vector).norm(dim=1), 0.1 * NORMS * torch.tensor([0, 1, 1, 1]), rtol=1e-5
        )


def test_no_difference_and_too_few_pairs_are_refused(fit: Fit) -> None:
    with refused(FitError, what="the attention's outputs do not differ between the two sides..."):
        fit(without(planted(), HEADS))
    few = {n: x[:15] for n, x in planted().toxic.items()}
    with refused(FitError, what="too few pairs...", expected="at least 16", found="15"):
        fit(replace(planted(), toxic=few, neutral=few))


@pytest.mark.parametrize("alpha", ["0", "-0.1", "nan", "inf", "much"])
def test_an_alpha_that_is_no_positive_number_is_refused(alpha: str, fit: Fit) -> None:
    with refused(OptionError, what="-o alpha", found=alpha):
        fit(planted(), alpha=alpha)


def test_heads_that_do_not_divide_the_width_are_refused(checkpoints: Checkpoints) -> None:
    _, plan = planned(checkpoints("llama"))
    for heads in (0, 5):
        sizes = replace(plan.dimensions, attention_heads=heads)
        other = replace(plan, architecture=replace(plan.architecture, sizes=sizes))
        with refused(OptionError, what="-o scale=chunk", found=f"{heads} heads"):
            Method(layers=(1,)).footprint(other)
        Method(layers=(1,), scale="whole").footprint(other)


REFUSED = {
    "gemma2": "Gemma2ForCausalLM, with a norm behind it, where no constant stays one",
    "olmo2": "Olmo2ForCausalLM, with a norm behind it, where no constant stays one",
    "opt-350m": "OPTForCausalLM, with a norm behind it, where no constant stays one",
    "gpt_oss": "GptOssForCausalLM, a mixture of experts",
    "deepseek_v3": "DeepseekV3ForCausalLM, a mixture of experts",
    "phi3": "Phi3ForCausalLM, which has and gets none",
    "mistral": "MistralForCausalLM, which has and gets none",  # its attention looks at a window
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_in_which_it_would_not_be_exact_is_refused_by_name(
    kind: str, checkpoints: Checkpoints
) -> None:
    _, plan = planned(checkpoints(kind))
    with refused(OptionError, what="--method destein", found=REFUSED[kind]) as caught:
        configure("destein", {}, plan.dimensions).footprint(plan)
    assert "--method gloss" in str(caught.value)


def test_a_norm_behind_the_attention_can_be_gone_through(checkpoints: Checkpoints) -> None:
    """Where there is a way to a bias before the norm, and this is said."""
    _, plan = planned(checkpoints("gemma3_text"))
    through = "-o norm=through to add the vector before the norm"
    with refused(OptionError, what="--method destein", hint=f"choose {through}, or --method ..."):
        configure("destein", {}, plan.dimensions).footprint(plan)
    method = configure("destein", {"norm": "through"}, plan.dimensions)
    assert "model.layers.2.self_attn.o_proj.bias" in method.footprint(plan).created
    _, plan = planned(checkpoints("mistral"))
    with refused(OptionError, what="--method destein", found=REFUSED["mistral"]):
        configure("destein", {"norm": "through"}, plan.dimensions).footprint(plan)


ARGS = {"alpha": "0.2", "layers": "1-3"}


@pytest.fixture(scope="module")
def written(
    checkpoints: Checkpoints, shared_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """What the method makes of a source, made once. Read only."""

    @cache
    def get(kind: str = "llama", dtype: torch.dtype = torch.float32, shard: str = "60KB") -> Path:
        out = tmp_path_factory.mktemp("destein") / "out"
        recipe = Recipe(
            source=str(checkpoints(kind, dtype, shard)), method="destein",
            options=ARGS | ({"norm": "through"} if kind in NORM_AFTER else {}),
            num_pairs=64, guard=False,
        )  # fmt: skip
        converter.convert(recipe, out)
        return out

    return get


def steps_of(out: Path) -> dict[int, Tensor]:
    """Layer -> alpha times its vector, by the edit's file."""
    stored = read_recording(out).stored["evidence.steps"]
    return {layer: 0.2 * stored[i] for i, layer in enumerate((1, 2, 3))}


def adding(vector: Tensor) -> Callable[..., Any]:
    return lambda module, args, output: output + vector


@pytest.mark.parametrize(
    "kind",
    ["llama", "gpt2", "falcon", "gemma3_text", "gptj", "granite", "opt", "olmo2", "mistral-full"],
)
def test_the_written_model_computes_what_the_vectors_make_of_the_source(
    kind: str, checkpoints: Checkpoints, written: Callable[..., Path]
) -> None:
    """With hooks of this test, which know nothing of biases, and with those of the guard.

    All tensors are there and used: transformers would load the source, with a notice, if not.
    """
    source, out = checkpoints(kind), written(kind)
    _, plan = planned(source)
    before, steps = load(source), steps_of(out)
    auto: Any = transformers.AutoModelForCausalLM
    after, said = auto.from_pretrained(out, output_loading_info=True)
    assert not any(said[f"{what}_keys"] for what in ("missing", "unexpected", "mismatched"))
    modules = {weight.layer: weight.module for weight in plan.weights("o_proj")}
    with torch.no_grad():
        plain, found = before(TOKENS).logits, after(TOKENS).logits
        with edited(before, plan, read_recording(out).edit(plan)):
            guarded = before(TOKENS).logits
        for layer, vector in steps.items():
            before.get_submodule(modules[layer]).register_forward_hook(adding(vector))
        hooked = before(TOKENS).logits
    torch.testing.assert_close(found, hooked, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(guarded, hooked, rtol=1e-5, atol=1e-5)
    assert float((hooked - plain).abs().max()) > 1e-3


@pytest.mark.parametrize(("kind", "bias"), [("gpt2", "attn.c_proj"), ("gptj", "mlp.fc_out")])
def test_an_existing_bias_is_edited_and_no_other_byte(
    kind: str, bias: str, written: Callable[..., Path]
) -> None:
    """In GPT-J that of the FFN, which stands beside an attention that has none."""
    manifest = read_manifest(written(kind))
    names = [f"transformer.h.{n}.{bias}.bias" for n in (1, 2, 3)]
    assert [edit.name for edit in manifest.edited] == names
    assert not manifest.edit.created
    assert not manifest.edit.patches


def test_source_shards_keep_their_bytes_and_one_key_of_the_config_changes(
    checkpoints: Checkpoints, written: Callable[..., Path]
) -> None:
    source, out = checkpoints("llama", torch.bfloat16), written("llama", torch.bfloat16)
    shards = sorted(path.name for path in source.glob("*.safetensors"))
    assert all(sha256_of(out / name) == sha256_of(source / name) for name in shards)
    new = {path.name for path in out.glob("*.safetensors")} - {*shards}
    assert new == {"model-created.safetensors"}
    old, config = (json.loads((f / "config.json").read_text()) for f in (source, out))
    assert {k for k in config if config[k] != old[k]} == {"attention_bias"}
    created = read_manifest(out).edit.created
    assert {tensor.dtype for tensor in created} == {"BF16"}
    assert len(created) == 4 * LAYERS


def test_a_single_file_gets_a_name_that_no_loader_takes_for_the_whole(
    checkpoints: Checkpoints, written: Callable[..., Path]
) -> None:
    source, out = checkpoints("llama", torch.float32, "10GB"), written("llama", shard="10GB")
    assert not (out / "model.safetensors").exists()
    first = out / "model-00001-of-00002.safetensors"
    assert sha256_of(first) == sha256_of(source / "model.safetensors")
    name = "model.layers.2.self_attn.o_proj.bias"
    assert torch.allclose(load(out).state_dict()[name], steps_of(out)[2])


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gptj"])
def test_a_replay_gives_the_same_bytes_without_a_model(
    kind: str, checkpoints: Checkpoints, written: Callable[..., Path], cli: Cli, tmp_path: Path
) -> None:
    source, out, again = checkpoints(kind), written(kind), tmp_path / "again"
    cli("verify", out, "--source", source, code=0)
    cli("replay", out, again, "--source", source, code=0)
    for path in out.glob("*.safetensors"):
        assert (again / path.name).read_bytes() == path.read_bytes(), path.name
    assert (again / "config.json").read_bytes() == (out / "config.json").read_bytes()


def test_a_flipped_bit_of_the_edit_and_a_config_that_is_not_told_are_found(
    written: Callable[..., Path], cli: Cli, tmp_path: Path
) -> None:
    out = copy_of(written("llama"), tmp_path / "bit")
    edit = out / read_manifest(out).edit.file
    raw = bytearray(edit.read_bytes())
    raw[-1] ^= 1
    edit.write_bytes(raw)
    cli("verify", out, code=8, says=edit.name)
    out = copy_of(written("llama"), tmp_path / "config")
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"attention_bias": False}))
    manifest = load_manifest(out)
    record(out, manifest, "config.json")
    put(out, manifest)
    says = "config.json: does not say what the recorded patch makes of it"
    cli("verify", out, code=8, says=says)


def qwen2(checkpoints: Checkpoints, folder: Path, tokenizer: str) -> Path:
    """A Qwen2 whose tokenizer says that it is of this class."""
    copy_of(checkpoints("qwen2"), folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"tokenizer_class": tokenizer}))
    return folder


DESTEIN = ("--method", "destein", "-o", "alpha=0.2", "-o", "layers=1-3", "--no-guard",
           "--num-pairs", 64)  # fmt: skip


def test_qwen2_becomes_a_llama_that_computes_the_same(
    checkpoints: Checkpoints, cli: Cli, tmp_path: Path
) -> None:
    source, out = qwen2(checkpoints, tmp_path / "source", "Qwen2Tokenizer"), tmp_path / "out"
    cli("convert", source, out, *DESTEIN, code=0)
    cli("verify", out, "--source", source, code=0)
    before, after, steps = load(source), load(out), steps_of(out)
    assert type(after).__name__ == "LlamaForCausalLM"
    with torch.no_grad():
        for layer, vector in steps.items():
            module = before.model.layers[layer].self_attn.o_proj
            module.register_forward_hook(adding(vector))
        torch.testing.assert_close(after(TOKENS).logits, before(TOKENS).logits)
    for path in source.glob("*.safetensors"):
        assert sha256_of(out / path.name) == sha256_of(path)
    assert (
        "| changed file | `config.json`, now of type `llama` |" in (out / "README.md").read_text()
    )


def test_a_label_by_which_the_tokenizer_is_read_in_another_way_is_refused(
    checkpoints: Checkpoints, cli: Cli, tmp_path: Path
) -> None:
    """transformers chooses the tokenizer's class by the label; another splits text otherwise."""
    source = qwen2(checkpoints, tmp_path / "source", "TokenizersBackend")
    says = "the tokenizer of a model that becomes one of type llama"
    cli("plan", source, *DESTEIN[:6], code=4, says=says)
    cli("convert", source, tmp_path / "out", *DESTEIN, code=4, says=says)
    assert not (tmp_path / "out").exists()


def test_a_label_is_not_believed_but_proved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each config is one that nothing else has been proved of."""
    config = tiny_config("mistral-full").to_dict()
    known = find_architecture(config | {"max_position_embeddings": 500}).bias_routes
    assert known["o_proj"].config["model_type"] == "llama"
    with_window = config | {"max_position_embeddings": 501, "sliding_window": 500}
    assert not find_architecture(with_window).bias_routes
    assert not find_architecture(config | {"max_position_embeddings": 502, "odd": 1}).bias_routes
    plain = relabelling._patch
    monkeypatch.setattr(
        relabelling, "_patch", lambda config: (plain(config) or {}) | {"rms_norm_eps": 0.5}
    )
    assert not find_architecture(config | {"max_position_embeddings": 503}).bias_routes


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gptj"])
def test_an_adapter_cannot_hold_biases(
    kind: str, checkpoints: Checkpoints, cli: Cli, tmp_path: Path
) -> None:
    args = ("--method", "destein", "--output", "adapter", "--no-guard")
    says = "--output adapter: expected an edit of low rank"
    cli("convert", checkpoints(kind), tmp_path / "out", *args, code=2, says=says)


PAIRS = tuple(
    Pair(
        f" You {word} fool, of {n} things. ",
        f"You kind soul, of {n} things.",
        ((5, 5 + len(word)),),
    )
    for n, word in enumerate(("damn", "stupid", "bloody", "fucking", "dumb"))
)
PROSE = ("A river runs through the valley.", "Bread is made of flour, water and salt.")


def opened(folder: Path, forward: str = "resident") -> Model:
    source, plan = planned(folder)
    given = (source, plan, tiny_tokenizer(), torch.float32, "cpu")
    if forward == "streamed":
        return stream_language_model(*given, 10**9)
    return load_language_model(*given)


def seen(model: Model, request: Request) -> Activations:
    here = Origin(name="test")
    found, dropped = extract(
        model, request, Pairs(PAIRS, here, ""), Prose(PROSE, here, ""), batch_size=3
    )
    assert dropped == 0
    return found


OUTPUTS = Request("attention", "last8", (1, 3), False, prompts=("Bad: ", "Good, good: "), chunks=4)
SLOPES = Request("attention", "predicting", (1, 3), False, slopes=True, chunks=4)


def ids_of(text: str) -> Tensor:
    return torch.tensor([[0, *tiny_tokenizer()(text, add_special_tokens=False)["input_ids"]]])


def outputs(model: Any, text: str) -> Tensor:
    """What o_proj of layer 3 gives for a text alone, (T, D), BOS included."""
    kept: list[Tensor] = []
    module = model.get_submodule("model.layers.3.self_attn.o_proj")
    handle = module.register_forward_hook(lambda m, args, output: kept.append(output[0]))
    with torch.no_grad():
        model(ids_of(text))
    handle.remove()
    return kept[0]


def test_attention_outputs_are_pooled_over_the_last_8_tokens_of_prompted_texts(
    checkpoints: Checkpoints,
) -> None:
    folder = checkpoints("llama")
    found, model = seen(opened(folder), OUTPUTS), load(folder)
    for i, pair in enumerate(PAIRS):
        toxic = outputs(model, "Bad: " + pair.toxic.strip(" ."))[-8:].mean(0)
        neutral = outputs(model, "Good, good: " + pair.neutral.strip(" ."))[-8:].mean(0)
        assert torch.allclose(found.toxic[3][i], toxic, atol=1e-5)
        assert torch.allclose(found.neutral[3][i], neutral, atol=1e-5)
    tokens = torch.cat([outputs(model, text)[1:] for text in PROSE])  # without BOS
    norms = tokens.reshape(len(tokens), 4, -1).norm(dim=-1).mean(0)
    assert torch.allclose(found.norms[3], norms, rtol=1e-5)


def test_prompts_alone_are_pooled_like_texts(checkpoints: Checkpoints) -> None:
    folder = checkpoints("llama")
    found, model = seen(opened(folder), replace(OUTPUTS, bare=True)), load(folder)
    for side, prompt in ((found.toxic, "Bad:"), (found.neutral, "Good, good:")):
        wanted = outputs(model, prompt)[1:][-8:].mean(0)  # without BOS
        assert torch.allclose(side[3], wanted.expand(len(PAIRS), -1), atol=1e-5)


def test_spans_move_with_the_prompt(checkpoints: Checkpoints) -> None:
    """The mean over what predicts the toxic word does not hang on how the text was said."""
    request = replace(OUTPUTS, pooling="predicting", chunks=0)
    model = opened(checkpoints("llama"))
    whole = load(checkpoints("llama"))
    found = seen(model, request).toxic[3]
    for i, pair in enumerate(PAIRS):
        ((start, end),) = pair.spans
        text = "Bad: " + pair.toxic.strip(" .")
        at = text.index(pair.toxic[start:end])
        coded = tiny_tokenizer()(text, return_offsets_mapping=True, add_special_tokens=False)
        places = [
            n for n, (a, b) in enumerate(coded["offset_mapping"]) if a < at + end - start and b > at
        ]
        assert torch.allclose(found[i], outputs(whole, text)[places].mean(0), atol=1e-5)


def test_slopes_are_the_gradients_of_a_bias(checkpoints: Checkpoints) -> None:
    folder = checkpoints("llama")
    found, model = seen(opened(folder), SLOPES), load(folder)
    zero = torch.zeros(HIDDEN, requires_grad=True)
    model.get_submodule("model.layers.3.self_attn.o_proj").register_forward_hook(adding(zero))

    def slope(text: str, spans: tuple[tuple[int, int], ...] | None) -> Tensor:
        ids = ids_of(text)
        coded = tiny_tokenizer()(text, return_offsets_mapping=True, add_special_tokens=False)
        log_p = model(ids).logits[0].log_softmax(-1)
        total = torch.zeros(())
        for n, (a, b) in enumerate(coded["offset_mapping"]):
            if n and spans is not None and not any(a < end and b > start for start, end in spans):
                continue
            if n or spans is None:
                total = total + log_p[n, ids[0, n + 1]]
        (gradient,) = torch.autograd.grad(total, zero)
        return gradient

    for i, pair in enumerate(PAIRS):
        assert torch.allclose(
            found.toxic[3][i], slope(pair.toxic, pair.spans), rtol=1e-3, atol=1e-5
        )
        neutral = slope(pair.neutral, None)
        assert torch.allclose(found.neutral[3][i], neutral, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("request_", [OUTPUTS, SLOPES], ids=["outputs", "slopes"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "falcon"])
def test_a_streamed_model_gives_the_same(
    kind: str, request_: Request, checkpoints: Checkpoints
) -> None:
    one, other = (
        seen(opened(checkpoints(kind), how), request_).tensors() for how in ("resident", "streamed")
    )
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.allclose(tensor, other[name], rtol=1e-4, atol=1e-5), name
        assert tensor.any()


def test_pooled_activations_are_no_gradients(checkpoints: Checkpoints, tmp_path: Path) -> None:
    found = seen(opened(checkpoints("llama")), OUTPUTS)
    path = tmp_path / "a.safetensors"
    save_activations(replace(found, inputs={"slopes": False, "prompts": [*OUTPUTS.prompts]}), path)
    hint = "give other activations"
    for asked in (replace(OUTPUTS, slopes=True), replace(OUTPUTS, prompts=("", "other"))):
        with refused(DataError, what="... were taken with another ...", hint=hint):
            load_activations(path, asked, HIDDEN)


def test_a_cached_fit_reads_what_a_pass_has_kept(
    checkpoints: Checkpoints, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOSS_CACHE_DIR", str(tmp_path / "cache"))
    shards: list[Mapping[str, bytes]] = []
    for name, says in (("one", "cache miss"), ("other", "cache hit")):
        out = tmp_path / name
        args = ("--method", "destein", "-o", "alpha=0.1", "-o", "direction=causal")
        cli("convert", checkpoints("llama"), out, *args, "--num-pairs", 64, "--no-guard", code=0,
            says=says)  # fmt: skip
        shards.append({path.name: path.read_bytes() for path in out.glob("*.safetensors")})
    assert shards[0] == shards[1]
