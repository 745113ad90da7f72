"""Theorems about subspaces: planted truth is recovered, protected directions are not touched."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from converter.calibration.linear_algebra import (
    eigen_directions,
    extend,
    leading_eigenvectors,
    mean_difference,
    remove,
    svd_directions,
    top_right_singular_vectors,
)
from converter.calibration.statistics import Activations, Moments
from converter.calibration.word_list import WordList
from converter.checkpoints.architectures.dimensions import Dimensions
from converter.errors import FitError, OptionError
from converter.manifest import Origin
from converter.methods.base import configure, method_names, parse_layers
from converter.methods.rankings import ranking_names
from converter.methods.subspace import Subspace, above_threshold, global_basis

N, D, L = 200, 48, 6
WORDS = WordList(frozenset({"bad"}), Origin(name="test"), "0" * 64)
DIMENSIONS = Dimensions(L, D, 64)


AXES = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(0)))[0].T
TOXIC, MASSIVE, NEUTRAL = AXES[0], AXES[1], AXES[2:18]


def planted(massive: bool = False) -> Activations:
    """Sentences whose content is neutral, in 16 dimensions that pairs share, plus small noise.

    The toxic side also has 3 ``TOXIC``, and toxic words grow more probable along it. With
    ``massive``, both sides have activations along ``MASSIVE`` that are a hundred times as large,
    with random signs, as real models do.
    """
    generator = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    plus, minus, causal, moment = {}, {}, {}, torch.zeros(D, D)
    for layer in range(L):
        content = randn(N, len(NEUTRAL)) @ NEUTRAL
        spikes = 100.0 * massive * randn(2, N, 1)
        minus[layer] = content + 0.1 * randn(N, D) + spikes[0] * MASSIVE
        plus[layer] = content + 0.1 * randn(N, D) + spikes[1] * MASSIVE + 3 * TOXIC
        gradient = 0.2 * TOXIC + 0.02 * randn(N, D)
        product = plus[layer].T @ gradient / N
        causal[layer] = (product + product.T) / 2
        moment += minus[layer].T @ minus[layer] / minus[layer].square().sum() / L
    leading = {layer: (TOXIC[None], torch.tensor([0.6])) for layer in range(L)}
    return Activations(plus, minus, moment, {}, causal, leading)


def decode(directions: Tensor, count: int) -> list[tuple[str, ...]]:
    return [("bad",) * count] * len(directions)


def fit(name: str, activations: Activations, **options: object) -> Subspace:
    texts = {key: str(value) for key, value in options.items()}
    if name == "gloss":
        forward_only = {"candidates": "mean+svd", "ranking": "mean-difference"}
        texts = {"basis": "candidates", "layers": "2-4"} | forward_only | texts
    return configure(name, texts, DIMENSIONS).fit(activations, decode, WORDS)


@pytest.mark.parametrize("ranking", ["causal", "linear-probe", "mean-difference"])
@pytest.mark.parametrize("candidates", ["causal", "mean", "svd", "mean+svd"])
def test_gloss_recovers_a_planted_direction(candidates: str, ranking: str) -> None:
    found = fit("gloss", planted(), rank=1, candidates=candidates, ranking=ranking, alpha=0)
    assert found.bases[2].shape == (D, 1)
    assert float(found.bases[2][:, 0] @ TOXIC) > 0.99  # the sign too: it points to the toxic side


def test_profs_recovers_a_planted_direction_in_each_layer() -> None:
    found = fit("profs", planted(), rank=1)
    assert sorted(found.bases) == list(range(2, L))
    for basis in found.bases.values():
        assert float(basis[:, 0] @ TOXIC) > 0.99


def test_a_candidate_counts_by_what_toxic_words_lose_without_it() -> None:
    """u^T A u is the drop of a linear model's log-probability; the score and U follow it."""
    seen = planted()
    other = AXES[20]
    weak = {n: A + 0.01 * torch.outer(other, other) for n, A in seen.causal.items()}
    seen = replace(seen, causal=weak)
    causal = {"candidates": "causal", "ranking": "causal"}
    found = fit("gloss", seen, rank=2, alpha=-1, **causal)
    scores = {c.index: c.score for c in found.candidates if c.layer == 2}
    assert scores[0] == pytest.approx(0.6, abs=0.02)  # 3 TOXIC along f, 0.2 along its gradient
    assert scores[1] == pytest.approx(0.01, abs=0.02)
    assert float(found.bases[2][:, 0] @ TOXIC) > 0.99
    values = found.singular_values["U"]
    assert float(values[0] ** 2) == pytest.approx(3 * 0.6, abs=0.1)  # three layers


