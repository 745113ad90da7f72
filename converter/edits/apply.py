"""The change of each weight, as a change of bytes for ``safetensors.rewrite``."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import isfinite, sqrt

import torch
from torch import Tensor

from converter.checkpoints.safetensors.header import DTYPES, to_bytes
from converter.checkpoints.safetensors.rewrite import Change, Region
from converter.checkpoints.source import Source
from converter.checkpoints.weights import Weight
from converter.edits.deltas import Delta
from converter.edits.editor import Editor
from converter.edits.engine import Engine
from converter.edits.storage import column_blocks, dequantize, matrices, quantize, whole
from converter.errors import CheckpointError
from converter.manifest import EditedTensor, Lora, Requantized

_FP8_AIM = 1e-3
"""Aim of rounding to FP8: the largest share to leave along the subspace. Its steps are 16 times as
wide as those of bfloat16.
"""


@dataclass(slots=True)
class Changes:
    """The changes of the tensors of one shard, by name, and their records, once they are done."""

    tensors: dict[str, Change] = field(default_factory=dict)
    edits: list[EditedTensor] = field(default_factory=list)


def changes_of(source: Source, edits: Iterable["WeightEdit"]) -> dict[str, Changes]:
    """Shard file name -> its changes, of all shards of the source, which has all these weights."""
    found = {shard: Changes() for shard in source.shards}
    for edit in edits:
        weight, changes = edit.weight, found[edit.weight.shard]
        if weight.scales is None:
            changes.tensors[weight.info.name] = edit.change(changes.edits)
        else:
            new, scales = _quantized(source, edit, changes.edits)
            changes.tensors[weight.info.name] = new
            found[weight.scales.shard].tensors[weight.scales.info.name] = scales
    return found


@dataclass(frozen=True, slots=True)
class WeightEdit:
    """One weight and its change.

    Attributes:
        stored: field of the delta -> tensor of the edit's file.
    """

    weight: Weight
    delta: Delta
    stored: Mapping[str, str]
    engine: Engine

    def change(self, edits: list[EditedTensor]) -> Change:
        """A tensor of plain numbers, in blocks; however it is stored, it is matrices (O, I)."""
        info, axis, engine = self.weight.info, self.weight.axis, self.engine

        def change(region: Region) -> Iterator[memoryview]:
            before, after = hashlib.sha256(), hashlib.sha256()
            region.also_hash(before)
            editor = Editor(
                self.delta, info.shape[axis], DTYPES[info.dtype], engine.rounding, engine.device
            )
            for data in _edited(region, editor, self.weight):
                after.update(data)
                yield data
            digests = (before.hexdigest(), after.hexdigest())
            edits.append(self.record(editor.norms(), digests))

        return change

    def record(
        self,
        norms: Mapping[str, float],
        digests: tuple[str, str | None],
        requantized: Requantized | None = None,
        lora: Lora | None = None,
    ) -> EditedTensor:
        """The record of an edit, from ``editor.Editor.norms`` and the sha256 before and after.

        The second is None if the tensor itself stays as it is, with the edit in ``lora``.

        Raises:
            CheckpointError: the new tensor holds NaN or Inf.
        """
        weight, norm = self.weight, norms["W"] or 1.0
        change, measures = norms["change"] / norm, self.delta.measures(norms)
        if not all(map(isfinite, (change, *measures.values()))):
            raise CheckpointError(
                f"tensor {weight.info.name} overflows {weight.info.dtype} when it is edited"
            )
        return EditedTensor(
            name=weight.info.name,
            shard=weight.shard,
            layer=weight.layer,
            role=weight.recorded_role,
            axis=weight.axis,
            shape=weight.info.shape,
            dtype=weight.info.dtype,
            kind=self.delta.kind,
            tensors=dict(self.stored),
            sha256_before=digests[0],
            sha256_after=digests[1],
            norm=norms["W"],
            relative_change=change,
            rounding_error=norms["error"] / norm,
            measures=measures,
            requantized=requantized,
            lora=lora,
        )


def _edited(region: Region, editor: Editor, weight: Weight) -> Iterator[memoryview]:
    """The new bytes of a tensor, matrix by matrix."""
    try:
        for matrix in matrices(region, weight.axis, str(editor.U.device)):
            blocks = editor.edit(matrix.rows, matrix.width, matrix.first)
            if matrix.transposed:
                yield to_bytes(torch.cat(list(blocks)).T)
            else:
                yield from map(to_bytes, _downloaded(blocks))
    except ValueError as error:
        raise damaged(weight) from error


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


def damaged(weight: Weight) -> CheckpointError:
    return CheckpointError(
        f"tensor {weight.info.name} of {weight.shard} holds NaN or Inf",
        hint="the source is damaged; get an intact copy",
    )


def _quantized(source: Source, job: WeightEdit, edits: list[EditedTensor]) -> tuple[Change, Change]:
    """The change of an FP8 weight and of its scales.

    They are two tensors of the file, in any order and even in two shards. The one that comes first
    in the file reads the other. If the scales come first, the edit is computed twice.
    """
    held: list[Tensor] = []
    weight, place = job.weight, job.weight.scales
    assert place is not None

    def change(region: Region) -> Iterator[memoryview]:
        scale = source.read(place.shard, place.info)
        q, new_scale, edit = _edit_quantized(job, whole(region), scale)
        edits.append(edit)
        held.append(new_scale)
        yield to_bytes(q)

    def scales(region: Region) -> Iterator[memoryview]:
        scale = whole(region)
        if not held:
            q = source.read(weight.shard, weight.info)
            held.append(_edit_quantized(job, q, scale)[1])
        yield to_bytes(held.pop())

    return change, scales


def _edit_quantized(
    job: WeightEdit, q: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, EditedTensor]:
    """Edit a weight (O, I) in FP8 as a whole; it and its scales as they are to be stored."""
    place, device = job.weight.scales, job.engine.device
    assert place is not None
    W = dequantize(q.to(device), scale.to(device), place.block)
    work = job.delta.to(device, torch.float32)
    U = W.new_zeros(len(W), 0) if work.protects is None else work.protects
    P = U.T @ W
    norms = {"W": _norm(W), "P": _norm(P)}
    if not isfinite(norms["W"]):
        raise damaged(job.weight)
    a = work.factor
    exact = work.exact(W, slice(None), slice(None), P * a, torch.empty_like(W))
    new, new_scale = quantize(exact, scale.to(device), place.block, U, _FP8_AIM * a * norms["P"])
    after = dequantize(new, new_scale, place.block)
    norms |= {"change": _norm(after, W), "error": _norm(after, exact)}
    norms["left"] = _norm(U.T @ after - (1 - a) * P)
    new, new_scale = new.cpu(), new_scale.cpu()
    first, second = ((_sha256(a), _sha256(b)) for a, b in ((q, new), (scale, new_scale)))
    about = Requantized(
        scales=place.info.name, shard=place.shard, block=place.block,
        sha256_before=second[0], sha256_after=second[1],
    )  # fmt: skip
    return new, new_scale, job.record(norms, first, about)


_SUMMED = 1 << 17
"""Elements of a tensor that are held in float64 at a time."""


def _norm(x: Tensor, minus: Tensor | None = None) -> float:
    """||x||, or ||x - minus||, Frobenius, summed in float64 over blocks of columns of (O, I)."""
    total = 0.0
    for part in column_blocks(x, _SUMMED):
        block = x[:, part].double()
        if minus is not None:
            block = block - minus[:, part]
        total += float(block.square().sum())
    return sqrt(total)


def _sha256(tensor: Tensor) -> str:
    return hashlib.sha256(to_bytes(tensor)).hexdigest()
