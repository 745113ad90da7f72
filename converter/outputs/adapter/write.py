"""The edit as a LoRA adapter: a few megabytes, loaded on the source, which stays as it is.

    W - U (U^T W) = W + B A        A = U^T W (R, F),  B = -U (D, R)

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
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from math import isfinite, prod, sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from converter.checkpoints.companions import papers
from converter.checkpoints.formats.virtual import VirtualFile, VirtualTensor
from converter.checkpoints.plan import Plan
from converter.checkpoints.safetensors.header import to_bytes
from converter.checkpoints.safetensors.rewrite import Region, as_tensor
from converter.checkpoints.source import Source
from converter.checkpoints.weights import Weight
from converter.edits.base import Edit, EditRecord, Lora
from converter.edits.engine import Engine
from converter.edits.fp8 import dequantize
from converter.edits.matrices import Matrix, matrices
from converter.edits.projection import Projector
from converter.errors import CheckpointError, OptionError
from converter.outputs.checkpoint.write import Written, copy_file, fetched, file_entry
from converter.outputs.staging.journal import Receiver
from converter.runtime import progress

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"

SERVED_RANK = 16
"""The largest rank that serving engines take unless told otherwise (vLLM's ``max_lora_rank``)."""


class Adapter:
    """This output, as ``outputs.registry`` has it."""

    implied: Mapping[str, str] = {"bias": "keep"}
    unused: tuple[str, ...] = ("rounding", "workers", "stream_to_hub")

    def check(self, plan: Plan, targets: tuple[Weight, ...]) -> None:
        """A LoRA adds to the weight of one Linear or Conv1D, and to nothing else."""
        if plan.architecture.experts.weight:
            raise OptionError(
                "--output adapter",
                expected="one feed-forward network in each layer",
                found=f"a mixture of experts ({plan.architecture.title}), whose experts share "
                "parameters in memory that a LoRA of this kind cannot name",
                hint="use --output checkpoint",
            )
        if any(target.is_bias for target in targets):
            raise OptionError(
                "-o bias=project",
                expected="bias=keep with --output adapter, since a LoRA changes no bias",
                found="project, and a model with biases",
                hint="leave the option out, or use --output checkpoint",
            )

    def nbytes(self, plan: Plan, targets: tuple[Weight, ...], rank: int) -> int:
        return sum(4 * rank * sum(target.info.shape) for target in targets)

    def companions(self, source: Source) -> list[str]:
        """The licence and its like; config and tokenizer are those of the source and stay there."""
        return list(chain(*papers(source.small).values()))

    def at_a_time(self, source: Source) -> int:
        return 1

    def write(
        self,
        source: Source,
        plan: Plan,
        edit: Edit,
        targets: tuple[Weight, ...],
        folder: Path,
        engine: Engine,
        keep_source: bool = True,
        receiver: Receiver | None = None,
    ) -> Written:
        """Write the adapter and its config, as peft does."""
        if receiver:
            receiver.before({})
        order = sorted(targets, key=lambda target: (target.shard, target.info.start))
        bases = {target.layer: basis_of(edit, target) for target in order}
        ranks = {plan.module(target): bases[target.layer].shape[1] for target in targets}
        if max(ranks.values()) > SERVED_RANK:
            progress.warn(
                f"the adapter has rank {max(ranks.values())}; serving engines take {SERVED_RANK} "
                "or less unless they are told otherwise"
            )
        kept = len(plan.biases("down_proj", bases))
        if kept:
            progress.note(f"  {kept} biases stay as they are: a LoRA has none")
        records = []
        total = sum(target.info.nbytes for target in order)
        with (folder / WEIGHTS).open("xb") as file, progress.bar("edit", total, "B") as bar:
            file.write(_header(plan, order, ranks))
            for target in _as_fetched(source, order, keep_source):
                A, B, record = factors(source, plan, target, bases[target.layer], engine.device)
                file.write(to_bytes(A))
                file.write(to_bytes(B))
                records.append(record)
                bar.update(target.info.nbytes)
        base, transposed = source.base or source.name, any(target.axis for target in order)
        config = adapter_config(base, source.base_commit, ranks, transposed=transposed)
        (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
        copies = {n: copy_file(source.small[n], folder / n) for n in self.companions(source)}
        made = {name: file_entry(folder / name) for name in (WEIGHTS, CONFIG)}
        records.sort(key=lambda record: (record.layer, record.name))
        return Written({}, copies, made, tuple(records))


def adapter_config(
    base: str, commit: str | None, ranks: Mapping[str, int], *, transposed: bool
) -> dict[str, Any]:
    """The content of ``adapter_config.json``; keys of peft that it lacks have defaults there.

    Args:
        base: repo id of the model that the adapter belongs to, or its name.
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
    """What A and B of a module are called in the file."""
    start = f"base_model.model.{module}"
    return f"{start}.lora_A.weight", f"{start}.lora_B.weight"


def basis_of(edit: Edit, target: Weight) -> Tensor:
    """U (D, R) float32. Raises CheckpointError if the edit leaves the target as it is."""
    basis = edit.basis(target)
    if basis is None:
        raise CheckpointError(f"the edit does not know tensor {target.info.name}")
    return basis.float().cpu().contiguous()


def factors(
    source: Source, plan: Plan, target: Weight, basis: Tensor, device: str
) -> tuple[Tensor, Tensor, EditRecord]:
    """A (R, F) and B (D, R) of one weight, float32, and what they do to it.

    Args:
        source: whose shard is read.
        plan: of that source.
        target: the weight.
        basis: U (D, R) float32.
        device: of the computation.

    Raises:
        CheckpointError: the weight holds NaN or Inf, or is too large for float32.
    """
    P, norm, digest = coordinates(source, target, basis, device)
    A, B, U = P.float(), -basis, basis.double()
    E, G = A.double() - P, U.T @ U
    norms = {
        "W": norm,
        "P": float(P.norm()),
        "change": _norm_in(G, A.double()),
        "error": _norm_in(G, E),
        "left": float((P - G @ A.double()).norm()),
    }
    if not isfinite(norms["change"]):
        raise CheckpointError(f"tensor {target.info.name} is too large for an adapter in float32")
    lora = Lora(plan.module(target), sha256_of_tensor(A), sha256_of_tensor(B))
    return A, B, EditRecord.of(target, norms, (digest, None), lora=lora)


def coordinates(
    source: Source, target: Weight, basis: Tensor, device: str
) -> tuple[Tensor, float, str]:
    """P = U^T W (R, F) float64, on the CPU; ||W||_F; and sha256 of the tensor as stored.

    Raises:
        CheckpointError: W holds NaN or Inf.
    """
    digest = hashlib.sha256()
    projector = Projector(basis, torch.float32, "nearest", device)
    try:
        parts = [
            projector.coordinates(matrix.rows, matrix.width)
            for matrix in _matrices(source, target, device, digest)
        ]
    except ValueError as error:
        raise CheckpointError(
            f"tensor {target.info.name} of {target.shard} holds NaN or Inf",
            hint="the source is damaged; get an intact copy",
        ) from error
    return torch.cat(parts, 1).cpu(), projector.norms()["W"], digest.hexdigest()


def _matrices(
    source: Source, target: Weight, device: str, digest: "hashlib._Hash"
) -> Iterator[Matrix]:
    """A weight as matrices (D, F); one in FP8 is held as a whole, as the numbers it stands for."""
    with source.open(target.shard) as file:
        region = Region(file, target.info, [digest])
        if target.scales is None:
            yield from matrices(region, target.axis, device)
            return
        q = as_tensor(region.read(0, target.info.nbytes), target.info)
        scale = source.read(target.scales.shard, target.scales.info)
        W = dequantize(q.to(device), scale.to(device), target.scales.block)
        yield Matrix(lambda i, j: W[i:j], W.shape[1], False)


def _as_fetched(source: Source, order: Sequence[Weight], keep_source: bool) -> Iterator[Weight]:
    """The targets one after the other, each with its shard on disk.

    The next shard is fetched meanwhile. Those that no later target needs are deleted, if the source
    is not to be kept.
    """
    shards = list(dict.fromkeys(target.shard for target in order))
    for place, shard in enumerate(fetched(source, shards)):
        yield from (target for target in order if target.shard == shard)
        later = [target for target in order if target.shard in shards[place + 1 :]]
        needed = {t.shard for t in later} | {t.scales.shard for t in later if t.scales}
        for name in source.shards:
            if not keep_source and name not in needed:
                source.drop(name)


def _header(plan: Plan, order: Sequence[Weight], ranks: Mapping[str, int]) -> bytes:
    """Of a safetensors file with A and B of each target, in this order."""
    recipes = []
    for target in order:
        module, shape = plan.module(target), target.info.shape
        rank, height = ranks[module], shape[target.axis]
        shapes = (rank, prod(shape) // height), (height, rank)
        for name, size in zip(tensor_names(module), shapes, strict=True):
            recipes.append(VirtualTensor(name, torch.float32, size, torch.Tensor))
    return VirtualFile(recipes).header


def _norm_in(G: Tensor, X: Tensor) -> float:
    """||U X||_F, with G = U^T U."""
    return sqrt(max(float((X * (G @ X)).sum()), 0.0))


def sha256_of_tensor(tensor: Tensor) -> str:
    """Of its bytes, as a file has them."""
    return hashlib.sha256(to_bytes(tensor)).hexdigest()
