"""GGUF files, as far as transformers can read them: unpacked once, into the user's cache.

transformers dequantizes the whole model in memory; from there on it is a folder like any other.
"""

import io
import json
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors import SafetensorError

from converter.checkpoints.formats.gguf_header import check_header
from converter.errors import CheckpointError, SourceError
from converter.runtime.cache import (
    cache_error,
    cache_folder,
    discard_stale,
    flush,
    remembered_digest,
    replacing,
)

SHARD_SIZE = "5GB"

VERSION = 1
"""Of what is unpacked; to be raised when it changes."""


def unpacked(path: Path) -> Path:
    """The folder of a GGUF file's model in bfloat16; it is made on the first call.

    Beside it are the digests of its files, as they were made. If they are not those of the files
    any more, it is made again.

    Raises:
        CheckpointError: transformers cannot read it, or not all of it.
        SourceError: a package for GGUF is missing.
        DestinationError: the cache cannot be written.
    """
    made_by = f"{VERSION}-{version('transformers')}"
    folder = cache_folder() / "gguf" / f"{remembered_digest(path)}-{made_by}"
    known = folder.with_suffix(".json")
    if not folder.is_dir() or _digests(folder) != _read_digests(known):
        shutil.rmtree(folder, ignore_errors=True)
        make_folder(folder, lambda: load(path), SHARD_SIZE)
        with replacing(known) as part:
            part.write_text(json.dumps(_digests(folder)))
    return folder


def _digests(folder: Path) -> dict[str, str]:
    return {path.name: remembered_digest(path) for path in sorted(folder.iterdir())}


def _read_digests(path: Path) -> object:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def make_folder(
    folder: Path, loaded: Callable[[], tuple[Any, Any]], shard_size: str, card: str = ""
) -> None:
    """Write a model and its tokenizer to a folder, which appears when it is complete.

    Raises:
        DestinationError: the folder cannot be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{folder.name[:20]}-"
        discard_stale(folder.parent, prefix)
        with TemporaryDirectory(prefix=prefix, dir=folder.parent) as temporary:
            part = Path(temporary) / folder.name
            part.mkdir()
            model, tokenizer = loaded()
            model.save_pretrained(part, max_shard_size=shard_size)
            tokenizer.save_pretrained(part)
            if card:
                (part / "README.md").write_text(card, "utf-8")
            for made in part.iterdir():
                made.chmod(0o644)
            flush(part)
            part.rename(folder)
    except (OSError, SafetensorError) as error:
        if not folder.is_dir():  # unless another run has made it meanwhile
            raise cache_error(folder, error) from error


def load(path: Path) -> tuple[Any, Any]:
    """Model in bfloat16 and tokenizer of a GGUF file.

    It is read from a folder of its own: of what lies beside it, transformers would take an adapter,
    or ask whether to run code.

    Raises:
        CheckpointError, SourceError: as ``unpacked``.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    check_header(path)
    try:
        # its progress bar cannot be turned off
        with TemporaryDirectory() as alone, redirect_stderr(io.StringIO()):
            (Path(alone) / path.name).symlink_to(path.resolve())
            _check_size(path, Path(alone))
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                alone,
                gguf_file=path.name,
                local_files_only=True,
                trust_remote_code=False,
                dtype=torch.bfloat16,
                quantization_config=GgufConfig(gguf_file=path.name, dequantize=True),
                output_loading_info=True,
            )
            tokenizer = AutoTokenizer.from_pretrained(alone, gguf_file=path.name)
            # it would be saved, so that HF_HUB_OFFLINE would make another checkpoint of one file
            tokenizer.init_kwargs["local_files_only"] = False
    except CheckpointError:
        raise
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
    model, info = loaded
    _check_complete(path, model, info)
    return model, tokenizer


BITS = 1.5
"""Per weight, of the smallest quantization that GGUF has; less cannot be the whole model."""


def _check_size(path: Path, folder: Path) -> None:
    """Refuse a header that asks for a larger model than the file can hold: it would be made first.

    Args:
        path: of the file.
        folder: with a link to it.

    Raises:
        CheckpointError: it does.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(
        folder, gguf_file=path.name, local_files_only=True, trust_remote_code=False
    )
    with torch.device("meta"):  # modules without numbers
        model: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, trust_remote_code=False
        )
    named, size = sum(p.numel() for p in model.parameters()), path.stat().st_size
    if named * BITS > 8 * size:
        raise CheckpointError(
            f"{path.name} does not hold the model that it names",
            expected=f"{named:,} weights",
            found=f"{size:,} bytes",
            hint="fetch the file again; of a file in parts, join them first",
        )


def _check_complete(path: Path, model: Any, info: dict[str, Any]) -> None:
    """transformers fills what is missing with random numbers, and leaves out what is too much."""
    from gguf import GGUFReader

    for what in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if names := sorted(map(str, info[what])):
            raise CheckpointError(
                f"{path.name} does not hold the model that it names",
                found=f"{len(names)} {what.replace('_', ' ')}, the first {names[0]}",
                hint="fetch the file again; of a file in parts, join them first",
            )
    parts = (str(tensor.name).split(".") for tensor in GGUFReader(path).tensors)
    blocks = {int(part[1]) for part in parts if part[0] == "blk" and part[1].isdigit()}
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    if blocks != set(range(layers)):
        raise CheckpointError(
            f"{path.name} has other blocks than its header says",
            expected=f"blk.0 to blk.{layers - 1}", found=f"{len(blocks)} of them",
        )  # fmt: skip
