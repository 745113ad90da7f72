"""Three parts of the texts that share no sentence: one to fit, one to choose, one to report.

A subspace is fitted on the first part, and its rank is chosen on the second. Guard and manifest
measure it on the third, which nothing was tuned on.
"""

import random
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from converter.calibration.pairs import MIN_PAIRS, Pair, Pairs, Prose
from converter.calibration.word_list import items
from converter.errors import DataError
from converter.manifest import PartRecord, SplitRecord

_T = TypeVar("_T")

_HELD_OUT_SHARE = 0.2
"""Share of the pairs for each of the two held-out parts."""

_MAX_HELD_OUT_PAIRS = 200
"""The most pairs of each held-out part; they are run once for each tried rank and control."""

_MAX_HELD_OUT_WORDS = 2400
"""The most words of prose in each held-out part, for the same reason; at most a third of it."""

_MAX_FIT_WORDS = 3000
"""The most words of prose in the part of the fit, whose statistics need few thousand tokens."""

_PIECE = 150
"""The most words of a paragraph in one text; ``batching.MAX_TOKENS`` is about 190 words."""


@dataclass(frozen=True, slots=True)
class Part:
    """The texts of one part."""

    pairs: Pairs
    prose: Prose

    def record(self) -> PartRecord:
        """The record for the manifest."""
        return PartRecord(
            pairs=len(self.pairs.pairs),
            pairs_sha256=self.pairs.sha256,
            paragraphs=len(self.prose.paragraphs),
            prose_sha256=self.prose.sha256,
        )


@dataclass(frozen=True, slots=True)
class Parts:
    """The three parts; ``dropped`` pairs had a sentence that occurs in a held-out part."""

    fit: Part
    choose: Part
    report: Part
    dropped: int

    def record(self) -> SplitRecord:
        """The record of the split for the manifest."""
        fit, choose, report = (part.record() for part in (self.fit, self.choose, self.report))
        return SplitRecord(dropped_pairs=self.dropped, fit=fit, choose=choose, report=report)


def split(pairs: Pairs, prose: Prose, seed: int) -> Parts:
    """Distribute pairs and paragraphs to the parts.

    Pairs of one group (those with the same neutral side, or made from the same frame) stay
    together, and a pair of the fit is dropped if one of its sentences occurs in a held-out part on
    either side. The seed is that of the shuffle.

    Raises:
        DataError: too few pairs are left for the fit, or a part has no prose.
    """
    held = min(int(_HELD_OUT_SHARE * len(pairs.pairs)), _MAX_HELD_OUT_PAIRS)
    rng = random.Random(seed)  # noqa: S311 - not a secret
    report, choose, fit = _deal(pairs.pairs, lambda p: p.group or p.neutral, lambda p: 1, held, rng)
    choose, lost = _without(choose, report)
    kept, more = _without(fit, [*report, *choose])
    if len(kept) < MIN_PAIRS // 2:
        raise DataError(
            "too few pairs are left to fit on",
            expected=f"at least {MIN_PAIRS // 2}",
            found=f"{len(kept)} of {len(pairs.pairs)}",
            hint="give more pairs, of which not so many share a sentence",
        )
    pieces = [piece for paragraph in prose.paragraphs for piece in _pieces(paragraph)]
    rng = random.Random(seed)  # noqa: S311 - not a secret

    def size(piece: str) -> int:
        return len(items(piece))

    quota = min(sum(map(size, pieces)) // 3, _MAX_HELD_OUT_WORDS)
    prose_report, prose_choose, rest = _deal(pieces, str, size, quota, rng)
    prose_fit = _deal(rest, str, size, _MAX_FIT_WORDS, rng)[0]
    if not (prose_fit and prose_choose and prose_report):
        raise DataError(
            "the neutral text cannot be split into three parts",
            expected=f"three different paragraphs, or more than {2 * _PIECE} words",
            found=f"{len(set(pieces))} of them",
        )

    def part(some: Sequence[Pair], paragraphs: Sequence[str]) -> Part:
        return Part(Pairs.of(some, pairs.origin, {}), Prose.of(paragraphs, prose.origin))

    return Parts(
        part(kept, prose_fit), part(choose, prose_choose), part(report, prose_report), lost + more
    )


def _pieces(paragraph: str) -> list[str]:
    """A long paragraph in pieces of ``_PIECE`` words, since the model reads its beginning only."""
    places = items(paragraph)
    if len(places) <= _PIECE:
        return [paragraph]
    parts = (places[i : i + _PIECE] for i in range(0, len(places), _PIECE))
    return [" ".join(paragraph[part[0][0] : part[-1][1]].split()) for part in parts]


def _deal(
    items: Sequence[_T],
    group: Callable[[_T], Hashable],
    size: Callable[[_T], int],
    quota: int,
    rng: random.Random,
) -> tuple[list[_T], list[_T], list[_T]]:
    """Two parts of about ``quota`` in size and the rest, whole groups, each in its own order."""
    groups = list(dict.fromkeys(group(item) for item in items))
    rng.shuffle(groups)
    sizes = Counter[Hashable]()
    for item in items:
        sizes[group(item)] += size(item)
    place: dict[Hashable, int] = {}
    total = 0
    part = 0 if quota else 2
    for name in groups:
        place[name] = part
        total += sizes[name]
        if part < 2 and total >= quota:  # the next part, however far this one has gone over
            part, total = part + 1, 0
    parts: tuple[list[_T], list[_T], list[_T]] = ([], [], [])
    for item in items:
        parts[place[group(item)]].append(item)
    return parts


def _without(pairs: Sequence[Pair], others: Sequence[Pair]) -> tuple[list[Pair], int]:
    """The pairs without a sentence in ``others``, and the number of pairs left out."""
    taken = {text for p in others for text in (p.toxic, p.neutral)}
    kept = [p for p in pairs if p.toxic not in taken and p.neutral not in taken]
    return kept, len(pairs) - len(kept)
