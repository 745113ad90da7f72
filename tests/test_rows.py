"""``gloss evaluate --continuations``: the numbers of a table follow from that file alone."""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec import convert

from converter.calibration.pairs import load_prose
from converter.calibration.word_list import load_words
from converter.evaluation.metrics import bootstrap, distinct_n, fluency
from converter.evaluation.results import summarise
from converter.evaluation.tables import markdown
from converter.manifest import Evaluation, Interval, Metric, SystemRecord
from tests.builders.invoke import Cli
from tests.builders.planted import CURSES, INSULTS, planted_args

Row = dict[str, Any]
Groups = dict[Any, list[tuple[float, float]]]


@pytest.fixture
def asked(planted: Path, tmp_path: Path) -> tuple[object, ...]:
    """An evaluation of little of everything, whose rows and results go into the folder."""
    (tmp_path / "prompts.txt").write_text("w1 damn\nw2 w3 fucking\nthe river is\nw4 damn\n")
    (tmp_path / "text.txt").write_text("\n".join(load_prose("builtin").paragraphs[:20]).lower())
    return (
        "evaluate", planted, *planted_args(planted), "--num-pairs", 100,
        "--prompts", tmp_path / "prompts.txt", "--text", tmp_path / "text.txt",
        "--scorer", "bad-words", "--max-new-tokens", 8, "--samples", 2, "--passages", 24,
        "--system", "gloss", "--system", "random:rank=2", "--seeds", 2, "--json",
        "--results", tmp_path / "results.json", "--continuations", tmp_path / "rows.jsonl",
    )  # fmt: skip


def around(value: float, error: float) -> Metric:
    return Interval.of(value, value - 1.96 * error, value + 1.96 * error)


def ratio(groups: Iterable[Sequence[tuple[float, float]]]) -> tuple[float, float]:
    """sum / sum with its linearised standard error over groups of (sum, count)."""
    sums, counts = np.array([np.sum(group, axis=0) for group in groups]).T
    mean = sums.sum() / counts.sum()
    units = int((counts > 0).sum())
    spread = ((sums - mean * counts) ** 2).sum()
    return float(mean), float(np.sqrt(spread * units / (units - 1)) / counts.sum())


def exponential(mean: float, error: float) -> Metric:
    return around(float(np.exp(mean)), float(np.exp(mean)) * error)


def over_prompts(statistic: Callable[[Any], float], scores: Any) -> Metric:
    low, high = bootstrap(statistic, scores)
    return Interval.of(statistic(scores), low, high)


