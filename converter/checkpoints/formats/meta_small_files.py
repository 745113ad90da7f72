"""The small files of a Llama in Meta's layout, or of a Mistral in its own, and the configs and
tokenizer that they become.

No other module knows ``convert_slow_tokenizer`` of transformers, which is not documented: that an
extractor of SentencePiece has its model as ``proto``, and that the converter of tiktoken asks its
``load_tiktoken_bpe`` for the ranks. ``tests/test_doors.py`` fails where another version does not.
"""

import base64
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch

from converter.checkpoints.formats.version_4 import rope_keys
from converter.checkpoints.formats.virtual import making
from converter.checkpoints.layout import check_content, read_json
from converter.checkpoints.names import MAX_COMPANION
from converter.errors import CheckpointError, SourceError
from converter.text import describe_value

AGAIN = "fetch the file again"

_MAX_ALL = 256_000_000
"""The most bytes of all files beside the weights, which are held in memory."""

_MAX_PARAMS = 1_000_000
"""The most bytes of ``params.json``, which has ten numbers."""

_NOT_SMALL = (".bin", ".chk", ".gguf", ".index.json", ".pt", ".pth", ".safetensors", "params.json")


@dataclass(frozen=True, slots=True)
class Params:
    """The values of ``params.json``; ``vocab`` is None if the tensors define it.

    Attributes:
        mistral: additional config keys of a Mistral; None for a Llama.
    """

    dim: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    norm_eps: float
    rope_theta: float
    scaled: bool
    vocab: int | None
    mistral: dict[str, Any] | None = None


def read_params(path: Path) -> Params:
    """Read ``params.json``.

    That of a Mistral states the width of the FFN. In a Llama it is 8/3 of the model's width, times
    ``ffn_dim_multiplier``, rounded up to a multiple of ``multiple_of``.

    Raises:
        CheckpointError: it is missing or malformed, or its numbers do not fit together.
    """
    data = read_json(path, _MAX_PARAMS)
    data = data.get("model", data)
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
    if heads % kv_heads or ("head_dim" not in data and dim % (2 * heads)):
        raise CheckpointError(
            f"{path.name} contradicts itself", expected="heads that divide the model evenly",
            found=f"dim {dim}, n_heads {heads}, n_kv_heads {kv_heads}",
        )  # fmt: skip
    sizes = (dim, number("n_layers"), heads, kv_heads)
    if "hidden_dim" in data:
        mistral = _mistral(data)
        theta = number("rope_theta", 10000 if mistral["sliding_window"] else None, float)
        return Params(
            *sizes, number("head_dim", dim // heads), number("hidden_dim"),
            float(number("norm_eps", None, float)), float(theta), False, number("vocab_size"),
            mistral,
        )  # fmt: skip
    ffn = int(number("ffn_dim_multiplier", 1, float) * int(8 * dim / 3))
    return Params(
        *sizes, dim // heads, unit * math.ceil(ffn / unit),
        float(number("norm_eps", 1e-5, float)), float(number("rope_theta", 10000, float)),
        bool(data.get("use_scaled_rope")),
        None if data.get("vocab_size") in (None, -1) else number("vocab_size"),
    )  # fmt: skip


_MISTRAL = {
    "dim", "head_dim", "hidden_dim", "max_position_embeddings", "max_seq_len", "n_heads",
    "n_kv_heads", "n_layers", "norm_eps", "rope_theta", "sliding_window", "tied_embeddings",
    "vocab_size",
}  # fmt: skip
"""Keys of a dense Mistral."""

_NEUTRAL = {"causal": True, "model_type": "transformer"}
"""Other keys -> the neutral value; for keys that are not listed, None or false."""


def _mistral(data: Mapping[str, Any]) -> dict[str, Any]:
    """The additional config keys of a dense Mistral.

    Raises CheckpointError, naming it, for a key that would make it another model.
    """
    for key in sorted(data.keys() - _MISTRAL):
        if data[key] not in (None, _NEUTRAL.get(key, False)):
            raise CheckpointError(
                f"params.json has {key}, which a dense text model of Mistral has not",
                found=describe_value(data[key]),
                hint="use the same model in transformers' layout: config.json, model*.safetensors",
            )
    window = data.get("sliding_window")
    longest = data.get("max_position_embeddings") or data.get("max_seq_len") or 32768
    for key, value in (("sliding_window", window or 1), ("max_seq_len", longest)):
        if type(value) is not int or value < 1:
            raise CheckpointError(
                f"params.json has no usable {key}", expected="a positive whole number",
                found=describe_value(value),
            )  # fmt: skip
    return {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral",
        "sliding_window": window, "max_position_embeddings": longest,
    }  # fmt: skip


def config_of(params: Params, vocab: int, dtype: torch.dtype, tied: bool) -> dict[str, Any]:
    """``config.json``, but for the ids of the tokenizer."""
    # The factor is nowhere in Meta's files. It is 8 in 3.1 and 3.3 (8B and more), and 32 in 3.2 1B
    # and 3B, by Meta's configs on the Hub and meta-llama/llama-models issues 166 and 241; Meta's
    # own code has 8 for all, and degrades on long texts there. Only the small ones have fewer than
    # 4096 dimensions.
    factor = 8.0 if params.dim >= 4096 else 32.0
    rope = llama3_scaling(factor) if params.scaled else {"rope_type": "default"}
    rope |= {"rope_theta": params.rope_theta}
    stored = str(dtype).removeprefix("torch.")
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama",
        "hidden_size": params.dim, "intermediate_size": params.ffn,
        "num_hidden_layers": params.layers, "num_attention_heads": params.heads,
        "num_key_value_heads": params.kv_heads, "head_dim": params.head_dim,
        "vocab_size": vocab, "max_position_embeddings": _positions(params),
        "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0,
        "initializer_range": 0.02, "rms_norm_eps": params.norm_eps, "use_cache": True,
        **rope_keys(rope), "rope_parameters": rope,
        "tie_word_embeddings": tied, "dtype": stored, "torch_dtype": stored,
    } | (params.mistral or {})  # fmt: skip


