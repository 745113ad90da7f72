"""Run a model over sentences and observe the outputs of chosen modules; only sums are kept.

Shapes: B sentences in a batch, T tokens, D hidden size, V vocabulary, N sentences in all.
"""

from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from converter.checkpoints.architectures.architecture import Architecture
from converter.checkpoints.plan import Plan
from converter.checkpoints.safetensors.header import FLOATS
from converter.errors import OptionError
from converter.models.batching import Batch
from converter.models.hooks import (
    UNEDITED,
    Editing,
    Entered,
    Hook,
    Modules,
    Show,
    StopForward,
    Value,
    by_position,
    call,
    given_to,
    hooked,
    keeping,
    log_probability,
    memory_errors,
    only_chosen,
    resumed,
    showing,
    showing_head,
    together,
)
from converter.runtime import progress
from converter.runtime.extras import need


class Model(Protocol):
    """A causal language model of transformers, in memory as a whole or a layer at a time.

    Results may come in either order: all layers of a batch, or all batches of a layer. Hooks on
    modules inside of layers work as in any model.
    """

    @property
    def module(self) -> nn.Module: ...
    @property
    def tokenizer(self) -> Any: ...
    @property
    def architecture(self) -> Architecture: ...
    @property
    def device(self) -> str: ...

    def visit(self, modules: Modules, batched: Sequence[Batch], show: Show) -> None:
        """Run batches up to the last module of interest and show each one's output.

        Args:
            modules: by layer, the modules whose output is wanted; of a tuple, the first element.
                See ``Modules`` for the head's input.
            show: called once for each batch and layer.
        """

    def logits(
        self,
        batched: Sequence[Batch],
        entered: Entered | None = None,
        edits: Sequence[Editing] = UNEDITED,
    ) -> Generator[tuple[int, Tensor], None, None]:
        """The number of each batch and its logits, (B, T, V), batch by batch.

        Args:
            entered: of ``entering`` and these batches: no layer below that one is run.
            edits: all batches run under the first, then under the second, and so on; the numbers
                count on from one edit to the next. A streamed model reads its weights once for as
                many edits as fit in memory.
        """

    def gradients(
        self,
        modules: Modules,
        batched: Sequence[Batch],
        value: Value = log_probability,
        entered: Entered | None = None,
    ) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """Gradients with respect to the outputs of modules.

        Yields for each batch and layer the number of the batch, the layer, f and g, both (B, T, D)
        float32: the output of the module, and the gradient of a number with respect to it.

        Args:
            value: computes that number from the logits at the batch's positions of positive weight;
                by default the sum of log p of the tokens that follow them.
            entered: of ``entering``, of the lowest layer in ``modules`` and these batches: nothing
                below it is run.
        """

    def entering(self, layer: int, batched: Sequence[Batch]) -> Entered:
        """The input of a layer; the layer and those above it do not run."""


