"""Loading a model and its tokenizer with transformers."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from converter.checkpoints.formats.virtual import Shards, VirtualTensor
from converter.errors import CheckpointError, ConverterError, SourceError
from converter.models.transformers_loader import (
    LazyTensor,
    MetaTensor,
    auto_class_of,
    from_tensors,
)
from converter.runtime.memory import free_memory


def load_model(
    folder: Path,
    dtype: torch.dtype,
    device: str,
    needed: int,
    *,
    spread: bool = False,
    auto_class: str = "AutoModelForCausalLM",
    trust_remote_code: bool = False,
    recipes: Shards | None = None,
) -> nn.Module:
    """Load a causal language model for a forward pass.

    Args:
        folder: a checkpoint.
        dtype: of the weights in memory.
        device: where to.
        needed: bytes of the weights in ``dtype``.
        spread: let accelerate put its parts on all GPUs, then in memory, then on disk.
        auto_class: of transformers, that loads it.
        trust_remote_code: whether code that comes with the checkpoint may be run.
        recipes: make the weights, if they are not safetensors in the folder.

    Raises:
        SourceError: it does not fit in memory, or transformers cannot load it.
        CheckpointError: a tensor of the model is not in the checkpoint.
    """
    free = free_memory(device)
    if needed > free and not spread:
        raise SourceError(
            f"the model does not fit in the memory of the {device} for the forward pass",
            expected=f"{needed / 1e9:.1f} GB or more available",
            found=f"{free / 1e9:.1f} GB",
            hint="give --forward streamed, or --device map",
        )
    settings = {"dtype": dtype, "device_map": "auto" if spread else None}
    if recipes is None:
        local = {"local_files_only": True, "trust_remote_code": trust_remote_code}
        model = _loaded(
            partial(auto_class_of(auto_class).from_pretrained, folder, **local, **settings)
        )
    else:
        made = {recipe.name: LazyTensor(recipe) for part in recipes.values() for recipe in part}
        model = _loaded(
            partial(from_tensors, folder, made, auto_class, trust_remote_code, **settings)
        )
    try:
        return model if spread else model.to(device)
    except torch.OutOfMemoryError as error:
        raise _unusable("model", error) from error


def load_skeleton(
    folder: Path,
    dtype: torch.dtype,
    recipes: Iterable[VirtualTensor],
    *,
    auto_class: str = "AutoModelForCausalLM",
    trust_remote_code: bool = False,
) -> nn.Module:
    """The same model without its weights, which are on the meta device; no weight is read.

    transformers loads it as it would load the model, so what is tied is tied, what is renamed and
    fused by its rules would be, and buffers that are no weights have their values.

    Args:
        folder: holds the config.
        dtype: of the weights.
        recipes: of all tensors of the checkpoint; they are not made.
        auto_class, trust_remote_code: as above.

    Raises:
        SourceError, CheckpointError: as above.
    """
    shapes = {recipe.name: MetaTensor(recipe.dtype, recipe.shape) for recipe in recipes}
    return _loaded(
        partial(from_tensors, folder, shapes, auto_class, trust_remote_code, dtype=dtype)
    )


def _loaded(load: Callable[..., Any]) -> nn.Module:
    """A model of ``from_pretrained``, in eval mode and with every tensor that it needs."""
    try:
        model, info = cast(tuple[nn.Module, dict[str, Any]], load(output_loading_info=True))
    except ConverterError:
        raise
    except Exception as error:  # whatever a third party's loader makes of a stranger's files
        raise _unusable("model", error) from error
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(
            f"the checkpoint lacks {len(missing)} tensors that the model needs",
            found=f"no {missing[0]}",
            hint="transformers would fill them with random numbers; get an intact copy",
        )
    return model.eval().requires_grad_(False)


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """Load a fast tokenizer; code that comes with it is run only if it is trusted.

    Raises:
        SourceError: transformers cannot load it, or it cannot map tokens to characters.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # as above
        raise _unusable("tokenizer", error) from error
    if not tokenizer.is_fast:
        raise SourceError("the tokenizer cannot map tokens to characters", expected="a fast one")
    return tokenizer


def _unusable(part: str, error: Exception) -> SourceError:
    return SourceError(
        f"transformers cannot load the {part}",
        found=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}",
        hint="check that the source loads with from_pretrained",
    )
