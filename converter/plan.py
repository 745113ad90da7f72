"""What a conversion will do, decided from the headers alone: no weight is read.

A ``Plan`` knows every tensor of the source and which of them are down-projections. Whatever is
wrong with a checkpoint's structure is found here, before anything is computed or written.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from converter.architecture import Architecture, Dimensions, find_architecture
from converter.errors import CheckpointError
from converter.header import FLOATS, Header, TensorInfo


@dataclass(frozen=True, slots=True)
class Target:
    """A tensor that an edit may change.

    Attributes:
        info: its entry in the header of ``shard``.
        shard: file name.
        layer: counted from 0.
        axis: the axis of length hidden size: 0 for Linear, 1 for Conv1D, 0 for a bias.
        role: ``down_proj`` or ``down_proj_bias``.
    """

    info: TensorInfo
    shard: str
    layer: int
    axis: int
    role: str


@dataclass(frozen=True, slots=True)
class Plan:
    """The structure of a source checkpoint.

    Attributes:
        architecture: its data file.
        dimensions: its sizes.
        headers: shard file name -> header.
        targets: every down-projection and its bias, all layers, in order of layer.
        vocabulary: ``embedding``, ``unembedding``, ``final_norm`` -> shard and entry; the
            unembedding is the embedding where they are tied; what a checkpoint lacks is absent.
        post_norms: layer -> shard and entry of the weight of the norm after its FFN; empty if the
            architecture has none.
    """

    architecture: Architecture
    dimensions: Dimensions
    headers: Mapping[str, Header]
    targets: tuple[Target, ...]
    vocabulary: Mapping[str, tuple[str, TensorInfo]]
    post_norms: Mapping[int, tuple[str, TensorInfo]]

    @property
    def nbytes(self) -> int:
        """Bytes of all shards: what an edit reads, and what it writes."""
        return sum(header.size for header in self.headers.values())

    @property
    def num_parameters(self) -> int:
        """Elements of all floating-point tensors."""
        widths = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}
        return sum(
            info.nbytes // widths[info.dtype]
            for header in self.headers.values()
            for info in header.tensors.values()
            if info.dtype in widths
        )

    def select(self, layers: Iterable[int], bias: bool) -> tuple[Target, ...]:
        """The targets in ``layers``, with or without their biases."""
        wanted = set(layers)
        return tuple(
            target
            for target in self.targets
            if target.layer in wanted and (bias or target.role == "down_proj")
        )


def edit_memory(targets: Iterable[Target]) -> int:
    """Expected peak bytes of editing the largest target; see ``converter.edit.apply``.

    Per element: the bytes as read and as written, and three float32 copies while both the old and
    the new value are needed.
    """
    return max((t.info.nbytes * 2 + prod(t.info.shape) * 12 for t in targets), default=0)


def make_plan(
    config: dict[str, Any], weight_map: Mapping[str, str] | None, headers: Mapping[str, Header]
) -> Plan:
    """Match a checkpoint's headers with its config, its index and its architecture.

    Args:
        config: parsed ``config.json``.
        weight_map: tensor name -> shard file name of the index, or None for a single file.
        headers: shard file name -> header, for every shard there is.

    Raises:
        CheckpointError: a quantized checkpoint, an unknown architecture, an index that does not
            agree with the files, a down-projection that is missing or has the wrong shape or dtype.
    """
    refuse_quantized(config)
    architecture = find_architecture(config)
    dimensions = architecture.dimensions(config)
    tensors = locate_tensors(weight_map, headers)
    prefix = architecture.prefix
    strip = bool(prefix) and not any(name.startswith(prefix) for name in tensors)

    def find(template: str, layer: int = 0) -> tuple[str, TensorInfo] | None:
        name = template.format(layer=layer)
        return tensors.get(name.removeprefix(prefix) if strip else name)

    targets, post_norms = [], {}
    for layer in range(dimensions.num_hidden_layers):
        weight = find(architecture.weight, layer)
        if weight is None and find(architecture.weight.replace(".weight", ".qweight"), layer):
            raise quantized("GPTQ, AWQ or the like, by its .qweight tensors")
        if weight is None:
            raise CheckpointError(
                f"the down-projection of layer {layer} is missing",
                expected=f"a tensor {architecture.weight.format(layer=layer)}, as in every "
                f"{architecture.title} of {dimensions.num_hidden_layers} layers",
                found="no tensor of that name",
            )
        shape = tuple(getattr(dimensions, name) for name in architecture.shape)
        _check(weight[1], shape)
        targets.append(Target(weight[1], weight[0], layer, architecture.output_axis, "down_proj"))
        if architecture.post_norm:
            post_norms[layer] = _norm(find(architecture.post_norm, layer), architecture, layer)
            _check(post_norms[layer][1], (dimensions.hidden_size,))
        if bias := find(architecture.bias, layer):
            _check(bias[1], (dimensions.hidden_size,))
            targets.append(Target(bias[1], bias[0], layer, 0, "down_proj_bias"))
    if extra := find(architecture.weight, dimensions.num_hidden_layers):
        raise CheckpointError(
            "config.json has fewer layers than the checkpoint",
            expected=f"no tensor {extra[1].name} with {dimensions.num_hidden_layers} layers",
            found=f"it in {extra[0]}",
        )
    parts = {
        "embedding": find(architecture.embedding),
        "unembedding": find(architecture.unembedding) or find(architecture.embedding),
        "final_norm": find(architecture.final_norm),
    }
    for role, place in parts.items():
        if place and (place[1].shape[-1:] != (dimensions.hidden_size,) or len(place[1].shape) > 2):
            raise CheckpointError(
                f"tensor {place[1].name} ({role}) contradicts config.json",
                expected=f"a last axis of {dimensions.hidden_size}",
                found=f"shape {list(place[1].shape)}",
            )
    return Plan(
        architecture,
        dimensions,
        headers,
        tuple(targets),
        {role: place for role, place in parts.items() if place is not None},
        post_norms,
    )


def _norm(
    place: tuple[str, TensorInfo] | None, architecture: Architecture, layer: int
) -> tuple[str, TensorInfo]:
    if place is None:
        raise CheckpointError(
            f"the norm after the FFN of layer {layer} is missing",
            expected=f"a tensor {architecture.post_norm.format(layer=layer)}",
            found="no tensor of that name",
        )
    return place


def refuse_quantized(config: dict[str, Any]) -> None:
    """Raise CheckpointError, naming the scheme, if the config says the weights are quantized."""
    scheme = config.get("quantization_config") or config.get("compression_config")
    if scheme:
        name = scheme.get("quant_method", "unnamed") if isinstance(scheme, dict) else str(scheme)
        raise quantized(name)


def quantized(scheme: str) -> CheckpointError:
    """The one sentence about a quantized checkpoint."""
    return CheckpointError(
        "the checkpoint is quantized",
        expected="16- or 32-bit floating-point weights",
        found=f"scheme {scheme}",
        hint="edit the unquantized base and quantize the result",
    )


def locate_tensors(
    weight_map: Mapping[str, str] | None, headers: Mapping[str, Header]
) -> dict[str, tuple[str, TensorInfo]]:
    """Tensor name -> shard and entry, checked against the index.

    Raises:
        CheckpointError: a tensor in two files, in the index but in no file, or in another file
            than the index says.
    """
    tensors: dict[str, tuple[str, TensorInfo]] = {}
    for shard, header in headers.items():
        for name, info in header.tensors.items():
            if name in tensors:
                raise CheckpointError(f"tensor {name} is in two files: {tensors[name][0]}, {shard}")
            tensors[name] = (shard, info)
    for name, shard in (weight_map or {}).items():
        if name not in tensors:
            raise CheckpointError(
                f"the index names tensor {name}", expected=f"it in {shard}", found="it in no file"
            )
        if tensors[name][0] != shard:
            raise CheckpointError(
                f"the index misplaces tensor {name}", expected=shard, found=tensors[name][0]
            )
    return tensors


def _check(info: TensorInfo, shape: tuple[int, ...]) -> None:
    if info.shape != shape:
        raise CheckpointError(
            f"tensor {info.name} contradicts config.json",
            expected=f"shape {list(shape)}",
            found=f"{list(info.shape)}",
        )
    if info.dtype not in FLOATS:
        raise CheckpointError(
            f"tensor {info.name} cannot be edited",
            expected=f"dtype {', '.join(FLOATS)}",
            found=info.dtype,
            hint="use the unquantized checkpoint of this model",
        )
