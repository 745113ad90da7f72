"""Which files make a checkpoint, and which format its weights have."""

import json
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any, Literal, cast

from huggingface_hub import ModelCard, ModelCardData

from converter.errors import CheckpointError
from converter.formats import native, pickled

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CARD = "README.md"
MANIFEST = "gloss_manifest.json"
SUMS = "SHA256SUMS"
SIGNATURE = "model.sig"

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
"""A file that makes transformers load another model, the one that it names, in place of the weights
beside it. It is not copied along with them."""

PICTURE = ".png"
"""Ending of the pictures that ``evaluate.plots`` draws."""

TOKENIZER = {
    "added_tokens.json", "merges.txt", "special_tokens_map.json", "spiece.model",
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt",
}  # fmt: skip


Format = Literal["safetensors", "pickled", "native"]

WEIGHTS = {
    "safetensors": (SINGLE, INDEX),
    "pickled": (pickled.SINGLE, pickled.INDEX),
}
"""Format -> the file that holds the weights, and the index where there are several."""


def choose_format(name: str, names: Iterable[str]) -> Format:
    """The format that the weights of a folder or repo are read in.

    Meta's layout where it is all there is, since it comes without config.json; else safetensors if
    there are any.

    Args:
        name: of the source, for messages.
        names: of its files.

    Raises:
        CheckpointError: two sets of weights in one format, an index without its files, or nothing
            that can be read.
    """
    known = list(names)
    if "adapter_config.json" in known and "config.json" not in known:
        raise CheckpointError(
            f"{name} is an adapter, not a model", hint="give the model that it belongs to"
        )
    if native.is_native(known):
        return "native"
    for kind, (single, index) in WEIGHTS.items():
        if index in known and single in known:
            raise CheckpointError(
                f"{name} has two sets of weights: {single} and {index}",
                hint="loaders differ in which they take; remove one",
            )
        if index in known or single in known:
            return cast(Format, kind)
    others = sorted(n for n in known if n.endswith(OTHER_WEIGHTS))
    stray = bool(others) and all(n.endswith(".safetensors") for n in others)
    gguf = [n for n in others if n.endswith(".gguf")]
    raise CheckpointError(
        f"{name} has no {INDEX}" if stray else f"{name} has no weights that can be read",
        expected=f"{SINGLE}, {INDEX}, {pickled.SINGLE}, {pickled.INDEX}, or consolidated.*.pth "
        "with params.json",
        found=", ".join(others[:5]) or "no weights at all",
        hint="get the index file, too"
        if stray
        else f"give the file {gguf[0]} itself as SOURCE"
        if gguf
        else "use a checkpoint in one of these formats",
    )


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


def drawn_before(folder: Path) -> set[str]:
    """The pictures that an earlier conversion drew into a folder, as its own manifest says.

    They show that edit. None if there is no manifest, or one that cannot be made out.
    """
    try:
        manifest = read_json(folder / MANIFEST)
        made = manifest["files"].keys() - manifest["source"]["files"].keys()
    except (CheckpointError, KeyError, TypeError, AttributeError):
        return set()
    return {name for name in made if name.endswith(PICTURE)}


def read_index(path: Path) -> dict[str, str]:
    """Tensor name -> shard file name, as an index says.

    Raises:
        CheckpointError: there is none, or a shard is not a plain file name.
    """
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path.name} has no weight_map", hint="fetch the file again")
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or shard in ("", ".", ".."):
            raise CheckpointError(
                f"{path.name} places tensor {tensor} outside the folder",
                expected="a plain file name",
                found=repr(shard),
            )
    return weight_map


def read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON object from a file.

    Raises:
        CheckpointError: it is missing, unreadable, or not a JSON object.
    """
    try:
        data = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name} cannot be read", found=str(error)) from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path.name} is not a JSON object", found=type(data).__name__)
    return data


def read_card(path: Path) -> ModelCardData:
    """The front matter of a model card; empty when there is none or it is malformed."""
    if not path.is_file():
        return ModelCardData()
    try:
        data = ModelCard.load(path, ignore_metadata_errors=True).data
    except (OSError, ValueError, TypeError):
        return ModelCardData()
    return data if isinstance(data, ModelCardData) else ModelCardData()
