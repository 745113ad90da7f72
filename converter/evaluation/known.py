"""Which scorers there are, by name, without what their modules need."""

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
"""Name of a scorer -> the module that it is of."""


def check_scorer(spec: str, option: str) -> None:
    """Refuse a scorer that cannot be loaded, as far as that shows without loading it.

    Args:
        spec: as for ``load_scorer``.
        option: that it was given with.

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
