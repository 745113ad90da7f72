"""Plans from headers: what is found, and what is refused before anything is read."""

import dataclasses
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch

from converter.checkpoints.architectures.architecture import Role
from converter.checkpoints.architectures.find import find_architecture
from converter.checkpoints.plan import Plan, make_plan
from converter.checkpoints.safetensors.header import Header, read_header
from converter.checkpoints.weights import Weight
from converter.errors import CheckpointError
from tests.builders.errors import refused
from tests.builders.models import (
    HIDDEN,
    LAYERS,
    MIXTURES,
    NORM_AFTER,
    OTHER_LAYOUTS,
    TINY_MODELS,
    Checkpoints,
    architecture_of,
    load,
    planned,
)


def parts(folder: Path) -> tuple[dict[str, Any], dict[str, str], dict[str, Header]]:
    config = json.loads((folder / "config.json").read_text())
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    return (
        config,
        weight_map,
        {n: read_header(folder / n) for n in sorted(set(weight_map.values()))},
    )


def renamed(headers: dict[str, Header], rename: Callable[[str], str]) -> dict[str, Header]:
    """The same headers with other names."""
    found = {}
    for shard, header in headers.items():
        entries = [dataclasses.replace(t, name=rename(n)) for n, t in header.tensors.items()]
        found[shard] = dataclasses.replace(header, tensors={t.name: t for t in entries})
    return found


_WRAPPER = {
    "language_model.model.": "model.language_model.", "language_model.lm_head.": "lm_head.",
}  # fmt: skip

OTHERS = {
    **{kind: {"transformer.": ""} for kind in ("falcon", "gpt2", "gpt_bigcode", "gptj")},
    "gpt_neox": {"gpt_neox.": ""},
    "gemma3": _WRAPPER,
    "mistral3": _WRAPPER,
    "qwen2_5_vl": {"model.": "model.language_model."},
    "qwen2_vl": {"model.": "model.language_model."},
}
"""Kind -> beginnings of names as transformers writes them -> others that it reads. Of the kinds
that are not here it is ``model.``, which the checkpoint of a base model lacks."""

VARIANTS = [(kind, OTHERS.get(kind, {"model.": ""})) for kind in TINY_MODELS if kind != "qwen3_vl"]


@pytest.mark.parametrize(("kind", "variant"), VARIANTS)
def test_other_beginnings_of_names_are_found_too(
    kind: str, variant: dict[str, str], checkpoints: Checkpoints
) -> None:
    config, _, headers = parts(checkpoints(kind))
    usual = make_plan(config, None, headers)

    def rename(name: str) -> str:
        for ours, theirs in variant.items():
            if name.startswith(ours):
                return theirs + name.removeprefix(ours)
        return name

    plan = make_plan(config, None, renamed(headers, rename))
    assert [t.info.name for t in plan.targets] == [rename(t.info.name) for t in usual.targets]
    assert set(plan.vocabulary) == set(usual.vocabulary)
    assert plan.targets != usual.targets


COUNTS = {
    "mixtral": dict.fromkeys(range(6), 4),
    "olmoe": dict.fromkeys(range(6), 4),
    "qwen2_moe": {0: 5, 1: 5, 2: 5, 3: 1, 4: 5, 5: 5},  # layer 3 is dense, each other one shared
    "qwen3_moe": {0: 1, 1: 4, 2: 1, 3: 4, 4: 1, 5: 4},  # every second layer
    "deepseek_v2": {0: 1, 1: 1, 2: 1, 3: 5, 4: 5, 5: 5},  # dense up to layer 2
    "deepseek_v3": {0: 1, 1: 1, 2: 1, 3: 5, 4: 5, 5: 5},
    "gpt_oss": dict.fromkeys(range(6), 1),  # all experts in one tensor
    "granitemoe": dict.fromkeys(range(6), 1),
}


