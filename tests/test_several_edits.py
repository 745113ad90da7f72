"""Several edits are measured together: a streamed model's weights are read once for all of them.

Each edit must get the same bits as if it were measured alone.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from converter.calibration.instances import Lesson, load_instances
from converter.calibration.pairs import load_pairs, load_prose
from converter.calibration.split import Parts, split
from converter.calibration.word_list import load_words
from converter.checkpoints.plan import Plan
from converter.edits.base import Edit
from converter.edits.deltas import WeakenSubspace
from converter.entrypoints.convert import prepare
from converter.evaluation.defence import DefenceProbe
from converter.evaluation.guard import examine
from converter.evaluation.heldout import Probe, choose_strength, probe_of
from converter.manifest import GuardRecord
from converter.methods.base import Proposal
from converter.methods.workbench import Bench
from converter.models.batching import Encoder, Sentence
from converter.models.edited import edited, editing
from converter.models.hooks import UNEDITED
from converter.models.likelihood import (
    LogProbabilities,
    entering,
    log_probabilities,
    log_probabilities_under,
)
from converter.models.resident import Model
from converter.models.streamed import StreamedModel
from converter.models.streamed_memory import HiddenStates, Weights
from tests.builders.edits import removal
from tests.builders.methods import METHODS, draw
from tests.builders.models import HIDDEN, LAYERS, Checkpoints, tiny_recipe

TEXTS = [
    "the river rises in a range of low hills",
    "short",
    "a lease sets out the rights and duties of the person who owns a building",
    "glass is neither a crystal nor an ordinary liquid, it is something else",
    "you stupid idiot, get out",
]
WORDS = load_words("builtin")
FIRST = 2
"""The first layer that is edited."""


def bench_of(folder: Path, way: str = "streamed", **changes: Any) -> Bench:
    recipe = tiny_recipe(folder, forward=way, guard=True, **changes)
    source, plan, _ = prepare(recipe)
    return Bench.of(recipe, source, plan, WORDS, "cpu")


def parts() -> Parts:
    return split(load_pairs("builtin", WORDS, 64, 0), load_prose("builtin"), 0)


def subspace(seed: int) -> Tensor:
    basis: Tensor = torch.linalg.qr(draw(seed, HIDDEN, 4))[0]
    return basis


def made_by(bench: Bench, name: str) -> Edit:
    """The edit of layer ``FIRST`` by a method of the tests."""
    return METHODS[name](layer=FIRST).edit(bench, 0.2, 3)


def head_of_its_own(plan: Plan) -> Edit:
    route = plan.head_route()
    assert route is not None
    head = draw(4, *route.embedding.info.shape)
    return Edit(created={route.name: head}, patches={"config.json": dict(route.config)})


def several(bench: Bench, kind: str) -> list[Edit]:
    """Edits of several kinds, as many as a model of a kind allows."""
    plan = bench.plan
    (weight,) = plan.weights("o_proj", [FIRST])
    weaker = WeakenSubspace(subspace(2), torch.tensor([0.5], dtype=torch.float64))
    found = [
        removal(plan, dict.fromkeys((FIRST, 4), subspace(1))),
        Edit({weight.info.name: weaker}),
        removal(plan, {3: subspace(0)}),
        made_by(bench, "replaced"),
    ]
    if kind == "llama":
        found += [made_by(bench, name) for name in METHODS if name != "replaced"]
    if kind in ("llama-tied", "gpt2"):
        found.append(head_of_its_own(plan))
    return found


def coded(model: Model) -> list[list[Sentence]]:
    encode = Encoder(model.tokenizer, model.module)
    return [[encode(text, "mean", ()) for text in some] for some in (TEXTS[:2], TEXTS[2:])]


def same(one: Sequence[LogProbabilities], other: Sequence[LogProbabilities]) -> bool:
    pairs = zip(one, other, strict=True)
    return all(all(map(np.array_equal, a, b)) and len(a) == len(b) for a, b in pairs)


@pytest.mark.parametrize("way", ["resident", "streamed"])
@pytest.mark.parametrize(
    "kind", ["llama", "llama-tied", "gpt2", "gemma2", "mixtral", "deepseek_v3", "gpt_oss"]
)
def test_together_each_edit_has_the_bits_that_it_has_alone(
    kind: str, way: str, checkpoints: Checkpoints
) -> None:
    bench = bench_of(checkpoints(kind), way)
    model, edits = bench.load(), several(bench, kind)
    texts = coded(model)
    alone = [log_probabilities(model, texts)]
    for edit in edits:
        with edited(model.module, bench.plan, edit):
            alone.append(log_probabilities(model, texts))
    runs = [*UNEDITED, *(editing(model.module, bench.plan, edit) for edit in edits)]
    entered = entering(model, texts, FIRST)
    assert entered is not None
    for start in (None, entered):
        found = log_probabilities_under(model, runs, texts, start)
        assert all(map(same, found, alone))
        assert len(found) == len(alone)
    changed = [edit for edit in edits if edit.tensors or edit.created]
    assert sum(not same(one, alone[0]) for one in alone[1:]) == len(changed) >= 4
    assert not any(module._forward_hooks for module in model.module.modules())


class Loads:
    """How often each part of streamed models is loaded, and the bytes of states on disk."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.parts, self.filed = Counter[str](), 0
        load, leave = Weights.load, HiddenStates.__exit__

        def loading(weights: Weights, part: str) -> None:
            self.parts[part] += part not in weights.loaded
            load(weights, part)

        def leaving(states: HiddenStates, *reason: object) -> None:
            self.filed += states.filed
            leave(states, *reason)

        monkeypatch.setattr(Weights, "load", loading)
        monkeypatch.setattr(HiddenStates, "__exit__", leaving)

    def taken(self) -> list[int]:
        """Of each layer since the last call."""
        found = Counter[int]()
        for part, count in self.parts.items():
            if number := re.search(r"\.(\d+)$", part):
                found[int(number[1])] += count
        self.parts.clear()
        return [found[layer] for layer in range(LAYERS)]


