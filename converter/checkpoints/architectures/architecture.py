"""Architectures as data: what the tensors and modules of a model are called.

One TOML file beside this one describes one ``model_type`` of ``config.json``; see
``llama.toml`` for the format. No Python file knows the name of a model.
"""

import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Literal

from converter.checkpoints.architectures.dimensions import Dimensions
from converter.errors import CheckpointError
from converter.text import describe_value

if TYPE_CHECKING:
    from torch import nn

Role = Literal["down_proj", "gate_proj", "up_proj", "o_proj", "lm_head"]
"""What a linear map is for, by its name in Llama."""

_OUTPUTS: Mapping[Role, str] = {
    "down_proj": "hidden_size",
    "gate_proj": "intermediate_size",
    "up_proj": "intermediate_size",
    "o_proj": "hidden_size",
    "lm_head": "vocab_size",
}
"""Role -> the size of the output of its map."""

_EXPERTS = {"weight", "bias", "shape", "output_axis"}
_ROLE = {*_EXPERTS, "module", "part"}
_ROUTE = {"config", "zeros"}
_TABLES: dict[str, set[str]] = {
    "": {"title", "model_type", "variants", "config", "experts", "shared_experts", "norms",
         "vocabulary", "modules", *_OUTPUTS},
    "config": {"within", "num_hidden_layers", "hidden_size", "intermediate_size", "embedding_size",
               "num_experts", "moe_intermediate_size", "shared_expert_intermediate_size",
               "first_dense_layers", "dense_layers", "sparse_step", "unused_layers",
               "attention_size", "vocab_size"},
    **dict.fromkeys(_OUTPUTS, _ROLE),
    "experts": _EXPERTS,
    "shared_experts": _EXPERTS,
    "norms": {"post_ffn", "final", "offset"},
    "vocabulary": {"embedding"},
    "modules": {"auto_class", "block", "ffn"},
}  # fmt: skip
"""The keys of a data file, all of them needed, its own ones under the empty name."""

_FOLDER = files("converter").joinpath("checkpoints/architectures")


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """How the weights of one role, or of its experts, are named and stored.

    Attributes:
        weight, bias: disk names, with ``{layer}`` unless there is one for all layers, and with
            ``{expert}`` if each expert has a tensor of its own. A checkpoint may lack the bias. The
            weight is empty if the architecture has none.
        shape: names of the sizes of the weight's axes, as stored.
        output_axis: the axis of the weight that runs over the outputs.
        module: of the transformers class, that gives the output; empty for experts, which have
            none of their own.
        part: (i, n) if the tensor holds n of these maps along the output axis, this being the i-th.
    """

    weight: str
    bias: str
    shape: tuple[str, ...]
    output_axis: int
    module: str = ""
    part: tuple[int, int] = (0, 1)

    def beside(self, name: str) -> str:
        """The disk name, without ``.weight``, of another map in the same module."""
        return f"{self.weight.removesuffix('.weight').rpartition('.')[0]}.{name}"


