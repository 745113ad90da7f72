"""The undocumented parts of transformers' loader.

- ``from_pretrained(None, config=..., state_dict=...)`` takes for a tensor whatever can be sliced,
  and slices it when its turn comes: ``LazyTensor``, ``MetaTensor``.
- ``core_model_loading.convert_and_load_state_dict_in_model`` with a ``LoadStateDictConfig`` loads
  some of a model's weights, in one thread if HF_DEACTIVATE_ASYNC_LOAD is set.
- ``_get_dtype_plan`` and ``base_model_prefix`` of a model.
- ``_attn_implementation`` of a config, which sets that of its parts, too; None for the default.

``checkpoints.architectures.library`` builds models without weights. ``tests/test_doors.py`` fails
where another version of transformers does otherwise.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from converter.checkpoints.architectures.library import MetaTensor, Renaming
from converter.checkpoints.formats.virtual import VirtualTensor
from converter.errors import OptionError
from converter.runtime import progress


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """A tensor that is made when transformers slices it to load it."""

    tensor: VirtualTensor

    def __getitem__(self, place: Any) -> Tensor:
        return self.tensor.make()[place]


@dataclass(frozen=True, slots=True)
class Loading:
    """How a model is loaded.

    Attributes:
        attention: how it computes attention; ``auto`` for the config's way, if that is installed.
        trust_remote_code: whether code that comes with the checkpoint may be run.
        spread: let accelerate put its parts on all GPUs, then in memory, then on disk.
    """

    attention: str = "auto"
    trust_remote_code: bool = False
    spread: bool = False


def from_files(
    folder: Path, auto_class: str, how: Loading, device: str, dtype: torch.dtype, **settings: Any
) -> Any:
    """``from_pretrained`` of a model whose weights are in files of the folder. No network.

    Raises OptionError if the requested attention is not installed.
    """
    import transformers

    return getattr(transformers, auto_class).from_pretrained(
        folder,
        config=_config(folder, how, device, dtype),
        dtype=dtype,
        local_files_only=True,
        trust_remote_code=how.trust_remote_code,
        **settings,
    )


def from_tensors(
    folder: Path,
    tensors: Mapping[str, LazyTensor | MetaTensor],
    auto_class: str,
    how: Loading,
    device: str,
    dtype: torch.dtype,
    **settings: Any,
) -> Any:
    """The same for a model whose tensors are not in files of the folder."""
    import transformers

    config = _config(folder, how, device, dtype)
    for part in (config, config.get_text_config(decoder=True)):
        for key in ("quantization_config", "compression_config"):
            if hasattr(part, key):  # the made tensors are not quantized
                delattr(part, key)
    auto = getattr(transformers, auto_class)
    with torch.device("meta"):
        kind = type(auto.from_config(config, trust_remote_code=how.trust_remote_code))
    return kind.from_pretrained(None, config=config, state_dict=tensors, dtype=dtype, **settings)


def _config(folder: Path, how: Loading, device: str, dtype: torch.dtype) -> Any:
    """The config of a folder, with an installed attention.

    Configs often name the attention of the training: FlashAttention, or code that transformers
    would fetch from the Hub. Here, an attention beyond PyTorch's is used only if it was asked for,
    or if the config names it and it is installed. Nothing is ever fetched for it.
    """
    from transformers import AutoConfig
    from transformers.utils import is_flash_attn_2_available  # type: ignore[attr-defined]

    config: Any = AutoConfig.from_pretrained(
        folder, local_files_only=True, trust_remote_code=how.trust_remote_code
    )
    there, flash = {"eager", "sdpa", None}, "flash_attention_2"
    halved = dtype in (torch.bfloat16, torch.float16)
    if halved and device.startswith("cuda") and is_flash_attn_2_available():
        there.add(flash)
    if how.attention == flash and flash not in there:
        raise OptionError(
            f"--attention {flash}",
            expected="a GPU, --forward-dtype bfloat16 or float16, and the package flash-attn",
            found=f"{device}, {str(dtype).removeprefix('torch.')}"
            + ("" if is_flash_attn_2_available() else ", no such package"),
            hint="give --attention auto",
        )
    parts = [config, *(getattr(config, name, None) for name in config.sub_configs)]
    said = {getattr(part, "_attn_implementation", None) for part in parts}
    if how.attention != "auto":
        config._attn_implementation = how.attention
    elif missing := said - there:
        names = ", ".join(sorted(map(str, missing)))
        progress.note(f"  attention: not {names}, as config.json says, but what PyTorch has")
        config._attn_implementation = None
    return config


class PartLoader:
    """Loads the weights of a model part by part, by transformers' rules.

    At the beginning all weights of ``module`` are on the meta device.
    """

    def __init__(self, module: Any, dtype: torch.dtype, device: str) -> None:
        from transformers.modeling_utils import LoadStateDictConfig

        self._module, self._renaming = module, Renaming(module)
        self._settings = LoadStateDictConfig(
            dtype=dtype,
            dtype_plan=module._get_dtype_plan(dtype),
            weight_mapping=self._renaming.rules,
            device_map={"": device},
        )

    def weight_of(self, name: str) -> str | None:
        """See ``Renaming``."""
        return self._renaming.weight_of(name)

    def load(self, tensors: dict[str, Any]) -> list[str]:
        """Load the weights that are made from tensors of the checkpoint, in turn.

        Args:
            tensors: name -> ``LazyTensor`` or tensor; transformers may take them out.

        Returns:
            transformers' messages about weights that it could not make.
        """
        from transformers.core_model_loading import convert_and_load_state_dict_in_model

        with _one_by_one():
            info, _ = convert_and_load_state_dict_in_model(self._module, tensors, self._settings)
        return [*info.conversion_errors.values(), *map(str, info.mismatched_keys)]


@contextmanager
def _one_by_one() -> Iterator[None]:
    """Make transformers load tensors in turn, without a progress bar for each part.

    With threads it would read all tensors of a mixture's layer before it fuses the first.
    """
    from transformers.utils import logging

    name, shown = "HF_DEACTIVATE_ASYNC_LOAD", logging.is_progress_bar_enabled()
    before = os.environ.get(name)
    os.environ[name] = "1"
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
