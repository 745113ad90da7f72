"""Gradients of sums of log p with respect to modules' outputs, a batch at a time."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice

from torch import Tensor

from converter.errors import FitError
from converter.models.batching import Batch, Sentence, logit_positions, token_batches
from converter.models.hooks import Modules, memory_errors
from converter.models.pieces import Pieces, pieces_for
from converter.models.resident import LanguageModel, Model, Pool
from converter.runtime import progress

_ON_DISK = 1 << 35
"""The most bytes of f and g that are kept, if the disk has room."""

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

    The results of a batch are pieces, one for each layer. They are read when the batch is needed
    again, layer by layer, so that only one layer's sums are in memory; and by the next run of the
    same command, if this one is stopped.

    Args:
        pieces: of the model.
    """

    def __init__(self, pieces: Pieces) -> None:
        self._pieces = pieces
        self._used = set[str]()

    def __call__(self, model: Model, modules: Modules, batched: Sequence[Batch]) -> Found:
        names = [self._name(modules, batch) for batch in batched]
        every = {name: [f"{name}.{layer}" for layer in modules] for name in names}
        self._used.update(*every.values())
        kept = {name for name, parts in every.items() if all(p in self._pieces for p in parts)}
        resident = isinstance(model, LanguageModel)
        if len(kept) == len(every):
            layers = [*modules] if resident else sorted(modules, reverse=True)  # as they came
            for layer in progress.each(layers, "moments", "layer"):
                for number, name in enumerate(names):
                    yield self._read(number, name, layer, batched)
            return
        if not resident:  # all batches of a layer come together
            kept = set()
        fresh = self._run(model, modules, batched, names, kept)
        for number, name in enumerate(names if kept else ()):
            if name in kept:
                yield from (self._read(number, name, layer, batched) for layer in modules)
            else:  # all layers of a batch come together
                yield from islice(fresh, len(modules))
        yield from fresh

    def _run(
        self,
        model: Model,
        modules: Modules,
        batched: Sequence[Batch],
        names: Sequence[str],
        kept: Collection[str],
    ) -> Found:
        """Run the batches that are not kept, and keep them."""
        left = [number for number, name in enumerate(names) if name not in kept]
        for place, layer, f, g in gradients(model, modules, [batched[n] for n in left]):
            number = left[place]
            self._pieces.put(f"{names[number]}.{layer}", {"f": f, "g": g})
            yield number, layer, f, g

    def _name(self, modules: Modules, batch: Batch) -> str:
        """The name of a batch, by its tokens and its chosen tokens."""
        parts = batch.ids, batch.mask, batch.weights
        return self._pieces.name("f and g", *parts, sorted(modules.items()))

    def _read(
        self, number: int, name: str, layer: int, batched: Sequence[Batch]
    ) -> tuple[int, int, Tensor, Tensor]:
        found = self._pieces.get(f"{name}.{layer}")
        f, g = (found[which].to(batched[number].ids.device) for which in "fg")
        return number, layer, f, g

    def drop(self) -> None:
        """Delete all pieces."""
        for name in self._used:
            self._pieces.drop(name)


@contextmanager
def remembering(model: Model, modules: Modules, batched: Sequence[Batch]) -> Iterator[Take | None]:
    """A ``Remembered`` for these batches, or None if it would need too much disk."""
    width, tokens = model.architecture.sizes.hidden_size, sum(b.ids.numel() for b in batched)
    nbytes = 2 * 4 * tokens * width * len(modules)
    with pieces_for(model.module) as pieces:
        if nbytes > min(_ON_DISK, pieces.room()):
            yield None
            return
        remembered = Remembered(pieces)
        try:
            yield remembered
        except FitError:  # the same run would meet it again
            remembered.drop()
            raise
        remembered.drop()


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
