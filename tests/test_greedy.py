"""The greedy fit turns to the words that are left and pays for neutral text, on planted moments."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from converter.calibration.statistics import Moments
from converter.methods.gloss import greedy_directions

K = 5
COMMON, RARE, TWICE, SLANG, OTHER = torch.eye(K)


def along(*parts: tuple[float, Tensor]) -> Tensor:
    return torch.stack([s * torch.outer(x, x) for s, x in parts]).sum(0)


def planted(**changes: object) -> Moments:
    """90 words owe 12 nats to COMMON and 9 to TWICE, 10 others owe 6 to RARE; neutral text
    nothing."""
    words = [along((12, COMMON), (9, TWICE))] * 90 + [along((6, RARE))] * 10
    nothing = torch.zeros(7, K, K)
    texts, tokens = {"pairs": nothing, "prose": nothing}, {"pairs": 70, "prose": 70}
    moments = Moments(torch.eye(K), torch.stack(words), torch.ones(100), texts, tokens)
    return replace(moments, **changes)  # type: ignore[arg-type]


def fit(moments: Moments, rank: int, cost: float = 1.0) -> Tensor:
    X = greedy_directions(moments, rank, 1.0, cost).float()
    assert torch.allclose(X.T @ X, torch.eye(rank), atol=1e-6)
    return X


def test_the_second_direction_turns_to_the_words_that_the_first_has_left() -> None:
    moments = planted()
    X = fit(moments, 2)
    assert abs(float(X[:, 0] @ COMMON)) > 0.99
    assert abs(float(X[:, 1] @ RARE)) > 0.99
    summed = torch.linalg.eigh(moments.words.sum(0)).eigenvectors.flip(1)
    assert abs(float(summed[:, 1] @ TWICE)) > 0.99  # what a sum would have taken


def test_a_words_weight_decides_and_not_its_number() -> None:
    weights = torch.cat([torch.full((90,), 1 / 90), torch.full((10,), 1.0)])
    assert abs(float(fit(planted(weights=weights), 1)[:, 0] @ RARE)) > 0.99


@pytest.mark.parametrize("sign", [1, -1])
def test_what_neutral_text_depends_on_is_left_alone_whichever_way(sign: int) -> None:
    """Pieces that lose without a direction, and pieces that seem to gain, both cost."""
    words = planted().words + along((20, SLANG))  # serves every word
    pieces = sign * along((3, SLANG)).expand(7, K, K)
    texts = {"pairs": pieces, "prose": torch.zeros(7, K, K)}
    costly = planted(words=words, texts=texts)
    assert abs(float(fit(costly, 1)[:, 0] @ SLANG)) < 0.3
    assert abs(float(fit(costly, 1, cost=0)[:, 0] @ SLANG)) > 0.9


def test_losses_that_cancel_on_average_still_cost() -> None:
    words = planted().words + along((20, SLANG))
    pieces = torch.stack([along((s * 4, SLANG)) for s in (1, -1, 1, -1)])
    texts = {"pairs": pieces, "prose": torch.zeros(7, K, K)}
    assert abs(float(fit(planted(words=words, texts=texts), 1)[:, 0] @ SLANG)) < 0.3


def test_the_columns_of_a_smaller_rank_are_the_first_of_a_larger_one() -> None:
    assert torch.equal(fit(planted(), 3)[:, :2], fit(planted(), 2))


def test_one_direction_in_the_plane_is_the_best_of_all_angles() -> None:
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(30, 2, 2, generator=generator)
    words = half + half.transpose(1, 2) + 2 * torch.eye(2)
    half = torch.randn(40, 2, 2, generator=generator)
    texts = {"pairs": half + half.transpose(1, 2)}
    moments = Moments(
        torch.eye(2), words, torch.rand(30, generator=generator), texts, {"pairs": 90}
    )

    def J(x: Tensor) -> float:
        """The module's formula, written down again."""
        left = torch.stack([torch.exp(-(x @ M @ x / 2).clamp(min=-1)) for M in words])
        q = torch.stack([x @ M @ x for M in texts["pairs"]])
        cost = (max(float(q.sum()), 0) + float((q**2).sum()) / 2) / 90
        return float((left * moments.weights).sum() / moments.weights.sum()) + 0.3 * cost

    circle = (i * math.pi / 2000 for i in range(2000))
    best = min(J(torch.tensor([math.cos(a), math.sin(a)])) for a in circle)
    found = greedy_directions(moments, 1, 2.0, 0.3)[:, 0].float()
    assert J(found) == pytest.approx(best, abs=1e-4)
