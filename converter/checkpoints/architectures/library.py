"""Use transformers to build models without weights. No other module of this package calls it.

- ``AutoConfig`` and the auto classes: which class a config is of; see ``known_models``, too.
- A class built on the meta device shows its modules and parameters and takes no memory.
- ``conversion_mapping.get_model_conversion_mapping`` and ``core_model_loading.rename_source_key``:
  which weight of a model a tensor of a checkpoint makes; ``revert_weight_conversion``: what the
  weights of a model are called in a checkpoint, and how they are stored there.
- ``from_pretrained(None, config=..., state_dict=...)`` loads tensors that are in no file.

``tests/test_doors.py`` fails where another version of transformers does otherwise.
"""

import copy
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_NO_CHOICE = ("quantization_config", "compression_config", "attn_implementation",
              "_attn_implementation", "experts_implementation", "_experts_implementation",
              "num_labels", "id2label", "label2id", "dtype", "torch_dtype")  # fmt: skip
"""Keys of a config about storage, running or classifiers, which do not affect the structure of a
model that continues text.
"""


@dataclass(frozen=True, slots=True)
class MetaTensor:
    """A tensor that transformers loads onto the meta device."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    def __getitem__(self, place: Any) -> "MetaTensor":
        return self

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Tensor:
        """It holds no data on any device."""
        return torch.empty(self.shape, dtype=dtype or self.dtype, device="meta")


def read_config(config: Mapping[str, Any], folder: Path | None, trust_remote_code: bool) -> Any:
    """The config object of a parsed ``config.json``, without its keys about running.

    Args:
        folder: of the file; code of its own is loaded from there, if it is trusted.

    Raises the exceptions of transformers.
    """
    from transformers import AutoConfig

    plain = _without(config, _NO_CHOICE)
    with quietly():
        if trust_remote_code and folder is not None and "auto_map" in config:
            found: Any = AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=True
            )
            return found
        plain.pop("auto_map", None)
        return AutoConfig.for_model(plain.pop("model_type"), **plain)


def _without(value: Any, keys: Iterable[str]) -> Any:
    if isinstance(value, list):
        return [_without(item, keys) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"__float__"}:  # transformers' spelling of numbers that JSON lacks
        return float(value["__float__"])
    return {k: _without(v, keys) for k, v in value.items() if k not in keys}


def text_config(config: Any) -> Any:
    """The config of the language model: the config itself, or a part of it."""
    found = config.get_text_config(decoder=True)
    return config if type(found) is type(config) else found


def own_config(kind: Any, config: Any) -> Any:
    """The config from which an auto class builds a class: the config itself, or the language
    model's, if the config is a wrapper's and the class is that of its language model.
    """
    text = (getattr(config, "sub_configs", None) or {}).get("text_config")
    of_text = text is not None and getattr(kind, "config_class", None) is text
    return config.get_text_config() if of_text else config


def changed(config: Any, key: str, value: Any) -> Any:
    """A copy of a config with another value in the language model's part of it."""
    config = copy.deepcopy(config)
    setattr(text_config(config), key, value)
    return config


def patch(config: Any, key: str, value: Any) -> dict[str, Any]:
    """The same as a merge patch of ``config.json``."""
    text = text_config(config)
    if text is config:
        return {key: value}
    for name in getattr(config, "sub_configs", None) or {}:
        part = getattr(config, name, None)
        if part is not None and text_config(part) is text:
            return {name: patch(part, key, value)}
    return {key: value}


def run_experts_plainly(config: Any) -> None:
    """Make experts compute in turn, in any dtype and of any size."""
    config._experts_implementation = "eager"


def class_of(config: Any, auto_class: str, trust_remote_code: bool = False) -> type | None:
    """The class that an auto class would load a model with, or None if it would not."""
    import transformers

    auto = getattr(transformers, auto_class)
    remote = getattr(config, "auto_map", {}) or {}
    if trust_remote_code and auto_class in remote:
        with torch.device("meta"), quietly():
            return type(auto.from_config(copy.deepcopy(config), trust_remote_code=True))
    found = auto._model_mapping.get(type(config), None)
    kinds: list[type | None] = list(found) if isinstance(found, (list, tuple)) else [found]
    said = getattr(config, "architectures", None)
    named = said if isinstance(said, (list, tuple)) else ()
    return next((kind for kind in kinds if kind and kind.__name__ in named), kinds[0])


def is_model(module: nn.Module) -> bool:
    """Whether a module is a model of transformers, and not a part of one."""
    from transformers import PreTrainedModel

    return isinstance(module, PreTrainedModel)


def on_meta(kind: Any, config: Any) -> Any:
    """A model of a class without memory for its weights. Raises the exceptions of transformers."""
    with torch.device("meta"), quietly():
        return kind._from_config(copy.deepcopy(own_config(kind, config))).eval()


def on_disk(model: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a model as ``save_pretrained`` writes them: their names, and their values."""
    from transformers.core_model_loading import revert_weight_conversion

    written: dict[str, Tensor] = revert_weight_conversion(model, dict(state))
    return written


def load(
    kind: Any, config: Any, tensors: Mapping[str, Tensor | MetaTensor], dtype: torch.dtype
) -> Any:
    """A model with the tensors of a checkpoint, as ``from_pretrained`` makes it."""
    with quietly():
        model, info = kind.from_pretrained(
            None, config=copy.deepcopy(own_config(kind, config)), state_dict=dict(tensors),
            dtype=dtype, output_loading_info=True,
        )  # fmt: skip
    if wrong := [*info["missing_keys"], *map(str, info["mismatched_keys"])]:
        raise ValueError(f"transformers does not find {sorted(wrong)[0]} among what it writes")
    return model.eval().requires_grad_(False)


class Renaming:
    """Tensor of a checkpoint -> the weight of the model that it makes."""

    def __init__(self, model: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        self.rules: Any = get_model_conversion_mapping(model)
        self._prefix, self._state = model.base_model_prefix, model.state_dict(keep_vars=True)
        self._renamings = [rule for rule in self.rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in self.rules if isinstance(rule, WeightConverter)]

    def weight_of(self, name: str) -> str | None:
        """The weight of the model that a tensor of the checkpoint becomes, or a part of it.

        None if the model has no use for it. A tensor that becomes several weights has the first.
        """
        from transformers.core_model_loading import rename_source_key

        model = self._prefix, self._state
        key, _ = rename_source_key(name, self._renamings, self._converters, *model)
        if key not in self._state and name in self._state:
            key, _ = rename_source_key(name, [], [], *model)
        return key if key in self._state else None


@contextmanager
def quietly() -> Iterator[None]:
    """A context without network, without transformers' output, and without effect on the global
    random state.
    """
    from huggingface_hub import constants
    from transformers.utils import logging as transformers_logging

    level, shown = (
        transformers_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
    )
    offline = constants.HF_HUB_OFFLINE
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    constants.HF_HUB_OFFLINE = True
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        constants.HF_HUB_OFFLINE = offline
        transformers_logging.set_verbosity(level)
        if shown:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