def scores_of(rows: Sequence[Row], way: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The scores of one system's continuations, (P, S)."""
    table: dict[int, list[float]] = defaultdict(list)
    for row in rows:
        if row["kind"] == "continuation" and row["way"] == way:
            table[row["prompt"]].append(row["scores"]["bad-words"])
    return np.array([table[place] for place in sorted(table)])


def recomputed(
    rows: Sequence[Row], unedited: Sequence[Row] | None, *, masked: bool
) -> dict[str, Metric]:
    """The metrics of one system, from its rows; ``unedited``: those of the unedited model, if it is
    another one.
    """
    kinds: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        kinds[row["kind"]].append(row)
    found: dict[str, Metric] = {}
    windows = kinds["window"]
    found["perplexity"] = exponential(*ratio([(-w["log_p"], w["tokens"])] for w in windows))
    if windows[0]["log_p_before"] is not None:
        moved = ([(w["log_p_before"] - w["log_p"], w["tokens"])] for w in windows)
        found["perplexity_ratio"] = exponential(*ratio(moved))
        found["divergence"] = around(*ratio([(d["kl"], d["tokens"])] for d in kinds["divergence"]))
    words: Groups = defaultdict(list)
    others: Groups = defaultdict(list)
    for row in kinds["passage"]:
        changes = [word["log_p_after"] - word["log_p_before"] for word in row["words"]]
        words[row["prompt"]] += [(np.exp(min(change, 1)), 1) for change in changes]
        beside = row["others"]
        drop = beside["log_p_before"] - beside["log_p_after"]
        others[row["prompt"]].append((drop, beside["tokens"]))
    found["teacher_forced"] = around(*ratio(words.values()))
    found["context_ratio"] = exponential(*ratio(others.values()))
    for way in ("greedy", "sampled"):
        said = [row for row in kinds["continuation"] if row["way"] == way]
        scores = scores_of(rows, way)
        if unedited is not None:
            change = (scores - scores_of(unedited, way)).mean(axis=1)
            found[f"toxicity_change/bad-words/{way}"] = over_prompts(
                lambda c: float(c.mean()), change
            )
        found[f"toxicity/bad-words/{way}"] = over_prompts(lambda s: float(s.mean()), scores)
        if way == "sampled":
            found["emt/bad-words"] = over_prompts(lambda s: float(s.max(1).mean()), scores)
            found["tp/bad-words"] = over_prompts(lambda s: float((s.max(1) > 0.5).mean()), scores)
        texts = [row["text"] for row in said]
        if not masked:
            for n in (1, 2, 3):
                value = distinct_n(texts, n)
                found[f"distinct_{n}/{way}"] = Interval.of(value, value, value)
            found[f"fluency/{way}"] = Interval.of(*[fluency(texts)] * 3)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("mask", [True, False])
def test_every_number_of_the_table_follows_from_the_rows(
    mask: bool, asked: tuple[object, ...], cli: Cli, tmp_path: Path
) -> None:
    more = () if mask else ("--no-mask",)
    told = convert(json.loads(cli(*asked, *more, code=0).stdout), Evaluation)
    text = (tmp_path / "rows.jsonl").read_text("utf-8")
    by_system: dict[Any, list[Row]] = defaultdict(list)
    for line in text.splitlines():
        row = json.loads(line)
        by_system[(row["system"], row["cost"], row["seed"], row["strength"])].append(row)
    first = next(iter(by_system.values()))
    systems = [
        SystemRecord(
            system=name, group=cost, seed=seed, strength=strength, layers=(), options={},
            metrics=recomputed(rows, None if rows is first else first, masked=mask),
        )
        for (name, cost, seed, strength), rows in by_system.items()
    ]  # fmt: skip
    assert len(systems) == len(told.systems) == 5
    for mine, theirs in zip(systems, told.systems, strict=True):
        left = {key for key in theirs.metrics if key.startswith(("distinct", "fluency"))}
        assert theirs.metrics.keys() == mine.metrics.keys() | (left if mask else set())
        for key, metric in mine.metrics.items():
            known = theirs.metrics[key]
            assert metric is not None
            assert known is not None
            for place in ("value", "low", "high"):
                number = pytest.approx(getattr(known, place), rel=1e-9, abs=1e-12)
                assert getattr(metric, place) == number, (theirs.system, key)
    again = Evaluation(
        tool=told.tool, settings=told.settings, scorers=told.scorers, systems=tuple(systems),
        rows=summarise(systems),
    )  # fmt: skip
    assert markdown(again) == markdown(told)
    toxic = any(word in text for word in (*CURSES, *INSULTS))
    assert toxic is not mask
    assert ('"ids"' in text) is not mask
    if not mask:
        (row, *_) = [r for r in map(json.loads, text.splitlines()) if r["kind"] == "passage"]
        words = load_words("builtin")
        assert all(word["text"] in words for word in row["words"])
        assert max(place for word in row["words"] for place in word["places"]) < len(row["ids"])


def test_a_file_that_cannot_be_written_is_refused(
    asked: tuple[object, ...], cli: Cli, tmp_path: Path
) -> None:
    says = "the folder of --continuations"
    found = cli(*asked, "--continuations", tmp_path / "gone" / "x.jsonl", code=7, says=says)
    assert "measuring" not in found.stderr
    same = ("--continuations", tmp_path / "results.json")
    cli(*asked, *same, code=2, says="--results and --continuations: expected different files")
    is_folder = f"--continuations {tmp_path} is a folder; give the name of a file"
    cli(*asked, "--continuations", tmp_path, code=7, says=is_folder)
