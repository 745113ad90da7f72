"""What differs between two checkpoints is found, measured and put down to its cause."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from converter.checkpoints.names import EDIT_FILE, MANIFEST
from converter.checkpoints.safetensors.header import read_header
from converter.edits.spectrum import Place, spectrum
from converter.release.manifest import read_manifest
from tests.builders.adversary import load_manifest
from tests.builders.invoke import Cli
from tests.builders.models import Checkpoints, make_checkpoint, tiny_args

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def edit(folder: Path, name: str, change: Callable[[Tensor], Tensor]) -> None:
    """Change one tensor of a checkpoint in place."""
    for path in folder.glob("model*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            tensors[name] = change(tensors[name]).contiguous()
            save_file(tensors, path, {"format": "pt"})


def diff(cli: Cli, *args: object) -> dict[str, Any]:
    result = cli("diff", *args, "--json", code=0)
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_a_checkpoint_and_its_copy_are_equal(
    checkpoints: Checkpoints, cli: Cli, tmp_path: Path
) -> None:
    source = checkpoints("llama")
    other = make_checkpoint(tmp_path / "other", shard="1GB")  # the same tensors in one file
    found = diff(cli, source, shutil.copytree(source, tmp_path / "copy"))
    assert found["equal"]
    found = diff(cli, source, other)
    assert (found["changed"], found["only_in_a"], found["only_in_b"]) == ([], [], [])
    assert found["files"]["only_in_a"] == ["model.safetensors.index.json"]
    result = cli("diff", source, source, "--exit-code", code=0)
    assert "0 of 75 tensors differ" in result.stdout


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_planted_change_of_rank_three_is_found_as_such(
    dtype: torch.dtype, checkpoints: Checkpoints, cli: Cli, tmp_path: Path
) -> None:
    source = checkpoints("llama", dtype)
    out = shutil.copytree(source, tmp_path / "out")
    U = torch.linalg.qr(random(32, 8)).Q
    save_file({"U": U[:, :4].contiguous()}, tmp_path / "U.safetensors")
    down = "model.layers.{}.mlp.down_proj.weight"

    def planted(columns: slice) -> Callable[[Tensor], Tensor]:
        inside = U[:, columns]
        return lambda W: (W.float() + 0.3 * inside @ random(inside.shape[1], 48)).to(W.dtype)

    edit(out, down.format(2), planted(slice(3)))
    edit(out, down.format(3), planted(slice(4, 6)))
    edit(out, down.format(4), lambda W: (W.float() + 0.1 * random(*W.shape)).to(W.dtype))
    edit(out, "model.norm.weight", lambda w: w * 2)
    found = diff(cli, source, out, "--subspace", tmp_path / "U.safetensors")
    two, three, four, norm = (entry["measured"] for entry in found["changed"])
    noise = 1e-6 if dtype == torch.float32 else 1e-4
    assert two["rank"] == 3
    assert two["in_span"] == pytest.approx(1.0, abs=noise)
    assert three["rank"] == 2
    assert three["in_span"] == pytest.approx(0.0, abs=noise)
    assert four["rank"] == 17
    assert 0.05 < four["in_span"] < 0.3  # 4 of 32 dimensions
    assert (norm["rank"], norm["relative_change"]) == (1, 1.0)
    result = cli("diff", source, out, "--exit-code", code=8)
    assert "  >16" in result.stdout
    assert "4 of 75 tensors differ" in result.stdout


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_oss", "gemma2"])
def test_a_conversion_is_exactly_what_its_manifest_says(
    kind: str, checkpoints: Checkpoints, cli: Cli, tmp_path: Path
) -> None:
    source, out = checkpoints(kind, torch.bfloat16), tmp_path / "out"
    cli("convert", source, out, "--num-pairs", 64, *tiny_args(rank=2), code=0)
    found = diff(cli, source, out)
    assert found["subspace"] == EDIT_FILE
    changed = {entry["name"]: entry["measured"] for entry in found["changed"]}
    edited = {entry.name: entry for entry in read_manifest(out).edited}
    assert changed.keys() == edited.keys()
    for name, measured in changed.items():
        if edited[name].role == "down_proj":  # a bias may change by no more than rounding does
            assert measured["rank"] == 2, name
            assert measured["in_span"] > 0.999, name
        assert measured["relative_change"] == pytest.approx(edited[name].relative_change)
    assert found["files"]["only_in_b"] == ["SHA256SUMS", EDIT_FILE, MANIFEST]
    assert found["files"]["changed"] == ["README.md"]


def test_rounding_alone_has_no_rank(checkpoints: Checkpoints, cli: Cli, tmp_path: Path) -> None:
    """Another dtype changes every element and adds no direction."""
    found = diff(cli, checkpoints("llama"), checkpoints("llama", torch.bfloat16))
    assert len(found["changed"]) == 75
    for entry in found["changed"]:
        assert entry["dtype"] == ["F32", "BF16"]
        assert entry["measured"]["rank"] == 0
        assert entry["measured"]["relative_change"] < 3e-3


def test_the_rank_holds_at_the_size_of_a_real_matrix(tmp_path: Path) -> None:
    """A direction of a thousandth of the norm, beside rounding to bfloat16."""
    W = random(1024, 2816).bfloat16()
    left, right = torch.linalg.qr(random(1024, 2)).Q, torch.linalg.qr(random(2816, 2)).Q
    scale = torch.tensor([1e-2, 2e-3]) * float(W.float().norm())
    after = (W.float() + (left * scale) @ right.T).bfloat16()
    for name, tensor in (("a", W), ("b", after)):
        save_file({"W": tensor}, tmp_path / name)
    info = read_header(tmp_path / "a").tensors["W"]
    with (tmp_path / "a").open("rb", 0) as a, (tmp_path / "b").open("rb", 0) as b:
        found = spectrum(Place(a, info), Place(b, info), left.contiguous(), 0)
    assert found.rank == 2
    assert found.singular_values[:2] == pytest.approx([1e-2, 2e-3], rel=0.05)
    assert found.singular_values[2] < found.noise < 1e-3


def test_tensors_that_cannot_be_compared_are_named(
    checkpoints: Checkpoints, cli: Cli, tmp_path: Path
) -> None:
    source = make_checkpoint(tmp_path / "a", shard="1GB")
    tensors = load_file(source / "model.safetensors")
    out = shutil.copytree(source, tmp_path / "b")
    tensors["extra"] = torch.zeros(2)
    del tensors["model.norm.weight"]
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 3)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text((out / "config.json").read_text() + "\n")
    found = diff(cli, source, out)
    assert (found["only_in_a"], found["only_in_b"]) == (["model.norm.weight"], ["extra"])
    assert found["files"]["changed"] == ["config.json"]
    shape, nan = found["changed"]
    assert (shape["shape"], shape["measured"]) == ([[48, 32], [3, 3]], None)
    assert nan["measured"]["relative_change"] is None
    text = cli("diff", source, out).stdout
    assert "tensor extra: only in b" in text
    assert "shape [48, 32] -> [3, 3]" in text


def test_manifests_are_compared_by_their_leaves(
    converted: tuple[Path, Path], cli: Cli, tmp_path: Path
) -> None:
    manifest = load_manifest(converted[1])
    manifest["measurements"]["seconds"]["edit"] = 1e6
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    paths[0].write_text(json.dumps(manifest))
    manifest["run"]["seed"] = 7
    name = manifest["edited"][0]["name"]
    manifest["edited"][0]["norm"] = 0.5
    del manifest["run"]["forward"]
    paths[1].write_text(json.dumps(manifest))
    found = diff(cli, *paths)
    changed = {entry["path"]: (entry["a"], entry["b"]) for entry in found["changed"]}
    assert changed.keys() == {"run.seed", "run.forward", f"edited[{name}].norm"}
    assert changed["run.seed"] == (0, 7)
    assert "run.seed: 0 -> 7\n" in cli("diff", *paths).stdout
    assert diff(cli, paths[0], converted[1] / MANIFEST)["equal"]
    cli("diff", *paths, "--exit-code", code=8)
    result = cli("diff", paths[0], converted[1], code=2)
    assert "a manifest and a checkpoint cannot be compared" in result.stderr
