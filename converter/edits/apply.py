"""What becomes of each target, as a change of bytes; ``shards.rewrite`` carries it out."""

import hashlib
from collections.abc import Iterator, Mapping
from math import isfinite

import torch
from torch import Tensor

from converter.checkpoints.safetensors.header import DTYPES, to_bytes
from converter.checkpoints.safetensors.rewrite import Change, Region, as_tensor
from converter.checkpoints.source import Source
from converter.checkpoints.weights import Weight
from converter.edits.base import Edit, EditRecord, Requantized, norm_of
from converter.edits.engine import Engine
from converter.edits.fp8 import dequantize, quantize
from converter.edits.matrices import matrices
from converter.edits.projection import Projector
from converter.errors import CheckpointError

FP8_AIM = 1e-3
"""Share of what was along the subspace that rounding a weight to FP8 aims to leave there, at most;
its steps are 16 times as wide as those of bfloat16."""

Changes = Mapping[str, Mapping[str, Change]]
"""Shard file name -> tensor name -> what becomes of it."""


def changes_of(
    source: Source,
    edit: Edit,
    targets: tuple[Weight, ...],
    engine: Engine,
    records: list[EditRecord],
) -> Changes:
    """The changes of all targets; each adds to ``records`` what it did."""
    found: dict[str, dict[str, Change]] = {shard: {} for shard in source.shards}
    for target in targets:
        basis = edit.basis(target)
        if basis is None:
            raise CheckpointError(f"the edit does not know tensor {target.info.name}")
        if target.scales is None:
            found[target.shard][target.info.name] = change_of(target, basis, engine, records)
        else:
            weight, scales = _quantized(source, target, basis, engine.device, records)
            found[target.shard][target.info.name] = weight
            found[target.scales.shard][target.scales.info.name] = scales
    return found


def change_of(target: Weight, basis: Tensor, engine: Engine, records: list[EditRecord]) -> Change:
    """A tensor of plain numbers, in blocks; however it is stored, it is matrices (D, F)."""

    def change(region: Region) -> Iterator[memoryview]:
        before, after = hashlib.sha256(), hashlib.sha256()
        region.also_hash(before)
        projector = Projector(basis, DTYPES[target.info.dtype], engine.rounding, engine.device)
        for data in _projected(region, projector, target):
            after.update(data)
            yield data
        digests = (before.hexdigest(), after.hexdigest())
        records.append(_finite(EditRecord.of(target, projector.norms(), digests)))

    return change


def _projected(region: Region, projector: Projector, target: Weight) -> Iterator[memoryview]:
    """The new bytes of a tensor, a matrix after the other."""
    try:
        for matrix in matrices(region, target.axis, str(projector.U.device)):
            blocks = projector.project(matrix.rows, matrix.width)
            if matrix.transposed:
                yield to_bytes(torch.cat(list(blocks)).T)
            else:
                yield from map(to_bytes, _downloaded(blocks))
    except ValueError as error:
        raise _damaged(target) from error


def _downloaded(blocks: Iterator[Tensor]) -> Iterator[Tensor]:
    """Tensors on the CPU; one that comes from a GPU is copied while the next is computed."""
    waiting: tuple[Tensor, torch.cuda.Event] | None = None
    for block in blocks:
        if block.device.type == "cpu":
            yield block
            continue
        pinned = torch.empty(block.shape, dtype=block.dtype, pin_memory=True)
        pinned.copy_(block, non_blocking=True)
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record()
        if waiting:
            waiting[1].synchronize()
            yield waiting[0]
        waiting = pinned, copied
    if waiting:
        waiting[1].synchronize()
        yield waiting[0]


def _finite(record: EditRecord) -> EditRecord:
    """The record itself. Raises CheckpointError if the new tensor holds NaN or Inf."""
    if isfinite(record.leakage) and isfinite(record.relative_change):
        return record
    raise CheckpointError(f"tensor {record.name} overflows {record.dtype} when it is edited")


def _damaged(target: Weight) -> CheckpointError:
    return CheckpointError(
        f"tensor {target.info.name} of {target.shard} holds NaN or Inf",
        hint="the source is damaged; get an intact copy",
    )


def _quantized(
    source: Source, target: Weight, basis: Tensor, device: str, records: list[EditRecord]
) -> tuple[Change, Change]:
    """What becomes of a weight in FP8 and of its scales.

    They are two tensors of the file, in any order and even in two shards. Whichever is met first
    reads the other; if that is the scales, the edit is computed twice.
    """
    held: list[Tensor] = []
    place = target.scales
    assert place is not None

    def weight(region: Region) -> Iterator[memoryview]:
        scale = source.read(place.shard, place.info)
        q, new_scale, record = _edit_quantized(target, _whole(region), scale, basis, device)
        records.append(record)
        held.append(new_scale)
        yield to_bytes(q)

    def scales(region: Region) -> Iterator[memoryview]:
        scale = _whole(region)
        if not held:
            q = source.read(target.shard, target.info)
            held.append(_edit_quantized(target, q, scale, basis, device)[1])
        yield to_bytes(held.pop())

    return weight, scales


def _whole(region: Region) -> Tensor:
    return as_tensor(region.read(0, region.info.nbytes), region.info)


def _edit_quantized(
    target: Weight, q: Tensor, scale: Tensor, basis: Tensor, device: str
) -> tuple[Tensor, Tensor, EditRecord]:
    """Edit a weight (D, F) in FP8 as a whole; it and its scales as they are to be stored."""
    place = target.scales
    assert place is not None
    U = basis.to(device)
    W = dequantize(q.to(device), scale.to(device), place.block)
    P = U.T @ W
    norms = {"W": norm_of(W), "P": norm_of(P)}
    if not isfinite(norms["W"]):
        raise _damaged(target)
    exact = torch.addmm(W, U, P, alpha=-1)
    new, new_scale = quantize(exact, scale.to(device), place.block, U, FP8_AIM * norms["P"])
    after = dequantize(new, new_scale, place.block)
    norms |= {"change": norm_of(after, W), "error": norm_of(after, exact)}
    norms["left"] = norm_of(U.T @ after)
    new, new_scale = new.cpu(), new_scale.cpu()
    first, second = ((_sha256(a), _sha256(b)) for a, b in ((q, new), (scale, new_scale)))
    about = Requantized(place.info.name, place.shard, place.block, *second)
    return new, new_scale, _finite(EditRecord.of(target, norms, first, about))


def _sha256(tensor: Tensor) -> str:
    return hashlib.sha256(to_bytes(tensor)).hexdigest()
