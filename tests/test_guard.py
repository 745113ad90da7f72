"""The split, the choice of the strength and the guard: a tool that cannot fool itself."""

import gc
import json
import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from converter.calibration.pairs import Pair, Pairs, Prose, load_pairs, load_prose
from converter.calibration.split import split
from converter.calibration.word_list import load_words
from converter.checkpoints.names import EDIT_FILE
from converter.checkpoints.plan import read_plan
from converter.checkpoints.resolve import resolve
from converter.edits.base import Edit
from converter.edits.deltas import RemoveSubspace
from converter.edits.edit_file import load_bases
from converter.entrypoints.convert import prepare
from converter.errors import DataError, GuardError
from converter.evaluation import measure
from converter.evaluation.guard import examine, judge
from converter.evaluation.heldout import Probe, choose_strength, nearest_strength, probe_of
from converter.manifest import Estimate, Measured, Origin
from converter.methods import workbench
from converter.methods.base import Proposal
from converter.methods.subspace import Removal, Subspace, neutral_energy
from converter.methods.workbench import Bench
from converter.models.edited import edited
from converter.models.loading import load_language_model
from converter.models.resident import choose_dtype, held_out_dtype
from converter.recipe import Recipe
from converter.release.manifest import read_manifest
from tests.builders.edits import removal
from tests.builders.errors import refused
from tests.builders.invoke import Cli, invoke
from tests.builders.planted import AXES, MASSIVE, TOXIC, WRITING, planted_args

WORDS = load_words("builtin")
TEST = Origin(name="test")


def test_no_sentence_is_in_two_parts() -> None:
    pairs, prose = load_pairs("builtin", WORDS, None, 0), load_prose("builtin")
    parts = split(pairs, prose, 0)
    dealt = [parts.fit, parts.choose, parts.report]
    for side in ("toxic", "neutral", "group"):
        texts = [{getattr(pair, side) for pair in part.pairs.pairs} for part in dealt]
        assert len(set.union(*texts)) == sum(map(len, texts))
    assert sum(len(part.pairs.pairs) for part in dealt) + parts.dropped == 480
    paragraphs = [p for part in dealt for p in part.prose.paragraphs]
    assert len(set(paragraphs)) == len(paragraphs)
    assert set(paragraphs) < set(prose.paragraphs)
    assert 3000 <= sum(len(p.split()) for p in parts.fit.prose.paragraphs) <= 3200
    for part in dealt[1:]:
        assert 90 <= len(part.pairs.pairs) <= 110
        assert 2300 <= sum(len(p.split()) for p in part.prose.paragraphs) <= 2600
    assert split(pairs, prose, 0) == parts
    assert split(pairs, prose, 1).report.pairs.sha256 != parts.report.pairs.sha256


def test_a_sentence_on_the_other_side_of_another_part_drops_its_pair() -> None:
    rows = [Pair(f"toxic {i}", f"neutral {i}", ((0, 5),)) for i in range(99)]
    rows.append(Pair("neutral 7", "something else", ((0, 7),)))
    rows += [Pair(f"another {i}", "neutral 3", ((0, 7),)) for i in range(3)]  # one group
    for seed in range(20):
        parts = split(Pairs(tuple(rows), TEST, ""), Prose(("a b", "c d", "e f"), TEST, ""), seed)
        sides = [
            {text for p in part.pairs.pairs for text in (p.toxic, p.neutral)}
            for part in (parts.fit, parts.choose, parts.report)
        ]
        assert len(set.union(*sides)) == sum(map(len, sides))
        assert parts.dropped <= 1


def test_too_few_pairs_for_three_parts_are_refused() -> None:
    rows = tuple(Pair(f"toxic {i}", "the same", ((0, 5),)) for i in range(40))
    with refused(DataError, what="too few pairs are left to fit on", expected="at least 8"):
        split(Pairs(rows, TEST, ""), Prose(("a b", "c d", "e f"), TEST, ""), 0)


def measured(
    ratio: float, change: float, error: float = 0.0, context: float | None = None
) -> Measured:
    estimate = Estimate(value=change, error=error)
    return Measured(
        perplexity_ratio=Estimate(value=ratio, error=error),
        toxic_change=estimate,
        teacher_forced=estimate,
        context_ratio=None if context is None else Estimate(value=context, error=error),
    )


class Scale:
    """Stands in for a probe: perplexity and toxic words follow the rank."""

    def __init__(self, ratios: dict[int, float], context: dict[int, float] | None = None) -> None:
        self.ratios = ratios
        self.context = context or {}
        self.asked: list[int] = []

    def measure(self, edit: Edit) -> Measured:
        self.asked.append(edit.rank)
        context = self.context.get(edit.rank)
        return measured(self.ratios[edit.rank], -float(edit.rank), 0.001, context)


