"""Is an adapter what its manifest says?

B must be -U of the recorded subspace, bit for bit; A must have the recorded digest and norm, and,
with the source at hand, be U^T W of its weights to the rounding of float32. The config must say of
rank, scale and modules what peft needs to make W + B A of them.
"""

from collections.abc import Iterator, Mapping
from math import isclose, prod, sqrt
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from converter.checkpoints.layout import read_json
from converter.checkpoints.names import MANIFEST
from converter.checkpoints.plan import make_plan
from converter.checkpoints.source import Source
from converter.edits.rounding_bounds import SLACK, half_ulp
from converter.errors import VerificationError
from converter.outputs.adapter.write import (
    CONFIG,
    WEIGHTS,
    Adapter,
    adapter_config,
    coordinates,
    sha256_of_tensor,
    tensor_names,
)
from converter.outputs.record_checks import (
    check_source_files,
    check_subspace,
    edited_layers,
    recorded_bases,
)
from converter.runtime import progress

U64 = 2.0**-53
"""Unit roundoff of float64, in which A is computed."""

LEFT = 1e-5
"""Leakage and rounding error, at most: U is orthonormal, and A rounded, to float32."""

Entry = Mapping[str, Any]
"""One of the manifest's ``edited``."""


def check_adapter(
    folder: Path,
    manifest: Mapping[str, Any],
    damaged: Mapping[str, str],
    source: Source | None,
) -> Iterator[str]:
    """What an adapter must be, beside having its files; see ``verify.verify``.

    Raises:
        ConverterError: a file cannot be read at all.
    """
    structure = list(_check_records(manifest))
    yield from structure
    if structure or manifest["subspace"]["file"] in damaged:
        return
    bases = recorded_bases(folder, manifest)
    yield from check_subspace(folder, manifest, bases)
    if CONFIG not in damaged:
        yield from _check_config(read_json(folder / CONFIG), manifest, bases)
    tensors = _load(folder / WEIGHTS)
    names = {name for entry in manifest["edited"] for name in tensor_names(entry["lora"]["module"])}
    for name in sorted(names ^ set(tensors)):
        yield f"{WEIGHTS}: {name} is {'missing' if name in names else 'not of an edited module'}"
    if not names <= set(tensors):
        return
    for entry in manifest["edited"]:
        yield from _check_factors(entry, tensors, bases[entry["basis"]])
    if source:
        companions = Adapter().companions(source)
        yield from check_source_files(manifest, source, companions)
        yield from _check_source(manifest, tensors, bases, source)


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise VerificationError(f"{path.name} cannot be read", found=str(error)) from error


def _check_records(manifest: Mapping[str, Any]) -> Iterator[str]:
    """The list of edited tensors must be one of weights in an adapter, of the method's layers."""
    entries, width = manifest["edited"], manifest["subspace"]["hidden_size"]
    for entry in entries:
        shape, axis = entry["shape"], entry["axis"]
        fits = len(shape) == 2 and axis < 2 and shape[axis] == width
        if not entry.get("lora") or entry["role"] != "down_proj" or not fits:
            yield f"{MANIFEST}: tensor {entry['name']} cannot be edited by an adapter"
    if sorted(entry["layer"] for entry in entries) != sorted(edited_layers(manifest)):
        yield f"{MANIFEST}: the method's options and the list of edited tensors disagree"


def _check_config(
    config: Mapping[str, Any], manifest: Mapping[str, Any], bases: Mapping[str, Tensor]
) -> Iterator[str]:
    """It must be the one that follows from the manifest; the name of a local base may be any."""
    entries, base = manifest["edited"], str(config.get("base_model_name_or_path") or "")
    known = manifest["run"]["base_model"] or manifest["source"]["repo_id"] or base
    commit = manifest["source"]["commit"] if known == manifest["source"]["repo_id"] else None
    ranks = {entry["lora"]["module"]: bases[entry["basis"]].shape[1] for entry in entries}
    transposed = any(entry["axis"] for entry in entries)
    expected = adapter_config(known or "a name", commit, ranks, transposed=transposed)
    for key in sorted({*expected, *config}):
        if key not in config:
            yield f"{CONFIG}: has no {key}"
        elif key not in expected:
            yield f"{CONFIG}: {key} is not of this adapter"
        elif config[key] != expected[key]:
            yield f"{CONFIG}: {key}: expected {expected[key]}, found {config[key]}"


