"""A model that runs one layer at a time, with weights read when they are needed.

All batches go through a layer before the next one is read. The model's own code runs: its
``forward`` is called for every layer and batch, and all decoder layers except one return their
input. That layer gets the hidden states of this batch from the layer before it, with the masks and
tables that the model makes. Its output is kept, and the run ends there. So this module only assumes
that layers pass on hidden states and nothing else.

Memory is needed for the weights of one layer, one batch, and the hidden states of all batches,
which go to a file if they are many. A pass reads every byte of the weights once; with gradients, it
reads the layers of the backward pass twice. Several edits share a pass of ``logits``: each has its
own hidden states, and its hooks are there only while these run.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from converter.checkpoints.architectures.architecture import Architecture
from converter.models.batching import Batch
from converter.models.course import Course
from converter.models.hooks import (
    UNEDITED,
    Editing,
    Entered,
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
from converter.models.pieces import pieces_of
from converter.models.streamed_memory import HiddenStates, Weights
from converter.runtime import progress


class StreamedModel:
    """A ``Model`` of which one layer is in memory at a time. All batches of a layer come together.

    Args:
        weights: of the model, none in memory; its modules run replacements from now on.
        blocks: names of its layers.
        held: the most bytes of hidden states in memory.
        folder: for the file of the other hidden states.
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
        self._now = -1  # the layer that runs
        self._given: Tensor | None = None  # replaces its input
        self._entered: Tensor | None = None  # its actual input
        self._lengths: dict[int, int] = {}  # layer -> length of its output tuple, or 0
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
        """Wrap a layer's forward so that it runs only during its own pass; see the module."""
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
        """Wrap a module outside of the layers so that it loads its weights at first use.

        The embedding is needed only for the first layer. For others it returns zeros, which are not
        used.
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

        def hooks(layer: int, number: int) -> AbstractContextManager[None]:
            if layer not in modules:
                return nullcontext()
            given = show, number, batched[number], layer, modules[layer]
            return hooked(self.module, showing(*given, stop=layer == last))

        with self._pass(batched, last + 1) as states:
            self._upwards(batched, states, range(min(last + 1, end)), hooks=hooks)
            for number, batch in enumerate(batched if last == end else ()):
                state = states.get((end, number), self.device)
                head = showing_head(self.module, show, number, batch, end)
                with torch.no_grad(), head, suppress(StopForward):
                    self._top(batch, state)
                self._step(number)

    def logits(
        self,
        batched: Sequence[Batch],
        entered: Entered | None = None,
        edits: Sequence[Editing] = UNEDITED,
    ) -> Generator[tuple[int, Tensor], None, None]:
        """See ``Model``. A pass takes as many edits as there is memory for their hidden states,
        and at least one.
        """
        at_once = max(self._held // max(self._states_nbytes(batched), 1), 1)
        for place in range(0, len(edits), at_once):
            some = edits[place : place + at_once]
            for number, logits in self._logits(batched, entered, some):
                yield place * len(batched) + number, logits

    def _states_nbytes(self, batched: Sequence[Batch]) -> int:
        """Bytes of the hidden states of batches before or behind a layer."""
        size: int = self.module.get_input_embeddings().weight.element_size()
        positions = sum(batch.ids.numel() for batch in batched)
        return positions * self.architecture.sizes.hidden_size * size

    def _logits(
        self, batched: Sequence[Batch], entered: Entered | None, edits: Sequence[Editing]
    ) -> Generator[tuple[int, Tensor], None, None]:
        """The same in one pass: each edit has the batches again, under its own hooks."""
        end, start = len(self._blocks), 0 if entered is None else entered.layer
        self._lengths |= entered.lengths if entered else {}
        under = [editing for editing in edits for _ in batched]
        states_of = [*(entered.states if entered and start else ())] * len(edits)
        batched = [*batched] * len(edits)
        with self._pass(batched, end + 1 - start, head=True) as states:
            for number, state in enumerate(states_of):
                states.put((end, number), state)
            course = self._course(batched, under)
            self._upwards(
                batched, states, range(start, end), course=course,
                hooks=lambda layer, number: under[number](),
            )  # fmt: skip
            for number, batch in enumerate(batched):
                with torch.no_grad(), under[number]():
                    logits = self._top(batch, states.get((end, number), self.device))
                yield number, logits
                self._step(number)
            course.drop()

    def gradients(
        self,
        modules: Modules,
        batched: Sequence[Batch],
        value: Value = log_probability,
        entered: Entered | None = None,
    ) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """See ``Model``. Layers come in descending order.

        With ``entered``, the lowest of these layers stays in memory until the next pass without it,
        so that further steps read only the layers above it.

        A pass up keeps the input of every layer from the first one of interest on. A pass down runs
        each layer again from its input, and takes the gradient back through it.
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
        """See ``Model``; the states of the first layer are not kept but computed again."""
        end = len(self._blocks)
        with self._pass(batched, layer) as states:
            course = self._course(batched, [*UNEDITED] * len(batched))
            self._upwards(batched, states, range(layer), course=course)
            course.drop()
            numbers = range(len(batched) if layer else 0)
            found = [states.get((end, number), self.device).clone() for number in numbers]
        return Entered(layer, found, dict(self._lengths))

    def _upwards(
        self,
        batched: Sequence[Batch],
        states: HiddenStates,
        layers: range,
        first: int | None = None,
        hooks: Callable[[int, int], AbstractContextManager[None]] = lambda *_: nullcontext(),
        course: Course | None = None,
    ) -> None:
        """Run all batches through the lowest layers.

        Args:
            states: gets under (layer, number) the input of a layer for a batch, from the layer
                ``first`` on, or only the output of the last layer.
            layers: from 0, or from ``first`` if ``states`` has its input.
            first: see ``states``.
            hooks: returns, for a layer and the number of a batch, a context to run it in.
            course: of a pass without ``first``; a stopped run continues from it.
        """
        first = len(self._blocks) if first is None else first
        if course:
            every, layers = layers, course.resumed(layers, states, self._lengths)
            for _ in range(len(every) - len(layers)):
                for number in range(len(batched)):
                    self._step(number)
        for layer in layers:
            for part in self._embedding if layer == 0 else ():  # some models ask for its device
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
            if course:
                course.keep(layer + 1, states, self._lengths)

    def _course(self, batched: Sequence[Batch], under: Sequence[Editing]) -> Course:
        """The course of batches, each under its edit; nothing is kept if the disk has no room for
        the states of two layers.
        """
        pieces, names = pieces_of(self.module), list[str]()
        if pieces and 2 * self._states_nbytes(batched) > pieces.room():
            pieces = None
        if pieces:
            for batch, editing in zip(batched, under, strict=True):
                with editing():
                    names.append(pieces.name("state", batch.ids, batch.mask))
        return Course(pieces, names, len(self._blocks))

    def _through(
        self,
        layer: int,
        batch: Batch,
        given: Tensor | None,
        hooks: AbstractContextManager[None],
    ) -> Tensor | None:
        """The output of a layer for a batch, or None if a hook ended the run."""
        found: list[Tensor] = []

        def stop(module: nn.Module, args: Any, output: Any) -> None:
            found.append(first_of(output))
            raise StopForward

        self._now, self._given = layer, None if given is None else given.clone()
        last = {self._blocks[layer]: stop}
        with hooks, hooked(self.module, last), suppress(StopForward):
            call(self.module, batch)
        return found[0] if found else None

    def _top(self, batch: Batch, given: Tensor) -> Tensor:
        """The logits that the last norm and the head make from the last layer's output."""
        self._now, self._given = len(self._blocks), given
        logits: Tensor = call(self.module, batch).logits
        return logits

    def _back_from_head(self, batched: Sequence[Batch], states: HiddenStates, value: Value) -> None:
        """Replace the last layer's outputs by the gradients of a number."""
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
        """Take a gradient back through a layer for the batch of ``place``.

        If the gradient must go ``further``, the gradient with respect to the layer's input replaces
        that input.

        Returns:
            the summed output of the named modules, if there are any, and the gradient with respect
            to it.
        """
        layer, number = place
        outputs: dict[str, Tensor] = {}
        hooks = hooked(self.module, {name: keeping(outputs, name) for name in names})
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
        """Within this context, the weights of a layer are in memory."""
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
        """A pass over the weights. At its end all are released, except the layers to keep.

        Args:
            steps: number of steps of each batch, which are not consecutive: its sentences count as
                done only after all of them.
            head: whether the pass includes the head, which may share the embedding's weight.
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
    """Make a model of transformers report a device, which it usually takes from its weights."""
    kind = type(model)
    known = {"device": torch.device(device), "__module__": kind.__module__}
    model.__class__ = type(kind.__name__, (kind,), known)
