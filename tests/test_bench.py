"""The checkpoints that benches are run on are what they say."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from tests.bench.job import Took, job, rows
from tests.bench.synthetic import Llama, shard_limit, write_llama
from tests.builders.models import Checkpoints, planned, tiny_recipe

TINY = Llama(layers=12, hidden=32, ffn=128, vocabulary=300, heads=4, kv_heads=2)


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_transformers_loads_a_synthetic_model_and_saves_it_in_as_many_shards(
    tmp_path: Path, shards: int
) -> None:
    write_llama(tmp_path, TINY, shard_limit(TINY, shards))
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) == shards
    load: Any = LlamaForCausalLM.from_pretrained
    model, said = load(tmp_path, dtype=torch.bfloat16, output_loading_info=True)
    assert not any(said.values())
    assert sum(p.nbytes for p in model.parameters()) == TINY.nbytes
    model.save_pretrained(tmp_path / "out", max_shard_size=shard_limit(TINY, shards, by_name=True))
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == files
    assert AutoTokenizer.from_pretrained(tmp_path)("some text")["input_ids"]


@pytest.mark.parametrize("tied", [False, True])
def test_a_synthetic_model_is_planned(tmp_path: Path, tied: bool) -> None:
    model = replace(TINY, tied=tied)
    write_llama(tmp_path, model, shard_limit(model, 2))
    _, plan = planned(tmp_path)
    assert len(plan.targets) == TINY.layers
    tensors = (info for header in plan.headers.values() for info in header.tensors.values())
    assert sum(info.nbytes for info in tensors) == model.nbytes


@pytest.mark.parametrize("gigabytes", [0.5, 1, 4, 8, 40])
def test_a_size_is_met_to_half_a_layer(gigabytes: float) -> None:
    model = Llama.of_bytes(gigabytes * 1e9)
    assert abs(model.nbytes - gigabytes * 1e9) < 0.51 * 134.3e6


def test_the_stages_of_a_job_are_all_that_it_took(checkpoints: Checkpoints, tmp_path: Path) -> None:
    source = checkpoints("llama")
    recipe = {
        name: getattr(tiny_recipe(source), name)
        for name in ("num_pairs", "method", "options", "guard", "prompts")
    }
    took = job(str(source), recipe, str(tmp_path / "out"))
    assert {"import", "plan", "activations", "fit", "edit", "verify", "other"} <= took.stages.keys()
    assert sum(took.stages.values()) == pytest.approx(took.cpu)
    assert all(seconds >= 0 for seconds in took.stages.values()), took.stages
    assert took.said.startswith("strength ")
    one = Took(took.cpu / 2, took.wall)
    assert rows([took], [one])["whole job"] == 2
