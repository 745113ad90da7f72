"""Gates fail the job with their own exit code and leave nothing that could be published."""

import json
from pathlib import Path

import pytest
import torch
from msgspec import convert
from msgspec.structs import replace

from converter.errors import GateError, OptionError
from converter.evaluation.gates import Gates
from converter.manifest import (
    Estimate,
    Evaluation,
    GateRecord,
    GuardRecord,
    Interval,
    Manifest,
    Metric,
)
from tests.builders.errors import refused
from tests.builders.invoke import Cli
from tests.builders.models import TINY_ARGS, Checkpoints
from tests.builders.planted import planted_args
from tests.fuzz import skeleton


def guard(teacher_forced: float, context: float | None = None) -> GuardRecord:
    """A guard that measured this."""
    known = Manifest.from_json(skeleton.manifest()).guard
    assert known is not None
    words = Estimate(value=teacher_forced, error=0.0)
    beside = None if context is None else Estimate(value=context, error=0.0)
    return replace(known, edit=replace(known.edit, teacher_forced=words, context_ratio=beside))


GUARD = guard(0.6)


def results(**values: float | None) -> Evaluation:
    """Of an evaluation: the edited model between others that must not be mistaken for it."""
    known = convert(skeleton.evaluation(), Evaluation)
    other: dict[str, Metric] = {
        "teacher_forced": Interval.of(0, 0, 0), "perplexity_ratio": Interval.of(1, 1, 1)
    }  # fmt: skip
    mine = {name: None if x is None else Interval.of(x, x, x) for name, x in values.items()}
    (system,) = known.systems
    systems = tuple(
        replace(system, system=name, metrics=metrics)
        for name, metrics in (("unedited", other), ("edited", mine), ("random", other))
    )
    return replace(known, systems=systems)


def test_a_gate_is_judged_by_every_measurement_there_is() -> None:
    gates, evaluated = Gates(min_toxicity_drop=0.4), results(teacher_forced=0.65)
    (record,) = gates.check_effect(GUARD, None)
    name = "--min-toxicity-drop"
    assert record == GateRecord(gate=name, by="guard", limit=0.4, measured=0.4)
    asks = f"release gate failed: {name} asks for at least"
    with refused(GateError, what=f"{asks} 0.4, evaluation has 0.35"):
        gates.check_effect(GUARD, evaluated)
    with refused(GateError, what=f"{asks} 0.41, guard has 0.4"):
        Gates(min_toxicity_drop=0.41).check_effect(GUARD, None)
    assert Gates(min_toxicity_drop=0.3).check_effect(None, evaluated)[0].by == "evaluation"
    ratio = Gates(max_evaluated_perplexity_ratio=1.05)
    assert ratio.check_effect(None, results(perplexity_ratio=1.05))
    with refused(GateError, what="... asks for at most 1.05, evaluation has 1.06"):
        ratio.check_effect(GUARD, results(perplexity_ratio=1.06))


def test_the_gate_of_informal_text_is_judged_by_guard_and_evaluation() -> None:
    gates = Gates(max_informal_perplexity_ratio=1.1)
    evaluated = results(teacher_forced=0.6, context_ratio=1.07)
    found = gates.check_effect(guard(0.6, 1.05), evaluated)
    assert [(gate.by, gate.measured) for gate in found] == [("guard", 1.05), ("evaluation", 1.07)]
    name = "release gate failed: --max-informal-perplexity-ratio asks for at most 1.1"
    with refused(GateError, what=f"{name}, guard has 1.2"):
        gates.check_effect(guard(0.6, 1.2), None)
    with refused(GateError, what=f"{name}, evaluation has 1.3"):
        gates.check_effect(guard(0.6, 1.0), results(teacher_forced=0.6, context_ratio=1.3))
    with refused(GateError, what=f"{name}, guard has no number"):
        gates.check_effect(guard(0.6), None)
    with refused(OptionError, what="--max-informal-perplexity-ratio has no measurement"):
        gates.check_effect(None, None)


