"""The edit without writing a weight: hooks that change what down-projections give."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from converter.checkpoints.architectures.architecture import Architecture
from converter.edits.base import Edit


@contextmanager
def edited(
    model: nn.Module, architecture: Architecture, edit: Edit, layers: Sequence[int]
) -> Iterator[None]:
    """While this lasts, the model computes as if ``edit`` were written into its weights.

    Args:
        model: a causal language model of transformers.
        architecture: names the down-projections of its layers.
        edit: what happens to what they give.
        layers: whose down-projections are edited.
    """
    handles = []
    for layer in layers:
        name = architecture.roles["down_proj"].module.format(layer=layer)
        handles.append(model.get_submodule(name).register_forward_hook(_hook(edit, layer)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(edit: Edit, layer: int) -> Callable[[nn.Module, Any, Any], Any]:
    def change(module: nn.Module, args: Any, output: Any) -> Any:
        bias = getattr(module, "bias", None)
        first, *rest = output if isinstance(output, tuple) else (output,)
        first = edit.output(layer, first, bias if isinstance(bias, Tensor) else None)
        return (first, *rest) if isinstance(output, tuple) else first

    return change
