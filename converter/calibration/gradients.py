"""Gradients of sums of log p with respect to modules' outputs, a batch at a time."""

import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from torch import Tensor

from converter.checkpoints.safetensors.header import to_bytes
from converter.models.batching import Batch, Sentence, logit_positions, token_batches
from converter.models.hooks import Modules, memory_errors
from converter.models.resident import Model, Pool
from converter.models.streamed_memory import HiddenStates
from converter.runtime import progress
from converter.runtime.cache import cache_folder

_IN_MEMORY, _ON_DISK = 1 << 26, 1 << 34
"""Bytes of f and g that are kept: in memory; and in all, if the disk has room."""

Found = Iterator[tuple[int, int, Tensor, Tensor]]
"""The number of a batch, a layer, f and g; see ``Model.gradients``."""

Take = Callable[[Model, Modules, Sequence[Batch]], Found]
"""``gradients``, or a ``Remembered``."""


def gradients(model: Model, modules: Modules, batched: Sequence[Batch]) -> Found:
    """``Model.gradients``, with a SourceError if memory runs out."""
    most = max((len(batch.rows) for batch in batched), default=0)
    with (
        memory_errors(
            f"gradients of {most} sentences",
            hint="do without gradients: --method gloss-paper -o candidates=mean+svd "
            "-o ranking=mean-difference, or --method destein",
        ),
        progress.bar("gradients", sum(len(batch.rows) for batch in batched), "text"),
    ):
        yield from model.gradients(modules, batched)


class Remembered:
    """``gradients`` of one model and its modules that runs no batch twice.

    The results of a batch go to a file, and are read from it when the batch is needed again. They
    come layer by layer, so that only one layer's sums are in memory.
    """

    def __init__(self, states: HiddenStates) -> None:
        self._states = states
        self._layers: dict[bytes, list[int]] = {}

    def __call__(self, model: Model, modules: Modules, batched: Sequence[Batch]) -> Found:
        keys = [_key(batch) for batch in batched]
        if all(key in self._layers for key in keys):
            yield from self._read(batched, keys)
            return
        layers: dict[bytes, list[int]] = {key: [] for key in keys}
        for number, layer, f, g in gradients(model, modules, batched):
            key = keys[number]
            self._states.put((key, layer, "f"), f)
            self._states.put((key, layer, "g"), g)
            layers[key].append(layer)
            yield number, layer, f, g
        self._layers |= layers

    def _read(self, batched: Sequence[Batch], keys: Sequence[bytes]) -> Found:
        order = self._layers[keys[0]] if keys else []
        for layer in progress.each(order, "moments", "layer"):
            for number, (batch, key) in enumerate(zip(batched, keys, strict=True)):
                device = str(batch.ids.device)
                f, g = (self._states.get((key, layer, which), device) for which in "fg")
                yield number, layer, f, g


def _key(batch: Batch) -> bytes:
    """A key that two batches share if their tokens and chosen tokens are the same."""
    parts = (batch.ids, batch.mask, batch.weights)
    return hashlib.sha256(b"".join(bytes(to_bytes(x.cpu())) for x in parts)).digest()


@contextmanager
def remembering(model: Model, modules: Modules, batched: Sequence[Batch]) -> Iterator[Take | None]:
    """A ``Remembered`` for these batches, or None if it would need too much disk."""
    folder, width = cache_folder(), model.architecture.sizes.hidden_size
    tokens = sum(batch.ids.numel() for batch in batched)
    nbytes = 2 * 4 * tokens * width * len(modules)
    there = next(place for place in (folder, *folder.absolute().parents) if place.is_dir())
    if nbytes > min(_ON_DISK, shutil.disk_usage(there).free // 2 + _IN_MEMORY):
        yield None
        return
    with HiddenStates(_IN_MEMORY, folder) as states:
        yield Remembered(states)


def slopes(model: Model, modules: Modules, texts: Sequence[Sequence[Sentence]]) -> list[Pool]:
    """How much the chosen tokens of each sentence owe to a constant added at every position.

        g_i = gradient, with respect to b, of the sum of log p(chosen tokens of sentence i),
              where each module gives f + b in place of f

    It is the sum over positions of the gradient with respect to f, so no b is needed.

    Args:
        model: not edited; its weights must not require gradients.
        modules: layer -> those whose output is f, together if there are several.
        texts: sentences, each with a token to choose.

    Returns:
        for each text a pool with, by layer, g (N, D) float32 on the CPU, rows in the order of its
        sentences.
    """
    positions = logit_positions(model.module)
    batched = [
        (place, batch)
        for place, sentences in enumerate(texts)
        for batch in token_batches(sentences, positions, model.device)
    ]
    pools = [Pool(len(sentences)) for sentences in texts]
    for number, layer, _, g in gradients(model, modules, [batch for _, batch in batched]):
        place, batch = batched[number]
        pools[place](replace(batch, weights=batch.mask.to(g)), layer, g)
    return pools
