"""Load the model of a source and its tokenizer by transformers: whole in memory, or streamed."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from converter.checkpoints.architectures.library import MetaTensor, read_config
from converter.checkpoints.formats.virtual import VirtualTensor
from converter.checkpoints.patch import merge
from converter.checkpoints.plan import Plan
from converter.checkpoints.safetensors.header import DTYPES, TensorInfo
from converter.checkpoints.safetensors.rewrite import read_raw
from converter.checkpoints.source import Source
from converter.checkpoints.weights import FP8, Scales, Scheme, scales_of
from converter.edits.storage import dequantize
from converter.errors import CheckpointError, ConverterError, SourceError
from converter.models.batching import LOGITS_BYTES, prepare
from converter.models.hooks import memory_errors
from converter.models.resident import LanguageModel
from converter.models.streamed import StreamedModel
from converter.models.streamed_memory import Weights
from converter.models.transformers_loader import (
    LazyTensor,
    Loading,
    from_files,
    from_tensors,
)
from converter.runtime.cache import cache_folder
from converter.runtime.memory import free_memory

_HIDDEN_SHARE, _LEAST_SHARE = 2, 32
"""Share of memory for hidden states (one byte in this many): of the remaining memory; of all, at
least.
"""


def load_language_model(
    source: Source,
    plan: Plan,
    tokenizer: Any,
    dtype: torch.dtype,
    device: str,
    how: Loading = Loading(),
) -> LanguageModel:
    """The unedited model of a source; see ``load_model``."""
    source.fetch()
    module = load_model(
        source.folder,
        dtype,
        device,
        plan.num_parameters * dtype.itemsize,
        auto_class=plan.architecture.auto_class,
        recipes=_made(source, plan),
        how=how,
    )
    plan.architecture.check_modules(module)
    return LanguageModel(module, tokenizer, plan.architecture, device)


def load_model(
    folder: Path,
    dtype: torch.dtype,
    device: str,
    needed: int,
    *,
    auto_class: str = "AutoModelForCausalLM",
    recipes: Mapping[str, VirtualTensor] | None = None,
    how: Loading = Loading(),
) -> nn.Module:
    """Load a causal language model for a forward pass.

    Args:
        needed: bytes of the weights in ``dtype``.
        auto_class: the class of transformers that loads it.
        recipes: make the weights, if they are not safetensors in the folder.

    Raises:
        SourceError: it does not fit in memory, or transformers cannot load it.
        CheckpointError: a tensor of the model is not in the checkpoint.
    """
    free = free_memory(device)
    if needed > free and not how.spread:
        raise SourceError(
            f"the model does not fit in the memory of the {device} for the forward pass",
            expected=f"{needed / 1e9:.1f} GB or more available",
            found=f"{free / 1e9:.1f} GB",
            hint="give --forward streamed, or --device map",
        )
    given = (auto_class, how, device, dtype)
    settings = {"device_map": "auto" if how.spread else None}
    with memory_errors("the model", hint="give --forward streamed, or --device map"):
        if recipes is None:
            model = _loaded(from_files, folder, *given, **settings)
        else:
            made = {name: LazyTensor(recipe) for name, recipe in recipes.items()}
            model = _loaded(from_tensors, folder, made, *given, **settings)
        return model if how.spread else model.to(device)


def stream_language_model(
    source: Source,
    plan: Plan,
    tokenizer: Any,
    dtype: torch.dtype,
    device: str,
    budget: int,
    how: Loading = Loading(),
) -> StreamedModel:
    """The same model, prepared for streaming one layer at a time. No weight is read yet.

    transformers loads it as usual, but onto the meta device: its rules for tied, renamed and fused
    weights apply, and buffers that are not weights have their values.

    Args:
        budget: bytes of memory to plan with. Hidden states that do not fit in their share of it go
            to a file in the cache.

    Raises:
        SourceError: not even a layer fits, or transformers cannot make the model.
        CheckpointError: a tensor of the model is not in the checkpoint.
    """
    recipes = _made(source, plan)
    if recipes is None:
        recipes = _all_stored(source, plan)
    architecture, layers = plan.architecture, plan.dimensions.num_hidden_layers
    shapes = {name: MetaTensor(recipe.dtype, recipe.shape) for name, recipe in recipes.items()}
    given = (architecture.auto_class, how, device, dtype)
    module = _loaded(from_tensors, source.folder, shapes, *given)
    architecture.check_modules(module)
    blocks = [architecture.block.format(layer=n) for n in range(layers)]
    weights = Weights(module, recipes, blocks, dtype, device)
    largest = max(weights.nbytes(block) for block in blocks)
    free = budget if device == "cpu" else free_memory(device)
    if largest > free:
        raise SourceError(
            f"not even one layer of the model fits in the memory of the {device}",
            expected=f"{largest / 1e9:.2f} GB or more",
            found=f"{free / 1e9:.2f} GB",
            hint="give --forward-dtype bfloat16, or --activations with a file from elsewhere",
        )
    others = largest + 4 * LOGITS_BYTES + layers * plan.dimensions.hidden_size**2 * 4
    others += max(weights.nbytes(part) for part in weights.parts)
    held = max((budget - others) // _HIDDEN_SHARE, budget // _LEAST_SHARE)
    return StreamedModel(weights, tokenizer, architecture, blocks, device, held, cache_folder())


def load_tokenizer(folder: Path, trust_remote_code: bool = False, config: Any = None) -> Any:
    """Load a fast tokenizer, and configure it; see ``batching.prepare``.

    Its code runs only if it is trusted. A given ``config`` replaces the folder's.

    Raises:
        SourceError: transformers cannot load it, or it cannot map tokens to characters.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code, config=config
        )
    except Exception as error:  # a third party's loader may raise anything on untrusted files
        raise _unusable("tokenizer", error) from error
    if not tokenizer.is_fast:
        raise SourceError("the tokenizer cannot map tokens to characters", expected="a fast one")
    prepare(tokenizer)
    return tokenizer


