"""Weights by role: their names and axes are those of transformers' own modules."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from converter.checkpoints.patch import merge
from converter.checkpoints.plan import Plan, make_plan
from converter.checkpoints.safetensors.header import Header, read_header
from converter.checkpoints.weights import Weight
from converter.errors import CheckpointError, OptionError
from tests.builders.errors import refused
from tests.builders.models import (
    FFN,
    HIDDEN,
    LAYERS,
    MIXTURES,
    NORM_AFTER,
    OTHER_LAYOUTS,
    TINY_MODELS,
    Checkpoints,
    architecture_of,
    load,
)

UNGATED = {"falcon", "gpt2", "gpt_bigcode", "gpt_neox", "gptj", "opt", "phi", "starcoder2"}
"""Model types whose FFN has two matrices."""

BIASED = {"falcon", "gpt2", "gpt_bigcode", "gpt_neox", "gpt_oss", "opt", "phi", "starcoder2"}
"""Model types whose tiny model has biases of o_proj."""

ROUTES = {
    **dict.fromkeys(
        ("cohere", "gemma", "gemma2", "gemma3", "gemma3_text", "granite", "granitemoe", "llama",
         "llama-tied", "olmo", "olmo2", "olmo3", "olmoe", "qwen3", "qwen3_moe", "qwen3_vl",
         "smollm3"),
        ("q_proj", "k_proj", "v_proj"),
    ),
    "mistral-full": ("q_proj", "k_proj", "v_proj"),
    "qwen2": (),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), ("kv_a_proj_with_mqa", "q_a_proj")),
}  # fmt: skip
"""Kinds that get biases of o_proj by their config -> the maps beside it that then have one, too."""

DENSE = {"qwen2_moe": (3,), "qwen3_moe": (0, 2, 4), "deepseek_v2": (0, 1, 2),
         "deepseek_v3": (0, 1, 2)}  # fmt: skip
"""Mixtures with layers that are none, and these: they have gates as any other model."""

LAST_BIAS = f"transformer.h.{LAYERS - 1}.mlp.fc_out.bias"

IDS = torch.arange(2, 20).view(2, 9)


def planned(folder: Path, **changes: Any) -> Plan:
    """The plan of a folder, with some keys of its config changed."""
    config = json.loads((folder / "config.json").read_text()) | changes
    headers = {path.name: read_header(path) for path in sorted(folder.glob("*.safetensors"))}
    return make_plan(config, None, headers)


def read(folder: Path, weight: Weight) -> Tensor:
    """A weight as (outputs, inputs), however it is stored; or a bias."""
    with safe_open(folder / weight.shard, "pt") as file:
        tensor: Tensor = file.get_tensor(weight.info.name)
    tensor = tensor.T if weight.axis == 1 else tensor
    return tensor if weight.rows is None else tensor[weight.rows]


@torch.no_grad()
def seen(model: Any, modules: set[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Input and output of each module when the model runs."""
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        # copies: Falcon adds to what a module gives, in place
        return lambda module, args, output: found.update({name: (args[0].clone(), output.clone())})

    handles = [model.get_submodule(n).register_forward_hook(hook(n)) for n in sorted(modules)]
    model(IDS)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("kind", sorted({*TINY_MODELS, *OTHER_LAYOUTS}))
def test_every_weight_is_what_its_module_multiplies_by(kind: str, checkpoints: Checkpoints) -> None:
    """In each layer, output = input W^T + b with the tensors of the file, and shapes as stated."""
    folder = checkpoints(kind)
    plan, model = planned(folder), load(folder)
    weights = [w for role in plan.roles for w in plan.weights(role)]
    biases = {(w.role, w.layer): w for role in plan.roles for w in plan.biases(role)}
    modules = {w.module: model.get_submodule(w.module) for w in weights}
    linear = {name for name, m in modules.items() if isinstance(m, nn.Linear | Conv1D)}
    flows = seen(model, linear)
    for weight in weights:
        name = weight.module
        assert weight.mixed == (name not in linear)
        if weight.mixed:  # experts share parameters, so their module is the FFN
            assert (weight.role, kind in MIXTURES) == ("down_proj", True)
            assert weight.layer not in DENSE.get(kind, ())
            assert plan.architecture.sites(weight.layer) == (name,)
            continue
        assert weight.axis == isinstance(modules[name], Conv1D)
        x, y = flows[name]
        expected = x @ read(folder, weight).T
        if bias := biases.get((weight.role, weight.layer)):
            expected = expected + read(folder, bias)
        rows = weight.rows or range(y.shape[-1])
        assert torch.allclose(y[..., rows], expected, atol=1e-5)
        assert (weight.role, weight.layer) in biases or modules[name].bias is None


