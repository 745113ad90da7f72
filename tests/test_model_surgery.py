"""Model Surgery: what is planted is found, and what is written is what the formula says."""

import json
import weakref
from dataclasses import dataclass, replace
from math import log
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import converter
from converter.calibration.collect import extract
from converter.calibration.pairs import Prose, load_pairs
from converter.calibration.statistics import Activations, Request
from converter.calibration.word_list import load_words
from converter.checkpoints.source import Source
from converter.checkpoints.weights import Weight
from converter.edits.base import Edit
from converter.edits.deltas import AddToRows
from converter.errors import FitError, OptionError
from converter.manifest import Origin
from converter.methods import probe
from converter.methods.base import Proposal
from converter.methods.model_surgery import compare
from converter.methods.options import configure
from converter.methods.probe import TOXIC as ROW
from converter.methods.probe import fit_probe, held_accuracy, train_probe
from converter.models.loading import load_language_model, load_tokenizer
from converter.outputs.checkpoint import write
from converter.release.manifest import read_manifest
from tests.builders.adversary import copy_of
from tests.builders.errors import refused
from tests.builders.invoke import Cli
from tests.builders.models import FFN, HIDDEN, LAYERS, Checkpoints, planned, tiny_recipe
from tests.test_kinds import no_space_left
from tests.test_subspace import Desk

COUNT = 4 * HIDDEN
TOXIC = torch.nn.functional.normalize(
    torch.randn(HIDDEN, generator=torch.Generator().manual_seed(5)), dim=0
)


def sentences(seed: int, count: int = 400, push: float = 2.0) -> tuple[Tensor, Tensor]:
    """Toxic and neutral ones (count, D): noise around a point, and ``push`` along ``TOXIC``."""
    drawn = torch.Generator().manual_seed(seed)
    noise = torch.randn(2, count, HIDDEN, generator=drawn) + 3
    return noise[0] + push * TOXIC, noise[1]


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0))


def test_the_probe_finds_a_planted_direction_whatever_the_sample() -> None:
    found = [fit_probe(*sentences(seed))[0] for seed in (0, 1)]
    assert min(cosine(w, TOXIC) for w in found) > 0.95
    assert cosine(*found) > 0.9


@pytest.mark.parametrize("count", [9, 400])
def test_the_probe_is_at_the_minimum_of_its_loss(count: int) -> None:
    """With fewer sentences than dimensions, and with more: autograd finds no slope there."""
    toxic, neutral = (side.double() for side in sentences(2, count))
    w, c = fit_probe(toxic, neutral)
    x = torch.cat([toxic, neutral])
    ridge = (x - x.mean(0)).square().mean()
    w, b = w.requires_grad_(), torch.tensor(c, dtype=torch.float64).requires_grad_()
    margins = torch.cat([toxic @ w + b, -(neutral @ w + b)])
    loss = torch.nn.functional.softplus(-margins).mean() + ridge / 2 * w.square().sum()
    slopes = torch.autograd.grad(loss, [w, b])
    assert max(float(slope.abs().max()) for slope in slopes) < 1e-12
    assert float(loss.detach()) < log(2)  # that of w = 0


def test_the_probe_is_the_same_with_any_number_of_threads() -> None:
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            found.append(fit_probe(*sentences(0, 3000))[0])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert float((other - found[0]).norm() / found[0].norm()) < 1e-6


def test_the_probe_turns_with_what_it_is_given_and_does_not_see_where_it_lies() -> None:
    toxic, neutral = (side.double() for side in sentences(0))
    turn = torch.linalg.qr(torch.randn(HIDDEN, HIDDEN).double())[0]
    w, c = fit_probe(toxic, neutral)
    turned, other = fit_probe(toxic @ turn + 7, neutral @ turn + 7)
    torch.testing.assert_close(turned, turn.T @ w, rtol=0, atol=1e-10)
    assert other == pytest.approx(c - 7 * float(turned.sum()), abs=1e-9)


