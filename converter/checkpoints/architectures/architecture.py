"""The names of a model's tensors and modules, and the layers that have an FFN.

An ``Architecture`` describes one model, by its config; ``inference`` makes it. No Python file knows
the name of a model.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import nn

Role = Literal["down_proj", "gate_proj", "up_proj", "o_proj", "lm_head"]
"""The role of a linear map, by its name in Llama."""


@dataclass(frozen=True, slots=True)
class Dimensions:
    """Sizes of one model; 0 for parts that it does not have.

    Attributes:
        intermediate_size: of the widest FFN, or of its experts if it has nothing else.
        num_experts: of a mixture, without shared experts.
        attention_heads: by the config; 0 if it does not name one number.
        sparse_layers: those with experts.
        ffn_layers: those with an FFN; others are left alone.
        idle_layers: layers that text alone does not run through; not edited, either.
        unused_layers: layers that a checkpoint may have after the last, for speculative decoding;
            the model does not run them, and they are not edited.
    """

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_experts: int = 0
    sparse_layers: tuple[int, ...] = ()
    ffn_layers: tuple[int, ...] = ()
    idle_layers: tuple[int, ...] = ()
    unused_layers: int = 0
    attention_heads: int = 0

    @property
    def without_ffn(self) -> tuple[int, ...]:
        """The layers that have no FFN."""
        return tuple(n for n in range(self.num_hidden_layers) if n not in self.ffn_layers)


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """How the weights of one role, or of its experts, are named and stored.

    Attributes:
        weight, bias: disk names, with ``{layer}`` unless there is one for all layers, and with
            ``{expert}`` if each expert has a tensor of its own. A checkpoint may lack the bias.
        shape: of the tensor.
        output_axis: the axis of the weight that runs over the outputs.
        module: the module of the transformers class with this output: the linear map itself, or the
            FFN if other weights contribute to the output.
        mixed: whether other weights contribute to the module's output.
        part: (i, n) if the tensor holds n of these maps along the output axis, this being the i-th.
        experts: number of tensors, if the name has ``{expert}``.
    """

    weight: str
    bias: str
    shape: tuple[int, ...]
    output_axis: int
    module: str
    mixed: bool = False
    part: tuple[int, int] = (0, 1)
    experts: int = 0

    def beside(self, name: str) -> str:
        """The disk name, without ``.weight``, of another map in the same module."""
        return f"{self.weight.removesuffix('.weight').rpartition('.')[0]}.{name}"


@dataclass(frozen=True, slots=True)
class FfnSpec:
    """An FFN of a layer. Names have ``{layer}``.

    Attributes:
        module: of the transformers class; its down-projections make its output.
        site: the module whose output is added to the residual stream, up to a factor: the same, or
            a norm after it.
        norm: disk name of that norm's weight, or empty.
        norm_offset: the norm multiplies by its weight plus this.
        weights: its down-projections.
    """

    module: str
    site: str
    norm: str
    norm_offset: int
    weights: tuple[WeightSpec, ...]


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """How layers of one kind are built.

    Attributes:
        roles: all except ``down_proj`` and ``lm_head``.
        runs: whether text alone runs through them; if not, nothing is known of them.
        o_writes: whether the output of ``o_proj`` is added to the residual stream, up to a factor.
        parallel: whether a constant in the bias of the only down-projection acts like one in the
            output of ``o_proj``; see ``ffn.takes_constant``.
        shapes: of all tensors of such a layer, by disk name with ``{layer}``.
    """

    ffns: tuple[FfnSpec, ...]
    roles: Mapping[Role, WeightSpec]
    runs: bool = True
    o_writes: bool = False
    parallel: bool = False
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class BiasSpec:
    """How a checkpoint gets missing biases of a role.

    Attributes:
        config: merge patch of ``config.json``.
        zeros: names of other maps that then have a bias, too.
        told: whether the config already says so, and existing biases are read.
    """

    config: Mapping[str, Any]
    zeros: tuple[str, ...]
    told: bool = False


@dataclass(frozen=True, slots=True)
class HeadSpec:
    """How a model whose head is the embedding gets a head of its own.

    Attributes:
        config: merge patch of ``config.json``.
        module: of the class of transformers, that makes the logits.
    """

    config: Mapping[str, Any]
    module: str


@dataclass(frozen=True, slots=True)
class Proof:
    """The proof of a description, on a tiny model; see ``proof``.

    Attributes:
        described_by: ``inference``, or the name of a data file.
        transformers: its version.
        layers, tensors: number of layers of the tiny model, and of projected tensors of its
            checkpoint.
        tolerance: relative, of logits and of the part left along the removed directions.
        error: the largest difference of the logits from those of projected outputs, over the
            largest change by projecting.
        left: the largest component of a site's output along these directions, over its largest
            output.
        streams: whether layers pass on hidden states and nothing else, so that they can be run one
            after the other.
    """

    described_by: str
    transformers: str
    layers: int
    tensors: int
    tolerance: float
    error: float
    left: float
    streams: bool


@dataclass(frozen=True)
class Architecture:
    """One model, without its weights.

    Attributes:
        title: name of the class of transformers.
        auto_class: of transformers, that loads it.
        kinds: of layers, and ``layers`` the kind of each.
        head: the unembedding, or None if it is the embedding.
        embedding, unembedding, final_norm: disk names; the norm's is empty if it has no weight, and
            a checkpoint with tied embeddings need not have the unembedding.
        embedding_shape: of the embedding.
        norm_offset: the final norm multiplies by its weight plus this.
        block: name of a decoder layer in the class, with ``{layer}``.
        bias_routes: of roles whose biases can be added.
        untying: how the head becomes a weight of its own, or became one; None if no way is known.
        left_alone: other parts that write into the residual stream and are not edited, in words.
        proof: of the description; None before it.
    """

    title: str
    model_type: str
    auto_class: str
    sizes: Dimensions
    kinds: tuple[LayerSpec, ...]
    layers: tuple[int, ...]
    head: WeightSpec | None
    embedding: str
    unembedding: str
    embedding_shape: tuple[int, ...]
    final_norm: str
    norm_offset: int
    block: str
    bias_routes: Mapping[Role, BiasSpec] = field(default_factory=dict)
    untying: HeadSpec | None = None
    left_alone: str = ""
    proof: Proof | None = None

    def layer(self, number: int) -> LayerSpec:
        """How a layer is built."""
        return self.kinds[self.layers[number]]

    @property
    def is_mixture(self) -> bool:
        """Whether a layer has experts."""
        return bool(self.sizes.sparse_layers)

    @property
    def roles(self) -> tuple[Role, ...]:
        """The roles that a layer has, or the model."""
        found: list[Role] = ["down_proj"]
        for role in ("gate_proj", "up_proj", "o_proj"):
            if any(role in kind.roles for kind in self.kinds):
                found.append(role)
        return (*found, "lm_head") if self.head else tuple(found)

    def specs(self, role: Role, layer: int) -> Iterator[tuple[WeightSpec, int | None]]:
        """The weights of a role that a layer must have, and the expert of each, if it has one."""
        kind = self.layer(layer) if role != "lm_head" else None
        if role == "down_proj" and kind:
            specs = [spec for ffn in kind.ffns for spec in ffn.weights]
        else:
            one = kind.roles.get(role) if kind else self.head
            specs = [one] if one else []
        for spec in specs:
            for expert in range(spec.experts) if spec.experts else (None,):
                yield spec, expert

    def sites(self, layer: int) -> tuple[str, ...]:
        """The modules whose outputs sum to the contribution of a layer's FFN."""
        return tuple(ffn.site.format(layer=layer) for ffn in self.layer(layer).ffns)

    def down_projections(self) -> tuple[str, ...]:
        """Disk names of the weights of all kinds of down-projections."""
        specs = (s for kind in self.kinds for ffn in kind.ffns for s in ffn.weights)
        return tuple(dict.fromkeys(spec.weight for spec in specs))

    def check_modules(self, model: "nn.Module") -> None:
        """Raise ValueError if a module is not in ``model``: it is of another class."""
        names = {name for name, _ in model.named_modules()}
        for layer in range(self.sizes.num_hidden_layers):
            for name in (self.block.format(layer=layer), *self.sites(layer)):
                if name not in names:
                    raise ValueError(f"{type(model).__name__} has no {name}")

    def shape_of(self, name: str) -> tuple[int, ...] | None:
        """The shape of a tensor of a layer by its disk name; None if there is none of that name."""
        start = self._start
        number, dot, rest = name.removeprefix(start).partition(".")
        known = name.startswith(start) and number.isdecimal() and len(number) < 10 and dot
        if not known or int(number) >= len(self.layers):
            return None
        return self.layer(int(number)).shapes.get(f"{start}{{layer}}.{rest}")

    def find_layer(self, name: str) -> int | None:
        """The layer whose down-projection has this name; None if it is another tensor."""
        found = self._pattern.fullmatch(name)
        return int(next(g for g in found.groups() if g is not None)) if found else None

    @cached_property
    def _start(self) -> str:
        """The beginnings of the disk names of a layer's tensors, before its number."""
        return self.down_projections()[0].partition("{layer}")[0]

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        names = (
            re.escape(name).replace(r"\{layer\}", r"(\d{1,9})").replace(r"\{expert\}", r"\d+")
            for name in self.down_projections()
        )
        return re.compile("|".join(names) or r"(?!)")
