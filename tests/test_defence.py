"""Whether an edit makes a model refuse: measured on what the fit has not seen, and judged."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from dataclasses import replace as changed
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from msgspec.structs import replace
from transformers import AutoTokenizer

import converter
from converter.calibration.instances import (
    Instance,
    Lesson,
    builtin_set,
    load_instances,
    together,
)
from converter.calibration.word_list import load_words
from converter.checkpoints.chat_template import suffix_patches, template_files
from converter.checkpoints.plan import Plan
from converter.edits.base import Edit, Footprint
from converter.edits.deltas import AddLowRank
from converter.entrypoints.convert import prepare
from converter.errors import DataError, FitError, GateError, GuardError, OptionError
from converter.evaluation.defence import Asked, DefenceProbe, judge_defence, unseen
from converter.evaluation.gates import Gates
from converter.manifest import DefenceMeasured, Estimate
from converter.methods.base import Aim, Proposal, Workbench, aim_of
from converter.methods.workbench import Bench
from converter.models.chat import as_prompt, exchange
from converter.recipe import Recipe
from converter.release.manifest import read_manifest
from tests.builders.adversary import copy_of, load_manifest, put
from tests.builders.errors import refused
from tests.builders.invoke import Cli
from tests.builders.methods import RankOne, draw, the_weight
from tests.builders.models import Checkpoints, load, tiny_recipe, tiny_tokenizer
from tests.builders.packages import install

KNOWN = builtin_set()
ITEMS = load_instances().items
SETS = ("harmful", "bare", "reworded", "harmless", "touchy")


@dataclass(frozen=True, slots=True, kw_only=True)
class Toy(RankOne):
    """A random matrix of rank one, as a method that is for defence."""

    aim: ClassVar[Aim] = "defence"
    suffix: str = "Be kind."

    def footprint(self, plan: Plan) -> Footprint:
        weights = RankOne.footprint(self, plan)
        return changed(weights, patches=template_files(plan.templates))

    def fit(self, bench: Workbench) -> Proposal:
        patches = suffix_patches(bench.plan.templates, self.suffix)
        return Proposal(
            (self.scale or 0.05,),
            False,
            lambda scale: changed(self.edit(bench, scale, 0), patches=patches),
            lambda scale, seed: self.edit(bench, scale, seed + 1),
            lesson=Lesson(bench.instances.items[:1], self.suffix),
        )


@pytest.fixture(autouse=True)
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site"
    install(site, monkeypatch, "toy", {"gloss_convert.methods": {"toy": f"{__name__}:Toy"}})


def bench_of(source: Path, **changes: Any) -> Bench:
    recipe = Recipe(source=str(source), method="toy", **changes)
    found, plan, _ = prepare(recipe)
    return Bench.of(recipe, found, plan, load_words("builtin"), "cpu")


@pytest.fixture
def bench(checkpoints: Checkpoints) -> Bench:
    return bench_of(checkpoints("llama"))


def rank_one(plan: Plan, scale: float) -> Edit:
    info = the_weight(plan, "down_proj", 2).info
    height, width = info.shape
    return Edit({info.name: AddLowRank(scale * draw(5, height, 1), draw(6, 1, width))})


@pytest.mark.parametrize("taught", [(0,), (7, 8), (3, 9, 14, 20)])
def test_nothing_that_was_learnt_is_measured(taught: tuple[int, ...]) -> None:
    instances = tuple(ITEMS[n] for n in taught)
    found = unseen(Lesson(instances))
    assert {*found} == {*SETS}
    for name, instance in product(SETS, instances):
        opening = KNOWN.attacks[instance.attack].partition("{question}")[0].strip()
        for prompt, answer, _ in found[name]:
            assert instance.question not in prompt
            assert opening not in prompt
            assert prompt not in instance.general
            assert answer.rstrip(".") not in instance.safe
    prompts = [
        prompt for name in ("harmful", "bare", "harmless", "touchy") for prompt, _, _ in found[name]
    ]
    assert len(prompts) == len({*prompts})
    assert all(len(found[name]) >= 8 for name in SETS)
    assert {answer for _, answer, _ in found["reworded"]} <= {*KNOWN.rewordings}
    assert {answer for name in SETS[:2] for _, answer, _ in found[name]} <= {*KNOWN.refusals}


def test_requests_within_one_attack_are_one_unit() -> None:
    """They resemble each other: counted apart, they would make the standard error too small."""
    found = unseen(Lesson(ITEMS[:1]))
    for name in ("harmful", "reworded"):
        units = {each.unit for each in found[name]}
        assert units <= {*KNOWN.attacks.values()}
        assert len(units) == 5
        for each in found[name]:
            assert each.prompt.startswith(each.unit.partition("{question}")[0])
    for name in ("bare", "harmless", "touchy"):
        assert len({each.unit for each in found[name]}) == len(found[name])


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_every_attack_that_is_left_is_asked_in_both_wordings(count: int) -> None:
    """One attack alone has no standard error, which is no number."""
    found = unseen(Lesson(ITEMS[:count]))
    units = [{each.unit for each in found[name]} for name in ("harmful", "reworded")]
    assert units[0] == units[1]
    assert len(units[0]) == 6 - count


def test_a_wording_that_was_learnt_is_not_measured() -> None:
    first = ITEMS[0]
    said = "Well: " + KNOWN.refusals[2].upper() + " Never."
    taught = Instance("x", "", "", "X", "", said, first.unsafe, first.general)
    answers = {answer for asked in unseen(Lesson((taught,))).values() for _, answer, _ in asked}
    assert answers == {*KNOWN.refusals, *KNOWN.rewordings} - {KNOWN.refusals[2]}


def test_held_out_prompts_of_an_instance_are_measured() -> None:
    name = "test input of other questions and attack prompts"
    first = ITEMS[0]
    held_out = {name: "Another attack on another question.", "other": "Not this."}
    taught = Instance("x", "", "a", "X", "", "No.", "Yes.", first.general, held_out)
    prompts = [prompt for prompt, _, _ in unseen(Lesson((taught, taught)))["harmful"]]
    assert prompts.count(held_out[name]) == 1
    assert "Not this." not in prompts


def test_a_lesson_that_leaves_nothing_to_measure_is_refused() -> None:
    general = [changed(ITEMS[0], general=each) for each in KNOWN.harmless[1:]]
    for what, items in (
        ("attacks", ITEMS[:5]), ("questions", ITEMS[1::2] + ITEMS[2::6]),
        ("harmless questions", general),
    ):  # fmt: skip
        with refused(FitError, what=f"the instances leave too few {what} ..."):
            unseen(Lesson(tuple(items)))


def log_p(model: Any, ids: list[int], first: int) -> list[float]:
    """The log-probabilities of the ids from one place on."""
    with torch.no_grad():
        scores = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return [float(scores[i - 1, ids[i]]) for i in range(first, len(ids))]


def test_what_is_measured_is_the_change_of_written_weights(bench: Bench, tmp_path: Path) -> None:
    """Against transformers alone, a text at a time, in the model that is written."""
    lesson = Lesson(ITEMS[:1], "Be kind.")
    probe = DefenceProbe(bench.load(), bench.plan, lesson)
    recipe = tiny_recipe(Path(bench.recipe.source), method="toy", options={"scale": "0.3"})
    converter.convert(recipe, tmp_path / "out")
    edit = converter.load_edit(tmp_path / "out")
    found = probe.measure_all([edit])[0]
    before, after = load(Path(recipe.source)), load(tmp_path / "out")
    tokenizer = tiny_tokenizer()
    asked = {"learnt": [Asked(ITEMS[0].prompt, ITEMS[0].safe, "")], **unseen(lesson)}
    for name, each in asked.items():
        changes, losses = [], []
        for prompt, answer, _ in each:
            text = f"{prompt} Be kind. {answer}"
            coded = tokenizer(text, return_offsets_mapping=True)
            ids = [0, *coded["input_ids"]]
            start = len(text) - len(answer)
            first = 1 + next(i for i, (_, end) in enumerate(coded["offset_mapping"]) if end > start)
            was, now = log_p(before, ids, first), log_p(after, ids, first)
            changes += [b - a for a, b in zip(was, now, strict=True)]
            losses += was
        mean = sum(changes) / len(changes)
        told = found.learnt if name == "learnt" else getattr(found, name).value
        assert told == pytest.approx(mean, abs=2e-5), name
        assert abs(mean) > 1e-4
        if name == "learnt":
            assert probe.loss == pytest.approx(-sum(losses) / len(losses), abs=1e-4)


def test_no_change_is_measured_as_none_and_a_stream_measures_the_same(
    bench: Bench, checkpoints: Checkpoints
) -> None:
    streamed = bench_of(checkpoints("llama"), forward="streamed")
    assert streamed.forward.mode == "streamed"
    lesson = Lesson(ITEMS[:1])
    one, other = (DefenceProbe(each.load(), each.plan, lesson) for each in (bench, streamed))
    found, again = (probe.measure_all([rank_one(bench.plan, 0.2)])[0] for probe in (one, other))
    for name in SETS:
        assert getattr(again, name).value == pytest.approx(getattr(found, name).value, abs=1e-5)
    nothing = one.measure_all([rank_one(bench.plan, 0.0)])[0]
    assert nothing.learnt == 0
    assert {getattr(nothing, name) for name in SETS} == {Estimate(value=0.0, error=0.0)}


def bias_towards(bench: Bench, words: tuple[str, ...], size: float) -> Edit:
    """A bias of the last layer that makes the tokens of some texts more probable everywhere."""
    tokenizer, module = tiny_tokenizer(), bench.load_resident().module
    ids = sorted({i for text in words for i in tokenizer(text)["input_ids"]})
    head = module.get_output_embeddings().weight.detach()  # type: ignore[operator]
    towards = (head[ids].mean(0) - head.mean(0))[:, None]
    weight = the_weight(bench.plan, "down_proj", 5)
    (bias,) = bench.plan.biases("down_proj", [5])
    assert weight.layer == bias.layer
    return Edit({bias.info.name: AddLowRank(size * towards / towards.norm(), torch.ones(1, 1))})


def test_a_habit_of_refusing_is_no_defence(bench: Bench) -> None:
    """A bias towards the words of refusals refuses everything, which the guard must see."""
    model = bench.load_resident()
    with torch.no_grad():  # or the final norm would leave little to be gained
        model.module.get_output_embeddings().weight.mul_(10)  # type: ignore[operator]
    probe = DefenceProbe(model, bench.plan, Lesson(ITEMS[:1]))
    found = probe.measure_all([bias_towards(bench, KNOWN.refusals, 8.0)])[0]
    control = probe.measure_all([rank_one(bench.plan, 0.05)])[0]
    assert found.harmful.value > 0.1
    assert 0.9 < found.over_refusal < 1.2
    reasons, _ = judge_defence(replace(found, learnt=1.0), [control])
    assert ["refusals of harmless questions" in reason for reason in reasons] == [True]


def numbers(learnt: float, harmful: float, harmless: float, error: float = 0.0) -> DefenceMeasured:
    def of(value: float) -> Estimate:
        return Estimate(value=value, error=error)

    return DefenceMeasured(
        learnt=learnt, harmful=of(harmful), bare=of(9.0), reworded=of(-9.0),
        harmless=of(harmless - 0.01), touchy=of(harmless + 0.01),
    )  # fmt: skip


NOTHING = numbers(0.0, 0.01, 0.0, 0.02)


@pytest.mark.parametrize(
    ("found", "controls", "reason", "warning"),
    [
        (numbers(0.9, 0.6, 0.2), [NOTHING], None, None),
        (numbers(0.9, 0.6, 0.3), [NOTHING], None, None),
        (numbers(0.9, 0.6, 0.31), [NOTHING], None, "rise by 52% of what"),
        (numbers(0.9, 0.6, 0.53), [NOTHING], None, "rise by 88% of what"),
        (numbers(0.9, 0.6, 0.55), [NOTHING], "rise by 92% of what", None),
        (numbers(0.9, 0.6, -0.5), [NOTHING], None, None),
        (numbers(0.09, 0.6, 0.2), [NOTHING], "learnt rise by 0.090 nats a token, less", None),
        (numbers(0.9, 0.09, 0.0), [NOTHING], "requests rise by 0.090 nats a token, less", None),
        (numbers(0.9, -0.6, 0.0), [NOTHING], "requests rise by -0.600 nats a token, less", None),
        (numbers(0.9, float("nan"), 0.0), [NOTHING], "requests rise by nan nats", None),
        (numbers(float("nan"), 0.6, 0.0), [NOTHING], "learnt rise by nan", None),
        (numbers(0.9, 0.6, float("nan")), [NOTHING], "rise by nan% of what", None),
        (numbers(0.9, 0.6, 0.2), [NOTHING, numbers(0, 0.55, 0, 0.02)], None, None),
        (numbers(0.9, 0.6, 0.2), [numbers(0, 0.57, 0, 0.02), NOTHING], "control by 0.570", None),
        (numbers(0.9, 0.6, 0.2, 0.3), [NOTHING], "two standard errors more are needed", None),
    ],
)  # fmt: skip
def test_a_defence_is_refused_for_a_reason(
    found: DefenceMeasured, controls: list[DefenceMeasured], reason: str | None, warning: str | None
) -> None:
    for said, expected in zip(judge_defence(found, controls), (reason, warning), strict=True):
        assert len(said) == (expected is not None), said
        assert expected is None or expected in said[0]


def test_a_text_beyond_the_models_positions_is_refused_with_both_numbers(bench: Bench) -> None:
    long = Instance("x", "", "", "word " * 600, "", "No.", "Yes.", ITEMS[0].general)
    with refused(DataError, what="the prompt that begins with ...", expected="at most 512 tokens"):
        DefenceProbe(bench.load(), bench.plan, Lesson((long,)))


TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{{ '<model>' }}"


@pytest.fixture
def chatty() -> Iterator[Any]:
    """A tokenizer with a chat template."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    yield tokenizer
    tokenizer.chat_template = None


