"""Architectures that no file describes: inferred, proved, and converted as a user would.

``make architectures`` runs this for every class of the installed transformers that is proved; here
is a sample, of which each stands for a way of being built.
"""

import copy
import json
import os
import re
import shutil
import tomllib
import warnings
from contextlib import ExitStack
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from converter.checkpoints.architectures import known_models, library
from converter.checkpoints.architectures.architecture import FfnSpec, LayerSpec
from converter.checkpoints.architectures.find import data_files, find_architecture
from converter.checkpoints.architectures.inference import Hints, Inferred, infer
from converter.checkpoints.architectures.library import MetaTensor
from converter.checkpoints.architectures.proof import prove
from converter.checkpoints.architectures.tiny import make_tiny
from converter.checkpoints.names import EDIT_FILE
from converter.cli.guide import GUIDE
from converter.edits.edit_file import load_edit_tensors
from converter.entrypoints.architectures import examples, try_all, try_one
from converter.entrypoints.convert import convert
from converter.entrypoints.verify import verify
from converter.errors import CheckpointError, SourceError
from converter.models import loading as models
from converter.models.likelihood import log_probabilities
from converter.recipe import Recipe
from converter.release.manifest import read_manifest
from tests.builders.errors import refused
from tests.builders.invoke import Cli
from tests.builders.models import NORM_AFTER, TINY_MODELS, planned, tiny_config, tiny_tokenizer
from tests.builders.own_code import make_own_code

EVERY = bool(os.environ.get("GLOSS_EVERY_ARCHITECTURE"))

CAUSAL = "AutoModelForCausalLM"
MOST = 300_000_000
"""Parameters of towers that are written to a file."""

LAYERS = re.compile(r"(num_hidden|n|num|encoder|num_encoder|vision)_?layers?|layers|depth")
"""Keys of the number of layers of a tower."""

SAMPLE = ["apertus", "bloom", "deepseek_v4", "falcon_h1", "glm4_moe", "granitemoehybrid", "lfm2",
          "llama4_text", "nemotron_h", "openai-gpt", "qwen3_next", "reformer", "xglm"]  # fmt: skip
"""Dense, in one module or none; experts, in one tensor or each in its own, with a shared one; norms
before and after; hyper-connections; hybrids with attention, state spaces and convolutions."""


def config_of(model_type: str) -> dict[str, Any]:
    """A config of a type, as near to the default one as can be built."""
    return {"model_type": model_type, **examples().get(model_type, {})}


def cases() -> list[tuple[str, str]]:
    """Model types and auto classes: all of them, or the sample."""
    if not EVERY:
        return [(model_type, CAUSAL) for model_type in SAMPLE]
    found = {
        (model_type, title): auto_class
        for auto_class in reversed(known_models.AUTO_CLASSES)
        for model_type, title in known_models.model_types(auto_class).items()
    }
    return sorted((model_type, auto) for (model_type, _), auto in found.items())


def save_tiny(model_type: str, folder: Path, auto_class: str = CAUSAL) -> Path:
    """A tiny checkpoint of a type, as ``save_pretrained`` writes it.

    Of a wrapper, whose towers are not shrunk but in their number of layers, by the same names, and
    zeros for the towers.
    """
    config = library.read_config(config_of(model_type), None, False)
    kind: Any = library.class_of(config, auto_class)
    tiny = make_tiny(kind, config, library.on_meta(kind, config))
    tiny_tokenizer().save_pretrained(folder)
    if not any(isinstance(each, MetaTensor) for each in tiny.tensors.values()):
        model = tiny.model.float()
        try:
            model.save_pretrained(folder, max_shard_size="200KB")
        except ValueError as error:
            pytest.skip(f"its tiny config cannot be saved: {error}")
        return folder
    short, shapes = short_towers(kind, tiny.config)
    real = {name for name, each in tiny.tensors.items() if isinstance(each, Tensor)}
    if sum(prod(shape) for name, shape in shapes.items() if name not in real) > MOST:
        pytest.skip(f"the towers of {model_type} have more than {MOST:,} parameters")
    tensors = {}
    for name, shape in shapes.items():
        known = tiny.tensors.get(name)
        if isinstance(known, Tensor) and known.shape != shape:
            pytest.skip(f"{name} has another shape once the config of its tiny model is saved")
        zeros = torch.zeros(shape, dtype=torch.bfloat16)
        tensors[name] = known.float() if isinstance(known, Tensor) else zeros
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    short.save_pretrained(folder)
    return folder


