"""File names of a checkpoint and of its record: weights, copied files, licence files."""

import re
from collections.abc import Container, Iterable
from pathlib import PurePosixPath
from typing import Literal

from converter.errors import VerificationError
from converter.text import is_one_line

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CARD = "README.md"
MANIFEST = "gloss_manifest.json"
SUMS = "SHA256SUMS"
SIGNATURE = "model.sig"

EDIT_FILE = "gloss_edit.tensors"
"""The edit, in the format of safetensors. Readers that take every ``*.safetensors`` of a folder for
weights of the model (vLLM, where there is no index) must not see it."""

CALIBRATION = "gloss_calibration.json"
"""How a calibration model was trained, beside it."""

Format = Literal["safetensors", "pickled", "native"]

WEIGHTS: dict[Format, tuple[str, str]] = {
    "safetensors": (SINGLE, INDEX),
    "pickled": ("pytorch_model.bin", "pytorch_model.bin.index.json"),
}
"""Format -> the file of the weights, and the index if there are several."""

_PART = re.compile(r"consolidated\.\d\d\.pth")
"""Pattern of a part of the weights in Meta's layout."""

_MISTRAL = "consolidated.safetensors"
"""The weights in Mistral's layout, which is like Meta's."""

OTHER_WEIGHTS = (
    ".bin", ".ckpt", ".data", ".gguf", ".ggml", ".h5", ".keras", ".litertlm", ".mlmodel",
    ".msgpack", ".nemo", ".npy", ".npz", ".onnx", ".onnx_data", ".ot", ".parquet", ".pickle",
    ".pkl", ".pt", ".pth", ".safetensors", ".task", ".tflite",
)  # fmt: skip
"""Endings of files with weights or data, by which readers find weights. They do not know
``.tensors``.
"""

_OTHER_FOLDERS = ("checkpoint-", "coreml", "gguf", "logs", "onnx", "openvino", "original", "runs",
                  "wandb")  # fmt: skip
"""Beginnings of folders with the model for other programs, or with checkpoints of a training."""

MAX_COMPANION = 64_000_000
"""The most bytes of a copied file; the largest tokenizers have half of it."""

BOOKKEEPING = {".DS_Store", ".cache", ".git", ".gitattributes", ".gitignore", "lost+found"}
"""Files of git, the Hub's client and file systems, which are not part of a model."""

UNFINISHED = (".aria2", ".crdownload", ".incomplete", ".part")
"""Endings of unfinished downloads, or of files beside them."""

UNLISTED = {CARD, MANIFEST, SUMS, SIGNATURE}
"""Files that a conversion writes last: the manifest, and the files with its sha256."""

OURS = {INDEX, EDIT_FILE, *UNLISTED}
"""Files that a conversion writes itself; the source's own are not copied. A signature of the source
would not fit.
"""

ELSEWHERE = "adapter_config.json"
"""A file that makes transformers load the model that it names, with an adapter, instead of the
weights beside it. A source with one is refused; one in a subfolder is not copied.
"""

PICTURE = ".png"
"""Ending of the pictures that ``evaluation.plots`` draws."""

TOKENIZER = {
    "added_tokens.json", "merges.txt", "special_tokens_map.json", "spiece.model",
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt",
}  # fmt: skip

QUANTIZED = {"hf_quant_config.json", "quant_config.json", "quantize_config.json"}
"""Files besides ``config.json`` that describe a quantization."""

_PAPERS = {
    "agreement": ("LICENSE", "LICENCE", "COPYING", "TERMS"),
    "policy": ("USE_POLICY", "USE-POLICY", "ACCEPTABLE_USE", "PROHIBITED_USE"),
    "notice": ("NOTICE",),
}
"""Kind of file -> beginning of its name, in any case."""

_TEXT = ("", ".txt", ".md", ".rst", ".html", ".pdf")
"""Endings of licence files; ``license.py`` is not one."""


def weight_files(names: Iterable[str]) -> list[str]:
    """The parts of the weights in Meta's or Mistral's layout among some file names, in order."""
    known = set(names)
    return sorted(filter(_PART.fullmatch, known)) or sorted(known & {_MISTRAL})


def is_native(names: Iterable[str]) -> bool:
    """Whether file names are those of Meta's layout (params.json and consolidated.*.pth) or
    Mistral's (with consolidated.safetensors), without a config.json.
    """
    known = set(names)
    return bool(weight_files(known)) and "params.json" in known and "config.json" not in known


def papers(names: Iterable[str]) -> dict[str, list[str]]:
    """Kind of licence file -> its files among ``names`` of a folder."""
    found: dict[str, list[str]] = {kind: [] for kind in _PAPERS}
    for name in sorted(names):
        for kind, starts in _PAPERS.items():
            plain = PurePosixPath(name).suffix.lower() in _TEXT or kind == "agreement"
            if name.upper().startswith(starts) and plain and not name.endswith((".py", ".json")):
                found[kind].append(name)
    return found


def is_companion(name: str, size: int = 0) -> bool:
    """Whether a file of a repo is copied: it is not the model's weights, card or history."""
    if size > MAX_COMPANION or name in OURS or PurePosixPath(name).name == ELSEWHERE:
        return False
    if _is_apart(name):
        return False
    return not is_weights(name) and not name.endswith(".tensors")


def _is_apart(name: str) -> bool:
    """Whether a file is hidden, a folder, or in one for other programs."""
    *folders, last = PurePosixPath(name).parts
    hidden = any(part.startswith(".") for part in (*folders, last))
    return hidden or name.endswith("/") or bool(folders and folders[0].startswith(_OTHER_FOLDERS))


def may_be_extra(name: str, names: Container[str]) -> bool:
    """Whether a file of a source, by its name, can hold extra weights beside the model's own: a
    draft head, a projector, a module of sentence-transformers.
    """
    path = PurePosixPath(name)
    adapter = path.name.startswith("adapter_") or str(path.with_name(ELSEWHERE)) in names
    ours = path.name.startswith("gloss_")
    return path.suffix.lower() == ".safetensors" and not (adapter or ours or _is_apart(name))


def is_replaced(name: str) -> bool:
    """Whether a conversion writes its own file of that name, or the file is dispensable."""
    parts = PurePosixPath(name).parts
    return (
        name in OURS - {SIGNATURE} or name.startswith("gloss_") or not BOOKKEEPING.isdisjoint(parts)
    )


def is_weights(name: str) -> bool:
    """Whether readers can take a file for weights of a model, or for an index of them."""
    endings = (*OTHER_WEIGHTS, ".bin.index.json", ".safetensors.index.json")
    return name.lower().endswith(endings)


def is_read(name: str) -> bool:
    """Whether a file of a folder is copied or read, but not for tensors."""
    return is_companion(name) or name in (INDEX, WEIGHTS["pickled"][1], CARD, MANIFEST)


_LONGEST_NAME = 255
"""Bytes of the name of a file, on every usual system."""


def is_plain(name: str) -> bool:
    """Whether a name from a manifest is that of a file in its folder, and plain text."""
    parts = name.split("/")
    if not is_one_line(name) or {"", ".", ".."}.intersection(parts):
        return False
    return all(len(part.encode()) <= _LONGEST_NAME for part in parts)


def plain_name(name: str) -> None:
    """Make sure that a name from a manifest stays in its folder. Raises VerificationError."""
    if not is_plain(name) or "\\" in name:
        raise VerificationError(
            "the manifest is not one of gloss-convert", expected="names of files in a folder",
            found=name[:80],
        )  # fmt: skip
