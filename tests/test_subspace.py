"""Theorems about subspaces: planted truth is recovered, protected directions are not touched."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec import convert
from safetensors.torch import load_file
from torch import Tensor

from converter.calibration.calibration_models import Calibration, Contrast, Training
from converter.calibration.instances import Instances
from converter.calibration.linear_algebra import (
    eigen_directions,
    extend,
    leading_eigenvectors,
    mean_difference,
    remove,
    svd_directions,
    top_right_singular_vectors,
)
from converter.calibration.statistics import Activations, Moments, Request
from converter.calibration.word_list import WordList
from converter.checkpoints.plan import Plan, make_plan
from converter.checkpoints.safetensors.header import Header, TensorInfo
from converter.checkpoints.weights import Weight
from converter.edits.base import Edit
from converter.edits.deltas import RemoveSubspace
from converter.edits.edit_file import EVIDENCE, load_bases, save_edit, stored_names
from converter.errors import FitError, OptionError
from converter.evaluation.systems import edited_layers
from converter.manifest import Origin, SubspaceEvidence
from converter.methods.base import Proposal
from converter.methods.gloss_paper import RANKINGS, above_threshold, global_basis
from converter.methods.known import METHODS
from converter.methods.options import configure, parse_layers
from converter.methods.subspace import Removal, Subspace
from converter.models.resident import Model
from tests.builders.errors import refused

N, D, L = 200, 48, 6
WORDS = WordList(frozenset({"bad"}), Origin(name="test"), "0" * 64)


def plan_of(layers: int, hidden_size: int, intermediate_size: int) -> Plan:
    """Of a Llama that is nothing but headers; its down-projections have biases."""
    config = {
        "model_type": "llama", "num_hidden_layers": layers, "hidden_size": hidden_size,
        "intermediate_size": intermediate_size, "num_attention_heads": 1, "vocab_size": 9,
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (9, hidden_size), "model.norm.weight": (hidden_size,),
    }  # fmt: skip
    for layer in range(layers):
        shapes[f"model.layers.{layer}.mlp.down_proj.weight"] = (hidden_size, intermediate_size)
        shapes[f"model.layers.{layer}.mlp.down_proj.bias"] = (hidden_size,)
    infos = {name: TensorInfo(name, "F32", shape, 0, 0) for name, shape in shapes.items()}
    return make_plan(config, None, {"model.safetensors": Header(0, 0, infos)})


PLAN = plan_of(L, D, 64)
DIMENSIONS = PLAN.dimensions

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


Decode = Callable[[Tensor, int], list[tuple[str, ...]]]


def all_bad(directions: Tensor, count: int) -> list[tuple[str, ...]]:
    return [("bad",) * count] * len(directions)


@dataclass
class Desk:
    """A ``Workbench`` on which activations lie ready; there is no model.

    Attributes:
        seen: what any request is answered with.
        decode: stands in for the vocabulary.
        asked: the requests.
    """

    seen: Activations
    decode: Decode = all_bad
    gains: Mapping[int, Tensor] = field(default_factory=dict)
    asked: list[Request] = field(default_factory=list)
    plan: Plan = PLAN
    words: WordList = WORDS

    @property
    def instances(self) -> Instances:
        raise AssertionError("no method of a subspace looks at instances")

    def load(self) -> Model:
        raise AssertionError("no method of a subspace runs a model itself")

    def activations(self, request: Request) -> Activations:
        self.asked.append(request)
        return self.seen

    def contrast(self, training: Training) -> Contrast:
        raise AssertionError("no method of a subspace trains a model")

    def calibrate(self, training: Training, names: Collection[str]) -> Mapping[str, Calibration]:
        raise AssertionError("no method of a subspace trains a model")

    def weight(self, weight: Weight) -> Tensor:
        raise AssertionError("no method of a subspace looks at weights")

    def single_token_share(self) -> float:
        return 1.0

    def masked(self, token: str) -> str:
        return token


FORWARD_ONLY = {"candidates": "mean+svd", "ranking": "mean-difference"}
USUAL = {"gloss": {"layers": "2-4"}, "gloss-paper": {"layers": "2-4"} | FORWARD_ONLY}
"""Options of the fits of these tests, unless they ask for others."""


def fit(name: str, activations: Activations, **options: object) -> Proposal:
    texts = USUAL.get(name, {}) | {key: str(value) for key, value in options.items()}
    return configure(name, texts, DIMENSIONS).fit(Desk(activations))


def removed(edit: Edit) -> dict[int, Tensor]:
    """What an edit takes out of each layer: the same of a weight and of its bias."""
    edit.check(PLAN)
    found: dict[int, Tensor] = {}
    for name, weight in PLAN.find(edit.tensors).items():
        delta = edit.tensors[name]
        assert isinstance(delta, RemoveSubspace)
        assert found.setdefault(weight.layer, delta.U) is delta.U
    return found


def bases(proposal: Proposal, rank: int | None = None) -> dict[int, Tensor]:
    """What the edit of a rank takes out of each layer; of the largest, if none is given."""
    return removed(proposal.edit(proposal.strengths[-1] if rank is None else rank))


def evidence(proposal: Proposal) -> SubspaceEvidence:
    """What the manifest keeps of a fit."""
    return convert(proposal.evidence, SubspaceEvidence)


@pytest.mark.parametrize("ranking", ["causal", "linear-probe", "mean-difference"])
@pytest.mark.parametrize("candidates", ["causal", "mean", "svd", "mean+svd"])
def test_gloss_recovers_a_planted_direction(candidates: str, ranking: str) -> None:
    options = {"rank": 1, "candidates": candidates, "ranking": ranking, "alpha": 0}
    U = bases(fit("gloss-paper", planted(), **options))[2]
    assert U.shape == (D, 1)
    assert float(U[:, 0] @ TOXIC) > 0.99  # the sign too: it points to the toxic side


def test_profs_recovers_a_planted_direction_in_each_layer() -> None:
    found = bases(fit("profs", planted(), rank=1))
    assert sorted(found) == list(range(2, L))
    for basis in found.values():
        assert float(basis[:, 0] @ TOXIC) > 0.99


def test_a_candidate_counts_by_what_toxic_words_lose_without_it() -> None:
    """u^T A u is the drop of a linear model's log-probability; the score and U follow it."""
    seen = planted()
    other = AXES[20]
    weak = {n: A + 0.01 * torch.outer(other, other) for n, A in seen.causal.items()}
    seen = replace(seen, causal=weak)
    causal = {"candidates": "causal", "ranking": "causal"}
    found = fit("gloss-paper", seen, rank=2, alpha=-1, **causal)
    scores = {c.index: c.score for c in evidence(found).candidates if c.layer == 2}
    assert scores[0] == pytest.approx(0.6, abs=0.02)  # 3 TOXIC along f, 0.2 along its gradient
    assert scores[1] == pytest.approx(0.01, abs=0.02)
    assert float(bases(found)[2][:, 0] @ TOXIC) > 0.99
    values = evidence(found).singular_values["U"]
    assert values[0] ** 2 == pytest.approx(3 * 0.6, abs=0.1)  # three layers


