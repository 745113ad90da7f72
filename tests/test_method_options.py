"""Every option of every method: the plan accepts a value, or says in a sentence what it expects."""

import dataclasses
from typing import Any, get_type_hints

import pytest

from converter.checkpoints.plan import Plan
from converter.errors import OptionError
from converter.evaluation.fit import check_instances
from converter.methods.base import Method, footprint_of
from converter.methods.known import METHODS
from converter.methods.options import configure
from converter.methods.together import check_shared
from converter.recipe import Recipe
from tests.builders.errors import refused
from tests.builders.invoke import Cli
from tests.builders.models import Checkpoints, planned

HUGE = ("1" + "0" * 30, "1e30", "-1e30", "99999999999999999999")
VALUES = ("0", "-1", "1.5", "nan", "inf", "-inf", "", "text", "1e400", "0x10", *HUGE)


def options_of_methods() -> list[tuple[str, str, Any]]:
    """Method, option and type of each there is: a new one is here without a line of its own."""
    return [
        (name, key, hint)
        for name in METHODS.own
        for key, hint in get_type_hints(METHODS.load(name)).items()
        if key in {field.name for field in dataclasses.fields(METHODS.load(name))}
    ]


def numbers() -> list[tuple[str, str, Any]]:
    """Those whose values are numbers, and of which type."""
    found: list[tuple[str, str, Any]] = []
    for name, key, hint in options_of_methods():
        found += [(name, key, kind) for kind in (int, float) if hint in (kind, kind | None)]
    return found


def accepted(name: str, key: str, text: str, plan: Plan, source: str) -> Method:
    """What ``gloss plan`` makes of an option. Raises OptionError."""
    method = configure(name, {key: text}, plan.dimensions)
    footprint_of(method, plan)
    check_shared(name, method, plan)
    check_instances(Recipe(source=source, method=name), method, examined=False)
    return method


@pytest.fixture(scope="module")
def llama(checkpoints: Checkpoints) -> tuple[Plan, str]:
    folder = checkpoints("llama")
    return planned(folder)[1], str(folder)


@pytest.mark.parametrize(("name", "key", "hint"), options_of_methods())
def test_a_value_is_accepted_or_refused_by_the_name_of_its_option(
    name: str, key: str, hint: Any, llama: tuple[Plan, str]
) -> None:
    refusals: dict[str, OptionError] = {}
    for text in VALUES:
        try:
            accepted(name, key, text, *llama)
        except OptionError as error:
            refusals[text] = error
    for text, refusal in refusals.items():
        assert refusal.what.startswith(f"-o {key}") or f" and -o {key}" in refusal.what
        assert refusal.expected, text
        assert refusal.found is not None, text
        assert text in refusal.found
    if hint is not str and key != "suffix":
        assert refusals.keys() >= {"", "text", "nan", "inf", "-inf", "1e400", "0x10", *HUGE}


@pytest.mark.parametrize(("name", "key", "kind"), numbers())
def test_a_number_far_out_of_range_is_refused_from_the_headers(
    name: str, key: str, kind: type, llama: tuple[Plan, str], cli: Cli
) -> None:
    """By the command, with the range that this model leaves; but any number is a seed."""
    huge = ("1" + "0" * 12) if kind is int else "1e30"
    args = ("plan", llama[1], "--method", name, "-o", f"{key}={huge}")
    if key == "draw":
        cli(*args, code=0)
        return
    lines = cli(*args, code=2).stderr.splitlines()
    (error,) = (line for line in lines if line.startswith("error: "))
    what, _, rest = error.partition(": expected ")
    assert what == f"error: -o {key}"
    expected, _, found = rest.partition(", found ")
    assert found in (huge, f"{int(float(huge)):,}")
    assert any(letter.isdigit() for letter in expected)


@pytest.mark.parametrize(
    ("name", "options", "what", "expected"),
    [
        ("gloss", {"rank": "33"}, "-o rank", "1 to 32, the hidden size, or auto"),
        ("gloss", {"per_layer": "33"}, "-o per_layer", "1 to 32, the hidden size"),
        ("gloss", {"directions": "33"}, "-o directions", "1 to 32, the hidden size"),
        ("gloss", {"rank": "17"}, "-o rank and -o protect_shared", "at most 32 together, ..."),
        ("gloss", {"rank": "9", "directions": "8"}, "-o rank", "at most 8, the directions ..."),
        ("gloss", {"protect_shared": "32"}, "-o rank and -o protect_shared", "at most 32 ..."),
        ("gloss", {"protect_own": "28"}, "-o per_layer and -o protect_own", "at most 31 ..."),
        ("gloss", {"per_layer": "17"}, "-o per_layer and -o protect_shared", "at most 32 ..."),
        ("gloss", {"top_tokens": "1001"}, "-o top_tokens", "1 to 1,000"),
        ("gloss", {"layers": "4-6"}, "-o layers", "layers from 0 to 5"),
        (
            "gloss-paper",
            {"layers": "2", "rank": "5"},
            "-o rank",
            "at most 4, the ...",
        ),
        ("gloss-paper", {"protect_own": "28"}, "-o per_layer and -o protect_own", "at most 31 ..."),
        ("profs", {"center": "24", "rank": "9"}, "... -o center ...", "at most 32 together, ..."),
        ("random", {"rank": "17"}, "-o rank and -o protect_shared", "at most 32 together, ..."),
        ("fusion", {"depth": "999"}, "-o depth", "1 to 6, the layers of the model"),
        ("fusion", {"depth": "7", "form": "paper"}, "-o depth", "1 to 6, the layers of the model"),
        ("fusion", {"rank": "33"}, "-o rank", "1 to 32, the hidden size"),
        ("fusion", {"rate": "0"}, "-o rate", "more than 0, at most 1"),
        ("fusion", {"rate": "-1"}, "-o rate", "more than 0, at most 1"),
        ("fusion", {"tokens": "0"}, "-o tokens", "1 to 1,000,000,000"),
        ("destein", {"layers": "6"}, "-o layers", "layers from 0 to 5"),
        ("model-surgery", {"count": "289"}, "-o count", "at most 288, the gate rows of the model"),
        ("model-surgery", {"draw": "-1"}, "-o draw", "0 to 9,223,372,036,854,775,807"),
        ("dinm", {"layer": "6"}, "-o layer", "a layer from 0 to 5 with a feed-forward network"),
        ("dinm", {"steps": "1001"}, "-o steps", "1 to 1,000"),
        ("dinm", {"learning_rate": "0"}, "-o learning_rate", "more than 0, at most 1"),
        ("dinm", {"instance": "36"}, "-o instance", "numbers from 0 to 35, such as 0 or 0,5,7-9"),
    ],
)
def test_what_a_model_has_no_room_for_is_refused_with_the_range_that_it_leaves(
    name: str, options: dict[str, str], what: str, expected: str, llama: tuple[Plan, str]
) -> None:
    plan, source = llama
    with refused(OptionError, what=what, expected=expected):
        method = configure(name, options, plan.dimensions)
        footprint_of(method, plan)
        check_instances(Recipe(source=source, method=name), method, examined=False)


def test_a_default_is_cut_down_to_a_model_that_is_smaller(llama: tuple[Plan, str]) -> None:
    sizes = dataclasses.replace(llama[0].dimensions, hidden_size=24, num_hidden_layers=2)
    made: Any = configure("fusion", {}, sizes)
    assert (made.rank, made.depth) == (24, 2)
    made = configure("gloss", {}, dataclasses.replace(sizes, ffn_layers=(0, 1)))
    assert made.directions == 24
