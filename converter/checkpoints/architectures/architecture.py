"""Architectures as data: what the tensors and modules of a model are called.

One TOML file in ``converter/architectures`` describes one ``model_type`` of ``config.json``; see
``llama.toml`` for the format. No Python file knows the name of a model.
"""

import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import TYPE_CHECKING, Any

from converter.checkpoints.architectures.dimensions import Dimensions, read_dimensions
from converter.errors import CheckpointError
from converter.text.sanitize import brief

if TYPE_CHECKING:
    from torch import nn

_WEIGHT = {"weight", "bias", "shape", "output_axis"}
_TABLES = {
    "": {"title", "model_type", "variants", "config", "down_proj", "experts", "shared_experts",
         "norms", "vocabulary", "modules"},
    "config": {"within", "num_hidden_layers", "hidden_size", "intermediate_size", "embedding_size",
               "num_experts", "moe_intermediate_size", "shared_expert_intermediate_size",
               "first_dense_layers", "dense_layers", "sparse_step", "unused_layers"},
    "down_proj": _WEIGHT,
    "experts": _WEIGHT,
    "shared_experts": _WEIGHT,
    "norms": {"post_ffn", "final", "offset"},
    "vocabulary": {"embedding", "unembedding"},
    "modules": {"auto_class", "block", "ffn", "down_proj"},
}  # fmt: skip
"""The keys of a data file, all of them needed, its own ones under the empty name."""


@dataclass(frozen=True, slots=True)
class Projection:
    """One kind of down-projection.

    Attributes:
        weight, bias: disk names, with ``{layer}``, and with ``{expert}`` if each expert has a
            tensor of its own. The bias may be missing from a checkpoint; an empty name: none has.
        shape: names of the sizes of the weight's axes, as stored.
        output_axis: the axis of the weight that runs over the hidden size.
    """

    weight: str
    bias: str
    shape: tuple[str, ...]
    output_axis: int


