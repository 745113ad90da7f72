"""Synthetic Llama checkpoints of any size, written without ever holding more than one block.

``write_llama`` makes a checkpoint that transformers and this converter load: bfloat16 weights drawn
from a normal distribution, norms of one, shards of at most ``limit`` bytes, an index, a config and
a tokenizer. Tensors go into the shards in the order of the model and stand inside a shard in that
of their names, as in most checkpoints on the Hub.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from io import BufferedWriter
from math import prod
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from converter.calibration.pairs import load_pairs, load_prose
from converter.calibration.word_list import load_words

Shape = tuple[int, ...]

WIDTH = 2
"""Bytes of a bfloat16."""

BLOCK = 1 << 22
"""Numbers drawn at a time: 8 MB of a file, 16 MB of float32."""

SPREAD = 0.02
"""Standard deviation of the weights, ``initializer_range`` of a new Llama."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama:
    """The sizes of a model; those given here make down-projections a quarter of a layer's bytes."""

    layers: int
    hidden: int = 2048
    ffn: int = 8192
    vocabulary: int = 32000
    heads: int = 32
    kv_heads: int = 32
    tied: bool = False

    @classmethod
    def of_bytes(cls, nbytes: float) -> "Llama":
        """With as many layers as come nearest to so many bytes, at least one."""
        one, two = cls(layers=1).nbytes, cls(layers=2).nbytes
        return cls(layers=max(1, 1 + round((nbytes - one) / (two - one))))

    @property
    def shapes(self) -> dict[str, Shape]:
        """Tensor name -> shape, in the order of the model."""
        heads, kv = (self.hidden, self.hidden), (self.hidden * self.kv_heads // self.heads,)
        shapes: dict[str, Shape] = {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        for n in range(self.layers):
            layer = f"model.layers.{n}"
            shapes |= {
                f"{layer}.self_attn.q_proj.weight": heads,
                f"{layer}.self_attn.k_proj.weight": (*kv, self.hidden),
                f"{layer}.self_attn.v_proj.weight": (*kv, self.hidden),
                f"{layer}.self_attn.o_proj.weight": heads,
                f"{layer}.mlp.gate_proj.weight": (self.ffn, self.hidden),
                f"{layer}.mlp.up_proj.weight": (self.ffn, self.hidden),
                f"{layer}.mlp.down_proj.weight": (self.hidden, self.ffn),
                f"{layer}.input_layernorm.weight": (self.hidden,),
                f"{layer}.post_attention_layernorm.weight": (self.hidden,),
            }
        shapes["model.norm.weight"] = (self.hidden,)
        if not self.tied:
            shapes["lm_head.weight"] = (self.vocabulary, self.hidden)
        return shapes

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return sum(map(_nbytes, self.shapes.values()))

    @property
    def config(self) -> dict[str, Any]:
        """What ``LlamaConfig`` loads."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "dtype": "bfloat16",
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": self.tied,
            "bos_token_id": 0,
            "eos_token_id": 1,
        }


def shard_limit(model: Llama, shards: int, by_name: bool = False) -> int:
    """The least number of bytes in a shard with which there are at most so many shards.

    Args:
        model: its sizes.
        shards: how many.
        by_name: tensors go into the shards in the order of their names, as transformers 5 writes
            them, not in that of the model.
    """
    shapes = dict(sorted(model.shapes.items())) if by_name else model.shapes
    low, high = max(map(_nbytes, shapes.values())), model.nbytes
    while low < high:
        middle = (low + high) // 2
        if len(_groups(shapes, middle)) <= shards:
            high = middle
        else:
            low = middle + 1
    return low


def write_llama(
    folder: Path, model: Llama, limit: int, texts: Iterable[str] = (), seed: int = 0
) -> None:
    """Write a checkpoint into an empty folder.

    Args:
        folder: where to.
        model: its sizes.
        limit: bytes of tensors in a shard, at most; a larger tensor has one of its own.
        texts: what its tokenizer is trained on; without any it knows single bytes only.
        seed: of its weights.
    """
    generator = torch.Generator().manual_seed(seed)
    groups = _groups(model.shapes, limit)
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        name = f"model-{number:05}-of-{len(groups):05}.safetensors"
        name = name if len(groups) > 1 else "model.safetensors"
        _write_shard(folder / name, group, generator)
        weight_map |= dict.fromkeys(group, name)
    if len(groups) > 1:
        index = {"metadata": {"total_size": model.nbytes}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    (folder / "config.json").write_text(json.dumps(model.config, indent=1))
    byte_tokenizer(texts, model.vocabulary).save_pretrained(folder)


def byte_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on these texts, with at most so many tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def builtin_texts() -> list[str]:
    """The built-in pairs and prose."""
    pairs = load_pairs("builtin", load_words("builtin"), None, 0).pairs
    texts = [p.toxic for p in pairs] + [p.neutral for p in pairs]
    return texts + list(load_prose("builtin").paragraphs)


def _nbytes(shape: Shape) -> int:
    return WIDTH * prod(shape)


def _groups(shapes: Mapping[str, Shape], limit: int) -> list[dict[str, Shape]]:
    """The tensors of each shard; a new one begins where the limit would be exceeded."""
    groups: list[dict[str, Shape]] = [{}]
    filled = 0
    for name, shape in shapes.items():
        if filled and filled + _nbytes(shape) > limit:
            groups.append({})
            filled = 0
        groups[-1][name] = shape
        filled += _nbytes(shape)
    return groups


def _write_shard(path: Path, shapes: Mapping[str, Shape], generator: torch.Generator) -> None:
    """Write one safetensors file: 8 bytes of header length, the header, the tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in sorted(shapes.items()):
        start, end = end, end + _nbytes(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, shape in sorted(shapes.items()):
            _write_tensor(file, shape, generator)


def _write_tensor(file: BufferedWriter, shape: Shape, generator: torch.Generator) -> None:
    """A matrix of random numbers, or the ones of a norm."""
    left = prod(shape)
    while left:
        block = torch.ones(min(left, BLOCK))
        if len(shape) > 1:
            block.normal_(std=SPREAD, generator=generator)
        file.write(block.bfloat16().view(torch.uint8).numpy().data)
        left -= len(block)
