"""Weights that are not safetensors: PyTorch's pickles and GGUF files."""

import copy
import dataclasses
import json
import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from io import SEEK_END
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import RopeScalingType
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer

from converter.checkpoints.formats import gguf, version_4
from converter.checkpoints.formats import pickle_files as pickled
from converter.checkpoints.formats.pickle_files import load_tensors
from converter.checkpoints.formats.virtual import (
    VirtualFile,
    VirtualShard,
    VirtualTensor,
    split_shards,
)
from converter.checkpoints.names import EDIT_FILE
from converter.checkpoints.resolve import resolve
from converter.checkpoints.safetensors.header import header_of
from converter.checkpoints.safetensors.rewrite import read_tensor
from converter.edits.edit_file import load_bases
from converter.edits.engine import Engine
from converter.entrypoints import convert as converting
from converter.errors import CheckpointError, SourceError
from converter.evaluation.fit import fit
from converter.outputs.base import WriteJob
from converter.outputs.checkpoint.write import write_checkpoint
from converter.runtime import progress
from tests.builders.edits import removal
from tests.builders.errors import refused
from tests.builders.invoke import Cli
from tests.builders.meta import write_native
from tests.builders.models import (
    HIDDEN,
    LAYERS,
    TINY_ARGS,
    TINY_MODELS,
    VISION,
    Checkpoints,
    load,
    planned,
    tiny_args,
    tiny_config,
    tiny_tokenizer,
)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        found |= load_file(path)
    return found