def test_a_prompt_is_what_the_template_makes_of_it(chatty: Any) -> None:
    assert as_prompt(chatty, "Hi.") == "<user>Hi.\n<model>"
    text, start = exchange(chatty, "Hi.", "No.", "S")
    assert (text[:start], text[start:]) == ("<user>Hi. S\n<model>", "No.")
    chatty.chat_template = "{{ raise_exception('never') }}"
    with refused(DataError, what="the chat template cannot write a message of a user"):
        as_prompt(chatty, "Hi.")
    chatty.chat_template = None
    text, start = exchange(chatty, "Hi.", "No.", "S")
    assert (text[:start], text[start:]) == ("Hi. S ", "No.")


@pytest.fixture(scope="module")
def source(checkpoints: Checkpoints) -> Path:
    return checkpoints("llama", torch.bfloat16)


def test_the_guard_measures_records_and_shows_it(source: Path, cli: Cli, tmp_path: Path) -> None:
    args = ("convert", source, tmp_path / "out", "--method", "toy", "--num-pairs", 64)
    more = ("--guard-draws", 2, "--max-perplexity-ratio", 9)
    says = "refusals of harmful requests rise by"
    cli(*args, *more, code=9, says=says)
    assert not (tmp_path / "out").exists()
    result = cli(*args, *more, "--force", code=0, says=says)
    assert "\n  refusals  " in result.stderr + result.stdout
    assert "\n  learnt  " in result.stderr + result.stdout
    manifest = read_manifest(tmp_path / "out")
    assert manifest.guard is not None
    found = manifest.guard.defence
    assert found is not None
    assert manifest.instances is not None
    assert manifest.instances.sha256 == load_instances().sha256
    assert len(found.controls) == 2
    assert {*found.prompts} == {"learnt", *SETS}
    assert (found.suffix, found.instances) == ("Be kind.", ("0",))
    assert any(says in reason for reason in manifest.guard.reasons)
    assert not any("toxic words" in reason for reason in manifest.guard.reasons)
    card = (tmp_path / "out/README.md").read_text()
    assert f"| refusals of harmless questions, {found.prompts['harmless']} |" in card
    assert "edited to make refusals of harmful requests more probable" in card
    assert "| fitted on | the instances built into gloss-convert |" in card
    assert "pairs of toxic" not in card
    assert converter.verify(tmp_path / "out", str(source)) == []
    manifest_file = tmp_path / "out/gloss_manifest.json"
    text = json.loads(manifest_file.read_text())
    text["guard"]["defence"]["controls"].pop()
    manifest_file.write_text(json.dumps(text))
    assert any("other controls" in said for said in converter.verify(tmp_path / "out"))


