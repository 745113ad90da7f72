"""Contrastive pairs of sentences, toxic and neutral, and ordinary prose: read, cleaned, hashed."""

import hashlib
import json
import re
import tomllib
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import PurePath

from converter.calibration.datasets import (
    NO_FIELDS,
    Row,
    Spans,
    draw,
    locate,
    read_given,
    read_rows,
)
from converter.calibration.word_list import WordList, items
from converter.errors import DataError, OptionError
from converter.manifest import DrawnRecord, Origin
from converter.recipe import SELF, Recipe

MIN_PAIRS = 16
"""The least number of pairs. Fewer say nothing about a direction in hundreds of dimensions."""

_MIN_WORDS = 100
"""The least number of words of neutral prose, which has half of the weight in the second moment of
neutral tokens.
"""

_MAX_PAIRS = 2000
"""Number of pairs drawn by default; more gained nothing in experiments."""

_NAMED_ROWS = 5
"""The most rows that a message about skipped rows names; the rest are counted."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A toxic sentence, its neutral paraphrase, and the places of the toxic words.

    ``spans`` are character ranges of ``toxic``, sorted, not overlapping. Pairs of one ``group``
    resemble each other and belong into the same part of a split; empty for a pair of its own.
    """

    toxic: str
    neutral: str
    spans: Spans
    group: str = ""


@dataclass(frozen=True, slots=True)
class Pairs:
    """The pairs of one run, in the order they are used.

    ``sha256`` is of the pairs as used, spans included. ``skipped``: reason -> the unusable rows,
    counted from 1. ``drawn`` says how they were drawn from the model, if they were.
    """

    pairs: tuple[Pair, ...]
    origin: Origin
    sha256: str
    skipped: Mapping[str, Sequence[int]] = field(default_factory=dict)
    drawn: DrawnRecord | None = None

    @classmethod
    def of(
        cls, pairs: Sequence[Pair], origin: Origin, skipped: Mapping[str, Sequence[int]]
    ) -> "Pairs":
        """With their sha256."""
        lines = (json.dumps([p.toxic, p.neutral, p.spans], ensure_ascii=False) for p in pairs)
        return cls(tuple(pairs), origin, _sha256(lines), skipped)


@dataclass(frozen=True, slots=True)
class Prose:
    """Ordinary text for the statistics of neutral tokens: paragraphs, origin, and their sha256."""

    paragraphs: tuple[str, ...]
    origin: Origin
    sha256: str

    @classmethod
    def of(cls, paragraphs: Sequence[str], origin: Origin) -> "Prose":
        """With their sha256."""
        return cls(tuple(paragraphs), origin, _sha256(paragraphs))