def short_towers(kind: Any, config: Any) -> tuple[Any, dict[str, torch.Size]]:
    """A config whose towers have two layers, if the class knows how, and the shapes on disk."""
    short = copy.deepcopy(config)
    cut_layers(short, library.text_config(short))
    for found in (short, config):
        try:
            again = library.read_config(found.to_dict(), None, False)
            outline = library.on_meta(kind, library.own_config(kind, again))
        except Exception:  # whatever a class makes of numbers that it does not like
            continue
        tensors = library.on_disk(outline, outline.state_dict())
        return found, {name: tensor.shape for name, tensor in tensors.items()}
    pytest.skip("the config of its tiny model builds no model once it is saved")


def cut_layers(part: Any, text: Any) -> None:
    """Keep two layers of each part of a config that is not the language model's."""
    if part is text:
        return
    for key, value in list(vars(part).items()):
        if LAYERS.fullmatch(key) and type(value) is int and value > 2:
            setattr(part, key, 2)
    for name in getattr(part, "sub_configs", None) or {}:
        inner = getattr(part, name, None)
        if inner is not None and not isinstance(inner, dict):
            cut_layers(inner, text)


def loaded(folder: Path) -> tuple[Any, Any]:
    """The plan and the model of a folder."""
    source, plan = planned(folder)
    model = models.load_language_model(source, plan, tiny_tokenizer(), torch.float32, "cpu")
    return plan, model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """Of a few texts."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 200, (2, 12), generator=generator)
    found: Tensor = model.module(input_ids=ids, use_cache=False).logits
    return found


@pytest.mark.parametrize(("model_type", "auto_class"), cases())
def test_a_converted_checkpoint_computes_what_projected_ffns_give(
    model_type: str, auto_class: str, tmp_path: Path, shared_cache: Path
) -> None:
    """Through files as transformers writes them; and streamed as in memory."""
    if EVERY:
        title = known_models.model_types(auto_class)[model_type]
        if reason := try_one(model_type, auto_class, title).reason:
            pytest.skip(reason)
    source, out = save_tiny(model_type, tmp_path / "source", auto_class), tmp_path / "out"
    config = json.loads((source / "config.json").read_text())
    if config["model_type"] != model_type:
        pytest.skip(f"a checkpoint of this class says that it is of type {config['model_type']}")
    try:
        library.read_config(config, None, False)
    except Exception as error:  # of few layers, or narrow ones, where the class wants others
        pytest.skip(f"its tiny config is not a valid one: {error}")
    plan, model = loaded(source)
    layers = ",".join(map(str, plan.dimensions.ffn_layers))
    options = {"rank": "2", "layers": layers, "protect_shared": "0"}
    given: dict[str, Any] = {"method": "random", "options": options, "num_pairs": 32}
    try:
        convert(Recipe(source=str(source), guard=False, **given), out)
    except SourceError as error:  # PyTorch's grouped products
        if "strides should be multiple of 16 bytes" in str(error):
            pytest.skip("experts of the tiny model are not as wide as kernels want them")
        raise
    assert verify(out) == []
    manifest, stored = read_manifest(out), load_edit_tensors(out / EDIT_FILE)
    assert {entry.name for entry in manifest.edited if entry.role == "down_proj"} == {
        weight.info.name for weight in plan.weights("down_proj")
    }
    of_layer = {
        entry.layer: (
            stored[entry.tensors["U"]],
            stored[entry.tensors.get("A", entry.tensors["U"])],
        )
        for entry in manifest.edited
    }
    plain, written = logits(model), logits(loaded(out)[1])
    with ExitStack() as stack:
        for layer, factors in of_layer.items():
            for ffn in plan.architecture.layer(layer).ffns:
                module = model.module.get_submodule(ffn.module.format(layer=layer))
                handle = module.register_forward_hook(projecting(*factors))
                stack.callback(handle.remove)
        wanted = logits(model)
    effect = (wanted - plain).abs().max()
    assert effect > 0
    assert (written - wanted).abs().max() < 1e-3 * effect
    check_streamed(source, model)
    shutil.rmtree(tmp_path)  # towers are large


def projecting(U: Tensor, A: Tensor) -> Any:
    """A hook that gives ``x - A U^T x``; A is U, or oblique where a norm is behind."""

    def project(x: Tensor) -> Tensor:
        return x - (x @ U) @ A.T

    def hook(module: Any, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (project(output[0]), *output[1:])
        return project(output)

    return hook


def check_streamed(folder: Path, resident: Any) -> None:
    """The same log-probabilities a layer at a time, where the description says that this can be."""
    source, plan = planned(folder)
    assert plan.architecture.proof is not None
    if not plan.architecture.proof.streams:
        return
    from converter.models.batching import Encoder

    streamed = models.stream_language_model(
        source, plan, tiny_tokenizer(), torch.float32, "cpu", 10**9
    )
    values = []
    for model in (resident, streamed):
        encode = Encoder(model.tokenizer, model.module)
        texts = [encode(text, "mean", ()) for text in ("you idiot, get out", "a cup of tea")]
        (found,) = log_probabilities(model, [texts])
        values.append(torch.cat([torch.from_numpy(each) for each in found]))
    one, other = values
    assert torch.allclose(one, other, atol=1e-5)  # rounding: where a tensor begins in memory counts


def inferred(kind: str) -> Inferred:
    config = library.read_config(tiny_config(kind).to_dict(), None, False)
    auto = find_architecture(tiny_config(kind).to_dict()).auto_class
    return infer(library.class_of(config, auto), config, auto)


def changed(found: Inferred, change: Any) -> Inferred:
    """The same with another FFN in every layer."""
    kinds = tuple(
        LayerSpec(tuple(map(change, kind.ffns)), kind.roles) for kind in found.architecture.kinds
    )
    return replace(found, architecture=replace(found.architecture, kinds=kinds))


def other_module(ffn: FfnSpec, old: str, new: str) -> FfnSpec:
    return replace(ffn, module=ffn.module.replace(old, new), site=ffn.site.replace(old, new))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2_moe", "gemma2", "opt", "deepseek_v3"])
def test_what_is_inferred_is_proved(kind: str) -> None:
    proof = prove(inferred(kind))
    assert proof.error < 1e-6
    assert proof.left < 1e-6
    assert proof.streams


WRONG = {
    "attention for the FFN": (
        "llama", lambda ffn: other_module(ffn, ".mlp", ".self_attn"), "self_attn mixes positions"),
    "the norm before it": (
        "llama", lambda ffn: other_module(ffn, ".mlp", ".input_layernorm"), "does not move"),
    "a part of it": (
        "llama", lambda ffn: other_module(ffn, ".mlp", ".mlp.up_proj"), "does not move"),
    "the axis of its inputs": (
        "llama",
        lambda ffn: replace(ffn, weights=(replace(ffn.weights[0], output_axis=1),)),
        "is not that of its outputs"),
    "no shared expert": (
        "qwen2_moe", lambda ffn: replace(ffn, weights=ffn.weights[:1]),
        "does not project what the feed-forward networks give"),
    "no experts": (
        "qwen2_moe", lambda ffn: replace(ffn, weights=ffn.weights[-1:]),
        "does not project what the feed-forward networks give"),
    "a norm that is not seen": (
        "gemma2", lambda ffn: replace(ffn, norm=""), "turns what it gives"),
    "a norm with another offset": (
        "gemma2", lambda ffn: replace(ffn, norm_offset=0), "turns what it gives"),
    "before the norm": (
        "gemma2", lambda ffn: replace(ffn, site=ffn.module), "does not move"),
    "no bias": (
        "gpt2",
        lambda ffn: replace(ffn, weights=(replace(ffn.weights[0], bias="nonesuch"),)),
        "does not project what the feed-forward networks give"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", sorted(WRONG))
def test_the_proof_catches_a_wrong_description(wrong: str) -> None:
    kind, change, said = WRONG[wrong]
    with pytest.raises(ValueError, match=said):
        prove(changed(inferred(kind), change))


def test_the_proof_catches_a_layer_whose_ffn_is_not_described() -> None:
    found = inferred("llama")
    kinds = (LayerSpec((), {}), *found.architecture.kinds)
    without = replace(found.architecture, kinds=kinds, layers=(0, *[1] * 5))
    with pytest.raises(ValueError, match="layer 0 has a feed-forward network mlp that is not"):
        prove(replace(found, architecture=without))


def test_a_data_file_says_what_inference_finds_or_is_refused() -> None:
    config = library.read_config(tiny_config("llama").to_dict(), None, False)
    kind = library.class_of(config, "AutoModelForCausalLM")
    said = infer(kind, config, "AutoModelForCausalLM", Hints("model.layers", ("mlp",)))
    assert said.architecture == inferred("llama").architecture
    assert prove(said, "llama.toml").described_by == "llama.toml"
    for hints, problem in (
        (Hints(ffns=("self_attn",)), "in layer 0, self_attn mixes positions"),
        (Hints(ffns=("mlp.up_proj",)), "in layer 0, mlp.up_proj is a linear map"),
        (Hints(ffns=("nonesuch",)), "no layer has a feed-forward network"),
        (Hints(blocks="model.nonesuch"), "no list of modules is one of layers"),
    ):
        with pytest.raises(ValueError, match=problem):
            infer(kind, config, "AutoModelForCausalLM", hints)


def test_a_draft_is_what_was_inferred_or_why_not(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_of("gemma2")))
    draft = cli("architectures", "--infer", tmp_path, code=0).stdout
    assert tomllib.loads(draft) == {
        "model_type": "gemma2", "blocks": "model.layers", "ffns": ["mlp"],
    }  # fmt: skip
    assert "behind the norm model.layers.{layer}.post_feedforward_layernorm.weight + 1" in draft
    (tmp_path / "config.json").write_text(json.dumps(config_of("rwkv")))
    draft = cli("architectures", "--infer", tmp_path, code=0).stdout
    assert "# the architecture of RwkvForCausalLM is not known: " in draft
    assert tomllib.loads(draft).keys() == {"model_type", "blocks", "ffns"}


def test_the_page_of_models_is_what_the_command_prints() -> None:
    """Of the sample, of two that are refused, of one whose layers differ in their number of heads,
    and of one without an FFN; the command tries all."""
    page = (GUIDE / "models.md").read_text()
    for model_type in (*SAMPLE, "bert", "cpmant", "dots3_note_text", "mamba"):
        for tried in try_all((model_type,)):
            assert tried.row in page, "put what 'gloss architectures' prints into the page"


def test_a_new_model_is_converted_as_any_other(cli: Cli, tmp_path: Path) -> None:
    """A type that no file knows: planned, converted, verified, loaded, and it generates."""
    assert "apertus" not in {*TINY_MODELS, *data_files()}
    source, out = save_tiny("apertus", tmp_path / "source"), tmp_path / "out"
    assert "ApertusForCausalLM, 2 layers" in cli("plan", source).stdout
    cli("convert", source, out, "--no-guard", "-o", "rank=2", "--num-pairs", 32, code=0)
    manifest = read_manifest(out)
    assert manifest.architecture.name == "ApertusForCausalLM"
    assert manifest.architecture.described_by == "inference"
    assert manifest.architecture.proved_layers == 2
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = AutoModelForCausalLM.from_pretrained(out)
        ids = model.generate(torch.tensor([[11, 12, 13]]), max_new_tokens=5, do_sample=False)
    assert ids.shape == (1, 8)


def test_layers_without_an_ffn_are_left_alone_and_said(cli: Cli, tmp_path: Path) -> None:
    source = save_tiny("nemotron_h", tmp_path / "source")
    result = cli("plan", source)
    assert "layers without a feed-forward network, left alone: " in result.stderr
    plan = planned(source)[1]
    assert plan.dimensions.without_ffn
    assert {target.layer for target in plan.targets} == set(plan.dimensions.ffn_layers)


def test_code_of_its_own_runs_only_if_it_is_trusted(cli: Cli, tmp_path: Path) -> None:
    source, out = make_own_code(tmp_path / "source"), tmp_path / "out"
    with refused(
        CheckpointError, what="config.json: model_type 'own_lm' is code of its own",
        hint="read the code; if you trust it, give --trust-remote-code",
    ):  # fmt: skip
        planned(source)
    trusted = "--trust-remote-code"
    given = (trusted, "--no-guard", "-o", "rank=2", "--num-pairs", 32)
    cli("convert", source, out, *given, code=0)
    assert read_manifest(out).architecture.name == "OwnForCausalLM"
    cli("verify", out, code=8, says="is code of its own")
    cli("verify", out, trusted, "--source", source, code=0)
    draft = cli("architectures", "--infer", source, trusted, code=0).stdout
    assert 'blocks = "model.layers"\nffns = ["mlp"]' in draft


_EXPERTS = """
import torch
from torch import nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from .configuration_own import OwnConfig


