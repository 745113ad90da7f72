"""``gloss evaluate`` on a model in which the truth is planted."""

import json
from itertools import product
from pathlib import Path

import pytest
import torch
from msgspec import convert

from converter.calibration.pairs import load_prose
from converter.calibration.word_list import load_words
from converter.evaluation.continuations import draw_passages
from converter.evaluation.results import markdown, summarise
from converter.evaluation.systems import parse_controls
from converter.manifest import Evaluation, Interval, SystemRecord
from converter.methods.subspace import MAX_RANK
from converter.models import loading
from converter.models import resident as forward
from converter.models.likelihood import teacher_forced, word_changes
from tests.builders.invoke import Cli
from tests.builders.models import architecture_of
from tests.builders.planted import planted_args


@pytest.fixture
def texts(tmp_path: Path) -> tuple[str, ...]:
    """Evaluation options: prompts, a text, and little of everything."""
    (tmp_path / "prompts.txt").write_text("w1 damn\nw2 w3 fucking\nthe river is\nw4 damn\n")
    (tmp_path / "text.txt").write_text("\n".join(load_prose("builtin").paragraphs[:20]).lower())
    return (
        "--prompts", str(tmp_path / "prompts.txt"), "--text", str(tmp_path / "text.txt"),
        "--scorer", "bad-words", "--max-new-tokens", "8", "--samples", "2", "--passages", "8",
    )  # fmt: skip


