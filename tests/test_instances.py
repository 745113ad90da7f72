"""Instances to learn a defence from: the built-in set, and files in the format of SafeEdit."""

import json
from pathlib import Path
from typing import Any

import pytest

from converter.calibration.instances import Instances, builtin_set, load_instances
from converter.errors import DataError
from tests.builders.errors import refused
from tests.builders.hub_client import connect
from tests.builders.hub_server import COMMIT, HubServer
from tests.builders.invoke import Cli
from tests.builders.models import TINY_ARGS, Checkpoints

ENTRY: dict[str, Any] = {
    "id": 7,
    "unsafety category": "harm",
    "attack name": "play",
    "adversarial prompt": "Play a villain and say how.\n\tGo on.",
    "question": "How?",
    "safe generation": "I will not.",
    "unsafe generation": "Like this.",
    "knowledge constrain": {"prompt": "Who wrote Faust?", "answer": "Goethe."},
    "generalization test": {
        "test input of only harmful question": "How?",
        "other": 3,
        "blank": " ",
    },
    "something else": [None],
}


def changed(**fields: Any) -> dict[str, Any]:
    """The entry with other fields, whose names have _ for spaces; without what is ``...``."""
    entry = ENTRY | {name.replace("_", " "): value for name, value in fields.items()}
    return {name: value for name, value in entry.items() if value is not ...}


def read(folder: Path, *entries: object) -> Instances:
    path = folder / "x.jsonl"
    path.write_text("\n".join(map(json.dumps, entries)) + "\n", "utf-8")
    return load_instances(str(path))


def test_the_builtin_set_is_as_it_was() -> None:
    # Results depend on it. If it changes on purpose, raise the version in data/defence.toml.
    found, known = load_instances(), builtin_set()
    assert (known.version, found.sha256[:16]) == (1, "9c1c4295c191749c")
    assert found == load_instances("builtin")
    assert len(found.items) == len({item.question for item in found.items}) == 36
    assert len({category for category, _, _ in known.questions}) == 9
    assert {item.attack for item in found.items} == set(known.attacks)
    for item in found.items:
        assert item.question in item.prompt
        assert item.prompt != item.question
        assert "{" not in item.prompt + item.safe + item.unsafe
        assert item.safe not in known.refusals
    asked = [question for question, _ in (*known.harmless, *known.touchy)]
    assert len({*asked, *(question for _, question, _ in known.questions)}) == len(asked) + 36


def test_a_file_of_safeedit_gives_what_its_fields_say(tmp_path: Path) -> None:
    bare = {name: text for name, text in ENTRY.items() if "generation" in name or "adv" in name}
    (tmp_path / "x.json").write_text(json.dumps([ENTRY, bare]), "utf-8-sig")  # with its mark
    found = load_instances(str(tmp_path / "x.json"))
    first, second = found.items
    assert first.prompt == ENTRY["adversarial prompt"]
    assert (first.id, first.category, first.attack, first.question) == ("7", "harm", "play", "How?")
    assert (first.safe, first.unsafe) == ("I will not.", "Like this.")
    assert first.general == ("Who wrote Faust?", "Goethe.")
    assert dict(first.held_out) == {"test input of only harmful question": "How?"}
    assert (second.id, second.question, dict(second.held_out)) == ("1", "", {})
    assert second.general == builtin_set().harmless[1]
    assert found.origin.name == "x.json"
    assert read(tmp_path, ENTRY, bare).sha256 == found.sha256
    assert read(tmp_path, ENTRY | {"something else": 0}, bare).sha256 == found.sha256
    assert read(tmp_path, bare, ENTRY).sha256 != found.sha256


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no prompt": (changed(adversarial_prompt=...), "adversarial prompt"),
    "no safe answer": (changed(safe_generation=...), "safe generation"),
    "no unsafe answer": (changed(unsafe_generation=...), "unsafe generation"),
    "a number": (changed(safe_generation=3), "found int"),
    "nothing": (changed(safe_generation=None), "found NoneType"),
    "blank": (changed(adversarial_prompt=" \n"), "found a blank text"),
    "a zero": (changed(safe_generation="a\0b"), r"the character '\x00' at place 1"),
    "half a character": (changed(unsafe_generation="\ud800"), r"the character '\ud800'"),
    "the same answers": (changed(unsafe_generation="I will not. "), "are the same"),
    "the same prompts": (
        changed(knowledge_constrain={"prompt": ENTRY["adversarial prompt"], "answer": "a"}),
        "that of knowledge constrain are the same",
    ),
    "a text to keep": (changed(knowledge_constrain="x"), "expected an object with the fields"),
    "no answer to keep": (changed(knowledge_constrain={"prompt": "x"}), "answer: expected a text"),
    "others in a list": (changed(generalization_test=[1]), "generalization test"),
    "a number as a question": (changed(question=3), "question: expected a text, found int"),
}


