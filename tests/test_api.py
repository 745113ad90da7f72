"""``import converter``: what a notebook does, and what packages of others bring."""

import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import converter
from converter import errors
from converter.edits.deltas import AddLowRank, RemoveSubspace
from converter.release.manifest import read_manifest
from tests.builders.errors import refused
from tests.builders.invoke import Cli
from tests.builders.models import Checkpoints, load, tiny_recipe
from tests.builders.packages import install

OUTPUT = '''"""A checkpoint with a note beside it."""

from dataclasses import replace

from converter.outputs.base import make_file
from converter.outputs.checkpoint import Checkpoint


class Noted(Checkpoint):
    own_files = (*Checkpoint.own_files, "NOTE.txt")

    def write(self, job):
        written = super().write(job)
        note = make_file(job.folder / "NOTE.txt", b"Edited.")
        return replace(written, made={**written.made, "NOTE.txt": note})
'''

SCORER = '''"""Counts exclamation marks."""

from dataclasses import dataclass

import numpy as np

from converter.manifest import ScorerOrigin


@dataclass
class Loudness:
    title: str = "loudness"
    paper: str = "https://example.org"
    origin: ScorerOrigin = ScorerOrigin(name="loudness")

    def score(self, texts):
        return np.array([min(text.count("!") / 10, 1.0) for text in texts])


def load(argument, device):
    return Loudness()
'''


@pytest.fixture(scope="module")
def recipe(checkpoints: Checkpoints) -> converter.Recipe:
    return tiny_recipe(checkpoints("llama", torch.bfloat16))


def test_every_public_name_is_there_and_documented() -> None:
    for name in converter.__all__:
        thing = getattr(converter, name)
        assert name.startswith("_") or thing.__doc__, name
    missing = {e.__name__ for e in errors.ConverterError.__subclasses__()} - {*converter.__all__}
    assert not missing
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = converter.nothing


