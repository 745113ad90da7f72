"""A patch changes the values that it names and no other byte."""

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from converter.checkpoints.patch import merge, patched
from converter.errors import CheckpointError
from tests.builders.errors import refused

KEYS = st.sampled_from(["a", "b", "c", "d", 'quo"ted', "ü", ""])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
OBJECTS = st.dictionaries(KEYS, VALUES, max_size=5)
STYLES = st.sampled_from([
    {}, {"indent": 2}, {"indent": 1, "separators": (" ,", " : ")}, {"separators": (",", ":")},
    {"indent": "\t", "ensure_ascii": False},
])  # fmt: skip


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(OBJECTS, OBJECTS, STYLES, st.sampled_from(["", "\n", " \n\t"]))
def test_a_patched_text_means_the_merged_object(
    before: dict[str, Any], patch: dict[str, Any], style: dict[str, Any], around: str
) -> None:
    text = around + json.dumps(before, **style) + around
    try:
        new = patched("config.json", text, patch)
    except CheckpointError:
        assert merge(before, patch) == before
        return
    assert json.loads(new) == merge(before, patch)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(OBJECTS, STYLES)
def test_everything_else_keeps_its_bytes(before: dict[str, Any], style: dict[str, Any]) -> None:
    text = json.dumps(before | {"mark": 1, "last": [1, 2]}, **style)
    old = json.dumps("mark") + style.get("separators", (", ", ": "))[1]
    assert patched("x.json", text, {"mark": 12}) == text.replace(old + "1", old + "12")


def test_a_new_member_looks_like_the_last_one() -> None:
    text = '{\n  "hidden": 4,\n  "bias": false\n}\n'
    assert patched("config.json", text, {"bias": True, "more": {"x": 1}}) == (
        '{\n  "hidden": 4,\n  "bias": true,\n  "more": {"x": 1}\n}\n'
    )


def test_members_can_be_removed_from_any_place() -> None:
    text = '{"a": 1, "b": 2, "c": 3}'
    for gone in ({"a"}, {"b"}, {"c"}, {"a", "b"}, {"b", "c"}, {"a", "b", "c"}):
        new = patched("x.json", text, dict.fromkeys(gone))
        assert json.loads(new) == {k: v for k, v in json.loads(text).items() if k not in gone}


def test_a_text_that_is_no_json_gets_another_in_front() -> None:
    assert patched("chat_template.jinja", "{{ x }}", "{% set x = 1 %}") == "{% set x = 1 %}{{ x }}"


@pytest.mark.parametrize(
    "text", ['[1, {"a": 1}]', '"{" {"a": 1}', "[]", "", "{", '{"a": 1,}', '{"a" 1}']
)
def test_what_is_no_object_cannot_be_patched(text: str) -> None:
    with refused(CheckpointError, what="config.json cannot be patched"):
        patched("config.json", text, {"a": 3})


def test_a_patch_that_changes_nothing_is_an_error() -> None:
    with refused(CheckpointError, what="the patch of config.json changes nothing"):
        patched("config.json", '{"a": 1}', {"a": 1})
