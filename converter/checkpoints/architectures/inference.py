"""Describe a model from its config alone, without a list of models.

The class of transformers is built on the meta device, for the real sizes, and as a tiny model with
random weights, on which ``ffn`` finds what each kind of layer has, and ``stored`` how transformers
stores it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from converter.checkpoints.architectures import library
from converter.checkpoints.architectures.architecture import (
    Architecture,
    BiasSpec,
    Dimensions,
    FfnSpec,
    LayerSpec,
    Role,
    WeightSpec,
)
from converter.checkpoints.architectures.experiments import (
    Call,
    Layer,
    check_positions,
    check_unshared,
    decoder_layers,
    record,
    silenced,
)
from converter.checkpoints.architectures.ffn import (
    Ffn,
    Map,
    check_complete,
    examine,
    find_ffns,
    find_o_proj,
    output_axis,
    takes_constant,
)
from converter.checkpoints.architectures.relabelling import relabelled
from converter.checkpoints.architectures.stored import Storage
from converter.checkpoints.architectures.tiny import (
    Tiny,
    make_tiny,
    signature,
)
from converter.checkpoints.architectures.untying import find_untying


@dataclass(frozen=True, slots=True)
class Hints:
    """Hints of a data file; empty fields are left to inference.

    Attributes:
        blocks: name of the list of decoder layers in the class.
        ffns: names of the FFNs within a layer; a layer may have only some of them.
        left_alone: other parts that write into the residual stream and are not edited, in words.
    """

    blocks: str = ""
    ffns: tuple[str, ...] = ()
    left_alone: str = ""


@dataclass(slots=True)
class Inferred:
    """A description, and the model and tiny model behind it.

    Attributes:
        layers: of the tiny model, in order; None for one that text does not run through.
    """

    architecture: Architecture
    tiny: Tiny
    layers: list[Layer | None]


def infer(
    kind: Any, config: Any, auto_class: str, hints: Hints = Hints(), model: Any = None
) -> Inferred:
    """Describe a model.

    Args:
        kind: class of transformers.
        config: its config.
        auto_class: that loads it.
        model: of the class, on the meta device, if there is one already.

    Raises:
        ValueError: something cannot be described; the message names it.
    """
    model = model or library.on_meta(kind, config)
    tiny = make_tiny(kind, config, model)
    place, blocks, calls = decoder_layers(tiny, hints.blocks)
    check_positions((c for block in blocks for c in calls[block]), tiny.inputs["input_ids"].shape)
    real = model.get_submodule(place)
    check_unshared(place, list(real))
    layers = [Layer(b, calls[b][0], tiny.tolerance) if calls[b] else None for b in blocks]
    described = _Describe(model, tiny, place)
    kinds: dict[tuple[Any, ...], int] = {}
    specs: list[LayerSpec] = []
    numbers: list[int] = []
    for number, block in enumerate(real):
        key = signature(block)
        if key not in kinds:
            kinds[key] = len(specs)
            if number >= len(layers):
                raise ValueError(f"no tiny model has a layer that is built like layer {number}")
            layer = layers[number]
            specs.append(described.layer(number, layer, hints.ffns) if layer else IDLE)
        numbers.append(kinds[key])
    if not any(spec.ffns for spec in specs):
        raise ValueError(NO_FFN)
    if not hints.ffns:
        _check_outside(tiny, place)
    final_norm, offset = described.final_norm(blocks[-1], calls)
    embedding = described.storage.tensor_of(_key(model, model.get_input_embeddings().weight))
    architecture = Architecture(
        title=kind.__name__,
        model_type=config.model_type,
        auto_class=auto_class,
        sizes=_sizes(config, specs, numbers),
        kinds=tuple(specs),
        layers=tuple(numbers),
        head=described.head(),
        embedding=embedding[0],
        unembedding=described.storage.name_of(
            f"{_name(model, model.get_output_embeddings())}.weight"
        ),
        embedding_shape=embedding[1],
        final_norm=final_norm,
        norm_offset=offset,
        block=f"{place}.{{layer}}",
        bias_routes=_bias_routes(kind, tiny, place, specs) or relabelled(config, tiny, specs),
        untying=find_untying(kind, tiny.config),
        left_alone=hints.left_alone,
    )
    return Inferred(architecture, tiny, layers)


class _Around(nn.Module):
    """A module as the only one of another."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.inner = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