def as_pickles(source: Path, folder: Path, parts: int, **settings: Any) -> Path:
    """The same checkpoint with its weights as PyTorch saves them, tied embeddings included."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    state = load(source).state_dict()
    names = list(state)
    if parts == 1:
        torch.save(state, folder / "pytorch_model.bin", **settings)
        return folder
    weight_map: dict[str, str] = {}
    for part in range(parts):
        file = f"pytorch_model-{part + 1:05d}-of-{parts:05d}.bin"
        chosen = names[part * len(names) // parts : (part + 1) * len(names) // parts]
        torch.save({name: state[name] for name in chosen}, folder / file, **settings)
        weight_map |= dict.fromkeys(chosen, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


PICKLED: dict[str, tuple[str, int, dict[str, Any]]] = {
    "sharded": ("llama", 3, {}),
    "single": ("gpt2", 1, {}),
    "before PyTorch 1.6": ("gpt2", 1, {"_use_new_zipfile_serialization": False}),
}


@pytest.mark.parametrize("name", PICKLED)
def test_pickled_weights_convert_as_safetensors_do(
    name: str, checkpoints: Checkpoints, cli: Cli, tmp_path: Path
) -> None:
    kind, parts, settings = PICKLED[name]
    source = checkpoints(kind)
    pickles = as_pickles(source, tmp_path / "pickles", parts, **settings)
    for place, out in ((source, "a"), (pickles, "b")):
        cli("convert", place, tmp_path / out, *TINY_ARGS, "--num-pairs", 32, code=0)
    ours, theirs = tensors_of(tmp_path / "b"), tensors_of(tmp_path / "a")
    assert ours.keys() == theirs.keys()  # GPT-2's tied unembedding is written once
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert len(list((tmp_path / "b").glob("model*.safetensors"))) == parts
    assert not list((tmp_path / "b").glob("*.bin*"))
    manifest = json.loads((tmp_path / "b/gloss_manifest.json").read_text())
    assert set(manifest["source"]["originals"]) == {p.name for p in pickles.glob("*.bin")}
    cli("verify", tmp_path / "b", "--source", pickles, code=0)
    ids = torch.randint(2, 300, (1, 9))
    assert torch.equal(load(tmp_path / "b")(ids).logits, load(tmp_path / "a")(ids).logits)


def test_files_that_must_be_held_are_read_once_each_however_many_workers_there_are(
    checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = {"_use_new_zipfile_serialization": False}
    source, plan = planned(as_pickles(checkpoints("llama"), tmp_path / "old", 3, **old))
    read: list[str] = []

    def load(path: Path) -> Any:
        read.append(path.name)
        return load_tensors(path)

    monkeypatch.setattr(pickled, "load_tensors", load)
    edit = removal(plan, dict.fromkeys(range(LAYERS), torch.eye(HIDDEN)[:, :1]))
    assert len(edit.tensors) == len(plan.targets)
    out = tmp_path / "out"
    out.mkdir()
    write_checkpoint(WriteJob(source=source, plan=plan, edit=edit, folder=out, engine=Engine(4)))
    assert len(read) == len(set(read)) == 3


def test_another_source_is_noticed_when_it_was_pickled(
    checkpoints: Checkpoints, cli: Cli, tmp_path: Path
) -> None:
    pickles = as_pickles(checkpoints("llama"), tmp_path / "pickles", 1)
    cli("convert", pickles, tmp_path / "out", *TINY_ARGS, code=0)
    state = torch.load(pickles / "pytorch_model.bin", weights_only=True)
    state["model.layers.0.mlp.up_proj.weight"][0, 0] += 1
    torch.save(state, pickles / "pytorch_model.bin")
    result = cli("verify", tmp_path / "out", "--source", pickles, code=8)
    assert "pytorch_model.bin of the source is not the file that was converted" in result.stderr
    assert "tensor model.layers.0.mlp.up_proj.weight differs" in result.stderr


def test_a_shared_storage_is_copied_where_the_model_does_not_tie(tmp_path: Path) -> None:
    weight = torch.randn(5, 4)
    state = {"embed": weight, "head": weight, "rows": weight[1:3], "other": torch.ones(2)}
    torch.save(state, tmp_path / "pytorch_model.bin")
    for tied, expected in (
        ("head", ["embed", "rows", "other"]),
        ("embed", ["head", "rows", "other"]),
        ("", list(state)),
    ):
        made = pickled.read_pickled(tmp_path, ["pytorch_model.bin"], {}, tied).shards
        assert [recipe.name for recipe in made["model.safetensors"]] == expected
        for recipe in made["model.safetensors"]:
            assert torch.equal(recipe.make(), state[recipe.name])


def test_an_index_must_be_that_of_the_pickles(
    checkpoints: Checkpoints, cli: Cli, tmp_path: Path
) -> None:
    pickles = as_pickles(checkpoints("llama"), tmp_path / "pickles", 2)
    path = pickles / "pytorch_model-00002-of-00002.bin"
    state = torch.load(path, weights_only=True)
    del state["model.norm.weight"]
    torch.save(state, path)
    cli("plan", pickles, code=4, says=f"the index places tensor model.norm.weight in {path.name}")


def test_pickles_that_change_during_a_run_are_noticed(
    checkpoints: Checkpoints, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pickles = as_pickles(checkpoints("llama"), tmp_path / "pickles", 1)
    path = pickles / "pytorch_model.bin"

    def slow(*args: Any) -> Any:
        fitted = fit(*args)
        state = torch.load(path, weights_only=True)
        state["model.norm.weight"] += 1
        torch.save(state, tmp_path / "new.bin")
        (tmp_path / "new.bin").replace(path)
        return fitted

    monkeypatch.setattr(converting, "fit", slow)
    result = cli("convert", pickles, tmp_path / "out", *TINY_ARGS, "--num-pairs", 32, code=4)
    assert "pytorch_model.bin changed while it was read" in result.stderr
    assert not list(tmp_path.glob("*out*"))
    monkeypatch.undo()  # the next run, in the same process, takes the new file
    monkeypatch.setenv("GLOSS_CACHE_DIR", str(tmp_path / "cache"))
    cli("convert", pickles, tmp_path / "out", *TINY_ARGS, "--num-pairs", 32, code=0)
    name = "model.norm.weight"
    old, new = tensors_of(checkpoints("llama"))[name], tensors_of(tmp_path / "out")[name]
    assert torch.equal(new, old + 1)


def test_a_virtual_shard_reads_like_the_file_it_stands_for(tmp_path: Path) -> None:
    made: list[str] = []

    def recipe(name: str, tensor: Tensor) -> VirtualTensor:
        def make() -> Tensor:
            made.append(name)
            return tensor

        return VirtualTensor(name, tensor.dtype, tuple(tensor.shape), make)

    tensors = {
        "flags": torch.tensor([True, False, True]),
        "half": torch.randn(7, 3).to(torch.bfloat16),
        "empty": torch.empty(0, 4),
        "wide": torch.randn(2, 2, dtype=torch.float64),
        "eight": torch.randn(5).to(torch.float8_e4m3fn),
        "turned": torch.randn(4, 6).T,
    }
    recipes = [recipe(name, tensor) for name, tensor in tensors.items()]
    shard = VirtualShard(VirtualFile(recipes))
    assert made == []
    path = tmp_path / "model.safetensors"
    path.write_bytes(shard.read())
    assert sorted(made) == sorted(name for name in tensors if name != "empty")  # each made once
    back = load_file(path)
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name].float(), tensor.float())
    made.clear()
    info = header_of(shard, "x").tensors["turned"]
    assert made == []
    assert torch.equal(read_tensor(shard, info), tensors["turned"])
    assert made == ["turned"]
    assert shard.seek(-8, SEEK_END) == path.stat().st_size - 8
    assert shard.read() == path.read_bytes()[-8:]
    assert [len(part) for part in split_shards(recipes, 50).values()] == [3, 2, 1]


@pytest.mark.parametrize(("parts", "kv_heads"), [(1, None), (2, 2)])
def test_metas_own_layout_converts(
    parts: int, kv_heads: int | None, cli: Cli, tmp_path: Path
) -> None:
    """The output's logits are those of Meta's forward pass with projected ``w2``."""
    source, out = tmp_path / "native", tmp_path / "out"
    reference = write_native(source, parts, kv_heads, dtype=torch.float32)
    args = ("--num-pairs", 32, *tiny_args(layers="0-1", rank=2))
    cli("convert", source, out, *args, code=0)
    cli("verify", out, "--source", source, code=0)
    U = load_bases(out / EDIT_FILE)["U"]
    projected = {
        name: w - U @ (U.T @ w) if "w2" in name else w for name, w in reference.weights.items()
    }
    ids = torch.randint(3, 500, (20,), generator=torch.Generator().manual_seed(0))
    logits = load(out)(ids[None]).logits[0]
    expected = dataclasses.replace(reference, weights=projected).logits(ids)
    assert torch.allclose(logits, expected, atol=1e-5)
    assert not torch.allclose(logits, reference.logits(ids), atol=1e-2)
    manifest = json.loads((out / "gloss_manifest.json").read_text())
    names = {f"consolidated.{n:02d}.pth" for n in range(parts)} | {"params.json"}
    assert set(manifest["source"]["originals"]) == names
    assert not list(out.glob("*.pth"))
    assert (out / "LICENSE.txt").exists()


def test_a_destination_inside_a_source_in_another_format_is_refused(
    checkpoints: Checkpoints, cli: Cli, tmp_path: Path
) -> None:
    write_native(tmp_path / "native")
    as_pickles(checkpoints("llama"), tmp_path / "pickles", 1)
    for source in (tmp_path / "native", tmp_path / "pickles"):
        result = cli("convert", source, source / "out", "-o", "layers=0-1", code=7)
        assert "is the source or lies inside it" in result.stderr


def test_a_damaged_part_of_metas_layout_is_found_before_anything_is_done(
    cli: Cli, tmp_path: Path
) -> None:
    write_native(tmp_path / "native")
    path = tmp_path / "native/consolidated.00.pth"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    result = cli("convert", tmp_path / "native", tmp_path / "out", *TINY_ARGS, code=4)
    assert "consolidated.00.pth is damaged: its md5 is not that of the checklist" in result.stderr
    assert not (tmp_path / "out").exists()


def write_gguf(
    path: Path,
    block_count: int,
    lacks: str = "",
    factors: Mapping[str, NDArray[np.float32]] = {},
    **said: Any,
) -> None:
    """A tiny Llama of three blocks, which the header may deny; without one of its tensors.

    Args:
        factors: of frequencies, by the names of tensors.
        said: what else the header says, by the names of methods of GGUFWriter.
    """
    from gguf import GGUFWriter

    writer, tokenizer = GGUFWriter(str(path), "llama"), tiny_tokenizer()
    for key, value in {
        "context_length": 128, "embedding_length": 64, "block_count": block_count,
        "feed_forward_length": 96, "head_count": 4, "head_count_kv": 4,
        "layer_norm_rms_eps": 1e-5, "rope_dimension_count": 16, "vocab_size": len(tokenizer),
        "tokenizer_model": "gpt2", "tokenizer_pre": "llama-bpe", "bos_token_id": 0,
        "eos_token_id": 1, "token_types": [1] * len(tokenizer), **said,
    }.items():  # fmt: skip
        getattr(writer, f"add_{key}")(value)
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    writer.add_token_list([token for token, _ in vocabulary])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(merge) for merge in merges])
    shapes: dict[str, tuple[int, ...]] = {"output_norm": (64,)}
    shapes |= {"token_embd": (len(tokenizer), 64), "output": (len(tokenizer), 64)}
    for block in range(3):
        names = {"attn_q": (64, 64), "attn_k": (64, 64), "attn_v": (64, 64),
                 "attn_output": (64, 64), "ffn_gate": (96, 64), "ffn_up": (96, 64),
                 "ffn_down": (64, 96), "attn_norm": (64,), "ffn_norm": (64,)}  # fmt: skip
        shapes |= {f"blk.{block}.{name}": shape for name, shape in names.items()}
    draw = np.random.default_rng(0)
    for name, shape in shapes.items():
        if name != lacks:
            writer.add_tensor(f"{name}.weight", draw.standard_normal(shape, np.float32) / 10)
    for name, tensor in factors.items():
        writer.add_tensor(f"{name}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_unpacking_a_gguf_file_moves_a_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what transformers prints, which it counts tensors with."""
    write_gguf(tmp_path / "x.gguf", 3)
    steps: list[float] = []

    class Bar:
        n = 0

        def update(self, count: int) -> None:
            self.n += count
            steps.append(self.n)

    monkeypatch.setattr(progress, "bar", lambda *given: nullcontext(Bar()))
    gguf.load(tmp_path / "x.gguf")
    assert steps == sorted(steps)
    assert steps[-1] == 100


