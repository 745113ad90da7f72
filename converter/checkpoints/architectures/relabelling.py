"""Attention biases by a change of the model type: Llama's class computes some models from the same
tensors.

Qwen2 and Mistral without a window are Llama with other fixed settings, but their classes read no
``o_proj.bias``. With the config of Llama they get one. The equality is proved: the tiny model is
loaded again by the other class, with random biases, and must give the same logits as with vectors
added to the output of ``o_proj``. A tiny model cannot show effects of large sizes, such as a
window. So a config may have no key that Llama's does not know, except windows that are off.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from converter.checkpoints.architectures import known_models, library
from converter.checkpoints.architectures.architecture import BiasSpec, LayerSpec, Role
from converter.checkpoints.architectures.tiny import Tiny

_LABEL, _CLASS = "llama", "LlamaForCausalLM"
"""The other model type, and its class."""

_BESIDE = ("q_proj", "k_proj", "v_proj")
"""The maps of the other class that have biases together with ``o_proj``."""

_WINDOWS = ("layer_types", "max_window_layers", "sliding_window", "use_sliding_window")
"""Keys about layers with a window; they are dropped if no layer has one."""

_OWN = {"model_type", "architectures", "transformers_version", "_name_or_path", "dtype"}
"""Keys that change with the model type, or do not matter."""


def relabelled(config: Any, tiny: Tiny, specs: Sequence[LayerSpec]) -> dict[Role, BiasSpec]:
    """How ``o_proj`` gets biases by another model type; empty if that is not proved.

    Args:
        config: of the model, of which ``tiny`` is the tiny one.
        specs: of its kinds of layers.
    """
    patches = [_patch(each) for each in (config, tiny.config)]
    if None in patches or not all("o_proj" in spec.roles and spec.o_writes for spec in specs):
        return {}
    try:
        zeros = _proved(tiny, patches[1] or {}, specs)
    except Exception:  # the other class may raise anything on this config
        return {}
    return {} if zeros is None else {"o_proj": BiasSpec(patches[0] or {}, zeros)}


def _patch(config: Any) -> dict[str, Any] | None:
    """The merge patch that turns a config into one of the other type; None if that is impossible.

    Keys with another default there are written out.
    """
    if library.text_config(config) is not config:
        return None
    known = library.read_config({"model_type": _LABEL}, None, False).to_dict()
    usual, said = type(config)().to_dict(), config.to_dict()
    layers = {*(said.get("layer_types") or ())}
    whole = said.get("sliding_window") is None and layers <= {"full_attention"}
    if not whole or {*said} - {*known, *_WINDOWS, *_OWN}:
        return None
    other = {key for key in known.keys() & said.keys() - _OWN if usual.get(key) != known[key]}
    if any(said[key] is None and known[key] is not None for key in other):
        return None  # a merge patch cannot say so
    return {
        **dict.fromkeys(key for key in _WINDOWS if key in usual),
        **{key: said[key] for key in sorted(other)},
        "model_type": _LABEL, "architectures": [_CLASS], "attention_bias": True,
        "mlp_bias": False,
    }  # fmt: skip


def _proved(
    tiny: Tiny, patch: dict[str, Any], specs: Sequence[LayerSpec]
) -> tuple[str, ...] | None:
    """The other maps that get a bias of zeros; None if the other class with biases does not give
    the logits of the tiny model with vectors.
    """
    said = {key: value for key, value in tiny.config.to_dict().items() if key not in patch}
    told = {key: value for key, value in patch.items() if value is not None}
    config = library.read_config({**said, **told}, None, False)
    kind = library.class_of(config, known_models.AUTO_CLASSES[0])
    names = [spec.roles["o_proj"].module for spec in specs]
    modules = [names[0].format(layer=layer) for layer in range(tiny.layers)]
    ours, theirs = ({*m.state_dict()} for m in (tiny.model, library.on_meta(kind, config)))
    beside = [f"{name.rpartition('.')[0]}.{other}" for name in modules for other in _BESIDE]
    zeros = {f"{name}.bias" for name in beside} & (theirs - ours)
    added = {f"{name}.bias" for name in modules} | zeros
    if len({*names}) != 1 or theirs - ours != added or ours - theirs:
        return None
    width = len(tiny.model.get_parameter(f"{modules[0]}.weight"))
    drawn = torch.randn(
        (len(modules), width), generator=torch.Generator().manual_seed(5), dtype=torch.float64
    )
    vectors = {name: vector.to(tiny.dtype) for name, vector in zip(modules, drawn, strict=True)}
    biases = {f"{name}.bias": vector for name, vector in vectors.items()}
    for name in zeros:
        weight = tiny.model.get_parameter(name.replace(".bias", ".weight"))
        biases[name] = torch.zeros(len(weight), dtype=tiny.dtype)
    found = tiny.run(library.load(kind, config, {**tiny.tensors, **biases}, tiny.dtype))
    plain = tiny.run()
    with ExitStack() as stack:
        for name, vector in vectors.items():
            module = tiny.model.get_submodule(name)
            stack.callback(module.register_forward_hook(_adding(vector)).remove)
        wanted = tiny.run()
    effect = float((wanted - plain).abs().max())
    if not effect > 0 or not float((found - wanted).abs().max()) <= tiny.tolerance * effect:
        return None
    return tuple(name for name in _BESIDE if any(f".{name}.bias" in key for key in zeros))


def _adding(vector: Tensor) -> Any:
    return lambda module, args, output: output + vector