def with_moments(seen: Activations) -> Activations:
    """Words that owe 9 nats to what is against ``TOXIC`` and little to another direction."""
    V = torch.stack([AXES[30], -TOXIC, AXES[31]], 1)
    words = torch.stack([torch.diag(torch.tensor([0.0, 9.0, 0.1]))] * 20)
    texts = dict.fromkeys(("pairs", "prose"), torch.zeros(4, 3, 3))
    moments = Moments(V, words, torch.ones(20), texts, {"pairs": 9, "prose": 9})
    return replace(seen, moments=moments)


def test_the_greedy_basis_is_made_within_the_given_directions_and_turned_to_the_toxic_side() -> (
    None
):
    seen = with_moments(planted())
    assert seen.moments is not None
    found = fit("gloss", seen, rank=2)
    U = bases(found)[2]
    assert float(U[:, 0] @ TOXIC) > 0.99
    assert float((seen.moments.directions.T @ U).square().sum()) == pytest.approx(2, abs=1e-5)
    assert evidence(found).singular_values["U"][0] == pytest.approx(3)
    with refused(FitError, what="rank 4 is larger than the directions among which it is sought"):
        fit("gloss", seen, rank=4)


def test_each_of_the_two_methods_of_gloss_refuses_the_options_of_the_other() -> None:
    for name, key in (
        ("gloss", "candidates"), ("gloss", "ranking"), ("gloss", "alpha"), ("gloss", "weights"),
        ("gloss-paper", "directions"), ("gloss-paper", "cost"), ("gloss-paper", "saturation"),
    ):  # fmt: skip
        with refused(OptionError, what=f"-o {key}: method {name}", found=key):
            configure(name, {key: "3"}, DIMENSIONS)