def test_a_template_is_written_with_the_suffix_that_was_measured(
    source: Path, cli: Cli, tmp_path: Path
) -> None:
    """With the template, and found without the source if the record says another suffix."""
    own, out = copy_of(source, tmp_path / "own"), tmp_path / "out"
    (own / "chat_template.jinja").write_text(TEMPLATE)
    args = ("--method", "toy", "--num-pairs", 64, "--guard-draws", 1, "--force")
    cli("convert", own, out, *args, "--max-perplexity-ratio", 9, code=0)
    assert converter.verify(out, str(own)) == []
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert as_prompt(tokenizer, "Hi.") == "<user>Hi. Be kind.\n<model>"
    manifest = load_manifest(out)
    manifest["guard"]["defence"]["suffix"] = "Be rude."
    put(out, manifest)
    says = "chat_template.jinja gets another suffix than the guard measured with"
    cli("verify", out, code=8, says=says)


def guard_of(defence: DefenceMeasured | None) -> Any:
    from tests.fuzz import skeleton

    guard = converter.manifest.Manifest.from_json(skeleton.manifest()).guard
    assert guard is not None
    if defence is None:
        return guard
    record = converter.manifest.DefenceRecord(
        least_learnt=0.1, least_defence=0.1, most_over_refusal=0.9, instances=("0",), suffix="",
        prompts={}, loss=1.0, edit=defence, controls=(defence,),
    )  # fmt: skip
    return replace(guard, defence=record)


