"""What readers load of an output, by their own rules for files: each kind of source and output."""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import converter
from converter.checkpoints.names import EDIT_FILE, INDEX, SINGLE
from converter.checkpoints.plan import make_plan
from converter.checkpoints.resolve import resolve
from converter.manifest import Manifest
from converter.outputs.base import output_of
from converter.outputs.readers import check_readers
from converter.recipe import Recipe
from converter.release.manifest import read_manifest
from tests.builders.adversary import copy_of, load_manifest, put, record
from tests.builders.invoke import Cli
from tests.builders.meta import write_native
from tests.builders.methods import METHODS
from tests.builders.models import Checkpoints
from tests.builders.packages import install
from tests.test_formats import as_pickles, write_gguf

Tensors = Iterator[tuple[str, Tensor]]


def tensors_in(files: list[Path]) -> Tensors:
    for file in files:
        yield from load_file(file).items()


def vllm(folder: Path) -> Tensors:
    """vLLM: every *.safetensors; where there is an index, those that it names."""
    files = sorted(folder.glob("*.safetensors"))
    if (folder / INDEX).exists():
        listed = set(json.loads((folder / INDEX).read_text())["weight_map"].values())
        files = [file for file in files if file.name in listed]
    return tensors_in(files)


def llama_cpp(folder: Path) -> Tensors:
    """convert_hf_to_gguf.py, and MLX: every model*.safetensors; the index must agree."""
    found = dict(tensors_in(files := sorted(folder.glob("model*.safetensors"))))
    if (folder / INDEX).exists():
        assert json.loads((folder / INDEX).read_text())["weight_map"].keys() == found.keys()
    return tensors_in(files)


def transformers(folder: Path) -> Tensors:
    """transformers: model.safetensors if it is there, else what the index names."""
    if (folder / SINGLE).exists():
        return tensors_in([folder / SINGLE])
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    return tensors_in([folder / name for name in sorted(set(weight_map.values()))])


READERS = [vllm, llama_cpp, transformers]
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".npz", ".msgpack", ".h5", ".onnx")
"""Endings that one or another reader takes for weights, wherever they are."""


def one_file(folder: Path, checkpoints: Checkpoints) -> Path:
    return Path(shutil.copytree(checkpoints("llama", torch.bfloat16, "10GB"), folder))


def shards(folder: Path, checkpoints: Checkpoints) -> Path:
    return Path(shutil.copytree(checkpoints("llama", torch.bfloat16), folder))


def pickled(folder: Path, checkpoints: Checkpoints) -> Path:
    return as_pickles(checkpoints("llama", torch.bfloat16), folder, 1)


def pickled_shards(folder: Path, checkpoints: Checkpoints) -> Path:
    return as_pickles(checkpoints("llama", torch.bfloat16), folder, 3)


def pickled_shards_with_names_of_their_own(folder: Path, checkpoints: Checkpoints) -> Path:
    as_pickles(checkpoints("llama", torch.bfloat16), folder, 3)
    index = folder / "pytorch_model.bin.index.json"
    text = index.read_text()
    for number, path in enumerate(sorted(folder.glob("pytorch_model-*.bin"))):
        name = ("a.bin", "modelb.bin", "pytorch_c.bin")[number]
        text = text.replace(path.name, name)
        path.rename(folder / name)
    index.write_text(text)
    return folder


def one_pickle_that_an_index_names(folder: Path, checkpoints: Checkpoints) -> Path:
    as_pickles(checkpoints("llama", torch.bfloat16), folder, 1)
    names = torch.load(folder / "pytorch_model.bin")
    (folder / "pytorch_model.bin").rename(folder / "a.bin")
    index = {"weight_map": dict.fromkeys(names, "a.bin")}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


def gguf(folder: Path, checkpoints: Checkpoints) -> Path:
    folder.mkdir()
    write_gguf(folder / "tiny.gguf", 3)
    return folder / "tiny.gguf"


def metas(folder: Path, checkpoints: Checkpoints) -> Path:
    write_native(folder, parts=2, rope_theta=500000.0, use_scaled_rope=True)
    return folder