def test_the_greedy_basis_is_made_within_the_given_directions_and_turned_to_the_toxic_side() -> (
    None
):
    V = torch.stack([AXES[30], -TOXIC, AXES[31]], 1)
    words = torch.stack([torch.diag(torch.tensor([0.0, 9.0, 0.1]))] * 20)
    none = torch.zeros(4, 3, 3)
    moments = Moments(
        V, words, torch.ones(20), {"pairs": none, "prose": none}, {"pairs": 9, "prose": 9}
    )
    causal = {"basis": "moments", "candidates": "causal", "ranking": "causal"}
    seen = replace(planted(), moments=moments)
    found = fit("gloss", seen, rank=2, **causal)
    assert float(found.bases[2][:, 0] @ TOXIC) > 0.99
    assert float((V.T @ found.bases[2]).square().sum()) == pytest.approx(2, abs=1e-5)
    assert float(found.singular_values["U"][0]) == pytest.approx(3)
    with pytest.raises(FitError, match="rank 4 is larger than the directions among which it is"):
        fit("gloss", seen, rank=4, **causal)
    with pytest.raises(OptionError, match="directions=3 has no effect with basis=candidates"):
        fit("gloss", seen, rank=2, directions=3)


def test_a_random_subspace_spares_what_is_protected_and_follows_its_draw() -> None:
    seen = planted(massive=True)
    first, again = (fit("random", seen, rank=3, draw=1).bases[2] for _ in range(2))
    assert torch.equal(first, again)
    assert float((first.T @ first - torch.eye(3)).abs().max()) < 1e-6
    assert float((first.T @ MASSIVE).norm()) < 1e-3
    assert not torch.allclose(first, fit("random", seen, rank=3, draw=2).bases[2])
    naked = [fit("random", seen, rank=3, draw=n, protect_shared=0).bases[2] for n in range(9)]
    shares = torch.stack([(U.T @ MASSIVE).square().sum() for U in naked])
    assert float(shares.mean()) == pytest.approx(3 / D, abs=0.06)


def test_leading_columns_are_the_smaller_subspace() -> None:
    for name, options in (("gloss", {"alpha": -9}), ("profs", {})):
        wide, narrow = (fit(name, planted(), rank=rank, **options) for rank in (3, 2))
        for layer, basis in wide.truncated(2).bases.items():
            assert torch.allclose(basis, narrow.bases[layer], atol=1e-6)


def test_iterated_eigenvectors_are_those_of_a_whole_decomposition() -> None:
    matrix = torch.randn(1030, 1030, generator=torch.Generator().manual_seed(0)).double()
    matrix = matrix + matrix.T  # a flat spectrum, the hardest there is
    found = eigen_directions(matrix, 3, torch.ones(1030).double())
    expected = leading_eigenvectors(matrix, 3)
    assert torch.allclose((found @ expected).abs(), torch.eye(3).double(), atol=1e-6)
    assert (found.sum(1) >= 0).all()


def test_scores_that_are_all_equal_say_nothing_and_keep_all() -> None:
    assert above_threshold([0.5, 0.5, 0.5], 1) == [True] * 3


