"""Several methods together: each fitted to what the former ones left, and one edit of it all."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import converter
from converter.calibration.split import Part
from converter.calibration.statistics import Request
from converter.calibration.word_list import load_words
from converter.checkpoints.names import CARD
from converter.edits.base import Edit
from converter.edits.deltas import AddLowRank, AddToRows
from converter.entrypoints.convert import load_texts, prepare
from converter.errors import CheckpointError, FitError, OptionError
from converter.evaluation import fit as fitting
from converter.manifest import Choice, Manifest
from converter.methods.base import Proposal
from converter.methods.options import configure
from converter.methods.together import Together, after
from converter.methods.workbench import Bench
from tests.builders.adversary import copy_of, load_manifest, put
from tests.builders.errors import refused
from tests.builders.invoke import Cli
from tests.builders.methods import METHODS, draw, the_weight
from tests.builders.models import Checkpoints, planned, tiny_recipe
from tests.builders.packages import install
from tests.builders.planted import planted_args

WORDS = load_words("builtin")


@pytest.fixture(scope="module", autouse=True)
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Installs the methods of the tests as a package."""
    entries = {name: f"{kind.__module__}:{kind.__name__}" for name, kind in METHODS.items()}
    with pytest.MonkeyPatch.context() as patch:
        site = tmp_path_factory.mktemp("site")
        install(site, patch, "toy-methods", {"gloss_convert.methods": entries})
        yield


@pytest.fixture(scope="module")
def both(
    checkpoints: Checkpoints, shared_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, Manifest]:
    """A source, what two toy methods made of it together, and its manifest. Read only."""
    source, out = checkpoints("llama", torch.bfloat16), tmp_path_factory.mktemp("both") / "out"
    options = {"rank-one.scale": "0.05", "rows.scale": "0.03"}
    recipe = tiny_recipe(source, num_pairs=64, method="rank-one+rows", options=options)
    return source, out, converter.convert(recipe, out)


def weights(folder: Path) -> dict[str, Tensor]:
    return {k: t for path in folder.glob("*.safetensors") for k, t in load_file(path).items()}


def convert(source: Path, out: Path, method: str, **options: str) -> Manifest:
    given = {key.replace("__", "."): value for key, value in options.items()}
    return converter.convert(
        tiny_recipe(source, num_pairs=64, method=method, options=given, batch_size=4), out
    )


def test_two_methods_write_what_each_writes(
    both: tuple[Path, Path, Manifest], tmp_path: Path
) -> None:
    source, out, manifest = both
    for method, scale in (("rank-one", "0.05"), ("rows", "0.03")):
        convert(source, tmp_path / method, method, scale=scale)
    one, other, found = (weights(f) for f in (tmp_path / "rank-one", tmp_path / "rows", out))
    before = weights(source)
    changed = {name for name in before if not torch.equal(before[name], found[name])}
    assert len(changed) == 2
    for name, tensor in found.items():
        alone = one[name] if not torch.equal(one[name], before[name]) else other[name]
        assert torch.equal(tensor, alone), name
    assert converter.verify(out, str(source)) == []
    assert [step.method.name for step in manifest.steps] == ["rank-one", "rows"]
    assert [step.method.options["scale"] for step in manifest.steps] == [0.05, 0.03]
    assert [step.choice.strength for step in manifest.steps] == [0.05, 0.03]
    assert manifest.method.options["rows.scale"] == 0.03
    card = (out / CARD).read_text("utf-8")
    assert "| scale of rank-one | 0.05 |" in card
    assert "| scale of rows | 0.03 |" in card
    assert "- rank-one\n- rows\n" in card.partition("# ")[0]
    assert "a method of the tests, then a method of the tests changed it" in card


