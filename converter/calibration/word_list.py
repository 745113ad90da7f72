"""Lists of offensive words: which words of a text, and which tokens of a vocabulary, are on one."""

import hashlib
import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from converter.errors import DataError
from converter.manifest import Origin
from converter.runtime.files import read_text, reason

_WORD = re.compile(r"[^\W_]+(?:['-][^\W_]+)*")
_STARRED = re.compile(r"(?<!\w)[^\W\d_]+[*@#$%]+[\w*@#$%]*")


@dataclass(frozen=True, slots=True)
class WordList:
    """A list of single words, lower case.

    Attributes:
        words: the words.
        origin: what the manifest records of it: its name, and the package's version.
        sha256: of the sorted words, one a line.
    """

    words: frozenset[str]
    origin: Origin
    sha256: str

    def __contains__(self, word: str) -> bool:
        return word.strip().lower() in self.words

    def mask(self, text: str) -> str:
        """``text`` with all but the first letter of listed words starred out."""
        masked = list(text)
        for start, end in self.spans(text):
            masked[start + 1 : end] = "*" * (end - start - 1)
        return "".join(masked)

    def spans(self, text: str, other: str = "") -> tuple[tuple[int, int], ...]:
        """Character ranges of the words of ``text`` that are listed or starred out (``f*ck``).

        Words that also occur in ``other``, the neutral side of the pair, are left out: they are not
        what makes the difference.
        """
        shared = {match.group().lower() for match in _WORD.finditer(other)}
        listed = [
            match.span()
            for match in _WORD.finditer(text)
            if match.group().lower() in self.words and match.group().lower() not in shared
        ]
        masked = {match.group().lower() for match in _STARRED.finditer(other)}
        starred = [
            match.span() for match in _STARRED.finditer(text) if match.group().lower() not in masked
        ]
        kept = [s for s in listed if not any(a <= s[0] < b for a, b in starred)]
        return tuple(sorted(kept + starred))


def load_words(origin: str) -> WordList:
    """Read a word list.

    Args:
        origin: ``builtin``, the list of the package better-profanity, or a text file with a word a
            line. Entries of more than one word are skipped; lines starting with # are comments.

    Raises:
        DataError: the file cannot be read or holds no words.
    """
    if origin == "builtin":
        from importlib.metadata import version

        described = Origin(name="better-profanity", version=version("better-profanity"))
        text = files("better_profanity").joinpath("profanity_wordlist.txt").read_text("utf-8")
    else:
        path = Path(origin)
        described = Origin(name=path.name)
        try:
            text = read_text(path)
        except (OSError, ValueError) as error:
            raise DataError(f"word list {origin} cannot be read", found=reason(error)) from error
    lines = (line.strip().lower() for line in text.splitlines() if not line.startswith("#"))
    words = frozenset(line for line in lines if _WORD.fullmatch(line))
    if not words:
        raise DataError(f"word list {path.name} holds no words", expected="one word a line")
    digest = hashlib.sha256("\n".join(sorted(words)).encode()).hexdigest()
    return WordList(words, described, digest)
