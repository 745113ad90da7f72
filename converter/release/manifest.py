"""The manifest: what was read, what was done to it, what was written, by content.

Its schema is published as ``manifests/gloss_manifest.schema.json``. Everything in it but
``measurements`` is a function of the inputs, so two runs can be compared with ``diff``. It holds no
absolute path, host name or user name.
"""

import hashlib
import json
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import torch

from converter import __version__
from converter.calibration.pairs import Pairs, Prose
from converter.calibration.statistics import cache_key
from converter.calibration.word_list import WordList
from converter.checkpoints.names import CARD, MANIFEST, SUMS
from converter.checkpoints.source import Source
from converter.edits.subspace_file import SUBSPACE_FILE
from converter.errors import VerificationError
from converter.evaluate.fit import Fitted
from converter.methods.base import Method
from converter.outputs.checkpoint.write import Written, file_entry
from converter.recipe import Recipe
from converter.runtime import progress, strict_json
from converter.runtime.files import read_file, reason

SCHEMA_VERSION = 1
LIBRARIES = ("huggingface-hub", "numpy", "safetensors", "tokenizers", "torch", "transformers")


def make_manifest(  # noqa: PLR0913
    recipe: Recipe,
    source: Source,
    method: Method,
    pairs: Pairs,
    prose: Prose,
    words: WordList,
    fitted: Fitted,
    written: Written,
    read: Mapping[str, tuple[str, int]],
    device: str,
) -> dict[str, Any]:
    """Everything but ``files`` and ``measurements``, in the order in which it is written."""
    activations, subspace = fitted.activations, fitted.subspace
    return {
        "schema_version": SCHEMA_VERSION,
        "tool": {"name": "gloss-convert", "version": __version__},
        "run": recipe.record(),
        "source": {
            "name": source.name,
            "repo_id": source.repo.repo_id if source.repo else None,
            "revision": source.repo.revision if source.repo else None,
            "commit": source.repo.commit if source.repo else None,
            "files": {name: {"sha256": s, "bytes": n} for name, (s, n) in read.items()},
        },
        "method": {
            "name": recipe.method,
            "title": method.title,
            "paper": method.paper,
            "options": asdict(method),  # type: ignore[call-overload]
        },
        "pairs": {
            "origin": pairs.origin,
            "sha256": pairs.sha256,
            "count": len(activations.toxic[min(activations.toxic)]),
            "skipped": {reason: len(rows) for reason, rows in pairs.skipped.items()},
        },
        "neutral": {"origin": prose.origin, "sha256": prose.sha256},
        "word_list": {"origin": words.origin, "sha256": words.sha256},
        "split": fitted.parts.record(),
        "activations": {
            "key": cache_key(activations.inputs) if activations.inputs else None,
            "inputs": dict(activations.inputs),
        },
        "subspace": {
            "file": SUBSPACE_FILE,
            "hidden_size": next(iter(subspace.bases.values())).shape[0],
            "rank": subspace.rank,
            "shared": subspace.shared,
            "singular_values": {
                name: values.tolist() for name, values in subspace.singular_values.items()
            },
            "candidates": [
                asdict(candidate)
                | {"tokens": [words.mask(t) if recipe.mask else t for t in candidate.tokens]}
                for candidate in subspace.candidates
            ],
        },
        "choice": fitted.choice.record(),
        "guard": fitted.verdict.record if fitted.verdict else None,
        "edited": edited(written, subspace.basis_name),
        "environment": environment(device),
    }


def edited(written: Written, basis_name: Callable[[int], str]) -> list[dict[str, Any]]:
    """The record of each edited tensor, with the tensor of the subspace file that it lost."""
    return [asdict(record) | {"basis": basis_name(record.layer)} for record in written.edits]


def environment(device: str) -> dict[str, Any]:
    """What besides the inputs may bear on the result."""
    return {
        "device": torch.cuda.get_device_name(device) if device != "cpu" else "cpu",
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "libraries": {name: version(name) for name in LIBRARIES},
    }


