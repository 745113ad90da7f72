"""Ranking signals: one module each, which scores candidate directions by how toxic they are.

A module has ``NEEDS_GRADIENT``, whether the causal moments have to be taken, and ``score``, which
gives each candidate a number, larger for more toxic. It is found by its name, with hyphens for
underscores; nothing else has to know it.
"""

import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol, cast

from torch import Tensor

from converter.calibration.word_list import WordList


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a signal can look at.

    Attributes:
        rows: (C, D) float64, unit candidates, turned to the toxic side.
        layers: of each candidate.
        differences: layer -> T_l (N, D) float64, toxic minus neutral, protected.
        causal: layer -> A_l (D, D); see ``calibration.causal_moments``. Empty if it was not taken.
        tokens: what each candidate decodes to; an empty tuple if that is unknown.
        words: the word list.
    """

    rows: Tensor
    layers: tuple[int, ...]
    differences: Mapping[int, Tensor]
    causal: Mapping[int, Tensor]
    tokens: list[tuple[str, ...]]
    words: WordList


class Ranking(Protocol):
    """What a module of this package has."""

    NEEDS_GRADIENT: bool

    def score(self, evidence: Evidence) -> list[float]:
        """A number for each candidate. Raises FitError."""


def ranking_names() -> list[str]:
    """The signals there are."""
    return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__))


def load_ranking(name: str) -> Ranking:
    """A signal by its name, which must be one of ``ranking_names``."""
    return cast(Ranking, import_module(f"{__name__}.{name.replace('-', '_')}"))
