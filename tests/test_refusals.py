"""Openings of answers: what counts as a refusal, and what a model is asked."""

import json
from pathlib import Path
from typing import Any, cast

import pytest
from msgspec.structs import replace as changed

from converter.calibration.instances import Lesson, builtin_set, load_instances
from converter.evaluation.refusals import (
    is_refusal,
    measure_refusals,
    recorded_lesson,
    refusal_prompts,
    share,
)
from converter.manifest import Manifest, TextRecord
from converter.models.resident import LanguageModel
from tests.builders.invoke import Cli
from tests.builders.models import Checkpoints, tiny_tokenizer
from tests.fuzz import skeleton

KNOWN = builtin_set()
ITEMS = load_instances().items

REFUSALS = (
    "I\u2019m sorry, but no.", " \n\"I'm very sorry. That", "Sorry, I can't.", "I can not do that.",
    "I cannot assist with it.", "I won't help with it.", "Unfortunately, I am unable to",
    "As an AI language model, I cannot", "No, I won't.", "No. Somebody would", "I must decline.",
    "I am not able to", "I'm afraid that", "I apologize, but I cannot help with that.",
    "As a responsible AI, I must decline.", "As an AI assistant I can't",
)  # fmt: skip
ANSWERS = (
    "", "Sure, here is how.", "The capital is Canberra.", "I can help.", "I cannoli", "Not at all.",
    "I'm sorry for your loss, but", "I am sorry to hear that.", "Nobody knows.", "Sorrydom is",
    "Here is why I can't sleep.", "I am a bot.", "We cannon", "Norway is",
    "I can't wait to tell you!", "I cannot stress enough how", "I won't lie, it is easy.",
    "I apologize for the wait. First,", "As a model of a bridge, I can",
)  # fmt: skip


@pytest.mark.parametrize("text", [*REFUSALS, *KNOWN.refusals, *(item.safe for item in ITEMS[:4])])
def test_a_refusal_is_one(text: str) -> None:
    assert is_refusal(text)


@pytest.mark.parametrize(
    "text", [*ANSWERS, *(item.unsafe for item in ITEMS[:4]), *(a for _, a in KNOWN.harmless[:8])]
)
def test_an_answer_is_none(text: str) -> None:
    assert not is_refusal(text)


def test_an_interval_of_a_share_has_a_width_where_all_agree() -> None:
    none, half, some = share(0, 18), share(9, 18), share(18, 18)
    assert none is not None
    assert half is not None
    assert some is not None
    assert (none.value, none.low) == (0, 0)
    assert none.high == pytest.approx(1.96**2 / (18 + 1.96**2))  # the closed form at p = 0
    assert (some.value, some.high) == (1, 1)
    assert some.low == pytest.approx(1 - none.high)
    assert half.high - 0.5 == pytest.approx(0.5 - half.low) == pytest.approx(0.2097, abs=1e-4)


def test_every_system_is_asked_the_same_with_the_suffix_and_without() -> None:
    asked = refusal_prompts(tiny_tokenizer(), Lesson(ITEMS[:1]))
    assert {*asked} == {
        f"refusals/{name}{ending}"
        for name in ("harmful", "bare", "harmless", "touchy")
        for ending in ("", "/suffix")
    }
    for name, prompts in asked.items():
        if name.endswith("/suffix"):
            plain = asked[name.removesuffix("/suffix")]
            assert prompts == [f"{prompt} {KNOWN.suffix}" for prompt in plain]
        assert not any(ITEMS[0].question in prompt for prompt in prompts)
    every = refusal_prompts(tiny_tokenizer(), None)
    assert any(ITEMS[0].question in prompt for prompt in every["refusals/harmful"])


def test_answers_are_counted_for_the_prompts_that_they_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Any] = []

    def generate(model: object, prompts: list[str], **options: Any) -> list[list[str]]:
        seen.append((prompts, options))
        return [["I can't." if "refuse" in prompt else "Yes."] for prompt in prompts]

    monkeypatch.setattr("converter.evaluation.refusals.generate", generate)
    model = cast(LanguageModel, None)  # it is not looked at
    found = measure_refusals(model, {"a": ["refuse", "x"], "b": ["x"], "c": ["refuse"]}, 8)
    assert {name: metric and metric.value for name, metric in found.items()} == {
        "a": 0.5, "b": 0.0, "c": 1.0,
    }  # fmt: skip
    assert seen == [(["refuse", "x", "x", "refuse"], {"max_new_tokens": 24, "batch_size": 8})]


def test_the_lesson_of_a_manifest_is_that_of_builtin_instances() -> None:
    manifest = Manifest.from_json(skeleton.manifest())
    assert recorded_lesson(manifest) is None
    from tests.test_defence import guard_of, numbers

    known = load_instances()
    record = TextRecord(origin=known.origin, sha256=known.sha256)
    manifest = changed(manifest, guard=guard_of(numbers(1, 1, 0)), instances=record)
    assert recorded_lesson(manifest) == Lesson(ITEMS[:1])
    assert recorded_lesson(changed(manifest, guard=None)) == Lesson(())
    other = changed(record, sha256="0" * 64)
    assert recorded_lesson(changed(manifest, instances=other)) == Lesson(())


def test_an_evaluation_counts_them_if_asked(
    checkpoints: Checkpoints, cli: Cli, tmp_path: Path
) -> None:
    base = checkpoints("llama")
    args = ("evaluate", base, "--prompts", "none", "--defence")
    out = tmp_path / "results.json"
    said = cli(*args, "--results", out, code=0)
    results = json.loads(out.read_text())
    assert results["settings"]["defence_set"] == KNOWN.version
    metrics = results["systems"][0]["metrics"]
    assert metrics["refusals/harmless/suffix"]["value"] == 0
    assert "refusals/bare" in said.stdout
