"""Plan a conversion from the headers alone: no weight is read.

Every fault of a checkpoint's structure is found here, before anything is computed or written.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from converter.checkpoints.architectures.architecture import (
    Architecture,
    Dimensions,
    Role,
    WeightSpec,
)
from converter.checkpoints.architectures.find import (
    find_architecture,
    find_renaming,
)
from converter.checkpoints.architectures.stored import spelling
from converter.checkpoints.chat_template import templates_in
from converter.checkpoints.layout import two_copies
from converter.checkpoints.patch import merge
from converter.checkpoints.safetensors.header import FLOATS, Header
from converter.checkpoints.source import Source
from converter.checkpoints.weights import (
    Names,
    Place,
    Scheme,
    Weight,
    check_shape,
    read_scheme,
    stale_quantization,
)
from converter.errors import CheckpointError, OptionError


@dataclass(frozen=True, slots=True)
class BiasRoute:
    """How the weights of a role have or get biases, in every layer.

    Attributes:
        biases: layer -> name of the role's bias, or of another that acts as one.
        config: keys to set in ``config.json``; empty if the checkpoint has the biases.
        created: name -> shape of every tensor to create: the biases, and others that the same keys
            imply, which must be zero; empty if the checkpoint has them.
        dtype: of these: that of the role's weights, or bfloat16 if they have fewer bits.
    """

    biases: Mapping[int, str]
    config: Mapping[str, Any]
    created: Mapping[str, tuple[int, ...]]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class HeadRoute:
    """How a model whose head is its embedding gets one of its own.

    Attributes:
        embedding: (V, D), as the map that makes the logits.
        dtype: of the stored embedding.
        name: of the tensor to create, of the same shape.
        config: keys to set in ``config.json``.
    """

    embedding: Weight
    dtype: torch.dtype
    name: str
    config: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Plan:
    """The structure of a source checkpoint.

    Attributes:
        headers: shard file name -> header.
        targets: every down-projection and its bias, all layers, in order of layer.
        roles: the roles of its weights.
        vocabulary: ``embedding``, ``unembedding``, ``final_norm`` -> shard and entry, if the
            checkpoint has them. If embeddings are tied, the unembedding is the embedding.
        post_norms: layer -> shard and entry of the weight of the norm after its FFN, of the layers
            that have one.
        scheme: the FP8 storage of weights, or None.
        stale: file of the source -> merge patch that drops keys which the tensors refute.
        folder: of the config, if it is in one.
        config: parsed, without keys that the tensors refute.
    """

    architecture: Architecture
    headers: Mapping[str, Header]
    targets: tuple[Weight, ...]
    roles: tuple[Role, ...]
    vocabulary: Mapping[str, Place]
    post_norms: Mapping[int, Place]
    scheme: Scheme | None
    names: Names
    stale: Mapping[str, Mapping[str, Any]]
    folder: Path | None = None
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def dimensions(self) -> Dimensions:
        """Sizes of the model."""
        return self.architecture.sizes

    @property
    def templates(self) -> Mapping[str, str]:
        """File with chat templates -> its text. Raises CheckpointError."""
        return templates_in(self.folder) if self.folder else {}

    @property
    def nbytes(self) -> int:
        """Bytes of all shards, which an edit reads and writes."""
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

    def weights(self, role: Role, layers: Iterable[int] | None = None) -> tuple[Weight, ...]:
        """The weights of a role, in order of layer and expert, found on demand.

        ``layers`` is None for all. ``lm_head`` is in no layer and is returned for any ``layers``.

        Raises:
            OptionError: the checkpoint has no such role.
            CheckpointError: a weight is missing, or has not the shape or dtype that it must have.
        """
        return tuple(weight for weight in self._located(role, layers) if not weight.is_bias)

    def biases(self, role: Role, layers: Iterable[int] | None = None) -> tuple[Weight, ...]:
        """The existing biases of these weights. Raises as ``weights``."""
        return tuple(weight for weight in self._located(role, layers) if weight.is_bias)

    def find(self, names: Collection[str]) -> dict[str, Weight]:
        """The tensors among ``names`` that are weights or biases of a role, by name.

        Raises CheckpointError, as ``weights``.
        """
        found: dict[str, Weight] = {}
        for role in self.roles:
            if len(found) < len(names):
                located = self._located(role, None)
                found |= {w.info.name: w for w in located if w.info.name in names}
        return found

    def norm_offset(self, layer: int) -> int:
        """The offset that the norm after a layer's FFN adds to its weight."""
        return sum(ffn.norm_offset for ffn in self.architecture.layer(layer).ffns)

    def bias_route(self, role: Role) -> BiasRoute | None:
        """How a role has or gets biases; None if no way is known.

        If attention and FFN are parallel, the bias of the down-projection serves as the missing
        bias of ``o_proj``. There is no route if only some layers have a bias, or if maps have a
        bias that the config does not announce: the class would not load such a checkpoint
        correctly.

        Raises as ``weights``.
        """
        weights, biases = self.weights(role), self.biases(role)
        dtype = FLOATS.get(weights[0].info.dtype, torch.bfloat16)
        if len(biases) == len(weights):
            return BiasRoute({bias.layer: bias.info.name for bias in biases}, {}, {}, dtype)
        if biases:
            return None
        if role not in self.architecture.bias_routes:
            layers = [weight.layer for weight in weights]
            parallel = all(self.architecture.layer(layer).parallel for layer in layers)
            beside = self.biases("down_proj", layers) if role == "o_proj" and parallel else ()
            if len(beside) != len(weights):
                return None
            return BiasRoute({bias.layer: bias.info.name for bias in beside}, {}, {}, dtype)
        route = self.architecture.bias_routes[role]
        spec = self.architecture.layer(weights[0].layer).roles[role]
        names = {w.layer: self.names.on_disk(spec.bias, w.layer) for w in weights}
        created = {names[w.layer]: w.info.shape[w.axis : w.axis + 1] for w in weights}
        for weight in weights:
            for other in map(spec.beside, route.zeros):
                if not self.names.find(f"{other}.weight", weight.layer):
                    continue  # a layer that shares the keys and values of another has no such map
                shape = (-1, self.dimensions.hidden_size)
                _, info = self.names.require(f"{other}.weight", weight.layer, shape=shape)
                if self.names.find(f"{other}.bias", weight.layer):
                    if not route.told:
                        return None
                    continue
                created[self.names.on_disk(f"{other}.bias", weight.layer)] = info.shape[:1]
        return BiasRoute(names, route.config, created, dtype)

    def head_route(self) -> HeadRoute | None:
        """How the head becomes a weight of its own; None if it is one, or if no way is known.

        Also None if the checkpoint has an unused tensor of that name. Raises CheckpointError.
        """
        architecture, spec = self.architecture, self.architecture.untying
        name = self.names.on_disk(architecture.unembedding)
        shape = architecture.embedding_shape
        shard, info = self.names.require(architecture.embedding, shape=shape)
        if spec is None or name in self.names.tensors or info.dtype not in FLOATS:
            return None
        layer, module = self.dimensions.num_hidden_layers, spec.module
        embedding = Weight(info, shard, "lm_head", layer, 0, module=module)
        return HeadRoute(embedding, FLOATS[info.dtype], name, spec.config)

    def bias_modules(self) -> dict[str, str]:
        """Name of each bias that the checkpoint could get -> its module."""
        found: dict[str, str] = {}
        for role in self.architecture.bias_routes:
            route = self.bias_route(role) if role in self.roles else None
            if route is not None:
                modules = {weight.layer: weight.module for weight in self.weights(role)}
                found |= {name: modules[layer] for layer, name in route.biases.items()}
        return found

    def _located(self, role: Role, layers: Iterable[int] | None) -> Iterable[Weight]:
        """Weights and biases of a role."""
        if role not in self.roles:
            raise OptionError(
                f"{self.architecture.title}: this checkpoint has no {role}",
                expected=" or ".join(self.roles),
            )
        count = self.dimensions.num_hidden_layers
        if role == "lm_head":
            return self.names.locate(role, count)
        wanted = set(range(count) if layers is None else layers)
        if role == "down_proj":
            return (target for target in self.targets if target.layer in wanted)
        chosen = (layer for layer in range(count) if layer in wanted)
        return (weight for layer in chosen for weight in self.names.locate(role, layer))


