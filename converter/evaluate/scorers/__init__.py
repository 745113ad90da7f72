"""Scorers: one module each, holding ``load``, which makes the scorer from what follows its name.

A new scorer is a new module here; nothing else has to know its name. A ``_`` in the module's name
is a ``-`` in the scorer's.
"""

import pkgutil
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from converter.errors import OptionError
from converter.manifest import ScorerOrigin


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


def scorer_names() -> list[str]:
    """The scorers there are."""
    return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__))


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
    if name not in scorer_names():
        raise OptionError("--scorer", expected=" or ".join(scorer_names()), found=name)
    module = import_module(f"{__name__}.{name.replace('-', '_')}")
    scorer: Scorer = module.load(argument, device)
    return scorer


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