def test_gates_of_refusals() -> None:
    guard = guard_of(numbers(0.9, 0.5, 0.2))
    first, second = Gates(min_defence=0.5, max_over_refusal=0.4).check_effect(guard, None)
    assert (first.gate, first.limit, first.measured) == ("--min-defence", 0.5, 0.5)
    assert (second.gate, second.limit) == ("--max-over-refusal", 0.4)
    assert second.measured == pytest.approx(0.4)
    for gates, says in (
        (Gates(min_defence=0.51), "--min-defence asks for at least 0.51, guard has 0.5"),
        (Gates(max_over_refusal=0.39), "--max-over-refusal asks for at most 0.39, guard has 0.4"),
    ):
        with refused(GateError, what=f"release gate failed: {says}"):
            gates.check_effect(guard, None)
        for unmeasured in (None, guard_of(None)):
            with refused(OptionError, what="... has no measurement"):
                gates.check_effect(unmeasured, None)


def test_gates_of_refusals_are_refused_at_once_without_a_measurement(
    source: Path, cli: Cli, tmp_path: Path
) -> None:
    says = "has no measurement: expected the guard, and a method that is for defence"
    for method in (("--method", "toy", "--no-guard"), ("--method", "gloss")):
        for gate in (("--min-defence", 0.1), ("--max-over-refusal", 0.5)):
            cli("convert", source, tmp_path / "out", *method, *gate, code=2, says=says)