def test_a_gguf_file_is_unpacked_once(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, 3)
    loaded: list[Path] = []
    load = gguf.load

    def counted(path: Path) -> tuple[Any, Any]:
        loaded.append(path)
        return load(path)

    monkeypatch.setattr(gguf, "load", counted)
    monkeypatch.setenv("GLOSS_CACHE_DIR", str(tmp_path / "cache"))
    args = ("--num-pairs", 32, *tiny_args(layers="0-2", rank=2))
    cli("convert", path, tmp_path / "out", *args, code=0)
    cli("verify", tmp_path / "out", "--source", path, code=0)
    assert loaded == [path]
    weights = next((tmp_path / "cache/gguf").rglob("model.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    cli("verify", tmp_path / "out", "--source", path, code=0)
    assert loaded == [path, path]  # what is in the cache and damaged is made again
    manifest = json.loads((tmp_path / "out/gloss_manifest.json").read_text())
    assert set(manifest["source"]["originals"]) == {"tiny.gguf"}
    assert manifest["source"]["name"] == "tiny"


TEMPLATE = "{% for m in messages %}{{ m['content'] + '\\n' }}{% endfor %}"


def test_version_4_reads_what_version_5_was_made_to_write(tmp_path: Path) -> None:
    """It reads neither rope_parameters nor dtype, no class TokenizersBackend, no template file."""
    said: dict[str, Any] = {"rope_freq_base": 500000.0, "chat_template": TEMPLATE}
    said |= {"add_bos_token": True, "token_types": [3, 3, *[1] * 398]}
    write_gguf(tmp_path / "tiny.gguf", 3, **said)
    source = resolve(str(tmp_path / "tiny.gguf"))
    config = source.config
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 500000
    assert config["rope_scaling"] is None
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"
    written = json.loads(source.small["tokenizer_config.json"].read_text())
    assert written["chat_template"] == source.small["chat_template.jinja"].read_text() == TEMPLATE
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert written["clean_up_tokenization_spaces"] is False  # the default of version 4 is not
    assert written["model_input_names"] == ["input_ids", "attention_mask"]
    assert not {"backend", "is_local", "local_files_only", "gguf_file"}.intersection(written)
    _, tokenizer = gguf.load(tmp_path / "tiny.gguf")
    read: Any = AutoTokenizer.from_pretrained(source.folder)
    for text in ("Hello , world", "naïve 日本 </s> x", ""):
        assert read(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert read.decode(read.encode(text)) == tokenizer.decode(tokenizer.encode(text))


def test_special_tokens_without_names_are_a_list_in_both_versions(tmp_path: Path) -> None:
    """Version 4 fails on a list under the name that version 5 has for it."""
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|a|>", "<|b|>"]})
    config: Any = tiny_config("gpt2")
    config.dtype = torch.float32
    config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    version_4.complete(tmp_path, tokenizer)
    written = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert written["additional_special_tokens"] == ["<|a|>", "<|b|>"]
    assert "extra_special_tokens" not in written
    assert "rope_theta" not in json.loads((tmp_path / "config.json").read_text())
    read: Any = AutoTokenizer.from_pretrained(tmp_path)
    assert read.all_special_tokens == tokenizer.all_special_tokens


def llama3_factors(factor: float) -> NDArray[np.float32]:
    """What llama.cpp divides the 8 frequencies of such a head by, as its converter writes them."""
    turns = 8192 * 500000.0 ** (-np.arange(8) / 8) / (2 * np.pi)
    smooth = np.clip((turns - 1) / 3, 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


ONES = np.ones(8, np.float32)
LINEAR, YARN = RopeScalingType.LINEAR, RopeScalingType.YARN
WRITTEN: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "linear": (
        {"rope_scaling_type": LINEAR, "rope_scaling_factor": 8.0},
        {"rope_type": "linear", "factor": 8.0},
    ),
    "yarn": (
        {"rope_scaling_type": YARN, "rope_scaling_factor": 4.0, "rope_scaling_orig_ctx_len": 64},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    ),
    "Llama 3.1": (
        {"factors": {"rope_freqs": llama3_factors(8.0)}},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 8192},
    ),
    "ones": ({"factors": {"rope_freqs": ONES}}, {"rope_type": "default"}),
    "none": ({"rope_scaling_type": RopeScalingType.NONE}, {"rope_type": "default"}),
    "a factor of one": ({"rope_scaling_factor": 1.0}, {"rope_type": "default"}),
}  # fmt: skip


@pytest.mark.parametrize("scaling", WRITTEN)
def test_positions_that_a_gguf_file_scales_go_into_the_config(scaling: str, tmp_path: Path) -> None:
    """transformers reads none of this from a header."""
    said, expected = WRITTEN[scaling]
    write_gguf(tmp_path / "tiny.gguf", 3, rope_freq_base=500000.0, **said)
    config = resolve(str(tmp_path / "tiny.gguf")).config
    assert config["rope_parameters"] == expected | {"rope_theta": 500000}
    is_plain = expected["rope_type"] == "default"
    old = None if is_plain else expected | {"type": expected["rope_type"]}
    assert config["rope_scaling"] == old


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ({"rope_scaling_type": YARN, "rope_scaling_factor": 4.0}, "scaling.type yarn, ..."),
        ({"rope_scaling_type": RopeScalingType.LONGROPE}, "scaling.type longrope"),
        ({"rope_scaling_attn_factors": 1.2, "rope_scaling_factor": 2.0}, "...attn_factor..."),
        ({"factors": {"rope_freqs": np.arange(1, 9, dtype=np.float32)}}, "another"),
        ({"factors": {"rope_freqs": llama3_factors(8.0)[4:]}}, "another"),
        (
            {"factors": dict.fromkeys(("rope_factors_long", "rope_factors_short"), ONES)},
            "rope_factors_long.weight, rope_factors_short.weight",
        ),
    ],
)
def test_positions_that_no_config_says_are_refused(
    said: dict[str, Any], found: str, tmp_path: Path
) -> None:
    write_gguf(tmp_path / "tiny.gguf", 3, rope_freq_base=500000.0, **said)
    with refused(CheckpointError, what="tiny.gguf scales positions...", found=found):
        resolve(str(tmp_path / "tiny.gguf"))


SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 24.0},
    "longrope": {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": 4.0,
                 "original_max_position_embeddings": 128},
    "llama3": {"factor": 4.0, "original_max_position_embeddings": 128, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0},
}  # fmt: skip


@pytest.mark.parametrize("kind", sorted(TINY_MODELS.keys() - VISION.keys() - {"gpt_neox", "gptj"}))
def test_the_keys_of_version_4_say_the_same(kind: str) -> None:
    """Version 5 makes its own keys of the old ones. (The old ones of GPT-NeoX are called otherwise,
    and no source makes us write its config.)"""
    config: Any = tiny_config(kind)
    parameters = getattr(config, "rope_parameters", None)
    if not parameters:
        return
    parts = parameters.values() if "full_attention" in parameters else [parameters]
    for number, part in enumerate(parts, 1):
        part["rope_theta"] = 500000.0 if kind == "olmo3" else 500000.0 * number
    assert read_by_old_keys(config) == parameters


@pytest.mark.parametrize("scaling", SCALINGS)
def test_the_keys_of_version_4_say_how_positions_are_scaled(scaling: str) -> None:
    config: Any = tiny_config("llama")
    config.rope_parameters = SCALINGS[scaling] | {"rope_type": scaling, "rope_theta": 500000.0}
    keys = version_4.rope_keys(config.rope_parameters)
    assert keys["rope_scaling"]["type"] == keys["rope_scaling"]["rope_type"] == scaling
    assert read_by_old_keys(config) == config.rope_parameters


