"""Verify an adapter against its manifest.

B must be -a U, or -a A where the projection is oblique, of the recorded tensors and factor, bit for
bit; A must have the recorded digest and norm, and, with the source at hand, be U^T W of its weights
to the rounding of float32. Rank, scale and modules in the config must make peft compute W + B A.
"""

from collections.abc import Iterator, Mapping
from math import isclose, nan, prod, sqrt
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from converter.checkpoints.architectures.architecture import Role
from converter.checkpoints.layout import read_json
from converter.checkpoints.names import MANIFEST
from converter.checkpoints.plan import read_plan
from converter.checkpoints.source import Source
from converter.edits.deltas import Delta
from converter.edits.edit_file import load_edit_tensors
from converter.edits.rounding_bounds import SLACK, half_ulp
from converter.manifest import EditedTensor, Lora, Manifest
from converter.outputs.adapter.write import (
    CONFIG,
    LOW_RANK,
    WEIGHTS,
    adapter_config,
    companions,
    coordinates,
    rank_of,
    tensor_names,
)
from converter.outputs.base import sha256_of_tensor
from converter.outputs.record_checks import (
    base_of,
    check_edit_file,
    check_source_files,
    delta_of_record,
    is_recorded,
    recorded_edit,
)
from converter.runtime import progress

_ROLES = get_args(Role)
"""Of the linear maps that have a weight; biases have others."""

_U64 = 2.0**-53
"""Unit roundoff of float64, in which A is computed."""

_LEFT = 1e-5
"""Leakage and rounding error, at most: U is orthonormal, and A rounded, to float32."""


def check_adapter(
    folder: Path, manifest: Manifest, damaged: Mapping[str, str], source: Source | None
) -> Iterator[str]:
    """Verify an adapter, besides its list of files; see ``entrypoints.verify``.

    Raises:
        ConverterError: a file cannot be read at all.
    """
    structure = list(_check_records(manifest))
    yield from structure
    if structure or manifest.edit.file in damaged:
        return
    stored = recorded_edit(folder, manifest)
    yield from check_edit_file(manifest, stored)
    deltas = {entry.name: delta_of_record(entry, stored) for entry in manifest.edited}
    if CONFIG not in damaged:
        yield from _check_config(read_json(folder / CONFIG), manifest, deltas)
    tensors = load_edit_tensors(folder / WEIGHTS)
    names = {name for entry in manifest.edited for name in tensor_names(_lora(entry).module)}
    for name in sorted(names ^ set(tensors)):
        yield f"{WEIGHTS}: {name} is {'missing' if name in names else 'not of an edited module'}"
    if not names <= set(tensors):
        return
    for entry in manifest.edited:
        yield from _check_factors(entry, tensors, deltas[entry.name])
    if source:
        yield from check_source_files(manifest, source, companions(source.small))
        yield from _check_source(manifest, tensors, deltas, source)


def _check_records(manifest: Manifest) -> Iterator[str]:
    """Check that the edited tensors are weights that an adapter can edit."""
    if not manifest.edited:
        yield f"{MANIFEST}: no tensor is recorded as edited"
    kinds = {kind.kind for kind in LOW_RANK}
    for entry in manifest.edited:
        is_matrix = len(entry.shape) == 2 and all(entry.shape) and entry.axis < 2
        if not (entry.lora and is_matrix and entry.role in _ROLES and entry.kind in kinds):
            yield f"{MANIFEST}: tensor {entry.name} cannot be edited by an adapter"
            continue
        numbers = [part for part in entry.lora.module.split(".") if part.isdigit()]
        if numbers and str(entry.layer) not in numbers:
            yield f"{MANIFEST}: module {entry.lora.module} is not of layer {entry.layer}"


def _lora(entry: EditedTensor) -> Lora:
    assert entry.lora is not None  # _check_records has looked
    return entry.lora


def _check_config(
    config: Mapping[str, Any], manifest: Manifest, deltas: Mapping[str, Delta]
) -> Iterator[str]:
    """Check that the config follows from the manifest."""
    entries, known = manifest.edited, base_of(manifest)
    commit = manifest.source.commit if known == manifest.source.repo_id else None
    ranks = {_lora(entry).module: rank_of(deltas[entry.name]) for entry in entries}
    transposed = any(entry.axis for entry in entries)
    expected = adapter_config(known, commit, ranks, transposed=transposed)
    for key in sorted({*expected, *config}):
        if key not in config:
            yield f"{CONFIG}: has no {key}"
        elif key not in expected:
            yield f"{CONFIG}: {key} is not of this adapter"
        elif config[key] != expected[key]:
            yield f"{CONFIG}: {key}: expected {expected[key]}, found {config[key]}"


