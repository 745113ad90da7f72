"""Read stored weights as matrices (O, I), for every layout, and FP8 weights with scales.

W is (O, I): outputs first. A Linear weight is one such matrix; a fused tensor of experts (E, O, I)
is E of them. If outputs come last, as in a Conv1D weight and in a bias, every row of the file is a
column of W, and a block of them is a matrix.

    W = q * s        q in FP8 (E4M3), s one scale for each tensor, row, or block of a weight

An FP8 weight is edited as W, and stored again with the same kind of scales. A scale only changes if
its block has grown beyond its range, so most of q does not change, either.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod, sqrt

import torch
from torch import Tensor

from converter.checkpoints.safetensors.header import DTYPES, TensorInfo, to_bytes
from converter.checkpoints.safetensors.rewrite import Region, as_tensor
from converter.checkpoints.weights import Weight
from converter.edits.editor import STRIP, Rows, absorb_residual, neighbour


def read_weight(read: Callable[[str, TensorInfo], Tensor], weight: Weight) -> Tensor:
    """W (O, I) float32 of a weight, however it is stored; a bias is (O, 1).

    ``read`` returns a tensor of a shard, as stored.
    """
    stored, scales = read(weight.shard, weight.info), weight.scales
    if scales is not None:
        stored = dequantize(stored, read(scales.shard, scales.info), scales.block)
    return stored.movedim(weight.axis, 0).reshape(weight.info.shape[weight.axis], -1).float()


@dataclass(frozen=True, slots=True)
class Matrix:
    """A part of a tensor as a matrix.

    Attributes:
        rows: reads rows, each time anew.
        width: its columns.
        first: the column of W that is its first.
        transposed: whether the file has it as (width, O).
    """

    rows: Rows
    width: int
    first: int
    transposed: bool

    @classmethod
    def of(cls, W: Tensor, first: int = 0, transposed: bool = False) -> "Matrix":
        """A region in memory."""
        return cls(lambda i, j: W[i:j], W.shape[1], first, transposed)


def matrices(region: Region, axis: int, device: str = "cpu") -> Iterator[Matrix]:
    """The matrices of a tensor, in order; read each before asking for the next.

    ``axis`` is that of the outputs; the rows are needed on ``device``.
    """
    shape, dtype = region.info.shape, DTYPES[region.info.dtype]
    before, width = prod(shape[:axis]), prod(shape[axis + 1 :])
    if width > 1:
        for number in range(before):
            yield Matrix(
                _rows(region, number * shape[axis], shape[axis], width, device), width, 0, False
            )
        return
    count = max(2 * STRIP // shape[axis], 1)
    for start in range(0, before, count):
        W = _read(region, dtype, shape[axis], start, min(start + count, before)).T.to(device)
        yield Matrix.of(W, start, True)


def _read(region: Region, dtype: torch.dtype, width: int, start: int, stop: int) -> Tensor:
    """Some rows of the file, (stop - start, width), until the region is read again."""
    row = width * dtype.itemsize
    data = region.read(start * row, (stop - start) * row)
    return torch.frombuffer(data, dtype=dtype).view(-1, width)


def _rows(region: Region, first: int, count: int, width: int, device: str) -> Rows:
    """Reads a matrix that begins at row ``first`` of the file, from disk each time.

    On a GPU the matrix is copied while it is read, and kept. The copies are asynchronous, from
    pinned memory: during a copy, the next rows are read.
    """
    dtype = DTYPES[region.info.dtype]
    if device == "cpu":
        return lambda i, j: _read(region, dtype, width, first + i, first + j)
    W = torch.empty(count, width, dtype=dtype, device=device)
    known = 0

    def rows(i: int, j: int) -> Tensor:
        nonlocal known
        if j > known:
            pinned = torch.empty(j - i, width, dtype=dtype, pin_memory=True)
            region.read_into(to_bytes(pinned), (first + i) * width * dtype.itemsize)
            W[i:j].copy_(pinned, non_blocking=True)
            known = j
        return W[i:j]

    return rows


def whole(region: Region) -> Tensor:
    """A tensor that is held as a whole, as stored, until the region is read again."""
    return as_tensor(region.read(0, region.info.nbytes), region.info)


_LARGEST = torch.finfo(torch.float8_e4m3fn).max
"""448: conversion of more than that gives NaN, not this."""

_QUANTIZED = 1 << 20
"""Elements of a weight that are rounded to FP8 at a time."""

Block = Sequence[int]
"""Rows and columns that share a scale."""


def column_blocks(x: Tensor, elements: int) -> list[slice]:
    """Blocks of columns of (D, F), small enough for the memory of intermediate results."""
    width = max(elements // max(x.shape[0], 1), 1)
    return [slice(start, start + width) for start in range(0, x.shape[1], width)]


def dequantize(q: Tensor, scale: Tensor, block: Block) -> Tensor:
    """W (D, F) float32 of q (D, F) in FP8 and its scales."""
    W = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    for part in column_blocks(q, _QUANTIZED):
        W[:, part] = q[:, part].float() * spread(scale, q.shape, block, part)
    return W


def spread(scale: Tensor, shape: Sequence[int], block: Block, part: slice = slice(None)) -> Tensor:
    """The scale of each element of some columns of (D, F), float32."""
    rows, columns = (
        torch.arange(n, device=scale.device) // size for n, size in zip(shape, block, strict=True)
    )
    grid = scale.float().reshape(-(-shape[0] // block[0]), -(-shape[1] // block[1]))
    return grid[rows[:, None], columns[part]]


def grown(W: Tensor, scale: Tensor, block: Block) -> Tensor:
    """The scales that W (D, F) needs: the old ones, or larger ones if a block would overflow."""
    rows, columns = W.shape
    pad = (0, -columns % block[1], 0, -rows % block[0])
    padded = torch.nn.functional.pad(W, pad) if any(pad) else W
    grid = (padded.shape[0] // block[0], block[0], padded.shape[1] // block[1], block[1])
    blocks = padded.reshape(grid)
    needed = torch.maximum(blocks.amax((1, 3)), -blocks.amin((1, 3))) / _LARGEST
    larger = needed.to(scale.dtype)
    larger = torch.where(
        larger.float() < needed, torch.nextafter(larger, torch.full_like(larger, torch.inf)), larger
    )
    old = scale.reshape(needed.shape)
    return torch.where(needed > old.float(), larger, old).reshape(scale.shape)


def quantize(
    W: Tensor, scale: Tensor, block: Block, U: Tensor, tolerance: float
) -> tuple[Tensor, Tensor]:
    """Store W (D, F) float32 again, so that little is left along U (D, R).

    Rounding to nearest would undo much of an edit: W was on the grid before, the change of an
    element is mostly less than half a step, and the loss is along U. So an element is rounded to
    its other neighbour if that brings ``U^T W'`` of its column nearer to ``U^T W``. This goes row
    by row, with the heaviest rows of U first, until the difference of all columns together is at
    most ``tolerance`` (Frobenius); see ``editor.absorb_residual``.

    Returns:
        q (D, F) in FP8, and its scales, with their dtype and shape.
    """
    new_scale = grown(W, scale, block)
    q = torch.empty(W.shape, dtype=torch.float8_e4m3fn, device=W.device)
    parts, wide = column_blocks(W, _QUANTIZED), U.double()
    for part in parts:
        step = spread(new_scale, W.shape, block, part)
        exact = torch.where(step > 0, W[:, part] / step, 0.0).clamp(-_LARGEST, _LARGEST)
        nearest = exact.to(q.dtype)
        other = neighbour(nearest, exact)
        left = wide.T @ ((nearest.float() - exact) * step).double()
        change = ((other.float() - nearest.float()) * step).double()
        moved = absorb_residual(left, wide, change, tolerance / sqrt(len(parts)))
        q[:, part] = torch.where(moved, other.float(), nearest.float()).to(q.dtype)
    return q, new_scale