def read_plan(source: Source) -> Plan:
    """The plan of a checkpoint; see ``make_plan``."""
    return make_plan(source.config, source.weight_map, source.headers(), source.folder)


def make_plan(
    config: dict[str, Any],
    weight_map: Mapping[str, str] | None,
    headers: Mapping[str, Header],
    folder: Path | None = None,
) -> Plan:
    """Match a checkpoint's headers with its config, its index and its architecture.

    Args:
        config: parsed ``config.json``.
        weight_map: of the index, tensor name -> shard file name, or None for a single file.
        headers: of every shard there is, by file name.
        folder: of the config, for code of the model's own; see ``kind.allow_own_code``.

    Raises:
        CheckpointError: a quantized checkpoint, an unknown architecture, an index that does not
            agree with the files, a down-projection that is missing or has the wrong shape or dtype.
    """
    tensors = locate_tensors(weight_map, headers)
    patch = stale_quantization(config, tensors)
    config = merge(config, patch)
    scheme = read_scheme(config)
    _check_depth(config, tensors)
    architecture = find_architecture(config, folder)
    layer = architecture.sizes.ffn_layers[0]
    spec, expert = next(architecture.specs("down_proj", layer))
    usual = spec.weight.format(layer=layer, expert=expert) in tensors
    other = {} if usual else spelling(find_renaming(config, folder), architecture, tensors)
    names = Names(tensors, architecture, scheme, other)
    targets: list[Weight] = []
    post_norms = {}
    for layer in architecture.sizes.ffn_layers:
        targets.extend(names.locate("down_proj", layer))
        for ffn in architecture.layer(layer).ffns:
            if ffn.norm:
                shape = (architecture.sizes.hidden_size,)
                post_norms[layer] = names.require(ffn.norm, layer, shape=shape)
    _check_all_found(names, targets)
    _check_no_other_names(names, config, folder)
    roles = tuple(_roles(names))
    vocabulary = _vocabulary(names)
    stale = {"config.json": patch} if patch else {}
    return Plan(
        architecture, headers, tuple(targets), roles, vocabulary, post_norms, scheme, names, stale,
        folder, config,
    )  # fmt: skip