def test_layers_without_a_feed_forward_network_are_left_out() -> None:
    sizes = replace(DIMENSIONS, ffn_layers=(1, 2, 4))
    some: Any = configure("gloss-paper", {"layers": "0-2,5"}, sizes)
    assert some.layers == (1, 2)
    whole: Any = configure("gloss-paper", {}, DIMENSIONS)
    default: Any = configure("gloss-paper", {}, sizes)
    assert default.layers == tuple(n for n in whole.layers if n in sizes.ffn_layers)
    with refused(
        OptionError, what="-o layers",
        expected="a layer with a feed-forward network: 1, 2, 4", found="3, 5",
    ):  # fmt: skip
        configure("gloss-paper", {"layers": "3,5"}, sizes)


def test_a_random_subspace_spares_what_is_protected_and_follows_its_draw() -> None:
    seen = planted(massive=True)
    first, again = (bases(fit("random", seen, rank=3, draw=1))[2] for _ in range(2))
    assert torch.equal(first, again)
    assert float((first.T @ first - torch.eye(3)).abs().max()) < 1e-6
    assert float((first.T @ MASSIVE).norm()) < 1e-3
    assert not torch.allclose(first, bases(fit("random", seen, rank=3, draw=2))[2])
    naked = [bases(fit("random", seen, rank=3, draw=n, protect_shared=0))[2] for n in range(9)]
    shares = torch.stack([(U.T @ MASSIVE).square().sum() for U in naked])
    assert float(shares.mean()) == pytest.approx(3 / D, abs=0.06)


def test_leading_columns_are_the_smaller_subspace() -> None:
    seen = with_moments(planted())
    for name, options in (("gloss", {}), ("gloss-paper", {"alpha": -9}), ("profs", {})):
        wide, narrow = (fit(name, seen, rank=rank, **options) for rank in (3, 2))
        for layer, expected in bases(narrow).items():
            basis = bases(wide)[layer][:, :2]
            assert torch.allclose(basis, expected, atol=1e-6)
            assert name == "gloss" or torch.equal(basis, bases(wide, rank=2)[layer])


def test_a_given_rank_is_the_last_of_those_that_can_be_measured() -> None:
    """``random@perplexity`` looks for another rank than the one that it was configured with."""
    for rank, ranks in ((8, [1, 2, 3, 4, 6, 8]), (5, [1, 2, 3, 4, 5]), (1, [1])):
        given = fit("random", planted(), rank=rank)
        assert (list(given.strengths), given.is_free) == (ranks, False)
    free = fit("random", planted())
    assert (list(free.strengths), free.is_free) == ([1, 2, 3, 4, 6, 8], True)


