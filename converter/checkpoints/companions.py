"""Which small files belong to a model and are copied with it, and which of them are its licence."""

from collections.abc import Iterable
from pathlib import PurePosixPath

from converter.checkpoints.formats import pickle_files as pickled
from converter.checkpoints.names import CARD, INDEX, MANIFEST, SIGNATURE, SUMS

PAPERS = {
    "agreement": ("LICENSE", "LICENCE", "COPYING", "TERMS"),
    "policy": ("USE_POLICY", "USE-POLICY", "ACCEPTABLE_USE", "PROHIBITED_USE"),
    "notice": ("NOTICE",),
}
"""Kind of file -> how its name begins, in whatever case."""


TEXT = ("", ".txt", ".md", ".rst", ".html", ".pdf")
"""Endings of papers; ``license.py`` is not one."""


def papers(names: Iterable[str]) -> dict[str, list[str]]:
    """Kind of file -> those of ``names``, files of a folder, that are of that kind."""
    found: dict[str, list[str]] = {kind: [] for kind in PAPERS}
    for name in sorted(names):
        for kind, starts in PAPERS.items():
            plain = PurePosixPath(name).suffix.lower() in TEXT or kind == "agreement"
            if name.upper().startswith(starts) and plain and not name.endswith((".py", ".json")):
                found[kind].append(name)
    return found


OTHER_WEIGHTS = (
    ".bin", ".ckpt", ".data", ".gguf", ".ggml", ".h5", ".keras", ".litertlm", ".mlmodel",
    ".msgpack", ".nemo", ".npy", ".npz", ".onnx", ".onnx_data", ".ot", ".parquet", ".pickle",
    ".pkl", ".pt", ".pth", ".safetensors", ".task", ".tflite",
)  # fmt: skip
"""Endings of files that hold weights or data, in this format or another."""


OTHER_FOLDERS = ("checkpoint-", "coreml", "gguf", "logs", "onnx", "openvino", "original", "runs",
                 "wandb")  # fmt: skip
"""Beginnings of folders with the model for other programs, or with the traces of a training."""


MAX_COMPANION = 64_000_000
"""Bytes beyond which a file is not one of the small files of a model; the largest tokenizers have
half of it."""


UNLISTED = {CARD, MANIFEST, SUMS, SIGNATURE}
"""Files that a conversion writes last: the manifest, and what holds its sha256."""


OURS = {INDEX, *UNLISTED}
"""Files that a conversion writes itself; the source's own are not copied. A signature would be
one of other bytes."""


ELSEWHERE = "adapter_config.json"
"""A file that makes transformers load the model that it names, with an adapter, in place of the
weights beside it: a source that has one is refused, and one in a folder of it is not copied."""


PICTURE = ".png"
"""Ending of the pictures that ``evaluation.plots`` draws."""


def is_companion(name: str, size: int = 0) -> bool:
    """Whether a file of a repo belongs to the model and is not its weights, card or history."""
    path = PurePosixPath(name)
    if any(part.startswith(".") for part in path.parts) or size > MAX_COMPANION:
        return False
    if name in OURS or path.name == ELSEWHERE:
        return False
    if len(path.parts) > 1 and path.parts[0].startswith(OTHER_FOLDERS):
        return False
    return not name.endswith((*OTHER_WEIGHTS, ".bin.index.json", ".safetensors.index.json"))


def is_read(name: str) -> bool:
    """Whether a file of a folder is copied, or read for what it says, rather than for tensors."""
    return is_companion(name) or name in (INDEX, pickled.INDEX, CARD, MANIFEST)
