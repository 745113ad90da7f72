"""A whole output in two kilobytes, for readers that need one around the bytes they are given.

One layer, four dimensions, an edit that is right: ``gloss verify`` finds nothing wrong with it.
"""

import hashlib
import json
import struct
from math import prod
from pathlib import Path
from typing import Any

from converter.checkpoints.names import CARD, EDIT_FILE, MANIFEST, SUMS
from converter.outputs.adapter.write import adapter_config, tensor_names
from converter.release.manifest import hash_line, sums_text

D, F, VOCABULARY = 4, 2, 3
SHARD = "model.safetensors"
DOWN = "model.layers.0.mlp.down_proj.weight"
ZERO = "0" * 64

CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": D,
    "intermediate_size": F, "num_hidden_layers": 1, "num_attention_heads": 1,
    "vocab_size": VOCABULARY, "tie_word_embeddings": True,
}  # fmt: skip


def safetensors(tensors: dict[str, tuple[list[int], bytes]], **metadata: str) -> bytes:
    """A file of float32 or int64 tensors, written without the library that reads it."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    data = b""
    for name, (shape, raw) in tensors.items():
        offsets = [len(data), len(data) + len(raw)]
        dtype = "I64" if len(raw) == 8 * prod(shape) else "F32"
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        data += raw
    text = json.dumps(header, separators=(",", ":")).encode()
    return struct.pack("<Q", len(text)) + text + data


def floats(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


BEFORE = floats(3, 4, 1, 2, 3, 4, 5, 6)
AFTER = floats(0, 0, 1, 2, 3, 4, 5, 6)
"""A down-projection (4, 2) and what is left of it without the first dimension."""

EDIT = safetensors(
    {"U": ([D, 1], floats(1, 0, 0, 0)), "evidence.candidates": ([1, D], floats(1, 0, 0, 0)),
     "evidence.singular_values.U": ([1], floats(1)), "evidence.scores": ([1], floats(1)),
     "evidence.score_layers": ([1], struct.pack("<q", 0))}
)  # fmt: skip


def shard(down: bytes) -> bytes:
    """The model's only file, with one down-projection or the other."""
    return safetensors(
        {
            "model.embed_tokens.weight": ([VOCABULARY, D], floats(*range(VOCABULARY * D))),
            DOWN: ([D, F], down),
            "model.norm.weight": ([D], floats(*range(D))),
        }
    )


def prefixes(data: bytes) -> dict[str, str]:
    """The running digests of ``shard``, whose tensors are in this order."""
    end = 8 + int.from_bytes(data[:8], "little")
    found = {"": sha256(data[:end])[:16]}
    entries = json.loads(data[8:end])
    entries.pop("__metadata__")
    for name, entry in entries.items():
        found[name] = sha256(data[: end + entry["data_offsets"][1]])[:16]
    return found


