"""How probable a (larger) model finds continuations: do they make sense after their prompts?"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import exp
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converter.errors import DataError
from converter.models.batching import Sentence, first_token, num_positions
from converter.models.likelihood import log_probabilities
from converter.models.resident import Model


@dataclass(frozen=True, slots=True)
class Conditional:
    """Losses of continuations, (N,) each; N counts those that have a token at all.

    Attributes:
        nats: negative log-probability of each continuation given its prompt.
        tokens: of each continuation.
        prompts: the place of each one's prompt.
    """

    nats: NDArray[np.float64]
    tokens: NDArray[np.int64]
    prompts: NDArray[np.int64]

    @property
    def perplexity(self) -> float:
        """``exp(sum nats / sum tokens)``: every token counts the same."""
        return exp(self.nats.sum() / self.tokens.sum())

    @property
    def mean(self) -> float:
        """``1/N sum_i exp(nats_i / tokens_i)``: every continuation counts the same.

        The form of DExperts (https://arxiv.org/abs/2105.03023) and DeStein. A few continuations
        that make no sense decide it.
        """
        return float(np.exp(self.nats / self.tokens).mean())


def conditional_perplexity(
    model: Model,
    prompts: Sequence[str],
    continuations: Sequence[Sequence[str]],
) -> Conditional:
    """The loss of continuations given their prompts, over tokens of the continuations only.

    Prompt and continuation are encoded as one text, after a BOS; a token that has a character of
    the continuation belongs to it. What does not fit the model's positions is cut on the left.
    Empty continuations have no loss and are left out.

    Args:
        model: that judges; one that did not write the continuations.
        prompts: P texts.
        continuations: of each prompt, as ``generate`` returns them.

    Raises:
        DataError: all continuations are empty.
        SourceError: memory ran out.
    """
    positions = num_positions(model.module)
    sentences, counts, places = [], [], []
    for place, (prompt, texts) in enumerate(zip(prompts, continuations, strict=True)):
        for sentence, count in _encode(model.tokenizer, prompt, texts, positions):
            sentences.append(sentence)
            counts.append(count)
            places.append(place)
    if not sentences:
        raise DataError("conditional perplexity", expected="text", found="empty continuations")
    (found,) = log_probabilities(model, [sentences])
    nats = [-values[-count:].sum() for values, count in zip(found, counts, strict=True)]
    return Conditional(np.array(nats), np.array(counts), np.array(places))


def _encode(
    tokenizer: Any, prompt: str, texts: Sequence[str], positions: int | None
) -> Iterator[tuple[Sentence, int]]:
    """Each continuation after its prompt, and how many of its last tokens are its own."""
    for text in filter(None, texts):
        coded = tokenizer(
            prompt + text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        own = sum(end > len(prompt) for _, end in coded["offset_mapping"])
        ids = [first_token(tokenizer), *coded["input_ids"]][-(positions or 0) :]
        # the first token of what is left is not predicted
        if count := min(own, len(ids) - 1):
            yield Sentence(ids, [0.0] * len(ids)), count