def _check_outside(tiny: Tiny, place: str) -> None:
    """Raise ValueError if a module outside of the layers is like an FFN.

    Such a module gets hidden states, treats positions separately, and is nonlinear apart from
    norms; and logits still depend on the text without its output, so it adds to hidden states. A
    part of a head, which everything goes through, does not.
    """
    modules = {
        module: name
        for name, module in tiny.model.named_modules()
        if not place.startswith(name) and not name.startswith(f"{place}.") and name
        and any(p.ndim > 1 for p in module.parameters())
        and not any(p.is_meta for p in module.parameters())
    }  # fmt: skip
    for module, calls in record(modules, tiny.run).items():
        for call in calls[:1]:
            state, given = call.state, call.given
            if state is None or given is None or state.shape != given.shape:
                continue
            if not state.is_floating_point() or state.ndim < 2:
                continue
            layer = Layer(_Around(module), call, tiny.tolerance)
            if not layer.is_position_wise("inner") or layer.is_affine("inner"):
                continue
            with silenced(module):
                one, other = tiny.run()[:2]
            if (one - other).abs().max() > layer.noise(one):
                raise ValueError(
                    f"{modules[module]} is like a feed-forward network, and in none of the layers"
                )


NO_FFN = "no layer has a feed-forward network"
"""Why a model of state spaces alone cannot be edited."""

IDLE = LayerSpec((), {}, runs=False)
"""A layer that text alone does not run through."""


class _Describe:
    """Makes descriptions of layers."""

    def __init__(self, model: Any, tiny: Tiny, place: str) -> None:
        self.model, self.tiny, self.place = model, tiny, place
        self.storage = Storage(model, tiny, place)

    def layer(self, number: int, layer: Layer, hinted: Sequence[str]) -> LayerSpec:
        """A layer of the tiny model, as the description of its kind."""
        try:
            if hinted:
                found = [examine(layer, name) for name in hinted if name in layer.modules]
            else:
                found = find_ffns(layer)
                if found:
                    check_complete(layer, found)
        except ValueError as error:
            raise ValueError(f"in layer {number}, {error}") from error
        if len(found) > 1 and any(ffn.norm for ffn in found):
            raise ValueError(
                f"in layer {number}, {' and '.join(f.module for f in found)} are feed-forward "
                "networks with norms of their own"
            )
        roles: dict[Role, WeightSpec] = {}
        one = found[0] if len(found) == 1 else None
        maps: dict[Role, Map | None] = {
            "gate_proj": one.gate if one else None,
            "up_proj": one.up if one else None,
            "o_proj": find_o_proj(layer, found),
        }
        for role, found_map in maps.items():
            if found_map is not None and (spec := self._map(number, found_map)):
                roles[role] = spec
        ffns = tuple(self._ffn(number, layer, ffn) for ffn in found)
        o_proj = maps["o_proj"] if "o_proj" in roles else None
        writes = o_proj is not None and layer.writes(o_proj.module)
        parallel = one is not None and o_proj is not None and takes_constant(layer, o_proj, one)
        return LayerSpec(
            ffns, roles, o_writes=writes, parallel=parallel, shapes=self.storage.shapes(number)
        )

    def _ffn(self, number: int, layer: Layer, ffn: Ffn) -> FfnSpec:
        block = f"{self.place}.{{layer}}"
        weights = []
        for name, axis in ffn.weights:
            inside = _joined(ffn.module, name)
            own = inside.removesuffix(".weight")
            parameter = layer.modules[ffn.module].get_parameter(name)
            mixed = len(ffn.weights) > 1 or parameter.ndim > 2
            stem = name.removesuffix("weight")
            bias = next((b for b in ffn.biases if b.startswith(stem)), "")
            module = ffn.module if mixed or own not in layer.modules else own
            weights.append(
                self.storage.of_layer(number, inside, axis, f"{block}.{module}", mixed=mixed,
                           bias=_joined(ffn.module, bias) if bias else "")
            )  # fmt: skip
        stems = [name.removesuffix("weight") for name, _ in ffn.weights]
        for bias in ffn.biases:
            if not any(bias.startswith(stem) for stem in stems):
                raise ValueError(
                    f"in layer {number}, {_joined(ffn.module, bias)} is added to what the "
                    "down-projections give, and is the bias of none of them"
                )
        norm = (
            self.storage.name_of(self.storage.within(number, ffn.norm.weight), number)
            if ffn.norm
            else ""
        )
        offset = ffn.norm.offset if ffn.norm else 0
        return FfnSpec(f"{block}.{ffn.module}", f"{block}.{ffn.site}", norm, offset, tuple(weights))

    def _map(self, number: int, of: Map) -> WeightSpec | None:
        try:
            return self.storage.of_layer(
                number, of.weight, of.axis, f"{self.place}.{{layer}}.{of.module}", part=of.part
            )
        except ValueError:  # another map's rows are between its own, or it is cut into pieces
            return None

    def head(self) -> WeightSpec | None:
        """The unembedding; None if it is the embedding."""
        model = self.model
        module, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        if module is None:
            raise ValueError("no head that makes logits")
        if module.weight is embedding.weight:
            return None
        name = _name(model, module)
        axis = output_axis(self.tiny.model.get_submodule(name))
        if axis is None:
            raise ValueError(f"{name} is no linear map that makes logits")
        return self.storage.of_model(name, axis)

    def final_norm(self, last: nn.Module, calls: Mapping[nn.Module, list[Call]]) -> tuple[str, int]:
        """Disk name of the weight of the norm after the last layer, and its offset; an empty name
        if there is no such weight.
        """
        given = calls[last][0].given if calls[last] else None
        model = self.tiny.model
        others = {n: m for n, m in model.named_modules() if n and not n.startswith(self.place)}
        for name, module in others.items():
            parameters = dict(module.named_parameters())
            if not parameters or any(p.ndim > 1 or p.is_meta for p in parameters.values()):
                continue
            seen = record([module], self.tiny.run)[module]
            state = seen[0].state if len(seen) == 1 else None
            weight = parameters.get("weight")
            if state is None or given is None or weight is None:
                continue
            if state.numel() == given.numel() and torch.equal(state.flatten(), given.flatten()):
                return self.storage.name_of(f"{name}.weight"), _offset(module, state)
        return "", 0