def by_rank(*ranks: int) -> Proposal:
    """A proposal of the first columns of a basis."""

    def edit(rank: float) -> Edit:
        return Edit({"w": RemoveSubspace(torch.eye(16)[:, : int(rank)])})

    return Proposal(ranks, True, edit, lambda rank, seed: edit(rank))


def test_prose_is_dealt_to_all_three_parts_or_refused() -> None:
    pairs = load_pairs("builtin", WORDS, 64, 0)
    for lengths in ((3000,), (3000, 10, 10), (10, 10, 3000), (50, 50, 50)):
        texts = tuple(" ".join(f"{k}w{i}" for i in range(n)) for k, n in enumerate(lengths))
        parts = split(pairs, Prose(texts, TEST, ""), 0)
        assert all(p.prose.paragraphs for p in (parts.fit, parts.choose, parts.report))
    with refused(
        DataError,
        what="the neutral text cannot be split into three parts",
        expected="three different paragraphs, or more than 300 words",
    ):
        split(pairs, Prose(("one", "two"), TEST, ""), 0)


@pytest.mark.parametrize(
    ("budget", "rank"), [(1.0115, 1), (1.0251, 2), (1.0559, 4), (1.2, 8), (1.0609, 4), (1.0611, 6)]
)
def test_the_rank_is_the_largest_within_the_budget_with_its_error(budget: float, rank: int) -> None:
    probe = Scale({r: 1 + 0.01 * r for r in (1, 2, 3, 4, 6, 8)})
    proposal = by_rank(*probe.ratios)
    found = choose_strength(cast(Probe, probe), proposal, budget)
    assert found.strength == rank
    assert len(probe.asked) <= 4
    assert found.automatic
    tried = [trial.strength for trial in found.tried]
    assert tried == sorted(probe.asked)
    with refused(
        GuardError,
        expected="a perplexity ratio of at most 1.01 on held-out neutral text",
        found="1.0100 with a standard error of 0.0010",
    ):
        choose_strength(cast(Probe, probe), proposal, 1.01)


def test_the_rank_keeps_within_what_the_guard_refuses_of_other_words_too() -> None:
    """On prose every rank costs nothing, and yet 4 is the first to be over 1.25 less an error."""
    ranks = (1, 2, 3, 4, 6, 8)
    probe = Scale(dict.fromkeys(ranks, 1.0), {r: 1.01 + 0.0598 * r for r in ranks})
    assert choose_strength(cast(Probe, probe), by_rank(*ranks), 1.03).strength == 3
    probe = Scale(dict.fromkeys(ranks, 1.0), dict.fromkeys(ranks, 1.3))
    with refused(
        GuardError,
        expected="a perplexity ratio of at most 1.25 on the other words of held-out toxic text",
        found="1.3000 with a standard error of 0.0010",
    ):
        choose_strength(cast(Probe, probe), by_rank(*ranks), 1.03)


@pytest.mark.parametrize(
    ("ratio", "rank"), [(1.0, 1), (1.02, 2), (1.0251, 3), (1.049, 4), (1.051, 6), (2.0, 8)]
)
def test_the_rank_of_a_perplexity_is_the_nearest(ratio: float, rank: int) -> None:
    probe = Scale({r: 1 + 0.01 * r for r in (1, 2, 3, 4, 6, 8)})
    edit = by_rank(*probe.ratios).edit
    assert nearest_strength(lambda r: probe.measure(edit(r)), [*probe.ratios], ratio) == rank
    assert len(probe.asked) <= 4


