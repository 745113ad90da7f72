"""Other engines and lm-eval on outputs of tiny models: `make consumers`."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer

import converter
from converter.evaluation.benchmarks import run_tasks
from tests.builders.models import METHOD, TINY, load
from tests.consumers.__main__ import difference
from tests.consumers.readers import READERS, transformers

Checkpoints = Callable[..., Path]

TEXTS = ["the cat sat on the mat", "a dog and a cat went home"]
PROMPTS = torch.randint(2, 300, (3, 20), generator=torch.Generator().manual_seed(0)).tolist()


pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning",  # asked for by peft and by torch.jit.trace
    "ignore:`torch.jit.trace:DeprecationWarning",
    "ignore::torch.jit.TracerWarning",
)


def loud(source: Path, folder: Path) -> Path:
    """The same model with FFNs that matter, so that the edit moves what it says."""
    model = load(source)
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data *= 100
    model.save_pretrained(folder, max_shard_size="60KB")
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def written(source: Path, out: Path, output: str = "checkpoint") -> Path:
    run: dict[str, Any] = {"method": METHOD, "options": TINY, "num_pairs": 32, "guard": False}
    converter.convert(converter.Recipe(source=str(source), output=output, **run), out)
    return out


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("reader", ["ctranslate2", "openvino"])
def test_an_engine_computes_what_transformers_does(
    reader: str, kind: str, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    source = loud(checkpoints(kind), tmp_path / "source")
    out = written(source, tmp_path / "out")
    expected = transformers(out, None, PROMPTS)
    assert difference(READERS[reader](out, None, PROMPTS), expected) < 1e-4
    assert difference(transformers(source, None, PROMPTS), expected) > 1e-2


@pytest.fixture
def task(tmp_path: Path) -> dict[str, Any]:
    """A task of lm-eval on texts in a local file."""
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return {
        "task": "local", "dataset_path": "json", "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(file)}, "cache_dir": str(tmp_path / "data")},
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    }  # fmt: skip


def bits_per_byte(folder: Path, adapter: Path | None = None) -> float:
    """Of the texts, each after the token that lm-eval puts before it."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [[tokenizer.bos_token_id, *tokenizer(text)["input_ids"]] for text in TEXTS]
    found = transformers(folder, adapter, prompts)
    nats = sum(-p[np.arange(len(i) - 1), i[1:]].sum() for p, i in zip(found, prompts, strict=True))
    return float(nats / math.log(2) / sum(len(text.encode()) for text in TEXTS))


@pytest.mark.parametrize("output", ["checkpoint", "adapter"])
def test_lm_eval_scores_the_folder_as_transformers_does(
    output: str, checkpoints: Checkpoints, task: dict[str, Any], tmp_path: Path
) -> None:
    source = loud(checkpoints("llama"), tmp_path / "source")
    out = written(source, tmp_path / "out", output)
    folder, adapter = (out, None) if output == "checkpoint" else (source, out)
    paths = {"pretrained": str(folder), "peft": adapter and str(adapter)}
    model = HFLM(**paths, dtype="float32", device="cpu")
    found = lm_eval.simple_evaluate(model=model, tasks=[task], log_samples=False)
    expected = bits_per_byte(folder, adapter)
    assert found["results"]["local"]["bits_per_byte,none"] == pytest.approx(expected, rel=1e-5)
    assert abs(bits_per_byte(source) - expected) > 5e-4


def test_run_tasks_is_what_the_harness_expects(
    checkpoints: Checkpoints, task: dict[str, Any]
) -> None:
    source = checkpoints("llama")
    tasks: Any = [task]
    found = run_tasks(load(source), AutoTokenizer.from_pretrained(source), tasks, None, 2)
    assert found["local"]["bits_per_byte"] == pytest.approx(bits_per_byte(source), rel=1e-5)
