"""GGUF files, as far as transformers can read them: unpacked once, into the user's cache.

transformers dequantizes the whole model in memory; from there on it is a folder like any other.
"""

import io
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors import SafetensorError

from converter.cache import cache_error, remembered_digest
from converter.errors import CheckpointError, SourceError

SHARD_SIZE = "5GB"


def unpacked(path: Path, cache: Path) -> Path:
    """The folder of a GGUF file's model in bfloat16; it is made on the first call.

    Raises:
        CheckpointError: transformers cannot read it.
        SourceError: a package for GGUF is missing.
        DestinationError: the cache cannot be written.
    """
    folder = cache / "gguf" / remembered_digest(path, cache)
    if not folder.is_dir():
        make_folder(folder, lambda: load(path), SHARD_SIZE)
    return folder


def make_folder(
    folder: Path, loaded: Callable[[], tuple[Any, Any]], shard_size: str, card: str = ""
) -> None:
    """Write a model and its tokenizer to a folder, which appears when it is complete.

    Raises:
        DestinationError: the folder cannot be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{folder.name[:20]}-", dir=folder.parent) as temporary:
            part = Path(temporary) / folder.name
            part.mkdir()
            model, tokenizer = loaded()
            model.save_pretrained(part, max_shard_size=shard_size)
            tokenizer.save_pretrained(part)
            if card:
                (part / "README.md").write_text(card, "utf-8")
            for made in part.iterdir():
                made.chmod(0o644)
            part.rename(folder)
    except (OSError, SafetensorError) as error:
        if not folder.is_dir():  # unless another run has made it meanwhile
            raise cache_error(folder, error) from error


def load(path: Path) -> tuple[Any, Any]:
    """Model in bfloat16 and tokenizer of a GGUF file.

    Raises:
        CheckpointError, SourceError: as ``unpacked``.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise CheckpointError(f"{path.name} is not a GGUF file", hint="fetch the file again")
    try:
        with redirect_stderr(io.StringIO()):  # its progress bar cannot be turned off
            model = AutoModelForCausalLM.from_pretrained(
                path.parent,
                gguf_file=path.name,
                dtype=torch.bfloat16,
                quantization_config=GgufConfig(gguf_file=path.name, dequantize=True),
            )
            return model, AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except ImportError as error:
        raise SourceError(
            f"{path.name} needs packages that are not installed",
            found=str(error).strip().split("\n")[0],
            hint="pip install 'gloss-convert[gguf]'",
        ) from error
    except Exception as error:  # whatever a third party's loader makes of a stranger's file
        raise CheckpointError(
            f"transformers cannot read {path.name}",
            found=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}",
        ) from error