def check_relabelled(source: Source, patch: Any, trust_remote_code: bool) -> None:
    """Refuse a change of the model type after which transformers would tokenize differently.

    transformers also chooses the tokenizer's class by the type. ``patch`` is that of the config.

    Raises:
        CheckpointError: texts would get other tokens.
    """
    if "model_type" not in patch:
        return
    config = read_config(merge(source.config, patch), None, False)
    given = source.folder, trust_remote_code
    before, after = (load_tokenizer(*given, config=each) for each in (None, config))
    if before.backend_tokenizer.to_str() != after.backend_tokenizer.to_str():
        raise CheckpointError(
            f"the tokenizer of a model that becomes one of type {config.model_type}",
            expected="one that splits text in the same way",
            found=f"a {type(after).__name__} in place of a {type(before).__name__}",
            hint="nothing was written; choose --method gloss, which changes no type",
        )


def _loaded(load: Callable[..., Any], *args: Any, **settings: Any) -> nn.Module:
    """A model of ``from_pretrained``, in eval mode and with every tensor that it needs."""
    try:
        loaded = load(*args, **settings, output_loading_info=True)
    except (ConverterError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # as above
        raise _unusable("model", error) from error
    model, info = cast(tuple[nn.Module, dict[str, Any]], loaded)
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(
            f"the checkpoint lacks {len(missing)} tensors that the model needs",
            found=f"no {missing[0]}",
            hint="transformers would fill them with random numbers; get an intact copy",
        )
    return model.eval().requires_grad_(False)


def _unusable(part: str, error: Exception) -> SourceError:
    return SourceError(
        f"transformers cannot load the {part}",
        found=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}",
        hint="check that the source loads with from_pretrained",
    )


def _made(source: Source, plan: Plan) -> dict[str, VirtualTensor] | None:
    """Recipes for the tensors of a source; None if transformers reads its files by itself.

    It does not if the config names a quantization that the tensors refute: it would quantize the
        weights.
    """
    if plan.scheme is not None:
        return _dequantized(source, plan, plan.scheme)
    if source.virtual_shards is None and not plan.stale:
        return None
    if source.virtual_shards is None:
        return _all_stored(source, plan)
    return {recipe.name: recipe for shard in source.virtual_shards.values() for recipe in shard}


def _dequantized(source: Source, plan: Plan, scheme: Scheme) -> dict[str, VirtualTensor]:
    """Recipes for an FP8 checkpoint as the numbers that it represents, on any machine.

    Weights are in float32, and scales are left out.

    Raises:
        CheckpointError: an FP8 tensor has no scales that fit it.
    """
    places = {
        name: (shard, info)
        for shard, header in plan.headers.items()
        for name, info in header.tensors.items()
    }
    made = {}
    for name, (shard, info) in places.items():
        if name.endswith((*scheme.scales, "input_scale", "activation_scale")):
            continue
        if info.dtype == FP8:
            made[name] = _of_fp8(source, shard, info, scales_of(scheme, info, places))
        elif info.dtype.startswith("F8"):
            raise CheckpointError(
                f"tensor {name} cannot be read as numbers", expected="a float, or FP8 with scales",
                found=info.dtype,
            )  # fmt: skip
        else:
            made[name] = _stored(source, shard, info)
    return made


def _of_fp8(source: Source, shard: str, info: TensorInfo, scales: Scales) -> VirtualTensor:
    def make() -> Tensor:
        stored, factors = source.read(shard, info), source.read(scales.shard, scales.info)
        return dequantize(stored, factors, scales.block)

    return VirtualTensor(info.name, torch.float32, info.shape, make)


def _all_stored(source: Source, plan: Plan) -> dict[str, VirtualTensor]:
    """Recipes for the tensors of a source, unchanged."""
    places = plan.names.tensors.items()
    return {name: _stored(source, shard, info) for name, (shard, info) in places}


def _stored(source: Source, shard: str, info: TensorInfo) -> VirtualTensor:
    """The recipe of an unchanged tensor.

    Raises:
        CheckpointError: PyTorch has no such dtype.
    """
    if info.dtype not in DTYPES:
        raise CheckpointError(
            f"tensor {info.name} cannot be read", expected="a dtype that PyTorch has",
            found=info.dtype,
        )  # fmt: skip

    def make() -> Tensor:
        with source.open(shard) as file:
            return read_raw(file, info)

    return VirtualTensor(info.name, DTYPES[info.dtype], info.shape, make)
