"""Hooks to run a model and observe its modules, in memory or streamed.

Shapes: B sentences in a batch, T tokens, D hidden size, V vocabulary.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from converter.errors import SourceError, is_out_of_memory
from converter.models.batching import Batch

Show = Callable[[int, int, Tensor], None]
"""Called with the number of a batch, a layer and the layer's activations, (B, T, D) float32, on the
model's device."""


def call(module: nn.Module, batch: Batch) -> Any:
    """The output of a model of transformers for a batch. Some classes count positions themselves.

    Raises SourceError if it cannot be run.
    """
    given = {"attention_mask": batch.mask, "position_ids": batch.positions, "use_cache": False}
    known = inspect.signature(type(module).forward).parameters
    taken = {key: value for key, value in given.items() if key in known}
    try:
        return module(input_ids=batch.ids, **taken)
    except RuntimeError as error:  # errors of PyTorch; a hook's own errors pass
        if is_out_of_memory(error):
            raise
        raise SourceError(
            f"{type(module).__name__} cannot be run on this machine",
            found=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}",
            hint="check that the source generates text with transformers",
        ) from error


class StopForward(Exception):  # noqa: N818 - it is not an error
    """Raised by a hook to end the forward pass."""


Hook = Callable[[nn.Module, Any, Any], Any]


Editing = Callable[[], AbstractContextManager[None]]
"""Returns a context in which a model computes as edited. It may be entered several times."""

UNEDITED: Sequence[Editing] = (nullcontext,)
"""The unedited model, where a sequence of edits is expected."""


@contextmanager
def hooked(module: nn.Module, hooks: Mapping[str, Hook]) -> Iterator[None]:
    """Within this context, call a hook with the output of a named submodule."""
    with ExitStack() as handles:
        for name, hook in hooks.items():
            handles.enter_context(module.get_submodule(name).register_forward_hook(hook))
        yield


def first_of(output: Any) -> Tensor:
    """The output of a module, or its first element."""
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def by_position(x: Tensor, batch: Batch) -> Tensor:
    """Activations as (B, T, D) float32; OPT's are (B T, D)."""
    return x.detach().float().view(*batch.ids.shape, -1)


Modules = Mapping[int, tuple[str, ...]]
"""Layer -> the modules whose outputs are wanted; several are summed. The number of layers, with no
modules, means the head's input; see ``showing_head``.
"""


def showing(
    show: Show, number: int, batch: Batch, layer: int, names: tuple[str, ...], *, stop: bool
) -> dict[str, Hook]:
    """Hooks that show the summed output of modules, and may end the run."""
    seen: list[Tensor] = []

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        seen.append(by_position(first_of(output), batch))
        if len(seen) == len(names):
            show(number, layer, sum(seen[1:], seen[0]))
            if stop:
                raise StopForward

    return dict.fromkeys(names, hook)


@contextmanager
def showing_head(model: Any, show: Show, number: int, batch: Batch, layer: int) -> Iterator[None]:
    """Within this context, show the head's input as a layer's output; no logits are computed.

    The head raises StopForward instead of running.
    """

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        show(number, layer, by_position(args[0], batch))
        raise StopForward

    with model.get_output_embeddings().register_forward_pre_hook(hook):
        yield