def llama3_scaling(factor: float) -> dict[str, Any]:
    """How the positions of Llama 3.1 and later are scaled."""
    return {
        "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3",
    }  # fmt: skip


def _positions(params: Params) -> int:
    """The model's longest text. params.json does not state it, so it is derived from other numbers.

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


def small_files(folder: Path) -> dict[str, bytes]:
    """Name -> content of tokenizer, licence, card and the like."""
    small = {}
    for path in sorted(folder.iterdir()):
        fit = not path.name.endswith(_NOT_SMALL) and not path.name.startswith(".")
        if fit and path.is_file() and path.stat().st_size <= MAX_COMPANION:
            check_content(path.name, path)
            small[path.name] = path.read_bytes()
            if sum(map(len, small.values())) > _MAX_ALL:
                raise CheckpointError(
                    f"{folder.name} has too much beside the weights",
                    expected=f"at most {_MAX_ALL:,} bytes of small files",
                )
    if versions := [name for name in small if re.fullmatch(r"tokenizer\.model\.v\d+", name)]:
        small.setdefault("tokenizer.model", small[max(versions)])
    if not {"tokenizer.json", "tokenizer.model"} & set(small):
        other = "tekken.json" in small
        raise CheckpointError(
            f"{folder.name} has no tokenizer", expected="tokenizer.model, or tokenizer.json",
            found="tekken.json, which is not read" if other else None,
            hint="get tokenizer.json of the same model" if other else None,
        )  # fmt: skip
    return small


def keep(kept: Path, small: Mapping[str, bytes], config: dict[str, Any], scaled: bool) -> None:
    """Write the small files of a translation, all or none of them."""
    with making(kept) as part:
        for name, data in small.items():
            (part / name).write_bytes(data)
        _write_json(part / "config.json", config)
        if "tokenizer.json" not in small:
            _convert_tokenizer(part, config, scaled)
        _write_ids(part, config)


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", "utf-8")


def _write_ids(folder: Path, config: dict[str, Any]) -> None:
    """Put the ids of the tokenizer into the configs. Generation also stops at the end of a turn, as
    in Meta's code, since it is not known whether a Llama 3 is a chat model.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # exceptions of many kinds, even of the library in Rust
        raise _tokenizer_error("tokenizer.json", error) from error
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    _write_json(folder / "config.json", config | ids)
    known = tokenizer.get_vocab()
    turns = [known[token] for token in ("<|eom_id|>", "<|eot_id|>") if token in known]
    if turns and ids["eos_token_id"] is not None:
        ids["eos_token_id"] = list(dict.fromkeys([ids["eos_token_id"], *turns]))
    if not (folder / "generation_config.json").exists():
        _write_json(folder / "generation_config.json", ids)


