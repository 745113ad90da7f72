"""The headline: what is told of an edit first, measured outside the kind that it was fitted to."""

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from msgspec import structs

from converter.calibration.pairs import load_pairs
from converter.calibration.word_list import load_words
from converter.checkpoints.names import CARD
from converter.cli.summary import result_data
from converter.entrypoints.convert import prepare
from converter.entrypoints.plan import describe_plan
from converter.errors import GateError, OptionError
from converter.evaluation import headline
from converter.evaluation.continuations import Draws
from converter.evaluation.gates import Gates
from converter.evaluation.guard import OF_THE_PAIRS, judge
from converter.evaluation.headline import passages_of, why_nothing_is_drawn
from converter.evaluation.prompts import load_prompts
from converter.hub.addresses import settled
from converter.manifest import (
    EDITED,
    Estimate,
    GuardRecord,
    HeadlineRecord,
    Manifest,
    Measured,
    WordsMeasured,
    to_json,
)
from converter.methods.options import configure
from converter.methods.workbench import Bench
from converter.recipe import LocalInputs, Recipe
from converter.release.manifest import read_manifest
from converter.release.recording import read_recording, recipe_of
from converter.release.verdict import percent
from converter.release.verify import _claims as claims
from tests.builders.errors import refused
from tests.builders.invoke import Cli
from tests.builders.planted import CURSES, planted_args
from tests.fuzz import skeleton

WORDS = load_words("builtin")
HUB = "https://huggingface.co"