@dataclass(frozen=True, slots=True)
class LanguageModel:
    """A ``Model`` that is in memory as a whole. All layers of a batch come together."""

    module: nn.Module
    tokenizer: Any
    architecture: Architecture
    device: str

    def visit(self, modules: Modules, batched: Sequence[Batch], show: Show) -> None:
        """See ``Model``; the layers above the last one of interest are not run."""
        last, end = max(modules), self.architecture.sizes.num_hidden_layers
        for number, batch in enumerate(batched):
            hooks: dict[str, Hook] = {}
            for layer, names in modules.items():
                hooks |= showing(show, number, batch, layer, names, stop=layer == last)
            given = (self.module, show, number, batch, end)
            head = showing_head(*given) if last == end else nullcontext()
            with torch.inference_mode(), hooked(self.module, hooks), head, suppress(StopForward):
                call(self.module, batch)
            progress.advance(len(batch.rows))

    def logits(
        self,
        batched: Sequence[Batch],
        entered: Entered | None = None,
        edits: Sequence[Editing] = UNEDITED,
    ) -> Generator[tuple[int, Tensor], None, None]:
        """See ``Model``."""
        for place, editing in enumerate(edits):
            with editing():
                for number, batch in enumerate(batched):
                    with resumed(self.module, self._blocks, entered, number):
                        found = call(self.module, batch).logits
                    yield place * len(batched) + number, found
                    progress.advance(len(batch.rows))

    def gradients(
        self,
        modules: Modules,
        batched: Sequence[Batch],
        value: Value = log_probability,
        entered: Entered | None = None,
    ) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """See ``Model``. The memory is that of a forward pass whose activations are kept."""
        for number, batch in enumerate(batched):
            outputs: dict[str, Tensor] = {}
            every = [name for names in modules.values() for name in names]
            hooks = {name: keeping(outputs, name) for name in every}
            start = resumed(self.module, self._blocks, entered, number)
            with torch.enable_grad(), start, hooked(self.module, hooks):
                with only_chosen(self.module, batch):
                    chosen = value(call(self.module, batch).logits, batch)
                found = torch.autograd.grad(chosen, list(outputs.values()))
            slopes = dict(zip(outputs, found, strict=True))
            for layer, names in modules.items():
                f, g = together(names, outputs, slopes)
                yield number, layer, by_position(f, batch), by_position(g, batch)
            progress.advance(len(batch.rows))

    def entering(self, layer: int, batched: Sequence[Batch]) -> Entered:
        """See ``Model``."""
        states, lengths = list[Tensor](), dict[int, int]()

        def keep(block: nn.Module, args: Any, kwargs: Any) -> None:
            states.append(given_to(args, kwargs).detach().clone())
            raise StopForward

        def noting(number: int) -> Hook:
            def note(block: nn.Module, args: Any, output: Any) -> None:
                lengths[number] = len(output) if isinstance(output, tuple) else 0

            return note

        notes = {name: noting(number) for number, name in enumerate(self._blocks[:layer])}
        entry = self.module.get_submodule(self._blocks[layer])
        with (
            torch.no_grad(),
            hooked(self.module, notes),
            entry.register_forward_pre_hook(keep, with_kwargs=True),
        ):
            for batch in batched:
                with suppress(StopForward):
                    call(self.module, batch)
                progress.advance(len(batch.rows))
        return Entered(layer, states, lengths)

    @property
    def _blocks(self) -> list[str]:
        """The names of the layers."""
        count = self.architecture.sizes.num_hidden_layers
        return [self.architecture.block.format(layer=number) for number in range(count)]


Sink = Callable[[Batch, int, Tensor], None]
"""Called with a batch, a layer and its activations, (B, T, D) float32, on the model's device."""