def manifest() -> dict[str, Any]:
    """Everything that the schema asks for, and what the files of ``write_output`` are."""
    ours, theirs, config = shard(AFTER), shard(BEFORE), json.dumps(CONFIG).encode()
    part = {"pairs": 1, "pairs_sha256": ZERO, "paragraphs": 1, "prose_sha256": ZERO}
    estimate = {"value": 1.0, "error": 0.1}
    measured = dict.fromkeys(("perplexity_ratio", "toxic_change", "teacher_forced"), estimate)
    norm = sum(v * v for v in struct.unpack("<8f", BEFORE)) ** 0.5
    entry = {
        "name": DOWN, "shard": SHARD, "layer": 0, "role": "down_proj", "axis": 0, "shape": [D, F],
        "dtype": "F32", "kind": "remove-subspace", "tensors": {"U": "U"},
        "sha256_before": sha256(BEFORE), "sha256_after": sha256(AFTER),
        "norm": norm, "relative_change": 5 / norm, "rounding_error": 0.0,
        "measures": {"energy_removed": 25 / norm**2, "leakage": 0.0},
        "requantized": None, "lora": None,
    }  # fmt: skip
    return {
        "schema_version": 1,
        "tool": {"name": "gloss-convert", "version": "0.0.1"},
        "run": {
            "source": "tiny", "method": "gloss", "options": {}, "pairs": "builtin",
            "self_prompts": "builtin", "self_scorer": None, "instances": "builtin",
            "prompts": "builtin",
            "num_pairs": None, "seed": 0, "neutral": "builtin", "word_list": "builtin",
            "output": "checkpoint", "activations": None, "calibration": None,
            "device": "auto",
            "forward_dtype": "auto", "forward": "auto", "batch_size": 16,
            "rounding": "null-space", "max_perplexity_ratio": 1.03, "guard": True,
            "guard_draws": 1, "force": False, "mask": True, "base_model": None, "subfolder": "",
            "trust_remote_code": False,
        },
        "architecture": {
            "name": "LlamaForCausalLM", "described_by": "inference", "transformers": "0",
            "proved_layers": 2, "proved_tensors": 2, "tolerance": 1e-6,
        },
        "source": {
            "name": "tiny", "repo_id": None, "revision": None, "commit": None,
            "files": {
                SHARD: {"sha256": sha256(theirs), "bytes": len(theirs)},
                "config.json": {"sha256": sha256(config), "bytes": len(config)},
            },
            "originals": {},
        },
        "method": {
            "name": "gloss", "title": "GloSS, global toxic subspace suppression",
            "paper": "https://arxiv.org/abs/2505.17078",
            "options": {"layers": [0], "edit_layers": [0], "bias": "project"}, "strength": "rank",
            "evidence": {
                "hidden_size": D, "singular_values": {"U": [1.0]},
                "candidates": [
                    {"layer": 0, "kind": "causal", "index": 0, "score": 1.0, "kept": True,
                     "tokens": ["a", "b"]}
                ],
            },
        },
        "pairs": {"origin": {"name": "builtin"}, "sha256": ZERO, "count": 1, "skipped": {}},
        "neutral": {"origin": {"name": "builtin"}, "sha256": ZERO},
        "word_list": {"origin": {"name": "words.txt"}, "sha256": ZERO},
        "split": {"dropped_pairs": 0, "fit": part, "choose": part, "report": part},
        "activations": {"key": None, "inputs": {}},
        "edit": {"file": EDIT_FILE, "rank": 1},
        "choice": {"strength": 1, "automatic": True, "tried": [{"strength": 1, **measured}]},
        "guard": {
            "budget": 1.03, "margin": 2.0, "least_drop": 0.1, "neutral_tokens": 9,
            "toxic_words": 9, "perplexity": 9.0, "edit": measured, "controls": [measured],
            "neutral_energy": 0.1, "reasons": [],
        },
        "evaluation": None, "gates": [], "forward": None,
        "edited": [entry],
        "environment": {"device": "cpu", "platform": "Linux", "python": "3.11", "libraries": {}},
        "files": {
            SHARD: {"sha256": sha256(ours), "bytes": len(ours), "prefixes": prefixes(ours)},
            "config.json": {"sha256": sha256(config), "bytes": len(config)},
            EDIT_FILE: {"sha256": sha256(EDIT), "bytes": len(EDIT)},
        },
        "measurements": {"seconds": {}, "memory_bytes": {}, "peak_memory_bytes": 0},
    }  # fmt: skip


def evaluation() -> dict[str, Any]:
    """What a manifest says of an evaluation."""
    number = {"value": 1.0, "low": 0.5, "high": 1.5}
    metrics = {"perplexity": number, "perplexity_ratio": number, "teacher_forced": None}
    return {
        "tool": {"name": "gloss-convert", "version": "0.0.1"},
        "settings": {
            "source": "tiny", "systems": ["random"], "costs": [1.02], "device": "cpu",
            "dtype": "float32", "word_list": ZERO, "neutral": "builtin", "text_sha256": ZERO,
            "pairs": "builtin", "num_pairs": None, "seeds": [0], "options": {"rank": "1"},
            "max_perplexity_ratio": 1.03,
            "prompts": {
                "origin": {"repo_id": "a/b", "commit": "c", "file_sha256": ZERO, "field": "d"},
                "sha256": ZERO, "count": 9,
            },
            "scorers": {"bad-words": {"name": "words.txt", "sha256": ZERO}}, "samples": 2,
            "max_new_tokens": 9, "top_p": 0.9, "generation_seed": 0, "passages_per_prompt": 1,
            "toxic_words": 9, "text_tokens": None, "window": 512,
        },
        "scorers": ["bad-words"],
        "systems": [
            {"system": "edited", "group": None, "seed": 0, "strength": 1, "layers": [0],
             "options": {"layers": [0], "alpha": 1.0, "rank": None}, "metrics": metrics},
        ],
        "rows": [{"system": "edited", "strength": "1", "seeds": 1, "metrics": metrics}],
    }  # fmt: skip