@pytest.mark.parametrize("kind", sorted(TINY_MODELS))
def test_the_roles_are_those_of_the_model(kind: str, checkpoints: Checkpoints) -> None:
    plan = planned(checkpoints(kind))
    expected = {"down_proj", "o_proj"}
    if kind not in MIXTURES or kind in DENSE:
        expected |= {"up_proj"} if kind in UNGATED else {"gate_proj", "up_proj"}
    if any("lm_head" in n or "embed_out" in n for h in plan.headers.values() for n in h.tensors):
        expected.add("lm_head")
    assert set(plan.roles) == expected
    for role in plan.roles:
        if role in ("down_proj", "lm_head"):
            continue
        layers = range(LAYERS) if role == "o_proj" else DENSE.get(kind, range(LAYERS))
        weights = plan.weights(role)
        assert [w.layer for w in weights] == list(layers)
        some = plan.weights(role, [4, 1])
        assert some == tuple(w for w in weights if w.layer in (1, 4))
        inputs, outputs = (HIDDEN, FFN) if role != "o_proj" else (None, HIDDEN)
        for weight in weights:
            assert weight.info.shape[weight.axis] == outputs * (2 if weight.rows else 1)
            assert inputs in (None, weight.info.shape[1 - weight.axis])
    assert len(plan.biases("o_proj")) == (LAYERS if kind in BIASED else 0)


def test_the_head_is_in_no_layer(checkpoints: Checkpoints) -> None:
    (head,) = planned(checkpoints()).weights("lm_head", [])
    assert (head.info.name, head.layer, head.expert) == ("lm_head.weight", LAYERS, None)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_biases_of_each_layer_have_a_role_of_their_own(
    kind: str, checkpoints: Checkpoints
) -> None:
    biases = planned(checkpoints(kind)).biases("down_proj")
    found = [(bias.layer, bias.recorded_role, bias.axis) for bias in biases]
    assert found == [(layer, "down_proj_bias", 0) for layer in range(LAYERS)]


def test_parts_of_a_fused_matrix_are_its_rows(checkpoints: Checkpoints) -> None:
    plan = planned(checkpoints("phi3"))
    gate, up = plan.weights("gate_proj", [2])[0], plan.weights("up_proj", [2])[0]
    assert gate.info == up.info
    assert (gate.rows, up.rows) == (range(FFN), range(FFN, 2 * FFN))
    assert plan.weights("down_proj", [2])[0].rows is None


def test_experts_are_numbered(checkpoints: Checkpoints) -> None:
    """Those that have a tensor each; the shared one, a dense layer and a fused tensor are None."""
    experts = [w.expert for w in planned(checkpoints("qwen2_moe")).weights("down_proj", [2, 3])]
    assert experts == [0, 1, 2, 3, None, None]
    assert [w.expert for w in planned(checkpoints("gpt_oss")).targets[:2]] == [None, None]


@pytest.mark.parametrize(
    ("kind", "change", "role", "roles"),
    [
        ("mixtral", {}, "gate_proj", "down_proj or o_proj or lm_head"),
        ("gpt2", {}, "gate_proj", "down_proj or up_proj or o_proj"),
        ("gpt2", {}, "lm_head", "down_proj or up_proj or o_proj"),
        # it has a tensor of that name, which need not be read
        (
            "phi3",
            {"tie_word_embeddings": True},
            "lm_head",
            "down_proj or gate_proj or up_proj or o_proj",
        ),
    ],
)
def test_a_role_that_the_checkpoint_lacks_is_refused_by_name(
    kind: str, change: dict[str, Any], role: Any, roles: str, checkpoints: Checkpoints
) -> None:
    plan = planned(checkpoints(kind), **change)
    title = architecture_of(kind).title
    for ask in (plan.weights, plan.biases, plan.bias_route):
        what = f"{title}: this checkpoint has no {role}"
        with refused(OptionError, what=what, expected=roles):
            ask(role)


def altered(plan: Plan, name: str, change: dict[str, Any] | None) -> Plan:
    """The plan of the same checkpoint with another entry in a header, or without it."""
    shard, info = plan.names.tensors[name]
    entries = {n: entry for n, entry in plan.headers[shard].tensors.items() if n != name}
    if change:
        entries[name] = dataclasses.replace(info, **change)
    headers: dict[str, Header] = dict(plan.headers)
    headers[shard] = dataclasses.replace(headers[shard], tensors=entries)
    return make_plan(CONFIG, None, headers)


CONFIG = {
    "model_type": "llama", "num_hidden_layers": LAYERS, "hidden_size": HIDDEN,
    "intermediate_size": FFN, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "vocab_size": 400,
}  # fmt: skip