@dataclass(frozen=True, slots=True, eq=False)
class Architecture:
    """One data file.

    Attributes:
        title: name for people.
        model_type: the key in ``config.json``.
        variants: other beginnings of disk names that checkpoints have, each a table from a
            beginning as in this file to the one on disk.
        config: our name of a size -> its key in ``config.json``.
        down_proj: of a dense FFN.
        experts, shared_experts: of a mixture of experts; their weight is empty if there are none.
        post_norm: disk name of the weight of a norm after the FFN, with ``{layer}``, or empty.
        final_norm: disk name, or empty.
        norm_offset: norms multiply by their weight plus this.
        embedding, unembedding: disk names; a tied checkpoint has no unembedding.
        auto_class: of transformers, that loads the model.
        block, ffn, down_proj_module: modules of the transformers class, with ``{layer}``: the whole
            decoder layer, the module whose output is what the FFN adds to the residual stream, and
            the one that gives what the down-projections write.
    """

    title: str
    model_type: str
    variants: tuple[Mapping[str, str], ...]
    config: Mapping[str, str]
    down_proj: Projection
    experts: Projection
    shared_experts: Projection
    post_norm: str
    final_norm: str
    norm_offset: int
    embedding: str
    unembedding: str
    auto_class: str
    block: str
    ffn: str
    down_proj_module: str

    def dimensions(self, config: dict[str, Any]) -> Dimensions:
        """Read the sizes from a parsed ``config.json``.

        Raises:
            CheckpointError: a size is missing or not a positive integer.
        """
        return read_dimensions(self.config, config, has_experts=bool(self.experts.weight))

    def projections(self, layer: int, sizes: Dimensions) -> Iterator[tuple[Projection, int]]:
        """The down-projections that a layer must have, and the expert of each (0 for others)."""
        if layer not in sizes.sparse_layers:
            yield self.down_proj, 0
            return
        for expert in range(sizes.num_experts if "{expert}" in self.experts.weight else 1):
            yield self.experts, expert
        if self.shared_experts.weight and sizes.shared_expert_intermediate_size:
            yield self.shared_experts, 0

    def check_modules(self, model: "nn.Module") -> None:
        """Raise ValueError, a mistake of the file's author, if a module is not in ``model``."""
        names = {name for name, _ in model.named_modules()}
        for key, template in (
            ("block", self.block), ("ffn", self.ffn), ("down_proj", self.down_proj_module),
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
    kinds = (architecture.down_proj, architecture.experts, architecture.shared_experts)
    names = {re.escape(kind.weight) for kind in kinds if kind.weight}
    number = r"(\d{1,9})"
    return re.compile(
        "|".join(
            name.replace(r"\{layer\}", number).replace(r"\{expert\}", r"\d+")
            for name in sorted(names)
        )
    )


@cache
def architectures() -> dict[str, Architecture]:
    """All data files, by ``model_type``."""
    found = {}
    for entry in sorted(_folder().iterdir(), key=str):
        if entry.name.endswith(".toml"):
            architecture = parse_architecture(entry.read_text("utf-8"), entry.name)
            found[architecture.model_type] = architecture
    return found


def parse_architecture(text: str, name: str) -> Architecture:
    """Parse one data file, and those that it is like.

    Raises:
        ValueError: an unknown or missing key; a mistake of the data file's author, not of a user.
    """
    data = _merged(text, name)
    for table, keys in _TABLES.items():
        found = set(data) if table == "" else set(data[table])
        if unknown := found ^ keys:
            raise ValueError(f"{name}: unknown or missing keys {sorted(unknown)}")
    for table in ("down_proj", "experts", "shared_experts"):
        shape, axis = data[table]["shape"], data[table]["output_axis"]
        if axis not in range(len(shape)) or shape[axis] != "hidden_size":
            raise ValueError(f"{name}: [{table}] output_axis {axis} is not hidden_size in {shape}")
    norms, modules = data["norms"], data["modules"]
    return Architecture(
        title=data["title"],
        model_type=data["model_type"],
        variants=tuple(data["variants"]),
        config=data["config"],
        down_proj=_projection(data["down_proj"]),
        experts=_projection(data["experts"]),
        shared_experts=_projection(data["shared_experts"]),
        post_norm=norms["post_ffn"],
        final_norm=norms["final"],
        norm_offset=norms["offset"],
        auto_class=modules["auto_class"],
        block=modules["block"],
        ffn=modules["ffn"],
        down_proj_module=modules["down_proj"],
        **data["vocabulary"],
    )


def _projection(table: Mapping[str, Any]) -> Projection:
    return Projection(table["weight"], table["bias"], tuple(table["shape"]), table["output_axis"])


def _folder() -> Traversable:
    return files("converter").joinpath("checkpoints/architectures")


def _merged(text: str, name: str) -> dict[str, Any]:
    """A parsed data file over the one that it is ``like``, if any."""
    data = tomllib.loads(text)
    other = data.pop("like", None)
    if other is None:
        return data
    try:
        whole = _merged(_folder().joinpath(f"{other}.toml").read_text("utf-8"), f"{other}.toml")
    except OSError as error:
        raise ValueError(f"{name}: like {other!r}, of which there is no file") from error
    for key in ("title", "model_type"):  # never those of another
        whole.pop(key, None)
    for key, value in data.items():
        whole[key] = whole[key] | value if isinstance(value, dict) and key in whole else value
    return whole


def find_architecture(config: dict[str, Any]) -> Architecture:
    """The data file for a parsed ``config.json``.

    Raises:
        CheckpointError: there is none for its ``model_type``; the sentence says how to add one.
    """
    model_type = config.get("model_type")
    known = architectures()
    if not isinstance(model_type, str) or model_type not in known:
        raise CheckpointError(
            "config.json: model_type",
            expected="one of " + ", ".join(sorted(known)),
            found=brief(model_type),
            hint="to add a model, see README, 'To add a model'",
        )
    return known[model_type]


def architecture_table() -> str:
    """What is supported, as a Markdown table: one row for each data file."""
    rows = ["| models | `model_type` | down-projections |", "|---|---|---|"]
    for name, architecture in architectures().items():
        kinds = (architecture.down_proj, architecture.experts, architecture.shared_experts)
        weights = dict.fromkeys(f"`{kind.weight}`" for kind in kinds if kind.weight)
        rows.append(f"| {architecture.title} | `{name}` | {'<br>'.join(weights)} |")
    return "\n".join(rows)