def _joined(module: str, name: str) -> str:
    return f"{module}.{name}" if name else module


def _name(model: nn.Module, module: nn.Module) -> str:
    found: str = next(name for name, other in model.named_modules() if other is module)
    return found


def _key(model: nn.Module, weight: Tensor) -> str:
    return next(name for name, other in model.named_parameters() if other is weight)


def _offset(norm: nn.Module, state: Tensor) -> int:
    """The offset that a norm adds to its weight: with a weight of zeros, it returns zeros or its
    input.
    """
    weight, bias = norm.get_parameter("weight"), getattr(norm, "bias", None)
    old = weight.detach().clone()
    with torch.no_grad():
        weight.zero_()
        given = norm(state)
        if isinstance(bias, Tensor):
            given = given - bias
        weight.copy_(old)
    return int(given.abs().max() > 1e-6)


def _sizes(config: Any, specs: Sequence[LayerSpec], numbers: Sequence[int]) -> Dimensions:
    text = library.text_config(config)
    downs = [[w for ffn in spec.ffns for w in ffn.weights] for spec in specs]
    mixtures = [any(w.experts or len(w.shape) > 2 for w in weights) for weights in downs]
    spec = next(w for weights in downs for w in weights)
    inner = (w.shape[-1 if w.output_axis != len(w.shape) - 1 else -2] for w in chain(*downs))
    experts = {
        weight.experts or weight.shape[0]
        for weights in downs
        for weight in weights
        if weight.experts or len(weight.shape) > 2
    }
    unused = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")
    said = (getattr(text, key, None) for key in unused)
    try:
        heads = getattr(text, "num_attention_heads", 0)
    except RuntimeError:  # it differs by layer, and transformers gives no one number
        heads = 0
    return Dimensions(
        num_hidden_layers=len(numbers),
        hidden_size=spec.shape[spec.output_axis],
        intermediate_size=max(inner),
        num_experts=max(experts, default=0),
        sparse_layers=tuple(n for n, kind in enumerate(numbers) if mixtures[kind]),
        ffn_layers=tuple(n for n, kind in enumerate(numbers) if specs[kind].ffns),
        idle_layers=tuple(n for n, kind in enumerate(numbers) if not specs[kind].runs),
        unused_layers=max((n for n in said if type(n) is int), default=0),
        attention_heads=heads if type(heads) is int else 0,
    )


_BIAS = "attention_bias"
"""The config's key for attention biases, in classes that read it."""


def _bias_routes(
    kind: Any, tiny: Tiny, place: str, specs: Sequence[LayerSpec]
) -> dict[Role, BiasSpec]:
    """How ``o_proj`` gets biases: by a key of the config, in classes that read it."""
    config = tiny.config
    text = library.text_config(config)
    said = getattr(text, _BIAS, None)
    if type(said) is not bool or not all("o_proj" in spec.roles for spec in specs):
        return {}
    try:
        other = set(library.on_meta(kind, library.changed(config, _BIAS, not said)).state_dict())
    except Exception:  # the class refuses the key
        return {}
    before, after = (set(tiny.model.state_dict()), other)[:: -1 if said else 1]
    added = after - before
    names = {f"{spec.roles['o_proj'].module.format(layer=0)}.bias" for spec in specs[:1]}
    first = {key for key in added if key.startswith(f"{place}.0.")}
    above = {key.removesuffix(".bias").rpartition(".")[0] for key in first}
    if before - after or not names <= first or len(above) != 1:
        return {}
    zeros = sorted(key.removesuffix(".bias").rpartition(".")[2] for key in first - names)
    order = {name: place for place, name in enumerate(("q_proj", "k_proj", "v_proj"))}
    zeros.sort(key=lambda name: (order.get(name, len(order)), name))
    return {"o_proj": BiasSpec(library.patch(config, _BIAS, True), tuple(zeros), said)}
