"""How a checkpoint stores weights in 8-bit floating point; schemes that cannot be edited."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from converter.checkpoints.safetensors.header import TensorInfo
from converter.errors import CheckpointError
from converter.text import describe_value

FP8 = "F8_E4M3"


Places = Mapping[str, tuple[str, TensorInfo]]
"""Tensor name -> shard file name and entry in its header."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """How a checkpoint stores weights in FP8.

    Attributes:
        name: ``quant_method`` of the config.
        scales: what may replace ``weight`` at the end of a weight's name to give that of its
            scales.
        block: rows and columns that share a scale; None: what the shape of the scales implies.
    """

    name: str
    scales: tuple[str, ...]
    block: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class Scales:
    """Where the scales of a weight are, and how many rows and columns share one."""

    info: TensorInfo
    shard: str
    block: tuple[int, int]


def read_scheme(config: Mapping[str, Any]) -> Scheme | None:
    """The FP8 scheme of a checkpoint, or None if it is not quantized.

    Raises:
        CheckpointError: it is quantized in another way; the sentence names it.
    """
    inner = config.get("text_config")
    for place in (config, inner if isinstance(inner, dict) else {}):
        scheme = place.get("quantization_config") or place.get("compression_config")
        if not scheme:
            continue
        if not isinstance(scheme, dict):
            raise quantized(_word(scheme))
        name = _word(scheme.get("quant_method", "unnamed"))
        if name == "fp8":
            block = _pair(scheme.get("weight_block_size"))
            return Scheme(name, ("weight_scale_inv", "weight_scale"), block)
        if name == "compressed-tensors":
            weights = _weights_of(scheme.get("config_groups"))
            if weights and all((w.get("type"), w.get("num_bits")) == ("float", 8) for w in weights):
                block = _pair(weights[0].get("block_structure"))
                return Scheme(name, ("weight_scale",), block)
            name += f", {_word(scheme.get('format', 'unknown format'))}"
        raise quantized(name)
    return None


def _word(value: Any) -> str:
    return value[:80] if isinstance(value, str) else describe_value(value)


def _weights_of(groups: Any) -> list[Mapping[str, Any]]:
    """What compressed-tensors says of weights, of each group."""
    found = groups.values() if isinstance(groups, dict) else ()
    weights = [group.get("weights") if isinstance(group, dict) else None for group in found]
    return [part if isinstance(part, dict) else {} for part in weights]


def _pair(block: Any) -> tuple[int, int] | None:
    if block is None:
        return None
    if (
        not isinstance(block, Sequence)
        or len(block) != 2
        or not all(type(n) is int and n > 0 for n in block)
    ):
        raise CheckpointError(
            "config.json: quantization_config: block size", expected="two positive integers",
            found=describe_value(block),
        )  # fmt: skip
    return block[0], block[1]


def quantized(scheme: str) -> CheckpointError:
    """The one sentence about a checkpoint that is quantized in a way that cannot be edited."""
    return CheckpointError(
        "the checkpoint is quantized",
        expected="floating-point weights of 16 or 32 bits, or FP8 with scales",
        found=f"scheme {scheme}",
        hint="edit the unquantized base and quantize the result",
    )


def scales_of(scheme: Scheme, weight: TensorInfo, places: Places) -> Scales:
    """The scales of an FP8 weight (D, F), checked against its shape.

    They are one number, one for each row (D,) or (D, 1), or one for each block.

    Args:
        scheme: of the checkpoint.
        weight: its entry.
        places: tensor name -> shard and entry, of all tensors.

    Raises:
        CheckpointError: they are missing, or fit neither the weight nor the scheme.
    """
    names = [scale.join(weight.name.rsplit("weight", 1)) for scale in scheme.scales]
    shard, info = next((places[name] for name in names if name in places), ("", None))
    if info is None or len(weight.shape) != 2 or not prod(weight.shape):
        raise CheckpointError(
            f"tensor {weight.name} is stored in FP8 and cannot be read",
            expected=f"two axes, and a tensor {' or '.join(names)}",
            found=f"shape {list(weight.shape)}, {'scales' if info else 'no scales'}",
        )
    rows, columns = weight.shape
    shape = (1, 1) if prod(info.shape) == 1 else (*info.shape, 1)[:2]
    if len(info.shape) > 2 or not prod(info.shape):
        shape = (0, 0)
    block = scheme.block or (-(-rows // max(shape[0], 1)), -(-columns // max(shape[1], 1)))
    fitting = (-(-rows // block[0]), -(-columns // block[1]))
    if shape != fitting or info.dtype not in ("F32", "BF16", "F16"):
        raise CheckpointError(
            f"tensor {info.name} does not fit {weight.name}",
            expected=f"scales of shape {list(fitting)} in F32, BF16 or F16",
            found=f"{list(info.shape)} in {info.dtype}",
        )
    return Scales(info, shard, block)
