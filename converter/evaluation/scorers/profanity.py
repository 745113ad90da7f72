"""The probability of profanity by a linear model of word counts; quick, small, English.

Of the package alt-profanity-check, whose model is a pickle: it pins the scikit-learn that wrote it.
It knows words rather than meanings, and ordinary prose gets 0.1 to 0.4: compare its means, and do
not read them as shares of toxic text.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np
from numpy.typing import NDArray

from converter.errors import OptionError
from converter.evaluation.scorers import no_argument, score_written
from converter.manifest import ScorerOrigin


@dataclass(frozen=True, slots=True)
class Profanity:
    """See ``Scorer``."""

    predict: Callable[[list[str]], NDArray[np.float64]]
    origin: ScorerOrigin
    title: str = "profanity-check"
    paper: str = "https://github.com/dimitrismistriotis/alt-profanity-check"

    def score(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """Probabilities of profanity, (N,); 0 for white space."""
        return score_written(texts, self.predict)


def load(argument: str, device: str) -> Profanity:
    """Load the package's model. It runs on the CPU whatever the device.

    Raises:
        OptionError: an argument is given, or the package is not installed.
    """
    no_argument("profanity", argument)
    try:
        from profanity_check import predict_prob
    except ImportError as error:
        raise OptionError(
            "--scorer profanity needs the package alt-profanity-check",
            hint="pip install 'gloss-convert[eval]'",
        ) from error
    name = "alt-profanity-check"
    return Profanity(predict_prob, ScorerOrigin(name=name, version=version(name)))
