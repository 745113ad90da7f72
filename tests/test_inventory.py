"""Which files of a source hold the weights, which go along with them, which are left out."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file

from converter.checkpoints.inventory import choose_weights
from converter.checkpoints.plan import make_plan
from converter.checkpoints.resolve import resolve
from converter.edits.base import Edit
from converter.edits.engine import Engine
from converter.errors import CheckpointError, DataError
from converter.outputs.base import WriteJob
from converter.outputs.checkpoint.additions import check_edit
from converter.outputs.checkpoint.write import write_checkpoint
from tests.builders.errors import refused
from tests.builders.models import TINY_ARGS, load
from tests.test_formats import as_pickles, tensors_of

INDEX = "model.safetensors.index.json"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9085657\n"
PAGE = '\n<!DOCTYPE html>\n<html class=""><title>Sign in</title></html>\n'

Checkpoints = Callable[..., Path]
Cli = Callable[..., Result]


@pytest.fixture
def source(checkpoints: Checkpoints, tmp_path: Path) -> Path:
    """A checkpoint in shards, to be altered."""
    return shutil.copytree(checkpoints("llama"), tmp_path / "source")


@pytest.fixture
def single(checkpoints: Checkpoints, tmp_path: Path) -> Path:
    """The same as one file without an index."""
    return shutil.copytree(checkpoints("llama", shard="10GB"), tmp_path / "single")


def save(path: Path, *names: str, size: int = 8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: torch.ones(size) for name in names}, path, {"format": "pt"})


def rename_shards(folder: Path, new: Callable[[str], str]) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = {k: new(v) for k, v in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index))
    for path in folder.glob("*.safetensors"):
        path.rename(folder / new(path.name))


def convert(cli: Cli, source: Path, out: Path) -> dict[str, object]:
    result = cli("convert", source, out, "--num-pairs", 32, *TINY_ARGS)
    assert result.exit_code == 0, result.stderr
    checked = cli("verify", out, "--source", source)
    assert checked.exit_code == 0, checked.stdout
    manifest = json.loads((out / "gloss_manifest.json").read_text())
    return dict(manifest["source"], said=result.stderr)


def test_an_index_of_one_file_is_one_set_of_weights_and_goes_along(
    single: Path, cli: Cli, tmp_path: Path
) -> None:
    names = tensors_of(single)
    index = {"metadata": {"by": "another"}, "weight_map": dict.fromkeys(names, "model.safetensors")}
    (single / INDEX).write_text(json.dumps(index))
    convert(cli, single, tmp_path / "out")
    assert (tmp_path / "out" / INDEX).read_bytes() == (single / INDEX).read_bytes()
    assert load(tmp_path / "out")(torch.tensor([[1, 2]])).logits.isfinite().all()


def test_its_created_tensors_are_found_by_every_reader(single: Path, tmp_path: Path) -> None:
    """The single file gets another name: readers that find it would look at no index."""
    index = {"weight_map": dict.fromkeys(tensors_of(single), "model.safetensors")}
    (single / INDEX).write_text(json.dumps(index))
    found = resolve(str(single))
    plan = make_plan(found.config, found.weight_map, found.headers())
    edit = Edit(created={"model.extra.bias": torch.ones(3)})
    out = tmp_path / "out"
    out.mkdir()
    job = WriteJob(source=found, plan=plan, edit=edit, folder=out, engine=Engine(1, None))
    assert write_checkpoint(job).extra
    places = json.loads((out / INDEX).read_text())["weight_map"]
    assert {*places.values()} == {path.name for path in out.glob("model-*.safetensors")}
    assert places.keys() == {*tensors_of(single), "model.extra.bias"}


def test_an_index_of_one_pickle_is_one_set(checkpoints: Checkpoints, tmp_path: Path) -> None:
    folder = as_pickles(checkpoints("llama"), tmp_path / "pickles", 1)
    names = tensors_of(checkpoints("llama"))
    index = {"weight_map": dict.fromkeys(names, "pytorch_model.bin")}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    found = resolve(str(folder))
    assert (found.shards, found.weight_map) == (("model.safetensors",), None)
    assert found.left_out == ()


def test_two_sets_are_refused_by_what_the_index_names(source: Path, single: Path) -> None:
    shutil.copy(single / "model.safetensors", source)
    with refused(CheckpointError, what="source has two sets of weights: ...", hint="...remove..."):
        resolve(str(source))


@pytest.mark.parametrize(
    "new",
    [
        lambda name: name.replace("model-", "model.safetensors-"),
        lambda name: name.replace("model-", "Weights of me, "),
        lambda name: name.replace("model-", "MODEL of 2026."),
    ],
    ids=["twice", "spaces", "capitals"],
)
def test_shards_may_have_any_name(
    new: Callable[[str], str], source: Path, cli: Cli, tmp_path: Path
) -> None:
    rename_shards(source, new)
    convert(cli, source, tmp_path / "out")
    assert (tmp_path / "out" / INDEX).read_bytes() == (source / INDEX).read_bytes()


def test_weights_beside_the_model_are_copied_and_named(
    source: Path, cli: Cli, tmp_path: Path
) -> None:
    save(source / "mtp.safetensors", "mtp.fc.weight")
    save(source / "2_Dense/model.safetensors", "linear.weight")
    save(source / "model-00099-of-00099.safetensors")  # holds nothing
    out = tmp_path / "out"
    record = convert(cli, source, out)
    extras = ["2_Dense/model.safetensors", "model-00099-of-00099.safetensors", "mtp.safetensors"]
    assert sorted(record["extras"]) == extras  # type: ignore[call-overload]
    assert "copied and not edited: 2_Dense/model.safetensors" in str(record["said"])
    assert "left_out" not in record
    for name in extras:
        assert (out / name).read_bytes() == (source / name).read_bytes()
    planned = json.loads(cli("plan", source, "--json", *TINY_ARGS).stdout)
    assert sorted(planned["extra_weights"]) == extras
    assert "weights copied, not edited: " in cli("plan", source, *TINY_ARGS).stdout
    assert cli("diff", source, out, "--json").exit_code in (0, 1)
    replayed = cli("replay", out, tmp_path / "again", "--source", source)
    assert replayed.exit_code == 0, replayed.stderr
    assert (tmp_path / "again/mtp.safetensors").exists()
    (source / "mtp.safetensors").write_bytes((source / extras[0]).read_bytes())
    checked = cli("verify", out, "--source", source)
    assert "mtp.safetensors of the source is not the file" in checked.stderr
    (out / "mtp.safetensors").unlink()
    assert "mtp.safetensors: is missing" in cli("verify", out).stderr


def test_a_copied_file_is_among_the_weights_only_where_it_was(single: Path, tmp_path: Path) -> None:
    save(single / "head.safetensors", "v_head.summary.weight")
    found = resolve(str(single))
    assert (found.shards, found.extras) == (("model.safetensors",), ("head.safetensors",))
    assert found.weight_map is None


def test_what_is_left_out_is_named_and_checked(source: Path, cli: Cli, tmp_path: Path) -> None:
    tensors = tensors_of(source)
    down = "model.layers.3.mlp.down_proj"
    save(source / "old-00001-of-00002.safetensors", f"{down}.weight")  # of an earlier set
    save(source / "q4.safetensors", f"{down}.qweight", f"{down}.scales")  # quantized
    save_file(
        {f"old.{name}": t for name, t in tensors.items()},
        source / "consolidated.safetensors",
    )  # in other names
    save(source / "draft/adapter_model.safetensors", "base_model.lora_A.weight")
    (source / "draft/adapter_config.json").write_text("{}")
    save(source / "checkpoint-500/model.safetensors", "step")
    for name in (
        "model-Q4_K_M.gguf",
        "onnx/model.onnx",
        "TRAINING.BIN",
        ".notes/a.txt",
        "model.sig",
    ):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("x")
    for name in (".notes/a.txt", ".git/config", ".gitattributes", ".cache/x", "sub/.DS_Store"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("x")
    with (source / "large.txt").open("wb") as file:
        file.truncate(64_000_001)
    (source / "linked").symlink_to(tmp_path)
    out = tmp_path / "out"
    record = convert(cli, source, out)
    expected = [
        ".notes/", "TRAINING.BIN", "checkpoint-500/model.safetensors", "consolidated.safetensors",
        "draft/adapter_config.json", "draft/adapter_model.safetensors", "large.txt", "linked/",
        "model-Q4_K_M.gguf", "model.sig", "old-00001-of-00002.safetensors", "onnx/model.onnx",
        "q4.safetensors",
    ]  # fmt: skip
    assert record["left_out"] == expected
    assert "extras" not in record
    assert "left out: .notes/, TRAINING.BIN, " in str(record["said"])
    assert "and 8 more" in str(record["said"])
    assert json.loads(cli("plan", source, "--json", *TINY_ARGS).stdout)["left_out"] == expected
    (source / "TRAINING.BIN").unlink()
    (source / "new.gguf").write_text("x")
    said = cli("verify", out, "--source", source).stderr
    assert "TRAINING.BIN is recorded as left out, and the source has no such file" in said
    assert "new.gguf of the source was left out and is not recorded as such" in said


def test_a_copied_file_is_no_link_out_of_the_source(source: Path, tmp_path: Path) -> None:
    save_file({"private.weight": torch.ones(2)}, tmp_path / "private.safetensors")
    (source / "draft.safetensors").symlink_to(tmp_path / "private.safetensors")
    with refused(CheckpointError, what="draft.safetensors is a link that leads out of the source"):
        resolve(str(source))


def test_an_index_that_names_the_single_file_and_others_is_refused(source: Path) -> None:
    index = source / INDEX
    places = json.loads(index.read_text())["weight_map"]
    first = min(places.values())
    (source / first).rename(source / "model.safetensors")
    index.write_text(index.read_text().replace(first, "model.safetensors"))
    with refused(CheckpointError, what="... has two sets...", hint="...rename it, in..."):
        resolve(str(source))


def test_an_adapter_leaves_nothing_out(source: Path, cli: Cli, tmp_path: Path) -> None:
    save(source / "mtp.safetensors", "mtp.fc.weight")
    out = tmp_path / "out"
    args = ("--output", "adapter", "--num-pairs", 32, *TINY_ARGS)
    assert cli("convert", source, out, *args).exit_code == 0
    assert (
        not {"extras", "left_out"}
        & json.loads((out / "gloss_manifest.json").read_text())["source"].keys()
    )
    assert cli("verify", out, "--source", source).exit_code == 0


def test_a_stale_copy_in_a_shard_is_named_with_its_file(source: Path) -> None:
    places = json.loads((source / INDEX).read_text())["weight_map"]
    name = "model.layers.3.mlp.down_proj.weight"
    other = next(file for file in sorted({*places.values()}) if file != places[name])
    save_file(load_file(source / other) | {name: torch.zeros(1)}, source / other)
    found = resolve(str(source))
    with refused(
        CheckpointError, what=f"tensor {name} is in two files",
        expected=f"it in {places[name]} only, as the index says", found=f"another copy in {other}",
        hint=f"delete the tensor from {other}, ...",
    ):  # fmt: skip
        make_plan(found.config, found.weight_map, found.headers())


def test_a_stale_copy_in_a_pickle_is_too(checkpoints: Checkpoints, tmp_path: Path) -> None:
    folder = as_pickles(checkpoints("llama"), tmp_path / "pickles", 2)
    places = json.loads((folder / "pytorch_model.bin.index.json").read_text())["weight_map"]
    name = "model.norm.weight"
    other = next(file for file in {*places.values()} if file != places[name])
    torch.save(torch.load(folder / other) | {name: torch.zeros(1)}, folder / other)
    with refused(CheckpointError, expected=f"it in {places[name]} only, as the index says"):
        resolve(str(folder))


@pytest.mark.parametrize(
    ("files", "what", "hint"),
    [
        (["consolidated.safetensors"], "... Mistral's own layout only: ...", "get config.json ..."),
        (["model.fp16.safetensors"], "... a variant of the weights only: model.fp16.safetensors",
         "rename it to model.safetensors, or download the model without a variant"),
        (["pytorch_model.bf16.bin"], "... a variant ...", "rename it to pytorch_model.bin, ..."),
        (["model-00001-of-00001.safetensors"], "x has no model.safetensors",
         "rename model-00001-of-00001.safetensors to model.safetensors"),
        (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
         f"x has no {INDEX}", "fetch it, or make it: python -c ..."),
        (["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"],
         "x has no pytorch_model.bin.index.json", "fetch it, or save the model again..."),
        (["model-00002-of-00004.safetensors", "model-00003-of-00004.safetensors"],
         "x has not all shards of model", "fetch the whole folder"),
        (["adapter_model.safetensors"], "x has an adapter only", "give the model ..."),
        (["weights.safetensors"], "...", "if weights.safetensors is the whole model, rename it..."),
        (["m.Q4.gguf"], "...", "give the file m.Q4.gguf itself as SOURCE"),
        (["config.json", "checkpoint-9/config.json"], "...", "give --subfolder checkpoint-9"),
        (["model.safetensors.part"], "...", "the download of model.safetensors.part did not..."),
    ],
)  # fmt: skip
def test_weights_that_cannot_be_read_are_called_what_they_are(
    files: list[str], what: str, hint: str
) -> None:
    with refused(CheckpointError, what=what, hint=hint):
        choose_weights("x", Path(), {*files})


def test_missing_shards_are_named_by_number() -> None:
    with refused(CheckpointError, found="no number 00001, 00004"):
        choose_weights("x", Path(), {f"model-0000{n}-of-00004.safetensors" for n in (2, 3)})


def test_the_hint_makes_an_index(source: Path) -> None:
    expected = json.loads((source / INDEX).read_text())["weight_map"]
    (source / INDEX).unlink()
    with refused(CheckpointError) as caught:
        resolve(str(source))
    code = str(caught.value.hint).partition('python -c "')[2].rpartition('"')[0]
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True)
    assert json.loads((source / INDEX).read_text())["weight_map"] == expected
    assert resolve(str(source)).headers()


def test_an_index_of_other_files_says_which_are_there(source: Path) -> None:
    for path in source.glob("*.safetensors"):
        path.rename(source / path.name.replace("-of-", "-OF-"))
    with refused(CheckpointError, what="the index names ...", hint="...index of those that are..."):
        resolve(str(source))


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("tokenizer.json", POINTER, "tokenizer.json is a pointer of git-lfs, not the file itself"),
        ("LICENSE", POINTER, "LICENSE is a pointer ..."),
        ("README.md", POINTER, "README.md is a pointer ..."),
        ("notes/a.txt", POINTER, "notes/a.txt is a pointer ..."),
        (INDEX, POINTER, f"{INDEX} is a pointer ..."),
        ("config.json", PAGE, "config.json is a page of HTML, not the file itself"),
        (INDEX, PAGE, f"{INDEX} is a page of HTML..."),
        ("modeling_x.py", PAGE, "modeling_x.py is a page of HTML..."),
        ("config.json", "", "config.json is empty"),
        ("generation_config.json", "", "generation_config.json is empty"),
        ("tokenizer.json", "\0" * 99, "tokenizer.json is a file of zero bytes..."),
        ("config.json", "Entry not found", "config.json is an error message of a server..."),
        ("vocab.json", '<?xml version="1.0"?>\n<Error><Code>AccessDenied</Code>',
         "vocab.json is an error message of a server..."),
        ("tokenizer.json.aria2", "x", "tokenizer.json.aria2 is an unfinished download"),
        ("head.safetensors", POINTER, "head.safetensors is a pointer of git-lfs..."),
        ("head.safetensors", "", "head.safetensors is empty"),
        ("generation_config.json", "\ufeff{}", "generation_config.json begins with a byte..."),
        ("tokenizer.json", "\ufeff{}", "tokenizer.json begins with a byte order mark"),
        (INDEX, "\ufeff{}", f"{INDEX} begins with a byte order mark"),
        ("generation_config.json", '{"a": 1', "generation_config.json cannot be read as JSON"),
        ("preprocessor_config.json", "[]", "preprocessor_config.json is not a JSON object"),
    ],
)  # fmt: skip
def test_what_lies_in_the_place_of_a_file_is_refused(
    name: str, content: str, what: str, source: Path
) -> None:
    (source / name).parent.mkdir(exist_ok=True)
    (source / name).write_text(content)
    with refused(CheckpointError, what=what):
        resolve(str(source))


def test_json_in_another_encoding_is_named(source: Path) -> None:
    (source / "generation_config.json").write_text("{}", "utf-16")
    with refused(CheckpointError, found="UTF-16, as its first bytes say", hint="...iconv..."):
        resolve(str(source))


@pytest.mark.parametrize("content", [PAGE, "", "\0" * 99])
def test_nor_is_a_shard_taken_for_one(content: str, source: Path) -> None:
    shard = min(source.glob("*.safetensors"))
    shard.write_text(content)
    with refused(CheckpointError, what=f"{shard.name} is ..."):
        resolve(str(source)).headers()


def test_files_that_may_look_like_that_are_copied(source: Path) -> None:
    for name, text in (("notes.html", PAGE), ("__init__.py", ""), ("long.txt", "<html" * 0 + "a")):
        (source / name).write_text(text)
    assert {"notes.html", "__init__.py", "long.txt"} <= {*resolve(str(source)).companions}


@pytest.mark.parametrize("option", ["--pairs", "--neutral", "--word-list"])
@pytest.mark.parametrize("content", [POINTER, PAGE])
def test_texts_are_looked_at_in_the_same_way(
    content: str, option: str, source: Path, cli: Cli, tmp_path: Path
) -> None:
    path = tmp_path / f"text.{'jsonl' if option == '--pairs' else 'txt'}"
    path.write_text(content)
    result = cli("plan", source, option, path, *TINY_ARGS)
    assert result.exit_code == DataError.exit_code
    assert "not the file itself" in result.stderr


def test_a_copied_file_may_not_have_the_name_of_a_shard_to_come(single: Path) -> None:
    save(single / "model-00002-of-00002.safetensors", "mtp.fc.weight")
    found = resolve(str(single))
    plan = make_plan(found.config, found.weight_map, found.headers())
    check_edit(Edit(), plan, found)
    with refused(CheckpointError, what="model-00002-of-00002.safetensors of the source has a ..."):
        check_edit(Edit(created={"model.extra.bias": torch.ones(3)}), plan, found)


def test_files_of_a_quantization_that_is_gone_are_named(source: Path, cli: Cli) -> None:
    (source / "hf_quant_config.json").write_text("{}")
    assert "hf_quant_config.json: names a quantization" in cli("plan", source, *TINY_ARGS).stderr
