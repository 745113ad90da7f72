"""The model of a source, in memory as a whole or to be streamed."""

from typing import Any

import torch

from converter.checkpoints.formats.virtual import VirtualTensor
from converter.checkpoints.plan import Plan
from converter.checkpoints.safetensors.header import FLOATS
from converter.checkpoints.source import Source
from converter.errors import SourceError
from converter.models.batching import LOGITS_BYTES
from converter.models.dequantized import dequantized, stored
from converter.models.loading import load_model, load_skeleton
from converter.models.resident import LanguageModel
from converter.models.streamed import StreamedModel
from converter.models.streamed_weights import Weights
from converter.runtime.cache import cache_folder
from converter.runtime.memory import free_memory


def load_language_model(
    source: Source,
    plan: Plan,
    tokenizer: Any,
    dtype: torch.dtype,
    device: str,
    *,
    spread: bool = False,
    trust_remote_code: bool = False,
) -> LanguageModel:
    """The model of a source, as it is; see ``loading.load_model``."""
    source.fetch()
    module = load_model(
        source.folder,
        dtype,
        device,
        plan.num_parameters * dtype.itemsize,
        spread=spread,
        auto_class=plan.architecture.auto_class,
        trust_remote_code=trust_remote_code,
        recipes=dequantized(source, plan, plan.scheme) if plan.scheme else source.virtual_shards,
    )
    plan.architecture.check_modules(module)
    return LanguageModel(module, tokenizer, plan.architecture, device)


HIDDEN_SHARE, LEAST_SHARE = 2, 32
"""One in so many bytes is for hidden states: of the memory that all else leaves; of all, at least.
"""


def stream_language_model(
    source: Source,
    plan: Plan,
    tokenizer: Any,
    dtype: torch.dtype,
    device: str,
    budget: int,
    *,
    trust_remote_code: bool = False,
) -> StreamedModel:
    """The same model, of which one layer at a time will be in memory. No weight is read yet.

    Args:
        budget: bytes of memory to plan with. Hidden states that do not fit in their share of it go
            to a file in the cache.

    Raises:
        SourceError: not even a layer fits, or transformers cannot make the model.
        CheckpointError: a tensor of the model is not in the checkpoint.
    """
    recipes = recipes_of(source, plan)
    architecture, layers = plan.architecture, plan.dimensions.num_hidden_layers
    module = load_skeleton(
        source.folder,
        dtype,
        recipes.values(),
        auto_class=architecture.auto_class,
        trust_remote_code=trust_remote_code,
    )
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
    held = max((budget - others) // HIDDEN_SHARE, budget // LEAST_SHARE)
    return StreamedModel(weights, tokenizer, architecture, blocks, device, held, cache_folder())


def recipes_of(source: Source, plan: Plan) -> dict[str, VirtualTensor]:
    """How to make every tensor of a source for a forward pass."""
    shards = dequantized(source, plan, plan.scheme) if plan.scheme else source.virtual_shards
    if shards is not None:
        return {recipe.name: recipe for made in shards.values() for recipe in made}
    return {
        info.name: stored(source, shard, info)
        for shard, header in plan.headers.items()
        for info in header.tensors.values()
    }


def stored_dtype(plan: Plan) -> torch.dtype:
    """That of the down-projections; bfloat16 where they are stored in less."""
    return FLOATS.get(plan.targets[0].info.dtype, torch.bfloat16)
