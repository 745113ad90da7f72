"""Someone who alters finished folders: a byte, a file, or all that he can make agree again."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from converter.checkpoints.names import CARD, MANIFEST, SUMS
from converter.checkpoints.safetensors.header import read_header
from converter.checkpoints.safetensors.rewrite import digests_of
from converter.release.manifest import hash_line, sums_text
from converter.runtime.cache import sha256_of

Place = tuple[str | int, ...]

CLAIMS = (
    "architecture.transformers", "environment.", "forward", "instances.", "measurements.",
    "method.evidence.candidates.#.index",
    "method.evidence.candidates.#.kept", "method.evidence.candidates.#.kind",
    "method.evidence.candidates.#.tokens", "neutral.", "pairs.", "run.activations",
    "run.base_model", "run.batch_size", "run.device", "run.force", "run.forward",
    "run.guard_draws", "run.instances", "run.mask", "run.max_perplexity_ratio", "run.neutral",
    "run.num_pairs", "run.pairs", "run.rounding", "run.seed", "run.self_prompts",
    "run.self_scorer", "run.source", "run.subfolder", "run.trust_remote_code", "run.word_list",
    "source.commit", "source.name", "source.repo_id",
    "source.revision", "split.", "tool.version", "word_list.",
)  # fmt: skip
"""What a manifest says once only: of texts, names, and what was measured. Nothing in a folder or a
source contradicts it; a signature says whose word it is."""

BEFORE = (
    "edited.#.rounding_error", "edited.#.sha256_before", "edited.#.measures.energy_removed",
    "edited.#.norm", "edited.#.dtype", "edited.#.name", "edited.#.shard", "method.name",
    "method.title", "method.paper", "method.options", "method.package", "method.strength",
    "run.options", "source.files.",
)  # fmt: skip
"""What it says of the source's weights, and under an adapter of everything that is not in it: only
the source can contradict that."""


NOISE = "edited.#.measures.leakage", "edited.#.rounding_error"
"""Under an adapter what float32 leaves, verified to be next to nothing: 0 is true enough."""


def load_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder, to be altered."""
    manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text("utf-8"))
    return manifest


def put(folder: Path, manifest: dict[str, Any]) -> None:
    """Write a manifest, and a card and SHA256SUMS that agree with it as far as they can."""
    text = json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    (folder / MANIFEST).write_text(text, "utf-8")
    line = hash_line(sha256_of(folder / MANIFEST))
    card = re.sub(r"(?m)^sha256 of `gloss.*$", line, (folder / CARD).read_text("utf-8"))
    (folder / CARD).write_text(card, "utf-8")
    try:
        digests = {name: entry["sha256"] for name, entry in manifest["files"].items()}
        digests |= {name: sha256_of(folder / name) for name in (CARD, MANIFEST)}
        (folder / SUMS).write_text(sums_text(digests), "utf-8")
    except (AttributeError, KeyError, TypeError):
        return  # of such a manifest there are no sums


def record(folder: Path, manifest: dict[str, Any], *names: str, copied: bool = False) -> None:
    """Let a manifest say of files what they are now; ``copied``: and that the source has them."""
    for name in names:
        entry = manifest["files"].setdefault(name, {})
        entry |= {"sha256": sha256_of(folder / name), "bytes": (folder / name).stat().st_size}
        if "prefixes" in entry:
            entry["prefixes"] = digests_of(folder / name)[1]
        if copied:
            manifest["source"]["files"][name] = {k: entry[k] for k in ("sha256", "bytes")}


def reseal(folder: Path, *names: str, copied: bool = False) -> None:
    """Record files as they are now, consistently everywhere."""
    manifest = load_manifest(folder)
    record(folder, manifest, *names, copied=copied)
    put(folder, manifest)


def leaves(value: Any, path: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Every value of a manifest that holds no others, and where it is."""
    if isinstance(value, dict | list) and value:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from leaves(inner, (*path, key))
    else:
        yield path, value


def kind_of(path: Place) -> str:
    """A place in a manifest, places in lists left out."""
    return ".".join("#" if isinstance(key, int) else key for key in path)


def others(value: Any) -> Iterator[Any]:
    """Other values that would do in its place, and some that would not."""
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int | float):
        yield from (value + 1, value * 2 + 1e-3, -value - 1)
    elif isinstance(value, str) and re.fullmatch("[0-9a-f]{16}|[0-9a-f]{64}", value):
        yield ("1" if value[0] == "0" else "0") + value[1:]
    elif isinstance(value, str):
        yield from (value + "x", "../x", "adapter")
    yield from (None, True, 0.0, -1, 1e308, "", "x", [], {}, ["x"], [[]], {"x": {}})


def forged(manifest: dict[str, Any], path: Place, value: Any) -> dict[str, Any]:
    """A copy of a manifest that says something else in one place."""
    copy: dict[str, Any] = json.loads(json.dumps(manifest))
    place: Any = copy
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return copy


def flipped(raw: bytes, place: int) -> bytes:
    """With one bit turned; which one depends on the place, so that all kinds occur."""
    return raw[:place] + bytes([raw[place] ^ 1 << place % 8]) + raw[place + 1 :]


def places(path: Path, step: int) -> list[int]:
    """Every byte of a file; of tensors, the first, the last, and every ``step``-th."""
    size = path.stat().st_size
    if path.suffix not in (".safetensors", ".tensors"):
        return list(range(size))
    header = read_header(path)
    found = set(range(header.data_start)) | set(range(header.data_start, size, step))
    for info in header.tensors.values():
        found |= {info.start, info.end - 1} if info.nbytes else set()
    return sorted(found)


def copy_of(folder: Path, place: Path) -> Path:
    """A folder to be altered."""
    return Path(shutil.copytree(folder, place, dirs_exist_ok=True))
