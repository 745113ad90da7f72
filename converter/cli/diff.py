"""The command ``gloss diff``, and its table."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from converter.cli.command import Answer, command, quiet_libraries
from converter.cli.fields import Part
from converter.errors import Faults, VerificationError
from converter.option import Option, Options
from converter.text import one_line

_LONGEST = 60
"""Characters of a value of a manifest that are printed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _DiffOptions(Options):
    """The two sides of a comparison."""

    # fmt: off
    a: Annotated[str, Option(
        "Anything that can be converted, or a file of JSON.", flag="A", place=True,
    )]
    b: Annotated[str, Option("Another one of the same kind.", flag="B", place=True)]
    subspace: Annotated[Path | None, Option(
        "File of bases to compare changes with.",
        by_default="the gloss_edit.tensors of B, or of A",
        example="gloss_edit.tensors", path="file", exists=True,
    )] = None
    exit_code: Annotated[bool, Option("Exit with 8 if they differ.")] = False
    # fmt: on


def _look(*, asked: _DiffOptions, faults: Faults) -> None:
    """Find what is wrong with a comparison before torch is loaded."""
    from converter.entrypoints import first_look
    from converter.entrypoints.diff_manifests import are_manifests

    with faults:
        are_manifests(asked.a, asked.b, asked.subspace)
    for name, place in {"A": asked.a, "B": asked.b}.items():
        first_look.look_at_place(f"{name}: ", place, faults)


@command(
    "diff",
    asked=Part(_DiffOptions),
    look=_look,
    examples=("gloss diff demo ./out", "gloss diff ./one/gloss_manifest.json ./other.json"),
)
def diff_command(asked: _DiffOptions) -> Answer:
    """Print the differences between the checkpoints A and B, or between two manifests.

    A and B are anything that can be converted, or two files of JSON. Of each tensor that differs:
    the norm of the change over that of A's tensor, the rank of the part that rounding does not
    explain, and the share of the change's squared norm in the span of a subspace.
    """
    from converter.entrypoints.diff_manifests import are_manifests, diff_manifests

    if are_manifests(asked.a, asked.b, asked.subspace):
        found = diff_manifests(Path(asked.a), Path(asked.b))
    else:
        from converter.entrypoints.diff import diff_checkpoints

        quiet_libraries()
        found = diff_checkpoints(asked.a, asked.b, asked.subspace)
    text = "\n".join(_checkpoints(found) if "tensors" in found else _manifests(found))
    fails = asked.exit_code and not found["equal"]
    return Answer(found, text, VerificationError.exit_code if fails else 0)


def _manifests(found: dict[str, Any]) -> Iterator[str]:
    for entry in found["changed"]:
        yield f"{one_line(entry['path'])}: {_value(entry['a'])} -> {_value(entry['b'])}"
    if found["equal"]:
        yield f"{found['a']} and {found['b']} say the same, measurements apart"


def _value(value: Any) -> str:
    text = "nothing" if value is None else one_line(json.dumps(value, ensure_ascii=False))
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


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
    alone = len(found["only_in_a"]) + len(found["only_in_b"])
    more = f"; only in one of them: {alone}" if alone else ""
    yield f"{len(changed)} of {count} tensors differ between {found['a']} and {found['b']}{more}"


def _measured(entry: dict[str, Any], *, span: bool) -> str:
    """A row: relative norm of the change, its rank, and its share in the span."""
    from converter.edits.spectrum import CAP

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
