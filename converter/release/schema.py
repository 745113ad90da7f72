"""The JSON schema of a manifest: ``python -m converter.release.schema`` prints it.

It is made from the classes of ``converter.manifest``. The reader here also refuses two things that
the schema allows: 1.0 for an integer, and an object with a repeated key.
"""

import json
import re
from pathlib import Path
from typing import Any

import msgspec

from converter.checkpoints.names import MANIFEST
from converter.manifest import SCHEMA_VERSION, Manifest, MethodRecord, SubspaceEvidence
from converter.option import declared_options
from converter.recipe import Recipe

_ATTRIBUTE = re.compile(r"^    (\w+): (.*(?:\n     .*)*)", re.MULTILINE)
"""A line of a docstring's ``Attributes``, with those that continue it."""

_BOUNDS = {"least": "minimum", "above": "exclusiveMinimum", "most": "maximum"}
"""Bound of an ``Option`` -> its name in JSON schema."""


def schema() -> dict[str, Any]:
    """The schema, in JSON Schema's draft 2020-12."""
    (whole, subspace), parts = msgspec.json.schema_components(
        (Manifest, SubspaceEvidence), schema_hook=_of_path, ref_template="#/$defs/{name}"
    )
    for part in parts.values():
        _describe(part)
    _declare(parts[Recipe.__name__])
    evidence = parts[MethodRecord.__name__]["properties"]["evidence"]
    evidence |= {"if": {"required": ["candidates"]}, "then": subspace}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": MANIFEST,
        "description": f"What gloss-convert read, did and wrote. Version {SCHEMA_VERSION}.",
        **whole,
        "$defs": parts,
    }


def _describe(part: dict[str, Any]) -> None:
    """Split a class's docstring into a sentence on the object and one on each property."""
    text, _, attributes = part["description"].partition("\n\nAttributes:\n")
    part["description"] = _one_line(text.partition("\n\n")[0])
    for name, about in _ATTRIBUTE.findall(attributes):
        key = "bytes" if name == "nbytes" else name
        part["properties"][key]["description"] = _one_line(about)


def _declare(part: dict[str, Any]) -> None:
    """Describe each option of a recipe by its declaration."""
    for name, declared in declared_options(Recipe).items():
        option = declared.option
        found = {word: getattr(option, field) for field, word in _BOUNDS.items()}
        bounds = {word: bound for word, bound in found.items() if bound is not None}
        part["properties"][name] |= {"description": option.help, **bounds}


def _one_line(text: str) -> str:
    """A sentence of a docstring, with JSON's words for None, True and False."""
    return re.sub(r"\bNone\b", "null", " ".join(text.split()))


def _of_path(kind: type) -> dict[str, Any]:
    if kind is Path:
        return {"type": "string"}
    raise NotImplementedError(kind)


if __name__ == "__main__":
    print(json.dumps(schema(), indent=1))