@dataclass(frozen=True, slots=True)
class BiasSpec:
    """How a checkpoint gets biases that a role of it lacks.

    Attributes:
        config: keys of ``config.json`` and their values.
        zeros: names of the maps beside the role's that have a bias, too, because of these keys.
    """

    config: Mapping[str, Any]
    zeros: tuple[str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Architecture:
    """One data file.

    Attributes:
        variants: other beginnings of disk names that checkpoints have, each a table from a
            beginning as in this file to the one on disk.
        config: our name of a size -> its key in ``config.json``.
        roles: those that the architecture has; ``down_proj`` and ``lm_head`` are always among them.
            The first is of a dense FFN, and its weight is empty if there is none; its module is the
            FFN if any layer has experts.
        experts, shared_experts: down-projections of a mixture of experts; their weight is empty if
            there are none.
        bias_routes: of roles whose biases can be added.
        post_norm: disk name of the weight of a norm after the FFN, with ``{layer}``, or empty.
        final_norm: disk name, or empty.
        norm_offset: norms multiply by their weight plus this.
        auto_class: of transformers, that loads the model.
        block, ffn: modules of the transformers class, with ``{layer}``: the whole decoder layer,
            and the module whose output is what the FFN adds to the residual stream.
    """

    title: str
    model_type: str
    variants: tuple[Mapping[str, str], ...]
    config: Mapping[str, str]
    roles: Mapping[Role, WeightSpec]
    experts: WeightSpec
    shared_experts: WeightSpec
    bias_routes: Mapping[Role, BiasSpec]
    post_norm: str
    final_norm: str
    norm_offset: int
    embedding: str
    auto_class: str
    block: str
    ffn: str

    def specs(
        self, role: Role, layer: int, sizes: Dimensions
    ) -> Iterator[tuple[WeightSpec, int | None]]:
        """The weights of a role that a layer must have, and the expert of each, if it has a number.

        The architecture has the role; ``sizes`` say which layers have experts.
        """
        if role != "down_proj" or layer not in sizes.sparse_layers:
            yield self.roles[role], None
            return
        own = "{expert}" in self.experts.weight
        for expert in range(sizes.num_experts) if own else (None,):
            yield self.experts, expert
        if self.shared_experts.weight and sizes.shared_expert_intermediate_size:
            yield self.shared_experts, None

    def down_projections(self) -> tuple[str, ...]:
        """Disk names of the weights of all kinds of down-projections."""
        specs = (self.roles["down_proj"], self.experts, self.shared_experts)
        return tuple(dict.fromkeys(spec.weight for spec in specs if spec.weight))

    def check_modules(self, model: "nn.Module") -> None:
        """Raise ValueError, a mistake of the file's author, if a module is not in ``model``."""
        names = {name for name, _ in model.named_modules()}
        for key, template in (
            ("block", self.block), ("ffn", self.ffn), ("down_proj", self.roles["down_proj"].module),
        ):  # fmt: skip
            name = template.format(layer=0)
            if name not in names:
                near = sorted(n for n in names if n.rpartition(".")[0] == name.rpartition(".")[0])
                raise ValueError(
                    f"{self.model_type}.toml: [modules] {key}: {type(model).__name__} has no "
                    f"{name}; beside it are {', '.join(near) or 'none'}"
                )

    def find_layer(self, name: str) -> int | None:
        """The layer whose down-projection has this name, as in this file; None if it is another."""
        found = _pattern(self).fullmatch(name)
        return int(next(g for g in found.groups() if g is not None)) if found else None


@cache
def _pattern(architecture: Architecture) -> re.Pattern[str]:
    names = (
        re.escape(name).replace(r"\{layer\}", r"(\d{1,9})").replace(r"\{expert\}", r"\d+")
        for name in architecture.down_projections()
    )
    return re.compile("|".join(names))


@cache
def architectures() -> dict[str, Architecture]:
    """All data files, by ``model_type``."""
    entries = sorted((e for e in _FOLDER.iterdir() if e.name.endswith(".toml")), key=str)
    parsed = (parse_architecture(entry.read_text("utf-8"), entry.name) for entry in entries)
    return {architecture.model_type: architecture for architecture in parsed}


def parse_architecture(text: str, name: str) -> Architecture:
    """Parse one data file, and those that it is like.

    Raises ValueError for a mistake of the file's author, such as an unknown or missing key.
    """
    data = _merged(text, name)
    routes = data.pop("bias_routes", {})
    for table, keys in _TABLES.items():
        found = set(data) if table == "" else set(data[table])
        if unknown := found ^ keys:
            raise ValueError(f"{name}: unknown or missing keys {sorted(unknown)}")
    if unknown := {*routes} - {*_OUTPUTS} or {k for r in routes.values() for k in {*r} ^ _ROUTE}:
        raise ValueError(f"{name}: [bias_routes]: unknown or missing keys {sorted(unknown)}")
    roles = {role: _spec(role, data[role], size, name) for role, size in _OUTPUTS.items()}
    norms, modules, always = data["norms"], data["modules"], ("down_proj", "lm_head")
    return Architecture(
        title=data["title"],
        model_type=data["model_type"],
        variants=tuple(data["variants"]),
        config=data["config"],
        roles={role: spec for role, spec in roles.items() if spec.weight or role in always},
        experts=_spec("experts", data["experts"], "hidden_size", name),
        shared_experts=_spec("shared_experts", data["shared_experts"], "hidden_size", name),
        bias_routes={
            role: BiasSpec(table["config"], tuple(table["zeros"])) for role, table in routes.items()
        },
        post_norm=norms["post_ffn"],
        final_norm=norms["final"],
        norm_offset=norms["offset"],
        embedding=data["vocabulary"]["embedding"],
        auto_class=modules["auto_class"],
        block=modules["block"],
        ffn=modules["ffn"],
    )


def _spec(table: str, data: Mapping[str, Any], output: str, name: str) -> WeightSpec:
    """The table of a role, or of experts, whose outputs are as many as the size ``output``."""
    shape, axis = data["shape"], data["output_axis"]
    if axis not in range(len(shape)) or shape[axis] != output:
        raise ValueError(f"{name}: [{table}] output_axis {axis} is not {output} in {shape}")
    stem = data["weight"].removesuffix(".weight")
    return WeightSpec(
        weight=data["weight"],
        bias=data["bias"] or f"{stem}.bias",
        shape=tuple(shape),
        output_axis=axis,
        module=data.get("module", "") or (stem if "module" in data else ""),
        part=tuple(data.get("part", (0, 1))),
    )


def _merged(text: str, name: str) -> dict[str, Any]:
    """A parsed data file over the one that it is ``like``, if any."""
    data = tomllib.loads(text)
    other = data.pop("like", None)
    if other is None:
        return data
    try:
        whole = _merged(_FOLDER.joinpath(f"{other}.toml").read_text("utf-8"), f"{other}.toml")
    except OSError as error:
        raise ValueError(f"{name}: like {other!r}, of which there is no file") from error
    for key in ("title", "model_type", "bias_routes"):  # never those of another
        whole.pop(key, None)
    for key, value in data.items():
        whole[key] = whole[key] | value if isinstance(value, dict) and key in whole else value
    return whole


def find_architecture(config: dict[str, Any]) -> Architecture:
    """The data file for a parsed ``config.json``. Raises CheckpointError if there is none."""
    model_type = config.get("model_type")
    known = architectures()
    if not isinstance(model_type, str) or model_type not in known:
        raise CheckpointError(
            "config.json: model_type",
            expected="one of " + ", ".join(sorted(known)),
            found=describe_value(model_type),
            hint="to add a model, see README, 'To add a model'",
        )
    return known[model_type]


def architecture_table() -> str:
    """What is supported, as a Markdown table: one row for each data file."""
    rows = ["| models | `model_type` | down-projections |", "|---|---|---|"]
    for name, architecture in architectures().items():
        weights = [f"`{weight}`" for weight in architecture.down_projections()]
        rows.append(f"| {architecture.title} | `{name}` | {'<br>'.join(weights)} |")
    return "\n".join(rows)