def _sha256(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def describe_skipped(skipped: Mapping[str, Sequence[int]]) -> str:
    """One line that counts the skipped rows by reason and names the first of each."""
    return "; ".join(
        f"{len(rows)} {reason} (row {', '.join(map(str, rows[:_NAMED_ROWS]))}"
        + (", ...)" if len(rows) > _NAMED_ROWS else ")")
        for reason, rows in skipped.items()
    )


def load_pairs(origin: str, words: WordList, num_pairs: int | None, seed: int) -> Pairs:
    """Read, clean (``normalise``) and draw the pairs of a run.

    A pair of a file is usable if its toxic side has a word of the list, or a starred word, that is
    absent from the neutral side and is not the first of the sentence: nothing could predict that.

    Args:
        origin: ``builtin``, a ``.jsonl``, ``.tsv`` or ``.csv`` file, or a Hub dataset.
        words: finds the toxic spans of pairs without given spans.
        num_pairs: how many to draw; None for all, up to ``_MAX_PAIRS``.
        seed: of the draw.

    Raises:
        DataError: the file is missing or malformed, or has too few usable pairs.
        SourceError: the Hub cannot be read.
    """
    rows: Iterable[Row]
    if origin == "builtin":
        described, rows = _builtin()
    else:
        described, path = locate(origin, "pairs")
        rows = read_rows(path)
    usable, skipped = _clean(rows, words)
    check_num_pairs(num_pairs)
    wanted = min(len(usable), _MAX_PAIRS) if num_pairs is None else num_pairs
    if len(usable) < max(wanted, MIN_PAIRS):
        raise DataError(
            f"pairs {PurePath(origin).name}",
            expected=f"at least {max(wanted, MIN_PAIRS)} usable pairs",
            found=f"{len(usable)}" + (f", skipped: {describe_skipped(skipped)}" if skipped else ""),
            hint=_hint(skipped, len(usable), words),
        )
    chosen = usable if wanted == len(usable) else draw(usable, wanted, seed)
    return Pairs.of(chosen, described, skipped)


def check_num_pairs(num_pairs: int | None) -> None:
    """Raise OptionError if this number of pairs is too small; None means no number was given."""
    if num_pairs is not None and num_pairs < MIN_PAIRS:
        raise OptionError("--num-pairs", expected=f"at least {MIN_PAIRS}", found=str(num_pairs))


def check_drawn(recipe: Recipe) -> None:
    """Raise OptionError if options of drawn pairs are given for other pairs."""
    asked = {"--self-prompts": recipe.self_prompts != "builtin"}
    asked["--self-scorer"] = recipe.self_scorer is not None
    for flag in (flag for flag, given in asked.items() if given and recipe.pairs != SELF):
        raise OptionError(flag, expected=f"--pairs {SELF}", found=f"--pairs {recipe.pairs}")


_UNLISTED = "without a listed word"
_SHARED = "whose listed words are on the neutral side, too"
_FIRST = "whose only listed word is the first, which nothing predicts"
_MENDED_BY = {
    NO_FIELDS: "name the two fields of each row 'toxic' and 'neutral'",
    _UNLISTED: "give a --word-list in the language and the spelling of the pairs",
    _SHARED: "give pairs whose neutral side does without the listed words",
    _FIRST: "give pairs in which other words come before the listed ones",
}
"""Why a row cannot be used -> the hint if that is the most frequent reason."""


def _hint(skipped: Mapping[str, Sequence[int]], usable: int, words: WordList) -> str:
    """The hint for too few usable pairs."""
    cause = max(skipped, key=lambda reason: len(skipped[reason]), default="")
    if cause not in _MENDED_BY or len(skipped[cause]) <= usable:
        return "give more pairs or a longer --word-list, or lower --num-pairs"
    english = cause == _UNLISTED and words.origin.version
    return _MENDED_BY[cause] + ("; the built-in list is English" if english else "")


def _why(toxic: str, spans: Spans, words: WordList) -> str:
    """Why no toxic word of a pair can be used; the neutral side lacks those in ``spans``."""
    if spans:
        return _FIRST
    return _SHARED if words.spans(toxic) else _UNLISTED


def _clean(rows: Iterable[Row], words: WordList) -> tuple[list[Pair], dict[str, list[int]]]:
    usable: list[Pair] = []
    skipped: dict[str, list[int]] = {}
    seen: set[str] = set()
    for row in rows:
        toxic, neutral, spans, problem = row.toxic, row.neutral, row.spans, row.problem
        found = spans or ()
        if spans is None:
            toxic, neutral = normalise(toxic), normalise(neutral)
            found = words.spans(toxic, neutral)
            spans = tuple(s for s in found if s[0] > 0)
        if problem is None and not (toxic and neutral):
            problem = "empty"
        elif problem is None and toxic == neutral:
            problem = "identical on both sides"
        elif problem is None and toxic in seen:
            problem = "duplicated"
        elif problem is None and not spans:
            problem = _why(toxic, found, words)
        if problem is not None:
            skipped.setdefault(problem, []).append(row.number)
            continue
        seen.add(toxic)
        usable.append(Pair(toxic, neutral, spans, row.group))
    return usable, skipped


_QUOTES = str.maketrans({
    "\u2019": "'", "\u2018": "'", "`": "'", "\u201c": '"', "\u201d": '"', "\u2026": "...",
    "\u0130": "i",  # Turkish; lower() turns it into two characters
})  # fmt: skip


_STOPS = ".,!?;: \u3002\uff0c\uff01\uff1f\uff1b\uff1a\u060c\u061f\u06d4\u0964"
"""Punctuation at the end of a sentence or clause, also in Chinese, Arabic, Urdu and Hindi."""


def normalise(text: str) -> str:
    """Remove differences between the two sides of a corpus that are not toxic.

    Lower case; plain quotes; single spaces; no space before punctuation or inside contractions;
    repeated punctuation once; none at the end; letters and their accents composed (NFC). Where one
    side of a corpus was tokenised and the other was not, the strongest "toxic" direction is
    otherwise a space before a full stop.
    """
    text = " ".join(unicodedata.normalize("NFC", text.translate(_QUOTES)).lower().split())
    text = re.sub(r"\s+([.,!?;:%)\]])", r"\1", text)
    text = re.sub(r"([(\[])\s+", r"\1", text)
    text = re.sub(r"(\w)\s*'\s*(s|t|m|re|ve|ll|d)\b", r"\1'\2", text)
    text = re.sub(r"(\w)\s+n't\b", r"\1n't", text)
    text = re.sub(r"([.,!?;:])\1+", r"\1", text)
    return text.strip().rstrip(_STOPS)


def _builtin() -> tuple[Origin, list[Row]]:
    """The built-in pairs: see ``data/pairs.toml`` for the rule that generates them."""
    text = files("converter").joinpath("data/pairs.toml").read_text("utf-8")
    data = tomllib.loads(text)
    rows: list[Row] = []
    for place, frame in enumerate(data["frame"]):
        for fill in range(data["fills"]):
            toxic, spans = _fill(normalise(frame["toxic"]), data["words"], place + fill)
            neutral, _ = _fill(normalise(frame["neutral"]), data["words"], place + fill)
            spans = tuple(s for s in spans if s[0] > 0)
            rows.append(Row(len(rows) + 1, toxic, neutral, spans, group=f"frame {place}"))
    return Origin(name="builtin", version=data["version"]), rows


def _fill(frame: str, words: dict[str, list[str]], number: int) -> tuple[str, Spans]:
    """Fill the slots of a frame; a slot ending in 2 takes the word five places further on."""
    text = ""
    spans: list[tuple[int, int]] = []
    for part in re.split(r"(\{\w+\})", frame):
        if part.startswith("{"):
            slot = part[1:-1]
            options = words[slot.removesuffix("2")]
            word = options[(number + 5 * slot.endswith("2")) % len(options)]
            spans.append((len(text), len(text) + len(word)))
            text += word
        else:
            text += part
    return text, tuple(spans)


def load_prose(origin: str) -> Prose:
    """Read neutral prose, a paragraph a line or separated by empty lines.

    Raises:
        DataError: the file cannot be read or is empty.
    """
    if origin == "builtin":
        text = files("converter").joinpath("data/neutral.txt").read_text("utf-8")
    else:
        text = read_given(origin, "neutral text")
    paragraphs = [line.strip() for line in text.splitlines() if line.strip()]
    count = sum(len(items(paragraph)) for paragraph in paragraphs)
    if count < _MIN_WORDS:
        raise DataError(
            f"neutral text {origin} is too short",
            expected=f"at least {_MIN_WORDS} words, since what it needs is protected",
            found=str(count),
        )
    return Prose.of(paragraphs, Origin(name=PurePath(origin).name))
