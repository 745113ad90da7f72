"""Find the weights of a role among a checkpoint's tensors, and check them against its config.

Weights in 8-bit floating point have scales; other quantizations cannot be edited.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from converter.checkpoints.architectures.architecture import Architecture, Role, WeightSpec
from converter.checkpoints.safetensors.header import DTYPES, FLOATS, TensorInfo
from converter.errors import CheckpointError
from converter.text import describe_value

FP8 = "F8_E4M3"

Place = tuple[str, TensorInfo]
"""Shard file name, and the entry in its header."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """How a checkpoint stores weights in FP8.

    Attributes:
        scales: endings that replace ``weight`` in a weight's name to give the name of its scales.
        block: rows and columns that share a scale; None: implied by the shape of the scales.
    """

    scales: tuple[str, ...]
    block: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class Scales:
    """The scales of a weight: their tensor, and the rows and columns that share one."""

    info: TensorInfo
    shard: str
    block: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Weight:
    """The weight of a linear map, or its bias: a tensor that an edit may change.

    Attributes:
        info, shard: its entry in the header of a shard, and that file's name.
        layer: counted from 0; for a map outside the layers, the number of layers.
        axis: the axis that runs over the outputs: 0 for Linear, 1 for Conv1D, the last of a bias.
            The output of a down-projection is as long as the hidden size.
        expert: number of the expert that the tensor belongs to, or None.
        scales: of an FP8 weight, which change with it; else None.
        rows: this map's part of ``axis``, if the tensor holds several maps; else None.
        module: the module of the transformers class whose output it makes; for all down-projections
            of a mixture, the FFN.
        mixed: whether other weights contribute to that output.
    """

    info: TensorInfo
    shard: str
    role: Role
    layer: int
    axis: int
    expert: int | None = None
    is_bias: bool = False
    scales: Scales | None = None
    rows: range | None = None
    module: str = ""
    mixed: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """The dtype on disk."""
        return DTYPES[self.info.dtype]

    @property
    def recorded_role(self) -> str:
        """The role as in manifests: ``down_proj``, or ``down_proj_bias`` for its bias."""
        return f"{self.role}_bias" if self.is_bias else self.role


class Names:
    """The tensors of a checkpoint by the names that its architecture has for them.

    ``tensors`` have their names on disk. If these begin otherwise than transformers writes them,
    ``spelling`` maps the beginnings.
    """

    def __init__(
        self,
        tensors: Mapping[str, Place],
        architecture: Architecture,
        scheme: Scheme | None,
        spelling: Mapping[str, str] | None = None,
    ) -> None:
        self.tensors, self.scheme = tensors, scheme
        self.architecture, self._spelling = architecture, spelling or {}

    def on_disk(self, template: str, layer: int = 0, expert: int | None = None) -> str:
        """A name of the architecture as it is on disk."""
        name = template.format(layer=layer, expert=expert)
        for ours, theirs in self._spelling.items():
            if name.startswith(ours):
                return theirs + name[len(ours) :]
        return name

    def of_file(self, name: str) -> str:
        """The reverse: the architecture's name, with numbers, of a name on disk."""
        for ours, theirs in self._spelling.items():
            if name.startswith(theirs):
                return ours + name[len(theirs) :]
        return name

    def find(self, template: str, layer: int = 0, expert: int | None = None) -> Place | None:
        """A tensor, or None if the checkpoint has none of that name."""
        return self.tensors.get(self.on_disk(template, layer, expert))

    def require(
        self,
        template: str,
        layer: int = 0,
        expert: int | None = None,
        *,
        shape: tuple[int, ...] | None = None,
    ) -> Place:
        """A tensor that must be there, of this shape; -1 is a size that is not known.

        Raises CheckpointError.
        """
        if place := self.find(template, layer, expert):
            if shape is not None:
                check_shape(place[1], shape)
            return place
        name = self.on_disk(template, layer, expert)
        if name.replace(".weight", ".qweight") in self.tensors:
            raise _quantized("GPTQ, AWQ or the like, by its .qweight tensors")
        raise CheckpointError(
            f"tensor {name} is missing",
            expected=f"it, as in every {self.architecture.title} of these sizes",
            found="no tensor of that name", hint="compare config.json with the checkpoint",
        )  # fmt: skip

    def locate(self, role: Role, layer: int) -> Iterator[Weight]:
        """The weights of a role in a layer, each followed by its bias, if it has one.

        Raises CheckpointError if a weight is missing, or one of them contradicts the config in
        shape or cannot be edited by its dtype.
        """
        for spec, expert in self.architecture.specs(role, layer):
            weight = self._weight(role, spec, layer, expert)
            yield weight
            if place := self.find(spec.bias, layer, expert):
                yield self._bias(weight, place)

    def _weight(self, role: Role, spec: WeightSpec, layer: int, expert: int | None) -> Weight:
        place, parts = spec.part
        length = spec.shape[spec.output_axis] // parts
        shard, info = self.require(spec.weight, layer, expert, shape=spec.shape)
        scales = None
        if self.scheme and info.dtype == FP8:
            scales = scales_of(self.scheme, info, self.tensors)
        else:
            _check_dtype(info)
        rows = range(place * length, (place + 1) * length) if parts > 1 else None
        module = spec.module.format(layer=layer)
        return Weight(
            info, shard, role, layer, spec.output_axis, expert, False, scales, rows, module,
            spec.mixed,
        )  # fmt: skip

    def _bias(self, weight: Weight, place: Place) -> Weight:
        """The bias of a weight; biases of experts in one tensor are in one tensor, too."""
        shard, info = place
        shape, experts = weight.info.shape, weight.info.shape[:-2]
        check_shape(info, (*experts, shape[weight.axis]))
        _check_dtype(info)
        return Weight(
            info, shard, weight.role, weight.layer, len(experts), weight.expert, True,
            rows=weight.rows, module=weight.module, mixed=weight.mixed,
        )  # fmt: skip


