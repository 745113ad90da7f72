"""What tokens owe to what layers write: outer products of activations and gradients."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from converter.models.batching import Batch, Sentence, logit_positions, token_batches
from converter.models.hooks import memory_errors
from converter.models.resident import Model

Text = tuple[Sequence[Sentence], int | None]
"""Sentences, and the positions of the pieces that they are cut into, if they are."""


def causal_moments(
    model: Model,
    modules: Mapping[int, str],
    sentences: Sequence[Sentence],
) -> Iterator[tuple[int, Tensor]]:
    """How much chosen tokens owe, to first order, to each direction of what a layer writes.

        A_l = (M + M^T) / 2,   M = 1/n  sum over tokens of  f g^T
        g   = gradient, with respect to f, of the sum of log p(chosen tokens)

    f (D,) is what the layer's FFN writes at a token. Removing u u^T from f at every token lowers
    the mean log-probability of the n chosen tokens by ``u^T A_l u``, to first order and in nats.
    The gradient with respect to weights is not needed, so the memory is that of a forward pass
    whose activations are kept.

    Args:
        model: not edited; its weights must not require gradients.
        modules: layer -> module whose output is f.
        sentences: a positive weight marks a position whose next token is chosen.

    Yields:
        layers and A_l (D, D) float32 on the CPU: each when it is complete, so that those of a
        streamed model are never all there.

    Raises:
        SourceError: the GPU is out of memory.
    """
    sums: dict[int, Tensor] = {}
    seen = Counter[int]()
    count = sum(w > 0 for s in sentences for w in s.weights)
    batched = token_batches(sentences, logit_positions(model.module), model.device)
    for number, layer, f, g in _gradients(model, modules, batched):
        content = batched[number].content.to(f.device)
        if layer not in sums:
            sums[layer] = torch.zeros(f.shape[-1], f.shape[-1], device=f.device)
        sums[layer].addmm_(f[content].T, g[content])
        seen[layer] += 1
        if seen[layer] == len(batched):
            m = sums.pop(layer)
            yield layer, ((m + m.T) / (2 * max(count, 1))).cpu()


def moments_within(
    model: Model,
    modules: Mapping[int, str],
    texts: Sequence[Text],
    directions: Tensor,
) -> list[Tensor]:
    """The same, of every sentence by itself, summed over layers, and seen in a few directions.

        M_i = sum over layers of  V^T (f g^T + g f^T) V / 2,   f and g as above

    For U = V X with orthonormal X (K, R), ``tr X^T M_i X`` is what the chosen tokens of sentence i
    lose together if the layers no longer write along U, to first order and in nats.

    Args:
        model, modules: as above.
        texts: go through the model together; every sentence has a token to choose. Those with a
            number of positions are cut into pieces of so many, and each piece has a moment: what
            the sentence loses if nothing is written along U there.
        directions: V (D, K), orthonormal columns.

    Returns:
        for each text (n, K, K) float32 on the CPU, n sentences or pieces, in their order.
    """
    positions = logit_positions(model.module)
    batched = [
        (place, piece or batch.ids.shape[1], batch)
        for place, (sentences, piece) in enumerate(texts)
        for batch in token_batches(sentences, positions, model.device)
    ]
    sums: dict[int, Tensor] = {}
    found = _gradients(model, modules, [batch for _, _, batch in batched])
    for number, _, f, g in found:
        _, piece, batch = batched[number]
        V, content = directions.to(f), batch.content.to(f.device)[..., None]
        product = _pieces((f * content) @ V, piece).mT @ _pieces(g @ V, piece)
        sums[number] = sums.get(number, 0) + product.cpu()
    moments: list[list[Tensor]] = [[] for _ in texts]
    owners: list[list[Tensor]] = [[] for _ in texts]
    for number, (place, piece, batch) in enumerate(batched):
        filled = _pieces(batch.content[..., None], piece).flatten(1).any(1).cpu()
        moments[place].append(((sums[number] + sums[number].mT) / 2)[filled])
        rows = torch.tensor(batch.rows).repeat_interleave(-(-batch.ids.shape[1] // piece))
        owners[place].append(rows[filled])
    orders = [torch.cat(rows).argsort(stable=True) for rows in owners]
    return [torch.cat(part)[order] for part, order in zip(moments, orders, strict=True)]


def _pieces(x: Tensor, positions: int) -> Tensor:
    """(B, T, K) cut into pieces of so many positions, the last one padded: (-1, positions, K)."""
    rest = (0, 0, 0, -x.shape[1] % positions)
    return nn.functional.pad(x, rest).view(-1, positions, x.shape[2])


def _gradients(
    model: Model, modules: Mapping[int, str], batched: Sequence[Batch]
) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """``Model.gradients``, where memory may run out. Raises SourceError."""
    most = max((len(batch.rows) for batch in batched), default=0)
    with memory_errors(
        f"gradients of {most} sentences",
        hint="do without gradients: -o basis=candidates "
        "-o candidates=mean+svd -o ranking=mean-difference",
    ):
        yield from model.gradients(modules, batched)