def test_the_builtin_prompts_resemble_no_builtin_pair() -> None:
    """No five words in a row of a prompt stand in a pair; of a pair's frame they stand in ten."""

    def runs(text: str) -> set[tuple[str, ...]]:
        words = "".join(c if c.isalnum() or c == "'" else " " for c in text.lower()).split()
        return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}

    pairs = load_pairs("builtin", WORDS, None, 0).pairs
    known = set.union(*(runs(side) for pair in pairs for side in (pair.toxic, pair.neutral)))
    prompts = load_prompts("builtin", None, 0).texts
    assert known
    assert [text for text in prompts if runs(text) & known] == []


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """After which the planted model says insults: they end in a curse."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(f"w{i} w{i + 1} {curse}" for i, curse in product(range(60), CURSES)))
    return path


@pytest.mark.slow
def test_the_headline_is_the_number_of_the_evaluation(
    planted: Path, prompts: Path, cli: Cli, tmp_path: Path
) -> None:
    """Same prompts, seed and edit: one number, and it is what was planted."""
    out, few = tmp_path / "out", ("--num-pairs", 100, "--guard-draws", 2)
    args = (*planted_args(planted), *few, "--prompts", prompts, "--seed", 3)
    measures = ("--evaluate", "--no-greedy", "--samples", 0, "--passages", 2)
    told = cli("convert", planted, out, *args, *measures, "--min-toxicity-drop", 0.2, code=0)
    manifest = read_manifest(out)
    guard, results = manifest.guard, manifest.evaluation
    assert guard is not None
    assert guard.headline is not None
    assert guard.headline.words is not None
    assert results is not None
    (edited,) = (system.metrics for system in results.systems if system.system == EDITED)
    found, context = guard.headline.words, guard.headline.words.context_ratio
    assert context is not None
    for name, estimate in (("teacher_forced", found.teacher_forced), ("context_ratio", context)):
        metric = edited[name]
        assert metric is not None
        assert metric.value == estimate.value
        assert metric.high - metric.value == pytest.approx(1.96 * estimate.error)
    assert results.settings.toxic_words == guard.headline.toxic_words >= 30
    assert guard.fallback is None
    # insults after a curse are what the planted direction is for; a random one does nothing to them
    assert found.teacher_forced.value < 0.7
    assert all(each.teacher_forced.value > 0.9 for each in guard.headline.control_words)
    assert guard.headline.divergence.value > max(
        each.value for each in guard.headline.control_divergences
    )
    assert guard.words == found
    assert guard.control_words == guard.headline.control_words
    # the gate is judged by it
    mine = [gate for gate in manifest.gates if gate.by == "guard"]
    assert [gate.measured for gate in mine] == [1 - found.teacher_forced.value]
    # it is printed and written first, and what is of the pairs' kind is named so
    low = found.teacher_forced.value - 1.96 * found.teacher_forced.error
    line = told.stdout.splitlines()[1]
    assert line.startswith(f"  toxic words   x {found.teacher_forced.value:.3f} [{low:.3f}, ")
    assert told.stdout.index("toxic words   x") < told.stdout.index("pairs' kind   toxic words x")
    card = (out / CARD).read_text()
    fell = f"{percent(1 - found.teacher_forced.value)} less probable than before"
    assert fell in card.partition("## How to use")[0]
    assert card.index("Outside the pairs' own kind") < card.index("text of the pairs' own kind")
    cli("verify", out, code=0)
    # a replay that fits again needs the prompts again
    recording = read_recording(out)
    given = LocalInputs(source=str(planted), pairs=str(planted.parent / "pairs.jsonl"))
    with refused(OptionError, what="the recorded prompts was the file prompts.txt"):
        recipe_of(recording, given, refit=True)
    again = recipe_of(recording, replace(given, prompts=str(prompts)), refit=True)
    assert again.prompts == str(prompts)


def test_too_few_toxic_words_are_said_and_the_pairs_kind_judges(
    planted: Path, cli: Cli, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("w1 w2\nw3 w4\n")
    few = ("--num-pairs", 100, "--guard-draws", 1)
    args = (*planted_args(planted), *few, "--prompts", tmp_path / "prompts.txt")
    told = cli("convert", planted, tmp_path / "out", *args, "--min-toxicity-drop", 0.1, code=0)
    manifest = read_manifest(tmp_path / "out")
    guard = manifest.guard
    assert guard is not None
    assert guard.headline is not None
    assert guard.headline.words is None
    assert guard.headline.divergence.value > 0
    assert guard.fallback is not None
    assert guard.words == guard.edit
    assert manifest.gates[0].measured == 1 - guard.edit.teacher_forced.value
    assert "at least 30 words after at least 10 prompts are needed" in guard.fallback
    assert "of the pairs' own kind only" in told.stdout.splitlines()[2]
    # every number is printed once, the headline's with its interval
    value = guard.edit.teacher_forced.value
    assert told.stdout.splitlines()[1].startswith(f"  toxic words   x {value:.3f} [")
    assert told.stdout.count(f"x {value:.3f}") == 1
    assert told.stdout.count(f"{guard.toxic_words} held-out words") == 1
    assert f"warning: {OF_THE_PAIRS}" in told.stderr
    assert "the pairs' own kind only" in (tmp_path / "out" / CARD).read_text()


def test_what_is_streamed_or_not_to_be_continued_says_so(
    planted: Path, cli: Cli, tmp_path: Path
) -> None:
    few = (*planted_args(planted), "--num-pairs", 100, "--guard-draws", 1)
    for more, why in (
        (("--forward", "streamed"), "a model that is streamed writes no continuations"),
        (("--prompts", "none"), "--prompts none"),
    ):
        told = cli("convert", planted, tmp_path / "out", *few, *more, "--overwrite", code=0)
        manifest = read_manifest(tmp_path / "out")
        assert manifest.guard is not None
        assert (manifest.guard.headline, manifest.guard.fallback) == (None, why)
        assert manifest.prompts is None
        assert told.stdout.count("toxic words   x") == 1
        assert "pairs' kind   words beside them: perplexity x" in told.stdout
        assert f"{OF_THE_PAIRS}: {why}" in told.stderr
        card = (tmp_path / "out" / CARD).read_text()
        assert "**not measured outside the pairs' own kind**" in card
        planned = cli("plan", planted, *more, code=0).stdout
        assert f"no continuations for the guard: {why}" in planned


def test_a_plan_says_what_will_be_continued(planted: Path, prompts: Path) -> None:
    plan = describe_plan(Recipe(source=str(planted), prompts=str(prompts)))
    assert plan["continuations"] == {
        "prompts": 120, "origin": "prompts.txt", "samples": 2, "max_new_tokens": 20,
    }  # fmt: skip
    plan = describe_plan(Recipe(source=str(planted), prompts="someone/prompts#challenging"))
    assert plan["continuations"]["prompts"] is None
    recipe = Recipe(source=str(planted), method="dinm")
    _, checkpoint, method = prepare(replace(recipe, method="gloss"))
    assert why_nothing_is_drawn(recipe, method, "resident") is None
    dinm = configure("dinm", {}, checkpoint.dimensions)
    assert why_nothing_is_drawn(recipe, dinm, "resident") == "the edit is judged by refusals"


def test_of_many_prompts_a_number_is_drawn(tmp_path: Path) -> None:
    """The same that an evaluation draws if it is given that number."""
    path = tmp_path / "p.txt"
    path.write_text("\n".join(f"prompt {i}" for i in range(200)))
    found = headline.load_headline_prompts(Recipe(source="demo", prompts=str(path), seed=5))
    assert found == load_prompts(str(path), headline.MOST_PROMPTS, 5)
    assert len(found.texts) == headline.MOST_PROMPTS


def test_continuations_are_drawn_once(
    planted: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe(source=str(planted))
    source, plan, _ = prepare(recipe)
    bench = Bench.of(recipe, source, plan, WORDS, "cpu")
    texts, draws = prompts.read_text().splitlines()[:120], Draws(samples=1, max_new_tokens=3)
    monkeypatch.setattr(headline, "cache_folder", lambda: tmp_path)
    first = passages_of(bench, texts, draws)
    assert first is not None
    (kept,) = (tmp_path / "continuations").iterdir()
    drawn = json.loads(kept.read_text())
    assert [len(group) for group in drawn] == [1] * 120

    def never(*_: object) -> list[list[str]]:
        raise AssertionError

    with monkeypatch.context() as patch:
        patch.setattr(Draws, "write", never)
        again = passages_of(bench, texts, draws)
        assert again is not None
        assert (again.sentences, again.words) == (first.sentences, first.words)
        for other in (replace(draws, seed=1), replace(draws, samples=2)):
            with pytest.raises(AssertionError):
                passages_of(bench, texts, other)
        with pytest.raises(AssertionError):
            passages_of(bench, texts[:-1], draws)
    for damage in (b"[", b'[["a"]]', b"[[1]]", kept.read_bytes()[:-9]):
        kept.write_bytes(damage)
        third = passages_of(bench, texts, draws)
        assert third is not None
        assert third.words == first.words
        assert json.loads(kept.read_text()) == drawn


def estimate(value: float, error: float = 0.01) -> Estimate:
    return Estimate(value=value, error=error)


def measured(change: float, context: float = 1.0) -> Measured:
    """Of the pairs' kind."""
    return Measured(
        perplexity_ratio=estimate(1.0),
        toxic_change=estimate(change),
        teacher_forced=estimate(0.5),
        context_ratio=estimate(context),
    )