def an_output_of_ours(folder: Path, checkpoints: Checkpoints) -> Path:
    """One file, with the file of its edit under both names that it ever had."""
    source = one_file(folder / "source", checkpoints)
    out = folder / "first"
    write(source, out, "rank-one")
    shutil.copy(out / EDIT_FILE, out / "gloss_edit.safetensors")
    return out


SOURCES = [
    one_file, shards, pickled, pickled_shards, pickled_shards_with_names_of_their_own,
    one_pickle_that_an_index_names, gguf, metas, an_output_of_ours,
]  # fmt: skip


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = {name: f"{kind.__module__}:{kind.__name__}" for name, kind in METHODS.items()}
    install(tmp_path / "site", monkeypatch, "toy-methods", {"gloss_convert.methods": entries})


def write(source: Path, out: Path, method: str, output: str = "checkpoint") -> Manifest:
    options = {"layer": "1", "scale": "0.5"}
    recipe = Recipe(
        source=str(source), method=method, num_pairs=32, guard=False, options=options, output=output
    )
    return converter.convert(recipe, out)


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize("method", ["rank-one", "created-bias", "added-file"])
@pytest.mark.parametrize("kind", SOURCES)
def test_every_reader_loads_the_edited_checkpoint_and_nothing_else(
    kind: Callable[[Path, Checkpoints], Path], method: str, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    source, out = kind(tmp_path / "model", checkpoints), tmp_path / "out"
    manifest = write(source, out, method)
    found = resolve(str(source))
    names = {*make_plan(found.config, found.weight_map, found.headers()).names.tensors}
    created = {tensor.name for tensor in manifest.edit.created}
    assert bool(created) is (method == "created-bias")
    expected = dict(tensors_in([out / name for name in manifest.shards]))
    assert expected.keys() == names | created
    assert len(manifest.edited) == (method == "rank-one")
    for reader in READERS:
        loaded = list(reader(out))
        assert max(Counter(name for name, _ in loaded).values()) == 1
        assert {name for name, _ in loaded} == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded)
    weights = {path.relative_to(out).as_posix() for path in out.rglob("*") if is_weights(path)}
    assert weights == manifest.shards.keys()
    assert converter.verify(out, str(source)) == []


def is_weights(path: Path) -> bool:
    return path.name.endswith(WEIGHTS)


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize("kind", [one_file, gguf])
def test_of_an_adapter_one_file_looks_like_weights(
    kind: Callable[[Path, Checkpoints], Path], checkpoints: Checkpoints, tmp_path: Path
) -> None:
    source, out = kind(tmp_path / "model", checkpoints), tmp_path / "out"
    write(source, out, "rank-one", "adapter")
    (found,) = (path.name for path in out.rglob("*") if is_weights(path))
    assert found == "adapter_model.safetensors"
    assert (out / EDIT_FILE).is_file()


