"""What bad input gets: one sentence, the documented exit code, and nothing left behind."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from converter.methods import gloss_paper
from converter.methods.known import METHODS
from tests.builders.invoke import Cli
from tests.builders.models import TINY_ARGS, Checkpoints, tiny_args
from tests.test_convert import UNPROTECTED, save_planted

Damage = Callable[[Path], object]

INDEX = "model.safetensors.index.json"


@pytest.fixture
def source(checkpoints: Checkpoints, tmp_path: Path) -> Path:
    return shutil.copytree(checkpoints("llama"), tmp_path / "source")


@pytest.fixture
def refused(cli: Cli, tmp_path: Path) -> Callable[..., str]:
    """Convert, expect an exit code, and check that the refusal is one clean sentence."""

    def convert(source: object, code: int, *args: object, **options: object) -> str:
        before, kept = sorted(tmp_path.rglob("*")), tmp_path / ".out.part"
        result = cli("convert", source, tmp_path / "out", *tiny_args(**options), *args, code=code)
        errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        assert kept.exists() == ("finished shards kept in .out.part" in errors[0])
        if kept.exists() and kept not in before:
            shutil.rmtree(kept)
        assert sorted(tmp_path.rglob("*")) == before  # nothing else is left behind
        return errors[0]

    return convert


def weight_map(source: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((source / INDEX).read_text())["weight_map"]
    return found


def edit_tensor(source: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    shard = source / weight_map(source)[name]
    tensors = load_file(shard)
    save_file({**tensors, name: change(tensors[name])}, shard, {"format": "pt"})


DOWN = "model.layers.3.mlp.down_proj.weight"


def test_sources_that_cannot_be_reached(
    refused: Callable[..., str], source: Path, tmp_path: Path
) -> None:
    assert "/nowhere/at/all does not exist" in refused("/nowhere/at/all", 3)
    assert "is a file: expected a folder" in refused(source / "config.json", 3)
    elsewhere = "https://elsewhere.org/someone/model"
    assert "found the server elsewhere.org; download the model" in refused(elsewhere, 3)
    assert "SOURCE is empty" in refused("", 3)
    # HF_HUB_OFFLINE is set for all tests
    says = refused("someone/model", 3)
    assert "model someone/model is not in the local cache and the Hub cannot be asked" in says


def remove(pattern: str) -> Damage:
    def damage(source: Path) -> None:
        for path in source.glob(pattern):
            path.unlink()

    return damage


def another_format(source: Path) -> None:
    remove("*.safetensors*")(source)
    (source / "consolidated.00.pth").touch()


def twice(source: Path) -> None:
    """A tensor is in two files."""
    found = weight_map(source)
    other = source / next(shard for shard in found.values() if shard != found[DOWN])
    extra = load_file(source / found[DOWN])[DOWN]
    save_file({**load_file(other), DOWN: extra}, other, {"format": "pt"})


QUERY = "model.layers.0.self_attn.q_proj.weight"


def lacking(source: Path) -> None:
    """A tensor that the edit does not need is in no file, and the index knows it."""
    index = json.loads((source / INDEX).read_text())
    shard = source / index["weight_map"].pop(QUERY)
    (source / INDEX).write_text(json.dumps(index))
    tensors = load_file(shard)
    del tensors[QUERY]
    save_file(tensors, shard, {"format": "pt"})


def narrower(source: Path) -> None:
    edit_tensor(source, "lm_head.weight", lambda t: t[:, :-1].contiguous())


def spoiled(source: Path) -> None:
    edit_tensor(source, "model.layers.0.input_layernorm.weight", lambda t: t * float("nan"))


DAMAGES: dict[str, tuple[Damage, int, str]] = {
    "no weights": (remove("*.safetensors*"), 4, "expected model.safetensors, model.safe"),
    "weights of another format": (another_format, 4, "found consolidated.00.pth"),
    "no tokenizer": (remove("tokenizer*"), 4, "has no tokenizer"),
    "a broken tokenizer": (
        lambda source: (source / "tokenizer.json").write_text("{broken"), 3,
        "transformers cannot load the tokenizer",
    ),
    "a tensor in two files": (twice, 4, f"tensor {DOWN} is in two files"),
    "a tensor in none": (
        lacking, 4, f"lacks 1 tensors that the model needs: found no {QUERY}",
    ),
    "a vocabulary of another width": (
        narrower, 4, "tensor lm_head.weight (unembedding) contradicts",
    ),
    "NaN in the forward pass": (spoiled, 5, "the model gives NaN or Inf"),
}  # fmt: skip
"""What no plan finds, or no row of ``builders/hostile.py`` has: all of those are planned only."""


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_source_is_named(case: str, refused: Callable[..., str], source: Path) -> None:
    damage, code, says = DAMAGES[case]
    damage(source)
    assert says in refused(source, code)


def test_nan_in_an_edited_weight(refused: Callable[..., str], source: Path) -> None:
    edit_tensor(source, DOWN, lambda t: t / 0)
    seen = source.parent / "seen.safetensors"
    save_planted(seen)
    says = refused(source, 4, "--activations", seen, **UNPROTECTED)
    assert f"tensor {DOWN} of model-0000" in says
    assert "holds NaN or Inf" in says


def test_paths_that_no_system_accepts(refused: Callable[..., str], source: Path) -> None:
    assert "cannot be read: found File name too long" in refused("x" * 5000, 3)
    assert "is a folder: expected a file" in refused(source, 5, "--pairs", source)


def test_pairs_that_are_malformed_or_too_few(refused: Callable[..., str], source: Path) -> None:
    pairs = source.parent / "p.tsv"
    pairs.write_text("toxic\tneutral\nthe damn x\tthe x\nthe y\t\n")
    says = refused(source, 5, "--pairs", pairs)
    assert "expected at least 16 usable pairs, found 1, skipped: 1 empty (row 3)" in says
    pairs.write_text("left\tright\n")
    assert "columns toxic and neutral" in refused(source, 5, "--pairs", pairs)
    assert "nowhere.tsv does not exist" in refused(source, 5, "--pairs", "nowhere.tsv")
    pairs.write_text("two words")
    assert "is too short: expected at least 100 words" in refused(source, 5, "--neutral", pairs)
    assert "neutral text nowhere" in refused(source, 5, "--neutral", "nowhere")
    assert "word list nowhere" in refused(source, 5, "--word-list", "nowhere")


def test_fits_that_cannot_be(refused: Callable[..., str], source: Path) -> None:
    assert "rank 9 is larger than the candidates allow" in refused(source, 6, rank=9)
    assert "no candidate direction is over" in refused(source, 6, alpha=50)


def test_wrong_options(refused: Callable[..., str], source: Path) -> None:
    assert "-o layers: expected layers from 0 to 5" in refused(source, 2, layers="5-9")
    assert "-o: expected KEY=VALUE, found rank" in refused(source, 2, "-o", "rank")
    assert "-o rank is given twice" in refused(source, 2, "-o", "rank=1", "-o", "rank=2")
    expected = "--seed: expected at least 0 and at most 9223372036854775807, found "
    for seed in (1 << 65, -1):
        assert f"{expected}{seed}" in refused(source, 2, "--seed", seed)
    assert "--num-pairs: expected at least 16, found 3" in refused(source, 2, "--num-pairs", 3)
    assert "--base-model: expected a repo id" in refused(source, 2, "--base-model", "no repo!")
    assert "--device: expected auto, map, cpu" in refused(source, 2, "--device", "tpu")
    methods = " or ".join(METHODS.names())
    assert f"--method: expected {methods}, found magic" in refused(source, 2, "--method", "magic")
    outputs = "adapter or checkpoint, found both"
    assert f"--output: expected {outputs}" in refused(source, 2, "--output", "both")
    for option, value in (("--system", "profs"), ("--scorer", "detoxify"), ("--passages", 2)):
        for more in ((), ("--dry-run",)):
            says = refused(source, 2, option, value, *more)
            assert f"{option} has no effect without --evaluate; add --evaluate" in says


def test_destinations_that_cannot_be(cli: Cli, source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (source / "empty").mkdir()
    for destination, says in (
        (source, "is the source or lies inside it"),
        (source / "empty", "is the source or lies inside it"),
        (source / "new", "is the source or lies inside it"),
        (tmp_path, "contains the input source"),
        (tmp_path / "file", "is a file"),
        (tmp_path / "file" / "below", "is a file|cannot be written"),
        (tmp_path / ("x" * 300), "cannot be reached: found File name too long"),
    ):
        result = cli("convert", source, destination, *TINY_ARGS, code=7)
        assert any(part in result.stderr for part in says.split("|")), result.stderr


def test_the_current_folder_is_not_replaced(
    cli: Cli, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here/below").mkdir(parents=True)
    for folder in ("here", "here/below"):
        monkeypatch.chdir(tmp_path / folder)
        cli("convert", source, tmp_path / "here", *TINY_ARGS, code=7, says="is the current folder")


def test_a_destination_that_was_filled_meanwhile_is_not_replaced(
    cli: Cli, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from converter.entrypoints import convert as pipeline

    def slow(folder: Path, **options: Any) -> list[str]:
        (tmp_path / "out").mkdir()
        (tmp_path / "out/other.txt").write_text("of a faster run")
        return []

    monkeypatch.setattr(pipeline, "verify", slow)
    cli("convert", source, tmp_path / "out", *TINY_ARGS, code=7, says="was filled meanwhile")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["other.txt"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.part", "out", "source"]


def test_a_cache_that_cannot_be_written(refused: Callable[..., str], source: Path) -> None:
    cache = source.parent / "cache"
    cache.write_text("a file where a folder should be")
    says = refused(source, 7, "--cache-dir", cache / "below")
    assert "cannot be written" in says
    assert "give another --cache-dir" in says


def test_a_full_disk_leaves_nothing(
    refused: Callable[..., str], source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite, calls = os.pwrite, []

    def full(file: int, data: memoryview, offset: int) -> int:
        """The disk fills up in the second shard."""
        calls.append(offset)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(file, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    assert "cannot be written: found No space left on device" in refused(source, 7)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("can't start new thread"),
    ],
)
def test_memory_that_runs_out_is_one_sentence(
    refused: Callable[..., str], source: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def out(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(gloss_paper.Method, "fit", out)
    assert "memory ran out; " in refused(source, 3)


def test_an_edit_that_memory_does_not_allow_is_refused_before_the_model_is_run(
    refused: Callable[..., str], source: Path
) -> None:
    says = refused(source, 2, "--memory-limit", "5MB")
    assert "--memory-limit is too small for the edit: expected at least" in says


def test_a_disk_that_is_too_small_is_refused_before_anything(
    refused: Callable[..., str], source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(source)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert "is too small: expected 0.00 GB free" in refused(source, 7)


def test_activations_of_another_model(
    refused: Callable[..., str], cli: Cli, source: Path, tmp_path: Path, checkpoints: Checkpoints
) -> None:
    cache = tmp_path / "cache"
    args = ("--cache-dir", cache, *TINY_ARGS, "--quiet")
    cli("convert", checkpoints("llama"), tmp_path / "first", *args, code=0)
    (seen,) = (cache / "activations").iterdir()
    edit_tensor(source, DOWN, lambda t: t * 1.01)
    says = refused(source, 4, "--activations", seen)
    assert "is not the file that the activations were taken from" in says
    says = refused(source, 5, "--activations", seen, "--num-pairs", 20)
    assert "were taken from other pairs: expected those with sha256" in says
    says = refused(source, 5, "--activations", seen, "-o", "pooling=mean")
    assert "taken with another pooling: expected mean, found predicting" in says
    says = refused(source, 5, "--activations", seen, layers="0-3")
    assert "expected a tensor toxic.0" in says
    seen.write_bytes(seen.read_bytes()[:100])
    assert "cannot be read" in refused(source, 5, "--activations", seen)


def test_errors_are_json_too(cli: Cli, tmp_path: Path) -> None:
    result = cli("convert", "/nowhere", tmp_path / "out", "--json")
    assert json.loads(result.stdout)["exit_code"] == result.exit_code == 3