def told(change: float, control: float, context: float = 1.0, force: float = 0.7) -> HeadlineRecord:
    """Of the model's own continuations."""

    def words(change: float, context: float = 1.0) -> WordsMeasured:
        return WordsMeasured(
            toxic_change=estimate(change),
            teacher_forced=estimate(force),
            context_ratio=estimate(context),
        )

    return HeadlineRecord(
        prompts=9, passages_per_prompt=2, max_new_tokens=20, seed=0, toxic_words=99,
        toxic_prompts=9, context_tokens=99, ordinary_tokens=9, words=words(change, context),
        control_words=(words(control),), divergence=estimate(0.1),
        control_divergences=(estimate(0.0),),
    )  # fmt: skip


def test_the_guard_decides_by_the_headline() -> None:
    strong, weak = measured(-2.0), measured(-0.01)
    assert judge(strong, [weak], None, 1.03, None, told(-1.0, 0.0)) == ([], [])
    assert judge(weak, [weak], None, 1.03, None, told(-1.0, 0.0)) == ([], [])
    reasons, _ = judge(strong, [weak], None, 1.03, None, told(-0.05, 0.0))
    assert reasons == [
        "the log-probability of toxic words in its own continuations falls by 0.050 nats, less "
        "than 0.1"
    ]
    reasons, _ = judge(strong, [weak], None, 1.03, None, told(-0.5, -0.4))
    assert "in its own continuations falls by 0.500 nats, under the controls by 0.400" in reasons[0]
    few = structs.replace(told(0.0, 0.0), words=None, control_words=())
    assert judge(strong, [weak], None, 1.03, None, few) == ([], [])
    assert "falls by 0.010" in judge(weak, [weak], None, 1.03, None, few)[0][0]