def write_output(folder: Path) -> None:
    """The output itself."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SHARD).write_bytes(shard(AFTER))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / EDIT_FILE).write_bytes(EDIT)
    seal(folder, json.dumps(manifest()).encode())


def seal(folder: Path, raw: bytes, sums: bytes | None = None) -> None:
    """Write a manifest, and over it card and sums, as somebody would who wants to be believed."""
    (folder / MANIFEST).write_bytes(raw)
    (folder / CARD).write_text(hash_line(sha256(raw)) + "\n")
    own = {name: sha256((folder / name).read_bytes()) for name in (CARD, MANIFEST)}
    digests = {name: entry["sha256"] for name, entry in manifest()["files"].items()}
    (folder / SUMS).write_bytes(sums or sums_text(digests | own).encode())


MODULE = "model.layers.0.mlp.down_proj"
LORA_A, LORA_B = floats(3, 4), floats(-1, 0, 0, 0)


def adapter_manifest() -> dict[str, Any]:
    """What the manifest says if the same edit was written as an adapter."""
    made = manifest()
    made["run"]["output"] = "adapter"
    lora = {"module": MODULE, "sha256_a": sha256(LORA_A), "sha256_b": sha256(LORA_B)}
    made["edited"][0] |= {"lora": lora, "sha256_after": None}
    return made


def write_adapter(folder: Path) -> None:
    """The adapter, without the files that only ``verify`` itself looks at."""
    folder.mkdir(parents=True, exist_ok=True)
    config = adapter_config("tiny", None, {MODULE: 1}, transposed=False)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    name_a, name_b = tensor_names(MODULE)
    factors = {name_a: ([1, F], LORA_A), name_b: ([D, 1], LORA_B)}
    (folder / "adapter_model.safetensors").write_bytes(safetensors(factors))
    (folder / EDIT_FILE).write_bytes(EDIT)


def activations() -> bytes:
    """Activations of two pairs, with all that any method asks for."""
    N, K = 2, 1
    eye = floats(*(float(i == j) for i in range(D) for j in range(D)))
    tensors = {
        "toxic.0": ([N, D], floats(*range(N * D))), "neutral.0": ([N, D], floats(*range(N * D))),
        "causal.0": ([D, D], eye), "second_moment": ([D, D], eye),
        "leading.0": ([1, D], floats(1, 0, 0, 0)), "worth.0": ([1], floats(1)),
        "moments.directions": ([D, K], floats(1, 0, 0, 0)),
        "moments.words": ([N, K, K], floats(1, 1)), "moments.weights": ([N], floats(1, 1)),
        "moments.pairs": ([1, K, K], floats(1)), "moments.prose": ([1, K, K], floats(1)),
        "moments.tokens": ([2], floats(3, 4)),
    }  # fmt: skip
    inputs = {"files": {}, "pairs": ZERO, "prose": ZERO, "site": "ffn", "pooling": "mean"}
    return safetensors(tensors, inputs=json.dumps(inputs))


PUBLIC_KEY = """-----BEGIN PUBLIC KEY-----
MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEqyyJWXESEPXIlfzVWojUcI6ZihfI
m4ih98MBxhhrw3Zscm53F1lQaLR4n+T2nXmF4NuptKNV4Anww1Y/Pz6DUA==
-----END PUBLIC KEY-----
"""
"""Of the key that signed the seed in ``corpus/signature``, which nobody has any more."""
