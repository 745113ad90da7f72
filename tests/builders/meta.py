"""A tiny Llama as Meta would write it, and Meta's forward pass in a few lines, to compare with."""

import base64
import hashlib
import io
import json
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers.convert_slow_tokenizer import bytes_to_unicode

from converter.calibration.pairs import load_prose

DIM, HEADS, LAYERS, MULTIPLE_OF = 32, 4, 2, 16


@dataclass(frozen=True)
class Reference:
    """Whole weights under Meta's names, and how to compute with them."""

    weights: dict[str, Tensor]
    params: dict[str, Any]
    factor: float = 32.0

    def logits(self, ids: Tensor, positions: Tensor | None = None) -> Tensor:
        """Of one text (T,): (T, vocabulary), in float32."""
        w = {name: weight.float() for name, weight in self.weights.items()}
        at = torch.arange(len(ids)) if positions is None else positions
        turn = self._rotation(at)
        x = w["tok_embeddings.weight"][ids]
        for layer in range(self.params["n_layers"]):
            start = f"layers.{layer}."
            inner = {n.removeprefix(start): v for n, v in w.items() if n.startswith(start)}
            h = self._norm(x, inner["attention_norm.weight"])
            x = x + self._attention(h, inner, turn)
            h = self._norm(x, inner["ffn_norm.weight"])
            gate = torch.nn.functional.silu(h @ inner["feed_forward.w1.weight"].T)
            up = h @ inner["feed_forward.w3.weight"].T
            x = x + (gate * up) @ inner["feed_forward.w2.weight"].T
        output = w.get("output.weight", w["tok_embeddings.weight"])
        return self._norm(x, w["norm.weight"]) @ output.T

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.params["norm_eps"]) * weight

    def _rotation(self, positions: Tensor) -> Tensor:
        """Complex numbers of length one (T, half of a head)."""
        size = self.params["dim"] // self.params["n_heads"]
        theta = self.params.get("rope_theta", 10000.0)
        frequencies = 1 / theta ** (torch.arange(0, size, 2).float() / size)
        if self.params.get("use_scaled_rope"):
            turns = 8192 * frequencies / (2 * math.pi)  # in the length that it was trained on
            blend = ((turns - 1) / (4 - 1)).clamp(0, 1)
            frequencies = (1 - blend) * frequencies / self.factor + blend * frequencies
        angles = torch.outer(positions.float(), frequencies)
        return torch.polar(torch.ones_like(angles), angles)

    def _attention(self, x: Tensor, w: dict[str, Tensor], turn: Tensor) -> Tensor:
        size = self.params["dim"] // self.params["n_heads"]
        q, k, v = (
            (x @ w[f"attention.w{name}.weight"].T).reshape(len(x), -1, size) for name in "qkv"
        )
        q, k = (  # neighbours are the parts of a complex number
            torch.view_as_real(
                torch.view_as_complex(p.reshape(*p.shape[:2], -1, 2)) * turn[:, None]
            )
            for p in (q, k)
        )
        q, k = q.flatten(-2), k.flatten(-2)
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scores = torch.einsum("thd,shd->hts", q, k) / math.sqrt(size)
        mask = torch.full(scores.shape[1:], -torch.inf).triu(1)
        mixed = torch.einsum("hts,shd->thd", (scores + mask).softmax(-1), v)
        return mixed.flatten(1) @ w["attention.wo.weight"].T