def test_massive_activations_are_protected_and_would_be_taken_otherwise() -> None:
    options = {"rank": 1, "candidates": "svd", "per_layer": 1, "alpha": -5}
    protected = fit("gloss", planted(massive=True), **options).bases[2][:, 0]
    assert abs(float(protected @ MASSIVE)) < 1e-3
    assert float(protected @ TOXIC) > 0.99
    naked = fit("gloss", planted(massive=True), protect_shared=0, protect_own=0, **options)
    assert abs(float(naked.bases[2][:, 0] @ MASSIVE)) > 0.99


def test_each_of_the_two_protections_works_alone() -> None:
    options = {"rank": 1, "candidates": "svd", "per_layer": 1, "alpha": -5}
    for protection in ({"protect_shared": 1, "protect_own": 0},
                       {"protect_shared": 0, "protect_own": 1}):  # fmt: skip
        found = fit("gloss", planted(massive=True), **options, **protection).bases[2][:, 0]
        assert abs(float(found @ MASSIVE)) < 1e-3
        assert float(found @ TOXIC) > 0.99


def test_protection_that_leaves_nothing_is_an_error() -> None:
    for count in (D, 10**9):
        with pytest.raises(FitError, match=r"leaves nothing of what tells the two sides apart"):
            fit("gloss", planted(), protect_shared=count)


def test_no_basis_touches_what_is_protected() -> None:
    seen = planted(massive=True)
    assert seen.second_moment is not None
    shared = leading_eigenvectors(seen.second_moment, 16)
    basis = fit("gloss", seen, rank=4, per_layer=4, alpha=0).bases[2]
    assert float((shared.T @ basis.double()).abs().max()) < 1e-6
    assert torch.allclose(basis.T @ basis, torch.eye(4), atol=1e-6)


def test_a_rank_larger_than_the_candidates_is_an_error() -> None:
    with pytest.raises(FitError, match="rank 40 is larger than the candidates allow: expected at"):
        fit("gloss", planted(), rank=40)
    with pytest.raises(FitError, match="rank 48 is larger than the candidates allow: expected at"):
        fit("profs", planted(), rank=48)


def test_no_candidate_over_the_threshold_is_an_error() -> None:
    with pytest.raises(FitError, match="no candidate direction is over the threshold"):
        fit("gloss", planted(), alpha=99)
    assert above_threshold([0.0, 0.0, 3.0], 1.0) == [False, False, True]


def test_sides_that_do_not_differ_are_an_error() -> None:
    x = torch.randn(N, D)
    same = Activations(dict.fromkeys(range(L), x), dict.fromkeys(range(L), x), torch.eye(D) / D, {})
    with pytest.raises(FitError, match=r"leaves nothing|same mean"):
        fit("gloss", same)
    with pytest.raises(FitError, match="are the same"):
        fit("profs", same)


def test_vocabulary_ranking_keeps_what_decodes_to_listed_words() -> None:
    def one_is_bad(directions: Tensor, count: int) -> list[tuple[str, ...]]:
        return [("bad",) if i == 3 else ("good",) for i in range(len(directions))]

    method = configure(
        "gloss",
        {"basis": "candidates", "ranking": "vocabulary", "candidates": "svd", "rank": "1"},
        DIMENSIONS,
    )
    found = method.fit(planted(), one_is_bad, WORDS)
    assert [c.kept for c in found.candidates].index(True) == 3
    assert sum(c.kept for c in found.candidates) == 1


def test_a_vocabulary_that_cannot_be_decoded_cannot_rank() -> None:
    method = configure(
        "gloss", {"basis": "candidates", "ranking": "vocabulary", "candidates": "svd"}, DIMENSIONS
    )
    with pytest.raises(FitError, match="cannot be decoded"):
        method.fit(planted(), lambda directions, count: [()] * len(directions), WORDS)


def test_removal_is_a_projection() -> None:
    x, P = torch.randn(N, D), AXES[:5].T.double()
    once = remove(x, P)
    assert (once @ P).abs().max() < 1e-5
    assert torch.allclose(remove(once, P), once, atol=1e-5)


