"""What differs between two manifests; nothing of this needs torch."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from converter.checkpoints.layout import read_json
from converter.errors import OptionError

_LEFT_OUT = ("measurements", "prefixes")
"""Parts of a manifest that differ from run to run, or that the digest of the file stands for."""


def are_manifests(a: str, b: str, subspace: Path | None) -> bool:
    """Whether two things to be compared are files of JSON, and not checkpoints.

    Raises OptionError if only one is, or there is a file of bases to compare manifests with.
    """
    manifests = [text.endswith(".json") and Path(text).is_file() for text in (a, b)]
    if not any(manifests):
        return False
    if not all(manifests):
        raise OptionError(
            "a manifest and a checkpoint cannot be compared",
            expected="two of the same kind",
            hint="gloss verify compares a checkpoint with its own manifest",
        )
    if subspace is not None:
        raise OptionError("--subspace has no effect on manifests")
    return True


def diff_manifests(a: Path, b: Path) -> dict[str, Any]:
    """The leaves of two manifests that differ, but for those ``_LEFT_OUT``.

    Raises:
        CheckpointError: one of them is not JSON.
    """
    one, two = (dict(_leaves(read_json(path))) for path in (a, b))
    changed = [
        {"path": path, "a": one.get(path), "b": two.get(path)}
        for path in dict.fromkeys((*one, *two))
        if (path in one, one.get(path)) != (path in two, two.get(path))
    ]
    return {"a": a.name, "b": b.name, "equal": not changed, "changed": changed}


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a JSON value by path, such as ``edited[model.norm.weight].norm``.

    Entries of a list are known by their name where they have one, else by their place.
    """
    if isinstance(value, dict) and value:
        for key, child in value.items():
            if key not in _LEFT_OUT:
                yield from _leaves(child, f"{path}.{key}" if path else key)
    elif isinstance(value, list) and any(isinstance(child, dict | list) for child in value):
        for number, child in enumerate(value):
            label = child.get("name", number) if isinstance(child, dict) else number
            yield from _leaves(child, f"{path}[{label}]")
    else:
        yield path, value