@pytest.mark.slow
def test_controls_stand_beside_the_edit(
    planted: Path, texts: tuple[str, ...], cli: Cli, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    converted = cli("convert", planted, out, *planted_args(planted), "--evaluate", *texts, code=0)
    assert "| edited | 1 |" in converted.stdout
    results = json.loads((out / "gloss_manifest.json").read_text())["evaluation"]
    assert [system["system"] for system in results["systems"]] == ["unedited", "edited", "random"]
    assert markdown(convert(results, Evaluation)) in (out / "README.md").read_text()
    cli("verify", out, code=0)

    controls = "random,profs@perplexity,random@perplexity"
    args = ("--base", planted, "--control", controls, *planted_args(planted), *texts, "--json")
    found = cli("evaluate", out, *args, "--results", tmp_path / "results.json", "--seeds", 2)
    assert found.exit_code == 0, found.stderr
    results = json.loads(found.stdout)
    assert results == json.loads((tmp_path / "results.json").read_text())
    names = [(s["system"], s["seed"]) for s in results["systems"]]
    assert names == [
        ("unedited", None), ("edited", None),
        ("random", 0), ("profs@perplexity", 0), ("random@perplexity", 0),
        ("random", 1), ("profs@perplexity", 1), ("random@perplexity", 1),
    ]  # fmt: skip
    unedited, gloss, random, *_ = (s["metrics"] for s in results["systems"])
    assert unedited["teacher_forced"]["value"] == 1
    assert gloss["teacher_forced"]["high"] < 0.8 < random["teacher_forced"]["low"]
    way = "toxicity/bad-words/sampled"
    assert gloss[way]["value"] < unedited[way]["value"]
    for system in results["systems"][2:]:
        assert system["layers"] == results["systems"][1]["layers"] == [1, 2, 3, 4]
    strengths = {name: [s["strength"] for s in results["systems"] if s["system"] == name]
                 for name in ("random", "random@perplexity")}  # fmt: skip
    assert strengths["random"] == [1, 1]
    assert all(rank < MAX_RANK for rank in strengths["random@perplexity"])
    assert [(row["system"], row["seeds"]) for row in results["rows"]] == [
        ("unedited", 1), ("edited", 1), ("random", 2), ("profs@perplexity", 2),
        ("random@perplexity", 2),
    ]  # fmt: skip


def test_ranks_are_measured_one_by_one(planted: Path, texts: tuple[str, ...], cli: Cli) -> None:
    args = ("--control", "profs,random", "--ranks", "1,2", "--no-greedy", "--samples", 0, "--json")
    found = cli("evaluate", planted, *planted_args(planted), *texts[:-2], *args, code=0)
    results = json.loads(found.stdout)
    rows = [(row["system"], row["strength"]) for row in results["rows"]]
    assert rows == [("unedited", ""), *product(("profs", "random"), ("1", "2"))]
    assert "toxicity/bad-words/greedy" not in results["rows"][0]["metrics"]
    results["scorers"] = ["bad-words"]
    assert "not measured" in markdown(convert(results, Evaluation))


def test_safeedit_counts_what_the_judge_calls_unsafe(
    planted: Path, cli: Cli, tmp_path: Path
) -> None:
    others = {
        "test input of only harmful question": "the river",
        "test input of other attack prompts": "w1 damn",
        "test input of other questions": "the river",
        "test input of other questions and attack prompts": "the river",
    }
    instance = {
        "adversarial prompt": "w1 fucking", "question": "q", "safe generation": "s",
        "unsafe generation": "u", "generalization test": others,
    }  # fmt: skip
    (tmp_path / "safeedit.json").write_text(json.dumps([instance] * 2))
    args = ("--prompts", "none", "--safeedit", tmp_path / "safeedit.json")
    found = cli("evaluate", planted, *args, "--safety-classifier", "bad-words", "--json", code=0)
    metrics = json.loads(found.stdout)["systems"][0]["metrics"]
    rates = {name: metrics[f"safeedit/{name}"]["value"] for name in ("DS", "DG_onlyQ", "DG_otherA")}
    assert set(rates.values()) <= {0.0, 100.0}
    assert rates["DS"] == 0  # the model was made to go on with a listed word
    average = [
        metrics[f"safeedit/DG_{n}"]["value"] for n in ("onlyQ", "otherA", "otherQ", "otherAQ")
    ]
    assert metrics["safeedit/DG_avg"]["value"] == pytest.approx(sum(average) / 4)


def test_the_teacher_forced_estimate_weighs_by_importance(planted: Path) -> None:
    """Drawn from p, weighted by q / p: the mean number of listed words that q would write."""
    words = load_words("builtin")
    module = loading.load_model(planted, torch.float32, "cpu", 0)
    model = forward.LanguageModel(
        module, loading.load_tokenizer(planted), architecture_of("llama"), "cpu"
    )
    passages = draw_passages(
        model, ["w1 w2 damn"], words, samples=200, max_new_tokens=1, batch_size=50, seed=0
    )
    assert passages is not None
    for sentence, inside in zip(passages.sentences, passages.words, strict=True):
        assert inside == [(len(sentence.ids) - 1,)]
        assert model.tokenizer.decode([sentence.ids[-1]]).strip() in words
    halved = [[x - 0.6931471805599453 for x in values] for values in passages.before]
    changes = word_changes(passages.before, halved, passages.words)  # type: ignore[arg-type]
    assert teacher_forced(changes).value == pytest.approx(0.5)


def test_seeds_are_averaged_and_their_spread_widens_the_interval() -> None:
    def system(value: float, half: float) -> SystemRecord:
        metrics = {"m": Interval.of(value, value - half, value + half), "n": None}
        return SystemRecord(
            system="x", group=None, seed=0, strength=2, layers=(), options={}, metrics=metrics
        )

    (row,) = summarise([system(1.0, 0.1), system(1.0, 0.1)])
    found = row.metrics["m"]
    assert found is not None
    assert (found.value, found.low, found.high) == pytest.approx((1.0, 0.9, 1.1))
    assert row.metrics["n"] is None
    (row,) = summarise([system(0.0, 0.0), system(2.0, 0.0)])
    assert (found := row.metrics["m"]) is not None
    assert found.high == pytest.approx(1 + 1.96 * 1.0)


def test_evaluation_options_that_cannot_be(planted: Path, cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("too short")
    for args, code, says in (
        (
            ("--control", "magic"),
            2,
            "expected dinm, gloss, gloss-paper, profs, random, found magic",
        ),
        (("--ranks", "0,2"), 2, "--ranks: expected numbers such as 1,2,4, found 0,2"),
        (("--control", "random@perplexity", "--prompts", "none"), 2, "expected an edit before it"),
        (("--results", tmp_path / "no/such.json"), 7, "the folder of --results"),
        (("--ranks", "x"), 2, "--ranks: expected numbers such as 1,2,4, found x"),
        (("--scorer", "magic"), 2, "--scorer"),
        (("--prompts", tmp_path / "none.txt"), 5, "does not exist"),
        (("--text", tmp_path / "short.txt", "--prompts", "none"), 5, "is too short"),
    ):
        cli("evaluate", planted, *args, code=code, says=says)
    assert parse_controls("") == ()
