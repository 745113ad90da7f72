"""The scorers by name, without importing their modules."""

from dataclasses import replace

from converter.calibration.word_list import load_words
from converter.runtime.extras import need
from converter.runtime.registry import Registry

SCORERS = Registry(
    "gloss_convert.scorers",
    "--scorer",
    {
        "bad-words": "converter.evaluation.scorers:_load_bad_words",
        "classifier": "converter.evaluation.classifier:load",
        "detoxify": "converter.evaluation.scorers:_load_detoxify",
        "profanity": "converter.evaluation.scorers:_load_profanity",
    },
    ("title", "paper", "origin", "score"),
)
"""Name -> a function ``load(argument, device) -> Scorer``."""


_NEEDS = {"detoxify": "detoxify", "profanity": "profanity_check"}
"""Name of a scorer -> the module that it needs."""


def check_scorer(spec: str, option: str) -> None:
    """Refuse an unknown scorer, or one whose package is missing, without loading it.

    Args:
        spec: as for ``load_scorer``.
        option: that named it.

    Raises:
        OptionError: there is no such scorer, or its package is not installed.
        DataError: its word list cannot be read.
    """
    name, _, argument = spec.partition(":")
    replace(SCORERS, option=option).need(name)
    if name in _NEEDS:
        need(f"{option} {name}", _NEEDS[name])
    if name == "bad-words" and argument:
        load_words(argument)
