"""Calibration models: the first layers of a model, each trained on one side of the pairs.

The difference of two of them, one trained on neutral and one on toxic sides, shows where a text
continues in a toxic way: their common knowledge of the corpus cancels. Training reads nothing else,
so perplexity can be measured on any prose.

Shapes: D is the width of the head's input, T the number of compared content tokens.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import inf, isfinite
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from torch import Tensor, nn

from converter.calibration.pairs import Pairs
from converter.checkpoints.architectures.library import quietly
from converter.errors import DataError, FitError, SourceError
from converter.models.batching import (
    BATCH_TOKENS,
    Batch,
    Encoder,
    Sentence,
    logit_positions,
    token_batches,
)
from converter.models.hooks import (
    StopForward,
    by_position,
    call,
    log_probability,
    memory_errors,
    only_chosen,
)
from converter.models.resident import LanguageModel
from converter.runtime import progress
from converter.runtime.memory import free_memory

_STEP = 128
"""Positions in a step of training, padding included. It is small, since each text is read only a
few times, and the number of steps matters.
"""

_CLIP = 1.0
"""Largest norm of a step's gradient."""

_COMPARED = 400
"""The most pairs on which the calibration models are compared: some 10,000 tokens."""

_HINT = "give --device cpu, or lower the depth"

_WHOLE = 100
"""Of a training, in per cent of its steps or of its time, whichever comes to an end first."""

_LAST = 0.1
"""Share of the steps over which the loss at the end is averaged."""


@dataclass(frozen=True, slots=True)
class Training:
    """How calibration models are trained.

    Attributes:
        depth: number of the model's first layers that they have.
        tokens: number of tokens that each must predict; texts are repeated as often as needed.
        rate: of AdamW at the first step; it falls to 0 linearly.
        seconds: time limit of the training; the rate falls with the time, too. The result then
            depends on the machine.
    """

    depth: int
    tokens: int
    rate: float
    seconds: float = inf


@dataclass(frozen=True, slots=True)
class Calibrated:
    """A calibration model.

    Attributes:
        module: in float32, in eval mode.
        losses: nats per token of its side, at the first step and at the end of training.
        tokens: number of tokens that it was trained to predict.
    """

    module: Any
    losses: tuple[float, float]
    tokens: int


@dataclass(frozen=True, slots=True)
class Calibration:
    """A calibration model as a method gets it.

    Attributes:
        tensors: name in the model -> the calibration model's tensor, float32 on the CPU.
        about: how it was made, as JSON.
    """

    tensors: Mapping[str, Tensor]
    about: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Contrast:
    """Sums, over the content tokens of pairs, of the input h of a model's head, and of the
    difference of the calibration models' inputs, d = t_neutral - t_toxic.

    Attributes:
        gram: sum of h h^T, (D, D) float64.
        cross: sum of h d^T, (D, D) float64.
        square: sum of d^T d.
        tokens: T.
        losses: ``neutral`` and ``toxic`` -> nats per token of that side, at the first step and at
            the end of training.
    """

    gram: Tensor
    cross: Tensor
    square: float
    tokens: int
    losses: dict[str, tuple[float, float]]


