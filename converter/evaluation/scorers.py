"""Scorers of toxicity, by name.

A new one is a function ``load(argument, device)`` that returns a ``Scorer``, and a line in
``known.SCORERS``, or a package with an entry point; see ``runtime.registry``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np
from msgspec.structs import asdict, replace
from numpy.typing import NDArray

from converter.calibration.word_list import load_words
from converter.errors import OptionError, SourceError
from converter.evaluation.known import SCORERS
from converter.manifest import ScorerOrigin


@dataclass(frozen=True, slots=True)
class Scorer:
    """A scorer of texts.

    Attributes:
        title: its name, for tables.
        paper: where it is described, a URL.
        origin: for the record.
        predict: N >= 1 texts -> their toxicities, (N,), from 0 to 1.
    """

    title: str
    paper: str
    origin: ScorerOrigin
    predict: Callable[[list[str]], Sequence[float] | NDArray[np.float64]]

    def score(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """The toxicity of each text, (N,).

        An empty or blank text scores 0 without the classifier, whose answer to it would be
        arbitrary.
        """
        written = [i for i, text in enumerate(texts) if text.strip()]
        scores = np.zeros(len(texts))
        if written:
            scores[written] = self.predict([texts[i] for i in written])
        return scores


def load_scorer(spec: str, device: str) -> Scorer:
    """A scorer by name.

    Args:
        spec: ``profanity``; ``bad-words`` or ``bad-words:FILE``; ``detoxify`` or
            ``detoxify:MODEL``; ``classifier:FOLDER`` or ``classifier:REPO_ID``, with an optional
            ``#LABEL`` at the end.
        device: of the scorers that are neural networks.

    Raises:
        OptionError: there is no such scorer, its package is not installed, or its label is not
            clear.
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
    """The scores of a scorer for some texts, (N,).

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
    """The origin of a scorer, with its package."""
    package = SCORERS.package(spec.partition(":")[0])
    return replace(scorer.origin, package=package) if package else scorer.origin


def _load_bad_words(argument: str, device: str) -> Scorer:
    """1 for a text with an offensive word of a list, or a starred one like ``f*ck``, else 0.

    The crudest and the most transparent scorer. It sees no toxicity without a listed word. The same
    list finds the toxic words of the pairs, so it flatters an edit.

    Args:
        argument: as for ``load_words``; empty for the built-in list.

    Raises:
        DataError: the file cannot be read or holds no words.
    """
    words = load_words(argument or "builtin")
    return Scorer(
        title="bad words",
        paper="https://github.com/snguyenthanh/better_profanity",
        origin=ScorerOrigin(**asdict(words.origin), sha256=words.sha256),
        predict=lambda texts: [float(bool(words.spans(text))) for text in texts],
    )


def _load_profanity(argument: str, device: str) -> Scorer:
    """The probability of profanity by a linear model of word counts; quick, small, English.

    Of the package alt-profanity-check, whose model is a pickle: it pins the scikit-learn that wrote
    it. It scores words, not meanings. Ordinary prose gets 0.1 to 0.4: compare its means, and do not
    read them as shares of toxic text. It always runs on the CPU.

    Raises:
        OptionError: an argument is given, or the package is not installed.
    """
    if argument:
        raise OptionError("--scorer profanity", expected="nothing after its name", found=argument)
    try:
        from profanity_check import predict_prob
    except ImportError as error:
        raise OptionError(
            "--scorer profanity needs the package alt-profanity-check",
            hint="pip install 'gloss-convert[eval]'",
        ) from error
    name = "alt-profanity-check"
    return Scorer(
        title="profanity-check",
        paper="https://github.com/dimitrismistriotis/alt-profanity-check",
        origin=ScorerOrigin(name=name, version=version(name)),
        predict=predict_prob,
    )


_DETOXIFY = ("original", "unbiased", "multilingual", "original-small", "unbiased-small")

_DETOXIFY_BATCH = 32
"""Texts that are scored at once; the package pads all it is given to the longest."""


def _load_detoxify(argument: str, device: str) -> Scorer:
    """Detoxify, the scorer of most papers: BERT models trained on the Jigsaw comments.

    The package fetches its weights from GitHub on first use, as pickles. The same weights are on
    the Hub: ``classifier:unitary/toxic-bert#toxic`` is ``detoxify:original`` without the package.

    Args:
        argument: one of its models; empty for ``original``.

    Raises:
        OptionError: no such model, or the package is not installed.
        SourceError: its weights cannot be fetched or loaded.
    """
    model = argument or "original"
    if model not in _DETOXIFY:
        raise OptionError("--scorer detoxify", expected=" or ".join(_DETOXIFY), found=model)
    try:
        import detoxify
    except ImportError as error:
        raise OptionError(
            "--scorer detoxify needs the package detoxify",
            hint="pip install 'gloss-convert[detoxify]'",
        ) from error
    try:
        loaded = detoxify.Detoxify(model, device=device)
    except Exception as error:  # a download, a pickle and a model may raise anything
        raise SourceError(
            f"the model {model} of detoxify cannot be loaded",
            found=f"{type(error).__name__}: {error}",
            hint="it is fetched from GitHub; its twin on the Hub is "
            "--scorer classifier:unitary/toxic-bert#toxic",
        ) from error

    def predict(texts: list[str]) -> NDArray[np.float64]:
        parts = [texts[i : i + _DETOXIFY_BATCH] for i in range(0, len(texts), _DETOXIFY_BATCH)]
        # for a single text it returns a number instead of a list
        return np.concatenate([np.atleast_1d(loaded.predict(part)["toxicity"]) for part in parts])

    return Scorer(
        title=f"Detoxify {model}",
        paper="https://github.com/unitaryai/detoxify",
        origin=ScorerOrigin(name="detoxify", version=version("detoxify"), model=model),
        predict=predict,
    )
