"""A comparison for people."""

import json
from collections.abc import Iterator
from typing import Any

from converter.edits.spectrum import CAP
from converter.text import sanitize as plain

LONGEST = 60
"""Characters of a value of a manifest that are printed."""


def diff_text(found: dict[str, Any]) -> str:
    """What ``diff.diff`` found, as a table."""
    if "tensors" not in found:
        return "\n".join(_manifests(found))
    return "\n".join(_checkpoints(found))


def _manifests(found: dict[str, Any]) -> Iterator[str]:
    for entry in found["changed"]:
        yield f"{plain.one_line(entry['path'])}: {_value(entry['a'])} -> {_value(entry['b'])}"
    if found["equal"]:
        yield f"{found['a']} and {found['b']} say the same, measurements apart"


def _value(value: Any) -> str:
    text = "nothing" if value is None else plain.one_line(json.dumps(value, ensure_ascii=False))
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


def _checkpoints(found: dict[str, Any]) -> Iterator[str]:
    for side in ("a", "b"):
        for name in found[f"only_in_{side}"]:
            yield f"tensor {name}: only in {found[side]}"
    changed = found["changed"]
    width = max((len(entry["name"]) for entry in changed), default=0)
    if changed:
        span = f"  in span of {found['subspace']}" if found["subspace"] else ""
        yield f"{'tensor':<{width}}  {'change':>9}  {'rank':>4}{span}"
    for entry in changed:
        yield f"{entry['name']:<{width}}{_measured(entry, span=bool(found['subspace']))}"
    kinds = {"only_in_a": f"only in {found['a']}", "only_in_b": f"only in {found['b']}",
             "changed": "differ"}  # fmt: skip
    for kind, label in kinds.items():
        if names := found["files"][kind]:
            yield f"files, {label}: {', '.join(names)}"
    count = found["tensors"]["a"]
    yield f"{len(changed)} of {count} tensors differ between {found['a']} and {found['b']}"


def _measured(entry: dict[str, Any], *, span: bool) -> str:
    """A row: relative norm of the change, its rank, and its share in the span."""
    measured, notes = entry["measured"], []
    for what in ("shape", "dtype"):
        if entry[what][0] != entry[what][1]:
            notes.append(f"{what} {entry[what][0]} -> {entry[what][1]}")
    if measured is None:
        return "  " + (", ".join(notes) or f"other bytes ({entry['dtype'][0]}, not measured)")
    change, rank, share = (measured[n] for n in ("relative_change", "rank", "in_span"))
    text = f"  {'-' if change is None else f'{change:.3e}':>9}"
    shown = "-" if rank is None else f">{CAP}" if rank > CAP else str(rank)
    text += f"  {shown:>4}"
    if span:
        text += f"  {'-' if share is None else f'{share:.6f}'}"
    return text + ("  " + ", ".join(notes) if notes else "")
