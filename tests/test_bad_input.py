"""What bad input gets: one sentence, the documented exit code, and nothing left behind."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file

from converter.methods import gloss_paper
from converter.methods.base import METHODS
from tests.builders.models import TINY_ARGS, tiny_args

Checkpoints = Callable[..., Path]
Cli = Callable[..., Result]
INDEX = "model.safetensors.index.json"


@pytest.fixture
def source(checkpoints: Checkpoints, tmp_path: Path) -> Path:
    return shutil.copytree(checkpoints("llama"), tmp_path / "source")


@pytest.fixture
def refused(cli: Cli, tmp_path: Path) -> Callable[..., str]:
    """Convert, expect an exit code, and check that the refusal is one clean sentence."""

    def convert(source: object, code: int, *args: object, **options: object) -> str:
        before, kept = sorted(tmp_path.rglob("*")), tmp_path / ".out.part"
        result = cli("convert", source, tmp_path / "out", *tiny_args(**options), *args)
        errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert result.exit_code == code, result.stderr
        assert len(errors) == 1
        assert "Traceback" not in result.output + result.stderr
        assert kept.exists() == ("finished shards kept in .out.part" in errors[0])
        if kept.exists() and kept not in before:
            shutil.rmtree(kept)
        assert sorted(tmp_path.rglob("*")) == before  # nothing else is left behind
        return errors[0]

    return convert


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_index(source: Path, change: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((source / INDEX).read_text())
    change(index["weight_map"])
    (source / INDEX).write_text(json.dumps(index))


def edit_tensor(source: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    shard = source / json.loads((source / INDEX).read_text())["weight_map"][name]
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


@pytest.mark.parametrize(
    ("remove", "says"),
    [
        (
            "*.safetensors*",
            "has no weights that can be read: expected model.safetensors, model.safe",
        ),
        ("config.json", "has no config.json"),
        ("tokenizer*", "has no tokenizer"),
        ("model-00002*", "the index names model-00002-of-"),
    ],
)
def test_incomplete_folders(
    remove: str, says: str, refused: Callable[..., str], source: Path
) -> None:
    for path in source.glob(remove):
        path.unlink()
    assert says in refused(source, 4)


def test_shards_without_their_index(refused: Callable[..., str], source: Path) -> None:
    (source / INDEX).unlink()
    assert "has no model.safetensors.index.json" in refused(source, 4)


def test_a_pointer_of_git_lfs(refused: Callable[..., str], source: Path) -> None:
    shard = min(source.glob("*.safetensors"))
    shard.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert f"{shard.name} is a pointer of git-lfs" in refused(source, 4)


def test_another_weight_format_is_named(refused: Callable[..., str], source: Path) -> None:
    for path in source.glob("*.safetensors*"):
        path.unlink()
    (source / "consolidated.00.pth").write_text("")
    assert "found consolidated.00.pth" in refused(source, 4)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m.update(ghost=m[DOWN]), "the index names tensor ghost"),
        (lambda m: m.update({DOWN: "model-00009-of-00009.safetensors"}), "found no such file"),
        (lambda m: m.update({DOWN: "../elsewhere.safetensors"}), "outside the folder"),
        (lambda m: m.update({DOWN: "/etc/passwd"}), "outside the folder"),
        (lambda m: m.update({DOWN: 3}), "outside the folder"),
        (lambda m: m.clear(), "has no weight_map"),
    ],
)
def test_bad_indexes(
    change: Callable[[dict[str, str]], object],
    says: str,
    refused: Callable[..., str],
    source: Path,
) -> None:
    edit_index(source, change)
    assert says in refused(source, 4)


def test_a_tensor_in_two_files(refused: Callable[..., str], source: Path) -> None:
    weight_map = json.loads((source / INDEX).read_text())["weight_map"]
    other = next(shard for shard in weight_map.values() if shard != weight_map[DOWN])
    extra = load_file(source / weight_map[DOWN])[DOWN]
    save_file({**load_file(source / other), DOWN: extra}, source / other, {"format": "pt"})
    assert f"tensor {DOWN} is in two files" in refused(source, 4)


def test_truncated_and_corrupt_shards(refused: Callable[..., str], source: Path) -> None:
    shard = max(source.glob("*.safetensors"))
    raw = shard.read_bytes()
    shard.write_bytes(raw[:-1])
    assert f"{shard.name}: the file is truncated" in refused(source, 4)
    shard.write_bytes(raw[:5])
    assert f"{shard.name} is truncated or not a safetensors file" in refused(source, 4)
    shard.write_bytes(b"\xff" * len(raw))
    assert f"{shard.name} is truncated or not a safetensors file" in refused(source, 4)


def test_a_shape_that_contradicts_the_config(refused: Callable[..., str], source: Path) -> None:
    edit_tensor(source, DOWN, lambda t: t[:, :-1].contiguous())
    assert f"tensor {DOWN} contradicts config.json: expected shape" in refused(source, 4)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_nan_and_inf_in_an_edited_weight(
    value: float, refused: Callable[..., str], source: Path
) -> None:
    def poison(t: torch.Tensor) -> torch.Tensor:
        t[1, 1] = value
        return t

    edit_tensor(source, "model.layers.4.mlp.down_proj.weight", poison)
    x = torch.randn(20, 32)
    save_file(
        {f"{side}.{n}": x + (side == "toxic") * torch.randn(20, 32) for side in ("toxic", "neutral")
         for n in (2, 3, 4)} | {"second_moment": torch.eye(32)},
        source.parent / "seen.safetensors",
    )  # fmt: skip
    says = refused(source, 4, "--activations", source.parent / "seen.safetensors")
    assert "tensor model.layers.4.mlp.down_proj.weight of model-0000" in says
    assert "holds NaN or Inf" in says


def test_nan_in_a_forward_pass(refused: Callable[..., str], source: Path) -> None:
    edit_tensor(source, "model.layers.0.input_layernorm.weight", lambda t: t * float("nan"))
    assert "the model gives NaN or Inf" in refused(source, 5)


def test_a_checkpoint_that_lacks_a_tensor_of_the_model(
    refused: Callable[..., str], source: Path
) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    index = json.loads((source / INDEX).read_text())
    shard = source / index["weight_map"].pop(name)
    (source / INDEX).write_text(json.dumps(index))
    tensors = load_file(shard)
    del tensors[name]
    save_file(tensors, shard, {"format": "pt"})
    assert f"lacks 1 tensors that the model needs: found no {name}" in refused(source, 4)


def test_two_sets_of_weights_in_one_folder(refused: Callable[..., str], source: Path) -> None:
    shutil.copyfile(min(source.glob("*.safetensors")), source / "model.safetensors")
    assert "has two sets of weights" in refused(source, 4)


def test_a_vocabulary_of_another_width(refused: Callable[..., str], source: Path) -> None:
    edit_tensor(source, "lm_head.weight", lambda t: t[:, :-1].contiguous())
    assert "tensor lm_head.weight (unembedding) contradicts" in refused(source, 4)


def test_paths_that_no_system_accepts(refused: Callable[..., str], source: Path) -> None:
    assert "cannot be read: found File name too long" in refused("x" * 5000, 3)
    assert "is a folder: expected a file" in refused(source, 5, "--pairs", source)


def test_a_destination_that_no_system_accepts(cli: Cli, source: Path, tmp_path: Path) -> None:
    result = cli("convert", source, tmp_path / ("x" * 300), *TINY_ARGS)
    assert result.exit_code == 7
    assert "cannot be reached: found File name too long" in result.stderr


def test_quantized_and_unknown_models(refused: Callable[..., str], source: Path) -> None:
    edit_json(source / "config.json", quantization_config={"quant_method": "awq"})
    assert "quantized: expected" in refused(source, 4)
    edit_json(source / "config.json", quantization_config=None, model_type="nonesuch")
    assert "to add a model, see README" in refused(source, 4)
    (source / "config.json").write_text("{broken")
    assert "config.json cannot be read" in refused(source, 4)


def test_a_tokenizer_that_does_not_load(refused: Callable[..., str], source: Path) -> None:
    (source / "tokenizer.json").write_text("{broken")
    assert "transformers cannot load the tokenizer" in refused(source, 3)


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
    assert "rank 30 is larger than the candidates allow" in refused(source, 6, rank=30)
    assert "no candidate direction is over" in refused(source, 6, alpha=50)


def test_wrong_options(refused: Callable[..., str], source: Path) -> None:
    assert "-o layers: expected layers from 0 to 5" in refused(source, 2, layers="5-9")
    assert "-o: expected KEY=VALUE, found rank" in refused(source, 2, "-o", "rank")
    assert "-o rank is given twice" in refused(source, 2, "-o", "rank=1", "-o", "rank=2")
    assert "--seed: expected at most 9223372036854775807" in refused(source, 2, "--seed", 1 << 65)
    assert "--num-pairs: expected at least 16, found 3" in refused(source, 2, "--num-pairs", 3)
    assert "--base-model: expected a repo id" in refused(source, 2, "--base-model", "no repo!")
    assert "--device: expected auto, map, cpu" in refused(source, 2, "--device", "tpu")
    methods = " or ".join(METHODS.names())
    assert f"--method: expected {methods}, found magic" in refused(source, 2, "--method", "magic")
    outputs = "adapter or checkpoint, found both"
    assert f"--output: expected {outputs}" in refused(source, 2, "--output", "both")
    for option, value in (("--control", "profs"), ("--scorer", "detoxify"), ("--passages", 2)):
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
    ):
        result = cli("convert", source, destination, *TINY_ARGS)
        assert result.exit_code == 7, (destination, result.stderr)
        assert any(part in result.stderr for part in says.split("|")), result.stderr
        assert "Traceback" not in result.stderr


def test_the_current_folder_is_not_replaced(
    cli: Cli, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here/below").mkdir(parents=True)
    for folder in ("here", "here/below"):
        monkeypatch.chdir(tmp_path / folder)
        result = cli("convert", source, tmp_path / "here", *TINY_ARGS)
        assert result.exit_code == 7
        assert "is the current folder" in result.stderr


def test_a_destination_that_was_filled_meanwhile_is_not_replaced(
    cli: Cli, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from converter.entrypoints import convert as pipeline

    def slow(folder: Path, **options: Any) -> list[str]:
        (tmp_path / "out").mkdir()
        (tmp_path / "out/other.txt").write_text("of a faster run")
        return []

    monkeypatch.setattr(pipeline, "verify", slow)
    result = cli("convert", source, tmp_path / "out", *TINY_ARGS)
    assert result.exit_code == 7
    assert "was filled meanwhile" in result.stderr
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
    first = cli("convert", checkpoints("llama"), tmp_path / "first", *args)
    assert first.exit_code == 0, first.stderr
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)],
    ids=["Ctrl-C", "SIGTERM", "SIGHUP"],
)
def test_an_interrupted_run_leaves_nothing_but_what_is_finished(
    number: signal.Signals, code: int, source: Path, tmp_path: Path
) -> None:
    """In a process of its own, interrupted while a shard is half written."""
    script = (
        "import os, signal, sys, time\n"
        # a parent in the background may have handed down that these are ignored
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
        "from converter.cli.convert import convert_command\n"
        "pwrite = os.pwrite\n"
        "def slow(*args):\n"
        "    os.write(1, b'writing\\n'); time.sleep(0.1); return pwrite(*args)\n"
        "os.pwrite = slow\n"
        "convert_command(sys.argv[1:])\n"
    )
    args = [source, tmp_path / "out", *TINY_ARGS, "--cache-dir", tmp_path / "cache"]
    with subprocess.Popen(
        [sys.executable, "-c", script, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        process.send_signal(number)
        _, errors = process.communicate()
    assert process.returncode == code
    assert "Traceback" not in errors
    assert f"stopped by {number.name}" in errors
    kept = [".out.part"] if "finished shards kept" in errors else []
    assert sorted(p.name for p in tmp_path.iterdir()) == [*kept, "cache", "source"]