def _check_factors(
    entry: EditedTensor, tensors: Mapping[str, Tensor], delta: Delta
) -> Iterator[str]:
    """A and B of one module against the record and the edit."""
    lora = _lora(entry)
    names = tensor_names(lora.module)
    A, B = (tensors[name] for name in names)
    height, rank = entry.shape[entry.axis], rank_of(delta)
    shapes = (rank, prod(entry.shape) // height), (height, rank)
    for name, tensor, shape in zip(names, (A, B), shapes, strict=True):
        if tensor.dtype != torch.float32 or tuple(tensor.shape) != shape:
            found = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
            yield f"{WEIGHTS}: {name}: expected float32 {list(shape)}, found {found}"
            return
    for name, tensor, digest in zip(names, (A, B), (lora.sha256_a, lora.sha256_b), strict=True):
        if sha256_of_tensor(tensor) != digest:
            yield f"{WEIGHTS}: {name} has another sha256 than recorded"
    factors = delta.low_rank(A)
    if factors is None or not torch.equal(B, factors[0]):
        yield f"{WEIGHTS}: {names[1]} is not that of the edit"
    if factors is None or not torch.equal(A, factors[1]):
        yield f"{WEIGHTS}: {names[0]} is not that of the edit"
    if delta.protects is not None:
        yield from _check_removal(entry, names[0], float(A.double().norm()), delta)


def _check_removal(entry: EditedTensor, name: str, norm: float, delta: Delta) -> Iterator[str]:
    """The norms of a record of a subspace that was taken out; ``norm`` is ||A|| = ||U^T W||."""
    along, a = delta.along(entry.measures), delta.factor
    leakage = entry.measures.get("leakage", nan)
    least, most = delta.moved(along)
    change = min(max(entry.relative_change, least), most)  # the nearest that can be
    if not 0 <= along <= 1 or not isclose(entry.relative_change, change, rel_tol=1e-4):
        yield f"{MANIFEST}: the change of {entry.name} contradicts itself"
    elif not (0 <= leakage <= _LEFT and 0 <= entry.rounding_error <= _LEFT):
        yield f"{MANIFEST}: no adapter leaves so much of {entry.name}"
    if entry.measures.get("factor", 1.0) != a:
        yield f"{MANIFEST}: the factor of {entry.name} is not that of the edit"
    if not isclose(norm, along * entry.norm, rel_tol=1e-4):
        yield f"{WEIGHTS}: {name} has another norm than recorded: {norm:.6g}"


def _check_source(
    manifest: Manifest, tensors: Mapping[str, Tensor], deltas: Mapping[str, Delta], source: Source
) -> Iterator[str]:
    """Each weight of the source again, and each A that depends on it."""
    plan = read_plan(source)
    weights = plan.find(deltas)
    with progress.bar("compare", len(manifest.edited), "tensor"):
        for entry in manifest.edited:
            name, weight, lora = entry.name, weights.get(entry.name), _lora(entry)
            if weight and weight.info.dtype != entry.dtype:
                yield f"{name} of the source is {weight.info.dtype}, not {entry.dtype}"
            if weight is None or not is_recorded(weight, entry):
                yield f"the source {source.name} has no such weight: {name}"
                continue
            if weight.module != lora.module:
                yield f"{name} of the source is not module {lora.module}"
            delta = deltas[name]
            P, norm, digest = coordinates(source, weight, delta, "cpu")
            A = tensors[tensor_names(lora.module)[0]]
            if digest != entry.sha256_before:
                yield f"{name} of the source is another one, by its sha256"
            if not isclose(norm, entry.norm, rel_tol=1e-4):
                yield f"{name} of the source has another norm than recorded"
            height = entry.shape[entry.axis]
            if delta.protects is not None and (
                A.shape != P.shape or not _is_rounded(A, P, height, norm)
            ):
                yield f"{WEIGHTS}: A of {lora.module} is not U^T W of the source"
            progress.advance(1)


def _is_rounded(A: Tensor, P: Tensor, hidden_size: int, norm: float) -> bool:
    """Whether each element of A (R, F) is P's in float32, for sums over D products in float64.

    They may err by ``SLACK`` sqrt(D) u ||W_j||, with column j of W, which ||W|| bounds.
    """
    allowed = half_ulp(A) + SLACK * sqrt(hidden_size) * _U64 * norm
    return bool(((A.double() - P).abs() <= allowed).all())
