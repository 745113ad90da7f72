"""``gloss search`` on models in which the truth is planted."""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec import structs

from converter.calibration.pairs import load_pairs, load_prose
from converter.calibration.split import split
from converter.calibration.word_list import load_words
from converter.entrypoints import search as entry
from converter.entrypoints.convert import prepare
from converter.entrypoints.search import Searched, as_typed, search_model
from converter.errors import DataError, GuardError, OptionError, SourceError
from converter.evaluation import search
from converter.evaluation.heldout import Probe
from converter.evaluation.options import SearchOptions
from converter.evaluation.plots import plot_search
from converter.evaluation.search import Search, Tried, best_of, front_of, with_kept
from converter.evaluation.search_space import Space
from converter.evaluation.search_texts import SHARES, SearchTexts
from converter.manifest import Estimate, Measured, SearchRecord, SearchTrial
from converter.methods.workbench import Bench
from converter.recipe import Recipe, Settings
from converter.release.manifest import read_manifest
from converter.runtime.cache import using_cache
from tests.builders.errors import refused
from tests.builders.invoke import Cli
from tests.builders.models import Checkpoints
from tests.builders.planted import make_planted

WORDS = load_words("builtin")

LATE = (2, 5)
"""Layers that write toxic words, of which the default leaves the second: it edits 1 to 4."""

SMALL = {"protect_shared": "1", "protect_own": "1", "directions": "4"}
FEW = {**SMALL, "cost": "3"}
"""Options of GloSS with which a fit is quick and finds what is planted."""


