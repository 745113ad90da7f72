"""What tokens owe to what modules give: gradients of sums of log p, a batch at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import Tensor

from converter.models.batching import Batch, Sentence, logit_positions, token_batches
from converter.models.hooks import Modules, memory_errors
from converter.models.resident import Model, Pool


def gradients(
    model: Model, modules: Modules, batched: Sequence[Batch]
) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """``Model.gradients``, where memory may run out. Raises SourceError."""
    most = max((len(batch.rows) for batch in batched), default=0)
    with memory_errors(
        f"gradients of {most} sentences",
        hint="do without gradients: --method gloss-paper -o candidates=mean+svd "
        "-o ranking=mean-difference, or --method destein",
    ):
        yield from model.gradients(modules, batched)


def slopes(model: Model, modules: Modules, texts: Sequence[Sequence[Sentence]]) -> list[Pool]:
    """What the chosen tokens of each sentence owe to a constant that is added at every position.

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
