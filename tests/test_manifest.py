"""The manifest's format: its classes, the JSON schema that is published, and what both refuse."""

import json
import math
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest

from converter.checkpoints.names import MANIFEST
from converter.errors import OptionError, VerificationError
from converter.manifest import Manifest, to_text
from converter.release.manifest import read_manifest
from converter.release.schema import schema
from tests.builders.adversary import Place, forged, kind_of, leaves, others
from tests.builders.errors import refused
from tests.fuzz import skeleton

FOLDER = Path(__file__).parents[1] / "manifests"
RECORDED = FOLDER / "smollm2-135m-instruct.json"


@cache
def validator() -> Any:
    """Of the published schema, by a library that does not know the classes."""
    kind = jsonschema.Draft202012Validator
    checker = kind.TYPE_CHECKER.redefine("integer", lambda _, value: type(value) is int)
    published = json.loads((FOLDER / "gloss_manifest.schema.json").read_text())
    return jsonschema.validators.extend(kind, type_checker=checker)(published)  # type: ignore[no-untyped-call]


def is_read(value: Any) -> bool:
    try:
        Manifest.from_json(value)
    except (msgspec.ValidationError, OptionError):
        return False
    return True


def test_the_published_schema_is_current() -> None:
    jsonschema.Draft202012Validator.check_schema(schema())
    published = (FOLDER / "gloss_manifest.schema.json").read_text()
    assert published == json.dumps(schema(), indent=1) + "\n", "run make manifests"


def test_the_schema_describes_every_part() -> None:
    parts = schema()["$defs"]
    assert parts["EditedTensor"]["properties"]["axis"]["description"] == "of its outputs."
    assert parts["FileRecord"]["properties"]["prefixes"]["description"].endswith("for other files.")
    for part in parts.values():
        assert part["description"].endswith(".")
        assert "Attributes" not in part["description"]


def test_the_recorded_manifest_follows_the_schema_and_is_written_as_it_was() -> None:
    text = RECORDED.read_text()
    assert list(validator().iter_errors(json.loads(text))) == []
    manifest = Manifest.from_json(json.loads(text))
    assert to_text(manifest) == text
    assert manifest.run.source == "demo"
    assert set(manifest.shards) < set(manifest.files)


def complete() -> dict[str, Any]:
    """A manifest of an edit that also creates, patches and adds, with an evaluation."""
    made = skeleton.manifest() | {"evaluation": skeleton.evaluation()}
    created = {
        "name": "a.bias", "shard": "model-created.safetensors", "dtype": "F32", "shape": [4],
        "sha256": skeleton.ZERO,
    }  # fmt: skip
    patches = {"config.json": {"mlp_bias": True, "old": None}, "chat_template.jinja": "Be kind."}
    made["edit"] |= {"created": [created], "patches": patches, "files": ["a/b.py"]}
    made["samples"] = [{"prompt": "a", "before": "b", "after": "c"}]
    return made


@pytest.mark.slow
def test_classes_and_schema_take_and_refuse_the_same() -> None:
    """Each value of a manifest replaced by others; each key left out, and one too many."""
    counts, apart = Counter[bool](), []
    for what, value in changed(complete()):
        accepted = is_read(value)
        counts[accepted] += 1
        if accepted != validator().is_valid(value):
            apart.append((what, accepted))
    assert apart == []
    assert min(counts.values()) > 300, counts


def changed(good: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, value in leaves(good):
        for other in others(value):
            yield f"{kind_of(path)} = {other!r}", forged(good, path, other)
    for path, part in objects(good):
        for key in part:
            rest = {name: child for name, child in part.items() if name != key}
            yield f"{kind_of(path)} without {key}", forged(good, path, rest) if path else rest
        more = part | {"unknown": None}
        yield f"{kind_of(path)} with another", forged(good, path, more) if path else more


def objects(value: Any, path: Place = ()) -> Iterator[tuple[Place, dict[str, Any]]]:
    """The objects in a JSON value, and where they are."""
    if isinstance(value, dict):
        yield path, value
    if isinstance(value, dict | list):
        for key, child in value.items() if isinstance(value, dict) else enumerate(value):
            yield from objects(child, (*path, key))


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("edited", 0, "norm"), -1, "$.edited[0].norm: expected `float` >= 0.0"),
        (("edited", 0, "axis"), 1.0, "$.edited[0].axis: expected `int`, got `float`"),
        (("edited", 0, "layer"), 1 << 63, f"$.edited[0].layer: expected `int` <= {2**63 - 1}"),
        (("pairs", "count"), True, "$.pairs.count: expected `int`, got `bool`"),
        (("run", "rounding"), "up", "$.run.rounding: invalid enum value 'up'"),
        (("edit", "kind"), "x", "$.edit: object contains unknown field `kind`"),
        (("run", "sede"), 1, "$.run: object contains unknown field `sede`"),
        (("run", "activations"), 1, "$.run.activations: expected `str`, got `int`"),
        (("unknown",), 1, "$: object contains unknown field `unknown`"),
        (
            ("neutral", "origin"), {},
            "$.neutral.origin: object has neither `name` nor `repo_id` and `commit`",
        ),
    ],
)  # fmt: skip
def test_an_error_names_the_place(
    path: tuple[str | int, ...], value: Any, says: str, tmp_path: Path
) -> None:
    (tmp_path / MANIFEST).write_text(json.dumps(forged(skeleton.manifest(), path, value)))
    with refused(
        VerificationError, what=f"{MANIFEST} does not follow its schema at {says}"
    ) as caught:
        read_manifest(tmp_path)
    assert str(caught.value) == caught.value.what  # it is all that is said


def test_a_digest_ends_where_it_ends() -> None:
    """A ``$`` in a pattern also matches before a line break at the end."""
    value = forged(skeleton.manifest(), ("neutral", "sha256"), skeleton.ZERO + "\n")
    assert not is_read(value)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_not_written(number: float) -> None:
    manifest = Manifest.from_json(skeleton.manifest())
    seconds = msgspec.structs.replace(manifest.measurements, seconds={"edit": number})
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_text(msgspec.structs.replace(manifest, measurements=seconds))


def test_what_was_read_is_what_is_written() -> None:
    assert json.loads(to_text(Manifest.from_json(complete()))) == complete()
