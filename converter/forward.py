"""Run a model over sentences and look at what chosen modules give; nothing is kept but sums.

Shapes: B sentences in a batch, T tokens, D hidden size, N sentences in all.
"""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from converter.architecture import Architecture
from converter.errors import OptionError, SourceError
from converter.tokens import Batch


@dataclass(frozen=True, slots=True)
class LanguageModel:
    """A loaded causal language model of transformers with what belongs to it."""

    module: nn.Module
    tokenizer: Any
    architecture: Architecture
    device: str


class _Enough(Exception):  # noqa: N818 - it is not an error
    """Raised by the last hook: the layers above are not needed."""


Visit = Callable[[int, Tensor], None]
"""Called with a layer and its activations, (B, T, D) float32, on the model's device."""


def forward(model: nn.Module, modules: Mapping[int, str], batch: Batch, visit: Visit) -> None:
    """Run one batch up to the last module of interest and show each one's output to ``visit``.

    Args:
        model: a causal language model of transformers in eval mode.
        modules: layer -> name of the module whose output is wanted; a tuple's first element counts.
        batch: token ids and masks.
        visit: called once for each layer, in order of execution.
    """
    last = max(modules)

    def hook(layer: int) -> Callable[[nn.Module, Any, Any], None]:
        def show(module: nn.Module, args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            visit(layer, first.float().view(*batch.ids.shape, -1))  # OPT's is (B T, D)
            if layer == last:
                raise _Enough

        return show

    handles = [
        model.get_submodule(name).register_forward_hook(hook(layer))
        for layer, name in modules.items()
    ]
    try:
        with torch.inference_mode():
            model(
                input_ids=batch.ids,
                attention_mask=batch.mask,
                position_ids=batch.positions,
                use_cache=False,
            )
    except _Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()


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
    """A sink for the second moment of content tokens.

        M = mean over layers of  M_l / tr M_l,   M_l = sum over groups of  E_group[f f^T]

    Uncentred; every token counts the same within its group, and every group the same. Memory is
    one (D, D) float32 accumulator per layer, a small part of the model's own.
    """

    def __init__(self) -> None:
        self.moments: dict[int, Tensor] = {}
        self.tokens = 1

    def start_group(self, batched: Sequence[Batch]) -> None:
        """Say which batches come next: one group."""
        self.tokens = max(sum(int(batch.content.sum()) for batch in batched), 1)

    def __call__(self, batch: Batch, layer: int, f: Tensor) -> None:
        rows = f[batch.content]
        if layer not in self.moments:
            self.moments[layer] = torch.zeros(rows.shape[1], rows.shape[1], device=rows.device)
        self.moments[layer].addmm_(rows.T, rows, alpha=1.0 / self.tokens)

    def result(self) -> Tensor:
        """M, (D, D) float32 on the CPU."""
        tiny = torch.finfo(torch.float32).tiny  # a layer that writes nothing has no directions
        normalised = [m / m.trace().clamp(min=tiny) for m in self.moments.values()]
        return torch.stack(normalised).mean(0).cpu()


def run(
    model: nn.Module,
    modules: Mapping[int, str],
    batched: Sequence[Batch],
    sinks: Sequence[Sink],
    advance: Callable[[int], object] = lambda count: None,
) -> None:
    """Run all batches and show every layer's activations to every sink.

    Args:
        model: a causal language model of transformers in eval mode.
        modules: layer -> name of the module whose output is wanted; see ``forward``.
        batched: what to run.
        sinks: what to do with the activations.
        advance: called with the number of sentences done since the last call.
    """
    for batch in batched:

        def visit(layer: int, f: Tensor, batch: Batch = batch) -> None:
            for sink in sinks:
                sink(batch, layer, f)

        try:
            forward(model, modules, batch, visit)
        except torch.OutOfMemoryError as error:
            raise SourceError(
                f"the GPU is out of memory with {len(batch.rows)} sentences in a batch",
                hint="lower --batch-size, or give --device cpu",
            ) from error
        advance(len(batch.rows))


def choose_device(device: str) -> str:
    """``auto`` becomes the first GPU if there is one, and so does ``map``, whose parts go anywhere.

    Raises:
        OptionError: not a device, or one that this machine does not have.
    """
    if device == "map" and importlib.util.find_spec("accelerate") is None:
        raise OptionError(
            "--device map needs the package accelerate", hint="pip install accelerate"
        )
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


def choose_dtype(asked: str, stored: torch.dtype, device: str) -> torch.dtype:
    """``auto`` is float32 on the CPU, and on a GPU, where memory is dear, the stored dtype."""
    if asked != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[
            asked
        ]
    return torch.float32 if device == "cpu" else stored
