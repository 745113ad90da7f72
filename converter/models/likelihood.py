"""The log-probabilities of given tokens under a model, and their change by an edit.

Everything here is teacher-forced: the tokens are fixed, so two models are compared on the same
text, token by token. A few thousand tokens tell them apart; generation needs many more.
"""

from collections.abc import Hashable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from math import exp
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from converter.manifest import Estimate
from converter.models.batching import Batch, Sentence, logit_positions, token_batches
from converter.models.hooks import UNEDITED, Editing, Entered, memory_errors
from converter.models.pieces import Pieces, pieces_of
from converter.models.resident import Model
from converter.runtime import progress

LogProbabilities = Sequence[NDArray[np.float64]]
"""For each sentence of T tokens (T - 1,) values in nats; the i-th is about token i + 1."""

Words = Sequence[Sequence[tuple[int, ...]]]
"""For each sentence the words of interest, each the places of its tokens in the sentence's ids."""


_Groups = Sequence[Hashable] | None
"""The sampling unit of each sentence; None if each sentence is a unit."""


_HELD = 1 << 29
"""The most bytes kept of a layer's input, so that the layers below need not run again."""


@torch.inference_mode()
def entering(model: Model, texts: Sequence[Sequence[Sentence]], layer: int) -> Entered | None:
    """The input of a layer for texts, for ``log_probabilities`` to start from.

    None if no layer is below, it exceeds ``_HELD`` bytes, or layers pass on more than hidden
    states. Raises SourceError if memory runs out.
    """
    module: Any = model.module
    proof, embedding = model.architecture.proof, module.get_input_embeddings().weight
    tokens = sum(len(sentence.ids) for kind in texts for sentence in kind)
    nbytes = tokens * model.architecture.sizes.hidden_size * embedding.element_size()
    if layer == 0 or nbytes > _HELD or not (proof is None or proof.streams):
        return None
    batched, pieces = [batch for _, batch in _batched(model, texts)], pieces_of(model.module)
    if pieces is None:
        return _entering(model, batched, layer)
    names = [pieces.name("entered", layer, batch.ids, batch.mask) for batch in batched]
    if not all(name in pieces for name in names):
        made = _entering(model, batched, layer)
        lengths = torch.tensor([*made.lengths.items()], dtype=torch.int64)
        for name, state in zip(names, made.states, strict=True):
            pieces.put(name, {"state": state, "lengths": lengths})
        return made
    found = [pieces.get(name) for name in names]
    known = {int(n): int(length) for each in found for n, length in each["lengths"]}
    return Entered(layer, [each["state"].to(model.device) for each in found], known)


def _entering(model: Model, batched: Sequence[Batch], layer: int) -> Entered:
    """``Model.entering``, with a bar, and a SourceError if memory runs out."""
    with (
        memory_errors("held-out text", hint="give --device cpu"),
        progress.bar("lower layers", sum(len(batch.rows) for batch in batched), "text"),
    ):
        return model.entering(layer, batched)


def log_probabilities(
    model: Model, texts: Sequence[Sequence[Sentence]], entered: Entered | None = None
) -> list[LogProbabilities]:
    """The log-probability of every token after the first, given those before it.

    Args:
        model: with the hooks of an edit, or without.
        texts: sentences of several kinds, which go through the model together and are never in one
            batch; their weights are not used.
        entered: of ``entering`` for these texts, if nothing below that layer has changed.

    Returns:
        the values of each kind.

    Raises:
        SourceError: memory ran out.
    """
    return log_probabilities_under(model, UNEDITED, texts, entered)[0]