@pytest.fixture(scope="module")
def outputs(
    checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Outputs by the kind of source, made once."""
    root, made = tmp_path_factory.mktemp("outputs"), dict[str, Path]()

    def get(kind: str) -> Path:
        if kind not in made:
            source = {"shards": shards, "gguf": gguf}[kind](root / kind, checkpoints)
            options = {"layers": "1", "rank": "1"}
            made[kind] = root / f"{kind}-out"
            recipe = Recipe(
                source=str(source), method="random", num_pairs=32, guard=False, options=options
            )
            converter.convert(recipe, made[kind])
        return made[kind]

    return get


def problems(folder: Path, manifest: dict[str, object]) -> list[str]:
    put(folder, manifest)
    read = read_manifest(folder)
    return list(check_readers(folder, read, output_of(read.run.output), {}))


@pytest.mark.parametrize(
    "name",
    ["gloss_edit.safetensors", "notes/vectors.safetensors", "notes/a/x.bin", "U.PT", "u.npz"],
)
def test_what_is_not_a_weight_may_not_look_like_one(
    name: str, outputs: Callable[[str], Path], tmp_path: Path
) -> None:
    out = copy_of(outputs("shards"), tmp_path / "out")
    manifest = load_manifest(out)
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    save_file({"U": torch.ones(2)}, out / name)
    record(out, manifest, name)
    assert [text.partition(":")[0] for text in problems(out, manifest)] == [name]
    record(out, manifest, name, copied=True)  # what the source has goes along under its name
    assert problems(out, manifest) == []


def test_shards_that_a_reader_leaves_out_are_found(
    outputs: Callable[[str], Path], tmp_path: Path
) -> None:
    out = copy_of(outputs("shards"), tmp_path / "out")
    manifest, index = load_manifest(out), json.loads((out / INDEX).read_text())
    first, second, *_ = sorted(path.name for path in out.glob("model-*.safetensors"))

    def placed(name: str, new: str) -> dict[str, str]:
        return {t: new if s == name else s for t, s in index["weight_map"].items()}

    (out / INDEX).write_text(json.dumps({"weight_map": placed(first, second)}))
    assert [text.split(":")[0] for text in problems(out, manifest)] == [first]
    (out / INDEX).write_text(
        json.dumps({"weight_map": index["weight_map"] | {"x": "y.safetensors"}})
    )
    assert [text.split(":")[0] for text in problems(out, manifest)] == ["y.safetensors"]
    for name, starts in ((SINGLE, [SINGLE]), ("other.safetensors", ["other.safetensors"])):
        (out / INDEX).write_text(json.dumps({"weight_map": placed(first, name)}))
        altered = load_manifest(out)
        altered["files"][name] = altered["files"].pop(first) | {"source": first}
        assert [text.split(":")[0] for text in problems(out, altered)] == starts
        put(out, manifest)
    del manifest["files"][INDEX]
    assert [text.split(":")[0] for text in problems(out, manifest)] == [f"{INDEX} is missing"]


def without_theta(config: dict[str, object]) -> None:
    del config["rope_theta"]


def with_another_theta(config: dict[str, object]) -> None:
    config["rope_theta"] = 3.0


def with_new_scaling(config: dict[str, object]) -> None:
    config["rope_parameters"] = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}


def without_a_dtype(config: dict[str, object]) -> None:
    del config["torch_dtype"]


def with_positions_that_make_no_sense(config: dict[str, object]) -> None:
    config["rope_parameters"] = {"full_attention": [1]}


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (without_theta, "rope_theta"),
        (with_another_theta, "rope_theta"),
        (with_new_scaling, "rope_scaling"),
        (without_a_dtype, "torch_dtype"),
        (with_positions_that_make_no_sense, "rope_theta"),
    ],
)
def test_a_config_that_we_make_says_the_same_to_old_readers(
    change: Callable[[dict[str, object]], None],
    key: str,
    outputs: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    for kind, expected in (("gguf", [f"config.json: {key} differs"]), ("shards", [])):
        out = copy_of(outputs(kind), tmp_path / kind)
        assert problems(out, load_manifest(out)) == []
        config = json.loads((out / "config.json").read_text())
        config = {"rope_theta": 0, "torch_dtype": ""} | config  # a copy may say anything
        change(config)
        (out / "config.json").write_text(json.dumps(config))
        found = [text.partition(" from ")[0] for text in problems(out, load_manifest(out))]
        assert found == expected


def test_a_chat_template_that_we_write_is_in_both_places(
    outputs: Callable[[str], Path], tmp_path: Path
) -> None:
    out = copy_of(outputs("gguf"), tmp_path / "out")
    (out / "chat_template.jinja").write_text("{{ messages }}")
    (found,) = problems(out, load_manifest(out))
    assert found.startswith("tokenizer_config.json")


@pytest.mark.usefixtures("package")
def test_verify_says_it(cli: Cli, outputs: Callable[[str], Path], tmp_path: Path) -> None:
    out = copy_of(outputs("shards"), tmp_path / "out")
    manifest = load_manifest(out)
    (out / EDIT_FILE).rename(out / "gloss_edit.safetensors")
    manifest["files"]["gloss_edit.safetensors"] = manifest["files"].pop(EDIT_FILE)
    manifest["edit"]["file"] = "gloss_edit.safetensors"
    put(out, manifest)
    cli("verify", out, code=8, says="gloss_edit.safetensors: readers that take all files")
