"""Checkpoints with a calibration model beside the model, for a class that runs both.

The class is in ``data/modeling_gloss_fused.txt``, written with the names of Llama's classes; other
families have the same names with another beginning. The checkpoint keeps its tensors and gets those
of the calibration model. Its config becomes ``target`` in a config of another ``model_type``, and
loses its own ``model_type``. So a program that does not run our class finds no model, and cannot
load one model without the other.
"""

from collections.abc import Mapping
from importlib.resources import files
from typing import Any

import torch

from converter.checkpoints.architectures.kind import FUSED
from converter.checkpoints.patch import merge
from converter.checkpoints.plan import Plan
from converter.checkpoints.safetensors.header import FLOATS
from converter.errors import CheckpointError, OptionError

CODE = "modeling_gloss_fused.py"
"""The file with the class of a fused model."""

ALIGNMENT = "model.alignment"
"""A (D, D), which multiplies the calibration model's output."""

CALIBRATION = "model.calibration."
"""Beginning of the names of the calibration model's tensors, instead of ``model.``."""

FAMILIES = ("gemma", "granite", "llama", "mistral", "olmo", "qwen2", "qwen3", "seed_oss", "smollm3")
"""Model types with which the code was tested: with a cache, without, and in beam search."""

_ENDING = "ForCausalLM"


def fused_shapes(plan: Plan, depth: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that a calibration model of ``depth`` layers adds.

    Raises:
        OptionError: the class cannot run two models.
    """
    architecture, depth = plan.architecture, min(depth, plan.dimensions.num_hidden_layers)
    if architecture.model_type not in FAMILIES or plan.scheme or _looks_at_windows(plan.config):
        raise OptionError(
            f"-o form=paper: {architecture.title}",
            expected=f"{', '.join(FAMILIES)}, in 16 bits or more, without a sliding window",
            found=f"{architecture.model_type} in FP8" if plan.scheme
            else f"{architecture.model_type} with a window" if architecture.model_type in FAMILIES
            else architecture.model_type,
            hint="choose -o form=folded",
        )  # fmt: skip
    shapes = {architecture.embedding: architecture.embedding_shape}
    for layer in range(depth):
        named = architecture.layer(layer).shapes.items()
        shapes |= {name.format(layer=layer): tuple(shape) for name, shape in named}
    if architecture.final_norm:
        shapes[architecture.final_norm] = (plan.dimensions.hidden_size,)
    width = plan.dimensions.hidden_size
    created = {calibration_name(name): shape for name, shape in shapes.items()}
    return created | {ALIGNMENT: (width, width)}


def calibration_name(name: str) -> str:
    """The name of a model's tensor in the calibration model."""
    return CALIBRATION + name.removeprefix("model.")


def own_name(created: str) -> str:
    """The reverse."""
    return "model." + created.removeprefix(CALIBRATION)


def fused_dtype(plan: Plan) -> torch.dtype:
    """The dtype of the calibration model's tensors: that of the embedding."""
    _, info = plan.names.require(plan.architecture.embedding)
    return FLOATS.get(info.dtype, torch.bfloat16)


def fused_patch(plan: Plan, depth: int, scale: float) -> dict[str, Any]:
    """The merge patch of ``config.json``; ``target_config`` undoes it.

    Raises:
        OptionError: a merge patch cannot express the config.
    """
    nulls = sorted(key for key, value in plan.config.items() if value is None)
    target = {key: value for key, value in plan.config.items() if key != "model_type"}
    fusion = {"of": plan.config["model_type"], "scale": scale, "depth": depth, "nulls": nulls}
    kept = target_config(merge({}, {"model_type": FUSED, "target": target, "fusion": fusion}))
    if kept != plan.config:  # null within an object: a merge patch cannot express it
        wrong = min(key for key in plan.config if kept.get(key) != plan.config[key])
        raise OptionError(
            f"-o form=paper: config.json: {wrong}", expected="no null within it",
            hint="delete the keys that are null, or choose -o form=folded",
        )  # fmt: skip
    module = CODE.removesuffix(".py")
    named = {"Config": "Config", "ModelForCausalLM": _ENDING}
    dropped: dict[str, Any] = dict.fromkeys(plan.config)
    return dropped | {
        "model_type": FUSED,
        "architectures": [f"GlossFused{_ENDING}"],
        "auto_map": {f"Auto{a}": f"{module}.GlossFused{b}" for a, b in named.items()},
        "fusion": fusion,
        "target": target,
        "num_hidden_layers": "see target",  # a class that reads the top level fails at once
    }


def is_fused(config: Mapping[str, Any]) -> bool:
    """Whether a parsed ``config.json`` is that of a fused model."""
    return config.get("model_type") == FUSED


def target_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the model itself; for a config that is not fused, the same.

    Raises:
        CheckpointError: a fused one is not as ``fused_patch`` makes it.
    """
    if not is_fused(config):
        return dict(config)
    target, fusion = config.get("target"), config.get("fusion")
    if not isinstance(target, dict) or not isinstance(fusion, dict):
        raise CheckpointError(
            f"config.json of a model of type {FUSED}", expected="the objects target and fusion"
        )
    nulls = fusion.get("nulls")
    return {**dict.fromkeys(nulls or ()), **target, "model_type": fusion.get("of")}


def fused_code(plan: Plan) -> bytes:
    """The file with the class that runs both models."""
    text = files("converter").joinpath("data/modeling_gloss_fused.txt").read_text("utf-8")
    return text.replace("Llama", plan.architecture.title.removesuffix(_ENDING)).encode()


def _looks_at_windows(config: Mapping[str, Any]) -> bool:
    """Whether a layer has a window, and so another kind of cache."""
    kinds = {*(config.get("layer_types") or ())} - {"full_attention"}
    used = config.get("use_sliding_window", True) and config.get("sliding_window") is not None
    return bool(kinds or used)
