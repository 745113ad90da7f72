"""A change of bit patterns: exact in both directions, and what verification makes of that."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import converter
from converter.checkpoints.names import EDIT_FILE
from converter.edits.base import Edit
from converter.edits.deltas import AddBits
from converter.edits.rounding_bounds import sha256_undone
from converter.errors import CheckpointError
from converter.models.edited import edited as edits
from converter.outputs.base import sha256_of_tensor
from converter.release.manifest import read_manifest
from tests.builders.adversary import copy_of, reseal
from tests.builders.errors import refused
from tests.builders.invoke import Cli
from tests.builders.methods import METHODS
from tests.builders.models import Checkpoints, planned, tiny_recipe
from tests.builders.packages import install
from tests.test_edit import D, F, edited, stored, target
from tests.test_quantization import BLOCKS, as_fp8
from tests.test_streamed import Opened, difference, log_p

EVERY = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).short()
"""All patterns of 16 bits."""


def finite(dtype: torch.dtype) -> Tensor:
    """All finite numbers of 16 bits, both zeros among them."""
    numbers = EVERY.view(dtype)
    return numbers[numbers.isfinite()]


def bits(x: Tensor) -> Tensor:
    return x.view({2: torch.int16, 4: torch.int32}[x.itemsize])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_becomes_any_other_exactly(dtype: torch.dtype) -> None:
    """From each to another, over zero and from the smallest to the largest: bits, not values."""
    before = finite(dtype)[None]
    after = before[:, torch.randperm(before.shape[1], generator=torch.Generator().manual_seed(0))]
    delta = AddBits.between(before, after.float())
    everything = slice(None), slice(None)
    exact = torch.empty(before.shape, dtype=torch.float64)
    delta.exact(before.double(), *everything, None, exact)
    assert torch.equal(bits(exact.to(dtype)), bits(after))
    assert torch.equal(bits(delta.undone(after, *everything)), bits(before))


@pytest.mark.parametrize("axis", [0, 1], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_written_rounded_to_nearest_and_can_be_taken_back(
    dtype: torch.dtype, axis: int
) -> None:
    torch.manual_seed(0)
    W = torch.randn(D, F).to(dtype)
    wanted = W.float() + 0.1 * torch.randn(D, F)
    delta = AddBits.between(W, wanted)
    on_disk = W.movedim(0, axis).contiguous()
    new, record = edited(delta, target(on_disk, axis), on_disk)
    assert torch.equal(bits(new.movedim(axis, 0).contiguous()), bits(wanted.to(dtype)))
    assert record.rounding_error == 0
    assert sha256_undone(stored(new, axis), delta, D) == sha256_of_tensor(on_disk)
    new.view(-1)[5] *= 2
    assert sha256_undone(stored(new, axis), delta, D) != sha256_of_tensor(on_disk)


def test_a_weight_of_another_dtype_is_refused(checkpoints: Checkpoints, tmp_path: Path) -> None:
    delta = AddBits.between(torch.zeros(32, 48).half(), torch.ones(32, 48))
    name = "model.layers.2.mlp.down_proj.weight"
    for source in (
        checkpoints("llama", torch.bfloat16),
        as_fp8(checkpoints("llama", torch.bfloat16), tmp_path / "fp8", BLOCKS),
    ):
        _, plan = planned(source)
        with refused(CheckpointError, found="it is for float16, and the weight is ..."):
            Edit({name: delta}).check(plan)


@pytest.fixture
def out(checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint with changed bits, to be altered."""
    entry = f"{METHODS['bits'].__module__}:{METHODS['bits'].__name__}"
    install(tmp_path / "site", monkeypatch, "bits", {"gloss_convert.methods": {"bits": entry}})
    source = checkpoints("llama", torch.bfloat16)
    recipe = tiny_recipe(
        source, num_pairs=64, method="bits", options={"scale": "0.05"}, guard=False
    )
    converter.convert(recipe, tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_hooks_of_a_streamed_model_know_its_weight(kind: str, checkpoints: Checkpoints) -> None:
    opened = Opened.of(checkpoints(kind))
    (weight,) = opened.plan.weights("down_proj", [2])
    W = opened.source.read(weight.shard, weight.info).movedim(weight.axis, 0)
    edit = Edit({weight.info.name: AddBits.between(W, W + 0.1 * torch.randn(W.shape))})
    found = list[Tensor]()
    for model in (opened.resident(), opened.streamed()):
        before = log_p(model)
        with edits(model.module, opened.plan, edit):
            found += [before, log_p(model)]
    assert difference(found[3], found[1]) < 1e-5
    assert difference(found[1], found[0]) > 1e-4


SAYS = "taking that back gives a tensor of another sha256"


def test_a_flipped_bit_is_found_without_the_source(out: Path, cli: Cli, tmp_path: Path) -> None:
    """In the weight, and in the file of the change, with all digests made to agree."""
    cli("verify", out, code=0)
    (name,) = (tensor.name for tensor in read_manifest(out).edited)
    other = copy_of(out, tmp_path / "weight")
    shard = next(p for p in other.glob("model-*.safetensors") if name in load_file(p))
    tensors = load_file(shard)
    bits(tensors[name])[3, 4] ^= 1
    save_file(tensors, shard, {"format": "pt"})
    reseal(other, shard.name)
    cli("verify", other, code=8, says=SAYS)
    other = copy_of(out, tmp_path / "change")
    tensors = load_file(other / EDIT_FILE)
    tensors["d"][7, 8] ^= 1
    save_file(tensors, other / EDIT_FILE, {"format": "pt"})
    reseal(other, EDIT_FILE)
    cli("verify", other, code=8, says=SAYS)


def test_a_change_for_another_dtype_is_no_edit_of_the_tensor(out: Path) -> None:
    tensors = load_file(out / EDIT_FILE)
    save_file({**tensors, "like": torch.empty(0).half()}, out / EDIT_FILE, {"format": "pt"})
    reseal(out, EDIT_FILE)
    (said,) = converter.verify(out)
    assert "it is for float16, and the weight is bfloat16" in said