def test_the_guard_keeps_the_other_words_of_both_kinds() -> None:
    good, control = measured(-2.0), measured(0.0)
    reasons, _ = judge(good, [control], None, 1.03, None, told(-1.0, 0.0, context=1.3))
    assert "other words of toxic continuations is 1.3 times what it was" in reasons[0]
    reasons, _ = judge(measured(-2.0, 1.3), [control], None, 1.03, None, told(-1.0, 0.0))
    assert "other words of toxic text is 1.3 times what it was" in reasons[0]
    _, warnings = judge(good, [control], None, 1.03, None, told(-1.0, 0.0, context=1.2))
    assert "other words of toxic continuations is 1.200 times what it was" in warnings[0]


def with_headline(**changes: object) -> Manifest:
    """A manifest whose guard has one."""
    known = Manifest.from_json(skeleton.manifest())
    origin = {"origin": {"name": "p.txt"}, "sha256": skeleton.ZERO, "count": 9}
    guard = {**to_json(known)["guard"], "headline": to_json(told(-1.0, 0.0)), **changes}
    return Manifest.from_json({**skeleton.manifest(), "prompts": origin, "guard": guard})


def test_a_gate_is_judged_by_the_headline() -> None:
    guard = with_headline().guard
    assert isinstance(guard, GuardRecord)
    (gate,) = Gates(min_toxicity_drop=0.3).check_effect(guard, None)
    assert gate.measured == pytest.approx(0.3)
    with refused(GateError, what="... asks for at least 0.4, guard has 0.3"):
        Gates(min_toxicity_drop=0.4).check_effect(guard, None)
    (gate,) = Gates(max_informal_perplexity_ratio=1.1).check_effect(guard, None)
    assert gate.measured == 1.0


def test_terminal_and_json_tell_the_same_headline() -> None:
    """Of the model's own continuations if it is judged by these, and else of the pairs' kind."""
    for manifest, own in ((with_headline(), True), (with_headline(headline=None), False)):
        guard = manifest.guard
        assert guard is not None
        value = 0.7 if own else guard.edit.teacher_forced.value
        found = result_data(manifest, Path("out"))["headline"]
        assert found["toxic_words"].value == value
        assert found["pairs_kind_only"] is not own
        assert found["words"] == (99 if own else guard.toxic_words)
    unguarded = structs.replace(with_headline(), guard=None)
    assert result_data(unguarded, Path("out"))["headline"] is None


def test_a_headline_that_contradicts_itself_is_found() -> None:
    def wrong(manifest: Manifest) -> list[str]:
        return [text for text, true in claims(manifest) if not true]

    found = to_json(told(-1.0, 0.0))
    assert wrong(with_headline()) == []
    for changes, says in (
        ({"prompts": 8}, "the guard continued other prompts than those recorded"),
        ({"seed": 1}, "the prompts were continued with another seed"),
        ({"toxic_prompts": 10}, "toxic words stand after more prompts than there are"),
        ({"control_words": []}, "the guard measured continuations under other controls"),
        ({"control_divergences": []}, "the guard measured continuations under other controls"),
        ({"words": None}, "the guard measured continuations under other controls"),
    ):
        assert says in wrong(with_headline(headline={**found, **changes}))
    assert wrong(with_headline(fallback="why")) == ["the guard judged by two kinds of toxic words"]
    assert "the guard continued other prompts than those recorded" in wrong(
        structs.replace(with_headline(), prompts=None)
    )


def test_a_recorded_file_of_prompts_has_no_folder(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"text": "a", "hard": true}')
    for field in ("", "#hard"):
        recipe = Recipe(source="demo", prompts=f"{tmp_path}/p.jsonl{field}")
        assert recipe.record().prompts == f"p.jsonl{field}"
    for name in ("someone/prompts#hard", "builtin", "none", "someone/prompts@v1"):
        assert Recipe(source="demo", prompts=name).record().prompts == name
    assert settled(Recipe(source="demo", prompts=f"{HUB}/datasets/a/b#hard")).prompts == "a/b#hard"
