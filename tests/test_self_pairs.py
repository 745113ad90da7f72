"""Pairs of what the model itself says, on a model whose toxic direction is planted."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from converter.calibration.pairs import Pairs, load_prose
from converter.calibration.split import split
from converter.calibration.word_list import load_words
from converter.checkpoints.names import MANIFEST
from converter.edits.deltas import RemoveSubspace
from converter.entrypoints.convert import convert, inputs_of, prepare
from converter.entrypoints.plan import describe_plan
from converter.errors import DataError, OptionError
from converter.evaluation import self_pairs
from converter.evaluation.fit import fit_steps
from converter.evaluation.prompts import load_prompts
from converter.evaluation.self_pairs import load_self_prompts, pairs_of
from converter.methods.workbench import Bench
from converter.recipe import Recipe
from converter.runtime.cache import cache_folder, using_cache
from tests.builders.errors import refused
from tests.builders.invoke import invoke
from tests.builders.planted import CURSES, INSULTS, PLAIN, TOXIC

pytestmark = pytest.mark.usefixtures("cli")  # the cache that tests share

BUILTIN = load_words("builtin")
FOUND: dict[str, Any] = {"options": {"rank": "1", "protect_shared": "1", "protect_own": "1"}}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts that end in a curse, and one with an insult; ``words.txt`` beside lists insults.

    After a curse the model writes along the planted direction, so that is what insults owe to.
    """
    rng, folder = random.Random(0), tmp_path_factory.mktemp("prompts")
    lines = [" ".join([*rng.sample(PLAIN, 3), rng.choice(CURSES)]) for _ in range(60)]
    (folder / "words.txt").write_text("\n".join(INSULTS))
    (folder / "prompts.txt").write_text("\n".join(["w1 bitch w2", *lines]))
    return folder / "prompts.txt"


def bench_of(planted: Path, prompts: Path, **changes: Any) -> Bench:
    given = {
        "pairs": "self",
        "self_prompts": str(prompts),
        "num_pairs": 40,
        "forward": "resident",
        **FOUND,
    }
    words = load_words(str(prompts.parent / "words.txt"))
    recipe = Recipe(source=str(planted), **given | changes)
    source, plan, _ = prepare(recipe)
    return Bench.of(recipe, source, plan, words, "cpu")


def drawn(planted: Path, prompts: Path, **changes: Any) -> Pairs:
    bench = bench_of(planted, prompts, **changes)
    return pairs_of(bench, bench.recipe.seed)


def test_both_sides_go_on_from_one_prompt_and_one_has_listed_words(
    planted: Path, prompts: Path
) -> None:
    found = drawn(planted, prompts)
    known = load_prompts(str(prompts), None, 0).texts
    assert len(found.pairs) == 40
    assert found.skipped == {"with a listed word in the prompt": [1]}
    for pair in found.pairs:
        start = len(pair.group)
        assert pair.group in known[1:]
        assert pair.toxic[:start] == pair.neutral[:start] == pair.group
        assert pair.spans
        assert {pair.toxic[a:b] for a, b in pair.spans} <= {*INSULTS}
        assert not {*INSULTS} & {*pair.neutral.split()}
    record = found.drawn
    assert record is not None
    assert record.toxic >= 40
    assert record.continuations % (4 * 60) == 0


def test_they_are_the_same_for_a_seed_and_kept(
    planted: Path, prompts: Path, tmp_path: Path
) -> None:
    with using_cache(tmp_path):  # whose files are damaged here
        first = drawn(planted, prompts)
        bench = bench_of(planted, prompts)
        assert pairs_of(bench, 0) == first
        assert not bench.has_run
        assert drawn(planted, prompts, seed=1).sha256 != first.sha256
        for path in (cache_folder() / "continuations").iterdir():
            path.write_text('[["damaged"]]')
        bench = bench_of(planted, prompts)
        assert pairs_of(bench, 0) == first
        assert bench.has_run


def test_a_fit_finds_in_them_what_is_planted(planted: Path, prompts: Path) -> None:
    """As in pairs that are given; and what it removes is not there in random pairs of neutrals."""
    bases = {}
    for name in ("self", str(planted.parent / "pairs.jsonl")):
        own = {} if name == "self" else {"self_prompts": "builtin"}
        bench = bench_of(planted, prompts, pairs=name, **own)
        parts = split(pairs_of(bench, 0), load_prose("builtin"), 0)
        _, _, method = prepare(bench.recipe)
        (step,) = fit_steps(bench, "gloss", method, parts.fit, lambda: pytest.fail("no choice"))
        deltas = step.edit.tensors.values()
        bases[name] = [delta.U for delta in deltas if isinstance(delta, RemoveSubspace)]
    for found in bases.values():
        assert found
        for U in found:
            along = float((U.T @ TOXIC).abs().max())
            assert along > 0.75  # by how much more hangs on what the processor's rounding draws


def test_a_scorer_has_to_agree_with_the_word_list(
    planted: Path, prompts: Path, tmp_path: Path
) -> None:
    listed = tmp_path / "some.txt"
    listed.write_text("\n".join([INSULTS[0], *CURSES]))  # curses that are not in the word list
    scored = load_words(str(listed))
    found = drawn(planted, prompts, self_scorer=f"bad-words:{listed}", num_pairs=16)
    assert found.drawn
    assert found.drawn.scorer
    assert found.drawn.scorer.name == "some.txt"
    starts = [len(pair.group) for pair in found.pairs]
    for start, pair in zip(starts, found.pairs, strict=True):
        assert scored.spans(pair.toxic[start:])
        assert not scored.spans(pair.neutral[start:])
    alone = drawn(planted, prompts).pairs
    assert not all(scored.spans(pair.toxic[len(pair.group) :]) for pair in alone)


