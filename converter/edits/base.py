"""An edit of a checkpoint as data."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from converter.checkpoints.plan import Plan
from converter.checkpoints.safetensors.header import to_bytes
from converter.checkpoints.weights import Weight
from converter.edits.deltas import (
    KINDS,
    Delta,
    RemoveSubspace,
    is_dense,
    misfit_of,
    tensors_of,
)
from converter.errors import CheckpointError, FitError
from converter.runtime import strict_json

Patch = Mapping[str, Any] | str
"""The change of a text file: an RFC 7396 merge patch of a JSON object, or text put in front of any
other file.
"""

FAULT = "it is a fault of the method"
"""The hint about an edit that makes no sense."""


@dataclass(frozen=True, slots=True)
class Edit:
    """All changes of a method to a checkpoint; how they are written is not part of it.

    Attributes:
        tensors: name on disk -> its change.
        created: name -> a tensor that the source lacks; it is stored in its own dtype.
        patches: file of the source -> the change of its text.
        files: path -> content of a file that the source lacks.

    Raises:
        FitError: a part of it has the wrong type.
    """

    tensors: Mapping[str, Delta] = field(default_factory=dict)
    created: Mapping[str, Tensor] = field(default_factory=dict)
    patches: Mapping[str, Patch] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_table("tensors of an edit", self.tensors, _is_delta, "changes of plain tensors")
        dense = "plain tensors: dense, without gradients"
        _check_table("created of an edit", self.created, is_dense, dense)
        _check_table("files of an edit", self.files, lambda data: isinstance(data, bytes), "bytes")
        texts = "texts, or objects of JSON"
        _check_table(
            "patches of an edit", self.patches, lambda p: isinstance(p, str | Mapping), texts
        )
        try:
            patches = {name: strict_json.plain(patch) for name, patch in self.patches.items()}
        except ValueError as error:
            raise FitError(
                "patches of an edit", expected=texts, found=str(error), hint=FAULT
            ) from error
        object.__setattr__(self, "patches", patches)

    @property
    def rank(self) -> int:
        """The most columns of a subspace that is removed from a tensor; 0 if there is none."""
        bases = (delta.protects for delta in self.tensors.values())
        return max((basis.shape[1] for basis in bases if basis is not None), default=0)

    def and_patch(self, patches: Mapping[str, Mapping[str, Any]]) -> "Edit":
        """The same with additional merge patches of files; members that the method sets win."""
        if not patches:
            return self
        both = {name: _joined(patch, self.patches.get(name, {})) for name, patch in patches.items()}
        return replace(self, patches={**self.patches, **both})

    def then(self, later: "Edit") -> "Edit":
        """The union of two edits; tensors that both create are added.

        Raises:
            FitError: both change the same tensor or file, and the order matters.
        """
        for what, one, other in (
            ("tensor", self.tensors, later.tensors), ("file", self.files, later.files)
        ):  # fmt: skip
            if both := sorted(one.keys() & other.keys()):
                raise FitError(f"two methods change the {what} {both[0]}", hint=FAULT)
        patches = dict(self.patches)
        for name, patch in later.patches.items():
            before = patches.get(name, {})
            patches[name] = _joined(before, patch)
            if name in self.patches and patches[name] != _joined(patch, before):
                raise FitError(f"two methods change {name} in different ways", hint=FAULT)
        common = self.created.keys() & later.created.keys()
        sums = {name: self.created[name] + later.created[name] for name in common}
        return Edit(
            {**self.tensors, **later.tensors},
            {**self.created, **later.created, **sums},
            patches,
            {**self.files, **later.files},
        )

    def check(self, plan: Plan) -> None:
        """Refuse changes that do not fit a checkpoint, before anything is written.

        Raises:
            CheckpointError: naming a tensor that is missing, or that its change does not fit.
        """
        weights, known = plan.find(self.tensors), set[tuple[int, int, int]]()
        for name, delta in self.tensors.items():
            if says := _misfit(delta, weights.get(name), known):
                raise CheckpointError(
                    f"the edit of tensor {name} ({delta.kind}) does not fit the checkpoint",
                    found=says,
                )

    def digest(self) -> str:
        """A sha256 of everything: two edits with one digest change a checkpoint in the same way."""
        known: dict[int, str] = {}

        def of(tensor: Tensor) -> str:
            if id(tensor) not in known:
                known[id(tensor)] = hashlib.sha256(to_bytes(tensor)).hexdigest()
            return f"{tensor.dtype} {list(tensor.shape)} {known[id(tensor)]}"

        deltas = {
            name: [delta.kind, {field: of(t) for field, t in tensors_of(delta).items()}]
            for name, delta in self.tensors.items()
        }
        created = {name: of(tensor) for name, tensor in self.created.items()}
        files = {name: hashlib.sha256(data).hexdigest() for name, data in self.files.items()}
        what = [deltas, created, dict(self.patches), files]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def _joined(first: Any, second: Any) -> Any:
    """The merge patch that applies one patch and then another."""
    if not isinstance(first, Mapping) or not isinstance(second, Mapping):
        return second
    common = {key: _joined(first[key], second[key]) for key in first.keys() & second.keys()}
    return {**first, **second, **common}


def _misfit(delta: Delta, weight: Weight | None, known: set[tuple[int, int, int]]) -> str | None:
    """Why a change does not fit a weight, or None; weights may share tensors, and those in
    ``known`` fit.
    """
    if weight is None:
        return "no weight of that name"
    shape, height = weight.info.shape, weight.info.shape[weight.axis]
    width = prod(shape) // max(height, 1)
    if (id(delta), height, width) not in known:
        try:
            delta.check((height, width))
        except ValueError as error:
            return str(error)
        known.add((id(delta), height, width))
    if delta.protects is None and _is_shared(weight):
        return "one that shares its tensor with others"
    return misfit_of(delta, weight.dtype)


def _check_table(what: str, table: Any, fits: Callable[[Any], bool], wanted: str) -> None:
    """Raise FitError unless this is a mapping of names to values that fit."""
    found = type(table).__name__
    if isinstance(table, Mapping):
        wrong = [key for key, x in table.items() if not (isinstance(key, str) and fits(x))]
        if not wrong:
            return
        found = f"{str(wrong[0])[:80]} ({type(table[wrong[0]]).__name__})"
    raise FitError(what, expected=f"a mapping of names to {wanted}", found=found, hint=FAULT)


def _is_delta(value: Any) -> bool:
    return type(value) in KINDS.values() and all(map(is_dense, tensors_of(value).values()))


def _is_shape(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(size, int) and size >= 0 for size in value)


@dataclass(frozen=True, slots=True)
class Footprint:
    """The parts that an edit will change, from the headers alone: for the plan, its display, and
    refusals.

    Attributes:
        weights: tensors that change, or from which the fit chooses.
        kinds: of the changes.
        rank: largest number of removed or added columns, for planning memory and disk; 0 for kinds
            that have none.
        created: name -> shape of a tensor that the source lacks.
        patches: files of the source whose text changes.
        files: paths of files that the source lacks.
        chosen: the most weights that change, if the fit chooses; None for all.

    Raises:
        FitError: a part of it is of another type.
    """

    weights: tuple[Weight, ...] = ()
    kinds: tuple[type[Delta], ...] = ()
    rank: int = 0
    created: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    patches: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    chosen: int | None = None

    def __post_init__(self) -> None:
        _check_table("created of a footprint", self.created, _is_shape, "shapes")
        for what, values, fits in (
            ("weights", self.weights, lambda value: isinstance(value, Weight)),
            ("kinds", self.kinds, lambda value: value in KINDS.values()),
            ("patches", self.patches, lambda value: isinstance(value, str)),
            ("files", self.files, lambda value: isinstance(value, str)),
        ):
            if not isinstance(values, tuple | list) or not all(map(fits, values)):
                raise FitError(f"{what} of a footprint", found=repr(values)[:80], hint=FAULT)
        if type(self.rank) is not int:
            raise FitError("rank of a footprint", found=repr(self.rank)[:80], hint=FAULT)
        if self.chosen is not None and not (type(self.chosen) is int and self.chosen > 0):
            raise FitError("chosen of a footprint", found=repr(self.chosen)[:80], hint=FAULT)

    @property
    def most(self) -> int:
        """The most weights that change."""
        return len(self.weights) if self.chosen is None else min(self.chosen, len(self.weights))

    def check_shared(self) -> None:
        """Refuse, from the headers, edits that ``Edit.check`` would refuse after the fit.

        Raises:
            CheckpointError: naming a tensor of several weights that cannot change in this way.
        """
        shared = [weight.info.name for weight in self.weights if _is_shared(weight)]
        if shared and not any(issubclass(kind, RemoveSubspace) for kind in self.kinds):
            raise CheckpointError(
                f"tensor {shared[0]} holds several weights, such as those of all experts",
                expected="a method that takes a subspace out",
                found=f"one of {' and '.join(kind.kind for kind in self.kinds) or 'no kind'}",
            )

    def check(self, edit: Edit) -> None:
        """Refuse an edit that goes beyond its footprint, for which memory and disk were planned.

        Raises:
            FitError: naming a tensor or a file; or a basis is not orthonormal.
        """
        weights = {weight.info.name for weight in self.weights}
        shapes = {name: tuple(tensor.shape) for name, tensor in edit.created.items()}
        beyond = [
            *(name for name, delta in edit.tensors.items()
              if name not in weights or type(delta) not in self.kinds),
            *(name for name, shape in shapes.items() if self.created.get(name) != shape),
            *({*edit.patches} - {*self.patches}),
            *({*edit.files} - {*self.files}),
            *([*edit.tensors][self.most :]),
        ]  # fmt: skip
        if beyond:
            raise FitError(
                f"the method changes {beyond[0]} in a way that its footprint does not have",
                hint=f"nothing was written; {FAULT}",
            )
        bases = {id(delta): (name, delta.protects) for name, delta in edit.tensors.items()}
        for name, basis in bases.values():
            if basis is not None and not (off := skewness(basis)) <= ORTHONORMAL:
                raise FitError(
                    f"the basis of tensor {name}", expected="orthonormal columns",
                    found=f"U^T U off by {off:.1e}", hint=f"nothing was written; {FAULT}",
                )  # fmt: skip


ORTHONORMAL = 1e-5
"""The largest deviation of U^T U from the identity; float32 rounding leaves less than 1e-6."""


def skewness(basis: Tensor) -> float:
    """The deviation of U^T U from the identity."""
    U = basis.cpu()
    return float((U.T @ U - torch.eye(U.shape[1])).abs().max())


def _is_shared(weight: Weight) -> bool:
    """Whether other weights are in the same tensor."""
    return len(weight.info.shape) > 2 or weight.rows is not None