@pytest.mark.parametrize(
    ("edit", "controls", "energy", "says"),
    [
        (measured(1.02, -1.0), [-0.1, -0.2], 0.01, None),
        (measured(1.04, -1.0), [-0.1, -0.2], 0.01, "perplexity on neutral text is 1.04 times"),
        (measured(float("nan"), -1.0), [-0.1], None, "perplexity on neutral text is nan times"),
        (measured(float("inf"), -1.0), [-0.1], None, "perplexity on neutral text is inf times"),
        (measured(1.0, -0.05), [0.0], None, "falls by 0.050 nats, less than 0.1"),
        (measured(1.0, 0.5), [0.9], None, "falls by -0.500 nats, less than 0.1"),
        (measured(1.0, float("nan")), [0.9], None, "falls by nan nats"),
        (measured(1.0, -1.0), [-0.6, -0.5], None, "under the controls by 0.550"),
        (measured(1.0, -1.0), [0.3, -0.3], None, None),
        (measured(1.0, -1.0), [3.0, -3.0], None, "two standard errors (6.000) more are needed"),
        (measured(1.0, -1.0, 0.5), [-0.2], None, "two standard errors (1.414) more are needed"),
        (measured(1.0, -1.0), [0.0], 0.11, "11% of what neutral text writes"),
        (measured(1.0, -1.0, context=1.1), [0.0], None, None),
        (measured(1.0, -1.0, context=1.251), [0.0], None, "toxic text is 1.251 times what it was"),
        (measured(1.0, -1.0, context=float("nan")), [0.0], None, "toxic text is nan times"),
    ],
)
def test_the_guard_refuses_for_a_reason(
    edit: Measured, controls: list[float], energy: float | None, says: str | None
) -> None:
    error = edit.toxic_change.error
    reasons, warnings = judge(edit, [measured(1.0, c, error) for c in controls], energy, 1.03)
    if says is None:
        assert reasons == []
        assert warnings == []
    else:
        assert says in "; ".join(reasons)


@pytest.mark.parametrize(
    ("kinds", "says"),
    [
        ((), None),
        (("other", "one", "other", "other"), "under one by 0.900; 2 times that"),
        (("one", "one", "one", "other"), None),
    ],
)
def test_an_edit_has_to_beat_each_kind_of_controls(
    kinds: tuple[str, ...], says: str | None
) -> None:
    """The mean over all of them would let pass what does hardly more than one kind."""
    controls = [measured(1.0, change) for change in (0.0, -0.9, 0.0, 0.0)]
    reasons, _ = judge(measured(1.0, -1.0), controls, None, 1.03, None, None, kinds)
    assert len(reasons) == (says is not None)
    assert says is None or says in reasons[0]


def test_a_doubtful_pass_is_said() -> None:
    assert "but not by its standard error" in judge(
        measured(1.025, -1, 0.01), [measured(1, 0)], None, 1.03,
    )[1][0]  # fmt: skip
    context = judge(measured(1, -1, context=1.2), [measured(1, 0)], None, 1.03)
    assert context[0] == []
    assert "other words of toxic text is 1.200 times what it was" in context[1][0]
    assert "5.0% of what neutral" in judge(measured(1, -1), [measured(1, 0)], 0.05, 1.03)[1][0]
    assert neutral_energy(torch.eye(4)[:, :1], torch.diag(torch.tensor([1.0, 3, 0, 0]))) == 0.25


@pytest.mark.slow
def test_a_planted_direction_passes_and_a_massive_one_is_refused(
    planted: Path, cli: Cli, tmp_path: Path
) -> None:
    args = (*planted_args(planted, rank=None), "--json")
    result = cli("convert", planted, tmp_path / "out", *args, code=0)
    basis = load_bases(tmp_path / "out" / EDIT_FILE)["U"]
    assert float((basis.T @ TOXIC).norm()) > 0.95
    assert float((basis.T @ MASSIVE).norm()) < 0.01
    guard = json.loads(result.stdout)["guard"]
    assert guard["reasons"] == []
    assert guard["edit"]["teacher_forced"]["value"] < 0.6  # half of the words follow a curse
    assert guard["edit"]["perplexity_ratio"]["value"] < 1.03
    assert guard["edit"]["context_ratio"]["value"] < 1.1
    assert guard["context_tokens"] > 100
    told = cli("convert", planted, tmp_path / "b", *args[:-1], code=0).stdout
    assert "words beside them: perplexity x " in told

    recipe = Recipe(source=str(planted), pairs=str(planted.parent / "pairs.jsonl"))
    source, plan, _ = prepare(recipe)
    bench = Bench.of(recipe, source, plan, WORDS, "cpu")
    parts = split(load_pairs(recipe.pairs, WORDS, None, 0), load_prose("builtin"), 0)
    probe = probe_of(bench, parts.report)
    for direction, is_refused in ((TOXIC, False), (MASSIVE, True), (AXES[9], True)):
        proposal = proposed(bench, direction)
        found = examine(probe, proposal, 1, budget=1.03, draws=2, seed=0)
        assert bool(found.reasons) == is_refused, found
        assert found.edit == probe.measure(proposal.edit(1))
        assert found.controls == tuple(probe.measure(proposal.control(1, s)) for s in (0, 1))
    broken = removal(plan, dict.fromkeys(WRITING, MASSIVE[:, None]))
    assert probe.measure(broken).perplexity_ratio.value > 1.5


