"""Where a checkpoint comes from: a folder, or a Hub repo at a commit, which becomes a folder."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from converter import hub
from converter.cache import remembered_sha256
from converter.demo import REPO_ID as DEMO
from converter.demo import demo_folder
from converter.errors import CheckpointError, SourceError
from converter.header import Header, read_header

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CARD = "README.md"

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

OURS = {CARD, INDEX, "gloss_manifest.json", "SHA256SUMS"}
"""Files that a conversion writes itself; the source's own are not copied."""

TOKENIZER = {
    "added_tokens.json", "merges.txt", "special_tokens_map.json", "spiece.model",
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint to read.

    Attributes:
        name: repo id, or the folder's own name; never a path.
        folder: holds the small files, and after ``fetch`` the shards.
        config: parsed ``config.json``.
        shards: safetensors file names, sorted.
        weight_map: of the index, or None for a single file.
        companions: the other small files that belong to the model, relative to ``folder``.
        repo: where it was downloaded from, or None.
        base: repo id of the model that this is, as far as it is known.
        card: front matter of its model card; empty when it has none.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    shards: tuple[str, ...]
    weight_map: dict[str, str] | None
    companions: tuple[str, ...]
    repo: hub.Repo | None
    base: str | None
    card: ModelCardData

    @property
    def files(self) -> list[Path]:
        """The folder and what is read from it; links in it may lead elsewhere."""
        names = (*self.shards, *self.companions)
        return [self.folder, *(self.folder / name for name in names)]

    def headers(self) -> dict[str, Header]:
        """The header of every shard, from disk, or by range requests while it is only on the Hub.

        Raises:
            CheckpointError: a shard is missing, truncated or malformed.
            SourceError: the Hub cannot be read.
        """
        return {
            name: hub.remote_header(self.repo, name)
            if self.repo and self.repo.sizes and not (self.folder / name).exists()
            else read_header(self.folder / name)
            for name in self.shards
        }

    def fetch(self) -> None:
        """Make sure that the shards are on disk.

        Raises:
            SourceError: the Hub cannot be read, or the disk is too small.
        """
        if self.repo is None:
            return
        missing = [name for name in self.shards if not (self.folder / name).exists()]
        needed = sum(self.repo.sizes.get(name, 0) for name in missing)
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise SourceError(
                f"the disk of the Hugging Face cache is too small for {self.name}",
                expected=f"{needed / 1e9:.1f} GB free",
                found=f"{free / 1e9:.1f} GB",
                hint="set HF_HOME to a larger disk",
            )
        if missing:
            hub.download(self.repo, missing)

    def digests(self, cache: Path) -> dict[str, str]:
        """sha256 of everything a forward pass reads: shards, config and tokenizer files."""
        names = [*self.shards, "config.json", *(n for n in self.companions if n in TOKENIZER)]
        return {name: remembered_sha256(self.folder / name, cache) for name in sorted(set(names))}


def is_companion(name: str, size: int = 0) -> bool:
    """Whether a file of a repo belongs to the model and is not its weights, card or history."""
    path = PurePosixPath(name)
    if any(part.startswith(".") for part in path.parts) or name in OURS or size > MAX_COMPANION:
        return False
    if len(path.parts) > 1 and path.parts[0].startswith(OTHER_FOLDERS):
        return False
    return not name.endswith((*OTHER_WEIGHTS, ".bin.index.json", ".safetensors.index.json"))


def resolve(source: str, cache: Path) -> Source:
    """Find SOURCE and read its small files.

    Args:
        source: a folder, a Hub repo id with an optional ``@revision``, or ``demo``.
        cache: the user's cache folder.

    Raises:
        SourceError: it cannot be reached.
        CheckpointError: it is not a safetensors checkpoint with a config and a tokenizer.
    """
    if not source.strip():
        raise SourceError("SOURCE is empty", expected="a folder, a repo id, or demo")
    folder = demo_folder(cache) if source == "demo" else Path(source)
    try:
        if folder.is_dir():
            return _read(
                folder.resolve().name,
                folder,
                _files(folder),
                None,
                DEMO if source == "demo" else None,
            )
        is_file = folder.exists()
    except OSError as error:
        raise SourceError(f"{source[:80]} cannot be read", found=error.strerror) from error
    if is_file:
        raise SourceError(f"{source} is a file", expected="a folder with a checkpoint or a repo id")
    if not hub.looks_like_repo(source):
        repo_id = source.partition("huggingface.co/")[2].strip("/")
        hint = f"give the repo id {repo_id}" if repo_id else "check the path"
        raise SourceError(f"{source} does not exist", hint=hint)
    repo = hub.resolve("model", source)
    if repo.sizes:
        _choose_shards(repo.repo_id, list(repo.sizes))
        wanted = [
            n for n, size in repo.sizes.items() if is_companion(n, size) or n in (CARD, INDEX)
        ]
        folder, sizes = hub.download(repo, wanted, first=True), repo.sizes
    else:
        folder = hub.download(repo, [])
        sizes = _files(folder)
    return _read(repo.repo_id, folder, sizes, repo, repo.repo_id)


def _files(folder: Path) -> dict[str, int]:
    """Every file below a folder, and its size."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file():
            if not name.isprintable():  # a name that is not UTF-8 is not printable either
                raise CheckpointError(f"the file name {name!r} is not plain text")
            found[name] = path.stat().st_size
    return found


def _choose_shards(name: str, names: list[str]) -> bool:
    """Whether there is an index, for a repo or folder that holds one safetensors checkpoint."""
    if INDEX in names and SINGLE in names:
        raise CheckpointError(
            f"{name} has two sets of weights: {SINGLE} and {INDEX}",
            hint="loaders differ in which they take; remove one",
        )
    if INDEX in names or SINGLE in names:
        return INDEX in names
    others = sorted(n for n in names if n.endswith(OTHER_WEIGHTS))
    stray = bool(others) and all(n.endswith(".safetensors") for n in others)
    raise CheckpointError(
        f"{name} has no safetensors weights" if not stray else f"{name} has no {INDEX}",
        expected=f"{SINGLE} or {INDEX}",
        found=", ".join(others[:5]) or "no weights at all",
        hint="get the index file, too"
        if stray
        else "use a checkpoint in Hugging Face safetensors format",
    )


def _read(
    name: str, folder: Path, sizes: dict[str, int], repo: hub.Repo | None, base: str | None
) -> Source:
    names = list(sizes)
    sharded = _choose_shards(name, names)
    if "config.json" not in names:
        raise CheckpointError(f"{name} has no config.json", hint="give a complete checkpoint")
    if not TOKENIZER.intersection(names):
        raise CheckpointError(
            f"{name} has no tokenizer", expected="tokenizer.json or the like beside the weights"
        )
    weight_map = read_index(folder / INDEX) if sharded else None
    shards = tuple(sorted(set(weight_map.values()))) if weight_map else (SINGLE,)
    for shard in shards:
        if shard not in names:
            raise CheckpointError(f"the index names {shard}", found="no such file")
    return Source(
        name,
        folder,
        read_json(folder / "config.json"),
        shards,
        weight_map,
        tuple(n for n in names if is_companion(n, sizes[n])),
        repo,
        base,
        _read_card(folder / CARD),
    )


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


def _read_card(path: Path) -> ModelCardData:
    """The front matter of a model card; empty when there is none or it is malformed."""
    if not path.is_file():
        return ModelCardData()
    try:
        data = ModelCard.load(path, ignore_metadata_errors=True).data
    except (OSError, ValueError, TypeError):
        return ModelCardData()
    return data if isinstance(data, ModelCardData) else ModelCardData()