def proposal_of(bench: Bench, name: str = "rank-one") -> Proposal:
    return METHODS[name](layer=FIRST).fit(bench)


def streamed(bench: Bench, held: int | None = None) -> StreamedModel:
    """The model of a bench, with so many bytes for hidden states."""
    model = bench.load()
    assert isinstance(model, StreamedModel)
    if held is not None:
        model._held = held
    return model


def judged(bench: Bench, proposal: Proposal, first: int = FIRST) -> GuardRecord:
    probe = probe_of(bench, parts().report, first)
    return examine(probe, proposal, 0.04, budget=10, draws=3, seed=0)


@pytest.mark.parametrize(("name", "first"), [("rank-one", FIRST), ("created-bias", 0)])
def test_the_guard_reads_each_layer_once(
    name: str, first: int, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unedited, the edit and three controls; layers below the first edited one as well. The biases
    are created in all layers.
    """
    bench, loads = bench_of(checkpoints("llama")), Loads(monkeypatch)
    proposal = proposal_of(bench, name)
    together = judged(bench, proposal, first)
    assert loads.taken() == [1] * LAYERS
    assert loads.filed == 0

    streamed(bench, 0)  # a pass for each, as if nothing were together
    assert judged(bench, proposal, first) == together
    assert loads.taken() == [1] * first + [5] * (LAYERS - first)
    assert loads.filed > 0

    probe = probe_of(bench, parts().report, first)
    edits = [proposal.edit(0.04), *(proposal.control(0.04, seed) for seed in range(3))]
    assert [probe.measure(edit) for edit in edits] == [together.edit, *together.controls]
    assert probe.perplexity == together.perplexity
    assert len({str(edit) for edit in [together.edit, *together.controls]}) == 4


def test_as_many_edits_go_together_as_have_their_hidden_states_in_memory(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, loads = bench_of(checkpoints("llama")), Loads(monkeypatch)
    proposal = proposal_of(bench)
    together = judged(bench, proposal)
    model, sizes = streamed(bench), list[int]()
    size = model._states_nbytes

    def noted(batched: Any) -> int:
        sizes.append(size(batched))
        return sizes[-1]

    monkeypatch.setattr(model, "_states_nbytes", noted)
    judged(bench, proposal)
    assert len(set(sizes)) == 1
    for sets in (1, 2, 3, 5):
        streamed(bench, (sets + 1) * sizes[0] - 1)
        loads.taken()
        assert judged(bench, proposal) == together
        assert loads.taken() == [1] * FIRST + [ceil(5 / sets)] * (LAYERS - FIRST)
        assert loads.filed == 0


def test_a_choice_reads_each_layer_once_for_each_strength_that_it_tries(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The unedited model goes with the first of them; resident, the choice is the same."""
    found = {}
    for way in ("resident", "streamed"):
        bench, loads = bench_of(checkpoints("llama"), way), Loads(monkeypatch)
        probe = probe_of(bench, parts().choose, FIRST)
        found[way] = choose_strength(probe, proposal_of(bench), 10)
        tried = len(found[way].tried)
        assert tried == 2
        assert loads.taken() == [0] * LAYERS if way == "resident" else [1] * FIRST + [2] * 4
    for one, other in zip(found["resident"].tried, found["streamed"].tried, strict=True):
        assert one.strength == other.strength
        assert one.toxic_change.value == pytest.approx(other.toxic_change.value, abs=1e-5)


def test_refusals_are_measured_in_one_pass(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, loads = bench_of(checkpoints("llama")), Loads(monkeypatch)
    edits = [made_by(bench, "rank-one"), made_by(bench, "replaced"), Edit()]
    given = bench.load(), bench.plan, Lesson(load_instances().items[:1])
    probe = DefenceProbe(*given)
    together = probe.measure_all(edits)
    assert loads.taken() == [1] * LAYERS
    other = DefenceProbe(*given)
    assert [other.measure_all([edit])[0] for edit in edits] == together
    assert loads.taken() == [3] * LAYERS
    assert other.loss == probe.loss


@pytest.mark.parametrize("way", ["resident", "streamed"])
def test_an_edit_below_the_layers_that_ran_once_runs_them_again(
    way: str, checkpoints: Checkpoints
) -> None:
    bench = bench_of(checkpoints("llama"), way)
    low, high = (removal(bench.plan, {n: subspace(n)}) for n in (FIRST - 1, FIRST))
    probe, whole = (Probe(bench.load(), bench.plan, parts().report, n) for n in (FIRST, 0))
    assert probe.measure_all([high, low]) == [whole.measure(edit) for edit in (high, low)]


@pytest.mark.parametrize("way", ["resident", "streamed"])
def test_an_error_leaves_no_hook_behind(
    way: str, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = bench_of(checkpoints("llama"), way)
    model = bench.load()
    texts = coded(model)
    before = log_probabilities(model, texts)
    runs = [editing(model.module, bench.plan, edit) for edit in several(bench, "llama")]
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", fails_at(3))
    with pytest.raises(ValueError, match="enough") as error:
        log_probabilities_under(model, runs, texts)
    monkeypatch.undo()
    assert error.tb is not None  # its frames are alive, and with them the generator
    assert not any(module._forward_hooks for module in model.module.modules())
    assert same(log_probabilities(model, texts), before)


def fails_at(count: int) -> Callable[..., Any]:
    calls, run = iter(range(count)), torch.nn.functional.cross_entropy

    def cross_entropy(*args: Any, **kwargs: Any) -> Any:
        if next(calls, None) is None:
            raise ValueError("enough of this")
        return run(*args, **kwargs)

    return cross_entropy
