"""What a conversion will do, decided from the headers alone: no weight is read.

A ``Plan`` knows every tensor of the source and which of them are down-projections. Whatever is
wrong with a checkpoint's structure is found here, before anything is computed or written.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from converter.checkpoints.architectures.architecture import Architecture, find_architecture
from converter.checkpoints.architectures.dimensions import Dimensions
from converter.checkpoints.fp8_scheme import FP8, Scales, Scheme, quantized, read_scheme, scales_of
from converter.checkpoints.safetensors.header import FLOATS, Header, TensorInfo
from converter.errors import CheckpointError
from converter.manifest import Role


@dataclass(frozen=True, slots=True)
class Target:
    """A tensor that an edit may change.

    Attributes:
        info: its entry in the header of ``shard``.
        shard: file name.
        layer: counted from 0.
        axis: the axis of length hidden size: 0 for Linear, 1 for Conv1D, the last of a bias.
        scales: of a weight in FP8, which change with it; else None.
    """

    info: TensorInfo
    shard: str
    layer: int
    axis: int
    role: Role
    scales: Scales | None = None


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
        scheme: how weights are stored in FP8, or None if they are not.
    """

    architecture: Architecture
    dimensions: Dimensions
    headers: Mapping[str, Header]
    targets: tuple[Target, ...]
    vocabulary: Mapping[str, tuple[str, TensorInfo]]
    post_norms: Mapping[int, tuple[str, TensorInfo]]
    scheme: Scheme | None

    @property
    def nbytes(self) -> int:
        """Bytes of all shards: what an edit reads, and what it writes."""
        return sum(header.size for header in self.headers.values())

    @property
    def num_parameters(self) -> int:
        """Elements of all floating-point tensors."""
        widths = {"F8_E4M3": 1, "F8_E5M2": 1, "F16": 2, "BF16": 2, "F32": 4, "F64": 8}
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
    scheme = read_scheme(config)
    architecture = find_architecture(config)
    sizes = architecture.dimensions(config)
    tensors = Names(locate_tensors(weight_map, headers), architecture, sizes)
    targets: list[Target] = []
    post_norms = {}
    for layer in range(sizes.num_hidden_layers):
        targets.extend(_targets(tensors, architecture, sizes, scheme, layer))
        if architecture.post_norm:
            post_norms[layer] = tensors.need(architecture.post_norm, layer)
            _check_shape(post_norms[layer][1], (sizes.hidden_size,))
    _check_all_found(tensors, targets, architecture, sizes)
    vocabulary = _vocabulary(tensors, architecture, sizes)
    return Plan(architecture, sizes, headers, tuple(targets), vocabulary, post_norms, scheme)


Place = tuple[str, TensorInfo]
"""Shard file name, and the entry in its header."""


class Names:
    """The tensors of a checkpoint by the names that its architecture's data file has for them.

    Of the beginnings of names that checkpoints of this architecture have, it takes those under
    which the first layer's down-projection is found.
    """

    def __init__(
        self, tensors: Mapping[str, Place], architecture: Architecture, sizes: Dimensions
    ) -> None:
        self.tensors, self._title = tensors, architecture.title
        self._variant: Mapping[str, str] = {}
        first, _ = next(architecture.projections(0, sizes))
        for variant in ({}, *architecture.variants):
            self._variant = variant
            if self.find(first.weight):
                return
        self._variant = {}

    def on_disk(self, name: str) -> str:
        """A name of the data file as it is on disk."""
        for ours, theirs in self._variant.items():
            if name.startswith(ours):
                return theirs + name[len(ours) :]
        return name

    def of_file(self, name: str) -> str:
        """The reverse."""
        for ours, theirs in self._variant.items():
            if name.startswith(theirs):
                return ours + name[len(theirs) :]
        return name

    def find(self, template: str, layer: int = 0, expert: int = 0) -> Place | None:
        """A tensor, or None if the checkpoint has none of that name."""
        return self.tensors.get(self.on_disk(template.format(layer=layer, expert=expert)))

    def need(self, template: str, layer: int, expert: int = 0) -> Place:
        """A tensor that must be there. Raises CheckpointError."""
        if place := self.find(template, layer, expert):
            return place
        name = self.on_disk(template.format(layer=layer, expert=expert))
        if name.replace(".weight", ".qweight") in self.tensors:
            raise quantized("GPTQ, AWQ or the like, by its .qweight tensors")
        raise CheckpointError(
            f"tensor {name} is missing", expected=f"it, as in every {self._title} of these sizes",
            found="no tensor of that name", hint="compare config.json with the checkpoint",
        )  # fmt: skip


def _targets(
    tensors: Names,
    architecture: Architecture,
    sizes: Dimensions,
    scheme: Scheme | None,
    layer: int,
) -> Iterator[Target]:
    """The down-projections of a layer and their biases, each checked against the config."""
    for kind, expert in architecture.projections(layer, sizes):
        shard, info = tensors.need(kind.weight, layer, expert)
        _check_shape(info, tuple(getattr(sizes, name) for name in kind.shape))
        scales = None
        if scheme and info.dtype == FP8:
            scales = scales_of(scheme, info, tensors.tensors)
        else:
            _check_dtype(info)
        yield Target(info, shard, layer, kind.output_axis, "down_proj", scales)
        bias = tensors.find(kind.bias, layer, expert) if kind.bias else None
        if bias:
            fused = info.shape[:1] if len(info.shape) == 3 else ()
            _check_shape(bias[1], (*fused, sizes.hidden_size))
            _check_dtype(bias[1])
            yield Target(bias[1], bias[0], layer, len(fused), "down_proj_bias")


def _check_all_found(
    tensors: Names, targets: Iterable[Target], architecture: Architecture, sizes: Dimensions
) -> None:
    """No tensor may be named like a down-projection and be none by the config.

    Raises:
        CheckpointError: naming it: it would be left unedited.
    """
    found = {target.info.name for target in targets}
    end = sizes.num_hidden_layers
    for name, (shard, _) in tensors.tensors.items():
        layer = architecture.find_layer(tensors.of_file(name))
        unused = layer is not None and end <= layer < end + sizes.unused_layers
        if layer is not None and name not in found and not unused:
            experts = f" and {sizes.num_experts} experts" if sizes.num_experts else ""
            raise CheckpointError(
                "the checkpoint has a down-projection that config.json does not imply",
                expected=f"no tensor {name} with {end} layers{experts}",
                found=f"it in {shard}",
            )


def _vocabulary(tensors: Names, architecture: Architecture, sizes: Dimensions) -> dict[str, Place]:
    """What it takes to decode directions; nothing where embeddings have a width of their own."""
    places = {
        "embedding": (embedding := tensors.need(architecture.embedding, 0)),
        "unembedding": tensors.find(architecture.unembedding) or embedding,
        "final_norm": tensors.find(architecture.final_norm),
    }
    found = {role: place for role, place in places.items() if place is not None}
    for role, (_, info) in found.items():
        width = sizes.hidden_size if role == "final_norm" else sizes.embedding_size
        if info.shape[-1:] != (width,) or len(info.shape) > 2:
            raise CheckpointError(
                f"tensor {info.name} ({role}) contradicts config.json",
                expected=f"a last axis of {width}",
                found=f"shape {list(info.shape)}",
            )
    return found if sizes.embedding_size == sizes.hidden_size else {}


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


def _check_shape(info: TensorInfo, shape: tuple[int, ...]) -> None:
    if info.shape != shape:
        raise CheckpointError(
            f"tensor {info.name} contradicts config.json",
            expected=f"shape {list(shape)}",
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