def test_gloss_takes_a_part_of_the_largest_subspace_unless_a_rank_is_given() -> None:
    seen = with_moments(planted())  # three directions
    free, rank, part, both = (
        fit("gloss", seen, **options)
        for options in ({}, {"rank": 2}, {"part": 0.25}, {"rank": 1, "part": 0.7})
    )
    assert (free.is_free, rank.is_free, part.is_free, both.is_free) == (True, False, False, False)
    assert max(free.strengths) < 1 == max(rank.strengths)
    assert (part.strengths[-1], both.strengths[-1]) == (0.25, 0.7)
    for proposal, dimensions in ((free, 3), (rank, 2), (part, 3), (both, 1)):
        most = proposal.strengths[-1]
        for edit in (proposal.edit(most), proposal.control(most, 0)):
            for delta in edit.tensors.values():
                assert delta.protects is not None
                assert (delta.protects.shape[1], delta.factor) == (dimensions, most)


def test_a_control_is_a_random_subspace_of_the_same_tensors_and_rank() -> None:
    proposal = fit("gloss-paper", planted(massive=True), rank=3, alpha=-9)
    first, again, other = (proposal.control(2, seed) for seed in (0, 0, 1))
    assert first.digest() == again.digest() != other.digest()
    assert first.tensors.keys() == proposal.edit(2).tensors.keys()
    (U,) = {delta.protects for delta in first.tensors.values()}
    assert U is not None
    assert torch.allclose(U.T @ U, torch.eye(2), atol=1e-6)
    assert float((U.T @ MASSIVE).norm()) < 1e-3  # what neutral text writes most of is spared
    subspace = Subspace(dict.fromkeys((2, 3), U), {}, (), U.T[:0])
    naked = Removal(rank=2, layers=(2, 3)).propose(Desk(planted()), subspace, None)
    shares = [removed(naked.control(3, seed))[2].T @ MASSIVE for seed in range(9)]
    assert float(torch.stack(shares).square().sum(1).mean()) == pytest.approx(3 / D, abs=0.06)


def test_iterated_eigenvectors_are_those_of_a_whole_decomposition() -> None:
    matrix = torch.randn(1030, 1030, generator=torch.Generator().manual_seed(0)).double()
    matrix = matrix + matrix.T  # a flat spectrum, the hardest there is
    found = eigen_directions(matrix, 3, torch.ones(1030).double())
    expected = leading_eigenvectors(matrix, 3)
    assert torch.allclose((found @ expected).abs(), torch.eye(3).double(), atol=1e-6)
    assert (found.sum(1) >= 0).all()


def test_scores_that_are_all_equal_say_nothing_and_keep_all() -> None:
    assert above_threshold([0.5, 0.5, 0.5], 1) == [True] * 3


@pytest.mark.parametrize(
    ("protection", "spared"),
    [
        ({}, True),
        ({"protect_shared": 1, "protect_own": 0}, True),
        ({"protect_shared": 0, "protect_own": 1}, True),
        ({"protect_shared": 0, "protect_own": 0}, False),
    ],
)
def test_massive_activations_are_taken_unless_one_of_two_protections_spares_them(
    protection: dict[str, int], spared: bool
) -> None:
    options = {"rank": 1, "candidates": "svd", "per_layer": 1, "alpha": -5, **protection}
    u = bases(fit("gloss-paper", planted(massive=True), **options))[2][:, 0]
    if spared:
        assert abs(float(u @ MASSIVE)) < 1e-3
        assert float(u @ TOXIC) > 0.99
    else:
        assert abs(float(u @ MASSIVE)) > 0.99


def test_protection_that_leaves_nothing_is_an_error() -> None:
    for name in ("gloss", "gloss-paper"):
        with refused(
            FitError, what="... leaves nothing of what tells the two sides apart in layer ..."
        ):
            fit(name, with_moments(planted()), protect_shared=D)