def _tokenizer_error(name: str, error: Exception) -> CheckpointError:
    return CheckpointError(f"{name} cannot be read", found=str(error)[:200], hint=AGAIN)


def _convert_tokenizer(folder: Path, config: Mapping[str, Any], scaled: bool) -> None:
    """Make tokenizer.json of tokenizer.model: ranks of a byte-level BPE since Llama 3, a model of
    SentencePiece before."""
    path = folder / "tokenizer.model"
    ranks = re.match(rb"[0-9A-Za-z+/=]+ \d+\r?\n", path.read_bytes())
    try:
        core, names = _from_ranks(path, scaled) if ranks else _from_sentencepiece(path)
    except ImportError as error:
        raise SourceError(
            "a package that reads tokenizer.model is missing", found=str(error).strip()[:100],
            hint="pip install 'gloss-convert[native]'",
        ) from error  # fmt: skip
    except Exception as error:  # of many kinds, even of protobuf and of a library in Rust
        raise _tokenizer_error(path.name, error) from error
    if core.get_vocab_size() > config["vocab_size"]:
        raise CheckpointError(
            "tokenizer.model does not belong to the model",
            expected=f"at most {config['vocab_size']} tokens", found=str(core.get_vocab_size()),
        )  # fmt: skip
    (folder / "tokenizer.json").write_text(core.to_str(pretty=True), "utf-8")
    template = folder / "chat_template.jinja"
    if template.is_file():  # old versions of transformers know no such file
        names |= {"chat_template": template.read_bytes().decode()}
    _write_json(folder / "tokenizer_config.json", names | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config["max_position_embeddings"],
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    })  # fmt: skip


def _from_sentencepiece(path: Path) -> tuple[Any, dict[str, Any]]:
    """The tokenizer of Llama 1, 2 and Code Llama: a BPE on text whose spaces are written out."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers.convert_slow_tokenizer import SentencePieceExtractor

    extractor: Any = SentencePieceExtractor(str(path))
    text, spec = extractor.proto.normalizer_spec, extractor.proto.trainer_spec
    if spec.model_type != spec.BPE or not spec.byte_fallback:
        raise ValueError("not a BPE with byte fallback")
    if text.precompiled_charsmap or text.remove_extra_whitespaces or not text.add_dummy_prefix:
        raise ValueError("text is not normalized as in Llama")
    made = extractor.extract(models.BPE)
    core = Tokenizer(models.BPE(made["vocab"], made["merges"], fuse_unk=True, byte_fallback=True))
    core.add_special_tokens(["<unk>"])
    core.add_tokens(made["additional_special_tokens"])
    core.normalizer = normalizers.Sequence([
        normalizers.Prepend("▁"), normalizers.Replace(" ", "▁"),
    ])  # fmt: skip
    core.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    _begin_with(core, "<s>")
    return core, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def _from_ranks(path: Path, scaled: bool) -> tuple[Any, dict[str, Any]]:
    """The tokenizer of Llama 3: lines of a token in base64 and its rank, and 256 special tokens."""
    from transformers.convert_slow_tokenizer import TikTokenConverter

    lines = (line.split() for line in path.read_bytes().splitlines() if line)
    ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError("the ranks have gaps")
    reader: Any = TikTokenConverter
    converter = reader(extra_special_tokens=special_tokens(scaled))
    # tiktoken's own reader caches by path, and would return an old version of a changed file
    converter.load_tiktoken_bpe = lambda _: ranks
    core = converter.converted()
    _begin_with(core, "<|begin_of_text|>")
    return core, {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}


def special_tokens(scaled: bool) -> list[str]:
    """The special tokens of Llama 3 in order; 3.1 and later (``scaled``) name some of them."""
    named = {
        0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id", 9: "eot_id",
    } | ({4: "finetune_right_pad_id", 8: "eom_id", 10: "python_tag"} if scaled else {})  # fmt: skip
    free = count()
    return [f"<|{named.get(n) or f'reserved_special_token_{next(free)}'}|>" for n in range(256)]


def _begin_with(core: Any, token: str) -> None:
    from tokenizers import processors

    core.post_processor = processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B",
        special_tokens=[(token, core.token_to_id(token))],
    )  # fmt: skip