def file_list(written: Written, others: Mapping[str, tuple[str, int]]) -> dict[str, Any]:
    """The output files: sha256 and bytes of each, and for a shard its running digests."""
    shards = {
        name: {"sha256": record.sha256, "bytes": record.nbytes, "prefixes": dict(record.prefixes)}
        for name, record in written.shards.items()
    }
    rest = {**written.copies, **written.made, **others}
    return shards | {name: {"sha256": s, "bytes": n} for name, (s, n) in sorted(rest.items())}


def measurements() -> dict[str, Any]:
    """The only part that may differ between two runs of the same inputs.

    Memory is the largest resident set, of each stage and of all of them, in bytes.
    """
    told = progress.current()
    return {
        "seconds": {name: round(seconds, 3) for name, seconds in told.seconds.items()},
        "memory_bytes": dict(told.memory),
        "peak_memory_bytes": max((progress.peak_memory(), *told.memory.values())),
    }


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> str:
    """Write the manifest; its sha256, which the card states."""
    text = json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    (folder / MANIFEST).write_text(text, "utf-8")
    return file_entry(folder / MANIFEST)[0]


def seal(folder: Path, manifest: Mapping[str, Any], card: str) -> None:
    """Write the card and, over it, the manifest and all the files it lists, ``SHA256SUMS``.

    Args:
        folder: has everything else.
        manifest: as it was written.
        card: has the ``hash_line`` of that manifest.
    """
    (folder / CARD).write_text(card, "utf-8")
    digests = {name: file_entry(folder / name)[0] for name in (CARD, MANIFEST)}
    (folder / SUMS).write_text(sums_text(manifest, digests), "utf-8")
    file_entry(folder / SUMS)


def hash_line(digest: str) -> str:
    """The line of the card that names its manifest, by sha256."""
    return f"sha256 of `{MANIFEST}`: `{digest}`"


def sums_text(manifest: Mapping[str, Any], own: Mapping[str, str]) -> str:
    """The exact text of SHA256SUMS, in the format of sha256sum.

    Args:
        manifest: of the folder.
        own: sha256 of the card and of the manifest, which it cannot list.
    """
    digests = {name: entry["sha256"] for name, entry in manifest["files"].items()} | dict(own)
    return "".join(f"{digests[name]}  {name}\n" for name in sorted(digests))


@cache
def schema() -> dict[str, Any]:
    """The published JSON schema, from the wheel or from the repository beside the package."""
    packaged = files("converter").joinpath("data/gloss_manifest.schema.json")
    if packaged.is_file():
        text = packaged.read_text("utf-8")
    else:
        text = (Path(__file__).parents[2] / "manifests/gloss_manifest.schema.json").read_text()
    loaded: dict[str, Any] = json.loads(text)
    return loaded


@cache
def _validator() -> Any:
    """Of the schema, to which 1.0 is no integer: it could not count anything."""
    kind = jsonschema.Draft202012Validator
    checker = kind.TYPE_CHECKER.redefine("integer", lambda _, value: type(value) is int)
    return jsonschema.validators.extend(kind, type_checker=checker)(schema())  # type: ignore[no-untyped-call]


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read a folder's manifest and check it against the schema.

    Raises:
        VerificationError: it is missing, is not JSON, or does not follow the schema.
    """
    return read_manifest_bytes(folder)[0]


def read_manifest_bytes(folder: Path) -> tuple[dict[str, Any], str]:
    """The same, and the sha256 of the very bytes that were read."""
    if not (folder / MANIFEST).is_file():
        raise VerificationError(
            f"{folder.name} has no {MANIFEST}", hint="only what gloss-convert wrote can be verified"
        )
    return _read_manifest(folder / MANIFEST)


def read_manifest_file(path: Path) -> dict[str, Any]:
    """The same as ``read_manifest``, wherever it is."""
    return _read_manifest(path)[0]


def _read_manifest(path: Path) -> tuple[dict[str, Any], str]:
    try:
        data = read_file(path)
        manifest = strict_json.parse(data)
    except (OSError, ValueError) as error:
        raise VerificationError(f"{path.name} cannot be read", found=reason(error)) from error
    for first in _validator().iter_errors(manifest):
        raise VerificationError(
            f"{path.name} does not follow its schema at {first.json_path}",
            found=first.message[:200],
        )
    assert isinstance(manifest, dict)
    return manifest, hashlib.sha256(data).hexdigest()