@pytest.mark.parametrize("kind", sorted(COUNTS))
def test_every_expert_of_every_layer_is_a_target(kind: str, checkpoints: Checkpoints) -> None:
    """And as many as the config implies: the plan is checked against the model itself."""
    plan = make_plan(*parts(checkpoints(kind)))
    weights = plan.weights("down_proj")
    assert Counter(t.layer for t in weights) == COUNTS[kind]
    for target in weights:
        assert target.info.shape[target.axis] == HIDDEN
    written = sum(prod(t.info.shape) for t in weights)
    model: Any = load(checkpoints(kind))
    in_memory = sum(
        p.numel()
        for name, p in model.named_parameters()
        if re.search(r"(mlp|moe)\..*down_proj", name) and "bias" not in name
    )
    assert written == in_memory


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("mixtral", "model.layers.4.block_sparse_moe.experts.2.w2.weight"),
        ("qwen2_moe", "model.layers.1.mlp.shared_expert.down_proj.weight"),
        ("deepseek_v3", "model.layers.5.mlp.experts.3.down_proj.weight"),
        ("gpt_oss", "model.layers.0.mlp.experts.down_proj"),
    ],
)
def test_an_expert_of_another_name_is_missed(
    kind: str, name: str, checkpoints: Checkpoints
) -> None:
    config, _, headers = parts(checkpoints(kind))
    other = renamed(headers, lambda n: n.replace("experts.", "expert_") if n == name else n)
    other = renamed(other, lambda n: n.replace("expert.", "experte.") if n == name else n)
    with refused(CheckpointError, what=f"tensor {name} is missing"):
        make_plan(config, None, other)


@pytest.mark.parametrize(
    ("kind", "change", "fields"),
    [
        (
            "mixtral", {"num_local_experts": 3},
            {"expected": "no tensor model.layers.0.block_sparse_moe.experts.3.w2.weight with ..."},
        ),
        (
            "qwen2_moe", {"shared_expert_intermediate_size": 24},
            {"what": "tensor model.layers.0.mlp.shared_expert.down_proj.weight contradicts ...",
             "expected": "shape [32, 24]", "found": "[32, 40]"},
        ),
        (
            "qwen3_moe", {"decoder_sparse_step": 1},
            {"what": "tensor model.layers.0.mlp.experts.0.down_proj.weight is missing"},
        ),
        (
            "deepseek_v2", {"first_k_dense_replace": 2},
            {"what": "tensor model.layers.2.mlp.experts.0.down_proj.weight is missing"},
        ),
        (
            "qwen2_moe", {"mlp_only_layers": 3},
            {"what": "config.json is not what transformers expects of 'qwen2_moe'",
             "found": "...'mlp_only_layers'..."},
        ),
        (
            "qwen2_moe", {"num_experts": None},
            {"what": "config.json is not what transformers expects of 'qwen2_moe'",
             "found": "...'num_experts'..."},
        ),
    ],
)  # fmt: skip
def test_a_config_that_implies_other_experts_is_refused(
    kind: str, change: dict[str, Any], fields: dict[str, str], checkpoints: Checkpoints
) -> None:
    config, weight_map, headers = parts(checkpoints(kind))
    with refused(CheckpointError, **fields):
        make_plan({**config, **change}, weight_map, headers)


@pytest.mark.filterwarnings("ignore:Initializing zero-element:UserWarning")
def test_shared_experts_that_the_config_has_without_elements_are_refused(
    checkpoints: Checkpoints,
) -> None:
    config, weight_map, headers = parts(checkpoints("qwen2_moe"))
    with refused(
        CheckpointError, what="tensor ...shared_expert.down_proj.weight contradicts config.json",
        expected="shape [32, 0]", found="[32, 40]",
    ):  # fmt: skip
        make_plan({**config, "shared_expert_intermediate_size": 0}, weight_map, headers)


def test_a_weight_by_two_names_is_refused(checkpoints: Checkpoints) -> None:
    """transformers would load the one without "model.", and the other would be edited."""
    config, weight_map, headers = parts(checkpoints("llama"))
    name = "model.layers.2.mlp.down_proj.weight"
    header = headers[weight_map[name]]
    other = dataclasses.replace(header.tensors[name], name=name.removeprefix("model."))
    changed = dataclasses.replace(header, tensors={**header.tensors, other.name: other})
    with refused(
        CheckpointError, what=f"the checkpoint has a weight by two names, {other.name} and {name}"
    ):
        make_plan(config, None, {**headers, weight_map[name]: changed})


def test_layers_are_counted_before_a_model_is_built(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    folder = shutil.copytree(checkpoints("qwen3_moe"), tmp_path / "source")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 10**10}))
    with refused(CheckpointError, expected="layers or experts, at most 10,000"):
        planned(folder)


def test_names_with_endless_numbers_are_no_layers(checkpoints: Checkpoints) -> None:
    config, _, headers = parts(checkpoints())
    name = f"model.layers.{'9' * 5000}.mlp.down_proj.weight"
    other = renamed(headers, lambda n: n.replace("model.layers.0.self_attn.q_proj.weight", name))
    assert len(make_plan(config, None, other).targets) == 2 * LAYERS