def test_what_is_not_a_number_passes_no_gate_and_what_was_not_measured_is_an_error() -> None:
    ratio = Gates(max_evaluated_perplexity_ratio=1.05)
    with refused(GateError, what="... asks for at most 1.05, evaluation has no number"):
        ratio.check_effect(GUARD, results(perplexity_ratio=None))
    with refused(GateError, what="... asks for at least 0, guard has no number"):
        Gates(min_toxicity_drop=0.0).check_effect(guard(float("nan")), None)
    for gates in (ratio, Gates(min_toxicity_drop=0.1)):
        with refused(OptionError, what="... has no measurement"):
            gates.check_effect(None, results())
    assert Gates().check_effect(None, None) == ()


def test_a_gate_without_a_measurement_is_refused_before_any_work(
    checkpoints: Checkpoints, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ("convert", checkpoints("llama"), tmp_path / "out", *TINY_ARGS)
    text = ("--evaluate", "--prompts", "none", "--min-toxicity-drop", 0.5)
    informal = ("--max-informal-perplexity-ratio", 1.1)
    ratio = ("--max-evaluated-perplexity-ratio", 1.1)
    for more in (("--min-toxicity-drop", 0.5), ratio, informal, text):
        for last in ((), ("--dry-run",)):
            result = cli(*args, *more, *last, code=2, says="has no measurement")
            assert "reading the headers" not in result.stderr
    monkeypatch.setenv("GLOSS_MIN_TOXICITY_DROP", "0.5")
    cli(*args, code=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", ["inf", "nan"])
@pytest.mark.parametrize("option", ["--max-leakage", "--max-perplexity-ratio"])
def test_a_limit_is_a_number(option: str, number: str, cli: Cli, tmp_path: Path) -> None:
    result = cli("convert", "demo", tmp_path / "out", option, number, code=2)
    assert result.stderr == f"error: {option}: expected a finite number, found {number}\n"


def test_the_gate_of_leakage_closes_after_the_edit_and_leaves_nothing(
    checkpoints: Checkpoints, cli: Cli, tmp_path: Path
) -> None:
    source = checkpoints("llama", torch.bfloat16)
    args = ("convert", source, tmp_path / "out", "--num-pairs", 64, *TINY_ARGS, "--json")
    result = cli(*args, "--max-leakage", 1e-9, code=11)
    said = json.loads(result.stdout)
    assert (said["error"], said["exit_code"]) == ("GateError", 11)
    says = "release gate failed: --max-leakage asks for at most 1e-09, tensor model"
    assert says in said["message"]
    assert list(tmp_path.iterdir()) == []
    cli(*args, "--max-leakage", 0.9, code=0)
    manifest = json.loads((tmp_path / "out/gloss_manifest.json").read_text())
    worst = max(entry["measures"]["leakage"] for entry in manifest["edited"])
    (gate,) = manifest["gates"]
    assert (gate["limit"], gate["measured"]) == (0.9, worst)
    # what is there stays there when a later job fails
    before = (tmp_path / "out/gloss_manifest.json").read_bytes()
    cli(*args, "--max-leakage", 1e-9, "--overwrite", code=11)
    assert (tmp_path / "out/gloss_manifest.json").read_bytes() == before


def test_the_gate_of_toxicity_closes_before_the_edit(
    planted: Path, cli: Cli, tmp_path: Path
) -> None:
    few = ("--num-pairs", 200, "--guard-draws", 2)
    args = ("convert", planted, tmp_path / "out", *planted_args(planted), *few)
    result = cli(*args, "--min-toxicity-drop", 1, "--force", code=11)
    assert "release gate failed: --min-toxicity-drop asks for at least 1, guard" in result.stderr
    assert "editing" not in result.stderr
    assert list(tmp_path.iterdir()) == []
    cli(*args, "--min-toxicity-drop", 0.1, code=0)
    manifest = json.loads((tmp_path / "out/gloss_manifest.json").read_text())
    drop = 1 - manifest["guard"]["edit"]["teacher_forced"]["value"]
    assert manifest["gates"] == [
        {"gate": "--min-toxicity-drop", "by": "guard", "limit": 0.1, "measured": drop}
    ]