@torch.inference_mode()
def log_probabilities_under(
    model: Model,
    edits: Sequence[Editing],
    texts: Sequence[Sequence[Sentence]],
    entered: Entered | None = None,
) -> list[list[LogProbabilities]]:
    """``log_probabilities`` under each of several edits, bit for bit as one at a time.

    A streamed model reads its weights once for all of them; see ``Model.logits``. Batches that a
    stopped run has measured are not run again.
    """
    batched, pieces = _batched(model, texts), pieces_of(model.module)
    names = [_names(pieces, edit, batched) if pieces else [] for edit in edits]
    values = [
        {place: pieces.get(name)["values"] for place, name in enumerate(each) if name in pieces}
        if pieces
        else dict[int, Tensor]()
        for each in names
    ]
    alike: dict[tuple[int, ...], list[int]] = {}  # left batches -> the edits that need them
    for edit, known in enumerate(values):
        if left := tuple(place for place in range(len(batched)) if place not in known):
            alike.setdefault(left, []).append(edit)
    count = sum(len(who) * len(batched[n][1].rows) for left, who in alike.items() for n in left)
    with (
        memory_errors("held-out text", hint="give --device cpu"),
        progress.bar("reading texts", count, "text"),
    ):
        for left, who in alike.items():
            part = [batched[place][1] for place in left]
            start = entered and replace(entered, states=[entered.states[n] for n in left])
            logits_of = model.logits(part, start, [edits[edit] for edit in who])
            with closing(logits_of):  # an error must not leave an edit's hooks behind
                for number, logits in logits_of:
                    edit, place = who[number // len(part)], left[number % len(part)]
                    values[edit][place] = _log_probabilities(logits, batched[place][1])
                    if pieces:
                        pieces.put(names[edit][place], {"values": values[edit][place]})
    return [_by_sentence(texts, batched, each) for each in values]


def _names(pieces: Pieces, edit: Editing, batched: Sequence[tuple[int, Batch]]) -> list[str]:
    """The names of the log-probabilities of batches under an edit."""
    with edit():
        return [pieces.name("log p", batch.ids, batch.mask) for _, batch in batched]


def _by_sentence(
    texts: Sequence[Sequence[Sentence]],
    batched: Sequence[tuple[int, Batch]],
    values: Mapping[int, Tensor],
) -> list[LogProbabilities]:
    """The log-probabilities of batches, for each kind of text by sentence."""
    found: list[list[NDArray[np.float64]]] = [[np.empty(0)] * len(kind) for kind in texts]
    for place, (kind, batch) in enumerate(batched):
        lengths = (batch.mask.sum(1) - 1).tolist()
        for row, of_row in zip(batch.rows, torch.split(values[place], lengths), strict=True):
            found[kind][row] = of_row.numpy()
    return list(found)


def _log_probabilities(logits: Tensor, batch: Batch) -> Tensor:
    """The log-probabilities of all tokens but each sentence's first, float64, on the CPU."""
    lengths = batch.mask.sum(1).tolist()
    rows = [
        -torch.nn.functional.cross_entropy(
            scores[: length - 1].float(), ids[1:length].to(scores.device), reduction="none"
        )
        for length, scores, ids in zip(lengths, logits, batch.ids, strict=True)
    ]
    return torch.cat([row.double().cpu() for row in rows])


def _batched(model: Model, texts: Sequence[Sequence[Sentence]]) -> list[tuple[int, Batch]]:
    """The number of the kind of each batch, and the batch."""
    positions = logit_positions(model.module)
    return [
        (number, batch)
        for number, kind in enumerate(texts)
        for batch in token_batches(kind, positions, model.device)
    ]


@torch.inference_mode()
def divergences(
    before: Model,
    after: Model,
    edits: Sequence[Editing],
    sentences: Sequence[Sentence],
) -> list[LogProbabilities]:
    """How far the distribution of the next token moves at every position of texts, in nats.

        KL(before || after) = sum over tokens v of  p(v) (log p(v) - log q(v))

    Args:
        before: the unedited model, with distribution p.
        after: the edited model, with distribution q over the same tokens; it may be the same model.
        edits: of ``after``; ``before`` runs without.
        sentences: their weights are not used.

    Returns:
        for each edit, and each sentence of T tokens, (T - 1,) values, none for the last position.

    Raises:
        SourceError: memory ran out.
    """
    found = [[np.empty(0)] * len(sentences) for _ in edits]
    with (
        memory_errors("text for the divergence", hint="give --device cpu"),
        progress.bar("divergence", len(sentences) * (1 + len(edits)), "text"),
    ):
        for batch in token_batches(sentences, logit_positions(before.module), before.device):
            ((_, p),) = before.logits([batch])
            lengths = batch.mask.sum(1).tolist()
            for values, hooks in zip(found, edits, strict=True):
                with hooks():
                    ((_, q),) = after.logits([batch])
                for row, length, old, new in zip(batch.rows, lengths, p, q, strict=True):
                    values[row] = _divergence(old[: length - 1], new[: length - 1].to(old))
    return list(found)


def _divergence(old: Tensor, new: Tensor) -> NDArray[np.float64]:
    """KL divergence between two logits (T, V), (T,) in nats."""
    log_p, log_q = (x.float().log_softmax(1) for x in (old, new))
    each = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True)
    return each.sum(1).double().cpu().numpy()


