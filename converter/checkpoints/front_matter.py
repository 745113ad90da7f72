"""Read the front matter of untrusted model cards, and write that of ours.

Each scalar is text. YAML 1.1 takes ``no`` for false, ``1.10`` for 1.1 and ``12:30`` for a number,
and YAML 1.2 takes ``1e3`` for one; a language, a licence or a tag is none of these. No other module
reads or writes YAML.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from converter.checkpoints.layout import MAX_CONFIG
from converter.runtime import progress
from converter.runtime.files import AS_UTF8, decode, reason

_BLOCK = re.compile(r"\s*---[ \t]*\n((?:.*\n)*?)---[ \t]*(?:\n|$)")
"""Front matter at the beginning of a card."""

_KEYS = {
    "language": "a text or a list of texts", "license": "a text or a list of texts",
    "license_link": "a text", "license_name": "a text", "pipeline_tag": "a text",
}  # fmt: skip
"""Keys that are taken from a source's card -> the values that are allowed."""

_GATE = "extra_gated_"
"""Beginnings of keys that require the acceptance of terms before a download."""

_MAX_TEXTS = 10_000
"""The most entries of a list; models have at most a few thousand languages."""

_NULL = "tag:yaml.org,2002:null"


class _Reader(yaml.BaseLoader):  # type: ignore[misc]
    """Loads texts, lists and mappings; None for an empty value or ``null``."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if not re.fullmatch(r"tag:yaml\.org,2002:\w+", node.tag):
            raise yaml.YAMLError(f"the tag {node.tag}")
        return super().construct_object(node, deep)


_Reader.add_implicit_resolver(_NULL, re.compile(r"(~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Reader.add_constructor(_NULL, lambda loader, node: None)


class _Writer(yaml.SafeDumper):  # type: ignore[misc]
    """Quotes a text that a reader of YAML 1.1 or 1.2 would not take for a text.

    Its base class covers the readers in Python. This class adds the numbers of YAML 1.2, and the
    short words for true and false of YAML 1.1.
    """

    def ignore_aliases(self, data: object) -> bool:
        return True


_Writer.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"([-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)(e[-+]?[0-9]+)?|0o[0-7]+|[-+]?\.(inf|nan))$",
               re.IGNORECASE),
    list("-+.0123456789"),
)  # fmt: skip
_Writer.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"[yYnN]$"), list("yYnN"))


def read_card(path: Path) -> ModelCardData:
    """The keys of ``_KEYS`` in the front matter of a model card; empty without front matter.

    Warns of malformed values, which are left out.
    """
    if not path.is_file() or path.stat().st_size > MAX_CONFIG:
        return ModelCardData()
    found: object = None
    try:
        text = decode(path.read_bytes())
        if block := _BLOCK.match(text.replace("\r\n", "\n").replace("\r", "\n")):
            found = yaml.load(block[1], _Reader)  # noqa: S506 - it makes texts only
    except UnicodeError as error:
        progress.warn(f"{path.name} is left out: found {error}; {AS_UTF8}")
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        said = " ".join(reason(error).split())[:200]
        progress.warn(f"the front matter of {path.name} is left out, since it is malformed: {said}")
    if not isinstance(found, dict):
        return ModelCardData()
    kept: dict[str, Any] = {key: "" for key in found if str(key).startswith(_GATE)}
    for key, shape in _KEYS.items():
        value = _texts(found.get(key))
        if value is None or (isinstance(value, list) and "list" not in shape):
            progress.warn(f"{path.name}: {key} is left out: expected {shape}")
        elif value:
            kept[key] = value
    return ModelCardData(**kept)


def _texts(value: object) -> str | list[str] | None:
    """A text or a list of texts, without empty ones; None if it is neither."""
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list) or len(value) > _MAX_TEXTS:
        return None
    texts = [text for text in value if text]
    return texts if all(isinstance(text, str) for text in texts) else None


def write_front_matter(data: Mapping[str, Any]) -> str:
    """The YAML of a card's front matter, with the same meaning for every reader."""
    text: str = yaml.dump(data, Dumper=_Writer, sort_keys=False, allow_unicode=True)
    return text.strip()