def test_a_basis_is_extended_by_new_directions_only() -> None:
    P = torch.linalg.qr(torch.randn(D, 5).double())[0]
    again = torch.linalg.qr(P + 1e-3 * torch.randn(D, 5))[0]
    assert torch.equal(extend(P, again), P)
    more = torch.linalg.qr(torch.cat([P[:, :2], torch.randn(D, 3)], 1))[0]
    both = extend(P, more)
    assert both.shape == (D, 8)
    assert torch.allclose(both.T @ both, torch.eye(8).double())
    assert torch.allclose(both @ (both.T @ more), more)


def test_directions_point_to_the_toxic_side() -> None:
    T = torch.randn(N, D) + 2 * TOXIC
    mean = T.double().mean(0)
    assert (svd_directions(T, 6)[0] @ mean >= 0).all()
    assert float(mean_difference(T)[0] @ mean) == pytest.approx(float(mean.norm()))


def test_the_global_basis_spans_the_strongest_candidates() -> None:
    a, b = TOXIC, (TOXIC + MASSIVE) / 2**0.5
    stack = torch.stack([a, a, a, b])
    U, values = global_basis(stack, 2)
    for u in (a, b):
        assert float((U.T @ u).norm()) == pytest.approx(1, abs=1e-5)
    assert len(values) == 4
    with pytest.raises(FitError, match="at most 2, the dimensions that 4 candidates span"):
        global_basis(stack, 3)
    vectors, _ = top_right_singular_vectors(stack, 1)
    assert abs(float(vectors[:, 0] @ U[:, 0].double())) == pytest.approx(1)


def test_a_subspace_survives_its_file(tmp_path: Path) -> None:
    for name in ("gloss", "profs"):
        found = fit(name, planted(), rank=2)
        found.save(tmp_path / name)
        tensors = load_file(tmp_path / name)
        for layer, basis in found.bases.items():
            assert torch.equal(tensors[found.basis_name(layer)], basis)
        assert len(tensors["scores"]) == len(found.candidates)


def test_default_layers_are_those_of_the_documentation() -> None:
    assert method_names() == ["gloss", "profs", "random"]
    assert ranking_names() == ["causal", "linear-probe", "mean-difference", "vocabulary"]
    large = Dimensions(30, 576, 1536)
    assert configure("gloss", {}, large).edit_layers == tuple(range(7, 27))
    assert configure("profs", {}, Dimensions(24, 1024, 4096)).edit_layers == tuple(range(10, 24))
    assert configure("gloss", {}, Dimensions(1, 8, 8)).edit_layers == (0,)
    for layers in ("0-1", "3"):  # layers alone moves both
        method = configure("gloss", {"layers": layers}, DIMENSIONS)
        assert method.edit_layers == method.request.layers == parse_layers("", layers, L)
    fitted = configure("gloss", {"layers": "1-3", "edit_layers": "2,4"}, DIMENSIONS)
    assert fitted.request.layers == (1, 2, 3)
    assert fitted.edit_layers == (2, 4)


def test_layer_lists_are_read() -> None:
    assert parse_layers("layers", "1-3,5, 0", 6) == (0, 1, 2, 3, 5)
    for text in ("", "6", "a", "3-1", "3-1,5", "-1", "1-", "0--2", "0-9999999999"):
        with pytest.raises(OptionError, match="-o layers"):
            parse_layers("layers", text, 6)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rnak": "4"}, "-o rnak: method gloss: expected rank, layers"),
        ({"rank": "four"}, "-o rank: expected a whole number, found four"),
        ({"rank": "0"}, "-o rank: expected at least 1, found 0"),
        ({"alpha": "x"}, "-o alpha: expected a number"),
        ({"alpha": "-inf"}, "-o alpha: expected a number, found -inf"),
        ({"site": "attention"}, "-o site: expected ffn or residual"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, str], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        configure("gloss", options, DIMENSIONS)
    with pytest.raises(OptionError, match="--method: expected gloss or profs or random, found"):
        configure("nonesuch", {}, DIMENSIONS)
