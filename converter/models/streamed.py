"""A model that is run one layer at a time, its weights read as they are needed.

All batches go through a layer before the next one is read. The code that runs is the model's own:
its ``forward`` is called for every layer and batch, and all decoder layers but one return what they
are given. That one gets the hidden states that the layer before it gave for this batch, with
whatever masks and tables the model makes for it; what it gives is kept, and the run ends there. So
nothing here knows how a model is built, but that its layers pass on hidden states and nothing else.

What needs memory is the weights of one layer, one batch and the hidden states of all batches, and
these last go to a file where they are many. Every byte of the weights is read once in a pass, and
with gradients those of the layers that they go back through twice.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from converter.checkpoints.architectures.architecture import Architecture
from converter.models.batching import Batch
from converter.models.hidden_states import HiddenStates
from converter.models.hooks import (
    Hook,
    SentenceCount,
    Show,
    StopForward,
    by_position,
    call,
    first_of,
    hooked,
    keeping,
    log_probability,
    only_chosen,
    showing,
)
from converter.models.streamed_weights import Weights


class StreamedModel:
    """A ``Model`` of which one layer is in memory at a time. All batches of a layer come together.

    Args:
        weights: of the model, none of which is in memory; its modules run stand-ins from now on.
        tokenizer: of the model.
        architecture: its data file.
        blocks: names of its layers.
        device: where they are run.
        held: bytes of hidden states to hold in memory.
        folder: for the file with the others.
    """

    def __init__(
        self,
        weights: Weights,
        tokenizer: Any,
        architecture: Architecture,
        blocks: Sequence[str],
        device: str,
        held: int,
        folder: Path,
    ) -> None:
        self.weights, self.tokenizer = weights, tokenizer
        self.architecture, self.device = architecture, device
        self.module: Any = weights.module
        self._held, self._folder = held, folder
        self._blocks = list(blocks)
        self._now = -1  # the layer that is run
        self._given: Tensor | None = None  # what it is given instead of its input
        self._entered: Tensor | None = None  # what it was given in the end
        self._lengths: dict[int, int] = {}  # layer -> length of the tuple that it gives, or 0
        for number, name in enumerate(self._blocks):
            self._stand_in(number, self.module.get_submodule(name))
        for name, module in self.module.named_modules():
            if parts := weights.parts_of(name) - set(self._blocks):
                self._load_when_called(module, parts)
        self._embedding, self._head = (
            weights.parts_of(_name_of(self.module, module))
            for module in (self.module.get_input_embeddings(), self.module.get_output_embeddings())
        )
        self._head_needs_embedding = False

    def _stand_in(self, number: int, block: nn.Module) -> None:
        """Let a layer run only when it is its turn; see the module."""
        run = block.forward

        @wraps(run)
        def forward(*args: Any, **kwargs: Any) -> Any:
            end = self._now == len(self._blocks) == number + 1
            if (number == self._now or end) and self._given is not None:
                args, kwargs = _with_first(self._given, args, kwargs)
            first = args[0] if args else kwargs["hidden_states"]
            if number == self._now:
                self._entered = first
                output = run(*args, **kwargs)
                self._lengths[number] = len(output) if isinstance(output, tuple) else 0
                return output
            length = self._lengths[number]
            return (first, *[None] * (length - 1)) if length else first

        block.forward = forward

    def _load_when_called(self, module: nn.Module, parts: set[str]) -> None:
        """Let a module outside of the layers load its weights when it is first needed.

        The embedding is needed for the first layer only; for others it gives zeros, which do not
        get anywhere.
        """
        run, embeds = module.forward, module is self.module.get_input_embeddings()

        @wraps(run)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if embeds and self._now > 0:
                ids, weight = args[0], module.weight
                assert isinstance(weight, Tensor)
                shape = (*ids.shape, weight.shape[1])
                return torch.zeros(shape, dtype=weight.dtype, device=ids.device)
            for part in parts:
                self.weights.load(part)
            return run(*args, **kwargs)

        module.forward = forward

    def visit(
        self,
        modules: Mapping[int, str],
        batched: Sequence[Batch],
        show: Show,
    ) -> None:
        """See ``Model``; the layers above the last one of interest are not read."""
        last = max(modules)

        def hooks(layer: int, number: int) -> dict[str, Hook]:
            if layer not in modules:
                return {}
            stop = layer == last
            return {modules[layer]: showing(show, number, batched[number], layer, stop=stop)}

        count = SentenceCount(batched, last + 1)
        with self._pass() as states:
            for number in self._upwards(batched, states, range(last + 1), hooks=hooks):
                count.step(number)

    def logits(self, batched: Sequence[Batch]) -> Iterator[tuple[int, Tensor]]:
        """See ``Model``."""
        end = len(self._blocks)
        count = SentenceCount(batched, end + 1)
        with self._pass(head=True) as states:
            for number in self._upwards(batched, states, range(end)):
                count.step(number)
            for number, batch in enumerate(batched):
                with torch.no_grad():
                    logits = self._top(batch, states.get((end, number), self.device))
                yield number, logits
                count.step(number)

    def gradients(
        self, modules: Mapping[int, str], batched: Sequence[Batch]
    ) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """See ``Model``. Layers come in descending order.

        A pass up keeps what every layer from the first one of interest on is given; a pass down
        runs each layer again from that, and takes the gradient back through it.
        """
        first, end = min(modules), len(self._blocks)
        count = SentenceCount(batched, 2 * end + 1 - first)
        with self._pass(head=True) as states:
            for number in self._upwards(batched, states, range(end), first):
                count.step(number)
            for number in self._back_from_head(batched, states):
                count.step(number)
            for layer in reversed(range(first, end)):
                with self._layer(layer, layer - 1 if layer > first else None):
                    for number, batch in enumerate(batched):
                        outputs: dict[int, Tensor] = {}
                        hooks = {modules[n]: keeping(outputs, n) for n in modules if n == layer}
                        found = self._back(
                            layer, number, batch, states, hooks, outputs, further=layer > first
                        )
                        for f, g in zip(outputs.values(), found, strict=True):
                            yield number, layer, by_position(f, batch), by_position(g, batch)
                        count.step(number)

    def _upwards(
        self,
        batched: Sequence[Batch],
        states: HiddenStates,
        layers: range,
        first: int | None = None,
        hooks: Callable[[int, int], Mapping[str, Hook]] = lambda layer, number: {},
    ) -> Iterator[int]:
        """Run all batches through the lowest layers; yields the number of each batch.

        Args:
            batched: what to run.
            states: where (layer, number) will be what a layer is given for a batch, from the layer
                ``first`` on, or only what the last layer gives.
            layers: from 0.
            first: see ``states``.
            hooks: for a layer and the number of a batch, what to call with modules' outputs.
        """
        first = len(self._blocks) if first is None else first
        for layer in layers:
            with self._layer(layer, layer + 1 if layer + 1 in layers else None):
                for number, batch in enumerate(batched):
                    given = (max(layer, first), number)
                    state = states.get(given, self.device) if layer else None
                    with torch.no_grad():
                        output = self._through(layer, batch, state, hooks(layer, number))
                    if layer == first == 0:
                        assert self._entered is not None
                        states.put(given, self._entered)
                    if output is not None:
                        states.put((max(layer + 1, first), number), output)
                    yield number
            if layer == 0 and not self._head_needs_embedding:
                self._drop(self._embedding)

    def _through(
        self, layer: int, batch: Batch, given: Tensor | None, hooks: Mapping[str, Hook]
    ) -> Tensor | None:
        """What a layer gives for a batch, or None if a hook has ended the run."""
        found: list[Tensor] = []

        def stop(module: nn.Module, args: Any, output: Any) -> None:
            found.append(first_of(output))
            raise StopForward

        self._now, self._given = layer, None if given is None else given.clone()
        last = {self._blocks[layer]: stop}
        with hooked(self.module, hooks), hooked(self.module, last), suppress(StopForward):
            call(self.module, batch)
        return found[0] if found else None

    def _top(self, batch: Batch, given: Tensor) -> Tensor:
        """The logits that the last norm and the head make of what the last layer gave."""
        self._now, self._given = len(self._blocks), given
        logits: Tensor = call(self.module, batch).logits
        return logits

    def _back_from_head(self, batched: Sequence[Batch], states: HiddenStates) -> Iterator[int]:
        """Put gradients of log p in the place of what the last layer gave."""
        end, before = len(self._blocks), set(self.weights.loaded)
        self.weights.expect(self._blocks[-1])
        for number, batch in enumerate(batched):
            top = states.get((end, number), self.device).clone().requires_grad_()
            with torch.enable_grad(), only_chosen(self.module, batch):
                chosen = log_probability(self._top(batch, top), batch)
            states.put((end, number), torch.autograd.grad(chosen, top)[0])
            yield number
        self._drop(self.weights.loaded - before | self._embedding)

    def _back(
        self,
        layer: int,
        number: int,
        batch: Batch,
        states: HiddenStates,
        hooks: Mapping[str, Hook],
        outputs: Mapping[int, Tensor],
        *,
        further: bool,
    ) -> Sequence[Tensor]:
        """Take a gradient back through a layer, and give that of what hooks put into ``outputs``.

        The gradient with respect to what the layer is given, if it is to go ``further``, takes the
        place of that.
        """
        given = states.get((layer, number), self.device).clone()
        with torch.enable_grad():
            given.requires_grad_(further)
            output = self._through(layer, batch, given, hooks)
        assert output is not None
        wanted = [*outputs.values(), *([given] if further else [])]
        incoming = states.get((layer + 1, number), self.device)
        found = torch.autograd.grad(output, wanted, incoming)
        states.drop((layer + 1, number))
        if further:
            states.put((layer, number), found[-1])
        return found[: len(outputs)]

    def _drop(self, parts: set[str]) -> None:
        for part in list(parts):
            self.weights.drop(part)

    @contextmanager
    def _layer(self, layer: int, following: int | None) -> Iterator[None]:
        """While this lasts, the weights of a layer are in memory."""
        self.weights.load(self._blocks[layer])
        if following is not None:
            self.weights.expect(self._blocks[following])
        try:
            yield
        finally:
            self.weights.drop(self._blocks[layer])

    @contextmanager
    def _pass(self, *, head: bool = False) -> Iterator[HiddenStates]:
        """A pass over the weights, all of which are let go at its end.

        Args:
            head: whether it goes to the end, where the head may share the embedding's weight.
        """
        self._head_needs_embedding = head and bool(self._embedding & self._head)
        try:
            with HiddenStates(self._held, self._folder) as states:
                yield states
        finally:
            self._given = self._entered = None
            self.weights.drop_all()


def _with_first(
    given: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments with other hidden states, which come first or by name."""
    if args:
        return (given, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": given}


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    """The name of a submodule."""
    found: str = next(name for name, module in model.named_modules() if module is wanted)
    return found
