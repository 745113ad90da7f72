"""Packages that bring faulty methods, outputs and scorers: one sentence that names the package.

Nothing of theirs ends as a traceback, and nothing is left where the result would have been.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NoReturn, Optional

import numpy as np
import pytest
import torch
from click.testing import Result

import converter
from converter.checkpoints.architectures.architecture import Dimensions
from converter.checkpoints.plan import Plan
from converter.edits.base import Edit, Footprint
from converter.edits.deltas import AddLowRank
from converter.errors import FitError, OptionError
from converter.evaluation.scorers import load_scorer, scores_of
from converter.methods.base import Proposal, Workbench
from converter.methods.options import configure
from converter.outputs.base import output_of
from converter.release.manifest import read_manifest
from tests.builders.invoke import Cli
from tests.builders.methods import RankOne, the_weight
from tests.builders.models import Checkpoints
from tests.builders.packages import install

NO_CLASS = "text"


def nothing(*args: object) -> Any:
    return None


def boom(*args: object) -> NoReturn:
    raise KeyError("boom")


def rank_one(bench: Workbench, scale: float) -> Edit:
    info = the_weight(bench.plan, "down_proj", 2).info
    return Edit({info.name: AddLowRank(scale * torch.ones(32, 1) / 1000, torch.ones(1, 48))})


@dataclass(frozen=True, slots=True, kw_only=True)
class Faulty(RankOne):
    """A method whose fit is set by a test."""

    proposed: ClassVar[Callable[[Workbench], Any]]

    def fit(self, bench: Workbench) -> Proposal:
        proposal: Proposal = type(self).proposed(bench)
        return proposal


@pytest.fixture
def source(checkpoints: Checkpoints) -> Path:
    return checkpoints("llama", torch.bfloat16)


@pytest.fixture
def faulty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli, source: Path) -> Any:
    """Runs a conversion by a method of a package; nothing may be left if it is refused."""

    def run(method: Any, *args: object, command: str = "convert", **expected: Any) -> Result:
        monkeypatch.setitem(globals(), "BROUGHT", method)
        entries = {"faulty": f"{__name__}:BROUGHT"}
        folder = tmp_path / "site"
        if not folder.exists():
            install(folder, monkeypatch, "bad-things", {"gloss_convert.methods": entries})
        out = tmp_path / "work" / "out"
        places = [source, out] if command == "convert" else [source]
        more = ["--num-pairs", 64] if command == "convert" else []
        result = cli(command, *places, "--method", "faulty", *more, *args, **expected)
        assert isinstance(result.exception, SystemExit | None), result.exception
        if result.exit_code:
            assert len([x for x in result.stderr.splitlines() if x.startswith("error")]) == 1
            assert not out.parent.exists()
        return result

    return run


STRENGTHS = {
    "none at all": (), "no sequence": 5, "nothing": None, "NaN": [float("nan")],
    "infinite": [1.0, float("inf")], "huge": [10**40],
    "texts": ["1"], "true": [True], "unsorted": [2, 1], "twice the same": [1, 1],
}  # fmt: skip


@pytest.mark.parametrize("wrong", STRENGTHS)
def test_strengths_that_are_none(wrong: str, faulty: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def proposed(bench: Workbench) -> Any:
        strengths: Any = STRENGTHS[wrong]
        edit = lambda scale: rank_one(bench, scale)  # noqa: E731
        return Proposal(strengths, False, edit, nothing)

    monkeypatch.setattr(Faulty, "proposed", proposed, raising=False)
    faulty(Faulty, "--no-guard", code=6, says="expected ascending finite strengths")


@pytest.mark.parametrize("strengths", [torch.tensor([0.25, 0.5]), np.array([0.25, 0.5]), [0.5]])
def test_strengths_of_other_libraries_become_plain_numbers(strengths: Any) -> None:
    found = Proposal(strengths, False, nothing, nothing).strengths
    assert found[-1] == 0.5
    assert {type(value) for value in found} == {float}


EVIDENCE: dict[str, dict[Any, Any]] = {
    "a tensor": {"a": torch.ones(1)}, "NaN": {"a": float("nan")}, "a path": {"a": Path()},
    "a number of NumPy": {"a": np.float32(1)}, "half a character": {"a": "\ud800"},
    "beyond 64 bits": {"a": 10**30}, "what a subspace has, and is none": {"candidates": [1]},
}  # fmt: skip


@pytest.mark.parametrize("wrong", EVIDENCE)
def test_evidence_that_cannot_be_kept(wrong: str) -> None:
    with pytest.raises(FitError, match="evidence as JSON"):
        Proposal((1,), False, nothing, nothing, EVIDENCE[wrong])


@pytest.mark.parametrize("kinds", [(), "random rows", (1,), ["random rows"]])
def test_kinds_of_controls_without_names(kinds: Any) -> None:
    with pytest.raises(FitError, match="kinds of controls by name"):
        Proposal((1,), False, nothing, nothing, control_kinds=kinds)


@pytest.mark.parametrize("tensors", [{"a": [1]}, {"a\n": torch.ones(1)}, {1: torch.ones(1)}, [1]])
def test_tensors_that_cannot_be_kept(tensors: Any) -> None:
    with pytest.raises(FitError, match="plain tensors"):
        Proposal((1,), False, nothing, nothing, {}, tensors)


FOOTPRINTS: dict[str, Callable[[], Footprint]] = {
    "names as weights": lambda: Footprint(("x",)),  # type: ignore[arg-type]
    "names as kinds": lambda: Footprint(kinds=("replace",)),  # type: ignore[arg-type]
    "a list of new tensors": lambda: Footprint(created=["x"]),  # type: ignore[arg-type]
    "a shape that is none": lambda: Footprint(created={"x": "ab"}),  # type: ignore[dict-item]
    "text as files": lambda: Footprint(files="abc"),  # type: ignore[arg-type]
    "text as a rank": lambda: Footprint(rank="1"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("wrong", FOOTPRINTS)
def test_a_footprint_that_is_none(wrong: str) -> None:
    with pytest.raises(FitError, match="it is a fault of the method"):
        FOOTPRINTS[wrong]()


def with_edits(edit: Any, control: Any, energy: Any = nothing) -> Callable[[Workbench], Any]:
    def proposed(bench: Workbench) -> Any:
        return Proposal(
            (1.0,), False, lambda scale: edit(bench, scale),
            lambda scale, seed: control(bench, scale), neutral_energy=energy,
        )  # fmt: skip

    return proposed


def too_small(bench: Workbench, scale: float) -> Edit:
    name = the_weight(bench.plan, "down_proj", 2).info.name
    return Edit({name: AddLowRank(torch.ones(3, 1), torch.ones(1, 48))})


def unknown(bench: Workbench, scale: float) -> Edit:
    return Edit({"nothing": AddLowRank(torch.ones(32, 1), torch.ones(1, 48))})


RUNS: dict[str, tuple[Callable[[Workbench], Any], int, str]] = {
    "a fit that raises": (boom, 2, "the package bad-things 1.2 failed: found KeyError: 'boom'"),
    "a fit that gives nothing": (nothing, 6, "expected Proposal, found NoneType"),
    "an edit that is nothing": (with_edits(nothing, rank_one), 6, "expected Edit"),
    "an edit that raises": (with_edits(boom, rank_one), 2, "bad-things 1.2 failed"),
    "an edit of another size": (with_edits(too_small, rank_one), 4, "B is float32 [3, 1]"),
    "an edit of nothing": (with_edits(unknown, rank_one), 4, "no weight of that name"),
    "a control that is nothing": (with_edits(rank_one, nothing), 6, "expected Edit"),
    "a control that raises": (with_edits(rank_one, boom), 2, "bad-things 1.2 failed"),
    "a control of another size": (with_edits(rank_one, too_small), 4, "B is float32 [3, 1]"),
    "an energy that is none": (
        with_edits(rank_one, rank_one, lambda scale: float("nan")), 6, "the neutral energy",
    ),
}  # fmt: skip


@pytest.mark.parametrize("wrong", RUNS)
def test_a_fit_that_goes_wrong(wrong: str, faulty: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    proposed, code, said = RUNS[wrong]
    monkeypatch.setattr(Faulty, "proposed", proposed, raising=False)
    faulty(Faulty, code=code, says=said)


@dataclass(frozen=True, slots=True, kw_only=True)
class NoFootprint(RankOne):
    def footprint(self, plan: Plan) -> Footprint:
        found: Footprint = nothing()
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Raises(RankOne):
    def footprint(self, plan: Plan) -> Footprint:
        raise KeyError("boom")


@dataclass(frozen=True)
class NoTitle:
    @classmethod
    def defaults(cls, dimensions: Dimensions) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize("command", ["convert", "plan"])
@pytest.mark.parametrize(
    ("method", "code", "said"),
    [
        (NoFootprint, 6, "expected Footprint, found NoneType"),
        (Raises, 2, "the package bad-things 1.2 failed: found KeyError: 'boom' (test_packages.py:"),
        (NoTitle, 2, "it has no title, paper, strength, footprint, fit"),
        (nothing, 2, "it is not a dataclass"),
        ("text", 2, "it is not a dataclass"),
    ],
)
def test_a_method_that_is_none(
    command: str, method: Any, code: int, said: str, faulty: Any
) -> None:
    faulty(method, command=command, code=code, says=said)


def with_option(kind: Any, default: Any) -> Any:
    """A method with one option of a type."""
    made = dataclasses.make_dataclass(
        "Made", [("x", kind, dataclasses.field(default=default))], bases=(RankOne,),
        frozen=True, kw_only=True,
    )  # fmt: skip
    made.__module__ = __name__
    return made


@pytest.fixture
def configured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The value of an option of a method of a package."""
    entries = {"faulty": f"{__name__}:BROUGHT"}
    install(tmp_path / "site", monkeypatch, "bad-things", {"gloss_convert.methods": entries})

    def value(kind: Any, default: Any, text: str | None) -> Any:
        monkeypatch.setitem(globals(), "BROUGHT", with_option(kind, default))
        sizes = type("Sizes", (), {"num_hidden_layers": 6})()
        made: Any = configure("faulty", {} if text is None else {"x": text}, sizes)
        return made.x

    return value