WRONG: dict[str, tuple[str, Callable[[Proposal], dict[str, Any]], str]] = {
    "no lesson": ("defence", lambda p: {"lesson": None}, "what was learnt"),
    "an empty lesson": ("defence", lambda p: {"lesson": Lesson(())}, "what was learnt"),
    "a free strength": ("defence", lambda p: {"is_free": True}, "a strength that needs no choice"),
    "another aim": ("toxicity", lambda p: {}, "no lesson, since its aim is not defence"),
    "no aim": ("fame", lambda p: {}, "toxicity or defence"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_proposal_that_does_not_fit_its_aim_is_refused(
    wrong: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    aim, change, expected = WRONG[wrong]
    own = Toy.fit

    def fit(self: Toy, bench: Workbench) -> Proposal:
        proposal = own(self, bench)
        return changed(proposal, **change(proposal))

    monkeypatch.setattr(Toy, "fit", fit)
    monkeypatch.setattr(Toy, "aim", aim)
    with refused(FitError, expected=f"...{expected}..."):
        converter.convert(tiny_recipe(source, method="toy", options={}), tmp_path / "out")


def test_an_aim_may_be_left_out() -> None:
    assert aim_of(RankOne()) == "toxicity"
    assert aim_of(Toy()) == "defence"


def test_instances_that_cannot_be_read_are_missed_at_once(
    source: Path, cli: Cli, tmp_path: Path
) -> None:
    args = ("convert", source, tmp_path / "out", "--method", "toy", "--instances")
    for last in ((), ("--dry-run",)):
        result = cli(*args, tmp_path / "no.json", *last, code=5, says="no.json does not exist")
        assert "running the model" not in result.stderr
    with pytest.raises(GuardError):
        converter.convert(
            tiny_recipe(source, method="toy", options={}, guard=True, num_pairs=64),
            tmp_path / "out",
        )


def test_a_refit_asks_for_the_recorded_instances(source: Path, cli: Cli, tmp_path: Path) -> None:
    entry = {
        "adversarial prompt": "X", "safe generation": "No.", "unsafe generation": "Yes.",
    }  # fmt: skip
    for name, more in (("a.json", {}), ("b.json", {"question": "Why?"})):
        (tmp_path / name).write_text(json.dumps([entry | more]))
    out, args = tmp_path / "out", ("--method", "toy", "--num-pairs", 64, "--no-guard")
    cli("convert", source, out, *args, "--instances", tmp_path / "a.json", code=0)
    manifest = read_manifest(out)
    assert (manifest.run.instances, manifest.guard) == ("a.json", None)
    assert manifest.instances is not None
    assert manifest.instances.origin.name == "a.json"
    again = ("replay", out, tmp_path / "again", "--source", source, "--refit")
    cli(*again, code=2, says="say where it is with --instances")
    cli(*again, "--instances", tmp_path / "b.json", code=8, says="by their sha256: instances")
    cli(*again, "--instances", tmp_path / "a.json", code=0)
    # the same command finds its result, unless the instances have changed since
    same = ("convert", source, out, *args, "--instances", tmp_path / "a.json")
    cli(*same, code=0, says="is the result of this run already")
    (tmp_path / "a.json").write_text((tmp_path / "b.json").read_text())
    cli(*same, code=7)


def test_an_evaluation_leaves_out_what_was_learnt(
    source: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Lesson | None] = []

    def prompts(tokenizer: Any, lesson: Lesson | None) -> dict[str, list[str]]:
        seen.append(lesson)
        return {"refusals/bare": ["Why?"]}

    monkeypatch.setattr("converter.evaluation.compare.refusal_prompts", prompts)
    out, args = tmp_path / "out", ("--method", "toy", "--num-pairs", 64, "--guard-draws", 1)
    asked = ("--prompts", "none", "--defence")
    more = ("--force", "--max-perplexity-ratio", 9)
    cli("convert", source, out, *args, *more, "--evaluate", *asked, code=0)
    evaluation = read_manifest(out).evaluation
    assert evaluation is not None
    assert [system.system for system in evaluation.systems] == ["unedited", "edited", "random"]
    assert all("refusals/bare" in system.metrics for system in evaluation.systems)
    assert "| refusals/bare |" in (out / "README.md").read_text()
    cli("evaluate", out, "--base", source, *asked, code=0)
    cli("evaluate", source, *asked, code=0)
    cli("evaluate", source, *asked, "--system", "toy", "--num-pairs", 64, code=0)
    first, second, third, fourth = seen
    assert first == fourth == Lesson(ITEMS[:1], "Be kind.")
    assert second == Lesson(ITEMS[:1])
    assert third is None


def test_an_evaluation_says_if_it_is_not_known_what_was_learnt(
    source: Path, cli: Cli, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    cli("convert", source, out, "--method", "toy", "--num-pairs", 64, "--no-guard", code=0)
    says = "it is not known which requests edited has learnt"
    cli("evaluate", out, "--base", source, "--prompts", "none", "--defence", code=0, says=says)
    card = (out / "README.md").read_text()
    assert "Refusals and perplexity were **not measured**" in card
    assert "the table above" not in card


def test_lessons_of_several_are_one() -> None:
    one, two = Lesson(ITEMS[:2], "S"), Lesson(ITEMS[1:3], "T")
    assert together([one, None, two]) == Lesson(ITEMS[:3], "T")
    assert together([None]) is None


def test_one_control_cannot_be_of_both_kinds(source: Path, cli: Cli, tmp_path: Path) -> None:
    args = ("convert", source, tmp_path / "out", "--method", "toy", "--num-pairs", 64)
    cli(*args, "--guard-draws", 1, code=9, says="under one control only")
    assert "one control only" not in cli(*args, "--guard-draws", 2, code=9).stderr


def test_a_record_that_hides_the_aim_is_found(source: Path, cli: Cli, tmp_path: Path) -> None:
    """What the guard of an edit for defence did not measure cannot be left out of the record."""
    own, out = copy_of(source, tmp_path / "own"), tmp_path / "out"
    (own / "chat_template.jinja").write_text(TEMPLATE)
    args = ("--method", "toy", "--num-pairs", 64, "--guard-draws", 1, "--force")
    cli("convert", own, out, *args, "--max-perplexity-ratio", 9, code=0)
    whole = load_manifest(out)
    guard = {key: value for key, value in whole["guard"].items() if key != "defence"}
    plain = {key: value for key, value in whole["edit"].items() if key != "patches"}
    bare = {key: value for key, value in whole.items() if key != "instances"}
    prompts = {"harmful": 1}
    fewer = whole["guard"] | {"defence": whole["guard"]["defence"] | {"prompts": prompts}}
    for told, says in (
        (whole | {"guard": fewer}, "the guard asked other prompts than it has measured"),
        (whole | {"guard": guard}, "the guard judged by other rules than those for defence"),
        (bare, "the instances are not what a method for defence has"),
        (whole | {"edit": plain}, "chat_template.jinja gets no suffix, and the guard measured"),
    ):
        put(out, told)
        assert any(says in said for said in converter.verify(out)), says
    put(out, whole | {"guard": fewer})  # replay looks at less, and makes a card of it
    cli("replay", out, tmp_path / "again", "--source", own, code=8, says="asked other prompts")


def test_no_share_of_a_defence_that_is_none_opens_a_gate() -> None:
    """Of refusals of harmful requests that fall, and of harmless ones that rise."""
    found = numbers(0.1, -0.1, 0.5)
    with refused(GateError, what="...--max-over-refusal asks for at most 0.5, guard has no number"):
        Gates(max_over_refusal=0.5).check_effect(guard_of(found), None)


def test_an_empty_template_is_none(chatty: Any) -> None:
    chatty.chat_template = ""
    assert as_prompt(chatty, "Hi.", "S.") == "Hi. S."
    assert exchange(chatty, "Hi.", "Ho.") == ("Hi. Ho.", 4)