def read_by_old_keys(config: Any) -> dict[str, Any]:
    """What version 5 makes of the old keys alone."""
    old = {key: value for key, value in config.to_dict().items() if key != "rope_parameters"}
    read = type(config).from_dict(old | version_4.rope_keys(config.rope_parameters))
    found: dict[str, Any] = read.rope_parameters
    found.get("full_attention", found).pop("type", None)
    return found


def test_a_cache_of_another_version_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(tmp_path / "tiny.gguf", 3)
    folders = [gguf.unpacked(tmp_path / "tiny.gguf")]
    monkeypatch.setattr(gguf, "_VERSION", -1)
    folders.append(gguf.unpacked(tmp_path / "tiny.gguf"))
    monkeypatch.setattr(gguf, "load", lambda path: (None, None))
    monkeypatch.setattr(gguf, "make_folder", lambda folder, *_: folders.append(folder))
    with pytest.raises(SourceError):
        resolve("demo")  # nothing was made, so nothing is found
    assert len(set(folders)) == 3
    assert gguf.made_by() in folders[2].parts


@pytest.mark.parametrize(
    ("block_count", "lacks", "says"),
    [
        (3, "blk.1.attn_q", "1 missing keys, the first model.layers.1.self_attn.q_proj.weight"),
        (2, "", "expected blk.0 to blk.1, found 3 of them"),
    ],
)
def test_a_gguf_file_that_is_not_whole_is_refused(
    block_count: int, lacks: str, says: str, cli: Cli, tmp_path: Path
) -> None:
    """transformers would fill what is missing with random numbers, and drop what is too much."""
    write_gguf(tmp_path / "tiny.gguf", block_count, lacks)
    cli("convert", tmp_path / "tiny.gguf", tmp_path / "out", *TINY_ARGS, code=4, says=says)


def test_a_folder_with_a_gguf_file_is_no_source(cli: Cli, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "m.gguf").write_bytes(b"GGUF")
    cli("convert", folder, tmp_path / "out", code=4, says="give the file m.gguf itself as SOURCE")


def test_safetensors_are_preferred(checkpoints: Checkpoints, tmp_path: Path) -> None:
    source = shutil.copytree(checkpoints("llama"), tmp_path / "both")
    (source / "pytorch_model.bin").write_bytes(b"older")
    found = resolve(str(source))
    assert found.virtual_shards is None
    assert "pytorch_model.bin" not in found.companions
