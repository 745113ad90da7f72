"""The change of one weight, as data: a kind of change and its tensors.

W is (O, I) throughout: outputs first, however it is stored. A Conv1D weight is transposed on the
way in and out; a bias is (O, 1), and its input is 1. A kind does not depend on files, dtypes on
disk or blocks: ``edits.editor`` streams and rounds for all. A new one is a frozen dataclass here
whose fields are its tensors, and its name in ``KINDS``.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from math import nan, sqrt
from typing import ClassVar, Self

import torch
from torch import Tensor

from converter.checkpoints.safetensors.header import FLOATS


@dataclass(frozen=True, slots=True, eq=False)
class Delta(ABC):
    """The change of one weight W (O, I)."""

    kind: ClassVar[str]
    """Its name in the manifest."""

    @property
    def protects(self) -> Tensor | None:
        """U (O, R), orthonormal columns, if ``W' = W - a A (U^T W)`` with ``U^T A = I``.

        Rounding then spares U. None for all other kinds.
        """
        return None

    @property
    def written(self) -> Tensor | None:
        """A (O, R) of that formula: U itself, unless the projection is oblique."""
        return self.protects

    @property
    def factor(self) -> float:
        """a of that formula, 0 < a <= 1."""
        return 1.0

    def along(self, measures: Mapping[str, float]) -> float:
        """||U^T W|| / ||W|| for the U of ``protects``, from ``measures``; NaN if it is unknown."""
        return nan

    def moved(self, along: float) -> tuple[float, float]:
        """The least and the most that ||exact W' - W|| / ||W|| can be, for an ``along``."""
        return self.factor * along, self.factor * along

    @property
    def stored_as(self) -> torch.dtype | None:
        """The only dtype of weights that it fits; None if it fits any."""
        return None

    @abstractmethod
    def check(self, shape: tuple[int, int]) -> None:
        """Raise ValueError, saying why, unless its tensors fit a weight of this shape (O, I)."""

    def to(self, device: str, dtype: torch.dtype) -> Self:
        """The same on a device; what are no indices in the dtype of the computation."""
        moved = {
            name: tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)
            for name, tensor in tensors_of(self).items()
        }
        return replace(self, **moved)

    @abstractmethod
    def exact(
        self, W: Tensor, rows: slice, columns: slice, P: Tensor | None, out: Tensor
    ) -> Tensor:
        """Some rows and columns of W', not rounded.

        Args:
            W: these rows and columns, in the dtype of ``to``.
            rows, columns: which they are.
            P: a U^T W (R, columns) for the U of ``protects``, so that A P is removed; else None.
            out: where to write the result; it is returned. Not ``W`` itself.
        """

    def whole(self, W: Tensor) -> Tensor:
        """All of W' for all of W (O, I), in its dtype, computed in float64."""
        mine, wide = self.to(str(W.device), torch.float64), W.double()
        P = None if mine.protects is None else mine.protects.T @ wide * mine.factor
        rows, columns = (slice(0, size) for size in W.shape)
        return mine.exact(wide, rows, columns, P, torch.empty_like(wide)).to(W)

    def undone(self, W: Tensor, rows: slice, columns: slice) -> Tensor | None:
        """Some rows and columns of W, from those of W' as stored; None if that cannot be known."""
        return None

    @abstractmethod
    def shift(self, x: Tensor, y: Tensor, W: Tensor | None = None) -> Tensor:
        """The change of y = x W^T by the edit of the weight.

        Args:
            x: (..., I), in any dtype.
            y: (..., O), in any dtype, which is that of the result.
            W: (O, I) as the model runs it; None where several weights make y.
        """

    def low_rank(self, P: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """B (O, R) and A (R, I), so that ``W' = W + B A``; None if the change has no such form.

        P is U^T W (R, I) for the U of ``protects``; else None.
        """
        return None

    @abstractmethod
    def terms(self, rows: slice, columns: slice, norms: Tensor) -> Tensor:
        """A bound on the size of the terms that are added to W, (rows, columns) or broadcast to it.

        Args:
            rows, columns: of W, whose numbers are wanted.
            norms: (columns,) float64, the norm of each of these columns of the whole W.
        """

    def measures(self, norms: Mapping[str, float]) -> dict[str, float]:
        """Its own numbers for the record, from the norms of ``editor.Editor.norms``."""
        return {}


@dataclass(frozen=True, slots=True, eq=False)
class RemoveSubspace(Delta):
    """``W' = W - U (U^T W)``: the weight's output has nothing in the subspace any more.

    The O x O projector is never formed.

    Attributes:
        U: (O, R) float32 with orthonormal columns.
    """

    U: Tensor

    kind: ClassVar[str] = "remove-subspace"

    @property
    def protects(self) -> Tensor:
        return self.U

    @property
    def written(self) -> Tensor:
        return self.U

    def along(self, measures: Mapping[str, float]) -> float:
        energy = measures.get("energy_removed", nan)
        return sqrt(energy / (self.factor * (2 - self.factor))) if energy >= 0 else nan

    def check(self, shape: tuple[int, int]) -> None:
        _check("U", self.U, torch.float32, (shape[0], None))
        if not 0 < self.U.shape[1] <= shape[0]:
            raise ValueError(f"U has {self.U.shape[1]} columns and {shape[0]} rows")

    def exact(
        self, W: Tensor, rows: slice, columns: slice, P: Tensor | None, out: Tensor
    ) -> Tensor:
        assert P is not None
        torch.addmm(W, self.written[rows], P, alpha=-1, out=out)
        return out

    def shift(self, x: Tensor, y: Tensor, W: Tensor | None = None) -> Tensor:
        U, A = self.U.to(y.device), self.written.to(y.device)
        shift: Tensor = ((y.float() @ U) @ A.T * -self.factor).to(y.dtype)
        return shift

    def low_rank(self, P: Tensor | None) -> tuple[Tensor, Tensor]:
        assert P is not None
        return (self.written.double() * -self.factor).to(self.U.dtype), P

    def terms(self, rows: slice, columns: slice, norms: Tensor) -> Tensor:
        sizes: Tensor = self.written[rows].double().norm(dim=1)
        return sizes[:, None] * norms

    def measures(self, norms: Mapping[str, float]) -> dict[str, float]:
        """``energy_removed``: 1 - ||exact W'||^2 / ||W||^2, which is a (2 - a) times the share of W
        along U; ``leakage``: ||U^T W' - (1 - a) U^T W|| / ||U^T W||."""
        along, a = norms["P"], self.factor
        return {
            "energy_removed": a * (2 - a) * (along / (norms["W"] or 1.0)) ** 2,
            "leakage": norms["left"] / (along or 1.0),
        }


@dataclass(frozen=True, slots=True, eq=False)
class WeakenSubspace(RemoveSubspace):
    """``W' = W - a U (U^T W)``, 0 < a < 1: the weight's output along U is 1 - a times as large.

    Unlike a subspace that was taken out, one that was weakened can be restored from W' alone, to
    its rounding: ``W = W' + a / (1 - a) U (U^T W')``.

    Attributes:
        a: (1,) float64, the factor.
    """

    a: Tensor

    kind: ClassVar[str] = "weaken-subspace"

    @property
    def factor(self) -> float:
        return float(self.a)

    def check(self, shape: tuple[int, int]) -> None:
        RemoveSubspace.check(self, shape)
        _check("a", self.a, torch.float64, (1,))
        if not 0 < self.factor < 1:
            raise ValueError(f"a is {self.factor:g}, not between 0 and 1")

    def to(self, device: str, dtype: torch.dtype) -> "WeakenSubspace":
        return WeakenSubspace(self.U.to(device, dtype), self.a)  # a number, exact in any dtype

    def measures(self, norms: Mapping[str, float]) -> dict[str, float]:
        """Those of ``RemoveSubspace``, and ``factor``: a."""
        return RemoveSubspace.measures(self, norms) | {"factor": self.factor}


@dataclass(frozen=True, slots=True, eq=False)
class RemoveOblique(RemoveSubspace):
    """``W' = W - a A (U^T W)`` with ``U^T A = I``, 0 < a <= 1: the output along U is as for
    ``WeakenSubspace`` or ``RemoveSubspace``, but the change lies along A.

    For a weight before a norm that multiplies each of the D channels by another number, so that the
    least change behind the norm is not the least change before it.

    Attributes:
        A: (O, R) float32.
        a: (1,) float64, the factor.
    """

    A: Tensor
    a: Tensor

    kind: ClassVar[str] = "remove-oblique"

    @property
    def written(self) -> Tensor:
        return self.A

    @property
    def factor(self) -> float:
        return float(self.a)

    def check(self, shape: tuple[int, int]) -> None:
        RemoveSubspace.check(self, shape)
        _check("A", self.A, torch.float32, (shape[0], self.U.shape[1]))
        _check("a", self.a, torch.float64, (1,))
        if not 0 < self.factor <= 1:
            raise ValueError(f"a is {self.factor:g}, not over 0 and at most 1")
        off = float((self.U.double().T @ self.A.double()).fill_diagonal_(0.0).abs().max())
        ones = (self.U.double() * self.A.double()).sum(0)
        off = max(off, float((ones - 1).abs().max()))
        if not off <= _DUAL * float(self.A.double().norm(dim=0).max()):
            raise ValueError(f"U^T A is off by {off:.1e} from the identity")

    def to(self, device: str, dtype: torch.dtype) -> "RemoveOblique":
        return RemoveOblique(self.U.to(device, dtype), self.A.to(device, dtype), self.a)

    def along(self, measures: Mapping[str, float]) -> float:
        return measures.get("along", nan)

    def moved(self, along: float) -> tuple[float, float]:
        least, most = torch.linalg.svdvals(self.A.double())[[-1, 0]].tolist()
        return self.factor * along * least, self.factor * along * most

    def measures(self, norms: Mapping[str, float]) -> dict[str, float]:
        """``along``: ||U^T W|| / ||W||; ``leakage`` as of ``RemoveSubspace``; ``factor``: a."""
        return {
            "along": norms["P"] / (norms["W"] or 1.0),
            "leakage": norms["left"] / (norms["P"] or 1.0),
            "factor": self.factor,
        }


_DUAL = 1e-5
"""How far U^T A of ``RemoveOblique`` may be from the identity, for columns of A of length 1."""


def removal_of(U: Tensor, a: float) -> RemoveSubspace:
    """``W' = W - a U (U^T W)`` for U (O, R) float32 with orthonormal columns, 0 < a <= 1."""
    if a == 1:
        return RemoveSubspace(U)
    return WeakenSubspace(U, torch.tensor([a], dtype=torch.float64))


@dataclass(frozen=True, slots=True, eq=False)
class AddLowRank(Delta):
    """``W' = W + B A``: a LoRA that is merged, or an update of rank one.

    Attributes:
        B: (O, R) float32.
        A: (R, I) float32.
    """

    B: Tensor
    A: Tensor

    kind: ClassVar[str] = "add-low-rank"

    def check(self, shape: tuple[int, int]) -> None:
        _check("B", self.B, torch.float32, (shape[0], None))
        _check("A", self.A, torch.float32, (self.B.shape[1], shape[1]))
        if not self.B.shape[1]:
            raise ValueError("B has no columns")

    def exact(
        self, W: Tensor, rows: slice, columns: slice, P: Tensor | None, out: Tensor
    ) -> Tensor:
        torch.addmm(W, self.B[rows], self.A[:, columns], out=out)
        return out

    def shift(self, x: Tensor, y: Tensor, W: Tensor | None = None) -> Tensor:
        A, B = self.A.to(y.device), self.B.to(y.device)
        added: Tensor = ((x.float() @ A.T) @ B.T).to(y.dtype)
        return added

    def low_rank(self, P: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.B, self.A

    def terms(self, rows: slice, columns: slice, norms: Tensor) -> Tensor:
        B, A = self.B[rows].double(), self.A[:, columns].double()
        sizes: Tensor = B.norm(dim=1)[:, None] * A.norm(dim=0)
        return sizes


@dataclass(frozen=True, slots=True, eq=False)
class AddToRows(Delta):
    """``W'[r] = W[r] + v`` for the chosen rows r; the others stay as they are.

    Attributes:
        rows: (N,) int64, ascending, each once.
        v: (I,) float32.
    """

    rows: Tensor
    v: Tensor

    kind: ClassVar[str] = "add-to-rows"

    def check(self, shape: tuple[int, int]) -> None:
        _check("rows", self.rows, torch.int64, (None,))
        _check("v", self.v, torch.float32, (shape[1],))
        rows = self.rows
        if not len(rows) or rows[0] < 0 or rows[-1] >= shape[0] or bool((rows.diff() <= 0).any()):
            raise ValueError(f"rows are not ascending numbers from 0 to {shape[0] - 1}")

    def exact(
        self, W: Tensor, rows: slice, columns: slice, P: Tensor | None, out: Tensor
    ) -> Tensor:
        out.copy_(W)
        out[self._within(rows)] += self.v[columns]
        return out

    def shift(self, x: Tensor, y: Tensor, W: Tensor | None = None) -> Tensor:
        added = torch.zeros_like(y)
        along = (x.float() @ self.v.to(x.device)).to(y.dtype)
        added[..., self.rows.to(y.device)] = along[..., None]
        return added

    def terms(self, rows: slice, columns: slice, norms: Tensor) -> Tensor:
        return self.v[columns].double().abs()[None]

    def measures(self, norms: Mapping[str, float]) -> dict[str, float]:
        """``rows``: how many were changed."""
        return {"rows": float(len(self.rows))}

    def _within(self, rows: slice) -> Tensor:
        """The chosen rows among these, counted from the first of them."""
        first, last = rows.start or 0, rows.stop
        chosen = self.rows[self.rows >= first]
        return (chosen if last is None else chosen[chosen < last]) - first


@dataclass(frozen=True, slots=True, eq=False)
class Replace(Delta):
    """``W'`` is given: the result of training, for example.

    Attributes:
        new: W' (O, I), floating-point of 16 to 64 bits; it is rounded to that of the checkpoint.
    """

    new: Tensor

    kind: ClassVar[str] = "replace"

    def check(self, shape: tuple[int, int]) -> None:
        _check("new", self.new, None, shape)

    def to(self, device: str, dtype: torch.dtype) -> "Replace":
        return Replace(self.new.to(device))  # as large as the weight: converted block by block

    def exact(
        self, W: Tensor, rows: slice, columns: slice, P: Tensor | None, out: Tensor
    ) -> Tensor:
        return out.copy_(self.new[rows, columns])

    def shift(self, x: Tensor, y: Tensor, W: Tensor | None = None) -> Tensor:
        new = self.new.to(y.device)
        return (x.to(new.dtype) @ new.T).to(y.dtype) - y

    def terms(self, rows: slice, columns: slice, norms: Tensor) -> Tensor:
        return torch.zeros(1, 1, dtype=torch.float64)  # a copy has no arithmetic


@dataclass(frozen=True, slots=True, eq=False)
class AddBits(Delta):
    """``bits(W') = bits(W) + d`` modulo 2^16, or the power of the dtype: exact for all values.

    Half as large as a float32 change of a 16-bit weight. No arithmetic of floats is done, so every
    machine gives the same bytes, and W follows from W' as W' from W.

    Attributes:
        d: (O, I) integers as wide as the elements of W: int16, int32 or int64.
        like: (0,) in the dtype of W, which it tells.
    """

    d: Tensor
    like: Tensor

    kind: ClassVar[str] = "add-bits"

    @classmethod
    def between(cls, W: Tensor, new: Tensor) -> "AddBits":
        """The change from W (O, I), as stored, to ``new`` (O, I), rounded to nearest."""
        return cls((_bits(new.to(W.dtype)) - _bits(W)).contiguous(), W.new_empty(0))

    @property
    def stored_as(self) -> torch.dtype:
        return self.like.dtype

    def check(self, shape: tuple[int, int]) -> None:
        _check("like", self.like, None, (0,))
        _check("d", self.d, _INTEGERS[self.like.itemsize], shape)

    def to(self, device: str, dtype: torch.dtype) -> "AddBits":
        return AddBits(self.d.to(device), self.like.to(device))  # the dtype is what it says

    def after(self, W: Tensor) -> Tensor:
        """W' (O, I) in the dtype of ``like``, of W in one that holds its numbers."""
        return (_bits(W.to(self.like.dtype)) + self.d.to(W.device)).view(self.like.dtype)

    def exact(
        self, W: Tensor, rows: slice, columns: slice, P: Tensor | None, out: Tensor
    ) -> Tensor:
        return out.copy_(AddBits(self.d[rows, columns], self.like).after(W))

    def undone(self, W: Tensor, rows: slice, columns: slice) -> Tensor:
        return (_bits(W) - self.d[rows, columns]).view(self.like.dtype)

    def shift(self, x: Tensor, y: Tensor, W: Tensor | None = None) -> Tensor:
        assert W is not None
        return Replace(self.after(W).to(W.dtype)).shift(x, y)

    def terms(self, rows: slice, columns: slice, norms: Tensor) -> Tensor:
        return torch.zeros(1, 1, dtype=torch.float64)  # integers have no rounding errors


_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes of an element -> the integers that count its bit patterns, which wrap around."""


def _bits(W: Tensor) -> Tensor:
    return W.contiguous().view(_INTEGERS[W.itemsize])


KINDS: Mapping[str, type[Delta]] = {
    delta.kind: delta
    for delta in (
        RemoveSubspace, WeakenSubspace, RemoveOblique, AddLowRank, AddToRows, Replace, AddBits,
    )
}  # fmt: skip
"""The kinds there are, by their names in a manifest."""


def tensors_of(delta: Delta) -> dict[str, Tensor]:
    """The tensors that a delta takes, by the names of its fields; ``delta_of`` is the inverse."""
    return {field.name: getattr(delta, field.name) for field in fields(delta)}


def delta_of(kind: str, tensors: Mapping[str, Tensor]) -> Delta:
    """The delta of a kind with these tensors.

    Raises:
        ValueError: there is no such kind, or it takes other tensors.
    """
    if kind not in KINDS:
        raise ValueError(f"there is no kind of edit {kind[:80]}")
    wanted = [field.name for field in fields(KINDS[kind])]
    if sorted(wanted) != sorted(tensors):
        raise ValueError(f"{kind} takes the tensors {', '.join(wanted)}")
    return KINDS[kind](**tensors)


def is_dense(value: object) -> bool:
    """Whether this is a plain tensor: with data, dense, without gradients."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and not (value.is_meta or value.requires_grad)
    )


def misfit_of(delta: Delta, dtype: torch.dtype | None) -> str | None:
    """Why a change cannot be made to a weight of this dtype on disk, or None."""
    wanted = delta.stored_as
    if wanted is None or wanted == dtype:
        return None
    names = (str(d).removeprefix("torch.") for d in (wanted, dtype))
    return "it is for {}, and the weight is {}".format(*names)


def _check(
    name: str, tensor: Tensor, dtype: torch.dtype | None, shape: tuple[int | None, ...]
) -> None:
    """Raise ValueError unless a tensor has this dtype and shape (None: any) and plain numbers."""
    fits = tensor.ndim == len(shape) and all(
        want in (None, got) for want, got in zip(shape, tensor.shape, strict=True)
    )
    right = tensor.dtype in FLOATS.values() if dtype is None else tensor.dtype == dtype
    if not fits or not right:
        said = str(dtype or "floating-point of 16 to 64 bits").removeprefix("torch.")
        wanted = ["any" if want is None else want for want in shape]
        found = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        raise ValueError(f"{name} is {found}, not {said} {wanted}".replace("'", ""))
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{name} holds NaN or Inf")
