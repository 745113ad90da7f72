"""How probable models find continuations that were written before, and their toxic words."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converter.calibration.word_list import WordList
from converter.errors import DataError
from converter.manifest import WordsMeasured
from converter.models.batching import Sentence, beginning, encode, num_positions, outside
from converter.models.likelihood import (
    LogProbabilities,
    Words,
    log_probabilities,
    mean_change,
    perplexity_ratio,
    teacher_forced,
    weighed,
    word_changes,
)
from converter.models.resident import LanguageModel, Model


@dataclass(frozen=True, slots=True)
class Passages:
    """Continuations of prompts drawn once from the unedited model, with their toxic words.

    They are the fixed sequences of the teacher-forced estimate.

    Attributes:
        sentences: prompt and continuation, after what the tokenizer puts before a text; with weight
            on the positions that predict a token of the continuation that is in no listed word.
        words: places of the tokens of each word of the word list in each continuation.
        prompts: the place of each one's prompt; continuations of one prompt are one sampling unit.
        before: log-probabilities under the unedited model.
        texts: the continuations.
        spans: places of the words in these texts.
    """

    sentences: Sequence[Sentence]
    words: Words
    prompts: Sequence[int]
    before: LogProbabilities
    texts: Sequence[str]
    spans: Sequence[Sequence[tuple[int, int]]]

    @property
    def toxic_words(self) -> int:
        """The number of toxic words."""
        return sum(map(len, self.words))

    @property
    def context_tokens(self) -> int:
        """The number of other tokens of the continuations."""
        return sum(sum(weight > 0 for weight in each.weights[:-1]) for each in self.sentences)


def find_passages(
    model: LanguageModel, prompts: Sequence[str], drawn: Sequence[Sequence[str]], words: WordList
) -> Passages | None:
    """The passages with toxic words among continuations ``drawn`` by the unedited ``model``, or
    None.
    """
    positions = num_positions(model.module)
    coded = [
        (place, text, *_listed_words(model.tokenizer, prompt, text, words, positions))
        for place, (prompt, group) in enumerate(zip(prompts, drawn, strict=True))
        for text in group
    ]
    kept = [each for each in coded if each[3]]
    if not kept:
        return None
    places, texts, sentences, found = zip(*kept, strict=True)
    (before,) = log_probabilities(model, [sentences])
    words_of = [list(each.values()) for each in found]
    return Passages(sentences, words_of, places, before, texts, [[*each] for each in found])


def weigh_passages(model: Model, passages: Passages) -> LogProbabilities:
    """The log-probabilities of the passages under a model in its present state."""
    (after,) = log_probabilities(model, [passages.sentences])
    return after


def passages_measured(passages: Passages, after: LogProbabilities) -> WordsMeasured:
    """The measures that follow from log-probabilities of ``weigh_passages``."""
    changes = word_changes(passages.before, after, passages.words)
    others, kept = (weighed(x, passages.sentences) for x in (passages.before, after))
    return WordsMeasured(
        toxic_change=mean_change(changes, passages.prompts),
        teacher_forced=teacher_forced(changes, passages.prompts),
        context_ratio=perplexity_ratio(others, kept, passages.prompts)
        if any(map(len, others))
        else None,
    )


def _listed_words(
    tokenizer: Any, prompt: str, continuation: str, words: WordList, positions: int | None
) -> tuple[Sentence, dict[tuple[int, int], tuple[int, ...]]]:
    """Prompt and continuation as one sentence, and where the continuation's listed words are: place
    in the continuation -> places of its tokens in the sentence.

    What does not fit the model's positions is cut on the left.
    """
    coded = encode(tokenizer, prompt + continuation, beginning(tokenizer))
    cut = max(len(coded.ids) - positions, 0) if positions else 0
    spans = [(a + len(prompt), b + len(prompt)) for a, b in words.spans(continuation)]
    found = {
        (a - len(prompt), b - len(prompt)): tuple(
            i - cut for i, (s, e) in enumerate(coded.offsets) if s < b and e > a
        )
        for a, b in spans
    }
    others = outside(coded, [(0, len(prompt)), *spans], 1)
    kept = {span: word for span, word in found.items() if word and word[0] > 0}
    return Sentence(coded.ids[cut:], others[cut:]), kept


def conditional_losses(
    model: Model, prompts: Sequence[str], continuations: Sequence[Sequence[str]]
) -> NDArray[np.float64]:
    """The probability of continuations after their prompts, as a measure of sense.

    Only tokens of the continuations are counted. Prompt and continuation are encoded as one text,
    after a BOS or the like; a token that has a character of the continuation belongs to it. What
    does not fit the model's positions is cut on the left. Empty continuations are left out.

    Args:
        model: the judge; a larger model that did not write the continuations.
        continuations: of each of P prompts, as ``generate`` returns them.

    Returns:
        (P, 2), for each prompt the negative log-probability of its continuations, in nats, and
        their number of tokens. The perplexity is exp of the ratio of the two sums.

    Raises:
        DataError: all continuations are empty.
        SourceError: memory ran out.
    """
    positions = num_positions(model.module)
    coded = [
        (place, *found)
        for place, (prompt, texts) in enumerate(zip(prompts, continuations, strict=True))
        for found in _after_prompt(model.tokenizer, prompt, texts, positions)
    ]
    if not coded:
        raise DataError("conditional perplexity", expected="text", found="empty continuations")
    (found,) = log_probabilities(model, [[sentence for _, sentence, _ in coded]])
    losses = np.zeros((len(prompts), 2))
    for (place, _, count), values in zip(coded, found, strict=True):
        losses[place] += -values[-count:].sum(), count
    return losses


def _after_prompt(
    tokenizer: Any, prompt: str, texts: Sequence[str], positions: int | None
) -> Iterator[tuple[Sentence, int]]:
    """Each continuation after its prompt, and the number of its own last tokens."""
    begin = beginning(tokenizer, needed=True)
    for text in filter(None, texts):
        coded = encode(tokenizer, prompt + text, begin)
        own = sum(end > len(prompt) for _, end in coded.offsets)
        ids = coded.ids[-(positions or 0) :]
        # the first remaining token is not predicted
        if count := min(own, len(ids) - 1):
            yield Sentence(ids), count