def test_the_probe_of_the_paper_is_that_of_a_linear_layer_and_adam() -> None:
    """As written out with a layer, a loss and an optimizer of PyTorch, in the same order."""
    toxic, neutral = sentences(0, 50)
    W, c, start = train_probe(toxic, neutral, 3)
    assert float(start.abs().max()) <= HIDDEN**-0.5 < float(start.abs().max()) * 1.1
    drawn, layer = torch.Generator().manual_seed(3), torch.nn.Linear(HIDDEN, 2).double()
    with torch.no_grad():
        for parameter in (layer.weight, layer.bias):
            noise = torch.rand(parameter.shape, generator=drawn, dtype=torch.float64)
            parameter.copy_((2 * noise - 1) * HIDDEN**-0.5)
    assert torch.equal(start, layer.weight)
    adam = torch.optim.Adam(layer.parameters(), lr=1e-4)
    x, y = torch.cat([toxic, neutral]).double(), torch.tensor([ROW] * 50 + [1 - ROW] * 50)
    for _ in range(20):
        order = torch.randperm(100, generator=drawn)
        for n in range(0, 100, 32):
            adam.zero_grad()
            rows = order[n : n + 32]
            loss = torch.nn.functional.cross_entropy(layer(x[rows]), y[rows])
            torch.autograd.backward(loss)
            adam.step()
    torch.testing.assert_close(W, layer.weight.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(c, layer.bias.detach(), rtol=1e-9, atol=1e-12)


def test_the_probe_of_the_paper_is_mostly_its_random_start() -> None:
    """Two seeds give two directions, where the convex probe has one; and it keeps the sum of its
    rows, which training cannot change: the slopes of both classes are opposite."""
    (one, _, start), (other, _, _) = (train_probe(*sentences(0), seed) for seed in (0, 1))
    assert cosine(one[ROW], start[ROW]) > 0.9
    assert cosine(one[ROW], other[ROW]) < 0.5
    torch.testing.assert_close(one.sum(0), start.sum(0), rtol=0, atol=1e-6)
    assert cosine(one[ROW] - start[ROW], TOXIC) > 0.5


def test_accuracy_is_that_on_pairs_that_the_probe_has_not_seen() -> None:
    assert held_accuracy(*sentences(0, push=8)) == 1.0
    guesses = [held_accuracy(*sentences(seed, 25, push=0.0)) or 0 for seed in range(20)]
    assert sum(guesses) / 20 == pytest.approx(0.5, abs=0.1)  # on those it has seen, it is 0.8
    assert held_accuracy(*sentences(0, 4)) is None


def test_sides_of_one_mean_are_refused() -> None:
    toxic, _ = sentences(0, 20)
    with refused(FitError, what="the toxic and the neutral side have the same mean"):
        fit_probe(toxic, toxic)


def test_a_probe_that_is_not_at_its_minimum_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_STEPS", 2)
    with refused(FitError, what="the probe is not found in 2 steps"):
        fit_probe(*sentences(0))


def test_cosines_are_those_of_float64_and_of_no_row_that_is_zero() -> None:
    drawn = torch.Generator().manual_seed(0)
    matrices = [torch.randn(n, HIDDEN, generator=drawn) for n in (1500, 3)]
    matrices[1][1] = 0
    v = torch.randn(HIDDEN, generator=drawn).double()
    held: list[weakref.ref[Tensor]] = []

    def read(weight: Any) -> Tensor:
        assert not any(matrix() is not None for matrix in held)  # one at a time
        matrix: Tensor = matrices[weight].clone()
        held.append(weakref.ref(matrix))
        return matrix

    weights: Any = [0, 1]
    cosines, lengths = compare(read, weights, v)
    assert len(held) == 2
    whole = torch.cat(matrices).double()
    torch.testing.assert_close(lengths, whole.square().sum(1).sqrt(), rtol=1e-12, atol=0)
    expected = (whole * v).sum(1) / (whole.square().sum(1) * v.square().sum()).sqrt()
    assert cosines[1501] == 0
    torch.testing.assert_close(cosines, expected.nan_to_num(), rtol=0, atol=1e-14)


@dataclass
class GateDesk(Desk):
    """A ``Workbench`` with planted sentences and the weights of a tiny model."""

    source: Source | None = None

    @classmethod
    def of(cls, folder: Path, seed: int = 0) -> "GateDesk":
        source, plan = planned(folder)
        toxic, neutral = sentences(seed)
        seen = Activations({LAYERS: toxic}, {LAYERS: neutral}, None, {})
        return cls(seen, plan=plan, source=source)

    def weight(self, weight: Weight) -> Tensor:
        assert self.source is not None
        return self.source.read(weight.shard, weight.info).float()

    def fit(self, **options: object) -> Proposal:
        texts = {key: str(value) for key, value in options.items()}
        method = configure("model-surgery", texts, self.plan.dimensions)
        method.footprint(self.plan)
        return method.fit(self)


@pytest.fixture
def desk(checkpoints: Checkpoints) -> GateDesk:
    return GateDesk.of(checkpoints("llama", torch.bfloat16))


def gates(folder: Path) -> Tensor:
    """All gate rows of a tiny model (R, D) float64, in order of layer and row."""
    tensors: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    names = [f"model.layers.{layer}.mlp.gate_proj.weight" for layer in range(LAYERS)]
    return torch.cat([tensors[name] for name in names]).double()


def changes(edit: Edit) -> tuple[list[int], Tensor]:
    """The rows of all layers that an edit changes, counted through, and what it adds to them."""
    rows: list[int] = []
    added = set()
    for name, delta in sorted(edit.tensors.items()):
        assert isinstance(delta, AddToRows)
        assert name.endswith("gate_proj.weight")
        rows += (delta.rows + FFN * int(name.split(".")[2])).tolist()
        added.add(tuple(delta.v.tolist()))
    (vector,) = added
    return rows, torch.tensor(vector)


def test_the_rows_are_those_that_point_away_most_and_ties_go_to_the_first(
    desk: GateDesk, checkpoints: Checkpoints
) -> None:
    proposal = desk.fit(scale=0.5)
    rows, added = changes(proposal.edit(0.5))
    W, v = gates(checkpoints("llama", torch.bfloat16)), fit_probe(*sentences(0))[0]
    cosines = [(float(row @ v / (row.norm() * v.norm())), i) for i, row in enumerate(W)]
    assert rows == sorted(i for _, i in sorted(cosines)[:COUNT])
    assert proposal.evidence["largest_cosine"] == pytest.approx(sorted(cosines)[COUNT - 1][0])
    median = float(W.norm(dim=1).median())
    assert cosine(added, TOXIC) > 0.95
    assert float(added.norm()) == pytest.approx(median / 2)
    counts = proposal.evidence["rows_of_layers"]
    assert counts == {str(n): sum(n == i // FFN for i in rows) for n in range(LAYERS)}
    assert desk.asked == [Request("final", "mean", (LAYERS,), second_moment=False)]


def test_of_equal_rows_the_first_are_taken(desk: GateDesk, monkeypatch: Any) -> None:
    monkeypatch.setattr(desk, "weight", lambda weight: torch.ones(FFN, HIDDEN))
    assert changes(desk.fit(scale=1, count=50).edit(1.0))[0] == list(range(50))


def test_alpha_is_what_the_probe_is_multiplied_by(desk: GateDesk) -> None:
    proposal = desk.fit(alpha=3)
    assert not proposal.is_free
    _, added = changes(proposal.edit(proposal.strengths[0]))
    expected = 3 * fit_probe(*sentences(0))[0] / 2  # W[toxic] of the softmax
    torch.testing.assert_close(added.double(), expected, rtol=1e-6, atol=0)
    assert proposal.evidence["probe_length"] == pytest.approx(float(expected.norm()) / 3)


def test_the_letter_adds_the_probe_of_the_paper(desk: GateDesk) -> None:
    proposal = desk.fit(alpha=1, probe="paper", draw=4)
    W, _, start = train_probe(*sentences(0), 4)
    rows, added = changes(proposal.edit(proposal.strengths[0]))
    torch.testing.assert_close(added.double(), W[ROW], rtol=1e-6, atol=0)
    assert proposal.evidence["probe_start_cosine"] == pytest.approx(cosine(W[ROW], start[ROW]))
    sides, held = sentences(0), torch.arange(400) % 5 == 4
    U, c, _ = train_probe(sides[0][~held], sides[1][~held], 4)
    chosen = [(side[held].double() @ U.T + c).argmax(1) for side in sides]
    right = (chosen[0] == ROW).double().mean() + (chosen[1] != ROW).double().mean()
    assert proposal.evidence["probe_accuracy"] == pytest.approx(float(right) / 2)
    assert rows != changes(desk.fit(alpha=1).edit(1.0))[0]
    assert "probe_start_cosine" not in desk.fit(alpha=1).evidence


def test_the_scale_is_free_unless_it_is_typed(desk: GateDesk) -> None:
    free, typed = desk.fit(), desk.fit(scale=0.3)
    assert (free.strengths, free.is_free) == ((0.125, 0.25, 0.5, 1.0), True)
    assert (typed.strengths, typed.is_free) == ((0.3,), False)
    short, long = (changes(free.edit(scale))[1] for scale in (0.25, 1.0))
    torch.testing.assert_close(long, 4 * short)


def test_controls_are_random_rows_and_random_vectors_in_turn(desk: GateDesk) -> None:
    proposal = desk.fit(scale=0.5)
    rows, v = changes(proposal.edit(0.5))
    for seed in (0, 2, -4):
        other, same = changes(proposal.control(0.5, seed))
        assert torch.equal(same, v)
        assert len(other) == COUNT
        assert other != rows
    for seed in (1, 3, -1):
        same_rows, other_v = changes(proposal.control(0.5, seed))
        assert same_rows == rows
        assert float(other_v.norm()) == pytest.approx(float(v.norm()))
        assert abs(cosine(other_v, v)) < 0.5
    first, second = (changes(proposal.control(0.5, seed))[0] for seed in (0, 2))
    assert first != second
    assert proposal.control_kinds == ("random rows", "a random vector")


def test_random_rows_come_from_a_seed_and_have_random_vectors_as_controls(desk: GateDesk) -> None:
    drawn = {
        draw: changes(desk.fit(scale=0.5, rows="random", draw=draw).edit(0.5)) for draw in (0, 1)
    }
    again = desk.fit(scale=0.5, rows="random", draw=1)
    assert changes(again.edit(0.5))[0] == drawn[1][0] != drawn[0][0]
    assert torch.equal(drawn[0][1], drawn[1][1])
    assert len(set(drawn[0][0])) == COUNT
    assert drawn[0][0] != changes(desk.fit(scale=0.5).edit(0.5))[0]
    for seed in (0, 1):
        rows, v = changes(again.control(0.5, seed))
        assert rows == drawn[1][0]
        assert abs(cosine(v, drawn[1][1])) < 0.5
    assert again.control_kinds == ("a random vector",)


@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf])
def test_gate_rows_without_a_length_are_refused(
    value: float, desk: GateDesk, monkeypatch: Any
) -> None:
    monkeypatch.setattr(desk, "weight", lambda weight: torch.full((FFN, HIDDEN), value))
    with refused(FitError, what="the gate rows of the model"):
        desk.fit(scale=1)


def test_what_the_footprint_refuses(desk: GateDesk) -> None:
    assert desk.fit(count=LAYERS * FFN, scale=1).evidence["rows_of_layers"]["0"] == FFN
    with refused(OptionError, what="-o count", expected="at most 288, ...", found="289"):
        desk.fit(count=LAYERS * FFN + 1)
    with refused(OptionError, what="-o scale and -o alpha", expected="one of them"):
        desk.fit(scale=1, alpha=1)
    narrow = replace(desk.plan.architecture, head=None, embedding_shape=(400, 16))
    desk.plan = replace(desk.plan, architecture=narrow)
    with refused(OptionError, what="--method model-surgery", found="16"):
        desk.fit()


@pytest.mark.parametrize(
    ("architecture", "code", "says"),
    [
        ("gpt2", 2, "this checkpoint has no gate_proj"),
        ("mixtral", 2, "this checkpoint has no gate_proj"),
        ("deepseek_v3", 2, "expected a model without experts, found DeepseekV3ForCausalLM"),
        ("phi3", 4, "gate_up_proj.weight holds several weights"),
    ],
)
def test_models_whose_gates_are_missing_or_shared_are_refused_from_the_headers(
    architecture: str, code: int, says: str, checkpoints: Checkpoints, cli: Cli, tmp_path: Path
) -> None:
    args = (checkpoints(architecture), tmp_path / "out", "--method", "model-surgery")
    for command in (("convert", *args), ("plan", args[0], *args[2:])):
        error = cli(*command, code=code, says=says).stderr.strip().splitlines()[-1]
        assert error.startswith("error: ")
        assert says in error
    assert not (tmp_path / "out").exists()


def test_what_the_head_is_given_is_averaged_over_the_tokens_of_each_sentence(
    checkpoints: Checkpoints,
) -> None:
    """As transformers gives it: after the norm, and without the token that is put first."""
    source, plan = planned(checkpoints("llama"))
    model = load_language_model(source, plan, load_tokenizer(source.folder), torch.float32, "cpu")
    pairs = load_pairs("builtin", load_words("builtin"), 16, 0)
    request = Request("final", "mean", (LAYERS,), second_moment=False)
    nothing = Prose((), Origin(name="test"), "")
    seen, _ = extract(model, request, pairs, nothing, batch_size=5)
    module: Any = model.module
    for side, texts in (("toxic", [p.toxic for p in pairs.pairs]),
                        ("neutral", [p.neutral for p in pairs.pairs])):  # fmt: skip
        for text, found in zip(texts, getattr(seen, side)[LAYERS], strict=True):
            ids = [0, *model.tokenizer(text, add_special_tokens=False)["input_ids"]]
            with torch.inference_mode():
                states = module.model(torch.tensor([ids])).last_hidden_state[0]
            torch.testing.assert_close(found, states[1:].mean(0), rtol=1e-4, atol=1e-5)


OPTIONS = {"scale": "0.5"}


@pytest.fixture(scope="module")
def source(checkpoints: Checkpoints) -> Path:
    return checkpoints("llama", torch.bfloat16)


def recipe_of(source: Path, **changes: Any) -> converter.Recipe:
    given = {"method": "model-surgery", "num_pairs": 64, "options": OPTIONS}
    return tiny_recipe(source, **given | changes)


@pytest.fixture(scope="module")
def written(source: Path, shared_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted model. Read only."""
    out = tmp_path_factory.mktemp("surgery") / "out"
    converter.convert(recipe_of(source), out)
    return out


def stored(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in folder.glob("model*.safetensors"):
        tensors |= load_file(path)
    return tensors


def test_every_element_is_what_the_formula_says(source: Path, written: Path) -> None:
    """round(W + a v) in the chosen rows, where v and the rows are the recorded ones; else W."""
    edit = converter.load_edit(written)
    before, after = stored(source), stored(written)
    assert before.keys() == after.keys()
    for name, W in before.items():
        expected = W.clone()
        if name in edit.tensors:
            delta = edit.tensors[name]
            assert isinstance(delta, AddToRows)
            added = W[delta.rows].double() + delta.v.double()
            expected[delta.rows] = added.to(torch.bfloat16)
            assert not torch.equal(expected, W)
        assert torch.equal(after[name].view(torch.int16), expected.view(torch.int16)), name
    assert len(changes(edit)[0]) == COUNT
    manifest = read_manifest(written)
    assert {edited.kind for edited in manifest.edited} == {"add-to-rows"}


def test_the_recorded_rows_and_vector_follow_from_the_recorded_probe(
    source: Path, written: Path
) -> None:
    rows, added = changes(converter.load_edit(written))
    W, probe = gates(source), load_file(written / "gloss_edit.tensors")["evidence.probe"].double()
    cosines = W @ probe / (W.norm(dim=1) * probe.norm())
    assert rows == cosines.argsort()[:COUNT].sort().values.tolist()
    scale = 0.5 * float(W.norm(dim=1).median() / probe.norm())
    torch.testing.assert_close(added.double(), scale * probe, rtol=1e-6, atol=0)


def test_it_is_verified_a_flip_is_found_and_a_replay_gives_the_same_bytes(
    source: Path, written: Path, cli: Cli, tmp_path: Path
) -> None:
    cli("verify", written, code=0)
    cli("verify", written, "--source", source, code=0)
    result = cli("replay", written, tmp_path / "again", "--source", source, "--json", code=0)
    assert json.loads(result.stdout)["identical"] is True
    flipped = copy_of(written, tmp_path / "flipped")
    name = next(iter(converter.load_edit(written).tensors))
    shard = next(p for p in sorted(flipped.glob("model*.safetensors")) if name in load_file(p))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    cli("verify", flipped, code=8, says=shard.name)


def test_a_streamed_model_gives_the_same_edit(source: Path, written: Path, tmp_path: Path) -> None:
    converter.convert(recipe_of(source, forward="streamed"), tmp_path / "out")
    (rows, v), (expected, u) = (
        changes(converter.load_edit(folder)) for folder in (tmp_path / "out", written)
    )
    assert rows == expected
    torch.testing.assert_close(v, u, rtol=1e-4, atol=1e-6)


def test_an_interrupted_run_goes_on_to_the_same_bytes(
    source: Path, written: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ("convert", source, tmp_path / "out", "--method", "model-surgery", "-o", "scale=0.5",
            "--num-pairs", 64, "--no-guard")  # fmt: skip
    with monkeypatch.context() as broken:
        broken.setattr(write, "_small_files", no_space_left)
        cli(*args, code=7)
    cli(*args, code=0, says="shards are finished already")
    for path in written.glob("*.safetensors"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_an_adapter_cannot_hold_it(source: Path, cli: Cli, tmp_path: Path) -> None:
    args = (source, tmp_path / "out", "--method", "model-surgery", "--output", "adapter")
    cli("convert", *args, code=2, says="an edit of low rank")
    assert not (tmp_path / "out").exists()


def test_the_guard_refuses_it_on_a_random_model(source: Path, cli: Cli, tmp_path: Path) -> None:
    args = ("--method", "model-surgery", "-o", "scale=0.5", "--num-pairs", 64)
    cli("convert", source, tmp_path / "out", *args, code=9)
    says = "not compared with that under a random vector; --guard-draws 2 or more would"
    cli(
        "convert", source, tmp_path / "out", *args, "--force", "--guard-draws", 1, code=0, says=says
    )
    guard = read_manifest(tmp_path / "out").guard
    assert guard is not None
    assert len(guard.controls) == 1
    assert guard.reasons
