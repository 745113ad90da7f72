"""Architectures as data: what the tensors and modules of a model are called.

One TOML file in ``converter/architectures`` describes one ``model_type`` of ``config.json``; see
``llama.toml`` for the format. No Python file knows the name of a model.
"""

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any

from converter.errors import CheckpointError

_TABLES = {
    "": {"title", "model_type", "prefix", "config", "down_proj", "vocabulary", "modules"},
    "config": {"num_hidden_layers", "hidden_size", "intermediate_size"},
    "down_proj": {"weight", "bias", "shape", "output_axis", "post_norm"},
    "vocabulary": {"embedding", "unembedding", "final_norm", "norm_offset"},
    "modules": {"block", "ffn", "down_proj"},
}
"""The keys of a data file, all of them needed, its own ones under the empty name."""


@dataclass(frozen=True, slots=True)
class Dimensions:
    """Sizes of one model, read from its ``config.json``."""

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int


@dataclass(frozen=True, slots=True)
class Architecture:
    """One data file.

    Attributes:
        title: name for people.
        model_type: the key in ``config.json``.
        prefix: a leading part of the disk names that a checkpoint may lack, or empty.
        config: our name of a size -> its key in ``config.json``.
        weight: disk name of the down-projection, with ``{layer}``.
        bias: disk name of its bias, with ``{layer}``; a checkpoint may have none.
        shape: names of the sizes of the weight's axes, as stored.
        output_axis: the axis of the weight that runs over the hidden size.
        post_norm: disk name of the weight of a norm after the FFN, with ``{layer}``, or empty.
        embedding, unembedding, final_norm: disk names; a tied checkpoint has no unembedding.
        norm_offset: norms multiply by their weight plus this.
        block, ffn, down_proj: modules of the transformers class, with ``{layer}``: the whole
            decoder layer, the module whose output is what the FFN adds to the residual stream, and
            the one that holds the down-projection.
    """

    title: str
    model_type: str
    prefix: str
    config: dict[str, str]
    weight: str
    bias: str
    shape: tuple[str, ...]
    output_axis: int
    post_norm: str
    embedding: str
    unembedding: str
    final_norm: str
    norm_offset: int
    block: str
    ffn: str
    down_proj: str

    def dimensions(self, config: dict[str, Any]) -> Dimensions:
        """Read the sizes from a parsed ``config.json``.

        A size whose key is missing or null is derived where the data file says so
        (``intermediate_size = "n_inner | 4 * n_embd"``).

        Raises:
            CheckpointError: a size is missing or not a positive integer.
        """

        def size(name: str) -> int:
            key, _, fallback = (part.strip() for part in self.config[name].partition("|"))
            value = config.get(key)
            if value is None and fallback:
                factor, _, other = fallback.partition(" * ")
                value = int(factor) * config.get(other, 0)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise CheckpointError(
                    f"config.json: {key}", expected="a positive integer", found=repr(value)
                )
            return value

        return Dimensions(size("num_hidden_layers"), size("hidden_size"), size("intermediate_size"))


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
    down, vocabulary, modules = data["down_proj"], data["vocabulary"], data["modules"]
    return Architecture(
        title=data["title"],
        model_type=data["model_type"],
        prefix=data["prefix"],
        config=data["config"],
        weight=down["weight"],
        bias=down["bias"],
        shape=tuple(down["shape"]),
        output_axis=down["output_axis"],
        post_norm=down["post_norm"],
        **vocabulary,
        **modules,
    )


def _folder() -> Traversable:
    return files("converter").joinpath("architectures")


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
            found=repr(model_type),
            hint="to add a model, see README, 'To add a model'",
        )
    return known[model_type]


def architecture_table() -> str:
    """What is supported, as a Markdown table: one row for each data file."""
    rows = ["| models | `model_type` | down-projections |", "|---|---|---|"]
    for name, architecture in architectures().items():
        rows.append(f"| {architecture.title} | `{name}` | `{architecture.weight}` |")
    return "\n".join(rows)
