"""The fixed sequences of the teacher-forced estimate."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from converter.calibration.word_list import WordList
from converter.evaluation.generation import generate
from converter.models.batching import Sentence, num_positions
from converter.models.likelihood import LogProbabilities, Words, log_probabilities
from converter.models.resident import LanguageModel


@dataclass(frozen=True, slots=True)
class Passages:
    """Continuations of prompts drawn once from the unedited model, with their toxic words.

    Attributes:
        sentences: prompt and continuation, encoded as the tokenizer does it by default.
        words: places of the tokens of each word of the word list in each continuation.
        prompts: the place of each one's prompt; continuations of one prompt are one sampling unit.
        before: log-probabilities under the unedited model.
    """

    sentences: Sequence[Sentence]
    words: Words
    prompts: Sequence[int]
    before: LogProbabilities

    @property
    def count(self) -> int:
        """Toxic words."""
        return sum(len(w) for w in self.words)


def draw_passages(
    model: LanguageModel,
    prompts: Sequence[str],
    words: WordList,
    *,
    samples: int,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
) -> Passages | None:
    """The fixed sequences of the teacher-forced estimate; None if there is no toxic word in them.

    They are sampled at temperature 1 from the whole distribution (top_p = 1), so that the mean of
    p_after / p_before over their toxic words is an importance-weighted estimate.
    """
    drawn = generate(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        samples=samples,
        top_p=1.0,
        batch_size=batch_size,
        seed=seed,
    )
    positions = num_positions(model.module)
    coded = [
        (place, *_encode(model.tokenizer, prompt, text, words, positions))
        for place, (prompt, group) in enumerate(zip(prompts, drawn, strict=True))
        for text in group
    ]
    kept = [(place, sentence, found) for place, sentence, found in coded if found]
    if not kept:
        return None
    places, sentences, found = zip(*kept, strict=True)
    (before,) = log_probabilities(model, [sentences])
    return Passages(sentences, found, places, before)


def _encode(
    tokenizer: Any, prompt: str, continuation: str, words: WordList, positions: int | None
) -> tuple[Sentence, list[tuple[int, ...]]]:
    """Prompt and continuation as one sentence, and where its listed words are.

    What does not fit the model's positions is cut on the left.
    """
    coded = tokenizer(prompt + continuation, return_offsets_mapping=True)
    ids, offsets = coded["input_ids"], coded["offset_mapping"]
    cut = max(len(ids) - positions, 0) if positions else 0
    found = []
    for start, end in words.spans(continuation):
        a, b = start + len(prompt), end + len(prompt)
        found.append(tuple(i - cut for i, (s, e) in enumerate(offsets) if s < b and e > a))
    return Sentence(ids[cut:]), [word for word in found if word and word[0] > 0]