def _check_depth(config: Mapping[str, Any], tensors: Mapping[str, Place]) -> None:
    """Raise CheckpointError if a config has more layers than there are tensors, before such a model
    is built.
    """
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        count = part.get("num_hidden_layers")
        if type(count) is int and count > max(len(tensors), 1):
            raise CheckpointError(
                "config.json: num_hidden_layers", found=f"{count:,}",
                expected=f"no more than the {len(tensors):,} tensors of the checkpoint",
            )  # fmt: skip


def _roles(names: Names) -> Iterator[Role]:
    """The roles that a checkpoint has, by the first layer that has them.

    With tied embeddings there is no ``lm_head``, even if there is a tensor of that name, since
    loaders may ignore it.
    """
    architecture = names.architecture
    for role in architecture.roles:
        if role in ("down_proj", "lm_head"):
            if role == "down_proj" or (architecture.head and names.find(architecture.head.weight)):
                yield role
            continue
        first = next(
            n for n in range(len(architecture.layers)) if role in architecture.layer(n).roles
        )
        if names.find(architecture.layer(first).roles[role].weight, first):
            yield role


def _check_all_found(names: Names, targets: Iterable[Weight]) -> None:
    """Raise CheckpointError if a tensor is named like a down-projection that the config does not
    imply, and so would stay unedited; or if its shape is not the implied one.
    """
    architecture, sizes = names.architecture, names.architecture.sizes
    found = {target.info.name for target in targets}
    end = sizes.num_hidden_layers
    for name, (shard, info) in names.tensors.items():
        ours = names.of_file(name)
        if info.dtype in FLOATS and (shape := architecture.shape_of(ours)) is not None:
            check_shape(info, shape)
        layer = architecture.find_layer(ours)
        unused = layer is not None and end <= layer < end + sizes.unused_layers
        unused = unused or layer in sizes.idle_layers
        if layer is not None and name not in found and not unused:
            experts = f" and {sizes.num_experts} experts" if sizes.num_experts else ""
            raise CheckpointError(
                "the checkpoint has a down-projection that config.json does not imply",
                expected=f"no tensor {name} with {end} layers{experts}",
                found=f"it in {shard}",
            )