@pytest.mark.parametrize(
    ("role", "name", "change", "fields"),
    [
        ("gate_proj", "model.layers.5.mlp.gate_proj.weight", {"shape": (HIDDEN, FFN)},
         {"what": "tensor ... contradicts config.json", "expected": "shape [48, 32]",
          "found": "[32, 48]"}),
        ("o_proj", "model.layers.5.self_attn.o_proj.weight", {"shape": (HIDDEN, 24)},
         {"expected": "shape [32, 32]", "found": "[32, 24]"}),
        ("up_proj", "model.layers.5.mlp.up_proj.weight", {"dtype": "F8_E4M3"},
         {"what": "tensor ... cannot be edited", "expected": "dtype F16, BF16, F32, F64",
          "found": "F8_E4M3"}),
        ("up_proj", "model.layers.5.mlp.up_proj.bias", {"shape": (HIDDEN,)},
         {"expected": "shape [48]", "found": "[32]"}),
        ("o_proj", "model.layers.5.self_attn.o_proj.weight", None,
         {"what": "tensor model.layers.5.self_attn.o_proj.weight is missing"}),
    ],
)  # fmt: skip
def test_other_weights_are_checked_when_they_are_asked_for(
    role: Any,
    name: str,
    change: dict[str, Any] | None,
    fields: dict[str, str],
    checkpoints: Checkpoints,
) -> None:
    whole = planned(checkpoints())
    if change and "shape" in change and name.endswith(".weight"):  # the class says what it must be
        with refused(CheckpointError, **fields):
            altered(whole, name, change)
        return
    plan = altered(whole, name, change)
    assert plan.weights("down_proj") == whole.weights("down_proj")
    with refused(CheckpointError, **fields):
        plan.weights(role)
    assert plan.weights(role, range(5)) == whole.weights(role, range(5))


@pytest.mark.parametrize("name", ["lm_head.weight", "model.embed_tokens.weight"])
def test_rows_are_those_of_the_vocabulary(name: str, checkpoints: Checkpoints) -> None:
    with refused(CheckpointError, expected="400 rows, its vocab_size", found="399"):
        altered(planned(checkpoints()), name, {"shape": (399, HIDDEN)})


def test_a_size_that_the_config_does_not_say_is_the_default_of_its_class(
    checkpoints: Checkpoints,
) -> None:
    """As in Gemma-3's, which leaves the number of heads to its class: it is 8."""
    folder = checkpoints("gemma3_text")
    config = json.loads((folder / "config.json").read_text())
    headers = planned(folder).headers
    without = {key: value for key, value in config.items() if key != "num_attention_heads"}
    with refused(CheckpointError, expected="shape [64, 32]", found="[32, 32]"):
        make_plan(without, None, headers)
    with refused(CheckpointError, expected="shape [8, 32]", found="[16, 32]"):
        planned(folder, head_dim=4)
    del config["vocab_size"]
    with refused(CheckpointError, expected="262208 rows, its vocab_size", found="400"):
        make_plan(config, None, headers)


def with_biases(folder: Path, out: Path, value: Callable[[int], Tensor]) -> tuple[Path, Plan]:
    """A checkpoint with the biases of o_proj that its route says, written into one new shard.

    Args:
        folder: of the source.
        out: to be made.
        value: gives a layer's bias of o_proj.
    """
    shutil.copytree(folder, out)
    plan = planned(folder)
    route = plan.bias_route("o_proj")
    assert route is not None
    tensors = {name: torch.zeros(shape) for name, shape in route.created.items()}
    tensors |= {name: value(layer) for layer, name in route.biases.items()}
    save_file(tensors, out / "model-biases.safetensors", {"format": "pt"})
    index = json.loads((out / "model.safetensors.index.json").read_text())
    index["weight_map"] |= dict.fromkeys(tensors, "model-biases.safetensors")
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(merge(config, route.config)))
    return out, plan


def loaded(folder: Path, kind: str) -> Any:
    """The model, all of whose tensors are used and there."""
    auto = getattr(transformers, architecture_of(kind).auto_class)
    model, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


@pytest.mark.parametrize("kind", sorted(ROUTES))
def test_zero_biases_change_no_logit(kind: str, checkpoints: Checkpoints, tmp_path: Path) -> None:
    folder = checkpoints(kind)
    out, plan = with_biases(folder, tmp_path / "out", lambda layer: torch.zeros(HIDDEN))
    with torch.no_grad():
        assert torch.equal(loaded(out, kind)(IDS).logits, load(folder)(IDS).logits)
    route, again = plan.bias_route("o_proj"), planned(out).bias_route("o_proj")
    assert route is not None
    assert again is not None
    assert set(route.biases) == set(range(LAYERS))
    start = {layer: name.removesuffix("o_proj.bias") for layer, name in route.biases.items()}
    zeros = {f"{s}{name}.bias" for s in start.values() for name in ROUTES[kind]}
    assert set(route.created) == zeros | set(route.biases.values())
    assert (again.biases, again.config, again.created) == (route.biases, {}, {})