def check_shape(info: TensorInfo, shape: tuple[int, ...]) -> None:
    """Raise CheckpointError if a tensor has another shape; -1 is a size that is not known."""
    fits = len(info.shape) == len(shape) and all(
        wanted in (-1, found) for wanted, found in zip(shape, info.shape, strict=True)
    )
    if not fits:
        raise CheckpointError(
            f"tensor {info.name} contradicts config.json",
            expected=f"shape [{', '.join('any' if size < 0 else str(size) for size in shape)}]",
            found=f"{list(info.shape)}",
        )


def _check_dtype(info: TensorInfo) -> None:
    if info.dtype not in FLOATS:
        raise CheckpointError(
            f"tensor {info.name} cannot be edited",
            expected=f"dtype {', '.join(FLOATS)}",
            found=info.dtype,
            hint="use the unquantized checkpoint of this model",
        )


_QUANTIZATION = ("quantization_config", "compression_config")
"""Keys of a config that say how weights are quantized."""

_SCALES = re.compile(
    r".*(scales?|scale_inv|_zeros?|zero_points?|_idx|absmax|SCB|qweight|_packed|_shape|_blocks|"
    r"quant_map|quant_state\..*)"
)
"""Name endings of tensors that belong to quantized weights."""

_DENSE = {"F16", "BF16", "F32", "F64", "BOOL", "I64"}
"""Dtypes in a model that is not quantized: of weights, masks and positions."""


def stale_quantization(config: Any, tensors: Mapping[str, Place]) -> dict[str, Any]:
    """The merge patch of ``config.json`` that drops a quantization which the tensors do not have;
    empty if there is none, or if a tensor is packed or has scales.

    Models that were stored in 16 bits again often keep such a config.
    """
    patch = _without_quantization(config)
    dense = all(info.dtype in _DENSE for _, info in tensors.values())
    return patch if patch and dense and not any(map(_SCALES.fullmatch, tensors)) else {}


def _without_quantization(value: Any) -> dict[str, Any]:
    """The merge patch that removes the keys of ``_QUANTIZATION`` from an object and its parts."""
    patch: dict[str, Any] = {}
    for key, inner in _object(value).items():
        if key in _QUANTIZATION and inner is not None:
            patch[key] = None
        elif found := _without_quantization(inner):
            patch[key] = found
    return patch


def drops_quantization(patch: Any) -> bool:
    """Whether a merge patch only does what ``stale_quantization`` does."""
    return isinstance(patch, dict) and bool(patch) and all(
        inner is None if key in _QUANTIZATION else drops_quantization(inner)
        for key, inner in patch.items()
    )  # fmt: skip


def read_scheme(config: Mapping[str, Any]) -> Scheme | None:
    """The FP8 scheme of a checkpoint, or None if it is not quantized.

    Raises CheckpointError, which names it, for another way of quantization.
    """
    places = (config, _object(config.get("text_config")))
    scheme = next((p[key] for p in places for key in _QUANTIZATION if p.get(key)), None)
    if scheme is None:
        return None
    if not isinstance(scheme, dict):
        raise _quantized(_word(scheme))
    name = _word(scheme.get("quant_method", "unnamed"))
    if name == "fp8":
        block = _pair(scheme.get("weight_block_size"))
        return Scheme(("weight_scale_inv", "weight_scale"), block)
    if name == "compressed-tensors":
        groups = map(_object, _object(scheme.get("config_groups")).values())
        weights = [_object(group.get("weights")) for group in groups]
        if weights and all((w.get("type"), w.get("num_bits")) == ("float", 8) for w in weights):
            return Scheme(("weight_scale",), _pair(weights[0].get("block_structure")))
        name += f", {_word(scheme.get('format', 'unknown format'))}"
    raise _quantized(name)


def _word(value: Any) -> str:
    return value[:80] if isinstance(value, str) else describe_value(value)


def _object(value: Any) -> Mapping[str, Any]:
    """A JSON object; empty for any other value."""
    return value if isinstance(value, dict) else {}


def _pair(block: Any) -> tuple[int, int] | None:
    if block is None:
        return None
    pair = isinstance(block, list) and len(block) == 2
    if not pair or not all(type(n) is int and n > 0 for n in block):
        raise CheckpointError(
            "config.json: quantization_config: block size", expected="two positive integers",
            found=describe_value(block),
        )  # fmt: skip
    return block[0], block[1]


def _quantized(scheme: str) -> CheckpointError:
    """The error about a quantization that cannot be edited."""
    return CheckpointError(
        "the checkpoint is quantized",
        expected="floating-point weights of 16 or 32 bits, or FP8 with scales",
        found=f"scheme {scheme}",
        hint="edit the unquantized base and quantize the result",
    )


def scales_of(scheme: Scheme, weight: TensorInfo, places: Mapping[str, Place]) -> Scales:
    """The scales of an FP8 weight (D, F) among the tensors of a checkpoint, ``places``.

    They are one number, one for each row (D,) or (D, 1), or one for each block.

    Raises CheckpointError if they are missing, or fit neither the weight nor the scheme.
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
