"""Edit a matrix in blocks of rows, by any kind of edit, and round it to its dtype.

    W' = round(exact(W))           W (O, I)

An edit that takes a subspace out passes over the rows of W twice, for P and for W':

    W' = round(W - A P),   P = a U^T W      U (O, R) orthonormal, P (R, I), 0 < a <= 1
                                            A = U, or another A (O, R) with U^T A = I

Memory is a few (R, I) and one block of rows, for any O. All of it is float64, so that two BLAS
libraries, which add in another order, give the same bytes.

**Rounding.** With a subspace, rounding to nearest leaves ``L = U^T (W' - (W - A P))``, about 1.7e-3
of P in bfloat16, and more where corrections are smaller than half a unit in the last place and are
lost together. L is known block after block, so the blocks that follow make up for it, as in noise
shaping: from row i is taken ``U_i G^-1 L`` before it is rounded, with G the Gram matrix of the rows
of U still to come. That is the smallest change of these rows that makes L vanish. The last block,
and rows that hold much of U, go further: one row after the other is rounded to the other neighbour
wherever that makes a column of L smaller. What is taken from an element is at most a quarter of a
machine epsilon of the root mean square of its column, so it ends up no further from the exact one
than that and one unit in the last place, where rounding to nearest allows half a unit.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import isfinite, isnan, sqrt
from typing import Literal

import torch
from torch import Tensor

from converter.edits.deltas import Delta

Rounding = Literal["nearest", "null-space"]

BLOCK = 64
"""Rows of a block; this many are also rounded one by one at the end. More would make L larger in
between, fewer would make matrix products slow.
"""

AIM = 1e-4
"""The aim of rounding for ||L|| / ||P||: a sixteenth of what rounding to nearest leaves."""

_HEAVY = 4.0
"""A row of U is heavy if its weight is this many times the mean."""

_CHECKED = 32
"""Rows after which it is asked whether ``AIM`` is reached."""

STRIP = 1 << 18
"""Elements that are computed on at a time on the CPU. More would leave its caches, with fewer the
threads that edit other shards wait for each other: each operation takes the interpreter's lock."""

_DEVICE_STRIP = 1 << 25
"""The same on a GPU, where launching a kernel costs more than reading memory."""

PUSH = 0.25
"""The most that is taken from an element, in machine epsilons of its column's root mean square. An
eighth is too little at rank 1 and width 16,384, where corrections are tiny."""

_RIDGE = 1e-3
"""Share of its mean eigenvalue that is added to G, which may be singular near the end."""

Rows = Callable[[int, int], Tensor]
"""Gives rows i to j of a matrix, (j - i, I), as stored, on the device of the computation."""


