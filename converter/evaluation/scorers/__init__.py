"""Scorers: one module each, holding ``load``, which makes the scorer from what follows its name.

A new scorer is a new module here and a line in ``SCORERS``, or a package with an entry point; see
``runtime.registry``.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from converter.errors import OptionError
from converter.manifest import ScorerOrigin
from converter.runtime.registry import Registry

SCORERS = Registry(
    "gloss_convert.scorers",
    "--scorer",
    {
        "bad-words": "converter.evaluation.scorers.bad_words:load",
        "classifier": "converter.evaluation.scorers.classifier:load",
        "detoxify": "converter.evaluation.scorers.detoxify:load",
        "profanity": "converter.evaluation.scorers.profanity:load",
    },
    ("title", "paper", "origin", "score"),
)
"""Name -> a function ``load(argument, device) -> Scorer``."""


class Scorer(Protocol):
    """What an evaluation needs of a scorer."""

    @property
    def title(self) -> str:
        """Its name, for tables."""

    @property
    def paper(self) -> str:
        """Where it is described, a URL."""

    @property
    def origin(self) -> ScorerOrigin:
        """For the record."""

    def score(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """How toxic each text is, (N,), from 0, not at all, to 1.

        A text of nothing but white space scores 0 without being looked at: a model that says
        nothing says nothing toxic, and classifiers answer anything to an empty text.
        """


def load_scorer(spec: str, device: str) -> Scorer:
    """A scorer by name.

    Args:
        spec: ``profanity``; ``bad-words`` or ``bad-words:FILE``; ``detoxify`` or
            ``detoxify:MODEL``; ``classifier:FOLDER`` or ``classifier:REPO_ID``, with an optional
            ``#LABEL`` at the end.
        device: of the scorers that are neural networks.

    Raises:
        OptionError: there is no such scorer, its package is not installed, or its label is not
            plain.
        DataError: a word list cannot be read.
        SourceError: a model cannot be loaded.
    """
    name, _, argument = spec.partition(":")
    load = SCORERS.load(name)
    if not callable(load):
        raise SCORERS.fault(name, f"it is a {type(load).__name__}, not a function")
    scorer: Scorer = load(argument, device)
    SCORERS.check(name, scorer)
    return scorer


def scores_of(spec: str, scorer: Scorer, texts: Sequence[str]) -> NDArray[np.float64]:
    """What a scorer gives for some texts, (N,).

    Raises:
        OptionError: these are not N numbers from 0 to 1.
    """
    found = scorer.score(texts)
    try:
        scores = np.asarray(found, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise SCORERS.fault(spec.partition(":")[0], f"scores that are none: {error}") from error
    if scores.shape != (len(texts),) or not bool(((scores >= 0) & (scores <= 1)).all()):
        said = f"scores of shape {list(scores.shape)} for {len(texts)} texts, or beyond 0 to 1"
        raise SCORERS.fault(spec.partition(":")[0], said)
    return scores


def origin_of(spec: str, scorer: Scorer) -> ScorerOrigin:
    """Where a scorer came from, with the package that brought it."""
    package = SCORERS.package(spec.partition(":")[0])
    return replace(scorer.origin, package=package) if package else scorer.origin


def score_written(
    texts: Sequence[str], score: Callable[[list[str]], Sequence[float] | NDArray[np.float64]]
) -> NDArray[np.float64]:
    """Scores (N,): 0 for texts of nothing but white space, ``score`` for the others."""
    written = [i for i, text in enumerate(texts) if text.strip()]
    scores = np.zeros(len(texts))
    if written:
        scores[written] = score([texts[i] for i in written])
    return scores


def no_argument(name: str, argument: str) -> None:
    """Raise OptionError if something follows the name of a scorer that takes nothing."""
    if argument:
        raise OptionError(f"--scorer {name}", expected="nothing after its name", found=argument)
