"""Write the edit as a LoRA adapter: a few megabytes, loaded on the unchanged source.

    W - a U (U^T W) = W + B A      A = U^T W (R, I),  B = -a U (O, R)

peft computes ``x W^T + (x A^T) B^T`` with the scale ``lora_alpha / r`` = 1, so it is the edit, up
to the rounding of A to float32. (A Conv1D weight is stored (F, D); A and B are the same for it.)
The file has ``4 R (D + F)`` bytes for each edited layer: 0.3 MB for 20 layers of SmolLM2-135M at
rank 2, 280 MB for 126 layers of Llama 405B at rank 8. It is written as it is computed, so memory is
a few (R, F) and one block of rows; of the shards only the edited weights are read.

The modules are named as in the class of transformers that ``[modules] auto_class`` of the
architecture's data file says, whatever their tensors are called on disk.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from math import isfinite, prod, sqrt
from typing import Any

import torch
from torch import Tensor

from converter.checkpoints.formats.virtual import VirtualFile, VirtualTensor
from converter.checkpoints.names import papers
from converter.checkpoints.plan import Plan
from converter.checkpoints.safetensors.header import to_bytes
from converter.checkpoints.safetensors.rewrite import Region, as_tensor
from converter.checkpoints.source import Source
from converter.checkpoints.weights import Weight
from converter.edits.apply import WeightEdit, damaged
from converter.edits.deltas import (
    AddLowRank,
    Delta,
    RemoveOblique,
    RemoveSubspace,
    WeakenSubspace,
    tensors_of,
)
from converter.edits.edit_file import stored_names
from converter.edits.editor import Editor
from converter.edits.storage import Matrix, dequantize, matrices
from converter.errors import CheckpointError
from converter.manifest import EditedTensor, Lora
from converter.outputs.base import (
    WriteJob,
    Written,
    copy_file,
    file_entry,
    make_file,
    sha256_of_tensor,
)
from converter.outputs.checkpoint.write import fetched
from converter.runtime import progress

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"

LOW_RANK = (RemoveSubspace, WeakenSubspace, RemoveOblique, AddLowRank)
"""Kinds of edits that a LoRA can hold."""

_SERVED_RANK = 16
"""The largest rank that serving engines take unless told otherwise (vLLM's ``max_lora_rank``)."""


def companions(names: Iterable[str]) -> list[str]:
    """The licence files; config and tokenizer stay with the source."""
    return list(chain(*papers(names).values()))


def write_adapter(job: WriteJob) -> Written:
    """Write the adapter and its config, as peft does.

    Raises:
        CheckpointError: the edit changes no tensor, or one that holds NaN or Inf.
    """
    if not job.weights:
        raise CheckpointError(
            "the edit changes no tensor, so there is nothing that an adapter could hold",
            hint="use --output checkpoint, or edit more",
        )
    if job.receiver:
        job.receiver.before({})
    source, plan, edit = job.source, job.plan, job.edit
    order = sorted(job.weights, key=lambda weight: (weight.shard, weight.info.start))
    names = stored_names(edit, {weight.info.name: weight.layer for weight in order})
    listed = sorted(order, key=lambda weight: (weight.layer, weight.info.name))  # as records are
    ranks = {w.module: rank_of(edit.tensors[w.info.name]) for w in listed}
    if max(ranks.values()) > _SERVED_RANK:
        progress.warn(
            f"the adapter has rank {max(ranks.values())}; serving engines take {_SERVED_RANK} "
            "or less unless they are told otherwise"
        )
    roles, layers = {w.role for w in order}, {w.layer for w in order}
    if kept := sum(len(plan.biases(role, layers)) for role in roles):
        progress.note(f"  {kept} biases stay as they are: a LoRA has none")
    edits = []
    total = sum(weight.info.nbytes for weight in order)
    with (job.folder / WEIGHTS).open("xb") as file, progress.bar("edit", total, "B"):
        file.write(_header(plan, order, ranks))
        for weight in _as_fetched(source, order, job.keep_source):
            name = weight.info.name
            one = WeightEdit(weight, edit.tensors[name], names[name], job.engine)
            A, B, record = _factors(source, weight.module, one)
            file.write(to_bytes(A))
            file.write(to_bytes(B))
            edits.append(record)
            progress.advance(weight.info.nbytes)
    transposed = any(weight.axis for weight in order)
    config = adapter_config(source.base, source.base_commit, ranks, transposed=transposed)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    copies = {n: copy_file(source.small[n], job.folder / n) for n in companions(source.small)}
    made = {
        WEIGHTS: file_entry(job.folder / WEIGHTS),
        CONFIG: make_file(job.folder / CONFIG, text.encode()),
    }
    edits.sort(key=lambda edit: (edit.layer, edit.name))
    return Written({}, copies, made, tuple(edits))


def rank_of(delta: Delta) -> int:
    """R of the factors of a delta."""
    factor = tensors_of(delta)["U" if delta.protects is not None else "B"]
    return factor.shape[1]


def adapter_config(
    base: str | None, commit: str | None, ranks: Mapping[str, int], *, transposed: bool
) -> dict[str, Any]:
    """The content of ``adapter_config.json``; keys of peft that it lacks have defaults there.

    Args:
        base: repo id of the model that the adapter belongs to. None if it is not known: peft would
            look for any other name on the Hub, too, and load the model that it finds.
        commit: of that repo, or None.
        ranks: module name -> R, in order of layer.
        transposed: whether the modules are Conv1D.
    """
    rank = max(ranks.values())
    others = {module: r for module, r in ranks.items() if r != rank}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": commit,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "target_modules": list(ranks),
        "rank_pattern": others,
        "alpha_pattern": others,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
    }


