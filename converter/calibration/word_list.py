"""Lists of offensive words, and what directions of the residual stream say in words."""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor

from converter.calibration.datasets import read_given
from converter.checkpoints.plan import Plan
from converter.checkpoints.safetensors.header import FLOATS
from converter.checkpoints.safetensors.rewrite import read_rows
from converter.checkpoints.source import Source
from converter.errors import DataError
from converter.manifest import Origin

_WORD = re.compile(r"[^\W_]+(?:['-][^\W_]+)*")
_STARRED = re.compile(r"(?<!\w)[^\W\d_]+[*@#$%]+[\w*@#$%]*")


@dataclass(frozen=True, slots=True)
class WordList:
    """A list of single words, lower case; ``sha256`` is of the sorted words, one a line."""

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
        listed = [span for span, word in _new(_WORD, text, other) if word in self.words]
        starred = [span for span, _ in _new(_STARRED, text, other)]
        kept = [s for s in listed if not any(a <= s[0] < b for a, b in starred)]
        return tuple(sorted(kept + starred))


def _new(pattern: re.Pattern[str], text: str, other: str) -> Iterator[tuple[tuple[int, int], str]]:
    """Place and lower case of what matches in ``text``, but for what matches in ``other``, too."""
    shared = {match.group().lower() for match in pattern.finditer(other)}
    for match in pattern.finditer(text):
        if (word := match.group().lower()) not in shared:
            yield match.span(), word


def load_words(origin: str) -> WordList:
    """The list ``builtin``, of the package better-profanity, or of a text file.

    A file has a word a line; entries of more words are skipped, lines starting with # are comments.

    Raises:
        DataError: the file cannot be read or holds no words.
    """
    if origin == "builtin":
        described = Origin(name="better-profanity", version=version("better-profanity"))
        text = files("better_profanity").joinpath("profanity_wordlist.txt").read_text("utf-8")
    else:
        described = Origin(name=PurePath(origin).name)
        text = read_given(origin, "word list")
    lines = (line.strip().lower() for line in text.splitlines() if not line.startswith("#"))
    words = frozenset(line for line in lines if _WORD.fullmatch(line))
    if not words:
        raise DataError(f"word list {described.name} holds no words", expected="one word a line")
    digest = hashlib.sha256("\n".join(sorted(words)).encode()).hexdigest()
    return WordList(words, described, digest)


_BLOCK = 8192
"""Rows of the unembedding held at a time: 0.5 GB in float32 at the widest hidden size of today."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Decodes directions with a source's unembedding and tokenizer."""

    plan: Plan
    source: Source
    tokenizer: Any

    def decode(self, directions: Tensor, count: int) -> list[tuple[str, ...]]:
        """The ``count`` tokens whose logits a step along each direction raises most.

            logits = E (g * u)     E: (V, D) unembedding, g: (D,) of the final norm

        A tuple for each of the directions (C, D), the largest logit first; empty ones if the
        checkpoint's unembedding is missing or not stored as plain numbers.
        """
        place = self.plan.vocabulary.get("unembedding")
        if place is None or place[1].dtype not in FLOATS:
            return [()] * len(directions)
        shard, info = place
        directions = directions.float()
        if "final_norm" in self.plan.vocabulary:
            weight = self.source.read(*self.plan.vocabulary["final_norm"]).float()
            directions = directions * (weight + self.plan.architecture.norm_offset)
        best = torch.empty(len(directions), 0)
        ids = torch.empty(len(directions), 0, dtype=torch.long)
        with self.source.open(shard) as file:
            for start in range(0, info.shape[0], _BLOCK):
                stop = min(start + _BLOCK, info.shape[0])
                logits = directions @ read_rows(file, info, start, stop).float().T
                best = torch.cat([best, logits], 1)
                ids = torch.cat([ids, torch.arange(start, stop).expand(len(directions), -1)], 1)
                best, places = best.topk(min(count, best.shape[1]))
                ids = ids.gather(1, places)
        return [tuple(self.tokenizer.decode([int(i)]) for i in row) for row in ids]

    def single_token_share(self, words: WordList) -> float:
        """The share of the listed words that are one token when they follow a space.

        A list of words says little about tokens when most of its words are several of them.
        """
        coded = self.tokenizer([f" {w}" for w in sorted(words.words)], add_special_tokens=False)
        return sum(len(ids) == 1 for ids in coded["input_ids"]) / len(words.words)
