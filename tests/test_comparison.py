"""``gloss evaluate`` on a model in which the truth is planted."""

import json
from pathlib import Path

import pytest
import torch
from msgspec import convert

from converter.calibration.pairs import load_prose
from converter.calibration.word_list import load_words
from converter.checkpoints.names import EDIT_FILE, MANIFEST
from converter.evaluation.comparison import parse_systems
from converter.evaluation.continuations import Draws
from converter.evaluation.passages import _listed_words as listed_words
from converter.evaluation.passages import find_passages
from converter.evaluation.results import summarise
from converter.evaluation.tables import at_cost, equal_cost_table, markdown, systems_of
from converter.manifest import Evaluation, Interval, SystemRecord
from converter.methods.known import METHODS
from converter.methods.subspace import MAX_RANK
from converter.models import loading
from converter.models import resident as forward
from converter.models.likelihood import teacher_forced, word_changes
from tests.builders.invoke import Cli
from tests.builders.models import TINY, TINY_ARGS, Checkpoints, architecture_of
from tests.builders.planted import planted_args


@pytest.fixture
def texts(tmp_path: Path) -> tuple[str, ...]:
    """Evaluation options: prompts, a text, and little of everything."""
    (tmp_path / "prompts.txt").write_text("w1 damn\nw2 w3 fucking\nthe river is\nw4 damn\n")
    (tmp_path / "text.txt").write_text("\n".join(load_prose("builtin").paragraphs[:20]).lower())
    return (
        "--prompts", str(tmp_path / "prompts.txt"), "--text", str(tmp_path / "text.txt"),
        "--scorer", "bad-words", "--max-new-tokens", "8", "--samples", "24", "--passages", "48",
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

    asked = ("random", "profs@perplexity", "random@perplexity")
    beside = [word for name in asked for word in ("--system", name)]
    args = ("--base", planted, *beside, *planted_args(planted), *texts, "--json")
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
    assert unedited["teacher_forced"]["value"] == unedited["context_ratio"]["value"] == 1
    assert "| words beside |" in converted.stdout
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


def test_a_system_has_options_of_its_own(planted: Path, texts: tuple[str, ...], cli: Cli) -> None:
    """Two systems of one method; what is typed by -o is for both, and one has its own value."""
    names = ("profs:rank=1", "profs:rank=2,layers=2,4", "random:rank=2")
    beside = [word for name in names for word in ("--system", name)]
    args = (*beside, "-o", "profs.layers=1-3", "--no-greedy", "--samples", 0, "--json")
    found = cli("evaluate", planted, *planted_args(planted), *texts[:-2], *args, code=0)
    results = json.loads(found.stdout)
    assert results["settings"]["systems"] == [*names]
    systems = results["systems"]
    assert [each["system"] for each in systems] == ["unedited", *names]
    assert [each["strength"] for each in systems[1:]] == [1, 2, 2]
    assert [each["layers"] for each in systems[1:3]] == [[1, 2, 3], [2, 4]]
    assert "toxicity/bad-words/greedy" not in results["rows"][0]["metrics"]
    results["scorers"] = ["bad-words"]
    assert "not measured" in markdown(convert(results, Evaluation))


def test_systems_are_compared_at_equal_cost(
    planted: Path, texts: tuple[str, ...], cli: Cli
) -> None:
    """Each at the strengths nearest to the costs, with its own control at the same strengths."""
    names = ("gloss", "destein", "random", "gloss:rank=1")
    beside = [word for name in names for word in ("--system", name)]
    args = (*planted_args(planted, rank=None), *texts, *beside, "--no-greedy", "--samples", 0)
    args = (*args, "--costs", "1.02,1.3", "--controls", "--json")
    found = cli("evaluate", planted, *args, code=0)
    results = convert(json.loads(found.stdout), Evaluation)
    assert results.settings.costs == (1.02, 1.3)
    assert found.stderr.count("so --costs does not apply to it") == 1
    assert "--system gloss:rank=1: its strength is given by its options" in found.stderr
    measured = systems_of(results.systems)
    assert list(measured) == [
        "gloss", "gloss, its control", "destein", "destein, its control", "random",
        "gloss:rank=1", "gloss:rank=1, its control",
    ]  # fmt: skip
    for name in ("gloss", "destein"):
        strengths = [each.strength or 0 for each in measured[name]]
        assert strengths == sorted(strengths)
        assert {each.group for each in measured[name]} <= {1.02, 1.3}
        assert strengths == [each.strength for each in measured[f"{name}, its control"]]
    assert [each.group for each in measured["gloss:rank=1"]] == [None]  # typed, so not chosen
    (weak, *_), (other, *_) = measured["gloss"], measured["gloss, its control"]
    effect, none = weak.metrics["teacher_forced"], other.metrics["teacher_forced"]
    assert effect is not None
    assert none is not None
    assert effect.value < none.value


def test_what_an_edit_does_at_a_cost_is_interpolated_and_never_extrapolated() -> None:
    def measured(seed: int, cost: float, toxic: float, name: str = "x") -> SystemRecord:
        metrics = {
            "perplexity_ratio": Interval.of(cost, cost, cost),
            "teacher_forced": Interval.of(toxic, toxic - 0.1, toxic + 0.1),
        }
        return SystemRecord(
            system=name, group=None, seed=seed, strength=1, layers=(), options={}, metrics=metrics
        )

    one = [measured(0, 1.02, 0.6), measured(0, 1.04, 0.4)]
    for ratio, value in ((1.01, 0.8), (1.02, 0.6), (1.03, 0.5), (1.04, 0.4)):
        found = at_cost(one, "perplexity_ratio", ratio)
        assert found is not None
        assert found.value == pytest.approx(value)
    assert (found := at_cost(one, "perplexity_ratio", 1.01)) is not None
    assert found.low == pytest.approx(0.75)  # the unedited model has no error
    assert at_cost(one, "perplexity_ratio", 1.05) is None
    assert at_cost(one, "context_ratio", 1.02) is None
    both = at_cost([*one, measured(1, 1.02, 0.4)], "perplexity_ratio", 1.02)
    assert both is not None
    assert both.value == pytest.approx(0.5)
    assert equal_cost_table((*one, measured(0, 1.01, 0.9, "y"))) == ""  # one strength says little
    beside = [measured(0, 1.01, 0.9, "y"), measured(0, 1.015, 0.9, "y")]
    table = equal_cost_table((*one, *beside))
    assert table.splitlines()[2].startswith("| model | perplexity x 1.01 | perplexity x 1.02 |")
    assert table.splitlines()[4].startswith(
        "| x | 0.800 [0.750, 0.850] | 0.600 [0.500, 0.700] |  |"
    )
    assert table.splitlines()[5].startswith("| y | 0.900 [0.800, 1.000] |  |")
    assert equal_cost_table(one) == ""  # there is nothing to compare with


def test_systems_of_all_kinds_stand_in_one_table(
    planted: Path, texts: tuple[str, ...], cli: Cli, tmp_path: Path
) -> None:
    """A model that was written, an adapter, a manifest and methods, one of them two together."""
    few = (*planted_args(planted, rank=None), "--num-pairs", 100)
    for name, more in (("out", ()), ("lora", ("--output", "adapter"))):
        rank = ("-o", "rank=1", "-o", "bias=keep", "--no-guard")
        cli("convert", planted, tmp_path / name, *few, *rank, *more, code=0)
    kept = tmp_path / "recorded.json"
    kept.write_bytes((tmp_path / "out" / MANIFEST).read_bytes())
    kept.with_suffix(".tensors").write_bytes((tmp_path / "out" / EDIT_FILE).read_bytes())
    names = [tmp_path / "out", tmp_path / "lora", kept, "random", "profs+random"]
    args = [word for name in names for word in ("--system", name)]
    args += ["-o", "gloss.rank=1", "-o", "random.rank=2", "-o", "profs.rank=1"]
    args += ["-o", "profs.layers=2", "--prompts", "none", "--seeds", 1]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        found = cli("evaluate", planted, *few, *texts[2:4], *args, code=2)
        assert "which both profs and random change" in found.stderr
        assert "measuring" not in found.stderr
        args += ["-o", "random.layers=3"]
        found = cli("evaluate", planted, *few, *texts[2:4], *args, "--json", code=0)
    results = json.loads(found.stdout)
    systems = {each["system"]: each for each in results["systems"]}
    assert list(systems) == ["unedited", "out", "lora", "recorded.json", "random", "profs+random"]
    assert results["settings"]["systems"] == list(systems)[1:]
    ratio = {n: s["metrics"]["perplexity_ratio"]["value"] for n, s in list(systems.items())[1:]}
    assert ratio["lora"] == ratio["recorded.json"]  # both through hooks, and the same edit
    assert ratio["out"] == pytest.approx(ratio["lora"], abs=1e-6)
    assert abs(ratio["out"] - 1) > 1e-5
    moved = {n: s["metrics"]["divergence"]["value"] for n, s in list(systems.items())[1:]}
    assert moved["lora"] == moved["recorded.json"] > 0
    assert moved["out"] == pytest.approx(moved["lora"], abs=1e-5)
    assert "divergence" not in systems["unedited"]["metrics"]
    assert systems["random"]["strength"] == 2
    assert systems["random"]["layers"] == [3]
    both = systems["profs+random"]
    assert both["layers"] == [2, 3]
    assert (both["options"]["profs.rank"], both["options"]["random.rank"]) == (1, 2)


def test_options_of_a_fit_are_refused_where_nothing_is_fitted(planted: Path, cli: Cli) -> None:
    """Who types --method and no --system would take the row of the model for that of the method."""
    args = ("evaluate", planted, "--prompts", "none")
    for typed in (
        ("--method", "destein"),
        ("-o", "rank=1"),
        ("--costs", "1.1"),
        ("--controls",),
        ("--seeds", 2),
    ):
        cli(*args, *typed, code=2, says=f"{typed[0]} has no effect without a --system")


def test_an_option_of_a_method_that_is_not_measured_is_refused_by_name(
    planted: Path, texts: tuple[str, ...], cli: Cli
) -> None:
    """It would be ignored. Beside a control it says what that is a control of, and no more."""
    args = ("evaluate", planted, "--prompts", "none", "-o", "rank=1", "--num-pairs", 100)
    for systems, says in (
        (("destein",), "-o rank: expected -o destein.rank, found an option of --method gloss"),
        (("profs+model-surgery",), "-o rank: expected -o profs.rank or -o model_surgery.rank"),
    ):
        named = [word for name in systems for word in ("--system", name)]
        cli(*args, *named, code=2, says=says)
    asked = (*planted_args(planted)[:2], *texts[2:4], "--prompts", "none", "-o", "layers=2")
    found = cli("evaluate", planted, *asked, "--system", "random:rank=1", "--json", code=0)
    assert "layers and biases of controls" in found.stderr
    assert json.loads(found.stdout)["systems"][1]["layers"] == [2]


def test_options_of_systems_beside_a_conversion_are_theirs_alone(
    checkpoints: Checkpoints, texts: tuple[str, ...], cli: Cli, tmp_path: Path
) -> None:
    args = ("convert", checkpoints("llama"), tmp_path / "out", *TINY_ARGS, "--num-pairs", 64)
    asked = ("--evaluate", "--prompts", "none", *texts[2:4], "--system", "random")
    more = ("-o", "random.draw=3", "-o", "random.protect_shared=2")
    cli(*args, *more, code=2, says="-o random.draw: method gloss-paper")
    cli(*args, *asked, "-o", "profs.rank=1", code=2, says="an option of gloss_paper or random")
    for system, says in (
        ("profs:rank=x", "--system profs:rank=x: rank: expected a whole number"),
        ("profs:magic=1", "--system profs:magic=1: magic: method profs: expected bias, "),
        ("gloss+profs:profs.rank=x", "--system gloss+profs:profs.rank=x: rank: expected a whole"),
        ("profs:center=40", "--system profs:center=40: center: expected 0 to 32, the hidden size"),
        ("profs:rank=9,center=30", "--system profs:rank=9,center=30: rank and center and"),
    ):
        found = cli(*args, *asked, "--system", system, code=2, says=says)
        assert "fitting" not in found.stderr
    cli(*args, *asked, *more, code=0)
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert manifest["run"]["options"] == TINY
    assert manifest["evaluation"]["systems"][2]["options"]["draw"] == 3
    cli("verify", tmp_path / "out", code=0)


def test_what_was_made_from_another_model_is_refused(
    planted: Path, checkpoints: Checkpoints, cli: Cli, tmp_path: Path
) -> None:
    args = ("--system", checkpoints("llama"), "--prompts", "none")
    cli("evaluate", planted, *args, code=2, says="have different tokenizers")
    made = ("--method", "random", "-o", "rank=1", "-o", "bias=keep", "--no-guard")
    for name, more in (("out", ()), ("lora", ("--output", "adapter"))):
        cli("convert", checkpoints("llama"), tmp_path / name, *made, *more, code=0)
    beside = ("evaluate", checkpoints("llama-tied"), "--prompts", "none", "--system")
    cli(*beside, tmp_path / "lora", code=2, says="lora is an edit of other weights than those of")
    cli(*beside, tmp_path / "out", code=0, says="out was made from other weights than those of")


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
    draws = Draws(samples=200, max_new_tokens=1, batch_size=50)
    passages = find_passages(model, ["w1 w2 damn"], draws.write(model, ["w1 w2 damn"]), words)
    assert passages is not None
    for sentence, inside in zip(passages.sentences, passages.words, strict=True):
        assert inside == [(len(sentence.ids) - 1,)]
        assert model.tokenizer.decode([sentence.ids[-1]]).strip() in words
        assert not any(sentence.weights)  # there is no other word in the continuation
    halved = [[x - 0.6931471805599453 for x in values] for values in passages.before]
    changes = word_changes(passages.before, halved, passages.words)  # type: ignore[arg-type]
    assert teacher_forced(changes).value == pytest.approx(0.5)


def test_the_words_beside_are_those_of_the_continuation(planted: Path) -> None:
    words, tokenizer = load_words("builtin"), loading.load_tokenizer(planted)
    sentence, found = listed_words(tokenizer, "w1 damn", " bitch w2 w3 damn w4", words, None)
    assert found == {(1, 6): (2,), (13, 17): (5,)}
    assert [i + 1 for i, weight in enumerate(sentence.weights) if weight] == [3, 4, 6]
    cut, found = listed_words(tokenizer, "w1 damn", " bitch w2 w3 damn w4", words, 4)
    assert (found, cut.weights) == ({(13, 17): (2,)}, [1.0, 0.0, 1.0, 0.0])


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
            ("--system", "magic"),
            2,
            f"expected {', '.join(METHODS.names())}, a folder, a manifest",
        ),
        (("--system", "gloss+magic"), 2, "or a repo id, found gloss+magic"),
        (("--system", "gloss+profs@perplexity"), 2, "expected a single method before @perplexity"),
        (("--system", "profs", "--system", "profs"), 2, "expected systems of different names"),
        (("--system", "profs", "-o", "random.rank=1"), 2, "expected an option of gloss or profs"),
        (("--system", "profs", "-o", "profs.magic=1"), 2, "-o magic: method profs"),
        (("--costs", "0.9"), 2, "--costs: expected perplexity ratios above 1, such as 1.01"),
        (("--system", "gloss:rank"), 2, "expected options behind the colon, each of them once"),
        (("--system", "gloss:rank="), 2, "such as rank=2,layers=3-8, found rank="),
        (("--system", "gloss:"), 2, "such as rank=2,layers=3-8, found nothing"),
        (("--system", "gloss:rank=1,rank=2"), 2, "such as rank=2,layers=3-8, found rank=2"),
        (("--system", "gloss:magic=2"), 2, "--system gloss:magic=2: magic: method gloss"),
        (("--system", "random@perplexity", "--prompts", "none"), 2, "expected an edit before it"),
        (("--results", tmp_path / "no/such.json"), 7, "the folder of --results"),
        (("--costs", "1.02,,1.05"), 2, "such as 1.01,1.02,1.05, found 1.02,,1.05"),
        (("--costs", "1,02"), 2, "above 1, such as 1.01,1.02,1.05, found 1,02\n"),
        (("--costs", "x"), 2, "such as 1.01,1.02,1.05, found x"),
        (("--seed", "-1"), 2, "--seed: expected at least 0 and at most 9223372036854775807"),
        (("--system", "gloss:site=x"), 2, "--system gloss:site=x: site: expected ffn or residual"),
        (("--scorer", "magic"), 2, "--scorer"),
        (("--prompts", tmp_path / "none.txt"), 5, "does not exist"),
        (("--text", tmp_path / "short.txt", "--prompts", "none"), 5, "is too short"),
    ):
        cli("evaluate", planted, *args, code=code, says=says)
    assert parse_systems(()) == ()