def test_no_basis_touches_what_is_protected() -> None:
    seen = planted(massive=True)
    assert seen.second_moment is not None
    shared = leading_eigenvectors(seen.second_moment, 16)
    basis = bases(fit("gloss-paper", seen, rank=4, per_layer=4, alpha=0))[2]
    assert float((shared.T @ basis.double()).abs().max()) < 1e-6
    assert torch.allclose(basis.T @ basis, torch.eye(4), atol=1e-6)


def test_a_rank_larger_than_the_candidates_is_an_error() -> None:
    what = "rank 40 is larger than the candidates allow"
    with refused(FitError, what=what, expected="at most 6, ..."):
        fit("gloss-paper", planted(), rank=40)
    what = "rank 48 is larger than the candidates allow"
    with refused(FitError, what=what, expected="at most 47, ..."):
        fit("profs", planted(), rank=48)


def test_no_candidate_over_the_threshold_is_an_error() -> None:
    with refused(FitError, what="no candidate direction is over the threshold"):
        fit("gloss-paper", planted(), alpha=99)
    assert above_threshold([0.0, 0.0, 3.0], 1.0) == [False, False, True]


def test_sides_that_do_not_differ_are_an_error() -> None:
    x = torch.randn(N, D)
    same = Activations(dict.fromkeys(range(L), x), dict.fromkeys(range(L), x), torch.eye(D) / D, {})
    with refused(FitError, what="the toxic and the neutral side have the same mean"):
        fit("gloss-paper", same)
    with refused(FitError, what="the toxic and the neutral side are the same"):
        fit("profs", same)


def test_vocabulary_ranking_keeps_what_decodes_to_listed_words() -> None:
    def one_is_bad(directions: Tensor, count: int) -> list[tuple[str, ...]]:
        return [("bad",) if i == 3 else ("good",) for i in range(len(directions))]

    options = {"ranking": "vocabulary", "candidates": "svd", "rank": "1"}
    found = configure("gloss-paper", options, DIMENSIONS).fit(Desk(planted(), one_is_bad))
    kept = [candidate.kept for candidate in evidence(found).candidates]
    assert kept.index(True) == 3
    assert sum(kept) == 1


def test_a_vocabulary_that_cannot_be_decoded_cannot_rank() -> None:
    options = {"ranking": "vocabulary", "candidates": "svd"}
    method = configure("gloss-paper", options, DIMENSIONS)
    with refused(FitError, what="the directions cannot be decoded, ..."):
        method.fit(Desk(planted(), lambda directions, count: [()] * len(directions)))


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
    with refused(FitError, expected="at most 2, the dimensions that 4 candidates span"):
        global_basis(stack, 3)
    vectors, _ = top_right_singular_vectors(stack, 1)
    assert abs(float(vectors[:, 0] @ U[:, 0].double())) == pytest.approx(1)


def test_a_subspace_survives_its_file(tmp_path: Path) -> None:
    for name, names in (
        ("gloss", {"U"}), ("gloss-paper", {"U"}), ("profs", {"U.2", "U.3", "U.4", "U.5"}),
    ):  # fmt: skip
        found = fit(name, with_moments(planted()), rank=2)
        edit, kept = found.edit(2), evidence(found)
        layers = {n: weight.layer for n, weight in PLAN.find(edit.tensors).items()}
        save_edit(tmp_path / name, edit, layers, found.tensors)
        stored = stored_names(edit, layers)
        assert load_bases(tmp_path / name).keys() == names
        tensors = load_file(tmp_path / name)
        for tensor in edit.tensors:
            assert torch.equal(tensors[stored[tensor]["U"]], bases(found)[layers[tensor]])
        assert tensors[f"{EVIDENCE}scores"].tolist() == pytest.approx(
            [candidate.score for candidate in kept.candidates]
        )
        assert tensors[f"{EVIDENCE}candidates"].shape == (len(kept.candidates), D)
        for basis in names:
            values = tensors[f"{EVIDENCE}singular_values.{basis}"].tolist()
            assert values == pytest.approx(kept.singular_values[basis])


