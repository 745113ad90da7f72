"""config.json, as far as it must not be believed.

transformers builds what a config asks for before it looks at the weights, and some keys make it
read or run something else than the files that are edited.
"""

import re
from collections.abc import Iterator
from typing import Any

from converter.errors import CheckpointError
from converter.text import describe_value

MAX_NESTING = 32
"""Objects and lists within one another; real ones have five or six."""

LIMITS = (
    (re.compile(r"depth|.*layers?|.*experts"), 10_000, "layers or experts"),
    (re.compile(r"(.*_)?(vocab|hidden|intermediate|ffn|embedding|state|kernel|patch|image)_size|"
                r".*(_dim|_heads?|_positions|_embeddings|_rank)|n_(embd|inner|ctx)"),
     1 << 24, "a size of a model"),
)  # fmt: skip
"""Keys of counts -> the most that there can be: the deepest models have a few hundred layers, and
the longest text is 10,485,760 tokens."""

KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation",
           "_experts_implementation")  # fmt: skip
"""Keys that can name a repo of compiled code, which transformers would fetch and run."""


def check_config(config: dict[str, Any]) -> None:
    """Refuse what no model has, before anything is made of it.

    Raises:
        CheckpointError: counts beyond ``LIMITS``, other weights than those that are edited, code
            from elsewhere, or a nesting that no config has.
    """
    for key, value in _items(config):
        if key == "transformers_weights" and value:
            raise CheckpointError(
                "config.json: transformers_weights names other weights than those that are edited",
                hint="remove it, or the other weights",
            )
        if key in KERNELS and any("/" in describe_value(name) for name in _names(value)):
            raise CheckpointError(
                f"config.json: {key} asks for compiled code from elsewhere",
                expected="the name of an implementation, such as sdpa", found=describe_value(value),
                hint="remove it",
            )  # fmt: skip
        if type(value) is int:
            for pattern, most, what in LIMITS:
                if pattern.fullmatch(key) and value > most:
                    raise CheckpointError(
                        f"config.json: {key}", expected=f"{what}, at most {most:,}",
                        found=describe_value(value),
                    )  # fmt: skip


def _names(value: Any) -> list[Any]:
    """One implementation for all, or one for each part of a model."""
    return list(value.values()) if isinstance(value, dict) else [value]


def _items(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Keys and values of a config and of all objects in it."""
    level: list[Any] = [config]
    for _ in range(MAX_NESTING):
        below: list[Any] = []
        for part in level:
            if isinstance(part, dict):
                yield from part.items()
            values = part.values() if isinstance(part, dict) else part
            below += (value for value in values if isinstance(value, (dict, list)))
        if not below:
            return
        level = below
    raise CheckpointError(
        "config.json is nested too deeply", expected=f"{MAX_NESTING} levels or fewer"
    )
