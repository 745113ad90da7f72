"""How far a refitted change is from a recorded one: by the change itself, not by its factors."""

import math

import pytest
import torch
from torch import Tensor

from converter.edits.deltas import AddBits, AddLowRank, AddToRows, Delta, Replace
from converter.edits.likeness import Likeness, likeness, tensors_alike

W = torch.randn(12, 7, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def changes(delta: Delta) -> Tensor:
    return delta.whole(W.double()) - W.double()


B, A, ROWS, V = draw(1, 12, 3), draw(2, 3, 7), torch.tensor([1, 4, 9]), draw(3, 7)
NEW = (W.float() + 0.1 * draw(4, 12, 7)).to(torch.bfloat16)
PAIRS: tuple[tuple[Delta, Delta], ...] = (
    (AddLowRank(B, A), AddLowRank(draw(5, 12, 2), draw(6, 2, 7))),
    (AddToRows(ROWS, V), AddToRows(torch.tensor([1, 2, 9, 11]), V + 0.1 * draw(7, 7))),
    (Replace(NEW), Replace(NEW + 0.1 * draw(8, 12, 7).to(torch.bfloat16))),
    (AddBits.between(W, NEW), AddBits.between(W, NEW + 0.1)),
)


@pytest.mark.parametrize("number", range(len(PAIRS)))
def test_it_is_what_the_changes_of_the_whole_weight_say(number: int) -> None:
    one, other = PAIRS[number]
    x, y = changes(one), changes(other)
    found = likeness(one, other, lambda: W)
    assert found.kind == one.kind
    assert found.distance == pytest.approx(float((y - x).norm() / x.norm()), rel=1e-6)
    assert found.cosine == pytest.approx(float((x * y).sum() / x.norm() / y.norm()), rel=1e-6)
    same = likeness(one, one, lambda: W)
    assert (same.distance, same.cosine, same.degrees) == (0, 1, 0)


def test_factors_that_are_turned_make_the_same_change() -> None:
    """As vectors, B and A are then far from what they were."""
    turn = torch.linalg.qr(draw(9, 3, 3)).Q
    found = likeness(AddLowRank(B, A), AddLowRank(B @ turn, turn.T @ A), lambda: W)
    assert found.distance < 1e-6


def test_a_change_of_another_length_is_another_change() -> None:
    """Its angle is zero, whatever the length."""
    found = likeness(AddToRows(ROWS, V), AddToRows(ROWS, 2 * V), lambda: W)
    assert found.distance == pytest.approx(1)
    assert found.cosine == pytest.approx(1)
    assert found.degrees == pytest.approx(60)


def test_degrees_are_those_between_changes_of_one_length() -> None:
    x, y = torch.tensor([1.0, 0.0]), torch.tensor([math.cos(0.1), math.sin(0.1)])
    assert tensors_alike("created", x, y).degrees == pytest.approx(math.degrees(0.1), rel=1e-5)
    assert tensors_alike("created", x, -3 * x).degrees == 180
    assert Likeness.of("created", 0.0, 1.0, 0.0).degrees == 180
    assert Likeness.of("created", 0.0, 0.0, 0.0) == Likeness("created", 0.0, 1.0)