def tensor_names(module: str) -> tuple[str, str]:
    """The names of a module's A and B in the file."""
    start = f"base_model.model.{module}"
    return f"{start}.lora_A.weight", f"{start}.lora_B.weight"


def _factors(source: Source, module: str, job: WeightEdit) -> tuple[Tensor, Tensor, EditedTensor]:
    """A (R, I) and B (O, R) of the weight of a module, float32, and the measures of the change.

    Raises:
        CheckpointError: the weight holds NaN or Inf, or is too large for float32.
    """
    P, norm, digest = coordinates(source, job.weight, job.delta, job.engine.device)
    found = job.delta.low_rank(P)
    assert found is not None  # by ``Adapter.check``
    B, exact = found
    A, B = exact.float(), B.float().cpu().contiguous()
    norms = _norms(job.delta, P, exact.double(), A.double(), B.double()) | {"W": norm}
    if not isfinite(norms["change"]):
        name = job.weight.info.name
        raise CheckpointError(f"tensor {name} is too large for an adapter in float32")
    lora = Lora(module=module, sha256_a=sha256_of_tensor(A), sha256_b=sha256_of_tensor(B))
    return A, B, job.record(norms, (digest, None), lora=lora)


def _norms(delta: Delta, P: Tensor, exact: Tensor, A: Tensor, B: Tensor) -> dict[str, float]:
    """Those of ``editor.Editor.norms``, but for that of W, of factors in float64 on the CPU.

    B of a subspace that is weakened is rounded to float32, as A is: with V for ``delta.written``,
    B A + a V P is then ``B (A - P) + (B + a V) P``.
    """
    G, E = B.T @ B, A - exact
    norms = {"P": float(P.norm()), "change": _norm_in(G, A), "error": _norm_in(G, E), "left": 0.0}
    if delta.protects is None:
        return norms
    U, V, a = delta.protects.double().cpu(), delta.written, delta.factor
    assert V is not None
    norms["left"] = float((a * P + U.T @ B @ A).norm())
    if a < 1:
        both = torch.cat([B, B + a * V.double().cpu()], 1)
        norms["error"] = _norm_in(both.T @ both, torch.cat([E, P]))
    return norms


def coordinates(
    source: Source, weight: Weight, delta: Delta, device: str
) -> tuple[Tensor, float, str]:
    """U^T W (R, I) float64 for the U that a delta protects, on the CPU; ||W||_F; sha256 of W.

    R is 0 if it protects nothing.

    Raises:
        CheckpointError: W holds NaN or Inf.
    """
    digest = hashlib.sha256()
    editor = Editor(delta, weight.info.shape[weight.axis], torch.float32, "nearest", device)
    try:
        parts = [
            editor.coordinates(matrix.rows, matrix.width)
            for matrix in _matrices(source, weight, device, digest)
        ]
    except ValueError as error:
        raise damaged(weight) from error
    return torch.cat(parts, 1).cpu(), editor.norms()["W"], digest.hexdigest()


def _matrices(
    source: Source, weight: Weight, device: str, digest: "hashlib._Hash"
) -> Iterator[Matrix]:
    """A weight as matrices (D, F); one in FP8 is held as a whole, as the numbers it stands for."""
    with source.open(weight.shard) as file:
        region = Region(file, weight.info, [digest])
        if weight.scales is None:
            yield from matrices(region, weight.axis, device)
            return
        q = as_tensor(region.read(0, weight.info.nbytes), weight.info)
        scale = source.read(weight.scales.shard, weight.scales.info)
        W = dequantize(q.to(device), scale.to(device), weight.scales.block)
        yield Matrix(lambda i, j: W[i:j], W.shape[1], 0, False)


def _as_fetched(source: Source, order: Sequence[Weight], keep_source: bool) -> Iterator[Weight]:
    """The weights in order, each with its shard on disk.

    The next shard is fetched meanwhile. Those that no later weight needs are deleted, if the source
    is not to be kept.
    """
    shards = list(dict.fromkeys(weight.shard for weight in order))
    for place, shard in enumerate(fetched(source, shards)):
        yield from (weight for weight in order if weight.shard == shard)
        later = [weight for weight in order if weight.shard in shards[place + 1 :]]
        needed = {t.shard for t in later} | {t.scales.shard for t in later if t.scales}
        for name in source.shards:
            if not keep_source and name not in needed:
                source.drop(name)


def _header(plan: Plan, order: Sequence[Weight], ranks: Mapping[str, int]) -> bytes:
    """Of a safetensors file with A and B of each weight, in this order."""
    recipes = []
    for weight in order:
        module, shape = weight.module, weight.info.shape
        rank, height = ranks[module], shape[weight.axis]
        shapes = (rank, prod(shape) // height), (height, rank)
        for name, size in zip(tensor_names(module), shapes, strict=True):
            recipes.append(VirtualTensor(name, torch.float32, size, torch.Tensor))
    return VirtualFile(recipes).header


def _norm_in(G: Tensor, X: Tensor) -> float:
    """||U X||_F, with G = U^T U."""
    return sqrt(max(float((X * (G @ X)).sum()), 0.0))
