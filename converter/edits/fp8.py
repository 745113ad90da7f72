"""Weights stored in 8-bit floating point with scales; and schemes that cannot be edited, by name.

    W = q * s        q in FP8 (E4M3), s one scale for each tensor, row, or block of a weight

Such a weight is edited as W, and stored again with the same kind of scales. A scale stays as it is
unless a block has grown beyond what it can hold, so most of q stays as it is, too.
"""

from collections.abc import Sequence
from math import sqrt

import torch
from torch import Tensor

from converter.edits.editor import absorb_residual, neighbour

LARGEST = torch.finfo(torch.float8_e4m3fn).max
"""448: conversion of more than that gives NaN, not this."""

COLUMNS = 1 << 20
"""Elements of a weight that are rounded at a time."""

Block = Sequence[int]
"""Rows and columns that share a scale."""


def dequantize(q: Tensor, scale: Tensor, block: Block) -> Tensor:
    """W (D, F) float32 of q (D, F) in FP8 and its scales."""
    W = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    for part in slices(q):
        W[:, part] = q[:, part].float() * spread(scale, q.shape, block, part)
    return W


def slices(x: Tensor) -> list[slice]:
    """Columns of (D, F) in blocks, so that what is computed of each is small beside x."""
    width = max(COLUMNS // max(x.shape[0], 1), 1)
    return [slice(start, start + width) for start in range(0, x.shape[1], width)]


def spread(scale: Tensor, shape: Sequence[int], block: Block, part: slice = slice(None)) -> Tensor:
    """The scale of each element of some columns of (D, F), float32."""
    rows, columns = (
        torch.arange(n, device=scale.device) // size for n, size in zip(shape, block, strict=True)
    )
    grid = scale.float().reshape(-(-shape[0] // block[0]), -(-shape[1] // block[1]))
    return grid[rows[:, None], columns[part]]


def grown(W: Tensor, scale: Tensor, block: Block) -> Tensor:
    """The scales that W (D, F) needs: as they were, or larger where a block would overflow."""
    rows, columns = W.shape
    pad = (0, -columns % block[1], 0, -rows % block[0])
    padded = torch.nn.functional.pad(W, pad) if any(pad) else W
    grid = (padded.shape[0] // block[0], block[0], padded.shape[1] // block[1], block[1])
    blocks = padded.reshape(grid)
    needed = torch.maximum(blocks.amax((1, 3)), -blocks.amin((1, 3))) / LARGEST
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

    To round to nearest would undo much of an edit: W was on the grid before, the change of an
    element is mostly less than half a step of it, and what is lost is lost along U. So wherever
    that brings ``U^T W'`` of a column nearer to ``U^T W``, an element is rounded to its other
    neighbour, row after row, the rows that weigh most in U first, until the difference of all
    columns together is no more than ``tolerance`` (Frobenius); see ``editor.absorb_residual``.

    Returns:
        q (D, F) in FP8, and its scales, with their dtype and shape.
    """
    new_scale = grown(W, scale, block)
    q = torch.empty(W.shape, dtype=torch.float8_e4m3fn, device=W.device)
    parts, wide = slices(W), U.double()
    for part in parts:
        step = spread(new_scale, W.shape, block, part)
        exact = torch.where(step > 0, W[:, part] / step, 0.0).clamp(-LARGEST, LARGEST)
        nearest = exact.to(q.dtype)
        other = neighbour(nearest, exact)
        left = wide.T @ ((nearest.float() - exact) * step).double()
        change = ((other.float() - nearest.float()) * step).double()
        moved = absorb_residual(left, wide, change, tolerance / sqrt(len(parts)))
        q[:, part] = torch.where(moved, other.float(), nearest.float()).to(q.dtype)
    return q, new_scale