def write_native(
    folder: Path,
    parts: int = 1,
    n_kv_heads: int | None = None,
    ffn_dim_multiplier: float | None = None,
    rope_theta: float | None = None,
    use_scaled_rope: bool = False,
    dtype: torch.dtype = torch.float16,
    tied: str = "",
) -> Reference:
    """Write a random Llama in Meta's layout.

    With a ``rope_theta`` of 500,000 it is a Llama 3: its tokenizer is a rank file, and its
    embedding is split by tokens. ``tied`` leaves the output away (``missing``) or stores the
    embedding under its name, too (``shared``).
    """
    folder.mkdir(parents=True)
    new = rope_theta == 500000.0
    (folder / "tokenizer.model").write_bytes(rank_file() if new else sentencepiece_model())
    vocab = len(rank_file().splitlines()) + 256 if new else 600
    params = {
        "dim": DIM, "multiple_of": MULTIPLE_OF, "n_heads": HEADS, "n_layers": LAYERS,
        "norm_eps": 1e-05, "vocab_size": vocab if new else -1,
    }  # fmt: skip
    optional = {
        "n_kv_heads": n_kv_heads, "ffn_dim_multiplier": ffn_dim_multiplier,
        "rope_theta": rope_theta, "use_scaled_rope": use_scaled_rope or None,
    }  # fmt: skip
    params |= {key: value for key, value in optional.items() if value is not None}
    (folder / "params.json").write_text(json.dumps(params))
    weights = {n: w.to(dtype) for n, w in random_weights(params, vocab).items()}
    if tied:
        del weights["output.weight"]
    for number in range(parts):
        share = {name: _share(name, weight, number, parts, new) for name, weight in weights.items()}
        if tied == "shared":
            share["output.weight"] = share["tok_embeddings.weight"]
        share["rope.freqs"] = torch.ones(DIM // HEADS // 2)
        torch.save(share, folder / f"consolidated.{number:02d}.pth")
    (folder / "LICENSE.txt").write_text("A licence.\n")
    (folder / "README.md").write_text("---\nlicense: llama2\n---\nHello.\n")
    write_checklists(folder)
    return Reference(weights, params)


def write_mistral(folder: Path, **params: Any) -> Any:
    """Write a random Mistral of transformers in Mistral's own layout, which is returned."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    head = params.get("head_dim", 16)
    model = MistralForCausalLM(MistralConfig(
        hidden_size=DIM, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=2, head_dim=head, vocab_size=600, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": params.get("rope_theta", 10000.0)},
        sliding_window=params.get("sliding_window"),
    ))  # fmt: skip
    folder.mkdir(parents=True)
    weights = {}
    for name, weight in model.state_dict().items():
        for theirs, ours in MISTRAL_NAMES.items():
            name = name.replace(theirs, ours)
        for kind, heads in (("wq", HEADS), ("wk", 2)):
            if kind in name:  # dimensions that are rotated together are neighbours
                halves = weight.reshape(heads, 2, head // 2, DIM)
                weight = halves.transpose(1, 2).reshape(weight.shape)
        weights[name] = weight.contiguous()
    save_file(weights, folder / "consolidated.safetensors")
    sizes = {
        "dim": DIM, "n_layers": LAYERS, "head_dim": head, "hidden_dim": 48, "n_heads": HEADS,
        "n_kv_heads": 2, "norm_eps": 1e-5, "vocab_size": 600, "rope_theta": 10000.0,
    }  # fmt: skip
    (folder / "params.json").write_text(json.dumps(sizes | params))
    (folder / "tokenizer.model.v3").write_bytes(sentencepiece_model())
    return model


MISTRAL_NAMES = {
    "model.embed_tokens": "tok_embeddings", "lm_head": "output", "model.": "",
    "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv", "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2", "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
"""A part of transformers' name of a tensor -> that of Mistral's."""


def random_weights(params: dict[str, Any], vocab: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)

    def linear(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=draw) / math.sqrt(columns)

    def norm() -> Tensor:
        return 1 + torch.randn(DIM, generator=draw) / 3

    keys = DIM // HEADS * params.get("n_kv_heads", HEADS)
    ffn = int(params.get("ffn_dim_multiplier", 1) * int(8 * DIM / 3))
    ffn = -(-ffn // MULTIPLE_OF) * MULTIPLE_OF
    weights = {"tok_embeddings.weight": linear(vocab, DIM), "norm.weight": norm()}
    weights["output.weight"] = linear(vocab, DIM)
    for layer in range(LAYERS):
        weights |= {f"layers.{layer}.{name}.weight": weight for name, weight in {
            "attention.wq": 2 * linear(DIM, DIM), "attention.wk": 2 * linear(keys, DIM),
            "attention.wv": linear(keys, DIM), "attention.wo": linear(DIM, DIM),
            "feed_forward.w1": linear(ffn, DIM), "feed_forward.w2": linear(DIM, ffn),
            "feed_forward.w3": linear(ffn, DIM), "attention_norm": norm(), "ffn_norm": norm(),
        }.items()}  # fmt: skip
    return weights


def _share(name: str, weight: Tensor, number: int, parts: int, new: bool) -> Tensor:
    """What a GPU holds of a weight under Meta's tensor parallelism."""
    if weight.dim() == 1:
        return weight.clone()
    by_columns = name.endswith(("wo.weight", "w2.weight")) or ("tok" in name and not new)
    return weight.chunk(parts, dim=1 if by_columns else 0)[number].clone()


def write_checklists(folder: Path) -> None:
    """The md5 sums, as they are now."""
    for checklist, names in {
        "checklist.chk": [*sorted(p.name for p in folder.glob("*.pth")), "params.json"],
        "tokenizer_checklist.chk": ["tokenizer.model"],
    }.items():
        lines = [f"{md5(folder / name)}  {name}\n" for name in names]
        (folder / checklist).write_text("".join(lines))


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


@cache
def sentencepiece_model() -> bytes:
    """A model of SentencePiece with the settings of Llama's."""
    import sentencepiece

    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(load_prose("builtin").paragraphs), model_writer=made,
        vocab_size=600, model_type="bpe", byte_fallback=True, split_digits=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True, character_coverage=0.99, minloglevel=2,
    )  # fmt: skip
    return made.getvalue()


@cache
def rank_file() -> bytes:
    """Lines of a token in base64 and its rank, as in Llama 3: the bytes, then 200 merges."""
    letters = pre_tokenizers.ByteLevel.alphabet()
    table: Any = bytes_to_unicode
    byte = {letter: value for value, letter in table().items()}
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=456, initial_alphabet=letters, show_progress=False)
    trained.train_from_iterator(load_prose("builtin").paragraphs, trainer)
    vocab = trained.get_vocab()
    tokens = sorted(vocab, key=vocab.__getitem__)
    spelled = [base64.b64encode(bytes(byte[letter] for letter in token)) for token in tokens]
    return b"".join(b"%s %d\n" % (token, rank) for rank, token in enumerate(spelled))