@pytest.fixture(scope="module")
def late(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A planted checkpoint whose last layer writes toxic words, too, with its pairs beside it."""
    return make_planted(tmp_path_factory.mktemp("late"), LATE)


def recipe_of(source: Path, **changes: Any) -> Recipe:
    given: dict[str, Any] = {
        "source": str(source), "pairs": str(source.parent / "pairs.jsonl"), "num_pairs": 80,
        "options": FEW, "prompts": "none", "guard": False,
    }  # fmt: skip
    return Recipe(**given | changes)


def searched(recipe: Recipe, trials: int, prompts: str = "none") -> Searched:
    asked = SearchOptions(trials=trials, search_prompts=prompts)
    return search_model(recipe, asked, Settings())


@pytest.fixture(scope="module")
def found(late: Path, tmp_path_factory: pytest.TempPathFactory) -> Searched:
    """What 14 trials find, with a guard, where perplexity is no matter. Read only."""
    with using_cache(tmp_path_factory.mktemp("searched")):
        options = {**FEW, "rank": "2"}
        recipe = recipe_of(late, guard=True, guard_draws=1, options=options)
        return searched(replace(recipe, max_perplexity_ratio=1.5), 14)


def drop(trial: SearchTrial) -> float:
    assert trial.measured is not None
    return -trial.measured.toxic_change.value


@pytest.mark.slow
def test_the_search_finds_the_layer_that_the_default_leaves_out(found: Searched) -> None:
    """And what it finds does as much to text that no trial has seen."""
    default, chosen = found.record.default, found.record.chosen
    assert default.options["edit_layers"] == "1-4"
    first, _, last = chosen.options["edit_layers"].partition("-")
    assert (int(first) <= LATE[0], last) == (True, "5")
    assert drop(chosen) > drop(default) > 0
    assert found.guard is not None
    assert found.record.kept == pytest.approx(
        -found.guard.edit.toxic_change.value / drop(chosen), abs=1e-12
    )
    assert found.record.kept is not None
    assert 0.5 < found.record.kept < 1.5
    assert found.recipe.options == chosen.options
    assert FEW.items() <= found.recipe.options.items()  # what is typed is not searched


@pytest.mark.slow
def test_the_front_is_what_nothing_beats(found: Searched) -> None:
    record = found.record
    whole = [t for t in found.trials if not t.stopped and t.measured and t.divergence]
    points = [(drop(t), -t.divergence.value) for t in whole if t.divergence]
    for trial in record.front:
        assert trial.divergence is not None
        mine = drop(trial), -trial.divergence.value
        assert not any(a > mine[0] and b > mine[1] for a, b in points)
    assert record.chosen in record.front
    assert record.chosen == max(whole, key=drop)
    assert record.stopped == len(found.trials) - len(whole)


@pytest.mark.slow
def test_the_same_seed_and_budget_give_the_same_however_often_it_is_interrupted(
    late: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed within a trial, with half a line written and Optuna's lock left behind."""
    recipe, count = recipe_of(late, options={**FEW, "rank": "2"}, num_pairs=60), 13
    with using_cache(tmp_path / "whole"):
        whole = searched(recipe, count)
    measure, calls = SearchTexts.measure, iter(range(99))

    def killed(self: SearchTexts, edit: Any) -> Iterator[Any]:
        for step in measure(self, edit):
            yield step
            if next(calls) in (4, 12):
                raise KeyboardInterrupt

    with using_cache(tmp_path / "again"):
        monkeypatch.setattr(SearchTexts, "measure", killed)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                searched(recipe, count)
            (journal,) = (tmp_path / "again/searches").glob("*.log")
            with journal.open("a") as file:
                file.write('{"op_code": 4, "wor')
            Path(f"{journal}.lock").touch()
        again = searched(recipe, count)
        steps = {str(t.options): SHARES.index(t.share) + 1 for t in whole.trials}
        done = sum(steps.values())
        assert done < next(calls) <= done + 2 * len(SHARES)  # what is kept is not measured again
        assert searched(recipe, 5).trials == whole.trials[:5]
    assert again == whole
    assert len({str(t.options) for t in whole.trials}) > count // 2
    with using_cache(tmp_path / "other"):
        other = searched(replace(recipe, seed=1), 3)
    assert [t.options for t in other.trials[1:]] != [t.options for t in whole.trials[1:3]]


@pytest.mark.slow
def test_a_conversion_that_searches_records_what_was_chosen(
    late: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replay does not search, nor does the same command again."""
    args = [
        "--pairs", late.parent / "pairs.jsonl", "--num-pairs", 80, "--prompts", "none",
        "--guard-draws", 1, "--force", "-o", "rank=2",
        *(part for key, value in FEW.items() for part in ("-o", f"{key}={value}")),
    ]  # fmt: skip
    more = ("--search", 4, "--search-prompts", "none")
    out, plain = tmp_path / "out", tmp_path / "plain"
    cli("convert", late, out, *args, *more, code=0)
    manifest = read_manifest(out)
    record = manifest.search
    assert record is not None
    assert manifest.run.options == record.chosen.options
    assert (record.trials, record.seed) == (4, 0)
    assert record.kept is not None
    assert "search" not in json.loads((out / "gloss_manifest.json").read_text())["run"]
    cli("verify", out, "--source", late, code=0)
    monkeypatch.setattr(search, "_ask", None)
    again = cli("convert", late, out, *args, *more, code=0)
    assert "is the result of this run already" in again.stderr
    cli("replay", out, tmp_path / "replayed", "--source", late, code=0)
    typed = as_typed(replace(manifest.run, source=str(late), pairs=str(args[1])))
    assert typed.startswith(f"gloss-convert {late} DESTINATION ")
    chosen = (f"{key}={value}" for key, value in record.chosen.options.items())
    options = (part for text in chosen for part in ("-o", text))
    cli("convert", late, plain, *args[:-10], *options, code=0)
    for name in manifest.shards:
        data = (out / name).read_bytes()
        assert (tmp_path / "replayed" / name).read_bytes() == data
        assert (plain / name).read_bytes() == data
    assert read_manifest(plain).search is None
    assert "--search" not in typed


def bench_of(source: Path, **changes: Any) -> tuple[Bench, Any]:
    recipe = recipe_of(source, **changes)
    found, plan, _ = prepare(recipe)
    bench = Bench.of(recipe, found, plan, WORDS, "cpu")
    pairs = load_pairs(recipe.pairs, WORDS, recipe.num_pairs, 0)
    return bench, split(pairs, load_prose("builtin"), 0)


@pytest.mark.parametrize(
    ("method", "options", "place"),
    [
        ("gloss", SMALL, {"strength": 0.4, "first": 2, "last": 5, "cost": 6.0, "floor": 0.0}),
        ("profs", {}, {"strength": 2, "top": 0.6, "floor": 0.5, "peak": 0.0}),
        ("destein", {"layers": "1-4"}, {"strength": 0.02}),
        ("destein", {}, {"strength": 0.04, "first": 4, "last": 2}),
    ],
)
def test_one_fit_serves_what_differs_in_strength_layers_and_factors(
    method: str, options: dict[str, str], place: dict[str, Any], late: Path
) -> None:
    """What is tried is what the options say when they are typed, fitted by themselves."""
    bench, parts = bench_of(late, method=method, options=options)
    space = Space.of(method, options, {}, bench.plan)
    typed = space.options({**space.default_point(None), **place})
    chosen = space.method(typed)
    proposal = bench.fit(space.widest(chosen), parts.fit)
    axes = space.axes(proposal.strengths)
    assert all(value in axes[key] for key, value in place.items())
    mine = space.narrowed(proposal, chosen).edit(place["strength"])
    alone = bench.fit(chosen, parts.fit)
    theirs = alone.edit(alone.strengths[-1])
    assert not alone.is_free
    assert mine.tensors.keys() == theirs.tensors.keys()
    assert mine.created.keys() == theirs.created.keys()
    for name, weight in bench.plan.find(mine.tensors).items():
        W = bench.weight(weight)
        one, other = (edit.tensors[name].whole(W) for edit in (mine, theirs))
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        assert weight.is_bias or not torch.equal(one, W)
    for name, tensor in mine.created.items():
        assert torch.equal(tensor, theirs.created[name])
    changed = [*mine.tensors, *(name for name, t in mine.created.items() if t.any())]
    layers = {int(name.split(".")[2]) for name in changed}
    first, last = place.get("first", space.places[0]), place.get("last", space.places[-1])
    assert set() != layers <= {*range(min(first, last), max(first, last) + 1)}


def test_the_whole_search_part_measures_what_a_probe_does(late: Path) -> None:
    """A share is a part of it that is measured by itself; nothing else of it is run."""
    bench, parts = bench_of(late)
    space = Space.of("gloss", FEW, {}, bench.plan)
    edit = bench.fit(space.default, parts.fit).edit(0.8)
    texts = SearchTexts(bench, parts.choose, None, 1)
    steps = list(texts.measure(edit))
    assert [share for share, *_ in steps] == list(SHARES)
    told = Probe(bench.load(), bench.plan, parts.choose, 1).measure(edit)
    for name in ("perplexity_ratio", "toxic_change", "teacher_forced"):
        one, other = getattr(steps[-1][1], name), getattr(told, name)
        assert one.value == pytest.approx(other.value, rel=1e-5)
        assert one.error == pytest.approx(other.error, rel=1e-3)
    assert steps[0][1] != steps[-1][1]
    assert steps[0][1].toxic_change.error > steps[-1][1].toxic_change.error


def trial_of(number: int, toxic: float, moved: float, ratio: float = 1.0, **more: Any) -> Tried:
    """A trial with standard errors of a tenth, of its effect, and of a hundredth."""
    measured = Measured(
        perplexity_ratio=Estimate(value=ratio, error=0.01),
        toxic_change=Estimate(value=toxic, error=0.1),
        teacher_forced=Estimate(value=1.0, error=0.1),
        context_ratio=Estimate(value=more.pop("context", 1.0), error=0.01),
    )
    divergence = Estimate(value=moved, error=0.01)
    trial = SearchTrial(
        number=number, method="gloss", options={}, share=1.0, measured=measured,
        divergence=divergence, **more,
    )  # fmt: skip
    return Tried(trial, [(toxic, moved)] * len(SHARES))


TRIED = [
    trial_of(0, -1.0, 0.1), trial_of(1, -2.0, 0.3), trial_of(2, -1.5, 0.4),
    trial_of(3, -5.0, 0.1, 1.025), trial_of(4, -9.0, 0.1, stopped="over a limit"),
    trial_of(5, -5.0, 0.1, context=1.245), trial_of(6, -1.0, 0.1),
]  # fmt: skip


def test_trials_over_a_limit_or_stopped_are_on_no_front() -> None:
    """By a standard error, as where a strength is chosen; of equal ones the first counts."""
    trials = [each.trial for each in TRIED]
    assert [t.number for t in front_of(trials, 1.03)] == [0, 1]
    best = best_of(trials, 1.03)
    assert best is not None
    assert best.number == 1
    assert [t.number for t in front_of(trials, 1.04)] == [3]
    assert best_of(trials[3:6], 1.03) is None


@pytest.mark.parametrize(
    ("last", "stopped"),
    [
        (trial_of(7, -1.0, 0.2, 1.04), None),  # over by one standard error
        (trial_of(7, -1.0, 0.2, 1.051), "over a limit"),
        (trial_of(7, -1.0, 0.2, context=1.28), "over a limit"),
        (trial_of(7, -1.79, 0.33), "worse than another"),
        (trial_of(7, -1.81, 0.33), None),  # not worse by two
        (trial_of(7, -1.79, 0.31), None),
    ],
)
def test_what_is_stopped(last: Tried, stopped: str | None, late: Path) -> None:
    bench, parts = bench_of(late)
    state = Search(bench, [], parts, lambda: pytest.fail("no text is needed"), Path("x"), TRIED)
    trial = last.trial
    assert trial.measured is not None
    assert trial.divergence is not None
    assert state._stopped(trial.measured, trial.divergence, 1) == stopped


def test_nothing_within_the_limits_is_one_sentence(late: Path) -> None:
    bench, _ = bench_of(late)
    texts: Any = None
    with refused(GuardError, what="none of 1 trials keeps within the perplexity budget"):
        search.record_of(TRIED[3:4], texts, bench)


@pytest.mark.slow
def test_several_methods_take_turns(late: Path, tmp_path: Path) -> None:
    options = {**{f"gloss.{k}": v for k, v in FEW.items()}, "gloss.rank": "2", "alpha": "0.02"}
    with using_cache(tmp_path):
        found = searched(recipe_of(late, method="gloss,destein", options=options), 4)
    assert [t.method for t in found.trials] == ["gloss", "destein"] * 2
    assert found.trials[1].options == {"alpha": "0.02", "layers": "1-4"}
    assert found.recipe.method == found.record.chosen.method
    assert found.recipe.options == found.record.chosen.options


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        ({"method": "dinm", "options": {}}, {"found": "--method dinm, which is judged by..."}),
        (
            {"method": "fusion", "options": {"form": "paper"}},
            {"found": "--method fusion, which runs another model...", "hint": "choose form=folded"},
        ),
        ({"method": "gloss+destein", "options": {}}, {"found": "--method gloss+destein"}),
        ({"method": "gloss,gloss"}, {"what": "--method", "found": "gloss,gloss"}),
        ({"method": "gloss,nothing"}, {"what": "--method", "found": "nothing"}),
        (
            {"options": {**FEW, "rank": "1", "layers": "2-4", "factors": "0.5"}},
            {"what": "a search", "found": "all of them typed"},
        ),
        ({"forward": "streamed"}, {"what": "a search tries...", "found": "--forward streamed"}),
        ({"activations": Path("x")}, {"what": "--activations is of one fit..."}),
    ],
)
def test_what_cannot_be_searched_is_refused_from_the_headers(
    changes: dict[str, Any], fields: dict[str, str], late: Path
) -> None:
    with refused(OptionError, **fields):
        entry.check_search(recipe_of(late, **changes), Settings())


def test_a_model_that_does_not_fit_is_refused(late: Path) -> None:
    with refused(SourceError, what="a search tries many edits..."):
        entry.check_search(recipe_of(late), Settings(memory_limit=1))


def test_mistakes_on_the_command_line_are_one_sentence_each(
    late: Path, checkpoints: Checkpoints, cli: Cli, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    cli("convert", late, out, "--search", 0, code=2, says="--search: expected at least 1, found 0")
    cli("search", late, "--trials", 0, code=2, says="--trials: expected at least 1, found 0")
    cli("convert", late, out, "--search-prompts", "none", code=2, says="without --search")
    few = ("--pairs", late.parent / "pairs.jsonl", "--num-pairs", 24, "--no-guard")
    little = (*few, "--trials", 1, "--search-prompts", "none", "-o", "directions=4")
    cli("search", late, *little, "-o", "rank=1", code=5, says="too few toxic sentences are left")
    cli("search", late, "--search-prompts", tmp_path / "no.txt", code=5)
    where = ("--results", tmp_path / "no/results.json")
    cli("search", late, *where, code=7, says="the folder of --results")
    plain = ("--dry-run", "--search", 2, "--method", "gloss,destein")
    assert "method gloss" in cli("convert", late, out, *plain, code=0).stdout
    cli("convert", late, out, *plain, "--forward", "streamed", code=2, says="a search tries many")
    assert not out.exists()


def test_prompts_of_the_search_are_none_of_the_guards(late: Path, tmp_path: Path) -> None:
    mine, guards = tmp_path / "mine.txt", tmp_path / "guards.txt"
    mine.write_text("one\ntwo\nthree\n")
    guards.write_text("two\nfour\n")
    recipe = recipe_of(late, prompts=str(guards))
    found = entry.load_search_prompts(recipe, SearchOptions(search_prompts=str(mine)))
    assert found is not None
    assert found.texts == ("one", "three")
    with refused(DataError, found="0"):
        entry.load_search_prompts(recipe, SearchOptions(search_prompts=str(guards)))
    own = replace(recipe, pairs="self")
    assert entry.load_search_prompts(own, SearchOptions()) is None


def test_without_optuna_it_is_said_before_torch_is_imported() -> None:
    code = """
import sys, importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "optuna" else find(name, *rest)
from converter.cli.main import gloss
for args in (["search", "demo"], ["convert", "demo", "out", "--search", "2"]):
    try:
        gloss.main(args)
    except SystemExit as end:
        assert end.code == 2, end.code
assert "torch" not in sys.modules and "optuna" not in sys.modules
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    hint = "pip install 'gloss-convert[search]'"
    assert ran.stderr.splitlines() == [
        f"error: {what} needs the package optuna; {hint}" for what in ("gloss search", "--search")
    ]  # fmt: skip


@pytest.mark.slow
def test_the_command_prints_writes_and_draws_it(late: Path, cli: Cli, tmp_path: Path) -> None:
    args: Sequence[object] = (
        "--pairs", late.parent / "pairs.jsonl", "--num-pairs", 80, "--no-guard", "--trials", 3,
        "--search-prompts", "none", "-o", "rank=2", "--max-perplexity-ratio", 1.5,
        *(part for key, value in FEW.items() for part in ("-o", f"{key}={value}")),
    )  # fmt: skip
    places = ("--results", tmp_path / "r.json", "--plots", tmp_path / "pictures")
    shown = cli("search", late, *args, *places, code=0).stdout
    data = json.loads((tmp_path / "r.json").read_text())
    assert data == json.loads(cli("search", late, *args, "--json", code=0).stdout)
    assert shown.splitlines()[-1] == data["command"]
    assert len(data["trials"]) == data["search"]["trials"] == 3
    assert "| default | 0 |" in shown
    assert "| chosen |" in shown
    assert (tmp_path / "pictures/front.png").read_bytes()[1:4] == b"PNG"


def test_pictures_are_the_same_bytes_for_the_same_data(tmp_path: Path) -> None:
    trials = [each.trial for each in TRIED]
    record: Any = structs.replace(
        RECORD, default=trials[0], chosen=trials[1], front=tuple(trials[:2])
    )
    (one,) = plot_search(record, trials, tmp_path / "a")
    (other,) = plot_search(record, trials, tmp_path / "b")
    assert one.read_bytes() == other.read_bytes()


RECORD = SearchRecord(
    trials=7, stopped=1, seed=0, prompts=None, toxic_words=30, default=TRIED[0].trial,
    chosen=TRIED[1].trial, front=(),
)  # fmt: skip


def test_what_is_kept_compares_words_of_one_kind() -> None:
    """Without prompts, those of held-out pairs; nothing is known without a guard."""
    assert with_kept(RECORD, None).kept is None
    guard: Any = type("Guard", (), {"headline": None, "edit": TRIED[0].trial.measured})()
    assert with_kept(RECORD, guard).kept == 0.5
    own: Any = structs.replace(RECORD, prompts="prompts")
    assert with_kept(own, guard).kept is None