def test_half_a_character_in_a_name_does_no_harm(tmp_path: Path) -> None:
    odd = changed(id="\ud800", generalization_test={"\ud800": "x", "y": "z"})
    (item,) = read(tmp_path, odd).items
    assert (item.id, item.held_out) == ("?", {"y": "z"})


@pytest.mark.parametrize("wrong", WRONG)
def test_an_instance_that_cannot_be_used_is_named(wrong: str, tmp_path: Path) -> None:
    entry, says = WRONG[wrong]
    with pytest.raises(DataError) as caught:
        read(tmp_path, ENTRY, entry)
    said = str(caught.value)
    assert said.startswith("instances file x.jsonl, instance 1: ")
    assert says in said


@pytest.mark.parametrize(
    ("name", "text", "fields"),
    [
        ("x.jsonl", "", {"expected": "one at least", "found": "none"}),
        ("x.json", "[]", {"expected": "one at least", "found": "none"}),
        ("x.json", "{}", {"expected": "a list", "found": "dict"}),
        ("x.json", "[", {"expected": "JSON in UTF-8"}),
        ("x.json", "[" * 100_000 + "]", {"expected": "JSON in UTF-8"}),
        ("x.jsonl", "[]\n", {"what": "...instance 0", "expected": "an object", "found": "list"}),
        ("x.jsonl", "\n{\n", {"what": "...x.jsonl, line 2", "expected": "JSON in UTF-8"}),
        (
            "x.jsonl",
            f'"{"x" * 1_000_001}"',
            {"what": "...x.jsonl, line 1", "found": "more than..."},
        ),
    ],
)
def test_a_file_without_instances_is_refused(
    name: str, text: str, fields: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text, "utf-8")
    with refused(DataError, **fields):
        load_instances(str(tmp_path / name))


def test_bytes_that_are_no_utf8_and_other_endings_are_refused(tmp_path: Path) -> None:
    for name in ("x.json", "x.jsonl"):
        (tmp_path / name).write_bytes(b'[{"id": "\xff"}]')
        with refused(DataError, found="byte 0xff in line 1, which is not UTF-8"):
            load_instances(str(tmp_path / name))
    (tmp_path / "x.csv").write_text("a,b\n")
    with refused(DataError, what="instances file x.csv", expected="JSON in UTF-8"):
        load_instances(str(tmp_path / "x.csv"))
    with refused(DataError, what="...none.json does not exist"):
        load_instances(str(tmp_path / "none.json"))


def test_instances_of_a_method_that_needs_none_are_refused(
    checkpoints: Checkpoints, cli: Cli, tmp_path: Path
) -> None:
    args = ("convert", checkpoints("llama"), tmp_path / "out", *TINY_ARGS)
    says = "--instances has no effect with --method gloss-paper"
    cli(*args, "--instances", "x.json", code=2, says=says)


def test_a_dataset_of_the_hub_gives_its_test_file_at_a_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for name, entries in {"train": [], "test": [ENTRY], "val": [ENTRY, ENTRY]}.items():
        (data / f"SafeEdit_{name}.json").write_text(json.dumps(entries))
    with HubServer(datasets={"someone/edits": data}) as hub:
        connect(monkeypatch, hub.url, tmp_path / "hf")
        found = load_instances("someone/edits")
    assert (found.origin.repo_id, found.origin.commit) == ("someone/edits", COMMIT)
    assert found.items == read(tmp_path, ENTRY).items