def perplexity(values: LogProbabilities) -> float:
    """exp of the mean negative log-probability of a token; every token counts the same."""
    return exp(-sum(x.sum() for x in values) / sum(len(x) for x in values))


def perplexity_estimate(values: LogProbabilities) -> Estimate:
    """The same with a standard error."""
    losses = np.array([-x.sum() for x in values])
    return _exponential(_ratio(losses, np.array([len(x) for x in values]), None))


def perplexity_ratio(
    before: LogProbabilities, after: LogProbabilities, groups: _Groups = None
) -> Estimate:
    """Perplexity after an edit over that before, on the same tokens.

        exp(mean over tokens of (log p_before - log p_after))

    The error is that of a ratio estimator, carried through the exponential.
    """
    losses = np.array([(a - b).sum() for a, b in zip(before, after, strict=True)])
    return _exponential(_ratio(losses, np.array([len(x) for x in before]), groups))


def weighed(values: LogProbabilities, sentences: Sequence[Sentence]) -> LogProbabilities:
    """The values of the tokens after positions of positive weight, for each sentence."""
    return [
        x[np.array(sentence.weights[: len(x)]) > 0]
        for x, sentence in zip(values, sentences, strict=True)
    ]


def word_changes(
    before: LogProbabilities, after: LogProbabilities, words: Words
) -> list[list[float]]:
    """For each sentence, the change of log p of each of its words, in nats."""
    return [
        [float(sum(a[i - 1] - b[i - 1] for i in word)) for word in inside]
        for b, a, inside in zip(before, after, words, strict=True)
    ]


def mean_change(changes: Sequence[Sequence[float]], groups: _Groups = None) -> Estimate:
    """The mean change of a word's log-probability; every word counts the same."""
    return _ratio(np.array([sum(c) for c in changes]), np.array([len(c) for c in changes]), groups)


def teacher_forced(changes: Sequence[Sequence[float]], groups: _Groups = None) -> Estimate:
    """The mean over words of ``min(p_after / p_before, e)``: 1 is no effect, 0 is complete removal.

    If the words are in continuations drawn from the unedited model, this is the importance-weighted
    estimate of their frequency after the edit, in their old contexts. The cap prevents one word
    that has become probable from dominating the mean.
    """
    return mean_change([[exp(min(c, 1.0)) for c in inside] for inside in changes], groups)


def _ratio(sums: NDArray[np.float64], counts: NDArray[np.int64], groups: _Groups) -> Estimate:
    """sum(sums) / sum(counts) with its linearised standard error over groups; inf for one group."""
    if groups is not None:
        numbers: dict[Hashable, int] = {}
        place = np.array([numbers.setdefault(group, len(numbers)) for group in groups])
        sums = np.bincount(place, sums).astype(np.float64)
        counts = np.bincount(place, counts).astype(np.int64)
    total, units = counts.sum(), int((counts > 0).sum())
    mean = float(sums.sum() / total)
    spread = ((sums - mean * counts) ** 2).sum()
    error = np.sqrt(spread * units / (units - 1)) / total if units > 1 else np.inf
    return Estimate(value=mean, error=float(error))


def _exponential(mean: Estimate) -> Estimate:
    with np.errstate(over="ignore"):
        value = float(np.exp(mean.value))
    return Estimate(value=value, error=value * mean.error)
