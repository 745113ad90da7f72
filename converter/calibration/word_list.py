"""Lists of offensive words, and the places of their words in a text."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import PurePath
from unicodedata import normalize

import regex as re

from converter.calibration.datasets import read_given
from converter.errors import DataError
from converter.manifest import Origin

_UNSPACED = r"[\w&&[\p{scx=Hani}\p{scx=Hira}\p{scx=Kana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]]"
"""A letter of a script that is written without spaces."""

_LETTER = rf"[\w--_--{_UNSPACED}]"
"""A letter, mark or digit of another script."""

_ITEM = re.compile(rf"{_UNSPACED}|[\S--{_UNSPACED}]+", re.V1)
_BEGIN = re.compile(rf"(?<!{_LETTER})(?<!{_LETTER}-)(?={_LETTER})|(?=[\S--{_LETTER}])", re.V1)
_END = re.compile(
    rf"(?<!{_LETTER})|(?!{_LETTER}|['-]{_LETTER})|(?<=\p{{Hangul}}{{2}})(?=\p{{Hangul}})", re.V1
)
_STARRED = re.compile(rf"(?<![\w--{_UNSPACED}])[{_LETTER}--\d]+[*@#$%]+[{_LETTER}_*@#$%]*", re.V1)
_SINGLE = re.compile(r"[^\W_]+(?:['-][^\W_]+)*")

_SILENT = re.compile(
    r"[\p{Cf}\p{Me}\p{VS}\u034f\u0334-\u0338\u0640[\p{Mn}&&[\p{scx=Arab}\p{scx=Hebr}]]]", re.V1
)
"""Optional characters of a word: characters of no width, strokes through letters, vowel points of
Arabic and Hebrew, and the Arabic lengthening character.
"""

_ALIKE = str.maketrans({"\u2019": "'", "\u2018": "'", "\u02bc": "'", "\u0131": "i", "\u2010": "-"})


def _fold(text: str) -> tuple[str, Sequence[tuple[int, int]]]:
    """A text folded for comparison, and the place in ``text`` of each folded character.

    It applies Unicode's NFKC and case folding to each visible character. So letters of full width,
    ligatures and decomposed letters count as plain letters. The four letters i of Turkish, whose
    case is folded otherwise in other languages, are one.
    """
    if text.isascii():
        return text.lower(), [(i, i + 1) for i in range(len(text))]
    folded, places = "", list[tuple[int, int]]()
    for found in re.finditer(r"\X", text):
        part = normalize("NFKC", normalize("NFKC", found[0]).casefold()).translate(_ALIKE)
        part = _SILENT.sub("", part).replace("i\u0307", "i")
        folded += part
        places += [found.span()] * len(part)
    return folded, places


def items(text: str) -> list[tuple[int, int]]:
    """The places of words: the parts between white space, and each letter of a script without
    spaces.
    """
    return [found.span() for found in _ITEM.finditer(text)]


def follows_a_space(word: str) -> bool:
    """Whether a space separates a word from the word before it."""
    return re.match(_LETTER, word, re.V1) is not None


@cache
def _lengths(words: frozenset[str]) -> Sequence[int]:
    """A pattern of the entries of a list, the longest first."""
    return sorted({len(word) for word in words}, reverse=True)


@dataclass(frozen=True, slots=True)
class WordList:
    """A list of words and phrases, as ``_fold`` gives them.

    ``sha256`` is of the sorted entries, one a line.
    """

    words: frozenset[str]
    origin: Origin
    sha256: str

    def __contains__(self, word: str) -> bool:
        return _fold(word.strip())[0] in self.words

    def mask(self, text: str) -> str:
        """``text`` with all but the first letter of listed words starred out."""
        masked = list(text)
        for start, end in self.spans(text):
            kept = start + (end - start > 1)
            masked[kept:end] = "*" * (end - kept)
        return "".join(masked)

    def spans(self, text: str, other: str = "") -> tuple[tuple[int, int], ...]:
        """Character ranges of the words of ``text`` that are listed or starred out (``f*ck``).

        An entry of the list matches whole words only, except in scripts without spaces. The part
        behind an apostrophe is a word, too (French elides), and a Korean word may have an ending.
        Words that also occur in ``other``, the neutral side of the pair, are left out, since they
        do not make the difference.
        """
        listed = _new(self._listed, text, other)
        starred = _new(_starred, text, other)
        kept = [s for s in listed if not any(a <= s[0] < b for a, b in starred)]
        return tuple(sorted(kept + starred))

    def _listed(self, text: str) -> Iterator[tuple[tuple[int, int], str]]:
        """The places of entries (the longest at each place), and the entries."""
        folded, places = _fold(text)
        end = 0
        for begin in (found.start() for found in _BEGIN.finditer(folded)):
            if begin < end:
                continue
            for length in _lengths(self.words):
                word = folded[begin : begin + length]
                if word in self.words and _END.match(folded, begin + len(word)):
                    end = begin + len(word)
                    yield (places[begin][0], places[end - 1][1]), word
                    break


def _starred(text: str) -> Iterator[tuple[tuple[int, int], str]]:
    for found in _STARRED.finditer(text):
        yield found.span(), found[0].lower()


_Finder = Callable[[str], Iterator[tuple[tuple[int, int], str]]]


def _new(find: _Finder, text: str, other: str) -> list[tuple[int, int]]:
    """The places of entries in ``text`` that do not also occur in ``other``."""
    shared = {word for _, word in find(other)}
    return [span for span, word in find(text) if word not in shared]


def load_words(origin: str) -> WordList:
    """The list ``builtin``, of the package better-profanity, or of a text file.

    A file has a word or a phrase a line; lines starting with # are comments. From the package,
    which is English, single words are taken.

    Raises:
        DataError: the file cannot be read or holds no words.
    """
    if origin == "builtin":
        described = Origin(name="better-profanity", version=version("better-profanity"))
        text = files("better_profanity").joinpath("profanity_wordlist.txt").read_text("utf-8")
    else:
        described = Origin(name=PurePath(origin).name)
        text = read_given(origin, "word list")
    lines = (line for line in text.splitlines() if not line.startswith("#"))
    entries = (" ".join(_fold(line)[0].split()) for line in lines)
    words = frozenset(e for e in entries if e and (origin != "builtin" or _SINGLE.fullmatch(e)))
    if not words:
        raise DataError(f"word list {described.name} holds no words", expected="one word a line")
    digest = hashlib.sha256("\n".join(sorted(words)).encode()).hexdigest()
    return WordList(words, described, digest)