@pytest.fixture
def halved(planted: Path, tmp_path: Path) -> Path:
    """The planted model in bfloat16."""
    source = shutil.copytree(planted, tmp_path / "model")
    weights = {name: x.bfloat16() for name, x in load_file(source / "model.safetensors").items()}
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    return source


@pytest.mark.slow
def test_the_dtype_of_held_out_text_does_not_touch_the_edit(
    planted: Path, halved: Path, cli: Cli, tmp_path: Path
) -> None:
    """The same bytes at a given rank; weights that bfloat16 would round are refused.

    Of ranks that do as much, which is chosen may differ: this model has one toxic direction.
    """
    pairs = ("--pairs", planted.parent / "pairs.jsonl", "-o", "protect_shared=1")
    given = (*pairs, "-o", "protect_own=1", "-o", "rank=1", "--guard-draws", 1)
    made = {}
    for name in ("float32", "mixed"):
        cli("convert", halved, tmp_path / name, *given, "--forward-dtype", name, code=0)
        made[name] = read_manifest(tmp_path / name)
    forward = {name: each.forward for name, each in made.items()}
    assert all(each is not None for each in forward.values())
    assert {name: each and each.held_out_dtype for name, each in forward.items()} == {
        "float32": None, "mixed": "bfloat16",
    }  # fmt: skip
    assert len({each.digests["model.safetensors"] for each in made.values()}) == 1
    one, other = (each.guard for each in made.values())
    assert one
    assert other
    assert one.reasons == other.reasons == ()
    assert one.edit != other.edit
    assert one.perplexity == pytest.approx(other.perplexity, rel=0.01)
    says = "expected weights stored in bfloat16, found F32"
    cli("convert", planted, tmp_path / "no", *given, "--forward-dtype", "mixed", code=2, says=says)


