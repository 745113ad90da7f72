"""A fused model without writing it: hooks that blend in the output of a calibration model.

They do the same as the class of ``checkpoints.fusing``, for a whole model in memory.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import DynamicLayer

from converter.checkpoints.fusing import ALIGNMENT, CALIBRATION


@contextmanager
def blending(
    model: nn.Module, depth: int, scale: float, created: Mapping[str, Tensor]
) -> Iterator[None]:
    """Within this context, the model's head gets h' = (1 - a) h + a LN(t A) instead of h.

    Args:
        model: a causal language model of transformers, of a family in ``fusing.FAMILIES``.
        depth: number of layers of the calibration model, whose output is t.
        scale: a.
        created: the calibration model's tensors, and A.
    """
    base: Any = model.get_submodule("model")
    calibration = _calibration(base, depth, created)
    alignment = created[ALIGNMENT].to(base.embed_tokens.weight)
    given: list[Tensor] = []

    def run(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        if cache is None:
            kwargs = {**kwargs, "use_cache": False}
        while cache is not None and len(cache.layers) < len(base.layers) + len(calibration.layers):
            cache.layers.append(DynamicLayer())  # type: ignore[no-untyped-call]
        given[:] = [calibration(*args, **kwargs).last_hidden_state]

    def blend(module: nn.Module, args: Any, output: Any) -> Any:
        t = nn.functional.layer_norm(given.pop() @ alignment, alignment.shape[1:])
        output.last_hidden_state = (1 - scale) * output.last_hidden_state + scale * t
        return output

    first = base.register_forward_pre_hook(run, with_kwargs=True)
    with first, base.register_forward_hook(blend):
        yield


def _calibration(base: Any, depth: int, created: Mapping[str, Tensor]) -> Any:
    """The calibration model: the model's own first layers, with other weights."""
    layers = base.layers
    base.layers = layers[:depth]
    try:
        made = copy.deepcopy(base)
    finally:
        base.layers = layers
    made.config.num_hidden_layers = len(made.layers)
    for layer in made.layers:
        layer.self_attn.layer_idx += len(layers)  # one cache holds both
    made.load_state_dict(
        {n.removeprefix(CALIBRATION): t for n, t in created.items() if n.startswith(CALIBRATION)}
    )
    return made
