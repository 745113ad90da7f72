"""Verify a checkpoint against its manifest: structure, edited tensors, and source."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from io import RawIOBase
from math import isclose, isfinite, nan, prod, sqrt
from pathlib import Path

import torch

from converter.checkpoints.architectures.kind import FUSED
from converter.checkpoints.fusing import (
    ALIGNMENT,
    CODE,
    fused_shapes,
    is_fused,
    target_config,
)
from converter.checkpoints.layout import read_index, read_json
from converter.checkpoints.names import INDEX, MANIFEST
from converter.checkpoints.patch import merge
from converter.checkpoints.plan import Plan, make_plan, read_plan
from converter.checkpoints.safetensors.direct_writer import BUFFER
from converter.checkpoints.safetensors.header import (
    BITS,
    FLOATS,
    TensorInfo,
    header_of,
    read_exactly,
    read_header,
)
from converter.checkpoints.source import Source
from converter.checkpoints.weights import Weight
from converter.edits.deltas import Delta
from converter.edits.edit_file import load_edit_tensors
from converter.edits.rounding_bounds import (
    Stored,
    check_rounded,
    left_along,
    rounding_bound,
    sha256_undone,
)
from converter.errors import CheckpointError
from converter.manifest import EditedTensor, Manifest
from converter.outputs.base import sha256_of_tensor
from converter.outputs.checkpoint.additions import Shards, additions_of, index_of, patched_text
from converter.outputs.record_checks import (
    check_edit_file,
    check_source_files,
    delta_of_record,
    is_recorded,
    recorded_edit,
)
from converter.runtime import progress

_LEFT = 0.05
"""Share along U that rounding toward U^T W' = 0 may leave. Where there are hundreds of rows to
choose from it leaves 1e-4 in 16 bits and 1e-3 in FP8; to nearest, FP8 leaves 0.05 to 0.15.
"""

_CLOSE, _SMALL, _TINY = 1e-4, 1e-6, 1e-9
"""Shares of ||W|| by which recorded norms, and what is left along U, may differ from those found:
they are sums over all elements, added in another order, of FP8 in float32. That of the rounding
error is a small difference of sums, and uncertain by the root of what they are."""

_NOISE = {"F8_E4M3": 0.03}
"""Relative error of rounding; half an epsilon unless it is here. Were it independent of U, a share
sqrt(R / D) of it would be along R of D directions: no edit is asked to leave less than that."""


def check_checkpoint(
    folder: Path, manifest: Manifest, damaged: Mapping[str, str], source: Source | None
) -> Iterator[str]:
    """Verify a complete model, besides its list of files; see ``entrypoints.verify``."""
    whole = not damaged.keys() & {*manifest.shards, INDEX, "config.json"}
    structure = list(_check_structure(folder, manifest)) if whole else []
    yield from structure
    yield from _check_patched(folder, manifest, damaged)
    if not structure:
        yield from _check_created(folder, manifest, damaged)
    if structure or manifest.edit.file in damaged:
        return
    stored = recorded_edit(folder, manifest)
    yield from check_edit_file(manifest, stored)
    tensors = manifest.edited if whole else _readable(folder, manifest, damaged)
    deltas = {tensor.name: delta_of_record(tensor, stored) for tensor in tensors}
    yield from _check_edits(folder, manifest, deltas)
    if source:
        yield from _check_source(folder, manifest, source, deltas, damaged)


def _check_patched(folder: Path, manifest: Manifest, damaged: Mapping[str, str]) -> Iterator[str]:
    """Check that a patched file has its patch: applying it again would change nothing."""
    for name, patch in manifest.edit.patches.items():
        if name in damaged or name not in manifest.files:
            continue
        if isinstance(patch, str):
            done = (folder / name).read_bytes().startswith(patch.encode())
        else:
            config = read_json(folder / name)
            done = merge(config, patch) == config
        if not done or isinstance(patch, str) == name.endswith(".json"):
            yield f"{name}: does not say what the recorded patch makes of it"


def _check_created(folder: Path, manifest: Manifest, damaged: Mapping[str, str]) -> Iterator[str]:
    """The shard of created tensors holds these and no others, byte for byte."""
    created = {tensor.name: tensor for tensor in manifest.edit.created}
    places = {tensor.shard for tensor in created.values()} & manifest.shards.keys()
    for shard in sorted(places - damaged.keys()):
        for name, tensor in load_edit_tensors(folder / shard).items():
            if name not in created:
                yield f"{shard}: tensor {name} is not one that the edit creates"
            elif sha256_of_tensor(tensor) != created[name].sha256:
                yield f"{shard}: tensor {name} has another sha256 than recorded"


def _readable(
    folder: Path, manifest: Manifest, damaged: Mapping[str, str]
) -> Iterator[EditedTensor]:
    """The edited tensors that can be checked in a damaged folder.

    They are plain numbers, in whole shards, of the recorded shape.
    """
    whole = [shard for shard in manifest.shards if shard not in damaged]
    infos = {shard: read_header(folder / shard).tensors for shard in whole}
    for tensor in manifest.edited:
        info = infos.get(tensor.shard, {}).get(tensor.name)
        if info is None or not info.nbytes or info.dtype not in FLOATS or tensor.requantized:
            continue
        if (info.dtype, info.shape) == (tensor.dtype, tensor.shape):
            yield tensor


def _check_structure(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Check that the index, the headers and the config describe one checkpoint."""
    plan = plan_of(folder, manifest)
    weights = plan.find({tensor.name for tensor in manifest.edited})
    for tensor in manifest.edited:
        weight = weights.get(tensor.name)
        if weight is None or not _is_same(weight, tensor):
            yield f"tensor {tensor.name} is recorded as edited and is not that weight"
    for created in manifest.edit.created:
        shard, info = plan.names.tensors.get(created.name, ("", None))
        found = info and (shard, info.dtype, info.shape)
        if found != (created.shard, created.dtype, created.shape):
            yield f"tensor {created.name} is recorded as created and is not there"
    if manifest.edit.created:
        yield from _check_asked_for(folder, manifest)