def contrast(model: LanguageModel, pairs: Pairs, training: Training, seed: int) -> Contrast:
    """Train a calibration model on each side of the pairs, and compare them on some of the pairs.

    It needs memory for the first layers, the embedding and the head twice in float32, and for
    AdamW's two moments of the layers. Equal inputs give equal bytes on one machine.

    Args:
        model: not spread over devices; it stays as it is.
        pairs: both sides of each.
        training: how.
        seed: of the order of the steps.

    Raises:
        DataError: no sentence has two tokens.
        FitError: the final loss is not a number.
        SourceError: the model's first layers cannot be run alone, or there is too little memory.
    """
    texts = {"neutral": [p.neutral for p in pairs.pairs], "toxic": [p.toxic for p in pairs.pairs]}
    _check_memory(model, training.depth, 2)
    with memory_errors("calibration models in training", _HINT):
        made = {side: calibrate(model, texts[side], training, seed, side) for side in texts}
        twins: list[Any] = [each.module for each in made.values()]
        encode = Encoder(model.tokenizer, model.module)
        width: int = twins[0].get_output_embeddings().weight.shape[1]
        gram, cross = torch.zeros(2, width, width, dtype=torch.float64)
        square, tokens = 0.0, 0
        step = -(-len(pairs.pairs) // _COMPARED)
        some = [encode.predicted(text) for side in texts.values() for text in side[::step]]
        batched = token_batches(some, BATCH_TOKENS, model.device)
        with progress.bar("compare", len(some), "text"), torch.inference_mode():
            for batch in batched:
                h, neutral, toxic = (_given_to_head(m, batch) for m in (model.module, *twins))
                d = neutral - toxic
                gram.addmm_(h.T, h)
                cross.addmm_(h.T, d)
                square, tokens = square + float(d.square().sum()), tokens + len(h)
                progress.advance(len(batch.rows))
    losses = {side: each.losses for side, each in made.items()}
    return Contrast(gram, cross, square, tokens, losses)


def calibrate(
    model: LanguageModel, texts: Sequence[str], training: Training, seed: int, side: str
) -> Calibrated:
    """Train a calibration model on some texts. Equal inputs give equal bytes on one machine.

    Args:
        model: not spread over devices; it stays as it is.
        texts: sentences.
        training: how.
        seed: of the order of the steps.
        side: the name of the texts, for the progress bar.

    Raises:
        As ``contrast``.
    """
    _check_memory(model, training.depth, 1)
    encode = Encoder(model.tokenizer, model.module)
    sentences = [encode.predicted(text) for text in texts]
    with memory_errors("a calibration model in training", _HINT):
        module = _first_layers(model, training.depth)
        with progress.bar(f"train {side}", _WHOLE, "%"):
            losses, tokens = _train(module, sentences, training, seed, model.device)
    return Calibrated(module, losses, tokens)


def _check_memory(model: LanguageModel, depth: int, copies: int) -> None:
    """Refuse models that do not fit: copies in float32, a gradient and two moments of one."""
    with _shortened(model, depth) as module:
        every = sum(p.numel() for p in module.parameters())
        trained = sum(p.numel() for p in _trainable(module))
    needed, free = 4 * (copies * every + 3 * trained), free_memory(model.device)
    if needed > free:
        raise SourceError(
            f"the calibration models do not fit in the memory of the {model.device}",
            expected=f"{needed / 1e9:.1f} GB or more available", found=f"{free / 1e9:.1f} GB",
            hint="lower the depth, or choose another method",
        )  # fmt: skip


def _first_layers(model: LanguageModel, depth: int) -> nn.Module:
    """A copy of a model's first layers in float32; the rest is never copied."""
    with _shortened(model, depth) as module:
        return copy.deepcopy(module).float()


@contextmanager
def _shortened(model: LanguageModel, depth: int) -> Iterator[nn.Module]:
    """Within this context, the model has only its first layers."""
    place = model.architecture.block.rpartition(".")[0]
    owner = model.module.get_submodule(place.rpartition(".")[0])
    name = place.rpartition(".")[2]
    layers: Any = getattr(owner, name)
    setattr(owner, name, layers[:depth])
    try:
        yield model.module
    finally:
        setattr(owner, name, layers)


def _given_to_head(module: Any, batch: Batch) -> Tensor:
    """The head's input at the content tokens of a batch, (n, D) float64 on the CPU."""
    seen: list[Tensor] = []

    def keep(head: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0])
        raise StopForward

    with module.get_output_embeddings().register_forward_pre_hook(keep), suppress(StopForward):
        call(module, batch)
    return by_position(seen[0], batch)[batch.content].cpu().double()


def _train(
    module: nn.Module, sentences: Sequence[Sentence], training: Training, seed: int, device: str
) -> tuple[tuple[float, float], int]:
    """Train a model to predict the content tokens of sentences.

    Returns:
        its losses, as in ``Calibrated``, and the number of predicted tokens.
    """
    batched = token_batches(sentences, min(_STEP, logit_positions(module)), device)
    order = _order([int((b.weights > 0).sum()) for b in batched], training.tokens, seed)
    losses, parameters, tokens = list[float](), _trainable(module), 0
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=training.rate, weight_decay=0.0)
    begun, moved = monotonic(), 0
    for step, (number, count) in enumerate(order):
        done = max(step / len(order), (monotonic() - begun) / training.seconds)
        if done >= 1:
            break
        batch = batched[number]
        with torch.enable_grad(), only_chosen(module, batch):
            loss = -log_probability(call(module, batch).logits, batch) / count
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, _CLIP)
        for group in optimizer.param_groups:
            group["lr"] = training.rate * (1 - done)
        optimizer.step()
        losses.append(loss.item())
        tokens += count
        progress.advance(int(done * _WHOLE) - moved)
        moved = int(done * _WHOLE)
    progress.advance(_WHOLE - moved)
    module.requires_grad_(False)
    module.zero_grad()  # gradients take memory, too
    end = losses[-max(int(_LAST * len(losses)), 1) :]
    last = sum(end) / len(end)
    if not isfinite(last):
        raise FitError(
            "a calibration model does not learn", expected="a finite loss", found=f"{last}",
            hint="lower -o rate",
        )  # fmt: skip
    return (losses[0], last), tokens


def _order(sizes: Sequence[int], tokens: int, seed: int) -> list[tuple[int, int]]:
    """The batch of each step, and its number of tokens: all batches in random order, repeated until
    enough tokens were predicted.
    """
    usable = [number for number, size in enumerate(sizes) if size]
    if not usable:
        raise DataError("no sentence of the pairs has two tokens, so none can be predicted")
    generator = torch.Generator().manual_seed(seed)
    order: list[tuple[int, int]] = []
    while tokens > 0:
        for place in torch.randperm(len(usable), generator=generator).tolist():
            if tokens > 0:
                order.append((usable[place], sizes[usable[place]]))
                tokens -= order[-1][1]
    return order


def _trainable(module: Any) -> list[nn.Parameter]:
    """All weights of a model except those of embeddings and the head."""
    frozen = [m for m in module.modules() if isinstance(m, nn.Embedding)]
    kept = {id(p) for m in (*frozen, module.get_output_embeddings()) for p in m.parameters()}
    return [p for p in module.parameters() if id(p) not in kept]


def save(module: Any, depth: int, dtype: torch.dtype, folder: Path) -> None:
    """Write a calibration model and its config like ``save_pretrained``, as a model of few layers.

    Raises OSError if the folder cannot be written.
    """
    config = module.config
    config.num_hidden_layers = depth
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:depth]
    with quietly():
        module.to(dtype).save_pretrained(folder)
