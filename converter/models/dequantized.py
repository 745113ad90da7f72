"""FP8 checkpoints as the numbers that they stand for, for a forward pass on any machine."""

import torch
from torch import Tensor

from converter.checkpoints.formats.virtual import Shards, VirtualTensor
from converter.checkpoints.fp8_scheme import FP8, Scales, Scheme, scales_of
from converter.checkpoints.plan import Plan
from converter.checkpoints.safetensors.header import DTYPES, TensorInfo
from converter.checkpoints.safetensors.rewrite import read_raw, read_tensor
from converter.checkpoints.source import Source
from converter.edits.storage import dequantize
from converter.errors import CheckpointError


def dequantized(source: Source, plan: Plan, scheme: Scheme) -> Shards:
    """Recipes for all tensors of a source, weights in float32, scales left out.

    Raises:
        CheckpointError: an FP8 tensor has no scales that fit it.
    """
    places = {
        name: (shard, info)
        for shard, header in plan.headers.items()
        for name, info in header.tensors.items()
    }
    made: dict[str, list[VirtualTensor]] = {}
    for name, (shard, info) in places.items():
        if name.endswith((*scheme.scales, "input_scale", "activation_scale")):
            continue
        recipes = made.setdefault(shard, [])
        if info.dtype == FP8:
            recipes.append(_weight(source, shard, info, scales_of(scheme, info, places)))
        elif info.dtype.startswith("F8") or DTYPES.get(info.dtype) is None:
            raise CheckpointError(
                f"tensor {name} cannot be read as numbers", expected="a float, or FP8 with scales",
                found=info.dtype,
            )  # fmt: skip
        else:
            recipes.append(stored(source, shard, info))
    return made


def _weight(source: Source, shard: str, info: TensorInfo, scales: Scales) -> VirtualTensor:
    def make() -> Tensor:
        with source.open(shard) as file, source.open(scales.shard) as other:
            return dequantize(
                read_tensor(file, info), read_tensor(other, scales.info), scales.block
            )

    return VirtualTensor(info.name, torch.float32, info.shape, make)


def stored(source: Source, shard: str, info: TensorInfo) -> VirtualTensor:
    """The recipe of a tensor that is read as it is.

    Raises:
        CheckpointError: PyTorch has no such dtype.
    """
    if info.dtype not in DTYPES:
        raise CheckpointError(
            f"tensor {info.name} cannot be read", expected="a dtype that PyTorch has",
            found=info.dtype,
        )  # fmt: skip

    def make() -> Tensor:
        with source.open(shard) as file:
            return read_raw(file, info)

    return VirtualTensor(info.name, DTYPES[info.dtype], info.shape, make)