def _check_asked_for(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Check that the created tensors are exactly those that a model with this config reads."""
    plan, config = plan_of(folder, manifest, edited=False), read_json(folder / "config.json")
    created = {tensor.name for tensor in manifest.edit.created}
    if is_fused(config) or ALIGNMENT in created:
        fusion = config.get("fusion")
        depth = fusion.get("depth") if isinstance(fusion, Mapping) else None
        whole = type(depth) is int and fused_shapes(plan, depth).keys() == created
        if not whole or not is_fused(config) or CODE not in manifest.files:
            yield f"config.json: does not fit the created tensors and files of a {FUSED} model"
        return
    for what, names, needed, patch in additions_of(plan):
        ours = sorted(created & {*names})
        if ours and merge(config, patch) != config:
            yield f"config.json: a model with it ignores the created tensor {ours[0]}"
        elif ours and (lacking := sorted({*needed} - created)):
            yield f"config.json: asks for {what}, and there is no {lacking[0]}"


def plan_of(folder: Path, manifest: Manifest, *, edited: bool = True) -> Plan:
    """The structure of an output, or that of its source: without the created tensors.

    Raises:
        CheckpointError: its parts do not fit together.
    """
    weight_map = read_index(folder / INDEX) if (folder / INDEX).exists() else None
    headers = {name: read_header(folder / name) for name in manifest.shards}
    if not edited:
        created = {tensor.name: tensor.shard for tensor in manifest.edit.created}
        headers = {n: header for n, header in headers.items() if n not in created.values()}
        weight_map = weight_map and {n: s for n, s in weight_map.items() if n not in created}
    config = target_config(read_json(folder / "config.json"))
    return make_plan(config, weight_map, headers, folder)


def _is_same(weight: Weight, tensor: EditedTensor) -> bool:
    """Whether a weight agrees with its record; for FP8, including the place of its scales."""
    scales, fp8 = weight.scales, tensor.requantized
    found = scales and (scales.info.name, scales.shard, tuple(scales.block))
    same_scales = found == (fp8 and (fp8.scales, fp8.shard, fp8.block))
    return same_scales and is_recorded(weight, tensor) and weight.info.dtype == tensor.dtype


def _check_edits(folder: Path, manifest: Manifest, deltas: Mapping[str, Delta]) -> Iterator[str]:
    """Edited tensors: their digests, and what is left of them along their bases."""
    tensors = [tensor for tensor in manifest.edited if tensor.name in deltas]
    shards = {tensor.shard for tensor in tensors}
    shards |= {tensor.requantized.shard for tensor in tensors if tensor.requantized}
    infos, rounding = infos_of(folder, shards), manifest.run.rounding
    with progress.bar("check edits", len(tensors), "tensor"):
        for tensor in tensors:
            yield from check_edit(folder, tensor, deltas[tensor.name], infos, rounding)
            progress.advance(1)


def check_edit(
    folder: Path, tensor: EditedTensor, delta: Delta, infos: Mapping[str, TensorInfo], rounding: str
) -> Iterator[str]:
    """An edited tensor without its source: its digest, its norms, what is left along its basis.

    ``infos`` are those of ``infos_of``, of the shards that it and its scales are in.
    """
    name, shard, fp8 = tensor.name, tensor.shard, tensor.requantized
    basis = torch.zeros(tensor.shape[tensor.axis], 0) if delta.protects is None else delta.protects
    with Stored(_opener(folder), tensor, infos) as stored:
        left, units, norm = left_along(stored, basis)
    if wrong := list(_contradictions(tensor, delta, left, norm)):
        yield f"{shard}: tensor {name} is not as recorded: {', '.join(wrong)}"
    if stored.digests != (tensor.sha256_after, fp8 and fp8.sha256_after):
        yield f"{shard}: tensor {name} has another sha256 than recorded"
    with Stored(_opener(folder), tensor, infos) as stored:
        before = sha256_undone(stored, delta, tensor.shape[tensor.axis])
    if before not in (None, tensor.sha256_before):
        yield (
            f"{shard}: tensor {name} is not what it was with the recorded edit: taking that back "
            "gives a tensor of another sha256"
        )
    if delta.protects is None:
        return
    bound = _allowed(tensor, stored.dtype, units, delta, rounding)
    along = delta.along(tensor.measures) * tensor.norm
    if delta.factor == 1 and not left <= bound:
        yield (
            f"{shard}: tensor {name} is not orthogonal to {', '.join(tensor.tensors.values())}: "
            f"||U^T W|| is {left:.3e}, rounding allows {bound:.3e}"
        )
    kept = (1 - delta.factor) * along
    off = max(abs(left - kept), tensor.measures.get("leakage", nan) * along)
    if delta.factor < 1 and not off <= bound + _SMALL * tensor.norm:
        yield (
            f"{shard}: tensor {name} has not {1 - delta.factor:g} of what it had along "
            f"{tensor.tensors['U']}: ||U^T W|| is {left:.3e}, not {kept:.3e}; it, or the recorded "
            f"leakage, is off by {off:.3e}, rounding allows {bound:.3e}"
        )


def _allowed(
    tensor: EditedTensor, dtype: torch.dtype, units: float, delta: Delta, rounding: str
) -> float:
    """The largest ||U^T W' - (1 - a) U^T W|| that rounding explains."""
    basis = delta.protects
    assert basis is not None
    if dtype.itemsize > 2 or (dtype.itemsize == 2 and rounding == "nearest"):
        return rounding_bound(units, len(basis), tensor.norm)
    noise = _NOISE.get(tensor.dtype, torch.finfo(dtype).eps / 2)
    noise *= sqrt(basis.shape[1] / basis.shape[0])
    along, a = delta.along(tensor.measures), delta.factor
    return max(_LEFT * sqrt(a * (2 - a)) * along, noise) * tensor.norm


def _contradictions(tensor: EditedTensor, delta: Delta, left: float, norm: float) -> Iterator[str]:
    """The numbers of a record that contradict the tensor.

    ||W'||, which is ``norm``, and ||W|| differ by ||W' - W|| at most. Where a subspace is taken
    out, W' = W - a A P + E with P = U^T W and the rounding error E, so W' - W = E - a A P. If A is
    U, then ||W'||^2 = ||W||^2 - a (2 - a) ||P||^2 up to E. ``left`` is ||U^T W'||: the leakage if a
    is 1, and otherwise (1 - a) ||P|| up to the leakage. Only with the source can each column be
    compared with that of (1 - a) P.
    """
    before, error, change = tensor.norm, tensor.rounding_error, tensor.relative_change
    removes, a = delta.protects is not None, delta.factor
    along = delta.along(tensor.measures) if removes else 0.0
    if not (0 <= along <= 1 + _CLOSE and error >= 0 and isfinite(before) and change >= 0):
        yield "its norms are impossible"
        return
    noise = _CLOSE * before
    whole = before or 1.0  # of which the change is recorded as a share
    if not removes or delta.written is not delta.protects:
        if not abs(norm - before) <= change * whole + _CLOSE * max(before, norm):
            yield "its norm, or its change"
    else:
        kept = sqrt(max(1 - a * (2 - a) * along**2, 0)) * before
        if not abs(norm - kept) <= error * before + noise:
            yield "its norm, or what was removed of it"
    if not removes:
        return
    least, most = delta.moved(along)
    if not least - error - _CLOSE <= change <= most + error + _CLOSE:
        yield "its change"
    if tensor.measures.get("factor", 1.0) != a:
        yield "its factor"
    leakage = tensor.measures.get("leakage", nan) * (along * before or 1.0)
    if a == 1 and not isclose(left, leakage, rel_tol=0.01, abs_tol=_TINY * before):
        yield "its leakage"


def infos_of(folder: Path, shards: Iterable[str]) -> dict[str, TensorInfo]:
    """Tensor name -> entry, of some shards; each header is read once."""
    return {
        name: info for shard in shards for name, info in read_header(folder / shard).tensors.items()
    }


def _opener(folder: Path) -> Callable[[str], RawIOBase]:
    return lambda shard: (folder / shard).open("rb", buffering=0)


def _check_source(
    folder: Path,
    manifest: Manifest,
    source: Source,
    deltas: Mapping[str, Delta],
    damaged: Mapping[str, str],
) -> Iterator[str]:
    """Compare with the source, tensor by tensor, and each file that is not a copy."""
    shards = Shards.of(source.shards, bool(manifest.edit.created))
    expected = {shards.output(shard) for shard in source.shards}
    if {*expected, *filter(None, [shards.extra])} != set(manifest.shards):
        yield f"the source {source.name} has other shards: {', '.join(source.shards)}"
        return
    yield from check_source_files(manifest, source, (*source.small, *source.shards))
    yield from _check_texts(folder, manifest, source, shards, damaged)
    infos = infos_of(folder, expected)
    edited = {tensor.name: tensor for tensor in manifest.edited}
    others = edited.keys() - deltas.keys()  # in a folder that is not whole
    scales = {t.requantized.scales for t in manifest.edited if t.requantized}
    nearest = manifest.run.rounding == "nearest"
    with progress.bar("compare", sum(manifest.files[n].nbytes for n in expected), "B"):
        for shard in source.shards:
            name = shards.output(shard)
            with (folder / name).open("rb", buffering=0) as ours, source.open(shard) as theirs:
                header = header_of(theirs, shard)
                if not _same_bytes(ours, theirs, 0, header.data_start):
                    yield f"{name}: the header differs from that of the source"
                    continue
                progress.advance(header.data_start)
                for info in header.tensors.values():
                    tensor = edited.get(info.name)
                    if info.name in others:
                        continue
                    if tensor is None and info.name not in scales:
                        if not _same_bytes(ours, theirs, info.start, info.end):
                            yield f"{name}: tensor {info.name} differs from that of the source"
                    elif tensor:
                        with (
                            Stored(
                                lambda n: source.open(shards.source(n)), tensor, infos
                            ) as before,
                            Stored(_opener(folder), tensor, infos) as after,
                        ):
                            delta = deltas[tensor.name]
                            yield from _check_rounded(tensor, before, after, delta, nearest)
                    progress.advance(info.nbytes)


def _check_texts(
    folder: Path, manifest: Manifest, source: Source, shards: Shards, damaged: Mapping[str, str]
) -> Iterator[str]:
    """Check that patched files and the index follow from those of the source."""
    edit, plan = manifest.edit, read_plan(source)
    created = {t.name: prod(t.shape) * BITS.get(t.dtype, 0) // 8 for t in edit.created}
    try:
        texts = {name: patched_text(name, patch, source) for name, patch in edit.patches.items()}
        index = index_of(source, plan, shards, created)
    except CheckpointError as error:
        yield f"{MANIFEST}: {error}"
        return
    for name, text in [*texts.items(), (INDEX, index)]:
        whole = text is None or name in damaged or (folder / name).read_bytes() == text.encode()
        if not whole:
            yield f"{name}: is not that of the source with the recorded change"


def _check_rounded(
    tensor: EditedTensor, before: Stored, after: Stored, delta: Delta, nearest: bool
) -> Iterator[str]:
    """Compare an edited tensor with its original."""
    place, fp8 = f"{tensor.shard}: tensor {tensor.name}", tensor.requantized
    height = tensor.shape[tensor.axis]
    wrong, norms = check_rounded(after, before, delta, height, nearest=nearest)
    if before.digests != (tensor.sha256_before, fp8 and fp8.sha256_before):
        yield f"{place} was another one before the edit, by its sha256"
    if not isclose(norms["W"], tensor.norm, rel_tol=_CLOSE):
        yield f"{place} had another norm before the edit than recorded"
    whole = norms["W"] or 1.0
    found = {
        "relative_change": norms["change"] / whole, "rounding_error": norms["error"] / whole,
        **delta.measures(norms),
    }  # fmt: skip
    recorded = {
        "relative_change": tensor.relative_change, "rounding_error": tensor.rounding_error,
        **tensor.measures,
    }  # fmt: skip
    for key in sorted({*found, *recorded}):
        if key == "leakage" and delta.factor == 1:
            continue  # looked at without the source
        ours, theirs = found.get(key, nan), recorded.get(key, nan)
        if not isclose(ours, theirs, rel_tol=0.01, abs_tol=_SMALL):
            yield f"{place} has another {key} than recorded: {ours:.4g}"
    if wrong is not None:
        rows = f"rows {wrong[0]} to {wrong[1] - 1}"
        yield f"{place} is not the source's with the recorded edit: first in {rows}"


def _same_bytes(ours: RawIOBase, theirs: RawIOBase, start: int, end: int) -> bool:
    ours.seek(start)
    theirs.seek(start)
    while start < end:
        count = min(BUFFER, end - start)
        if read_exactly(ours, count, "our shard") != read_exactly(theirs, count, "the source's"):
            return False
        start += count
    return True
