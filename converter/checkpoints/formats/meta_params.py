"""What Meta's ``params.json`` says of a Llama, and the ``config.json`` that follows."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from converter.errors import CheckpointError
from converter.text import describe_value

MAX_PARAMS = 1_000_000
"""Bytes of a file that has ten numbers."""


@dataclass(frozen=True, slots=True)
class Params:
    """What ``params.json`` says; ``vocab`` is None where that is left to the tensors."""

    dim: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    norm_eps: float
    rope_theta: float
    scaled: bool
    vocab: int | None


def read_params(path: Path) -> Params:
    """Read ``params.json``.

    The FFN is 8/3 as wide as the model, times ``ffn_dim_multiplier``, rounded up to a multiple of
    ``multiple_of``.

    Raises:
        CheckpointError: it is missing or malformed, or its numbers do not fit together.
    """
    try:
        if path.stat().st_size > MAX_PARAMS:
            what = f"{path.name} is too large"
            raise CheckpointError(what, expected=f"at most {MAX_PARAMS:,} bytes")
        data = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        found = getattr(error, "strerror", None) or str(error)
        raise CheckpointError(f"{path.name} cannot be read as JSON", found=found) from error
    data = data.get("model", data) if isinstance(data, dict) else data
    if not isinstance(data, dict):
        raise CheckpointError(f"{path.name} is not a JSON object", found=type(data).__name__)

    def number(key: str, default: float | None = None, kind: type = int) -> Any:
        value: Any = default if data.get(key) is None else data[key]
        if not (type(value) in (int, kind) and 0 < value < 2**40):
            expected = f"a positive {'whole ' * (kind is int)}number"
            raise CheckpointError(
                f"{path.name} has no usable {key}", expected=expected, found=describe_value(value)
            )
        return value

    dim, heads, unit = number("dim"), number("n_heads"), number("multiple_of", 256)
    kv_heads = number("n_kv_heads", heads)
    if dim % (2 * heads) or heads % kv_heads:
        raise CheckpointError(
            f"{path.name} contradicts itself", expected="heads that divide the model evenly",
            found=f"dim {dim}, n_heads {heads}, n_kv_heads {kv_heads}",
        )  # fmt: skip
    ffn = int(number("ffn_dim_multiplier", 1, float) * int(8 * dim / 3))
    return Params(
        dim, number("n_layers"), heads, kv_heads, unit * math.ceil(ffn / unit),
        float(number("norm_eps", 1e-5, float)), float(number("rope_theta", 10000, float)),
        bool(data.get("use_scaled_rope")),
        None if data.get("vocab_size") in (None, -1) else number("vocab_size"),
    )  # fmt: skip


def config_of(params: Params, vocab: int, dtype: torch.dtype, tied: bool) -> dict[str, Any]:
    """``config.json``, but for the ids of the tokenizer; older loaders look for ``torch_dtype``,
    ``rope_theta`` and ``rope_scaling``."""
    scaling = {
        # The factor is nowhere in Meta's files. It is 8 in 3.1 and 3.3 (8B and more), and 32 in 3.2
        # 1B and 3B, by Meta's configs on the Hub and meta-llama/llama-models issues 166 and 241;
        # Meta's own code has 8 for all, and degrades on long texts there. Only the small ones have
        # fewer than 4096 dimensions.
        "factor": 8.0 if params.dim >= 4096 else 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }
    rope = scaling if params.scaled else {"rope_type": "default"}
    stored = str(dtype).removeprefix("torch.")
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama",
        "hidden_size": params.dim, "intermediate_size": params.ffn,
        "num_hidden_layers": params.layers, "num_attention_heads": params.heads,
        "num_key_value_heads": params.kv_heads, "head_dim": params.dim // params.heads,
        "vocab_size": vocab, "max_position_embeddings": positions(params),
        "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0,
        "initializer_range": 0.02, "rms_norm_eps": params.norm_eps, "use_cache": True,
        "rope_theta": params.rope_theta, "rope_scaling": scaling if params.scaled else None,
        "rope_parameters": rope | {"rope_theta": params.rope_theta}, "tie_word_embeddings": tied,
        "dtype": stored, "torch_dtype": stored,
    }  # fmt: skip


def positions(params: Params) -> int:
    """How long a text the model knows; params.json does not say, so by its other numbers.

    131,072 with scaled rotary positions (Llama 3.1 and later); 16,384 with a ``rope_theta`` of 1e6
    (Code Llama), 8,192 with another one over 10,000 (Llama 3); 2,048 with a ``norm_eps`` of 1e-6
    (Llama 1, and copies of Llama 2 that say so) or with 8,192 dimensions and no groups of heads
    (Llama 1 65B); else 4,096 (Llama 2).
    """
    if params.scaled:
        return 131072
    if params.rope_theta > 10000:
        return 16384 if params.rope_theta == 1e6 else 8192
    first = params.norm_eps == 1e-6 or (params.dim == 8192 and params.kv_heads == params.heads)
    return 2048 if first else 4096