class Experts(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.n_routed_experts, bias=False)
        self.experts = nn.ModuleList([LlamaMLP(config) for _ in range(config.n_routed_experts)])

    def forward(self, x):
        weights, chosen = self.gate(x).softmax(-1).topk(2, -1)
        full = torch.zeros_like(self.gate(x)).scatter(-1, chosen, weights)
        return sum(full[..., n, None] * expert(x) for n, expert in enumerate(self.experts))


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = Experts(config)
"""

_BEFORE = """
from torch import nn
from transformers import LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaMLP

from .configuration_own import OwnConfig


class OwnModel(LlamaModel):
    def __init__(self, config):
        super().__init__(config)
        self.first = nn.ModuleList([LlamaMLP(config)])

    def forward(self, input_ids=None, inputs_embeds=None, **more):
        x = self.embed_tokens(input_ids)
        return super().forward(inputs_embeds=x + self.first[0](x), **more)


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = OwnModel(config)
"""


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (_EXPERTS, "a smaller model has other parameters in model.layers.0: mlp.experts."),
        (_BEFORE, "model.first.0 is like a feed-forward network, and in none of the layers"),
    ],
)
def test_what_a_tiny_model_or_its_layers_do_not_have_is_not_passed_over(
    code: str, reason: str, cli: Cli, tmp_path: Path
) -> None:
    """Experts that are modules of their own are fewer in a tiny model; and an FFN may be outside
    of the layers."""
    source = make_own_code(tmp_path / f"source{len(code)}")  # its name is that of the module, too
    (source / "modeling_own.py").write_text(code)
    path = source / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "n_routed_experts": 16}))
    cli("plan", source, "--trust-remote-code", code=4, says=reason)


OTHERS: dict[str, dict[str, Any]] = {
    "an encoder, which": {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
    "an encoder, which does": {"model_type": "roberta"},
    "an encoder-decoder, of": {"model_type": "t5", "is_encoder_decoder": True},
    "an encoder-decoder, of which": {"model_type": "bart"},
    "a model without a head": {"model_type": "qwen3", "architectures": ["Qwen3Model"]},
    "a classifier or reward model": {
        "model_type": "llama", "architectures": ["LlamaForSequenceClassification"]},
    "a draft or assistant model": {
        "model_type": "llama", "architectures": ["LlamaForCausalLMEagle3"]},
    "a draft or assistant": {"model_type": "gemma4_assistant"},
    "a diffusion model": {
        "model_type": "diffusion_gemma", "architectures": ["DiffusionGemmaForBlockDiffusion"]},
    "a model of images": {"model_type": "clip"},
    "a model of speech": {"model_type": "whisper", "is_encoder_decoder": True},
    "no language model": {"model_type": "decision_transformer"},
}  # fmt: skip


@pytest.mark.parametrize("what", sorted(OTHERS))
def test_a_model_of_another_kind_is_refused_by_what_it_is(what: str) -> None:
    with refused(
        CheckpointError, what=f"... is {what}...", expected="a language model that continues text"
    ):
        find_architecture(OTHERS[what])


@pytest.mark.parametrize(
    ("file", "what"),
    [("model_index.json", "a diffusion pipeline"), ("modules.json", "a model of sentence ...")],
)
def test_a_folder_of_another_kind_is_refused_by_its_files(
    file: str, what: str, tmp_path: Path
) -> None:
    (tmp_path / file).write_text("{}")
    with refused(CheckpointError, what=f"... is {what}, as its {file} says"):
        planned(tmp_path)


def test_a_model_that_transformers_does_not_know_yet() -> None:
    config = {"model_type": "nonesuch", "transformers_version": "99.1.0"}
    with refused(
        CheckpointError, what="config.json: model_type",
        expected=f"one that transformers {known_models.version()} knows", found="'nonesuch'",
        hint="it was saved with transformers 99.1.0, the first that is known to have it",
    ):  # fmt: skip
        find_architecture(config)


def test_the_norms_after_ffns_are_those_that_are_there() -> None:
    found = {
        kind
        for kind in TINY_MODELS
        if any(f.norm for k in find_architecture(tiny_config(kind).to_dict()).kinds for f in k.ffns)
    }
    assert found == NORM_AFTER


def test_layers_that_use_the_embedding_are_not_streamed() -> None:
    """A streamed model's embedding gives zeros to all layers but the first: Gemma 4 computes what
    each layer is given besides from it."""
    proof = find_architecture(config_of("gemma4_text")).proof
    assert proof is not None
    assert not proof.streams


@pytest.mark.parametrize("architectures", [3, True, {"a": 1}, "LlamaForCausalLM", [3]])
def test_odd_names_of_classes_are_passed_over(architectures: Any) -> None:
    config = {**tiny_config("llama").to_dict(), "architectures": architectures}
    assert find_architecture(config).title == "LlamaForCausalLM"


def test_labels_are_not_counted() -> None:
    """transformers makes a name of each: 10^9 of them would take all memory."""
    config = {**tiny_config("llama").to_dict(), "num_labels": 10**9}
    assert find_architecture(config).title == "LlamaForCausalLM"