@pytest.mark.parametrize(
    ("kind", "default", "text", "value"),
    [
        (bool, True, "false", False), (bool, False, "true", True),
        (Optional[int], None, "3", 3), (Optional[int], 1, "auto", None),  # noqa: UP045
        (None | int, 1, "auto", None), (int | str, 1, "all", "all"), (int | str, 1, "2", 2),
        (Literal[1, 2], 1, "2", 2), (Literal["a"] | None, None, "a", "a"),
        (str | None, None, "b", "b"), (bool | None, None, "true", True),
    ],
)  # fmt: skip
def test_an_option_has_the_type_that_it_is_declared_with(
    kind: Any, default: Any, text: str, value: object, configured: Any
) -> None:
    found = configured(kind, default, text)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("kind", "default", "text"),
    [
        (bool, False, "maybe"), (Optional[int], None, "x"), (Literal[1, 2], 1, "3"),  # noqa: UP045
        (Path, Path(), "x"), (list[int], None, "1"), (dict, None, "x"), (complex, 0j, "1"),
        (Any, 1, "1"), ("Unknown", 1, "1"), (Path, Path(), None), (float, float("nan"), None),
        (int, 10**30, None), (str, "\ud800", None), (int, dataclasses.MISSING, None),
    ],
)  # fmt: skip
def test_an_option_that_cannot_be_read_or_kept(
    kind: Any, default: Any, text: str | None, configured: Any
) -> None:
    with pytest.raises(OptionError, match=r"-o x.*expected|bad-things 1.2"):
        configured(kind, default, text)