def test_default_layers_are_those_of_the_documentation() -> None:
    assert list(RANKINGS) == ["causal", "linear-probe", "mean-difference", "vocabulary"]

    def edited(name: str, plan: Plan, **options: str) -> tuple[int, ...]:
        return edited_layers(configure(name, options, plan.dimensions), plan)[0]

    for name in ("gloss", "gloss-paper", "random"):
        assert edited(name, plan_of(30, 576, 1536)) == tuple(range(7, 27))
        assert edited(name, plan_of(1, 24, 8)) == (0,)
    assert edited("profs", plan_of(24, 1024, 4096)) == tuple(range(10, 24))


def test_layers_are_those_that_are_fitted_and_edited_unless_others_are_to_be_edited() -> None:
    for name, options, fitted, edited in (
        ("gloss", {"layers": "0-1"}, (0, 1), (0, 1)),  # layers alone moves both
        ("gloss", {"layers": "3"}, (3,), (3,)),
        ("gloss", {"layers": "1-3", "edit_layers": "2,4"}, (1, 2, 3), (2, 4)),
        ("gloss-paper", {"layers": "0-1"}, (0, 1), (0, 1)),
        ("gloss-paper", {"layers": "1-3", "edit_layers": "2,4"}, (1, 2, 3), (2, 4)),
        ("profs", {"layers": "3"}, (3,), (3,)),
    ):
        method, desk = configure(name, options, DIMENSIONS), Desk(with_moments(planted()))
        found = method.fit(desk)
        assert [request.layers for request in desk.asked] == [fitted]
        assert edited_layers(method, PLAN) == (edited, True)
        assert tuple(bases(found)) == edited


def test_a_bias_is_edited_with_its_weight_unless_it_is_to_be_kept() -> None:
    for name in ("gloss", "gloss-paper", "profs", "random"):
        seen = with_moments(planted())
        for bias, parts in (("project", {"weight", "bias"}), ("keep", {"weight"})):
            options = {"layers": 3, "rank": 1, "bias": bias}
            names = fit(name, seen, **options).edit(1).tensors
            assert set(names) == {f"model.layers.3.mlp.down_proj.{part}" for part in parts}


def test_layer_lists_are_read() -> None:
    assert parse_layers("layers", "1-3,5, 0", 6) == (0, 1, 2, 3, 5)
    for text in ("", "6", "a", "3-1", "3-1,5", "-1", "1-", "0--2", "0-9999999999"):
        with refused(OptionError, what="-o layers", expected="layers ...", found=text):
            parse_layers("layers", text, 6)


@pytest.mark.parametrize(
    ("options", "what", "expected"),
    [
        ({"rnak": "4"}, "-o rnak: method gloss-paper", "rank, layers, ..."),
        ({"rank": "four"}, "-o rank", "a whole number"),
        ({"rank": "0"}, "-o rank", "1 to 48, the hidden size, or auto"),
        ({"alpha": "x"}, "-o alpha", "a number"),
        ({"alpha": "-inf"}, "-o alpha", "a number"),
        ({"site": "attention"}, "-o site", "ffn or residual"),
        ({"ranking": "magic"}, "-o ranking", "causal or linear-probe or ..."),
    ],
)
def test_wrong_options_are_refused(options: dict[str, str], what: str, expected: str) -> None:
    ((key, value),) = options.items()
    found = key if key == "rnak" else value
    with refused(OptionError, what=what, expected=expected, found=found):
        configure("gloss-paper", options, DIMENSIONS)


def test_a_method_that_does_not_exist_is_refused() -> None:
    with refused(
        OptionError, what="--method", expected=" or ".join(METHODS.names()), found="nonesuch"
    ):
        configure("nonesuch", {}, DIMENSIONS)
