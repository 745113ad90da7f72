"""Theorems about the edit of one weight."""

import hashlib
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from converter.checkpoints.safetensors.header import TensorInfo, to_bytes
from converter.checkpoints.safetensors.rewrite import Region, as_tensor
from converter.checkpoints.weights import Weight
from converter.edits import editor as editor_module
from converter.edits import rounding_bounds
from converter.edits.apply import WeightEdit
from converter.edits.deltas import (
    AddLowRank,
    AddToRows,
    Delta,
    RemoveOblique,
    RemoveSubspace,
    Replace,
    WeakenSubspace,
    delta_of,
    removal_of,
    tensors_of,
)
from converter.edits.editor import AIM, BLOCK, Editor, Rounding, absorb_residual, inverses
from converter.edits.engine import Engine
from converter.edits.rounding_bounds import (
    Stored,
    check_rounded,
    half_ulp,
    left_along,
    rounding_bound,
)
from converter.errors import CheckpointError
from converter.manifest import EditedTensor
from tests.builders.errors import refused

D, F, R = 24, 40, 3
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
NAMES = {**DTYPES, torch.float64: "F64"}


def basis(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    q: Tensor = torch.linalg.qr(torch.randn(D, R, generator=generator))[0]
    return q


def stored(tensor: Tensor, axis: int = 0) -> Stored:
    """As if it were in a file."""
    info = TensorInfo("w", NAMES[tensor.dtype], tuple(tensor.shape), 0, tensor.nbytes)
    entry = EditedTensor(
        name="w", shard="", layer=0, role="down_proj", axis=axis, shape=info.shape,
        dtype=info.dtype, kind="", tensors={}, sha256_before="", sha256_after=None, norm=0.0,
        relative_change=0.0, rounding_error=0.0, measures={}, requantized=None, lora=None,
    )  # fmt: skip
    raw = bytes(to_bytes(tensor))
    return Stored(lambda shard: io.BytesIO(raw), entry, {"w": info})  # type: ignore[arg-type, return-value]


def is_edit(new: Tensor, W: Tensor, delta: Delta, axis: int = 0, *, nearest: bool = True) -> bool:
    """What verification says of a weight and its source."""
    height = W.shape[axis]
    wrong, norms = check_rounded(stored(new, axis), stored(W, axis), delta, height, nearest=nearest)
    assert norms["W"] == pytest.approx(float(W.double().norm()))
    assert norms["change"] == pytest.approx(float((new.double() - W.double()).norm()))
    return wrong is None


def bound(W: Tensor, norm: float) -> float:
    """What rounding to nearest may leave."""
    left, units, _ = left_along(stored(W), basis())
    assert left == pytest.approx(float((basis().double().T @ W.double()).norm()))
    return rounding_bound(units, D, norm)


def target(tensor: Tensor, axis: int = 0, is_bias: bool = False) -> Weight:
    info = TensorInfo("w", NAMES[tensor.dtype], tuple(tensor.shape), 0, tensor.nbytes)
    return Weight(info, "shard", "down_proj", 0, axis, is_bias=is_bias)


def edited(
    delta: Delta, target: Weight, tensor: Tensor, rounding: Rounding = "nearest"
) -> tuple[Tensor, EditedTensor]:
    records: list[EditedTensor] = []
    change = WeightEdit(target, delta, {}, Engine(rounding=rounding)).change(records)
    region = Region(io.BytesIO(bytes(to_bytes(tensor))), target.info)  # type: ignore[arg-type]
    new = b"".join(bytes(part) for part in change(region))
    return as_tensor(bytearray(new), target.info), records[0]


def edit(tensor: Tensor, axis: int = 0, is_bias: bool = False) -> Tensor:
    return edited(RemoveSubspace(basis()), target(tensor, axis, is_bias), tensor)[0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_result_is_orthogonal_to_the_basis_to_rounding(dtype: torch.dtype) -> None:
    W = torch.randn(D, F).to(dtype)
    new, record = edited(RemoveSubspace(basis()), target(W), W)
    assert new.dtype == dtype
    left = float((basis().double().T @ new.double()).norm())
    assert left <= bound(new, record.norm)
    there = float((basis().double().T @ W.double()).norm())
    assert left / there == pytest.approx(record.measures["leakage"], rel=1e-3)
    assert record.measures["leakage"] < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bound_does_not_hold_for_a_weight_that_was_not_edited(dtype: torch.dtype) -> None:
    W = torch.randn(D, F).to(dtype)
    assert float((basis().T @ W.float()).norm()) > 10 * bound(W, float(W.float().norm()))


def test_fused_weights_are_edited_like_their_slices() -> None:
    W = torch.randn(2, F, D)
    fused = edit(W, 2)
    assert torch.allclose(fused[1], edit(W[1].contiguous(), 1), atol=1e-6)
    other = W.transpose(1, 2).contiguous()
    assert torch.equal(edit(other, 1)[1], edit(other[1].contiguous()))


def test_a_bias_is_projected_like_a_column() -> None:
    b = torch.randn(D)
    assert (basis().T @ edit(b, is_bias=True)).abs().max() < 1e-6


def test_energy_and_change_are_what_was_removed() -> None:
    W = torch.randn(D, F)
    new, record = edited(RemoveSubspace(basis()), target(W), W)
    removed = float((W - new).norm() / W.norm())
    assert record.relative_change == pytest.approx(removed, rel=1e-5)
    assert record.measures["energy_removed"] == pytest.approx(removed**2, rel=1e-4)  # Pythagoras


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_are_refused_by_name(value: float) -> None:
    W = torch.randn(D, F)
    W[3, 4] = value
    with refused(CheckpointError, what="tensor w of shard holds NaN or Inf"):
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
    assert 0.3 * one_rounding < bound(W, norm) < one_rounding + arithmetic


def test_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """To nearest, every split into blocks of rows and strips of columns gives the same bytes."""
    W = torch.randn(D, F).bfloat16()
    whole = edited(RemoveSubspace(basis()), target(W), W)
    before = bound(W, 1.0)
    monkeypatch.setattr(rounding_bounds, "BLOCK", 5)
    monkeypatch.setattr(editor_module, "BLOCK", 7)
    monkeypatch.setattr(editor_module, "STRIP", 40)
    part = edited(RemoveSubspace(basis()), target(W), W)
    assert torch.equal(part[0], whole[0])
    assert part[1].norm == pytest.approx(whole[1].norm)
    assert part[1].relative_change == pytest.approx(whole[1].relative_change)
    assert bound(W, 1.0) == pytest.approx(before)
    assert is_edit(part[0], W, RemoveSubspace(basis()))


@pytest.mark.parametrize("a", [0.4, 1.0])
@pytest.mark.parametrize("rounding", ["nearest", "null-space"])
def test_an_oblique_projection_leaves_its_share_along_the_subspace(
    rounding: Rounding, a: float
) -> None:
    """U^T W' is (1 - a) U^T W although what is taken lies along A, and the record says how far."""
    torch.manual_seed(3)
    delta, W = oblique(orthonormal(640, 2), a), torch.randn(640, F).bfloat16()
    new, record = edited(delta, target(W), W, rounding)
    P, kept = (delta.U.double().T @ tensor.double() for tensor in (W, new))
    leakage = float((kept - (1 - a) * P).norm() / P.norm())
    assert record.measures["leakage"] == pytest.approx(leakage, rel=1e-3)
    assert leakage < (5e-4 if rounding == "null-space" else 0.01)
    norm = float(W.double().norm())
    assert record.measures["along"] == pytest.approx(float(P.norm()) / norm)
    error = float((new.double() - exactly(delta, W)).norm()) / norm
    assert record.rounding_error == pytest.approx(error, rel=1e-3)
    least, most = delta.moved(record.measures["along"])
    assert least - error <= record.relative_change <= most + error
    assert 1.02 * least < most
    assert is_edit(new, W, delta, nearest=rounding == "nearest")
    assert not is_edit(new, W, oblique(delta.U, a - 0.02), nearest=rounding == "nearest")


@pytest.mark.parametrize("rounding", ["nearest", "null-space"])
def test_a_weakened_subspace_keeps_its_share_and_can_be_restored(rounding: Rounding) -> None:
    """U^T W' is (1 - a) U^T W, column by column; W follows from W' up to its rounding."""
    torch.manual_seed(3)
    U, W, a = orthonormal(640, 2), torch.randn(640, F).bfloat16(), 0.7
    new, record = edited(removal_of(U, a), target(W), W, rounding)
    P, kept = (U.double().T @ tensor.double() for tensor in (W, new))
    leakage = float((kept - (1 - a) * P).norm() / P.norm())
    assert record.measures["leakage"] == pytest.approx(leakage, rel=1e-3)
    assert leakage < (2e-4 if rounding == "null-space" else 0.01)
    assert record.measures["factor"] == a
    along = float(P.norm() / W.double().norm())
    assert record.relative_change == pytest.approx(a * along, abs=record.rounding_error)
    assert record.measures["energy_removed"] == pytest.approx((1 - (1 - a) ** 2) * along**2)
    assert is_edit(new, W, removal_of(U, a), nearest=rounding == "nearest")
    assert not is_edit(new, W, removal_of(U, 0.72), nearest=rounding == "nearest")
    restored = new.double() + a / (1 - a) * U.double() @ kept
    error = float((restored - W.double()).norm() / W.double().norm())
    assert error == pytest.approx(record.rounding_error, rel=0.1)
    assert error < torch.finfo(torch.bfloat16).eps


def test_the_digests_are_those_of_the_stored_bytes() -> None:
    W = torch.randn(D, F).bfloat16()
    new, record = edited(RemoveSubspace(basis()), target(W), W)
    for tensor, digest in ((W, record.sha256_before), (new, record.sha256_after)):
        raw = tensor.view(torch.int16).numpy().tobytes()
        assert hashlib.sha256(raw).hexdigest() == digest


def test_float64_weights_are_edited_in_float64() -> None:
    W = torch.randn(D, F, dtype=torch.float64)
    values = torch.linalg.svdvals(edit(W) - W)
    assert values[R] < 1e-14


def orthonormal(rows: int, rank: int, spread: float = 0.0) -> Tensor:
    """Rows differ in size by a factor of e^spread or so."""
    q: Tensor = torch.linalg.qr(
        torch.randn(rows, rank) * torch.exp(spread * torch.randn(rows, 1))
    ).Q
    return q


def projected(W: Tensor, U: Tensor, rounding: Rounding) -> tuple[Tensor, dict[str, float]]:
    editor = Editor(RemoveSubspace(U), len(U), W.dtype, rounding, "cpu")
    new = torch.cat(list(editor.edit(lambda i, j: W[i:j], W.shape[1])))
    return new, editor.norms()


def exact(W: Tensor, U: Tensor) -> Tensor:
    return W.double() - U.double() @ (U.double().T @ W.double())


def test_what_is_left_is_shared_among_all_rows_to_come() -> None:
    U = orthonormal(150, 3).double()
    found = inverses(U, [slice(0, 50), slice(50, 100), slice(100, 150)])
    for start, inverse in zip((0, 50, 100), found, strict=True):
        later = U[start:]
        torch.testing.assert_close(
            inverse @ (later.T @ later), torch.eye(3).double(), atol=2e-3, rtol=0
        )


def test_a_norm_that_rounding_makes_negative_is_zero() -> None:
    editor = Editor(RemoveSubspace(orthonormal(64, 1)), 64, torch.float32, "nearest", "cpu")
    editor.squares["left"] -= 1e-30
    assert editor.norms()["left"] == 0


CASES: dict[str, Callable[[], Tensor]] = {
    "rank 8": lambda: orthonormal(1024, 8),
    "rank 1, corrections below half a unit": lambda: orthonormal(4096, 1),
    "rows of all sizes": lambda: orthonormal(1000, 4, 1.0),
    "faint last rows": lambda: (
        torch.linalg.qr(torch.cat([torch.randn(300, 3), 1e-3 * torch.randn(600, 3)])).Q
    ),
    "only the first rows": lambda: torch.cat([orthonormal(96, 2), torch.zeros(500, 2)]),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_null_space_rounding_leaves_far_less_along_the_basis(case: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    U = CASES[case]()
    W = (0.02 * torch.randn(len(U), 300)).to(dtype)
    there, best = U.double().T @ W.double(), exact(W, U)
    new, norms = projected(W, U, "null-space")
    nearest, _ = projected(W, U, "nearest")
    left = (U.double().T @ new.double()).norm() / there.norm()
    assert left < 3 * AIM
    assert left < 0.2 * (U.double().T @ nearest.double()).norm() / there.norm() or left < AIM
    # and costs little: the error against the exact result hardly grows, no element goes far;
    # (where most rows would not change at all, it becomes what rounding costs elsewhere)
    usual = torch.finfo(dtype).eps / 4 * W.double().norm()
    assert (new.double() - best).norm() < max(1.1 * (nearest.double() - best).norm(), usual)
    assert is_edit(new, W, RemoveSubspace(U), nearest=False)
    assert norms["left"] == pytest.approx(float((U.double().T @ new.double()).norm()), rel=1e-6)
    assert norms["error"] == pytest.approx(float((new.double() - best).norm()), rel=1e-2)
    assert norms["change"] == pytest.approx(float((new.double() - W.double()).norm()), rel=1e-6)


def test_what_float32_leaves_is_measured_too() -> None:
    torch.manual_seed(0)
    U, W = orthonormal(300, 3), torch.randn(300, 200)
    new, norms = projected(W, U, "null-space")
    assert torch.equal(new, projected(W, U, "nearest")[0])
    left = float((U.double().T @ new.double()).norm())
    assert norms["left"] == pytest.approx(left, rel=0.01)
    assert 0 < left < 1e-6 * norms["P"]


def test_the_order_of_sums_does_not_change_a_byte() -> None:
    """Other BLAS libraries and threads add in another order; float64 makes up for that."""
    torch.manual_seed(0)
    W = (0.02 * torch.randn(700, 900)).bfloat16()
    U = orthonormal(700, 4)
    swap = torch.randperm(4)
    for rounding in ("nearest", "null-space"):
        one, two = projected(W, U, rounding)[0], projected(W, U[:, swap], rounding)[0]
        assert torch.equal(one, two)


def test_settle_takes_only_steps_that_help_and_ends_at_its_aim() -> None:
    torch.manual_seed(0)
    left, U = torch.randn(3, 50).double(), orthonormal(200, 3).double()
    step = 2.0 * torch.randn(200, 50).double()
    step[:, 7] = 0.0
    before, aim = left.clone(), 0.2 * float(left.norm())
    taken = absorb_residual(left, U, step, aim)
    assert torch.allclose(left, before + U.T @ (step * taken))
    assert (left.norm(dim=0) <= before.norm(dim=0)).all()
    assert left.norm() <= aim
    assert not taken[:, 7].any()
    assert not taken[U.norm(dim=1).argmin()].any()  # the aim was reached before the lightest row


def test_rows_are_read_twice_and_in_order() -> None:
    """Memory does not depend on D: nobody asks for more than a block of rows."""
    W, asked = torch.randn(1000, 30).bfloat16(), []

    def rows(i: int, j: int) -> Tensor:
        asked.append((i, j))
        return W[i:j]

    delta = RemoveSubspace(orthonormal(1000, 2))
    for _ in Editor(delta, 1000, W.dtype, "null-space", "cpu").edit(rows, 30):
        pass
    half = len(asked) // 2
    assert asked[:half] == asked[half:]
    assert all(j - i <= BLOCK for i, j in asked)
    assert [i for i, _ in asked[:half]] == [0, *(j for _, j in asked[: half - 1])]
    assert asked[half - 1][1] == 1000


def oblique(U: Tensor, a: float) -> RemoveOblique:
    """Weighted by numbers that differ a hundredfold, as the gains of norms do."""
    weighted = U.double() * torch.logspace(0, 2, len(U), dtype=torch.float64)[:, None]
    A = weighted @ torch.linalg.inv(U.double().T @ weighted)
    return RemoveOblique(U, A.float(), torch.tensor([a], dtype=torch.float64))


KINDS: dict[str, Callable[[], Delta]] = {
    "remove-subspace": lambda: RemoveSubspace(basis()),
    "weaken-subspace": lambda: removal_of(basis(), 0.3),
    "remove-oblique": lambda: oblique(basis(), 0.3),
    "add-low-rank": lambda: AddLowRank(torch.randn(D, 2), torch.randn(2, F)),
    "add-to-rows": lambda: AddToRows(torch.tensor([0, 5, D - 1]), torch.randn(F)),
    "replace": lambda: Replace(torch.randn(D, F)),
}


def exactly(delta: Delta, W: Tensor) -> Tensor:
    """W' as the kind's formula has it, in float64 and not rounded."""
    W = W.double()
    if isinstance(delta, RemoveSubspace):
        return W - delta.factor * delta.written.double() @ (delta.U.double().T @ W)
    if isinstance(delta, AddLowRank):
        return W + delta.B.double() @ delta.A.double()
    if isinstance(delta, AddToRows):
        chosen = torch.zeros(len(W), 1, dtype=torch.float64)
        chosen[delta.rows] = 1
        return W + chosen * delta.v.double()
    assert isinstance(delta, Replace)
    return delta.new.double()


@pytest.mark.parametrize("axis", [0, 1], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_streamed_rounded_and_verified_alike(
    kind: str, dtype: torch.dtype, axis: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    monkeypatch.setattr(editor_module, "BLOCK", 7)
    monkeypatch.setattr(rounding_bounds, "BLOCK", 5)
    delta, W = KINDS[kind](), torch.randn(D, F).to(dtype)
    on_disk = W if axis == 0 else W.T.contiguous()
    delta.check((D, F))
    new, record = edited(delta, target(on_disk, axis), on_disk)
    straight = new if axis == 0 else new.T
    assert (straight != exactly(delta, W).to(dtype)).sum() <= 2  # PyTorch rounds twice
    change = (straight.double() - W.double()).norm()
    assert record.kind == kind
    assert record.relative_change == pytest.approx(float(change / W.double().norm()), rel=1e-6)
    error = (straight.double() - exactly(delta, W)).norm() / W.double().norm()
    assert record.rounding_error == pytest.approx(float(error), rel=0.05)
    assert is_edit(new, on_disk, delta, axis)
    for row, column in ((0, 0), (D - 1, F - 1), (11, 17)):
        other = straight.clone()
        nearer = torch.nextafter(other[row, column], torch.tensor(9.0, dtype=dtype))
        other[row, column] = torch.nextafter(nearer, torch.tensor(9.0, dtype=dtype)) + (
            3e-4 if dtype == torch.float32 else 0
        )
        other = other if axis == 0 else other.T.contiguous()
        height = on_disk.shape[axis]
        wrong, _ = check_rounded(
            stored(other, axis), stored(on_disk, axis), delta, height, nearest=True
        )
        assert wrong is not None
        assert wrong[0] <= row < wrong[1], "the block of rows is named"


@pytest.mark.parametrize("kind", KINDS)
def test_a_running_model_is_shifted_as_the_written_weight_would(kind: str) -> None:
    torch.manual_seed(2)
    delta, W, x = KINDS[kind](), torch.randn(D, F), torch.randn(2, 3, F)
    new, _ = edited(delta, target(W), W)
    y = x @ W.T
    torch.testing.assert_close(y + delta.shift(x, y), x @ new.T, atol=1e-5, rtol=1e-5)


LOW_RANK = ["remove-subspace", "weaken-subspace", "remove-oblique", "add-low-rank"]


@pytest.mark.parametrize("kind", LOW_RANK)
def test_a_change_of_low_rank_is_given_by_two_factors(kind: str) -> None:
    delta, W = KINDS[kind](), torch.randn(D, F)
    P = None if delta.protects is None else delta.protects.T @ W
    factors = delta.low_rank(P)
    assert factors is not None
    B, A = factors
    torch.testing.assert_close(W + B @ A, exactly(delta, W).float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_delta_is_its_kind_and_its_tensors(kind: str) -> None:
    delta = KINDS[kind]()
    again = delta_of(delta.kind, tensors_of(delta))
    assert type(again) is type(delta)
    for name, tensor in tensors_of(delta).items():
        assert torch.equal(getattr(again, name), tensor)


def weaken(*a: float) -> Delta:
    return WeakenSubspace(basis(), torch.tensor(a, dtype=torch.float64))


WHOLE = torch.ones(1, dtype=torch.float64)

WRONG: dict[str, tuple[Callable[[], Delta], str]] = {
    "basis too short": (lambda: RemoveSubspace(basis()[1:]), r"U is float32 \[23, 3\]"),
    "basis of another dtype": (lambda: RemoveSubspace(basis().double()), "U is float64"),
    "basis without columns": (lambda: RemoveSubspace(basis()[:, :0]), "U has 0 columns"),
    "a factor of a whole removal": (lambda: weaken(1.0), "a is 1, not between 0 and 1"),
    "a factor of no removal": (lambda: weaken(0.0), "a is 0, not between 0 and 1"),
    "two factors": (lambda: weaken(0.5, 0.5), r"a is float64 \[2\], not float64 \[1\]"),
    "a factor that is no number": (lambda: weaken(float("nan")), "a holds NaN or Inf"),
    "an A of another width": (
        lambda: RemoveOblique(basis(), basis()[:, :1], WHOLE), r"A is float32 \[24, 1\]"),
    "an A that is not dual": (
        lambda: RemoveOblique(basis(), 2 * basis(), WHOLE), "off by 1.0e"),
    "more than all": (lambda: oblique(basis(), 1.5), "a is 1.5, not over 0 and at most 1"),
    "factors that do not meet": (
        lambda: AddLowRank(torch.ones(D, 2), torch.ones(3, F)), r"A is float32 \[3, 40\]"),
    "a vector of another length": (
        lambda: AddToRows(torch.tensor([1]), torch.ones(F + 1)), r"v is float32 \[41\]"),
    "a row twice": (lambda: AddToRows(torch.tensor([1, 1]), torch.ones(F)), "not ascending"),
    "a row beyond": (lambda: AddToRows(torch.tensor([D]), torch.ones(F)), "from 0 to 23"),
    "no rows": (lambda: AddToRows(torch.tensor([], dtype=torch.int64), torch.ones(F)), "ascending"),
    "another shape": (lambda: Replace(torch.ones(F, D)), r"new is float32 \[40, 24\]"),
    "NaN": (lambda: Replace(torch.full((D, F), float("nan"))), "new holds NaN or Inf"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_delta_that_does_not_fit_its_weight_says_why(case: str) -> None:
    make, says = WRONG[case]
    with pytest.raises(ValueError, match=says):
        make().check((D, F))


@pytest.mark.parametrize(("kind", "tensors"), [("unknown", {}), ("replace", {"old": basis()})])
def test_a_record_of_no_delta_is_refused(kind: str, tensors: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match=r"no kind of edit unknown|takes the tensors new"):
        delta_of(kind, tensors)