class Pool:
    """A sink for the weighted mean of each sentence's activations.

    Attributes:
        pooled: layer -> (N, D) float32 on the CPU, rows in the order of the sentences.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.pooled: dict[int, Tensor] = {}

    def __call__(self, batch: Batch, layer: int, f: Tensor) -> None:
        rows = torch.einsum("bt,btd->bd", batch.weights, f).cpu()
        self.pooled.setdefault(layer, torch.empty(self.count, f.shape[-1]))[batch.rows] = rows


class SecondMoment:
    """The second moment of content tokens.

        M = mean over layers of  M_l / tr M_l,   M_l = sum over groups of  E_group[f f^T]

    Uncentred; every token counts the same within its group, and every group the same. Memory is one
    (D, D) float32 accumulator per layer, a small part of the model's own; if all batches of a layer
    come together, only one in all. The mean is in float64, so that layers may come in any order: a
    streamed model with gradients yields the last one first.
    """

    def __init__(self) -> None:
        self.moments: dict[int, Tensor] = {}
        self._batches, self._seen, self._done = 0, Counter[int](), 0
        self._sum: Tensor | float = 0.0

    def group(self, batched: Sequence[Batch]) -> Sink:
        """The sink for the batches of one group."""
        tokens = max(sum(int(batch.content.sum()) for batch in batched), 1)
        self._batches += len(batched)

        def add(batch: Batch, layer: int, f: Tensor) -> None:
            rows = f[batch.content]
            if layer not in self.moments:
                self.moments[layer] = torch.zeros(rows.shape[1], rows.shape[1], device=rows.device)
            self.moments[layer].addmm_(rows.T, rows, alpha=1.0 / tokens)
            self._seen[layer] += 1
            if self._seen[layer] == self._batches and len(self.moments) == 1:
                self._sum = self._sum + _normalised(self.moments.pop(layer)).double()
                self._done += 1

        return add

    def result(self) -> Tensor:
        """M, (D, D) float32 on the CPU, once all groups have been seen."""
        if isinstance(self._sum, Tensor):
            return (self._sum / self._done).float().cpu()
        total = sum(_normalised(m).double() for m in self.moments.values())
        assert isinstance(total, Tensor)
        return (total / len(self.moments)).float().cpu()


class ChunkNorms:
    """A sink for the mean norm of each of C equal chunks of a layer's output.

        n_c = mean over tokens of  ||f_c||

    Attributes:
        sums: layer -> (C,) float64 on the CPU, over the content tokens that were seen.
        tokens: their number, by layer.
    """

    def __init__(self, chunks: int) -> None:
        self.chunks = chunks
        self.sums: dict[int, Tensor] = {}
        self.tokens = Counter[int]()

    def __call__(self, batch: Batch, layer: int, f: Tensor) -> None:
        rows = f[batch.content.to(f.device)]
        sizes = rows.reshape(len(rows), self.chunks, -1).norm(dim=-1).double().sum(0).cpu()
        self.sums[layer] = self.sums.get(layer, 0) + sizes
        self.tokens[layer] += len(rows)

    def result(self) -> dict[int, Tensor]:
        """n, (C,) float32, of each layer."""
        return {n: (x / max(self.tokens[n], 1)).float() for n, x in self.sums.items()}


def _normalised(moment: Tensor) -> Tensor:
    """M_l / tr M_l; zero for a layer whose output is zero."""
    return moment / moment.trace().clamp(min=torch.finfo(torch.float32).tiny)


Group = tuple[Sequence[Batch], Sequence[Sink]]
"""Batches, and the sinks of their activations."""


def run(model: Model, modules: Modules, groups: Sequence[Group]) -> None:
    """Run all batches of all groups and show every layer's activations to the group's sinks.

    All groups go through the model together, so a streamed model is read once. Groups without sinks
    do not run.

    Raises:
        SourceError: memory ran out.
    """
    batched = [(batch, sinks) for batches, sinks in groups if sinks for batch in batches]
    if not batched:
        return

    def show(number: int, layer: int, f: Tensor) -> None:
        batch, sinks = batched[number]
        for sink in sinks:
            sink(batch, layer, f)

    most = max((len(batch.rows) for batch, _ in batched), default=0)
    with (
        memory_errors(
            f"{most} sentences in a batch", hint="lower --batch-size, or give --device cpu"
        ),
        progress.bar("forward", sum(len(batch.rows) for batch, _ in batched), "text"),
    ):
        model.visit(modules, [batch for batch, _ in batched], show)


def choose_device(device: str) -> str:
    """``auto`` becomes the first GPU if there is one. So does ``map``, whose model parts may go to
    any device.

    Raises:
        OptionError: not a device, or one that this machine does not have.
    """
    if device == "map":
        need("--device map", "accelerate")
    if device in ("auto", "map"):
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = device.partition(":")
    if kind not in ("cpu", "cuda") or (number and not (kind == "cuda" and number.isdigit())):
        raise OptionError("--device", expected="auto, map, cpu, cuda or cuda:n", found=device)
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise OptionError(
            f"--device {device}",
            expected="a GPU that PyTorch can see",
            found=f"{torch.cuda.device_count()} of them",
            hint="give --device cpu",
        )
    return device


def held_out_dtype(asked: str, plan: Plan, device: str) -> torch.dtype:
    """The dtype of measurements on held-out text.

    bfloat16 if ``mixed`` is asked for, or if ``auto`` finds a processor that multiplies it and all
    weights stored in it; else the dtype of the fit. A measurement is a difference between an edited
    and an unedited model, both in this dtype. The fit does not depend on it.

    Raises:
        OptionError: ``mixed``, and bfloat16 would round the weights that are edited.
    """
    edited = {target.info.dtype for target in plan.targets} - {"BF16"}
    if asked == "mixed" and edited:
        raise OptionError(
            "--forward-dtype mixed", expected="weights stored in bfloat16", found=min(edited),
            hint="give --forward-dtype float32",
        )  # fmt: skip
    if asked == "auto" and device == "cpu" and _multiplies_bfloat16():
        headers = plan.headers.values()
        stored = {info.dtype for header in headers for info in header.tensors.values()}
        asked = "mixed" if stored == {"BF16"} else asked
    return torch.bfloat16 if asked == "mixed" else choose_dtype(asked, plan, device)


def _multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for it; else bfloat16 is slower than float32."""
    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # PyTorch < 2.10
    return any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def choose_dtype(asked: str, plan: Plan, device: str) -> torch.dtype:
    """``auto`` is float32 on the CPU, and the stored dtype on a GPU, where memory is scarce.

    The stored dtype is that of the down-projections, or bfloat16 if they have fewer bits. ``mixed``
    is float32; see ``held_out_dtype``.
    """
    if asked != "auto":
        named: torch.dtype = torch.float32 if asked == "mixed" else getattr(torch, asked)
        return named
    return (
        torch.float32 if device == "cpu" else FLOATS.get(plan.targets[0].info.dtype, torch.bfloat16)
    )
