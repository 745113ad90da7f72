"""A checkpoint whose model is code of its own, as repos with ``auto_map`` have it."""

import json
from pathlib import Path

from tests.builders.models import make_checkpoint

_CONFIGURATION = """
from transformers import LlamaConfig

class OwnConfig(LlamaConfig):
    model_type = "own_lm"
"""

_MODELING = """
from transformers import LlamaForCausalLM

from .configuration_own import OwnConfig

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def make_own_code(folder: Path) -> Path:
    """A tiny Llama that says that it is another model, and brings the code."""
    make_checkpoint(folder)
    (folder / "configuration_own.py").write_text(_CONFIGURATION)
    (folder / "modeling_own.py").write_text(_MODELING)
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {
        "model_type": "own_lm", "architectures": ["OwnForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_own.OwnConfig",
            "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
        },
    }  # fmt: skip
    path.write_text(json.dumps(config))
    return folder