def keeping(outputs: dict[str, Tensor], name: str) -> Hook:
    """A hook that keeps a module's output, for a gradient with respect to it."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        first = first_of(output)
        if not first.requires_grad:  # the graph starts here; layers below need none
            first = first.detach().requires_grad_()
        outputs[name] = first
        copy = first.clone()  # some models add to it in place
        return (copy, *output[1:]) if isinstance(output, tuple) else copy

    return hook


def together(
    names: tuple[str, ...], outputs: Mapping[str, Tensor], slopes: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """The summed output of modules, and the gradient with respect to it, which is the same for
    each.
    """
    first, *rest = names
    return sum((outputs[name] for name in rest), outputs[first]), slopes[first]


@contextmanager
def only_chosen(module: Any, batch: Batch) -> Iterator[None]:
    """Within this context, only the logits of the chosen positions are computed: (1, chosen, V).

    The vocabulary is large, so logits of other positions would cost much.
    """
    rows, places = torch.nonzero(batch.weights > 0, as_tuple=True)

    def choose(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0][rows.to(args[0].device), places.to(args[0].device)][None], *args[1:])

    with module.get_output_embeddings().register_forward_pre_hook(choose):
        yield


def log_probability(logits: Tensor, batch: Batch) -> Tensor:
    """The sum of log p of the chosen tokens, from their logits (1, chosen, V)."""
    rows, places = torch.nonzero(batch.weights > 0, as_tuple=True)
    wanted = batch.ids[rows, places + 1].to(logits.device)
    return -nn.functional.cross_entropy(logits[0].float(), wanted, reduction="sum")


Value = Callable[[Tensor, Batch], Tensor]
"""A function of the logits (1, chosen, V) of a batch's chosen positions that returns a number."""


@dataclass(frozen=True, slots=True)
class Entered:
    """The input of a layer for some batches, so that the layers below need not run again.

    Attributes:
        layer: its number.
        states: (B, T, D) for each batch, in the dtype of the model.
        lengths: lengths of the tuples that the layers below return; 0 for a tensor, no entry for a
            layer that text alone does not run through.
    """

    layer: int
    states: Sequence[Tensor]
    lengths: Mapping[int, int] = field(default_factory=dict)


def given_to(args: Any, kwargs: Mapping[str, Any]) -> Tensor:
    """The hidden states among the arguments of a layer."""
    found: Tensor = args[0] if args else kwargs["hidden_states"]
    return found


def giving(args: Any, kwargs: Mapping[str, Any], state: Tensor) -> tuple[Any, dict[str, Any]]:
    """The arguments of a layer with other hidden states."""
    if args:
        return (state, *args[1:]), dict(kwargs)
    return args, {**kwargs, "hidden_states": state}


def passed_on(state: Tensor, length: int) -> Any:
    """The output of a layer that does nothing: a tensor, or a tuple of a given length."""
    return (state, *[None] * (length - 1)) if length else state


@contextmanager
def resumed(
    module: nn.Module, blocks: Sequence[str], entered: Entered | None, number: int
) -> Iterator[None]:
    """Within this context, a model in memory starts with the entered layer.

    Its own ``forward`` runs, and makes masks and tables, but the layers below return their input.
    Args: ``blocks``, names of the layers; ``number``, of the batch.
    """
    if entered is None:
        yield
        return
    state, lengths = entered.states[number], entered.lengths

    def begin(block: nn.Module, args: Any, kwargs: Any) -> Any:
        return giving(args, kwargs, state.clone())

    below = [(n, module.get_submodule(name)) for n, name in enumerate(blocks[: entered.layer])]
    first = module.get_submodule(blocks[entered.layer])
    with ExitStack() as undone:
        undone.enter_context(first.register_forward_pre_hook(begin, with_kwargs=True))
        for n, block in below:
            own, length = block.__dict__.get("forward"), lengths.get(n, 0)
            undone.callback(_restore_forward, block, own)
            block.forward = lambda *args, _length=length, **kwargs: passed_on(
                given_to(args, kwargs), _length
            )
        yield


def _restore_forward(block: nn.Module, own: Any) -> None:
    """Restore a layer's ``forward``: its own, if it had one, or that of its class."""
    del block.forward
    if own is not None:
        block.forward = own


@contextmanager
def memory_errors(what: str, hint: str) -> Iterator[None]:
    """Raise SourceError if memory runs out.

    Args:
        what: the work, for the message.
        hint: for memory of a GPU.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise SourceError(f"the GPU is out of memory with {what}", hint=hint) from error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise SourceError(
            f"memory ran out with {what}",
            hint="lower --batch-size, and give --forward streamed unless that was so",
        ) from error
