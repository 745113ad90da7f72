"""Edited tensors against their subspace, and all tensors against the source; see ``verify``."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from io import RawIOBase
from math import isclose, isfinite, sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from converter.checkpoints.safetensors.direct_writer import BUFFER
from converter.checkpoints.safetensors.header import (
    TensorInfo,
    header_of,
    read_exactly,
    read_header,
)
from converter.checkpoints.source import Source
from converter.edits.rounding_bounds import Stored, is_projection, left_along, rounding_bound
from converter.edits.subspace_file import load_bases
from converter.outputs.record_checks import check_source_files, check_subspace, recorded_bases
from converter.runtime import progress

LEFT = 0.05
"""Share of what was along U that rounding toward U^T W' = 0 may leave. Where there are hundreds of
rows to choose from it leaves 1e-4 in 16 bits and 1e-3 in FP8; to nearest, FP8 leaves 0.05 to 0.15.
"""

CLOSE, SMALL, TINY = 1e-4, 1e-6, 1e-9
"""Shares of ||W|| by which recorded norms, and what is left along U, may differ from those found:
they are sums over all elements, added in another order, of FP8 in float32. That of the rounding
error is a small difference of sums, and uncertain by the root of what they are."""

NOISE = {"F8_E4M3": 0.03}
"""Relative error of rounding; half an epsilon unless it is here. Were it independent of U, a share
sqrt(R / D) of it would be along R of D directions: no edit is asked to leave less than that."""


def check_edits(
    folder: Path, manifest: Mapping[str, Any], damaged: Mapping[str, str]
) -> Iterator[str]:
    """Edited tensors: their digests, and what is left of them along their bases."""
    name = manifest["subspace"]["file"]
    if name in damaged:
        return
    bases = recorded_bases(folder, manifest)
    yield from check_subspace(folder, manifest, bases)
    entries = [entry for entry in manifest["edited"] if not _shards_of(entry) & damaged.keys()]
    infos = infos_of(folder, {shard for entry in entries for shard in _shards_of(entry)})
    with progress.bar("check edits", len(entries), "tensor") as bar:
        for entry in entries:
            basis, rounding = bases[entry["basis"]], manifest["run"]["rounding"]
            yield from check_edit(folder, entry, basis, infos, rounding)
            bar.update()


def check_edit(
    folder: Path,
    entry: Mapping[str, Any],
    basis: Tensor,
    infos: Mapping[str, TensorInfo],
    rounding: str,
) -> Iterator[str]:
    """An edited tensor: its digest, and what is left of it along its basis.

    Args:
        folder: with its shard.
        entry: of the manifest's ``edited``.
        basis: U (D, R).
        infos: of ``infos_of``.
        rounding: of the run.
    """
    name, shard, fp8 = entry["name"], entry["shard"], entry["requantized"]
    with Stored(_opener(folder), entry, infos) as stored:
        left, units, norm = left_along(stored, basis)
    if wrong := list(_contradictions(entry, left, norm)):
        yield f"{shard}: tensor {name} is not as recorded: {', '.join(wrong)}"
    bound = _allowed(entry, stored.dtype, units, basis, rounding)
    if stored.digests != (entry["sha256_after"], fp8 and fp8["sha256_after"]):
        yield f"{shard}: tensor {name} has another sha256 than recorded"
    if not left <= bound:
        yield (
            f"{shard}: tensor {name} is not orthogonal to "
            f"{entry['basis']}: ||U^T W|| is {left:.3e}, rounding allows {bound:.3e}"
        )


def _allowed(
    entry: Mapping[str, Any], dtype: torch.dtype, units: float, basis: Tensor, rounding: str
) -> float:
    """The largest ||U^T W'|| that rounding explains."""
    if dtype.itemsize > 2 or (dtype.itemsize == 2 and rounding == "nearest"):
        return rounding_bound(units, len(basis), entry["norm"])
    noise = NOISE.get(entry["dtype"], torch.finfo(dtype).eps / 2)
    noise *= sqrt(basis.shape[1] / basis.shape[0])
    return max(LEFT * sqrt(max(entry["energy_removed"], 0.0)), noise) * float(entry["norm"])


