"""Read untrusted JSON strictly.

Python's parser accepts repeated keys (it takes the last), NaN and infinities (which are not JSON),
integers of any length and surrogate halves. Each allows an attack: two programs read different
things in the same bytes, or a number or text crashes the program far from where it came in.
"""

import json
from collections import Counter
from math import isfinite
from typing import Any

DEEPEST = 100
"""The deepest nesting of objects and lists; gloss-convert writes ten levels."""


def parse(raw: bytes | str) -> Any:
    """A JSON value.

    Raises:
        ValueError: not UTF-8 or not JSON; a key twice; a number beyond 64 bits or float64; half of
            a surrogate pair; nested deeper than ``DEEPEST``.
    """
    text = raw if isinstance(raw, str) else raw.decode("utf-8")
    try:
        value = _DECODER.decode(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    _check_depth(value)
    if "\\u" in text:
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # a surrogate half cannot be encoded
    return value


def plain(value: Any) -> Any:
    """A value as read back from its JSON: of built-in types, and valid for ``parse``.

    Raises:
        ValueError: it has no JSON, for example since it holds a tensor or NaN, or ``parse`` refuses
            it.
    """
    try:
        text = json.dumps(value, allow_nan=False)
    except (TypeError, RecursionError) as error:
        raise ValueError(str(error)) from error
    return parse(text)


def unique(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of some keys and values, for a JSON parser. Raises ValueError for a key twice."""
    found = dict(items)
    if len(found) != len(items):
        twice = Counter(key for key, _ in items).most_common(1)[0][0]
        raise ValueError(f"it has the key {twice} twice")
    return found


def _integer(text: str) -> int:
    value = int(text) if len(text) < 30 else 1 << 64
    if not -(1 << 63) <= value < 1 << 64:
        raise ValueError("it has an integer beyond 64 bits")
    return value


def _number(text: str) -> float:
    value = float(text)
    if not isfinite(value):
        raise ValueError(f"it has the number {text[:20]}, which is none")
    return value


_DECODER = json.JSONDecoder(
    object_pairs_hook=unique, parse_int=_integer, parse_float=_number, parse_constant=_number
)


def _check_depth(value: Any) -> None:
    level: list[Any] = [[value]]
    for _ in range(DEEPEST + 1):
        insides = (node.values() if isinstance(node, dict) else node for node in level)
        level = [child for inside in insides for child in inside if isinstance(child, dict | list)]
    if level:
        raise ValueError("it is nested too deeply")