def test_our_own_come_first_and_two_packages_of_one_name_are_refused(
    source: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = {"profs": "tests.builders.methods:RankOne", "twice": "tests.builders.methods:Rows"}
    for name in ("one", "two"):
        install(tmp_path / name, monkeypatch, name, {"gloss_convert.methods": entries})
    told = cli("plan", source, "--method", "profs", "-o", "rank=2", "-o", "layers=2", code=0)
    assert "warning: --method profs is our own, not that of one 1.2" in told.stderr
    refused = cli("plan", source, "--method", "twice", code=2)
    assert "expected one package that brings it, found one 1.2 and two 1.2" in refused.stderr


@dataclass
class Scorer:
    title: str = "faulty"
    paper: str = "https://example.org"
    origin: Any = None
    given: ClassVar[Any] = None

    def score(self, texts: list[str]) -> Any:
        return self.given


def load(argument: str, device: str) -> Scorer:
    return Scorer()


@pytest.fixture
def others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    none = {"none": f"{__name__}:NO_CLASS"}
    scorers = {**none, "faulty": f"{__name__}:load", "bare": f"{__name__}:nothing"}
    outputs = {**none, "raises": f"{__name__}:boom", "bare": f"{__name__}:NoTitle"}
    entries = {"gloss_convert.scorers": scorers, "gloss_convert.outputs": outputs}
    install(tmp_path / "site", monkeypatch, "bad-things", entries)


@pytest.mark.usefixtures("others")
@pytest.mark.parametrize(
    "scores", [None, "x", [0.5], [[0.1], [0.2]], [0.1, float("nan")], [0.1, 2.0], ["a", "b"]]
)
def test_scores_that_are_none(scores: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scorer, "given", scores)
    with pytest.raises(OptionError, match=r"--scorer faulty: .*bad-things 1.2.*scores"):
        scores_of("faulty", load_scorer("faulty:argument", "cpu"), ["a", "b"])


@pytest.mark.usefixtures("others")
@pytest.mark.parametrize(("name", "said"), [("none", "not a"), ("bare", "it has no")])
def test_an_output_or_a_scorer_that_is_none(name: str, said: str) -> None:
    for load_by_name in (output_of, lambda name: load_scorer(name, "cpu")):
        with pytest.raises(OptionError, match=f"bad-things 1.2.*{said}"):
            load_by_name(name)


@pytest.mark.usefixtures("others")
def test_what_a_package_raises_is_told_in_python_too(source: Path, tmp_path: Path) -> None:
    recipe = converter.Recipe(source=str(source), output="raises")
    with pytest.raises(OptionError, match=r"the package bad-things 1\.2 failed") as raised:
        converter.convert(recipe, tmp_path / "work" / "out")
    assert isinstance(raised.value.__cause__, KeyError)
    assert not (tmp_path / "work").exists()


def test_a_method_of_a_package_still_works(faulty: Any, tmp_path: Path) -> None:
    faulty(RankOne, "-o", "scale=0.1", "--no-guard", code=0)
    assert read_manifest(tmp_path / "work/out").choice.strength == 0.1