def _contradictions(entry: Mapping[str, Any], left: float, norm: float) -> Iterator[str]:
    """Which numbers of a record do not fit what is there.

    W = W' + U P - E with U^T W = P and E the rounding error, so ||W - U P||^2 = ||W||^2 - ||P||^2
    is ||W'||^2 but for E, and W' - W = E - U P.

    Args:
        entry: of the manifest's ``edited``.
        left: ||U^T W'||.
        norm: ||W'||.
    """
    before, energy, error = entry["norm"], entry["energy_removed"], entry["rounding_error"]
    if not (0 <= energy <= 1 + CLOSE and error >= 0 and isfinite(before)):
        yield "its norms are impossible"
        return
    removed, noise = sqrt(energy) * before, CLOSE * before
    if not abs(norm - sqrt(max(1 - energy, 0)) * before) <= error * before + noise:
        yield "its norm, or what was removed of it"
    if not abs(entry["relative_change"] - sqrt(energy)) <= error + CLOSE:
        yield "its change"
    if not isclose(left, entry["leakage"] * (removed or 1.0), rel_tol=0.01, abs_tol=TINY * before):
        yield "its leakage"


def _shards_of(entry: Mapping[str, Any]) -> set[str]:
    """The files that an edited tensor and its scales are in."""
    fp8 = entry["requantized"]
    return {entry["shard"]} | ({fp8["shard"]} if fp8 else set())


def infos_of(folder: Path, shards: Iterable[str]) -> dict[str, TensorInfo]:
    """Tensor name -> entry, of some shards; each header is read once."""
    return {
        name: info for shard in shards for name, info in read_header(folder / shard).tensors.items()
    }


def _opener(folder: Path) -> Callable[[str], RawIOBase]:
    return lambda shard: (folder / shard).open("rb", buffering=0)


def check_source(
    folder: Path,
    manifest: Mapping[str, Any],
    damaged: Mapping[str, str],
    source: Source,
) -> Iterator[str]:
    """Compare with the source, tensor by tensor."""
    shards = [name for name, entry in manifest["files"].items() if "prefixes" in entry]
    if sorted(shards) != sorted(source.shards):
        yield f"the source {source.name} has other shards: {', '.join(source.shards)}"
        return
    yield from check_source_files(manifest, source, source.small)
    name = manifest["subspace"]["file"]
    bases = {} if name in damaged else load_bases(folder / name)
    edited = {entry["name"]: entry for entry in manifest["edited"]}
    fp8 = (entry["requantized"] for entry in manifest["edited"])
    scales = {entry["scales"] for entry in fp8 if entry}
    infos, rounding = infos_of(folder, shards), manifest["run"]["rounding"]
    with progress.bar("compare", sum(manifest["files"][n]["bytes"] for n in shards), "B") as bar:
        for shard in shards:
            with (folder / shard).open("rb", buffering=0) as ours, source.open(shard) as theirs:
                header = header_of(theirs, shard)
                if not _same_bytes(ours, theirs, 0, header.data_start):
                    yield f"{shard}: the header differs from that of the source"
                    continue
                for info in header.tensors.values():
                    entry = edited.get(info.name)
                    if entry is None and info.name not in scales:
                        if not _same_bytes(ours, theirs, info.start, info.end):
                            yield f"{shard}: tensor {info.name} differs from that of the source"
                    elif entry and entry["basis"] in bases:
                        with (
                            Stored(source.open, entry, infos) as before,
                            Stored(_opener(folder), entry, infos) as after,
                        ):
                            basis, nearest = bases[entry["basis"]], rounding == "nearest"
                            yield from _check_projection(entry, before, after, basis, nearest)
                    bar.update(info.nbytes)


def _check_projection(
    entry: Mapping[str, Any], before: Stored, after: Stored, basis: Tensor, nearest: bool
) -> Iterator[str]:
    """An edited tensor against the one it was made from."""
    place, fp8 = f"{entry['shard']}: tensor {entry['name']}", entry["requantized"]
    fits, norms = is_projection(after, before, basis, nearest=nearest)
    if before.digests != (entry["sha256_before"], fp8 and fp8["sha256_before"]):
        yield f"{place} was another one before the edit, by its sha256"
    if not isclose(norms["norm"], entry["norm"], rel_tol=CLOSE):
        yield f"{place} had another norm before the edit than recorded"
    for key in ("energy_removed", "relative_change", "rounding_error"):
        if not isclose(norms[key], entry[key], rel_tol=0.01, abs_tol=SMALL):
            yield f"{place} has another {key} than recorded: {norms[key]:.4g}"
    if not fits:
        yield f"{place} is not the projection of the source's"


def _same_bytes(ours: RawIOBase, theirs: RawIOBase, start: int, end: int) -> bool:
    ours.seek(start)
    theirs.seek(start)
    while start < end:
        count = min(BUFFER, end - start)
        if read_exactly(ours, count, "our shard") != read_exactly(theirs, count, "the source's"):
            return False
        start += count
    return True
