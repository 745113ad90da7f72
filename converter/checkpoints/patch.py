"""Change a few values of a text file and keep every other byte.

A JSON object is changed by an RFC 7396 merge patch: a value replaces that of its key, an object
changes the object of its key member by member, and null removes the member. Only the text of the
values that change is replaced; a new member takes the white space of the last one. Any other file
gets a text put in front of it.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from json.decoder import JSONDecoder
from json.decoder import scanstring as scan_string  # type: ignore[attr-defined]
from typing import Any

from converter.errors import CheckpointError

_NO_SPACE = re.compile(r"[^ \t\n\r]")


def patched(name: str, text: str, patch: Mapping[str, Any] | str) -> str:
    """The text of a file with a patch applied: a merge patch of JSON, or text to put in front.

    Raises CheckpointError if the patch is of the other kind or changes nothing, or the file is not
    a JSON object. The name is for messages.
    """
    if isinstance(patch, str) == name.endswith(".json"):
        raise CheckpointError(
            f"the patch of {name} does not fit it",
            expected="a merge patch" if name.endswith(".json") else "text to put in front",
        )
    if isinstance(patch, str):
        new = patch + text
    else:
        try:
            start = _expect(text, _skip(text, 0), "{") - 1
            new, end = _merged(text, start, patch)
            new = text[:start] + new + text[end:]
            json.loads(new)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{name} cannot be patched", found=str(error)) from error
    if new == text:
        raise CheckpointError(
            f"the patch of {name} changes nothing", hint="it says already what the edit asks for"
        )
    return new


def merge(value: Any, patch: Any) -> Any:
    """A parsed value with an RFC 7396 merge patch applied."""
    if not isinstance(patch, Mapping):
        return patch
    merged = dict(value) if isinstance(value, Mapping) else {}
    for key, change in patch.items():
        if change is None:
            merged.pop(key, None)
        else:
            merged[key] = merge(merged.get(key), change)
    return merged


@dataclass(frozen=True, slots=True)
class _Member:
    """A member of an object: its key, and the places of key and value in the text."""

    key: str
    start: int
    value: int
    end: int


def _merged(text: str, start: int, patch: Mapping[str, Any]) -> tuple[str, int]:
    """The patched text of the object that begins at ``start``, and its old end."""
    members = list(_members(text, start))
    ends = [start + 1, *(member.end for member in members)]
    parts: list[str] = []
    for before, member in zip(ends, members, strict=False):
        if member.key in patch and patch[member.key] is None:
            continue
        lead = text[before : member.start] if parts else text[start + 1 : members[0].start]
        parts.append(lead + text[member.start : member.value] + _value(text, member, patch))
    space = text[ends[-2] : members[-1].start].replace(",", "", 1) if len(members) > 1 else (
        text[start + 1 : members[0].start] if members else ""
    )  # fmt: skip
    known = {member.key for member in members}
    for key, change in patch.items():
        if key not in known and change is not None:
            lead = ("," + (space or " ")) if parts else space
            parts.append(f"{lead}{json.dumps(key)}: {json.dumps(merge(None, change))}")
    close = text.index("}", _skip(text, ends[-1]))
    return "{" + "".join(parts) + text[ends[-1] : close + 1], close + 1


def _value(text: str, member: _Member, patch: Mapping[str, Any]) -> str:
    """The text of a member's value, patched."""
    if member.key not in patch:
        return text[member.value : member.end]
    change = patch[member.key]
    if isinstance(change, Mapping) and text[member.value] == "{":
        return _merged(text, member.value, change)[0]
    return json.dumps(merge(None, change))


def _members(text: str, start: int) -> Iterator[_Member]:
    """The members of the JSON object that begins at ``start``. Raises ValueError."""
    at = _skip(text, start + 1)
    decoder = JSONDecoder()
    while text[at : at + 1] != "}":
        key, after = scan_string(text, at + 1, True)
        value = _skip(text, _expect(text, _skip(text, after), ":"))
        end = decoder.raw_decode(text, value)[1]
        yield _Member(key, at, value, end)
        at = _skip(text, end)
        if text[at : at + 1] != "}":
            at = _skip(text, _expect(text, at, ","))


def _skip(text: str, at: int) -> int:
    """The first place from ``at`` on that is not white space."""
    found = _NO_SPACE.search(text, at)
    return found.start() if found else len(text)


def _expect(text: str, at: int, what: str) -> int:
    if text[at : at + 1] != what:
        raise ValueError(f"expected {what} at character {at}")
    return at + 1