def _check_no_other_names(names: Names, config: Mapping[str, Any], folder: Path | None) -> None:
    """Raise CheckpointError if the weight of a down-projection, its bias or the norm after it has a
    second name: transformers may load that one, which would not be edited.
    """
    architecture = names.architecture
    others = [
        name
        for name in names.tensors
        if architecture.shape_of(names.of_file(name)) is None
        and any(part.isdecimal() for part in name.split("."))
    ]
    if not others:
        return
    weight_of = find_renaming(config, folder).weight_of
    kept: dict[str, str] = {}
    for layer in architecture.sizes.ffn_layers:
        for ffn in architecture.layer(layer).ffns:
            for template in (*_templates(ffn.weights), ffn.norm):
                name = template.format(layer=layer, expert=0)
                if template and (key := weight_of(name)) is not None:
                    kept[key] = names.on_disk(template, layer, 0)
    for name in others:
        if (key := weight_of(name)) in kept:
            raise CheckpointError(
                f"the checkpoint has a weight by two names, {name} and {kept[key]}",
                expected="one of them: transformers loads either, and one only would be edited",
                hint="load the model with transformers, and save it again with save_pretrained",
            )


def _templates(weights: Iterable[WeightSpec]) -> Iterator[str]:
    for spec in weights:
        yield spec.weight
        yield spec.bias


def _vocabulary(names: Names) -> dict[str, Place]:
    """The tensors for decoding directions; empty if embeddings have another width."""
    architecture, sizes = names.architecture, names.architecture.sizes
    head = architecture.head
    places = {
        "embedding": (embedding := names.require(architecture.embedding)),
        "unembedding": (names.find(head.weight) if head else None) or embedding,
        "final_norm": names.find(architecture.final_norm),
    }
    found = {role: place for role, place in places.items() if place is not None}
    for role, (_, info) in found.items():
        rows, width = head.shape if head and role == "unembedding" else architecture.embedding_shape
        width = sizes.hidden_size if role == "final_norm" else width
        if info.shape[-1:] != (width,) or len(info.shape) > 2:
            raise CheckpointError(
                f"tensor {info.name} ({role}) contradicts config.json",
                expected=f"a last axis of {width}",
                found=f"shape {list(info.shape)}",
            )
        if role != "final_norm" and info.shape[0] != rows:
            raise CheckpointError(
                f"tensor {info.name} ({role}) contradicts config.json",
                expected=f"{rows} rows, its vocab_size",
                found=f"{info.shape[0]}",
                hint="correct vocab_size: transformers does not load such a checkpoint",
            )
    return found if architecture.embedding_shape[-1] == sizes.hidden_size else {}


def locate_tensors(
    weight_map: Mapping[str, str] | None, headers: Mapping[str, Header]
) -> dict[str, Place]:
    """Tensor name -> shard and entry, checked against the index.

    Raises:
        CheckpointError: a tensor in two files, in the index but in no file, or in another file
            than the index says.
    """
    tensors: dict[str, Place] = {}
    index = weight_map or {}
    for shard, header in headers.items():
        for name, info in header.tensors.items():
            if name in tensors:
                raise two_copies(name, index.get(name), {tensors[name][0], shard})
            tensors[name] = (shard, info)
    for name, shard in index.items():
        if name not in tensors:
            raise CheckpointError(
                f"the index names tensor {name}", expected=f"it in {shard}", found="it in no file",
                hint="fetch the index and its files again",
            )  # fmt: skip
        if tensors[name][0] != shard:
            raise CheckpointError(
                f"the index misplaces tensor {name}", expected=shard, found=tensors[name][0],
                hint="fetch the index and its files again",
            )  # fmt: skip
    return tensors
