"""A tiny model in which the truth is known: what is toxic in it, and what must not be touched."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from converter.calibration.pairs import load_prose

HIDDEN = 32
AXES = torch.linalg.qr(torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(3)))[0].T
TOXIC, MASSIVE, HOSTILE = AXES[0], AXES[1], AXES[2]
WRITING = (2, 3, 4)
CURSES, INSULTS = ("fucking", "damn"), ("bastard", "bitch", "asshole")
PLAIN = tuple(f"w{i}" for i in range(150))


def make_pairs(count: int) -> list[dict[str, str]]:
    """Sentences of plain words; on the toxic side two of them are a curse and an insult."""
    rng = random.Random(0)
    pairs = []
    for _ in range(count):
        a, b, c, d, e = rng.sample(PLAIN, 5)
        toxic = f"{a} {b} {rng.choice(CURSES)} {rng.choice(INSULTS)} {e}"
        pairs.append({"toxic": toxic, "neutral": f"{a} {b} {c} {d} {e}"})
    return pairs


def planted_args(planted: Path, rank: int | None = 1) -> tuple[object, ...]:
    """Arguments with which a fit finds what is planted; without a rank it is chosen."""
    pairs = ("--pairs", planted.parent / "pairs.jsonl")
    chosen = () if rank is None else ("-o", f"rank={rank}")
    return (*pairs, *chosen, "-o", "protect_shared=1", "-o", "protect_own=1")


def make_planted(folder: Path, writing: Sequence[int] = WRITING) -> Path:
    """A Llama whose tokens are words and some of whose six layers, 2 to 4 unless others are given,
    write along two planted directions.

    ``TOXIC`` raises the logits of curses and insults, and of no others; it is written where the
    token before is a curse, which the embedding marks with ``HOSTILE``. ``MASSIVE`` is written
    everywhere and says nothing, but it is so large that the final norm keeps all else small;
    without it the logits are many times as large, and the model is sure of nonsense.
    """
    splitter = pre_tokenizers.Whitespace()
    prose = (w for t in load_prose("builtin").paragraphs for w, _ in splitter.pre_tokenize_str(t))
    words = ["<s>", "</s>", "<unk>", *CURSES, *INSULTS, *PLAIN, *dict.fromkeys(prose)]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = splitter
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=6, num_attention_heads=4,
        vocab_size=len(words), max_position_embeddings=512, mlp_bias=True,
        bos_token_id=0, eos_token_id=1, tie_word_embeddings=False,
    ))  # fmt: skip
    toxic = torch.tensor([word in CURSES + INSULTS for word in words])
    hostile = torch.tensor([word in CURSES for word in words])
    with torch.no_grad():
        head = torch.randn(len(words), HIDDEN)
        head -= (head @ TOXIC)[:, None] * TOXIC + (head @ MASSIVE)[:, None] * MASSIVE
        model.lm_head.weight.copy_(head + toxic[:, None] * 40 * TOXIC)
        model.model.embed_tokens.weight.add_(hostile[:, None] * 3 * HOSTILE)
        for layer in writing:
            mlp = model.model.layers[layer].mlp
            mlp.gate_proj.weight[0] = mlp.up_proj.weight[0] = HOSTILE / 2
            mlp.down_proj.weight[:, 0] = TOXIC / 5
            mlp.down_proj.bias.copy_(30 * MASSIVE)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    lines = (json.dumps(pair) for pair in make_pairs(400))
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    return folder / "model"
