"""Write configs that version 4 of transformers reads, too.

Version 5 moved the positions of a model to ``rope_parameters`` and its dtype to ``dtype``.
Version 4, and readers that follow it, ignore both and silently run the model with wrong positions.
A config that this program generates has both forms. A source's own config is copied unchanged.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_LOCAL, _GLOBAL = "sliding_attention", "full_attention"
"""Layers with positions of their own in models such as Gemma 3."""

_OF_THIS_RUN = ("backend", "is_local", "local_files_only")
"""Keys of a tokenizer about how it was loaded, which readers do not need."""


def rope_keys(parameters: Mapping[str, Any] | None) -> dict[str, Any]:
    """The keys of version 4 with the meaning of ``rope_parameters``; empty without these."""
    if not parameters:
        return {}
    whole = parameters.get(_GLOBAL, parameters)
    keys = {"rope_theta": whole["rope_theta"]}
    moved = ("rope_theta", "partial_rotary_factor")
    scaling = {key: value for key, value in whole.items() if key not in moved}
    is_plain = scaling == {"rope_type": "default"}
    keys["rope_scaling"] = None if is_plain else scaling | {"type": scaling["rope_type"]}
    if "partial_rotary_factor" in whole:
        keys["partial_rotary_factor"] = whole["partial_rotary_factor"]
    if _LOCAL in parameters:
        keys["rope_local_base_freq"] = parameters[_LOCAL]["rope_theta"]
    return keys


def complete(folder: Path, tokenizer: Any) -> None:
    """Make a folder that version 5 has saved readable for version 4."""
    path = folder / "config.json"
    config = json.loads(path.read_text("utf-8"))
    config["torch_dtype"] = config["dtype"]
    _write(path, config | rope_keys(config.get("rope_parameters")))
    path = folder / "tokenizer_config.json"
    _write(path, _tokenizer(json.loads(path.read_text("utf-8")), tokenizer))


def _tokenizer(saved: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """A tokenizer's config for both versions.

    ``PreTrainedTokenizerFast`` takes ``tokenizer.json`` as it is in both; the classes of models
    build parts of it anew, each version in its own way. Two keys have other defaults in version 4.
    """
    kept = {key: value for key, value in saved.items() if key not in _OF_THIS_RUN}
    kept |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": tokenizer.clean_up_tokenization_spaces,
        "model_input_names": list(tokenizer.model_input_names),
    }
    if "extra_special_tokens" in kept:  # in version 4, a table of tokens that have names
        kept["additional_special_tokens"] = kept.pop("extra_special_tokens")
    if tokenizer.chat_template:  # old versions know no chat_template.jinja
        kept["chat_template"] = tokenizer.chat_template
    return kept


def _write(path: Path, data: Mapping[str, Any]) -> None:
    """Write JSON in the style of transformers."""
    text = json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False)
    path.write_text(text + "\n", "utf-8")
