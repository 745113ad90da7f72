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

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from converter.checkpoints.architectures.architecture import Architecture
from converter.models.batching import Batch
from converter.models.hooks import (
    Entered,
    Hook,
    Modules,
    Show,
    StopForward,
    Value,
    by_position,
    call,
    first_of,
    given_to,
    giving,
    hooked,
    keeping,
    log_probability,
    only_chosen,
    passed_on,
    showing,
    showing_head,
    together,
)
from converter.models.streamed_memory import HiddenStates, Weights
from converter.runtime import progress


class StreamedModel:
    """A ``Model`` of which one layer is in memory at a time. All batches of a layer come together.

    Args:
        weights: of the model, none of which is in memory; its modules run stand-ins from now on.
        blocks: names of its layers.
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
        for part in [m for m in self.module.modules() if hasattr(m, "get_input_embeddings")]:
            _say_device(part, device)
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
        names = {module: name for name, module in self.module.named_modules()}
        self._embedding = weights.parts_of(names[self.module.get_input_embeddings()])
        self._head = weights.parts_of(names[self.module.get_output_embeddings()])
        self._head_needs_embedding, self._kept = False, frozenset[str]()
        self._rows, self._steps, self._done = list[int](), 1, 0  # for the count of sentences

    def _stand_in(self, number: int, block: nn.Module) -> None:
        """Let a layer run only when it is its turn; see the module."""
        run = block.forward

        @wraps(run)
        def forward(*args: Any, **kwargs: Any) -> Any:
            end = self._now == len(self._blocks) == number + 1
            if (number == self._now or end) and self._given is not None:
                args, kwargs = giving(args, kwargs, self._given)
            first = given_to(args, kwargs)
            if number == self._now:
                self._entered = first
                output = run(*args, **kwargs)
                self._lengths[number] = len(output) if isinstance(output, tuple) else 0
                return output
            return passed_on(first, self._lengths[number])

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
                return torch.zeros(shape, dtype=weight.dtype, device=self.device)
            for part in parts:
                self.weights.load(part)
            return run(*args, **kwargs)

        module.forward = forward

    def visit(self, modules: Modules, batched: Sequence[Batch], show: Show) -> None:
        """See ``Model``; the layers above the last one of interest are not read."""
        last, end = max(modules), len(self._blocks)

        def hooks(layer: int, number: int) -> dict[str, Hook]:
            if layer not in modules:
                return {}
            stop = layer == last
            return showing(show, number, batched[number], layer, modules[layer], stop=stop)

        with self._pass(batched, last + 1) as states:
            self._upwards(batched, states, range(min(last + 1, end)), hooks=hooks)
            for number, batch in enumerate(batched if last == end else ()):
                state = states.get((end, number), self.device)
                head = showing_head(self.module, show, number, batch, end)
                with torch.no_grad(), head, suppress(StopForward):
                    self._top(batch, state)
                self._step(number)

    def logits(
        self, batched: Sequence[Batch], entered: Entered | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """See ``Model``."""
        end, start = len(self._blocks), 0 if entered is None else entered.layer
        with self._pass(batched, end + 1 - start, head=True) as states:
            for number, state in enumerate(entered.states if entered and start else ()):
                states.put((end, number), state)
            self._upwards(batched, states, range(start, end))
            for number, batch in enumerate(batched):
                with torch.no_grad():
                    logits = self._top(batch, states.get((end, number), self.device))
                yield number, logits
                self._step(number)

    def gradients(
        self,
        modules: Modules,
        batched: Sequence[Batch],
        value: Value = log_probability,
        entered: Entered | None = None,
    ) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """See ``Model``. Layers come in descending order.

        With ``entered`` the lowest of these layers stays in memory until the next pass without it,
        so that step after step reads those above only.

        A pass up keeps what every layer from the first one of interest on is given; a pass down
        runs each layer again from that, and takes the gradient back through it.
        """
        first, end = min(modules), len(self._blocks)
        start = 0 if entered is None else first
        kept = frozenset({self._blocks[first]} if entered else ())
        with self._pass(batched, 2 * end + 1 - first - start, head=True, kept=kept) as states:
            for number, state in enumerate(entered.states if entered and start else ()):
                states.put((first, number), state)
            self._upwards(batched, states, range(start, end), first)
            self._back_from_head(batched, states, value)
            for layer in reversed(range(first, end)):
                with self._layer(layer, layer - 1 if layer > first else None):
                    for number, batch in enumerate(batched):
                        place, names = (layer, number), modules.get(layer, ())
                        found = self._back(place, batch, states, names, further=layer > first)
                        for f, g in found:
                            yield number, layer, by_position(f, batch), by_position(g, batch)
                        self._step(number)

    def entering(self, layer: int, batched: Sequence[Batch]) -> Entered:
        """See ``Model``; the states of the first layer are not kept, but made again."""
        end = len(self._blocks)
        with self._pass(batched, layer) as states:
            self._upwards(batched, states, range(layer))
            numbers = range(len(batched) if layer else 0)
            found = [states.get((end, number), self.device).clone() for number in numbers]
        return Entered(layer, found)

    def _upwards(
        self,
        batched: Sequence[Batch],
        states: HiddenStates,
        layers: range,
        first: int | None = None,
        hooks: Callable[[int, int], Mapping[str, Hook]] = lambda layer, number: {},
    ) -> None:
        """Run all batches through the lowest layers.

        Args:
            states: where (layer, number) will be what a layer is given for a batch, from the layer
                ``first`` on, or only what the last layer gives.
            layers: from 0, or from ``first`` where ``states`` has what that is given.
            first: see ``states``.
            hooks: for a layer and the number of a batch, what to call with modules' outputs.
        """
        first = len(self._blocks) if first is None else first
        for layer in layers:
            for part in self._embedding if layer == 0 else ():  # some models ask where it is
                self.weights.load(part)
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
                    self._step(number)
            if layer == 0 and not self._head_needs_embedding:
                self.weights.drop(*self._embedding)

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

    def _back_from_head(self, batched: Sequence[Batch], states: HiddenStates, value: Value) -> None:
        """Put gradients of a number in the place of what the last layer gave."""
        end, before = len(self._blocks), set(self.weights.loaded)
        self.weights.expect(self._blocks[-1])
        for number, batch in enumerate(batched):
            top = states.get((end, number), self.device).clone().requires_grad_()
            with torch.enable_grad(), only_chosen(self.module, batch):
                chosen = value(self._top(batch, top), batch)
            states.put((end, number), torch.autograd.grad(chosen, top)[0])
            self._step(number)
        self.weights.drop(*(self.weights.loaded - before | self._embedding))

    def _back(
        self,
        place: tuple[int, int],
        batch: Batch,
        states: HiddenStates,
        names: tuple[str, ...],
        *,
        further: bool,
    ) -> Iterable[tuple[Tensor, Tensor]]:
        """Take a gradient back through a layer for a batch, of which ``place`` has the numbers.

        The gradient with respect to what the layer is given, if it is to go ``further``, takes the
        place of that.

        Returns:
            what the modules of some names give together, if there are any, and the gradient with
            respect to it.
        """
        layer, number = place
        outputs: dict[str, Tensor] = {}
        hooks = {name: keeping(outputs, name) for name in names}
        given = states.get(place, self.device).clone()
        with torch.enable_grad():
            given.requires_grad_(further)
            output = self._through(layer, batch, given, hooks)
        assert output is not None
        wanted = [*outputs.values(), *([given] if further else [])]
        above = layer + 1, number
        found = torch.autograd.grad(output, wanted, states.get(above, self.device))
        states.drop(above)
        if further:
            states.put(place, found[-1])
        slopes = dict(zip(outputs, found, strict=False))
        return [together(names, outputs, slopes)] if names else []

    @contextmanager
    def _layer(self, layer: int, following: int | None) -> Iterator[None]:
        """While this lasts, the weights of a layer are in memory."""
        self.weights.load(self._blocks[layer])
        if following is not None:
            self.weights.expect(self._blocks[following])
        try:
            yield
        finally:
            if self._blocks[layer] not in self._kept:
                self.weights.drop(self._blocks[layer])

    @contextmanager
    def _pass(
        self,
        batched: Sequence[Batch],
        steps: int,
        *,
        head: bool = False,
        kept: frozenset[str] = frozenset(),
    ) -> Iterator[HiddenStates]:
        """A pass over the weights, all of which are let go at its end, but for layers to be kept.

        Args:
            steps: that each batch takes, not one after the other: its sentences count as done only
                when so many steps are.
            head: whether it goes to the end, where the head may share the embedding's weight.
        """
        self._rows, self._steps, self._done = [len(batch.rows) for batch in batched], steps, 0
        self._head_needs_embedding, self._kept = head and bool(self._embedding & self._head), kept
        try:
            with HiddenStates(self._held, self._folder) as states:
                yield states
        finally:
            self._given = self._entered = None
            self.weights.drop_all(but=kept)

    def _step(self, number: int) -> None:
        """One step of a batch is done."""
        before, self._done = self._done, self._done + self._rows[number]
        if count := self._done // self._steps - before // self._steps:
            progress.advance(count)


def _say_device(model: nn.Module, device: str) -> None:
    """Have a model of transformers say that it is on a device, which it takes from its weights."""
    kind = type(model)
    known = {"device": torch.device(device), "__module__": kind.__module__}
    model.__class__ = type(kind.__name__, (kind,), known)
