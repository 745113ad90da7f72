"""``gloss methods``: every method there is, and what it is found to need, change and be held by."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from converter.calibration.statistics import Request
from converter.checkpoints.plan import Plan
from converter.edits.base import Footprint
from converter.entrypoints.methods import Described, describe_methods
from converter.methods.base import Proposal, Workbench
from converter.methods.known import METHODS
from tests.builders import methods as toys
from tests.builders.invoke import Cli
from tests.builders.packages import install


@dataclass(frozen=True, slots=True, kw_only=True)
class Asks(toys.Base):
    """Asks for gradients, and changes a file."""

    def footprint(self, plan: Plan) -> Footprint:
        return Footprint(files=("notes/edit.txt",))

    def fit(self, bench: Workbench) -> Proposal:
        assert bench.plan.dimensions.num_hidden_layers
        bench.activations(Request("ffn", "mean", (0,), second_moment=False, gradient=True))
        raise AssertionError("the fit went on")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fails(toys.Base):
    """Cannot say what it changes."""

    def footprint(self, plan: Plan) -> Footprint:
        raise KeyError("no | such thing")


@pytest.fixture(scope="module")
def own() -> dict[str, Described]:
    return {each.name: each for each in describe_methods()}


def test_every_method_is_in_the_table(own: dict[str, Described], cli: Cli) -> None:
    assert list(own) == METHODS.names()
    assert {*METHODS.own} <= own.keys()
    rows = cli("methods", code=0).stdout.strip().splitlines()[2:]
    assert len(rows) == len(own)
    for row, (name, found) in zip(rows, own.items(), strict=True):
        method = METHODS.load(name)
        assert row.startswith(f"| `{name}` | [{method.title}]({method.paper}) | ")
        assert row == found.row
        assert row.count("|") == 7
    assert [each["name"] for each in json.loads(cli("methods", "--json", code=0).stdout)] == [*own]


def test_all_of_our_own_are_described(own: dict[str, Described]) -> None:
    for name in METHODS.own:
        found = own[name]
        assert (found.fault, found.package) == ("", None)
        assert found.edit, name
        assert found.needs, name
        assert "checkpoint" in found.outputs


def test_what_is_known_of_some_methods_is_found(own: dict[str, Described]) -> None:
    gloss, profs, surgery = (own[name] for name in ("gloss", "profs", "model-surgery"))
    assert (gloss.edit, gloss.needs) == (("weaken-subspace",), ("pairs", "gradients"))
    assert (profs.outputs, profs.needs) == (("adapter", "checkpoint"), ("pairs",))
    assert (surgery.edit, surgery.outputs) == (("add-to-rows",), ("checkpoint",))
    assert surgery.strength == "scale"


def test_methods_of_packages_are_there_and_a_broken_one_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = {
        "asks": f"{__name__}:Asks",
        "fails": f"{__name__}:Fails",
        "replaced": "tests.builders.methods:Replaced",
        "created-bias": "tests.builders.methods:CreatedBias",
        "missing": "no_such_module:Method",
    }
    install(tmp_path, monkeypatch, "more-methods", {"gloss_convert.methods": entries})
    found = {each.name: each for each in describe_methods() if each.name in entries}
    assert found.keys() == entries.keys()
    assert found["asks"].edit == ("new files",)
    assert found["asks"].needs == ("pairs", "gradients")
    assert (found["asks"].package or "").startswith("more-methods ")
    assert found["replaced"].edit == ("replace",)
    assert found["created-bias"].edit == ("new tensors", "a patch of config.json")
    assert found["created-bias"].outputs == ("checkpoint",)
    for name, says in (("fails", "KeyError"), ("missing", "ModuleNotFoundError")):
        assert says in found[name].fault
        assert "more-methods" in found[name].fault
        assert found[name].row.count("|") == 7
