"""Whether a text has a word of a list of offensive words, or a starred one like ``f*ck``.

The crudest scorer and the plainest: what it counts can be read. It sees no toxicity without such a
word, and the list is the one that finds the toxic words of the pairs, so it flatters an edit.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from msgspec.structs import asdict
from numpy.typing import NDArray

from converter.calibration.word_list import WordList, load_words
from converter.evaluation.scorers import score_written
from converter.manifest import ScorerOrigin


@dataclass(frozen=True, slots=True)
class BadWords:
    """See ``Scorer``."""

    words: WordList
    title: str = "bad words"
    paper: str = "https://github.com/snguyenthanh/better_profanity"

    @property
    def origin(self) -> ScorerOrigin:
        """The list's own."""
        return ScorerOrigin(**asdict(self.words.origin), sha256=self.words.sha256)

    def score(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """1 for a text with such a word, 0 for another, (N,)."""
        return score_written(
            texts, lambda written: [float(bool(self.words.spans(text))) for text in written]
        )


def load(argument: str, device: str) -> BadWords:
    """Read a word list. The device is not used.

    Args:
        argument: as for ``load_words``; empty for the built-in list.
        device: not used.

    Raises:
        DataError: the file cannot be read or holds no words.
    """
    return BadWords(load_words(argument or "builtin"))
