"""Detoxify, the scorer of most papers: BERT models trained on the Jigsaw comments.

The package fetches its weights from GitHub on first use, as pickles. The same weights are on the
Hub: ``classifier:unitary/toxic-bert#toxic`` is ``detoxify:original`` without the package.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray

from converter.errors import OptionError, SourceError
from converter.evaluation.scorers import score_written
from converter.manifest import ScorerOrigin

MODELS = ("original", "unbiased", "multilingual", "original-small", "unbiased-small")

BATCH = 32
"""Texts that are scored at once; the package pads all it is given to the longest."""


@dataclass(frozen=True, slots=True)
class Detoxify:
    """See ``Scorer``."""

    predict: Callable[[list[str]], dict[str, Any]]
    origin: ScorerOrigin
    title: str
    paper: str = "https://github.com/unitaryai/detoxify"

    def score(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """Its ``toxicity``, (N,); 0 for white space."""

        def score(written: list[str]) -> list[float]:
            parts = [written[i : i + BATCH] for i in range(0, len(written), BATCH)]
            # of a single text it gives a number instead of a list
            found = [np.atleast_1d(self.predict(part)["toxicity"]) for part in parts]
            return [float(value) for part in found for value in part]

        return score_written(texts, score)


def load(argument: str, device: str) -> Detoxify:
    """Load one of the package's models.

    Args:
        argument: one of ``MODELS``; empty for ``original``.
        device: to run it on.

    Raises:
        OptionError: no such model, or the package is not installed.
        SourceError: its weights cannot be fetched or loaded.
    """
    model = argument or "original"
    if model not in MODELS:
        raise OptionError("--scorer detoxify", expected=" or ".join(MODELS), found=model)
    try:
        import detoxify
    except ImportError as error:
        raise OptionError(
            "--scorer detoxify needs the package detoxify",
            hint="pip install 'gloss-convert[detoxify]'",
        ) from error
    try:
        loaded = detoxify.Detoxify(model, device=device)
    except Exception as error:  # whatever comes of a download, a pickle and a model
        raise SourceError(
            f"the model {model} of detoxify cannot be loaded",
            found=f"{type(error).__name__}: {error}",
            hint="it is fetched from GitHub; its twin on the Hub is "
            "--scorer classifier:unitary/toxic-bert#toxic",
        ) from error
    origin = ScorerOrigin(name="detoxify", version=version("detoxify"), model=model)
    return Detoxify(loaded.predict, origin, f"Detoxify {model}")