def test_layers_for_speculative_decoding_are_left_alone(checkpoints: Checkpoints) -> None:
    config, weight_map, headers = parts(checkpoints("deepseek_v3"))
    config = {**config, "num_hidden_layers": LAYERS - 1}
    config.pop("num_mtp_layers", None)
    with refused(CheckpointError, what="... that config.json does not imply"):
        make_plan({**config, "num_nextn_predict_layers": 0}, weight_map, headers)
    plan = make_plan({**config, "num_nextn_predict_layers": 1}, weight_map, headers)
    assert {t.layer for t in plan.targets} == set(range(LAYERS - 1))


def test_embeddings_of_another_width_are_not_decoded(checkpoints: Checkpoints) -> None:
    """As in OPT-350m: its embeddings are projected to the hidden size, and only then."""
    config, weight_map, headers = parts(checkpoints("opt"))
    entries = {
        shard: dataclasses.replace(
            header,
            tensors={
                n: dataclasses.replace(t, shape=(t.shape[0], 16)) if "embed_tokens" in n else t
                for n, t in header.tensors.items()
            },
        )
        for shard, header in headers.items()
    }
    with refused(CheckpointError, expected="a last axis of 32"):
        make_plan(config, weight_map, entries)
    plan = make_plan({**config, "word_embed_proj_dim": 16}, weight_map, entries)
    assert plan.vocabulary == {}
    assert len(plan.targets) == 2 * LAYERS


WRITTEN: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parent / "data/written_architectures.json").read_text()
)
"""What people had written of each tiny model, before there was inference: by role its weights, each
with its output axis, module and rows; names of biases; and the names of the rest."""


def template(name: str) -> str:
    """A name with ``{layer}`` for its first number and ``{expert}`` for another."""
    first = re.sub(r"\.\d+(?=\.|$)", ".{layer}", name, count=1)
    return re.sub(r"\.\d+(?=\.|$)", ".{expert}", first)


def described(weight: Weight) -> list[Any]:
    """A weight as ``WRITTEN`` has it."""
    known = [template(weight.info.name), weight.axis, template(weight.module)]
    return known if weight.rows is None else [*known, [weight.rows.start, len(weight.rows)]]


def distinct(plan: Plan, role: Role, layers: Any = None) -> list[list[Any]]:
    """The weights of a role, those that differ in more than numbers."""
    found: list[list[Any]] = []
    for weight in map(described, plan.weights(role, layers)):
        if weight not in found:
            found.append(weight)
    return found


@pytest.mark.parametrize("kind", [*TINY_MODELS, *OTHER_LAYOUTS])
def test_inference_gives_what_the_hand_written_files_said(
    kind: str, checkpoints: Checkpoints
) -> None:
    """It says more of the dense layers of a mixture: that they are no mixture."""
    said = WRITTEN[kind]
    plan = make_plan(*parts(checkpoints(kind)))
    architecture, layers = plan.architecture, range(LAYERS)
    dense = [n for n in layers if n not in plan.dimensions.sparse_layers]
    sparse = [n for n in layers if n in plan.dimensions.sparse_layers]
    assert bool(sparse) == (kind in MIXTURES)
    finer = {"gate_proj", "up_proj"} if sparse and dense else set()
    assert set(plan.roles) == {role for role in ROLES if role in said} | finer
    for role in plan.roles:
        if role in finer:
            continue
        found = distinct(plan, role)
        if finer and role == "down_proj":
            name = "model.layers.{layer}.mlp.down_proj"
            assert distinct(plan, role, dense) == [[f"{name}.weight", 0, name]]
            found = [[w, axis, said["site"] if m == name else m] for w, axis, m in found]
        assert found == said[role]
        biases = sorted({template(bias.info.name) for bias in plan.biases(role)})
        assert biases == said.get(f"{role}_bias", [])
    assert len(plan.weights("down_proj")) == said["targets"]
    assert {architecture.sites(n) for n in layers} == {
        (said["site"].format(layer=n),) for n in layers
    }
    assert (architecture.block, architecture.auto_class) == (said["block"], said["auto_class"])
    vocabulary = {role: info.name for role, (_, info) in plan.vocabulary.items()}
    assert vocabulary == {role: said[role] for role in VOCABULARY if role in said}
    assert sorted({template(info.name) for _, info in plan.post_norms.values()}) == said["norms"]
    assert {plan.norm_offset(n) for n in plan.post_norms} <= {said["offset"]}
    assert architecture.norm_offset == said["offset"]