@pytest.mark.parametrize("kind", sorted(ROUTES))
def test_a_bias_moves_what_o_proj_gives_by_itself(
    kind: str, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    vectors = torch.randn(LAYERS, HIDDEN, generator=torch.Generator().manual_seed(0))
    out, plan = with_biases(checkpoints(kind), tmp_path / "out", vectors.__getitem__)
    names = {w.layer: w.module for w in plan.weights("o_proj")}
    model = loaded(out, kind)
    flows = seen(model, set(names.values()))
    for weight in plan.weights("o_proj"):
        x, y = flows[names[weight.layer]]
        moved = y - x @ read(checkpoints(kind), weight).T
        assert torch.allclose(moved, vectors[weight.layer].expand_as(moved), atol=1e-6)


def test_biases_that_the_config_does_not_announce_are_dropped(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """Why a route has config keys: without them transformers loads the source, with a notice."""
    out, _ = with_biases(checkpoints(), tmp_path / "out", lambda layer: torch.ones(HIDDEN))
    shutil.copy(checkpoints() / "config.json", out)
    with pytest.raises(AssertionError, match=r"_proj\.bias"):
        loaded(out, "llama")
    with torch.no_grad():
        assert torch.equal(load(out)(IDS).logits, load(checkpoints())(IDS).logits)


def test_routes_are_those_that_are_tried_here() -> None:
    kinds = {*TINY_MODELS, *OTHER_LAYOUTS}
    known = {kind for kind in kinds if architecture_of(kind).bias_routes}
    assert known == ROUTES.keys() | {"gpt_neox", "gpt_oss"}  # whose config says that they have them


@pytest.mark.parametrize("kind", sorted(TINY_MODELS))
def test_a_model_has_biases_or_a_route_to_them_or_none(kind: str, checkpoints: Checkpoints) -> None:
    plan = planned(checkpoints(kind))
    route = plan.bias_route("o_proj")
    assert (route is None) == (kind not in ROUTES.keys() | BIASED | {"gptj"})
    if kind in BIASED | {"gptj"}:
        assert route is not None
        assert (route.config, route.created) == ({}, {})
        biases = plan.biases("o_proj" if kind in BIASED else "down_proj")
        assert list(route.biases.values()) == [b.info.name for b in biases]


def test_a_bias_of_the_ffn_acts_as_one_of_attention_only_where_they_stand_side_by_side(
    checkpoints: Checkpoints,
) -> None:
    """Not in a Llama with biases of the FFN, which reads what attention gives; nor in Cohere, which
    stands side by side without biases."""
    kinds = {kind: architecture_of(kind).kinds for kind in TINY_MODELS}
    parallel = {kind for kind, layers in kinds.items() if all(each.parallel for each in layers)}
    assert parallel == {"falcon", "gpt_neox", "gptj", "phi"}
    plan = planned(checkpoints("gptj"))
    cut = {
        shard: dataclasses.replace(
            header, tensors={n: t for n, t in header.tensors.items() if n != LAST_BIAS}
        )
        for shard, header in plan.headers.items()
    }
    config = json.loads((checkpoints("gptj") / "config.json").read_text())
    assert make_plan(config, None, cut).bias_route("o_proj") is None


def test_attention_writes_into_the_stream_unless_a_norm_comes_between() -> None:
    kinds = {*TINY_MODELS, *OTHER_LAYOUTS}
    behind = {kind for kind in kinds if not all(k.o_writes for k in architecture_of(kind).kinds)}
    assert behind == NORM_AFTER | {"opt-350m"}  # whose norms come after both


def test_a_checkpoint_with_some_of_the_biases_has_no_route(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """Neither with those of some layers, nor with those of q_proj, which would come alive."""
    out, whole = with_biases(checkpoints(), tmp_path / "out", lambda layer: torch.ones(HIDDEN))
    route = whole.bias_route("o_proj")
    assert route is not None
    header = read_header(out / "model-biases.safetensors")
    for kept in ("layers.3.self_attn.o_proj.bias", "layers.3.self_attn.q_proj.bias"):
        entries = {n: info for n, info in header.tensors.items() if kept in n}
        assert len(entries) == 1
        some = dataclasses.replace(header, tensors=entries)
        plan = make_plan(CONFIG, None, {**whole.headers, "some": some})
        assert plan.bias_route("o_proj") is None