def test_an_edit_reads_weights_as_its_own_fit_has_found_them(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """A method may read a weight when its edit is asked for, after its own change is in place."""
    source, name = checkpoints("llama", torch.bfloat16), "model.layers.2.self_attn.o_proj.weight"
    recipe = tiny_recipe(source, num_pairs=64, method="replaced", options={"scale": "0.5"})
    converter.convert(recipe, tmp_path / "alone")
    alone = weights(tmp_path / "alone")[name]
    for method in ("replaced+rows", "rows+replaced"):
        options = {"replaced.scale": "0.5", "rows.scale": "0.1"}
        recipe = tiny_recipe(source, num_pairs=64, method=method, options=options)
        converter.convert(recipe, tmp_path / method)
        assert torch.equal(weights(tmp_path / method)[name], alone)


def test_it_is_replayed_and_a_false_word_is_found(
    both: tuple[Path, Path, Manifest], cli: Cli, tmp_path: Path
) -> None:
    source, out, _ = both
    again = cli("replay", out, tmp_path / "again", "--source", source, "--json", code=0)
    assert json.loads(again.stdout)["identical"] is True
    cli("replay", out, tmp_path / "fit", "--source", source, "--refit", code=0)
    altered = copy_of(out, tmp_path / "altered")

    def says(change: Any) -> str:
        manifest = load_manifest(out)
        change(manifest)
        put(altered, manifest)
        return "; ".join(converter.verify(altered))

    assert "steps are not those" in says(lambda m: m.pop("steps"))
    assert "steps and the method disagree" in says(lambda m: m["steps"].reverse())
    assert "method's scale is not" in says(
        lambda m: m["steps"][0]["method"]["options"].update(scale=1.0)
    )
    assert "steps and the method disagree" in says(
        lambda m: m["steps"][1]["choice"].update(strength=1.0)
    )
    assert "another title" in says(lambda m: m["steps"][1]["method"].update(title="mine"))
    assert "steps and the run have seen other activations" in says(
        lambda m: m.update(activations={"key": None, "inputs": {}})
    )
    assert "evidence beside that of its steps" in says(
        lambda m: m["method"].update(evidence={"a": 1})
    )


def test_what_shares_a_basis_over_layers_is_replayed_beside_what_has_one_for_each(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """The names in the edit's file do not depend on the order in which its tensors are listed."""
    source, out = checkpoints("llama", torch.bfloat16), tmp_path / "out"
    options = {"gloss.layers": "1-2", "profs.layers": "3-4", "gloss.protect_shared": "2"}
    options |= {"gloss.rank": "2", "profs.rank": "1", "profs.protect_shared": "2"}
    recipe = tiny_recipe(source, num_pairs=64, method="gloss+profs", options=options)
    recorded = converter.convert(recipe, out)
    again = converter.replay(out, tmp_path / "again", source=str(source))
    assert [each.tensors for each in again.edited] == [each.tensors for each in recorded.edited]
    assert len({each.tensors["U"] for each in recorded.edited}) == 3


def test_the_second_is_fitted_to_what_the_first_left(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """Together they write what one writes after the other; alone the second does something else.

    Of a float32 source, so that rounding is nothing.
    """
    source = checkpoints("llama")
    known = {"rank": "2", "protect_shared": "2"}
    gloss, profs = {**known, "layers": "1"}, {**known, "layers": "3"}

    def run(source: Path, name: str, method: str, options: dict[str, str]) -> Manifest:
        recipe = tiny_recipe(source, num_pairs=64, method=method, options=options)
        return converter.convert(recipe, tmp_path / name)

    run(source, "first", "gloss", gloss)
    run(tmp_path / "first", "then", "profs", profs)
    run(source, "alone", "profs", profs)
    options = {f"gloss.{key}": text for key, text in gloss.items()}
    options |= {f"profs.{key}": text for key, text in profs.items()}
    manifest = run(source, "both", "gloss+profs", options)
    then, found, alone = (weights(tmp_path / name) for name in ("then", "both", "alone"))
    for name, tensor in then.items():
        assert torch.allclose(found[name], tensor, atol=1e-6), name
    name = "model.layers.3.mlp.down_proj.weight"
    assert float((found[name] - alone[name]).norm()) > 1e-4 * float(alone[name].norm())
    one, two = manifest.steps
    assert one.activations is not None
    assert two.activations is not None
    assert "former" not in one.activations.inputs
    assert len(two.activations.inputs["former"]) == 64
    assert all(step.method.subspace is not None for step in manifest.steps)
    assert converter.verify(tmp_path / "both", str(source)) == []


@pytest.mark.parametrize("forward", ["resident", "streamed"])
def test_a_fit_sees_activations_gradients_and_weights_as_they_were_left(
    forward: str, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """Through hooks on the source they are those of the checkpoint that the first one wrote."""
    source = checkpoints("llama")
    options = {"rank": "2", "layers": "1", "protect_shared": "2"}
    converter.convert(
        tiny_recipe(source, num_pairs=64, method="profs", options=options), tmp_path / "first"
    )
    edit = converter.load_edit(tmp_path / "first")
    request = Request("ffn", "predicting", (1, 3), True, gradient=True)
    seen, read = [], []
    for folder, former in ((source, edit), (tmp_path / "first", None), (source, None)):
        recipe = tiny_recipe(folder, forward=forward)
        place, plan, _ = prepare(recipe)
        bench = Bench.of(recipe, place, plan, WORDS, "cpu")
        pairs, prose = load_texts(bench)
        short = replace(prose, paragraphs=prose.paragraphs[:2])
        bench.part, bench.former = Part(pairs, short), former
        with bench.as_left():
            seen.append(bench.activations(request).tensors())
            read.append(bench.weight(the_weight(plan, "down_proj", 1)))
    hooked, written, before = seen
    assert "causal.3" in hooked
    for name, tensor in written.items():
        assert float((hooked[name] - tensor).norm()) < 1e-5 * float(tensor.norm()), name
        assert float((hooked[name] - before[name]).norm()) > 1e-4 * float(tensor.norm()), name
    assert torch.allclose(read[0], read[1], atol=1e-6)
    assert not torch.allclose(read[0], read[2], atol=1e-3)


def test_a_weight_is_read_with_any_change_in_it(checkpoints: Checkpoints) -> None:
    recipe = tiny_recipe(checkpoints("llama"))
    source, plan, _ = prepare(recipe)
    bench = Bench.of(recipe, source, plan, WORDS, "cpu")
    weight = the_weight(plan, "down_proj", 2)
    W = bench.weight(weight)
    B, A, v = draw(1, len(W), 1), draw(2, 1, W.shape[1]), draw(3, W.shape[1])
    for delta, left in (
        (AddLowRank(B, A), W + B @ A),
        (AddToRows(torch.tensor([2]), v), torch.cat([W[:2], W[2:3] + v, W[3:]])),
    ):
        bench.former = Edit({weight.info.name: delta})
        assert torch.allclose(bench.weight(weight), left, atol=1e-5)


def one_tensor(name: str, scale: float = 1.0) -> Edit:
    return Edit({name: AddLowRank(torch.full((2, 1), scale), torch.ones(1, 2))})


def test_controls_and_costs_are_those_of_both() -> None:
    def proposal(name: str, energy: float) -> Proposal:
        return Proposal(
            (1, 2), True, lambda s: one_tensor(name, s), lambda s, seed: one_tensor(name, s * seed),
            neutral_energy=lambda s: energy * s,
        )  # fmt: skip

    found = after(proposal("a", 0.01), 2, proposal("b", 0.03))

    def values(edit: Edit) -> dict[str, float]:
        return {
            name: float(d.B[0]) for name, d in edit.tensors.items() if isinstance(d, AddLowRank)
        }

    assert values(found.edit(1)) == {"a": 2.0, "b": 1.0}
    assert values(found.control(1, 5)) == {"a": 10.0, "b": 5.0}
    assert [found.neutral_energy(s) for s in (0.5, 2)] == [0.02, 0.06]
    assert found.strengths == (1, 2)


def test_edits_add_up_where_that_is_exact_and_are_refused_elsewhere() -> None:
    one = Edit(
        created={"b": torch.ones(2), "c": torch.ones(2)}, patches={"config.json": {"x": True}}
    )
    other = Edit(created={"b": torch.ones(2)}, patches={"config.json": {"x": True, "y": 1}})
    sum_ = one.then(other)
    assert sum_.created["b"].tolist() == [2, 2]
    assert sum_.created["c"].tolist() == [1, 1]
    assert sum_.patches == {"config.json": {"x": True, "y": 1}}
    with refused(FitError, what="two methods change the tensor w"):
        one_tensor("w").then(one_tensor("w"))
    with refused(FitError, what="two methods change the file f"):
        Edit(files={"f": b"1"}).then(Edit(files={"f": b"1"}))
    with refused(FitError, what="two methods change config.json in different ways"):
        other.then(Edit(patches={"config.json": {"y": 2}}))


@pytest.mark.parametrize(
    ("method", "options", "says"),
    [
        ("gloss+profs", {"rank": "1"}, "expected gloss.rank or profs.rank, found rank"),
        ("gloss+profs", {"gloss.draw": "1"}, "-o gloss.draw: method gloss+profs"),
        ("gloss+profs", {"random.rank": "1"}, "-o random.rank: method gloss+profs"),
        (
            "gloss+rows", {"scale": "1", "rows.scale": "2"},
            "-o rows.scale: expected one value, found 1 and 2",
        ),
        ("gloss+gloss", {}, "--method: expected different methods, found gloss+gloss"),
        ("gloss+magic", {}, "found magic"),
        ("gloss+", {}, "--method"),
        (
            "rank-one+gloss", {"gloss.layers": "0-2"},
            "found model.layers.2.mlp.down_proj.weight, which both rank-one and gloss change",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_together_is_refused_before_any_work(
    method: str, options: dict[str, str], says: str, checkpoints: Checkpoints, cli: Cli,
    tmp_path: Path,
) -> None:  # fmt: skip
    typed = [word for key, text in options.items() for word in ("-o", f"{key}={text}")]
    args = ("convert", checkpoints("llama"), tmp_path / "out", "--method", method, *typed)
    result = cli(*args, "--dry-run", code=2, says=says)
    assert result.stderr.count("error: ") == 1


def test_two_heads_do_not_add_up(checkpoints: Checkpoints) -> None:
    """Each of them is the embedding and a change."""
    _, plan = planned(checkpoints("llama-tied"))
    method = configure("fusion", {}, plan.dimensions)
    with refused(OptionError, found="lm_head.weight, which both one and other change"):
        Together({"one": method, "other": method}).footprint(plan)


def test_a_plan_says_what_becomes_of_each_strength(checkpoints: Checkpoints, cli: Cli) -> None:
    args = ("--method", "gloss+rows", "-o", "rows.scale=0.5", "-o", "gloss.layers=1")
    said = cli("plan", checkpoints("llama"), *args, code=0).stdout
    assert "method gloss+rows, gloss.part chosen by the budget, rows.scale 0.5, layers" in said


def test_given_activations_are_of_one_method(checkpoints: Checkpoints, tmp_path: Path) -> None:
    given = tmp_path / "a.safetensors"
    given.write_bytes(b"")
    recipe = tiny_recipe(checkpoints("llama"), method="rank-one+rows", options={"scale": "1"})
    with pytest.raises(OptionError):
        prepare(recipe)  # whose scale is it?
    recipe = replace(recipe, options={}, activations=given)
    with refused(OptionError, what="--activations", expected="a single method"):
        prepare(recipe)


def test_a_tensor_of_several_weights_is_refused_by_the_kind_of_the_method_that_changes_it(
    checkpoints: Checkpoints,
) -> None:
    """That another method takes a subspace out of other tensors does not help."""
    options = {"profs.layers": "1", "model-surgery.scale": "0.1"}
    recipe = tiny_recipe(checkpoints("phi3"), method="profs+model-surgery", options=options)
    with refused(CheckpointError, what="tensor ...gate_up_proj.weight holds several weights..."):
        prepare(recipe)


def test_the_budget_is_shared_out_and_the_sum_is_examined_once(
    planted: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[float, list[float], list[str]]] = []

    def choose(probe: Any, proposal: Proposal, budget: float) -> Choice:
        strength = 0.8 if 0.8 in proposal.strengths else proposal.strengths[0]
        edit = proposal.edit(strength)
        asked.append((round(budget, 4), [*proposal.strengths], sorted(edit.tensors)))
        return Choice(strength=strength, automatic=False, tried=())

    monkeypatch.setattr(fitting, "choose_strength", choose)
    args = ("--method", "gloss+rows", *planted_args(planted, rank=None), "-o", "gloss.layers=2-4")
    more = ("-o", "rows.layer=0", "--num-pairs", 200, "--max-perplexity-ratio", "1.2", "--json")
    result = cli("convert", planted, tmp_path / "out", *args, *more, "--guard-draws", 1, code=0)
    (one, first, own), (two, second, sum_) = asked
    assert (one, two) == (1.1, 1.2)
    assert first[-1] == 0.8
    assert second == [0.01, 0.02, 0.04]
    gate = "model.layers.0.mlp.gate_proj.weight"
    assert sum_ == sorted([*own, gate])
    found = json.loads(result.stdout)
    assert found["strengths"] == {"gloss.part": 0.8, "rows.scale": 0.01}
    assert found["guard"]["edit"]["teacher_forced"]["value"] < 0.7
    assert len(found["guard"]["controls"]) == 1
    cli("verify", tmp_path / "out", code=0)
