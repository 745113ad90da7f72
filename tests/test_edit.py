"""Theorems about the edit of one weight."""

import hashlib

import pytest
import torch
from torch import Tensor

from converter.edit import EditRecord, Projection, apply, output_first
from converter.errors import CheckpointError
from converter.header import TensorInfo
from converter.plan import Target
from converter.rounding import half_ulp, is_projection, rounding_bound

D, F, R = 24, 40, 3
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
NAMES = {**DTYPES, torch.float64: "F64"}


def basis(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    q: Tensor = torch.linalg.qr(torch.randn(D, R, generator=generator))[0]
    return q


def target(tensor: Tensor, axis: int = 0, role: str = "down_proj") -> Target:
    info = TensorInfo("w", NAMES[tensor.dtype], tuple(tensor.shape), 0, tensor.nbytes)
    return Target(info, "shard", 0, axis, role)


def edited(projection: Projection, target: Target, tensor: Tensor) -> tuple[Tensor, EditRecord]:
    found = apply(projection, target, tensor, "cpu")
    assert found is not None
    return found.tensor, found.record


def edit(tensor: Tensor, axis: int = 0, role: str = "down_proj", bias: bool = True) -> Tensor:
    projection = Projection({0: basis()}, bias)
    return edited(projection, target(tensor, axis, role), tensor)[0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_result_is_orthogonal_to_the_basis_to_rounding(dtype: torch.dtype) -> None:
    W = torch.randn(D, F).to(dtype)
    new, record = edited(Projection({0: basis()}), target(W), W)
    assert new.dtype == dtype
    left = float((basis().T @ new.float()).norm())
    assert left <= rounding_bound(new, record.norm)
    assert left / float((basis().T @ W.float()).norm()) == pytest.approx(record.leakage, rel=1e-3)
    assert record.leakage < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bound_does_not_hold_for_a_weight_that_was_not_edited(dtype: torch.dtype) -> None:
    W = torch.randn(D, F).to(dtype)
    assert float((basis().T @ W.float()).norm()) > 10 * rounding_bound(W, float(W.float().norm()))


def test_the_change_has_rank_at_most_r() -> None:
    W = torch.randn(D, F)
    values = torch.linalg.svdvals((edit(W) - W).double())
    assert values[R - 1] > 0.1
    assert values[R] < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
def test_editing_twice_changes_nothing_beyond_rounding(dtype: torch.dtype) -> None:
    once = edit(torch.randn(D, F).to(dtype))
    twice = edit(once)
    # What the second edit may move is what rounding left, plus one more rounding.
    change = (twice.double() - once.double()).norm()
    assert change <= 2 * half_ulp(once).norm() + 1e-5


def test_conv1d_and_linear_agree_on_transposed_copies() -> None:
    W = torch.randn(D, F)
    assert torch.allclose(edit(W, 0), edit(W.T.contiguous(), 1).T, atol=1e-6)
    assert edit(W.T.contiguous(), 1).is_contiguous()


def test_fused_weights_are_edited_like_their_slices() -> None:
    W = torch.randn(2, F, D)
    fused = edit(W, 2)
    assert torch.allclose(fused[1], edit(W[1].contiguous(), 1), atol=1e-6)
    assert output_first(W, 2).shape == (D, 2 * F)


def test_a_bias_is_projected_unless_it_is_kept() -> None:
    b = torch.randn(D)
    assert (basis().T @ edit(b, role="down_proj_bias")).abs().max() < 1e-6
    kept = apply(Projection({0: basis()}, False), target(b, 0, "down_proj_bias"), b, "cpu")
    assert kept is None


def test_layers_without_a_basis_are_left_alone() -> None:
    W = torch.randn(D, F)
    assert apply(Projection({1: basis()}), target(W), W, "cpu") is None


def test_energy_and_change_are_what_was_removed() -> None:
    W = torch.randn(D, F)
    new, record = edited(Projection({0: basis()}), target(W), W)
    removed = float((W - new).norm() / W.norm())
    assert record.relative_change == pytest.approx(removed, rel=1e-5)
    assert record.energy_removed == pytest.approx(removed**2, rel=1e-4)  # Pythagoras


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_are_refused_by_name(value: float) -> None:
    W = torch.randn(D, F)
    W[3, 4] = value
    with pytest.raises(CheckpointError, match="tensor w of shard holds NaN or Inf"):
        edit(W)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_an_ulp_is_half_the_distance_to_the_next_value(dtype: torch.dtype) -> None:
    smallest = torch.finfo(dtype).smallest_normal
    x = torch.tensor([1.0, 1.5, 2.0, 3.1, 1e-3, 0.0, smallest, smallest / 4]).to(dtype)
    up = torch.nextafter(x, torch.full_like(x, float("inf")))
    assert torch.equal(half_ulp(x), (up.double() - x.double()) / 2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bound_is_as_tight_as_one_rounding(dtype: torch.dtype) -> None:
    W = torch.randn(D, F).to(dtype)
    norm = float(W.float().norm())
    one_rounding = torch.finfo(dtype).eps / 2 * norm
    arithmetic = 1e-5 * norm
    assert 0.3 * one_rounding < rounding_bound(W, norm) < one_rounding + arithmetic


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_element_that_is_one_unit_off_is_not_the_projection(dtype: torch.dtype) -> None:
    W = torch.randn(D, F).to(dtype)
    new = edit(W)
    assert is_projection(new, W, basis())
    for row, column in ((0, 0), (D - 1, F - 1)):
        other = new.clone()
        up = torch.nextafter(new[row, column], torch.tensor(9.0, dtype=dtype))
        other[row, column] = torch.nextafter(up, torch.tensor(9.0, dtype=dtype))
        assert not is_projection(other, W, basis())


def test_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    W = torch.randn(D, F).bfloat16()
    whole = edited(Projection({0: basis()}), target(W), W)
    bound = rounding_bound(W, 1.0)
    monkeypatch.setattr("converter.edit.BLOCK", 3 * D)
    part = edited(Projection({0: basis()}), target(W), W)
    assert part[1].norm == pytest.approx(whole[1].norm)
    assert part[1].relative_change == pytest.approx(whole[1].relative_change)
    assert rounding_bound(W, 1.0) == pytest.approx(bound)
    assert is_projection(part[0], W, basis())


def test_the_digests_are_those_of_the_stored_bytes() -> None:
    W = torch.randn(D, F).bfloat16()
    new, record = edited(Projection({0: basis()}), target(W), W)
    for tensor, digest in ((W, record.sha256_before), (new, record.sha256_after)):
        raw = tensor.view(torch.int16).numpy().tobytes()
        assert hashlib.sha256(raw).hexdigest() == digest


def test_float64_weights_are_edited_in_float64() -> None:
    W = torch.randn(D, F, dtype=torch.float64)
    values = torch.linalg.svdvals(edit(W) - W)
    assert values[R] < 1e-14
