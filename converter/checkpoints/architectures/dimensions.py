"""The sizes of a model, read from its config by the names that its architecture has for them."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from converter.errors import CheckpointError
from converter.text import describe_value

_OPTIONAL = {"num_experts", "moe_intermediate_size", "shared_expert_intermediate_size",
             "first_dense_layers", "sparse_step", "unused_layers", "attention_size",
             "vocab_size"}  # fmt: skip
"""Sizes that may be 0 or be missing from a config, which is the same."""

_MAX_SIZE = 1 << 40
"""No axis of a tensor is longer."""

_MAX_LAYERS = 10_000
"""The deepest models have a few hundred."""


@dataclass(frozen=True, slots=True)
class Dimensions:
    """Sizes of one model, read from its ``config.json``; 0 for what it does not have or say.

    Attributes:
        sparse_layers: those with experts.
        unused_layers: layers that a checkpoint may have after the last, for speculative decoding;
            the model does not run through them, and they are left alone.
        attention_size: of what all heads of a layer give together.
    """

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    embedding_size: int = 0
    num_experts: int = 0
    moe_intermediate_size: int = 0
    shared_expert_intermediate_size: int = 0
    sparse_layers: tuple[int, ...] = ()
    unused_layers: int = 0
    attention_size: int = 0
    vocab_size: int = 0

    @classmethod
    def read(
        cls, keys: Mapping[str, str], config: Mapping[str, Any], *, has_experts: bool
    ) -> "Dimensions":
        """Read the sizes from a parsed ``config.json``.

        Args:
            keys: our name of a size -> where it is in the config; ``[config]`` of a data file.
            config: of the model.
            has_experts: their number and size are then needed.

        Raises:
            CheckpointError: a size is missing or not a positive integer.
        """
        inner = config.get(keys["within"], config)
        if not isinstance(inner, dict):
            raise CheckpointError(
                f"config.json: {keys['within']}", expected="an object", found=describe_value(inner)
            )
        optional = _OPTIONAL - ({"num_experts", "moe_intermediate_size"} if has_experts else set())
        sizes = {
            name: _size(inner, keys[name], optional=name in optional)
            for name in keys.keys() - {"within", "dense_layers"}
        }
        first, step = sizes.pop("first_dense_layers"), sizes.pop("sparse_step") or 1
        key = keys["dense_layers"]
        listed = inner.get(key) or []
        if not isinstance(listed, list):
            found = describe_value(listed)
            raise CheckpointError(f"config.json: {key}", expected="a list", found=found)
        dense = {layer for layer in listed if type(layer) is int}
        if sizes["num_hidden_layers"] > _MAX_LAYERS:
            raise CheckpointError(
                "config.json: the number of layers", expected=f"at most {_MAX_LAYERS:,}",
                found=f"{sizes['num_hidden_layers']:,}",
            )  # fmt: skip
        sparse = (
            layer
            for layer in range(first, sizes["num_hidden_layers"])
            if sizes["num_experts"] and layer not in dense and (layer + 1) % step == 0
        )
        return cls(**sizes, sparse_layers=tuple(sparse))


def _size(config: Mapping[str, Any], source: str, *, optional: bool) -> int:
    """A size from a config: ``a | 4 * b`` is the key a, or if it has none 4 times the key b."""
    parts: list[Any] = []
    for alternative in source.split("|"):
        factors = (part.strip() for part in alternative.split("*"))
        parts = [int(f) if f.isdigit() else config.get(f) for f in factors if f]
        if parts and None not in parts:
            break
    if optional and (not parts or None in parts or 0 in parts):
        return 0
    if not parts or not all(type(part) is int and 0 < part < _MAX_SIZE for part in parts):
        key = source.partition("|")[0].strip()
        raise CheckpointError(
            f"config.json: {key}",
            expected="a positive integer",
            found=describe_value(config.get(key)),
        )
    return prod(parts)
