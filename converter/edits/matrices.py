"""A tensor in a file as matrices (O, I), what it gives first, whatever its layout.

A Linear weight is one. A fused tensor of experts (E, O, I) is E of them. Where what it gives comes
last, as in a Conv1D weight and in a bias, every row of the file is a column of W, and so many of
them at a time are a matrix.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from math import prod

import torch
from torch import Tensor

from converter.checkpoints.safetensors.header import DTYPES, to_bytes
from converter.checkpoints.safetensors.rewrite import Region
from converter.edits.editor import STRIP, Rows


@dataclass(frozen=True, slots=True)
class Matrix:
    """Some of a tensor's numbers as a matrix.

    Attributes:
        rows: reads some of its rows, again each time.
        width: its columns.
        first: which column of W is the first of them.
        transposed: whether the file has it as (width, O).
    """

    rows: Rows
    width: int
    first: int
    transposed: bool


def matrices(region: Region, axis: int, device: str = "cpu") -> Iterator[Matrix]:
    """The matrices of a tensor, in order; the next one may be asked for when one was read.

    Args:
        region: of the tensor.
        axis: of what it gives.
        device: where the rows are wanted.
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
        yield Matrix(partial(_slice, W), W.shape[1], start, True)


def _slice(W: Tensor, start: int, stop: int) -> Tensor:
    return W[start:stop]


def _read(region: Region, dtype: torch.dtype, width: int, start: int, stop: int) -> Tensor:
    """Some rows of the file, (stop - start, width), until the region is read again."""
    row = width * dtype.itemsize
    data = region.read(start * row, (stop - start) * row)
    return torch.frombuffer(data, dtype=dtype).view(-1, width)


def _rows(region: Region, first: int, count: int, width: int, device: str) -> Rows:
    """Reads a matrix that begins at row ``first`` of the file, from disk each time.

    A GPU takes the matrix in as it is read and keeps it. The copies are asynchronous, from pinned
    memory: while one is under way, the next rows are read.
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
