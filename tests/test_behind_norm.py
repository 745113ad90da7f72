"""A subspace taken out where a norm stands between the last weight of an FFN and what it adds."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from converter.checkpoints.names import EDIT_FILE
from converter.checkpoints.resolve import resolve
from converter.entrypoints.convert import convert
from converter.entrypoints.verify import verify
from converter.methods.behind_norm import removal_behind
from converter.release.manifest import read_manifest
from tests.builders.adversary import load_manifest, put, record
from tests.builders.models import TINY, Checkpoints, tiny_recipe

Made = tuple[Path, Path]


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def before(U: Tensor, g: Tensor) -> Tensor:
    """orth(diag(g) U), which is taken out of the weight."""
    Q: Tensor = torch.linalg.qr(g[:, None] * U).Q
    return Q


@pytest.mark.parametrize("a", [0.3, 1.0])
def test_the_subspace_itself_is_taken_out_of_what_the_norm_gives(a: float) -> None:
    """f' - f is -a U U^T f, to the weight of the smallest gains; projecting W takes much more."""
    g = torch.logspace(0, 2, 200, dtype=torch.float64)[torch.randperm(200)]
    U, y = torch.linalg.qr(drawn(1, 200, 3)).Q, drawn(2, 200, 1000)
    delta = removal_behind(U.float(), g.float(), a)
    assert delta.factor == a
    Q, f = before(U, g), g[:, None] * y
    taken = -g[:, None] * (delta.whole(y) - y)
    assert float((U.T @ (f - taken) - (1 - a) * U.T @ f).norm() / (U.T @ f).norm()) < 1e-5
    least = a * (U.T @ f).norm()
    assert float(taken.norm() / least) == pytest.approx(1, abs=0.1)
    orthogonal = a * g[:, None] * (Q @ (Q.T @ y))
    assert float(orthogonal.norm() / least) > 1.5


def test_equal_gains_make_it_the_orthogonal_projection() -> None:
    U, y = torch.linalg.qr(drawn(3, 40, 2)).Q, drawn(4, 40, 9)
    delta = removal_behind(U.float(), torch.full((40,), 7.0), 1.0)
    torch.testing.assert_close(delta.whole(y), y - U @ (U.T @ y), atol=1e-6, rtol=1e-6)


def test_a_channel_without_gain_is_not_changed_beyond_measure() -> None:
    g = torch.tensor([0.0, *torch.linspace(0.5, 2, 39).tolist()])
    delta = removal_behind(torch.linalg.qr(drawn(5, 40, 2)).Q.float(), g, 1.0)
    assert float(delta.A.abs().max()) < 10


@pytest.fixture(scope="module")
def made(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A bfloat16 Gemma 2 and its conversion. Read only."""
    source = checkpoints("gemma2", torch.bfloat16)
    out = tmp_path_factory.mktemp("behind") / "out"
    convert(tiny_recipe(source, options={**TINY, "factors": "2:0.5"}), out)
    return source, out


def test_its_record_is_verified(made: Made) -> None:
    source, out = made
    assert verify(out) == verify(out, resolve(str(source))) == []
    for entry in read_manifest(out).edited:
        assert entry.kind == "remove-oblique"
        assert {*entry.measures} == {"along", "leakage", "factor"}
        assert entry.measures["factor"] == (0.5 if entry.layer == 2 else 1.0)
        assert entry.measures["leakage"] < 0.05


def nothing_along(out: Path, manifest: dict[str, Any], entry: dict[str, Any]) -> None:
    entry["measures"]["along"] = 0.0


def more_than_all(out: Path, manifest: dict[str, Any], entry: dict[str, Any]) -> None:
    entry["measures"]["along"] = 1.2


def another_factor(out: Path, manifest: dict[str, Any], entry: dict[str, Any]) -> None:
    entry["measures"]["factor"] = 0.9


def a_smaller_change(out: Path, manifest: dict[str, Any], entry: dict[str, Any]) -> None:
    entry["relative_change"] *= 0.5


def orthogonal(out: Path, manifest: dict[str, Any], entry: dict[str, Any]) -> None:
    """A of the edit's file is U: another edit, which also leaves nothing along U."""
    tensors = load_file(out / EDIT_FILE)
    tensors[entry["tensors"]["A"]] = tensors[entry["tensors"]["U"]].clone()
    save_file(tensors, out / EDIT_FILE, {"format": "pt"})
    record(out, manifest, EDIT_FILE)


@pytest.mark.parametrize(
    "forge", [nothing_along, more_than_all, another_factor, a_smaller_change, orthogonal]
)
def test_a_forged_record_is_found(
    forge: Callable[[Path, dict[str, Any], dict[str, Any]], None],
    made: Made,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    shutil.copytree(made[1], out)
    manifest = load_manifest(out)
    forge(out, manifest, next(e for e in manifest["edited"] if e["layer"] == 3))
    put(out, manifest)
    assert verify(out)
    assert verify(out, resolve(str(made[0])))