def test_importing_it_loads_nothing_heavy() -> None:
    """Nor does an import of a room hide a function of the same name."""
    code = (
        "import sys, converter; assert 'torch' not in sys.modules;"
        "import converter.cli.main; assert callable(converter.evaluate)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_notebook_goes_through_all_of_it(
    recipe: converter.Recipe, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out, again = tmp_path / "out", tmp_path / "again"
    planned = converter.plan(recipe)
    manifest = converter.convert(recipe, out)
    assert {tensor.name for tensor in manifest.edited} == {*planned["edited_tensors"]}
    assert converter.verify(out, recipe.source) == []
    assert converter.replay(out, again, recipe.source).digests == manifest.digests
    assert converter.diff(str(out), str(again))["changed"] == []
    edit = converter.load_edit(out)
    asked = converter.EvaluationOptions(num_prompts=2, max_new_tokens=2, scorers=("bad-words",))
    found = converter.evaluate(replace(recipe, prompts="builtin"), str(out), asked)
    assert {system.system for system in found.systems} == {"unedited", "edited"}
    assert capfd.readouterr() == ("", "")
    before, after = load(Path(recipe.source)).state_dict(), load(out).state_dict()
    for name, delta in edit.tensors.items():
        assert isinstance(delta, RemoveSubspace)
        whole = before[name].float()
        exact = whole - delta.U @ (delta.U.T @ whole)
        assert torch.allclose(after[name].float(), exact, rtol=0.02, atol=1e-3)
    (out / "config.json").write_text("{}")
    assert any("config.json" in problem for problem in converter.verify(out))


def test_errors_are_raised(recipe: converter.Recipe, tmp_path: Path) -> None:
    with refused(converter.SourceError, what=f"{tmp_path / 'nothing'} does not exist"):
        converter.convert(str(tmp_path / "nothing"), tmp_path / "out")
    with refused(converter.OptionError, what="--system", found="nothing"):
        converter.evaluate(recipe, systems=["nothing"])
    with refused(converter.VerificationError, what="there is no manifest gloss_manifest.json"):
        converter.load_edit(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "numbers", [{"seeds": ()}, {"seeds": [0.5]}, {"seeds": [-1]}, {"costs": [1]}]
)
def test_numbers_that_make_no_sense_are_refused(numbers: dict[str, Any]) -> None:
    with refused(converter.OptionError, what=f"--{next(iter(numbers))}"):
        converter.evaluate("demo", **numbers)


def test_paths_do_as_well_as_texts_and_a_second_call_as_the_first(
    recipe: converter.Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = Path(recipe.source)
    given = replace(recipe, source=source)  # type: ignore[arg-type]
    assert given == recipe
    first = converter.convert(given, "out")
    assert converter.convert(given, Path("out")) == first
    assert converter.plan(source)["source"] == source.name
    assert converter.verify(Path("out"), source) == []
    converter.replay("out", "again", source)
    with refused(converter.DestinationError, what="..."):
        converter.convert(replace(given, seed=1), "out", overwrite="no")  # type: ignore[arg-type]
    assert converter.diff(Path("out"), "again")["changed"] == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "out"]


@pytest.fixture
def plug_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = {
        "gloss_convert.methods": {"toy": "tests.builders.methods:RankOne"},
        "gloss_convert.outputs": {"noted": "toy_output:Noted", "broken": "toy_missing:Nothing"},
        "gloss_convert.scorers": {"loudness": "toy_scorer:load"},
    }
    modules = {"toy_output": OUTPUT, "toy_scorer": SCORER}
    install(tmp_path / "site", monkeypatch, "toy-things", entries, modules)


@pytest.mark.usefixtures("plug_ins")
def test_a_package_brings_methods_outputs_and_scorers(
    recipe: converter.Recipe, cli: Cli, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    cli("convert", recipe.source, out, "--method", "toy", "-o", "scale=0.1", "--output",
               "noted", "--num-pairs", 64, "--no-guard", "--evaluate", "--scorer", "loudness",
               "--num-prompts", 2, "--max-new-tokens", 2, code=0)  # fmt: skip
    manifest = read_manifest(out)
    assert manifest.method.package == manifest.output_package == "toy-things 1.2"
    assert manifest.evaluation is not None
    assert manifest.evaluation.settings.scorers["loudness"].package == "toy-things 1.2"
    assert (out / "NOTE.txt").read_bytes() == b"Edited."
    cli("verify", out, code=0)


def test_the_example_of_the_guide_runs_as_a_package(
    recipe: converter.Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guide = Path("converter/README.md").read_text()
    start = guide.index('    """Difference of means')
    code = textwrap.dedent(guide[start : guide.index("\n- `footprint`", start)])
    assert len(code.splitlines()) < 60
    entries = {"gloss_convert.methods": {"mean-difference": "mean_difference:MeanDifference"}}
    install(tmp_path / "site", monkeypatch, "toy", entries, {"mean_difference": code})
    fixed = {"layers": "2", "share": "1"}
    out = tmp_path / "out"
    asked = replace(recipe, method="mean-difference", options=fixed)
    manifest = converter.convert(asked, out)
    assert [tensor.name for tensor in manifest.edited] == ["model.layers.2.mlp.down_proj.weight"]
    (delta,) = converter.load_edit(out).tensors.values()
    assert isinstance(delta, AddLowRank)
    assert torch.linalg.matrix_rank(delta.B @ delta.A) == 1
    assert converter.verify(out, recipe.source) == []
    # what random weights write is not toxic
    with refused(converter.GuardError, what="the edit is refused: ..."):
        converter.convert(replace(asked, options={}, guard=True), tmp_path / "chosen")


@pytest.mark.usefixtures("plug_ins")
def test_a_broken_package_is_named(recipe: converter.Recipe, cli: Cli, tmp_path: Path) -> None:
    broken = cli("convert", recipe.source, tmp_path / "out", "--output", "broken", code=2)
    assert "toy-things 1.2 cannot be loaded" in broken.stderr
    unknown = cli("convert", recipe.source, tmp_path / "out", "--output", "other")
    assert "expected adapter or broken or checkpoint or noted, found other" in unknown.stderr


def test_a_model_from_a_package_that_is_gone_says_so(
    recipe: converter.Recipe, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as installed:
        entries = {"gloss_convert.outputs": {"noted": "toy_output:Noted"}}
        install(tmp_path / "site", installed, "toy-things", entries, {"toy_output": OUTPUT})
        converter.convert(replace(recipe, output="noted"), tmp_path / "o")
    (problem,) = converter.verify(tmp_path / "o")
    assert "the output was written by toy-things 1.2" in problem
