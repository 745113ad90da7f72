"""The small files of a Llama in Meta's layout, and what becomes of them: configs and tokenizer.

No other module knows ``convert_slow_tokenizer`` of transformers, which is not documented: that an
extractor of SentencePiece has its model as ``proto``, and that the converter of tiktoken asks its
``load_tiktoken_bpe`` for the ranks. ``tests/test_doors.py`` fails where another version does not.
"""

import base64
import json
import re
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from converter.checkpoints.formats.virtual import refuse_pointer
from converter.errors import CheckpointError, SourceError
from converter.runtime.cache import cache_error, discard_stale, flush

AGAIN = "fetch the file again"

MAX_SMALL = 64_000_000
"""Bytes beyond which a file beside the weights is not one of the small ones that go along."""

MAX_ALL = 256_000_000
"""Bytes of all of them together; they are held in memory."""

NOT_SMALL = (".bin", ".chk", ".gguf", ".index.json", ".pt", ".pth", ".safetensors", "params.json")


def small_files(folder: Path) -> dict[str, bytes]:
    """Name -> content of tokenizer, licence, card and the like."""
    small = {}
    for path in sorted(folder.iterdir()):
        fit = not path.name.endswith(NOT_SMALL) and not path.name.startswith(".")
        if fit and path.is_file() and path.stat().st_size <= MAX_SMALL:
            refuse_pointer(path)
            small[path.name] = path.read_bytes()
            if sum(map(len, small.values())) > MAX_ALL:
                raise CheckpointError(
                    f"{folder.name} has too much beside the weights",
                    expected=f"at most {MAX_ALL:,} bytes of small files",
                )
    if not {"tokenizer.json", "tokenizer.model"} & set(small):
        raise CheckpointError(f"{folder.name} has no tokenizer", expected="tokenizer.model")
    return small


def keep(kept: Path, small: Mapping[str, bytes], config: dict[str, Any], scaled: bool) -> None:
    """Write the small files of a translation, all or none of them."""
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        discard_stale(kept.parent, ".native-")
        with TemporaryDirectory(prefix=".native-", dir=kept.parent) as temporary:
            part = Path(temporary) / kept.name
            part.mkdir()
            for name, data in small.items():
                (part / name).write_bytes(data)
            _write_json(part / "config.json", config)
            if "tokenizer.json" not in small:
                _convert_tokenizer(part, config, scaled)
            _write_ids(part, config)
            flush(part)
            part.rename(kept)
    except OSError as error:
        if not kept.is_dir():  # unless another run has made it meanwhile
            raise cache_error(kept, error) from error


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", "utf-8")


def _write_ids(folder: Path, config: dict[str, Any]) -> None:
    """Put the ids of the tokenizer into the configs. Generation stops at the end of a turn, too, as
    in Meta's code: whether a Llama 3 is one to chat with is not known."""
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # of many kinds, down to those of the library in Rust
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
    except Exception as error:  # of many kinds, down to those of protobuf and of a library in Rust
        raise _tokenizer_error(path.name, error) from error
    if core.get_vocab_size() > config["vocab_size"]:
        raise CheckpointError(
            "tokenizer.model does not belong to the model",
            expected=f"at most {config['vocab_size']} tokens", found=str(core.get_vocab_size()),
        )  # fmt: skip
    (folder / "tokenizer.json").write_text(core.to_str(pretty=True), "utf-8")
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
    # tiktoken's own reader keeps a copy by path and would give that of a file that has changed
    converter.load_tiktoken_bpe = lambda _: ranks
    core = converter.converted()
    _begin_with(core, "<|begin_of_text|>")
    return core, {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}


def special_tokens(scaled: bool) -> list[str]:
    """Those of Llama 3 in their order; 3.1 and later (``scaled``) gave names to some of them."""
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
