"""Tiny models: real architectures with random weights, and a real tokenizer."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerFast

from converter.checkpoints.architectures.architecture import Architecture
from converter.checkpoints.architectures.find import find_architecture
from converter.checkpoints.plan import Plan, read_plan
from converter.checkpoints.resolve import resolve
from converter.checkpoints.source import Source
from converter.recipe import Recipe
from tests.bench.synthetic import builtin_texts, byte_tokenizer

HIDDEN, FFN, LAYERS = 32, 48, 6

MIXTURES = {"deepseek_v2", "deepseek_v3", "gpt_oss", "granitemoe", "mixtral", "olmoe", "qwen2_moe",
            "qwen3_moe"}  # fmt: skip
"""Model types with experts."""

NORM_AFTER = {"gemma2", "gemma3", "gemma3_text", "olmo2", "olmo3"}
"""Model types with a norm between the FFN and the residual stream."""

Checkpoints = Callable[..., Path]
"""The fixture ``checkpoints``: the folder of a tiny model of a kind, a dtype and a shard size."""


@cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on the built-in texts."""
    return byte_tokenizer(builtin_texts(), 400)


MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6}
DEEPSEEK = {
    "n_routed_experts": 4, "n_shared_experts": 2, "moe_intermediate_size": 24, "n_group": 2,
    "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 3, "kv_lora_rank": 8,
    "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 4,
}  # fmt: skip

TINY_MODELS: dict[str, dict[str, Any]] = {
    "cohere": {"logit_scale": 2.0},
    "deepseek_v2": DEEPSEEK,
    "deepseek_v3": DEEPSEEK,
    "falcon": {"ffn_hidden_size": FFN, "bias": True},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8},
    "gemma3": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8},
    "gpt2": {"n_inner": FFN},
    "gpt_bigcode": {"n_inner": FFN},
    "gpt_neox": {},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 8},
    "gptj": {"n_inner": FFN, "rotary_dim": 4},
    "granite": {"residual_multiplier": 0.5, "logits_scaling": 2.0},
    "granitemoe": {"num_local_experts": 4, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    "llama": {"mlp_bias": True},
    "mistral": {},
    "mistral3": {},
    "mixtral": {"num_local_experts": 4},
    "olmo": {},
    "olmo2": {},
    "olmo3": {},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "opt": {"ffn_dim": FFN, "word_embed_proj_dim": HIDDEN},
    "phi": {},
    "phi3": {},
    "qwen2": {},
    "qwen2_5_vl": {"rope_parameters": MROPE},
    "qwen2_moe": {
        "num_experts": 4,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "mlp_only_layers": [3],
    },
    "qwen2_vl": {"rope_parameters": MROPE},
    "qwen3": {"head_dim": 8},
    "qwen3_moe": {
        "num_experts": 4,
        "moe_intermediate_size": 24,
        "head_dim": 8,
        "decoder_sparse_step": 2,
        "num_experts_per_tok": 2,
    },
    "qwen3_vl": {"rope_parameters": MROPE},
    "seed_oss": {"head_dim": 8, "mlp_bias": True},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {},
}
"""``model_type`` -> what its tiny model's config has besides the sizes that all share."""


OTHER_LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon-40b": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": False}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "mistral-full": ("mistral", {"sliding_window": None}),
    "opt-350m": ("opt", {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
}
"""Models of the same ``model_type`` as another and built otherwise."""

VISION = {
    "gemma3": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
               "num_attention_heads": 2, "image_size": 28, "patch_size": 14},
    "mistral3": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
                 "num_attention_heads": 2, "image_size": 28, "patch_size": 14},
    "qwen2_vl": {"depth": 1, "embed_dim": 16, "hidden_size": HIDDEN, "num_heads": 2},
    "qwen2_5_vl": {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2,
                   "out_hidden_size": HIDDEN},
    "qwen3_vl": {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2,
                 "out_hidden_size": HIDDEN, "deepstack_visual_indexes": [0]},
}  # fmt: skip
"""What the vision tower of a wrapper's tiny model is like; the rest is its language model."""


def tiny_config(kind: str) -> PreTrainedConfig:
    sizes = {
        "hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": LAYERS,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "vocab_size": len(tiny_tokenizer()),
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
    }  # fmt: skip
    kind, other = OTHER_LAYOUTS.get(kind, (kind, {}))
    sizes |= TINY_MODELS[kind] | other
    if kind not in VISION:
        return AutoConfig.for_model(kind, **sizes)
    return AutoConfig.for_model(kind, text_config=sizes, vision_config=VISION[kind])


@cache
def architecture_of(kind: str) -> Architecture:
    """The description of the tiny model of a kind."""
    return find_architecture(tiny_config(kind).to_dict())


def make_checkpoint(
    folder: Path, kind: str = "llama", dtype: torch.dtype = torch.float32, shard: str = "60KB"
) -> Path:
    """Save a random tiny model with its tokenizer, a licence and a card."""
    torch.manual_seed(0)
    config = tiny_config(kind)
    architecture = find_architecture(config.to_dict())
    auto = getattr(transformers, architecture.auto_class)
    model: Any = auto.from_config(config)
    model = model.to(dtype)
    norms = [ffn.norm for kind in architecture.kinds for ffn in kind.ffns]
    after = norms[0].partition("{layer}")[2]
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # they start at zero, which would hide what an edit does to them
            torch.nn.init.normal_(parameter, std=0.1)
        if after and name.endswith(after):  # they start as the identity, which hides a wrong norm
            torch.nn.init.normal_(parameter, 0.5, 0.5)
    model.save_pretrained(folder, max_shard_size=shard)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "LICENSE").write_text("A licence.\n")
    (folder / "README.md").write_text("---\nlicense: mit\nbase_model: someone/tiny\n---\nHello.\n")
    return folder


def load(folder: Path) -> Any:
    """The causal language model of a folder, ready to run."""
    architecture = find_architecture(json.loads((folder / "config.json").read_text()))
    auto = getattr(transformers, architecture.auto_class)
    return auto.from_pretrained(folder).eval()


def planned(folder: Path) -> tuple[Source, Plan]:
    """A folder as a source, and its plan."""
    source = resolve(str(folder))
    return source, read_plan(source)


METHOD = "gloss-paper"
TINY = {
    "rank": "4",
    "layers": "2-4",
    "candidates": "mean+svd",
    "ranking": "mean-difference",
    "protect_shared": "4",
    "protect_own": "2",
    "per_layer": "2",
    "alpha": "-0.5",
}
"""The method of most tests, and options for 32 dimensions and 3 layers: protecting 20 of them would
leave little."""


def tiny_args(**changes: object) -> list[str]:
    """These options on the command line, without the guard: no edit of a random model passes it.

    Nor is the model asked for samples, which take half of a second each time.
    """
    options = [part for k, v in {**TINY, **changes}.items() for part in ("-o", f"{k}={v}")]
    return ["--method", METHOD, *options, "--no-guard", "--prompts", "none"]


TINY_ARGS = tiny_args()


def tiny_recipe(source: Path, **changes: Any) -> Recipe:
    """The same as a recipe."""
    given: dict[str, Any] = {
        "num_pairs": 32, "method": METHOD, "options": TINY, "guard": False, "prompts": "none",
    }  # fmt: skip
    return Recipe(source=str(source), **given | changes)