def _check_factors(entry: Entry, tensors: Mapping[str, Tensor], basis: Tensor) -> Iterator[str]:
    """A and B of one module against the record and the subspace."""
    names, lora = tensor_names(entry["lora"]["module"]), entry["lora"]
    A, B = (tensors[name] for name in names)
    height, rank = basis.shape
    shapes = (rank, prod(entry["shape"]) // height), (height, rank)
    for name, tensor, shape in zip(names, (A, B), shapes, strict=True):
        if tensor.dtype != torch.float32 or tuple(tensor.shape) != shape:
            found = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
            yield f"{WEIGHTS}: {name}: expected float32 {list(shape)}, found {found}"
            return
    for name, tensor, digest in zip(
        names, (A, B), (lora["sha256_a"], lora["sha256_b"]), strict=True
    ):
        if sha256_of_tensor(tensor) != digest:
            yield f"{WEIGHTS}: {name} has another sha256 than recorded"
    if not torch.equal(B, -basis):
        yield f"{WEIGHTS}: {names[1]} is not -{entry['basis']} of the subspace"
    norm, energy = float(A.double().norm()), entry["energy_removed"]
    if not 0 <= energy <= 1 or not isclose(entry["relative_change"], sqrt(energy), rel_tol=1e-4):
        yield f"{MANIFEST}: the change of {entry['name']} contradicts itself"
    elif not (0 <= entry["leakage"] <= LEFT and 0 <= entry["rounding_error"] <= LEFT):
        yield f"{MANIFEST}: no adapter leaves so much of {entry['name']}"
    if not isclose(norm, sqrt(max(energy, 0)) * entry["norm"], rel_tol=1e-4):
        yield f"{WEIGHTS}: {names[0]} has another norm than recorded: {norm:.6g}"


def _check_source(
    manifest: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    bases: Mapping[str, Tensor],
    source: Source,
) -> Iterator[str]:
    """Each A again, from the weights."""
    plan = make_plan(source.config, source.weight_map, source.headers())
    targets = {target.info.name: target for target in plan.targets}
    with progress.bar("compare", len(manifest["edited"]), "tensor") as bar:
        for entry in manifest["edited"]:
            name, target = entry["name"], targets.get(entry["name"])
            found = target and (target.shard, target.layer, target.axis, target.info.shape)
            recorded = (entry["shard"], entry["layer"], entry["axis"], tuple(entry["shape"]))
            if target and target.info.dtype != entry["dtype"]:
                yield f"{name} of the source is {target.info.dtype}, not {entry['dtype']}"
            if target is None or found != recorded:
                yield f"the source {source.name} has no such projection: {name}"
                continue
            if plan.module(target) != entry["lora"]["module"]:
                yield f"{name} of the source is not module {entry['lora']['module']}"
            U = bases[entry["basis"]]
            P, norm, digest = coordinates(source, target, U, "cpu")
            A = tensors[tensor_names(entry["lora"]["module"])[0]]
            if digest != entry["sha256_before"]:
                yield f"{name} of the source is another one, by its sha256"
            if not isclose(norm, entry["norm"], rel_tol=1e-4):
                yield f"{name} of the source has another norm than recorded"
            if A.shape != P.shape or not _is_rounded(A, P, len(U), norm):
                yield f"{WEIGHTS}: A of {entry['lora']['module']} is not U^T W of the source"
            bar.update()


def _is_rounded(A: Tensor, P: Tensor, hidden_size: int, norm: float) -> bool:
    """Whether each element of A (R, F) is P's in float32, for sums over D products in float64.

    They may err by ``SLACK`` sqrt(D) u ||W_j||, with column j of W, which ||W|| bounds.
    """
    allowed = half_ulp(A) + SLACK * sqrt(hidden_size) * U64 * norm
    return bool(((A.double() - P).abs() <= allowed).all())