@pytest.mark.parametrize(
    ("able", "device", "stored", "expected"),
    [
        ({"avx512_bf16": True}, "cpu", "BF16", torch.bfloat16),
        ({"bf16": True}, "cpu", "BF16", torch.bfloat16),
        ({"avx512_bf16": True}, "cpu", "F32", torch.float32),
        ({"avx512_bf16": False}, "cpu", "BF16", torch.float32),
        ({"avx512_bf16": True}, "cuda", "F32", torch.float32),
    ],
)
def test_held_out_text_is_measured_in_bfloat16_where_that_is_fast_and_exact(
    able: dict[str, bool], device: str, stored: str, expected: torch.dtype,
    planted: Path, halved: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    plan = read_plan(resolve(str(halved if stored == "BF16" else planted)))
    assert held_out_dtype("auto", plan, device) == expected
    assert choose_dtype("auto", plan, "cpu") == held_out_dtype("float32", plan, "cpu")


FAST = {"avx512_bf16": True}


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The dtype of each model that is loaded, and how many others are in memory then."""
    load, models, found = load_language_model, list[Any](), list[tuple[str, int]]()

    def counted(source: Any, plan: Any, tokenizer: Any, dtype: torch.dtype, *given: Any) -> Any:
        gc.collect()
        name = str(dtype).removeprefix("torch.")
        found.append((name, sum(module() is not None for module in models)))
        made = load(source, plan, tokenizer, dtype, *given)
        models.append(weakref.ref(made.module))
        return made

    for module in (workbench, measure):
        monkeypatch.setattr(module, "load_language_model", counted)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: FAST, raising=False)
    return found


FEW = ("--num-pairs", 60, "--guard-draws", 1)


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize(
    ("words", "more", "dtypes"),
    [
        (("convert", "MODEL", "OUT"), FEW, ["float32", "bfloat16"]),
        (("convert", "MODEL", "OUT"), (*FEW, "-o", "rank=1", "--no-guard"), ["float32"]),
        (
            ("convert", "MODEL", "OUT"), (*FEW, "--evaluate", "--system", "random", "--no-greedy"),
            ["float32", "bfloat16"],
        ),
        (("search", "MODEL"), (*FEW, "--trials", 2), ["float32", "bfloat16"]),
        (("plan", "MODEL"), (*FEW, "--time"), ["float32", "bfloat16"]),
        (("evaluate", "MODEL"), ("--system", "gloss", "--num-pairs", 60), ["float32", "bfloat16"]),
    ],
    ids=["convert", "no guard", "evaluate after", "search", "plan", "evaluate"],
)  # fmt: skip
def test_one_model_is_in_memory_at_a_time(
    words: tuple[str, ...], more: tuple[Any, ...], dtypes: list[str],
    planted: Path, halved: Path, tmp_path: Path, loads: list[tuple[str, int]],
) -> None:  # fmt: skip
    """In whichever dtype: the model of the fit is gone when that of the measurements is loaded."""
    places = {"MODEL": halved, "OUT": tmp_path / "out"}
    typed = [places.get(word, word) for word in words]
    invoke(*typed, *planted_args(planted, None), *more, code=0)
    assert [number for _, number in loads] == [0] * len(loads), loads
    assert list(dict.fromkeys(dtype for dtype, _ in loads)) == dtypes
    if words[0] == "convert" and (tmp_path / "out").exists():
        forward = read_manifest(tmp_path / "out").forward
        assert forward
        assert forward.held_out_dtype == (dtypes[1] if dtypes[1:] else None)


def test_the_context_is_every_other_word_of_the_toxic_sentences(planted: Path) -> None:
    """The ratio from log-probabilities of the bare model, word by word: words are tokens here."""
    recipe = Recipe(source=str(planted), pairs=str(planted.parent / "pairs.jsonl"), num_pairs=64)
    source, plan, _ = prepare(recipe)
    bench = Bench.of(recipe, source, plan, WORDS, "cpu")
    part = split(load_pairs(recipe.pairs, WORDS, 64, 0), load_prose("builtin"), 0).report
    short = Prose(part.prose.paragraphs[:2], TEST, "")
    probe = probe_of(bench, replace(part, prose=short))
    edit = removal(plan, dict.fromkeys(WRITING, MASSIVE[:, None]))
    assert probe.context_tokens == 3 * len(part.pairs.pairs)  # of five words two are toxic
    model = bench.load_resident()

    def losses() -> Tensor:
        found = []
        for pair in part.pairs.pairs:
            ids = torch.tensor([[0, *model.tokenizer(pair.toxic)["input_ids"]]])
            with torch.inference_mode():
                scores = model.module(input_ids=ids).logits[0].log_softmax(1)
            said = [a for a, _ in pair.spans]
            starts = [a for a, _ in model.tokenizer.backend_tokenizer.encode(pair.toxic).offsets]
            found += [-scores[i, ids[0, i + 1]] for i, a in enumerate(starts) if a not in said]
        return torch.stack(found)

    before = losses()
    with edited(model.module, plan, edit):
        after = losses()
    assert len(before) == probe.context_tokens
    ratio = probe.measure(edit).context_ratio
    assert ratio is not None
    assert ratio.value == pytest.approx(float((after - before).mean().exp()), rel=1e-4)
    assert ratio.value > 1.1


def proposed(bench: Bench, direction: Tensor) -> Proposal:
    """One direction, as if a method had found it in all layers; controls spare nothing."""
    bases = dict.fromkeys(WRITING, direction[:, None])
    subspace = Subspace(bases, {}, (), direction[None][:0])
    return Removal(rank=1, layers=WRITING).propose(bench, subspace, None)


@pytest.mark.slow
def test_gradients_give_the_same_bytes_again(planted: Path, cli: Cli, tmp_path: Path) -> None:
    """The default fit, twice without a cache: weights and subspace are identical."""
    args = (*planted_args(planted, rank=None), "--num-pairs", 120, "--guard-draws", 1)
    for name in ("a", "b"):
        cache = tmp_path / f"cache {name}"
        cli("convert", planted, tmp_path / name, *args, "--cache-dir", cache, code=0)
    for path in (tmp_path / "a").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_a_model_spread_over_devices_gives_the_same(
    planted: Path, cli: Cli, tmp_path: Path
) -> None:
    for name, device in (("a", "cpu"), ("b", "map")):
        args = (*planted_args(planted), "--device", device)
        cli("convert", planted, tmp_path / name, *args, code=0)
    first, second = (load_bases(tmp_path / name / EDIT_FILE)["U"] for name in ("a", "b"))
    assert torch.allclose(first, second, atol=1e-5)


def test_what_is_refused_is_not_written_unless_forced(
    planted: Path, cli: Cli, tmp_path: Path
) -> None:
    options = ("--method", "random", "-o", "rank=2", "-o", "protect_shared=2")
    args = ("convert", planted, tmp_path / "out", *options)
    result = cli(*args, code=9)
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "the edit is refused: " in line
    assert list(tmp_path.iterdir()) == []
    cli(*args, "--force", code=0, says="--force writes an edit that the guard refuses")
    manifest = read_manifest(tmp_path / "out")
    assert manifest.guard is not None
    assert manifest.guard.reasons
    assert manifest.run.force
    cli(*args, "--no-guard", "--overwrite", code=0)
    manifest = read_manifest(tmp_path / "out")
    assert manifest.guard is None
    assert not manifest.run.guard