def test_what_cannot_be_drawn_is_refused(planted: Path, prompts: Path, tmp_path: Path) -> None:
    mild = tmp_path / "mild.txt"
    mild.write_text("zzz")
    mild_prompts = tmp_path / "prompts.txt"
    mild_prompts.write_text("w1\nw2")
    bench = bench_of(planted, prompts, self_prompts=str(mild_prompts))
    bench.words = load_words(str(mild))
    with refused(
        DataError,
        what="pairs self: the model says too little that is toxic",
        expected="at least 40 pairs of a toxic and a neutral continuation",
        found="0 pairs, of 0 toxic ones among ... continuations of 2 prompts",
    ):
        pairs_of(bench, 0)
    listed = tmp_path / "listed.txt"
    listed.write_text("bitch\nbastard w1")
    with refused(DataError, found="...2 prompts have a listed word and were left out"):
        pairs_of(bench_of(planted, prompts, self_prompts=str(listed)), 0)
    streamed = "--pairs self draws continuations, for which the whole model must be in memory"
    recipe = Recipe(source=str(planted), pairs="self", forward="streamed", guard=False)
    with refused(OptionError, what=streamed, found="--forward streamed"):
        describe_plan(recipe)
    with refused(OptionError, what=streamed, found="--forward streamed"):
        drawn(planted, prompts, forward="streamed")
    options: list[dict[str, Any]]
    options = [{"self_prompts": str(prompts)}, {"self_scorer": "profanity"}]
    for option in options:
        with refused(OptionError, expected="--pairs self", found="--pairs builtin"):
            prepare(Recipe(source=str(planted), **option))
    missing = Recipe(source=str(planted), pairs="self", prompts=str(tmp_path / "no.txt"))
    with pytest.MonkeyPatch.context() as patch, refused(DataError, what="... does not exist"):
        patch.setattr(self_pairs, "draw_pairs", None)  # the prompts are read before that
        convert(missing, tmp_path / "out")
    with_field = Recipe(source="demo", pairs="self", self_prompts=f"{listed}#hard")
    source, _, _ = prepare(Recipe(source=str(planted)))
    assert listed in inputs_of(with_field, source)  # a file that no output may replace
    with refused(OptionError, what="--num-pairs", expected="at least 16", found="3"):
        describe_plan(Recipe(source=str(planted), pairs="self", num_pairs=3))


def test_the_manifest_records_the_draw_and_no_text(
    planted: Path, prompts: Path, tmp_path: Path
) -> None:
    words = prompts.parent / "words.txt"
    given: dict[str, object] = {
        "word-list": words, "pairs": "self", "self-prompts": prompts, "num-pairs": 40,
        "forward": "resident",
    }  # fmt: skip
    options = [part for k, v in FOUND["options"].items() for part in ("-o", f"{k}={v}")]
    args = ["--no-guard", *options, *(part for k, v in given.items() for part in (f"--{k}", v))]
    told = invoke("plan", planted, *args, code=0).stdout
    says = (
        "pairs drawn from the model itself: up to 1,952 continuations of 61 prompts (prompts.txt)"
    )
    assert f"{says}, until the word list finds 40 pairs" in told
    out = tmp_path / "out"
    invoke("convert", planted, out, *args, code=0)
    text = (out / MANIFEST).read_text("utf-8")
    record, found = json.loads(text)["pairs"], drawn(planted, prompts)
    assert record["origin"] == {"name": "self"}
    assert record["sha256"] == found.sha256
    assert record["drawn"]["prompts"]["sha256"] == load_prompts(str(prompts), None, 0).sha256
    assert record["drawn"]["seed"] == 0
    assert record["skipped"] == {"with a listed word in the prompt": 1}
    assert json.loads(text)["run"]["self_prompts"] == "prompts.txt"
    said = {text for pair in found.pairs for text in (pair.toxic, pair.neutral, pair.group)}
    for path in (MANIFEST, "README.md"):
        assert not any(each in (out / path).read_text("utf-8") for each in said)
    assert "what the model itself said after 61 prompts" in (out / "README.md").read_text("utf-8")
    again = invoke("convert", planted, out, *args, code=0)
    assert "is the result of this run already" in again.stderr
    refit = ("replay", out, tmp_path / "replayed", "--source", planted, "--refit")
    invoke(*refit, "--word-list", words, code=2, says="say where it is with --self-prompts")
    invoke(*refit, "--self-prompts", prompts, "--word-list", words, code=0)
    prompts_now = tmp_path / "prompts.txt"
    prompts_now.write_text(prompts.read_text() + "\nw5 w6")
    other = [prompts_now if each == prompts else each for each in args]
    assert invoke("convert", planted, out, *other).exit_code != 0


def test_built_in_prompts_are_our_own_for_fitting() -> None:
    own = load_self_prompts(Recipe(source="demo", pairs="self"))
    assert len(own.texts) > 100
    assert own.origin.version == 1
    assert not any(BUILTIN.spans(text) for text in own.texts)
    assert not {*own.texts} & {*load_prompts("builtin", None, 0).texts}
