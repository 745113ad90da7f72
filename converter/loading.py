"""Loading a model and its tokenizer with transformers."""

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from converter.errors import CheckpointError, ConverterError, SourceError
from converter.formats import Recipe, Shards


class Made:
    """A tensor that is made when transformers loads it, which it does by slicing."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def __getitem__(self, place: Any) -> Tensor:
        return self.recipe.make()[place]


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
    import transformers

    free = available_memory() if device == "cpu" else torch.cuda.mem_get_info(device)[0]
    if free is not None and needed > free and not spread:
        raise SourceError(
            f"the model does not fit in the memory of the {device} for the forward pass",
            expected=f"{needed / 1e9:.1f} GB or more available",
            found=f"{free / 1e9:.1f} GB",
            hint="give --device map, or --activations with a file from a larger machine",
        )
    auto = getattr(transformers, auto_class)
    local = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    settings: dict[str, Any] = {
        "dtype": dtype,
        "output_loading_info": True,
        "device_map": "auto" if spread else None,
    }
    try:
        if recipes is None:
            loaded = auto.from_pretrained(folder, **local, **settings)
        else:
            config = transformers.AutoConfig.from_pretrained(folder, **local)
            for part in (config, config.get_text_config(decoder=True)):
                if hasattr(part, "quantization_config"):  # what is made is not quantized
                    del part.quantization_config
            with torch.device("meta"):
                kind = type(auto.from_config(config, trust_remote_code=trust_remote_code))
            made = {recipe.name: Made(recipe) for part in recipes.values() for recipe in part}
            loaded = kind.from_pretrained(None, config=config, state_dict=made, **settings)
    except ConverterError:
        raise
    except Exception as error:  # whatever a third party's loader makes of a stranger's files
        raise _unusable("model", error) from error
    model, info = cast(tuple[nn.Module, dict[str, Any]], loaded)
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(
            f"the checkpoint lacks {len(missing)} tensors that the model needs",
            found=f"no {missing[0]}",
            hint="transformers would fill them with random numbers; get an intact copy",
        )
    try:
        model = model.eval().requires_grad_(False)
        return model if spread else model.to(device)
    except torch.OutOfMemoryError as error:
        raise _unusable("model", error) from error


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


def available_memory() -> int | None:
    """Bytes that can be used without swapping, or None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None
