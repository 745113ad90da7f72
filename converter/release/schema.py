"""JSON schemas, made from classes: ``python -m converter.release.schema`` prints a manifest's.

It is made from the classes of ``converter.manifest``. The reader here also refuses two things that
the schema allows: 1.0 for an integer, and an object with a repeated key.
"""

import json
import re
from collections.abc import Sequence
from inspect import getdoc
from pathlib import Path
from typing import Any, get_args

import msgspec

from converter.checkpoints.names import MANIFEST
from converter.manifest import SCHEMA_VERSION, Manifest, MethodRecord, SubspaceEvidence
from converter.option import declared_options
from converter.recipe import Recipe

_DRAFT = "https://json-schema.org/draft/2020-12/schema"

_ATTRIBUTE = re.compile(r"^    (\w+): (.*(?:\n     .*)*)", re.MULTILINE)
"""A line of a docstring's ``Attributes``, with those that continue it."""

_BOUNDS = {"least": "minimum", "above": "exclusiveMinimum", "most": "maximum"}
"""Bound of an ``Option`` -> its name in JSON schema."""


def schema() -> dict[str, Any]:
    """The schema, in JSON Schema's draft 2020-12."""
    (whole, subspace), parts = _components((Manifest, SubspaceEvidence))
    evidence = parts[MethodRecord.__name__]["properties"]["evidence"]
    evidence |= {"if": {"required": ["candidates"]}, "then": subspace}
    about = f"What gloss-convert read, did and wrote. Version {SCHEMA_VERSION}."
    return {"$schema": _DRAFT, "title": MANIFEST, "description": about, **whole, "$defs": parts}


def schema_of(name: str, version: int, kinds: Sequence[Any]) -> dict[str, Any]:
    """The schema of a document that is of one of some types.

    Args:
        name: of the document.
        version: of its format.
        kinds: classes of ``msgspec`` or ``TypedDict``, or containers of these.
    """
    wholes, parts = _components(kinds)
    whole = wholes[0] if len(wholes) == 1 else {"anyOf": [*wholes]}
    identity = f"urn:gloss-convert:{name}:{version}"
    return {"$schema": _DRAFT, "$id": identity, "title": name, **whole, "$defs": parts}


def _components(kinds: Sequence[Any]) -> tuple[tuple[dict[str, Any], ...], dict[str, Any]]:
    """The schema of each type, and those of what they are made of, described."""
    wholes, parts = msgspec.json.schema_components(
        kinds, schema_hook=_of_path, ref_template="#/$defs/{name}"
    )
    for part in parts.values():
        _describe(part, part["description"])
        part["description"] = _one_line(part["description"].partition("\n\n")[0])
    for cls in (cls for kind in kinds for cls in (kind, *get_args(kind)) if isinstance(cls, type)):
        for base in cls.__mro__[1:] if issubclass(cls, msgspec.Struct) else ():
            _describe(parts[cls.__name__], getdoc(base) or "")
    if Recipe.__name__ in parts:
        _declare(parts[Recipe.__name__])
    return wholes, parts


def _describe(part: dict[str, Any], docstring: str) -> None:
    """Give each property the sentence on it among a docstring's ``Attributes``."""
    for name, about in _ATTRIBUTE.findall(docstring.partition("\n\nAttributes:\n")[2]):
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