class Editor:
    """Edits the matrices of one tensor and measures what happens to it.

    Args:
        delta: the change of W (O, I).
        height: O.
        dtype: as stored, of 16 to 64 bits.
        rounding: ``null-space`` changes how bfloat16 and float16 are rounded where a subspace is
            taken out; the wider dtypes leave 1e-7 along U as they are.
        device: of the computation.
    """

    def __init__(
        self, delta: Delta, height: int, dtype: torch.dtype, rounding: Rounding, device: str
    ) -> None:
        basis = delta.protects
        host = torch.zeros(height, 0) if basis is None else basis
        host = host.to("cpu", torch.float64)
        self.U = host.to(device)
        self.delta, self.dtype = delta.to(device, torch.float64), dtype
        oblique = None if delta.written is basis else self.delta.written
        self.A = self.U if oblique is None else oblique
        self.removes = basis is not None
        self.feedback = self.removes and rounding == "null-space" and dtype.itemsize == 2
        self.strip = STRIP if device == "cpu" else _DEVICE_STRIP
        weights = host.square().sum(1)
        self.heavy = weights > _HEAVY * weights.mean() if self.feedback else weights < 0
        blocks = list(self._blocks()) if self.removes else []
        self.inverses = inverses(host, blocks).to(device) if blocks else ()
        self.squares = {
            name: torch.zeros((), dtype=torch.float64, device=device)
            for name in ("W", "P", "error", "left", "change")
        }

    def edit(self, rows: Rows, width: int, first: int = 0) -> Iterator[Tensor]:
        """Edit one matrix (O, I): gives its new rows, in order, as they are stored.

        Args:
            rows: reads it; asked for all of it once, or twice if a subspace is taken out, in order,
                ``BLOCK`` rows at a time at most.
            width: columns of the matrix: I, or some of them.
            first: which column of W is the first of them.

        Raises:
            ValueError: W holds NaN or Inf.
        """
        scratch = self._scratch(width, 2)
        if not self.removes:
            for block in self._blocks():
                yield self._nearest(rows(block.start, block.stop), block, first, scratch)
            self._check_finite()
            return
        before = self.squares["change"].clone()
        P, squares = self._first_pass(rows, width, scratch[0])
        self.squares["P"] += P.square().sum()
        P *= self.delta.factor
        sums = _Sums(P, torch.zeros_like(P), None if self.A is self.U else torch.zeros_like(P))
        limit = PUSH * torch.finfo(self.dtype).eps * squares.div_(len(self.U)).sqrt_()
        for inverse, block in zip(self.inverses, self._blocks(), strict=True):
            push = None
            if self.feedback and block.start:
                push = self._push(inverse @ sums.left, block, limit)
            yield self._removed(rows(block.start, block.stop), block, sums, push, scratch)
        written, left = self.U.T @ self.A @ P, sums.left
        self.squares["left"] += (left + P - written).square().sum()
        change = self.squares["change"] - before
        if sums.along is None:
            self.squares["error"] += change + 2 * (P * left).sum() - (P * written).sum()
        else:
            both = sums.along.mul_(2).add_(self.A.T @ self.A @ P)
            self.squares["error"] += change + (P * both).sum()

    def coordinates(self, rows: Rows, width: int) -> Tensor:
        """U^T W of one matrix (O, I), (R, I) float64, in one pass.

        Without a subspace (0, I). Args and Raises: as ``edit``.
        """
        return self._first_pass(rows, width, self._scratch(width, 1)[0])[0]

    def norms(self) -> dict[str, float]:
        """Frobenius norms over all matrices: of W, U^T W (``P``), W' - W (``change``) and two more.

        ``error`` is that of E = W' - exact(W), whose square is ``||W' - W||^2 + 2 <P, U^T E> - ||U
        P||^2`` where a subspace is taken out, and ``||W' - W||^2 + <P, 2 A^T (W' - W) + A^T A P>``
        where the projection is oblique. ``left`` is that of U^T W' - (1 - a) U^T W.
        """
        sums = {name: float(value) for name, value in self.squares.items()}
        return {name: x if isnan(x) else sqrt(max(x, 0.0)) for name, x in sums.items()}

    def _blocks(self) -> Iterator[slice]:
        """The rows in blocks; if one is short, it is the first."""
        count = len(self.U)
        stops = range(count % BLOCK or BLOCK, count + 1, BLOCK)
        return (slice(max(stop - BLOCK, 0), stop) for stop in stops)

    def _scratch(self, width: int, count: int) -> Tensor:
        return self.U.new_empty(count, max(min(self.strip, BLOCK * width), BLOCK))

    def _first_pass(self, rows: Rows, width: int, scratch: Tensor) -> tuple[Tensor, Tensor]:
        """U^T W (R, I), and of each column of W the sum of squares (I,); adds to ``squares``."""
        P = torch.zeros(self.U.shape[1], width, dtype=torch.float64, device=self.U.device)
        squares = torch.zeros(width, dtype=torch.float64, device=self.U.device)
        for block in self._blocks():
            stored = rows(block.start, block.stop)
            for part in self._strips(len(stored), width):
                W = _shaped(scratch, stored[:, part])
                P[:, part].addmm_(self.U[block].T, W)
                squares[part].add_(W.square_().sum(0))
        self.squares["W"] += squares.sum()
        self._check_finite()
        return P, squares

    def _check_finite(self) -> None:
        if not isfinite(float(self.squares["W"])):
            raise ValueError

    def _nearest(self, stored: Tensor, block: slice, first: int, scratch: Tensor) -> Tensor:
        """Some rows, edited, each element rounded to nearest."""
        new = torch.empty_like(stored)
        for part in self._strips(len(stored), stored.shape[1]):
            W = _shaped(scratch[0], stored[:, part])
            columns = slice(first + part.start, first + part.stop)
            exact = self.delta.exact(W, block, columns, None, _shaped(scratch[1], W, False))
            rounded = new[:, part].copy_(exact)
            self.squares["W"] += torch.dot(W.flatten(), W.flatten())
            error, change = exact.sub_(rounded).flatten(), W.sub_(rounded).flatten()
            self.squares["error"] += torch.dot(error, error)
            self.squares["change"] += torch.dot(change, change)
        return new

    def _removed(
        self, stored: Tensor, block: slice, sums: "_Sums", push: Tensor | None, scratch: Tensor
    ) -> Tensor:
        """Some rows, minus ``A_i P + U_i push``, rounded; adds the remainder to ``sums``.

        All stands for the columns that the matrix has, whichever of W's they are.
        """
        new = torch.empty_like(stored)
        U, A, P, settled = self.U[block], self.A[block], sums.P, self._settled(block)
        sums.left.addmm_(U.T @ A, P)
        if push is not None and sums.along is None:
            P, push = push.add_(P), None
        for part in self._strips(len(stored), len(P[0])):
            W = _shaped(scratch[0], stored[:, part])
            aim = self.delta.exact(W, block, part, P[:, part], _shaped(scratch[1], W, False))
            if push is not None:
                aim.addmm_(U, push[:, part], alpha=-1)
            rounded = new[:, part].copy_(aim)
            if settled is not None:
                nearest = rounded[settled]
                other = neighbour(nearest, aim[settled])
            change = aim.copy_(rounded).sub_(W)
            L = sums.left[:, part].addmm_(U.T, change)
            if settled is not None:
                step = _shaped(scratch[0], other).sub_(nearest)
                aimed = AIM * float(sums.P[:, part].norm())
                moved = absorb_residual(L, U[settled], step, aimed)
                rounded[settled] = torch.where(moved, other, nearest)
                change[settled] += step.mul_(moved)
            if sums.along is not None:
                sums.along[:, part].addmm_(A.T, change)
            self.squares["change"] += torch.dot(change.flatten(), change.flatten())
        return new

    def _settled(self, block: slice) -> Tensor | slice | None:
        """The rows of a block that are rounded one by one: the heavy ones, and all of the last
        block.
        """
        if self.feedback and block.stop == len(self.U):
            return slice(None)
        heavy = self.heavy[block].nonzero()[:, 0]
        return heavy.to(self.U.device) if len(heavy) else None

    def _push(self, push: Tensor, block: slice, limit: Tensor) -> Tensor:
        """G^-1 L (R, I), each column cut down to what moves the block's rows by (I,) at most."""
        moved = push.square().sum(0).sqrt_() * self.U[block].norm(dim=1).max()
        return push.mul_(torch.where(moved > limit, limit / moved, 1.0))

    def _strips(self, height: int, width: int) -> Iterator[slice]:
        size = max(self.strip // max(height, 1), 1)
        return (slice(start, min(start + size, width)) for start in range(0, width, size))


@dataclass(frozen=True, slots=True)
class _Sums:
    """The sums along the subspace during the edit of a matrix W (O, I), float64.

    Attributes:
        P: (R, I), a U^T W.
        left: (R, I), U^T E of the rows that are done.
        along: (R, I), A^T (W' - W) of these rows; None where A is U.
    """

    P: Tensor
    left: Tensor
    along: Tensor | None


def _shaped(scratch: Tensor, like: Tensor, filled: bool = True) -> Tensor:
    """The beginning of ``scratch`` as a matrix like this one, with its numbers if ``filled``."""
    matrix = scratch[: like.numel()].view(like.shape)
    return matrix.copy_(like) if filled else matrix


def inverses(U: Tensor, blocks: list[slice]) -> Tensor:
    """The inverse Gram matrices of each block of rows of U (O, R) with all that follow, (n, R, R).

    U is float64, on the CPU. What is nearly singular, as near the end, is regularised (``_RIDGE``).
    """
    grams = torch.stack([U[block].T @ U[block] for block in blocks]).flip(0).cumsum(0).flip(0)
    ridge = grams.diagonal(dim1=1, dim2=2).mean(1) * _RIDGE + torch.finfo(U.dtype).tiny
    grams += ridge[:, None, None] * torch.eye(U.shape[1], dtype=U.dtype)
    inverted: Tensor = torch.linalg.inv(grams)
    return inverted


def absorb_residual(left: Tensor, U: Tensor, step: Tensor, aim: float) -> Tensor:
    """Where to take a step, so that ``left + U^T (taken steps)`` becomes small.

    One row after the other, those that weigh most in U first; a step is taken if it makes the norm
    of its column of ``left`` smaller: with l the column, u the row of U and s the step,
    ``|l + u s|^2 < |l|^2``, that is ``2 s (u l) + s^2 |u|^2 < 0``.

    Args:
        left: (R, I) float64; changed in place.
        U: (n, R) float64.
        step: (n, I) float64; 0 where there is none to take.
        aim: stop when the norm of ``left`` is no larger.

    Returns:
        (n, I) bool: the steps taken.
    """
    taken = torch.zeros(step.shape, dtype=torch.bool, device=step.device)
    weights = U.square().sum(1)
    steps, places, columns = step.unbind(), taken.unbind(), U.unbind()
    halves = weights.div(2).tolist()
    for count, row in enumerate(weights.argsort(descending=True, stable=True).tolist()):
        if count % _CHECKED == 0 and float(left.norm()) <= aim:
            break
        product = (columns[row] @ left).add_(steps[row], alpha=halves[row]).mul_(steps[row])
        torch.lt(product, 0, out=places[row])
        left.addr_(columns[row], steps[row] * places[row])
    return taken


def neighbour(rounded: Tensor, exact: Tensor) -> Tensor:
    """The value next to ``rounded`` in its dtype, on the other side of ``exact``.

    Args:
        rounded: in a floating-point dtype of 8 or 16 bits whose bits count its values in order of
            size, sign apart, as those of bfloat16, float16 and float8_e4m3fn do.
        exact: in a wider one.

    Returns:
        ``rounded`` itself where it is exact, or where the other side is beyond the largest number.
    """
    bits = rounded.view({1: torch.uint8, 2: torch.int16}[rounded.dtype.itemsize])
    error = rounded.to(exact.dtype).sub_(exact)
    outward = (error < 0) ^ exact.signbit()  # so the other side is further from zero
    found = torch.where(outward, bits + 1, bits - 1)
    usable = (error != 0) & found.view(rounded.dtype).float().isfinite()
    return torch.where(usable, found, bits).view(rounded.dtype)