ROLES: tuple[Role, ...] = ("down_proj", "gate_proj", "up_proj", "o_proj", "lm_head")
VOCABULARY = ("embedding", "unembedding", "final_norm")


@pytest.mark.parametrize("kind", sorted(TINY_MODELS))
def test_every_name_of_the_vocabulary_is_that_of_a_tensor(
    kind: str, checkpoints: Checkpoints
) -> None:
    config, weight_map, headers = parts(checkpoints(kind))
    architecture = architecture_of(kind)
    plan = make_plan(config, weight_map, headers)
    final = {"final_norm"} if architecture.final_norm else set()
    assert set(plan.vocabulary) == {"embedding", "unembedding"} | final
    names = {info.name for _, info in plan.vocabulary.values()}
    untied = {architecture.unembedding} & set(weight_map)
    assert names == {architecture.embedding, *untied} | ({architecture.final_norm} - {""})
    assert len(plan.post_norms) == (LAYERS if kind in NORM_AFTER else 0)


@pytest.mark.parametrize("kind", sorted(TINY_MODELS))
def test_what_the_ffn_module_gives_is_what_the_layer_adds(
    kind: str, checkpoints: Checkpoints
) -> None:
    """A vector added to one moves the residual stream by a multiple of it, the same everywhere."""
    architecture, model = architecture_of(kind), load(checkpoints(kind))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 300, (2, 9), generator=generator)
    d = torch.randn(HIDDEN, generator=generator)

    def run(size: float) -> torch.Tensor:
        seen: list[torch.Tensor] = []

        def add(module: Any, args: Any, output: Any) -> Any:
            f, *rest = output if isinstance(output, tuple) else (output,)
            return (f + size * d, *rest) if rest else f + size * d

        def keep(module: Any, args: Any, output: Any) -> None:
            seen.append(output[0] if isinstance(output, tuple) else output)

        hooks = [(architecture.sites(3)[0], add), (architecture.block.format(layer=3), keep)]
        handles = [model.get_submodule(name).register_forward_hook(hook) for name, hook in hooks]
        with torch.no_grad():
            model(ids)
        for handle in handles:
            handle.remove()
        return seen[0].flatten(0, -2)

    moved = run(1.0) - run(0.0)
    factor = (moved @ d) / (d @ d)
    assert torch.allclose(moved, factor.mean() * d, atol=1e-5)
    assert factor.mean() > 0.1


def test_an_unknown_model_type_is_refused_by_name() -> None:
    with refused(
        CheckpointError, what="config.json: model_type", found="'nonesuch'",
        hint="upgrade transformers, or check the name",
    ):  # fmt: skip
        find_architecture({"model_type": "nonesuch"})


@pytest.mark.parametrize("kind", [*TINY_MODELS, *OTHER_LAYOUTS])
def test_no_tiny_model_needs_a_data_file_and_each_is_proved(kind: str) -> None:
    proof = architecture_of(kind).proof
    assert proof is not None
    assert proof.described_by == "inference"
    assert proof.layers > 0
    assert proof.tensors > 0


def test_what_people_had_written_has_a_line_for_each_tiny_model() -> None:
    assert list(WRITTEN) == sorted({*TINY_MODELS, *OTHER_LAYOUTS})


def test_a_tensor_in_two_files_is_refused(checkpoints: Checkpoints) -> None:
    config, weight_map, headers = parts(checkpoints())
    name = next(iter(weight_map))
    twice = headers | {"copy.safetensors": headers[weight_map[name]]}
    with refused(
        CheckpointError, what=f"tensor {name} is in two files",
        expected=f"it in {weight_map[name]} only, as the index says",
        found="another copy in copy.safetensors", hint="delete the tensor from copy.safetensors...",
    ):  # fmt: skip
        make_plan(config, weight_map, twice)
    with refused(CheckpointError, expected="it in one of them"):
        make_plan(config, None, twice)


def test_sizes_count_every_byte(checkpoints: Checkpoints) -> None:
    folder = checkpoints("llama", torch.bfloat16)
    plan = make_plan(*parts(folder))
    assert plan.nbytes == sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    assert plan.num_parameters * 2 == sum(
        t.nbytes for h in plan.headers.values() for t in h.tensors.values()
    )
