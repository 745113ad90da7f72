"""Plans from headers: what is found, and what is refused before anything is read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result

from converter.architecture import architectures, find_architecture, parse_architecture
from converter.errors import CheckpointError
from converter.header import Header, TensorInfo, read_header
from converter.plan import Plan, make_plan
from tests.conftest import FFN, HIDDEN, LAYERS, TINY_MODELS

Checkpoints = Callable[..., Path]


def parts(folder: Path) -> tuple[dict[str, Any], dict[str, str], dict[str, Header]]:
    config = json.loads((folder / "config.json").read_text())
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    return (
        config,
        weight_map,
        {n: read_header(folder / n) for n in sorted(set(weight_map.values()))},
    )


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "gpt2"])
def test_every_layer_has_its_down_projection(kind: str, checkpoints: Checkpoints) -> None:
    plan = make_plan(*parts(checkpoints(kind)))
    weights = [t for t in plan.targets if t.role == "down_proj"]
    assert [t.layer for t in weights] == list(range(LAYERS))
    for target in weights:
        assert target.info.shape[target.axis] == HIDDEN
        assert target.info.shape[1 - target.axis] == FFN
    biases = [t for t in plan.targets if t.role == "down_proj_bias"]
    assert len(biases) == (LAYERS if kind in ("llama", "gpt2") else 0)
    assert set(plan.vocabulary) == {"embedding", "unembedding", "final_norm"}
    assert plan.select([1, 3], bias=False) == tuple(t for t in weights if t.layer in (1, 3))


def test_gpt2_without_its_prefix_is_found_too(checkpoints: Checkpoints) -> None:
    config, _, headers = parts(checkpoints("gpt2"))
    bare = {}
    for shard, header in headers.items():
        tensors = {
            name.removeprefix("transformer."): TensorInfo(
                name.removeprefix("transformer."), t.dtype, t.shape, t.start, t.end
            )
            for name, t in header.tensors.items()
        }
        bare[shard] = Header(header.data_start, header.size, tensors)
    plan = make_plan(config, None, bare)
    assert plan.targets[0].info.name == "h.0.mlp.c_proj.weight"
    assert len(plan.targets) == 2 * LAYERS


def test_an_unknown_model_type_says_how_to_add_it() -> None:
    with pytest.raises(CheckpointError, match=r"found 'nonesuch'; to add a model, see README"):
        find_architecture({"model_type": "nonesuch"})


def test_architecture_files_with_unknown_keys_are_refused() -> None:
    path = Path(__file__).parents[1] / "converter/architectures/llama.toml"
    text = path.read_text()
    assert parse_architecture(text, "x").model_type == "llama"
    for wrong in ("extra = 1\n" + text, text.replace("weight =", "wieght =")):
        with pytest.raises(ValueError, match="unknown or missing keys"):
            parse_architecture(wrong, "x")
    with pytest.raises(ValueError, match="like 'nothing', of which there is no file"):
        parse_architecture('title = "A"\nmodel_type = "a"\nlike = "nothing"\n', "x")
    with pytest.raises(ValueError, match=r"missing keys .'model_type'"):
        parse_architecture('title = "A"\nlike = "gpt2"\n', "x")


def test_every_architecture_has_a_tiny_model_and_a_file_of_its_name() -> None:
    folder = Path(__file__).parents[1] / "converter/architectures"
    assert {path.stem for path in folder.glob("*.toml")} == set(architectures()) == set(TINY_MODELS)


def test_the_readme_has_the_table_that_the_command_prints(cli: Callable[..., Result]) -> None:
    table = cli("architectures").stdout
    assert all(f"| `{name}` |" in table for name in TINY_MODELS)
    assert table in (Path(__file__).parents[1] / "README.md").read_text()


def test_a_quantized_checkpoint_is_refused_by_the_name_of_its_scheme(
    checkpoints: Checkpoints,
) -> None:
    config, weight_map, headers = parts(checkpoints())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(CheckpointError, match="scheme gptq"):
        make_plan(config, weight_map, headers)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_hidden_layers": LAYERS - 1}, "has fewer layers than the checkpoint"),
        ({"num_hidden_layers": LAYERS + 1}, f"layer {LAYERS} is missing"),
        ({"intermediate_size": FFN + 1}, "contradicts config.json: expected shape"),
        ({"hidden_size": None}, "hidden_size: expected a positive integer, found None"),
        ({"hidden_size": True}, "found True"),
        ({"num_hidden_layers": "6"}, "found '6'"),
    ],
)
def test_a_config_that_lies_is_refused(
    change: dict[str, Any], says: str, checkpoints: Checkpoints
) -> None:
    config, weight_map, headers = parts(checkpoints())
    with pytest.raises(CheckpointError, match=says):
        make_plan({**config, **change}, weight_map, headers)


def test_an_index_that_contradicts_the_files_is_refused(checkpoints: Checkpoints) -> None:
    config, weight_map, headers = parts(checkpoints())
    with pytest.raises(CheckpointError, match=r"names tensor ghost: .* found it in no file"):
        make_plan(config, {**weight_map, "ghost": "model.safetensors"}, headers)
    name = next(iter(weight_map))
    other = next(s for s in headers if s != weight_map[name])
    with pytest.raises(CheckpointError, match="misplaces tensor"):
        make_plan(config, {**weight_map, name: other}, headers)
    twice = dict(headers)
    twice["copy.safetensors"] = headers[weight_map[name]]
    with pytest.raises(CheckpointError, match="is in two files"):
        make_plan(config, weight_map, twice)


def test_a_packed_dtype_is_refused(checkpoints: Checkpoints) -> None:
    config, weight_map, headers = parts(checkpoints())
    plan: Plan = make_plan(config, weight_map, headers)
    target = plan.targets[0]
    packed = TensorInfo(target.info.name, "F8_E4M3", target.info.shape, 0, 1)
    headers[target.shard].tensors[packed.name] = packed
    with pytest.raises(CheckpointError, match=r"cannot be edited: .* found F8_E4M3"):
        make_plan(config, weight_map, headers)


def test_sizes_count_every_byte(checkpoints: Checkpoints) -> None:
    folder = checkpoints("llama", torch.bfloat16)
    plan = make_plan(*parts(folder))
    assert plan.nbytes == sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    assert plan.num_parameters * 2 == sum(
        t.nbytes for h in plan.headers.values() for t in h.tensors.values()
    )
