"""Texts as tokens, and as padded batches of tokens with a weight for every position.

The defaults of a checkpoint's tokenizer are not used, since it may cut, pad, or end each text.
Every text for a model goes through ``encode``.

Shapes: B sentences in a batch, T tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from sys import maxsize
from typing import Any, Literal

import torch
from tokenizers import processors
from torch import Tensor

from converter.errors import DataError

MAX_TOKENS = 256
"""The most tokens of a sentence or paragraph; the rest is cut. Pairs are far shorter."""

BATCH_TOKENS = 1024
"""Positions in a batch with logits, if the vocabulary is not large."""

LOGITS_BYTES = BATCH_TOKENS * 49152 * 4
"""The most bytes of the float32 logits of a batch, 0.2 GB: fewer positions if the vocabulary is
large.
"""

Pooling = Literal["predicting", "mean", "last", "last8"]

LAST: Mapping[str, int] = {"last": 1, "last8": 8}
"""Number of tokens at the end of a text that are pooled; all, if it has fewer."""


@dataclass(frozen=True, slots=True)
class Sentence:
    """Token ids, and a weight for each position, or no weights; see ``Encoder``.

    The first ``start`` tokens are special ones that come before the text.
    """

    ids: list[int]
    weights: list[float] = field(default_factory=list)
    start: int = 1


def num_positions(model: Any) -> int | None:
    """The number of positions that a model of transformers knows, or None if it has no limit."""
    wrapped = getattr(model.config, "get_text_config", None)
    config = wrapped(decoder=True) if wrapped else model.config
    positions: int | None = getattr(config, "max_position_embeddings", None)
    return positions


@dataclass(frozen=True, slots=True)
class Coded:
    """A text as tokens: their ids, and the character range of each.

    The first ``start`` tokens are special ones that come before the text.
    """

    ids: list[int]
    offsets: list[tuple[int, int]]
    start: int


def encode(tokenizer: Any, text: str, begin: Sequence[int]) -> Coded:
    """Tokenize a text, whole, without what the tokenizer appends or pads.

    Args:
        tokenizer: a fast tokenizer of transformers.
        begin: tokens to put first, see ``beginning``; omitted if the text has them already, as from
            a chat template.
    """
    coded = tokenizer(
        text,
        add_special_tokens=False,
        return_offsets_mapping=True,
        truncation=False,
        padding=False,
        verbose=False,
    )
    ids, offsets = list(coded["input_ids"]), list(coded["offset_mapping"])
    if ids[: len(begin)] != list(begin):
        ids, offsets = [*begin, *ids], [(0, 0)] * len(begin) + offsets
    return Coded(ids, offsets, len(begin))


def outside(coded: Coded, spans: Sequence[tuple[int, int]], first: int) -> list[float]:
    """Weight 1 for each position that predicts a token outside of all character ranges, else 0.

    Args:
        spans: begin and end of each range; one character of a token in it is enough.
        first: place of the first token that may be predicted.
    """
    tokens = enumerate(coded.offsets)
    clear = [i >= first and not any(a < e and b > s for s, e in spans) for i, (a, b) in tokens]
    return [*map(float, clear[1:]), 0.0]


def beginning(tokenizer: Any, *, needed: bool = False) -> list[int]:
    """The special tokens that a tokenizer puts before a text, each of them once.

    The model was trained with them. Tokens behind a text would end it.

    Args:
        needed: if it puts none, return a BOS or the most similar special token.

    Raises:
        DataError: one is needed, and the tokenizer has no special token at all.
    """
    coded = tokenizer("a", truncation=False, padding=False)
    first = next((i for i, text in enumerate(coded.sequence_ids()) if text is not None), 0)
    found = [token for token, _ in groupby(coded["input_ids"][:first])]
    return found or ([first_token(tokenizer)] if needed else [])


def first_token(tokenizer: Any) -> int:
    """The id to put first if the tokenizer puts none: BOS, or the most similar special token.

    Raises:
        DataError: the tokenizer has no special token at all.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
        if token is not None:
            return int(token)
    raise DataError(
        "the tokenizer has no BOS, EOS or padding token",
        expected="one of them",
        hint="name one as bos_token in the source's tokenizer_config.json",
    )


def prepare(tokenizer: Any) -> None:
    """Configure a tokenizer to behave like ``encode`` when other packages use it.

    It then cuts and pads nothing, puts the tokens of ``beginning`` before a text, and nothing
    behind it.
    """
    core = tokenizer.backend_tokenizer
    core.no_truncation()
    core.no_padding()
    begin, given = beginning(tokenizer), tokenizer("a")["input_ids"]
    if given == encode(tokenizer, "a", begin).ids:
        return
    names = [f"begin{i}" for i in range(len(begin))]
    tokens = tokenizer.convert_ids_to_tokens(begin)
    core.post_processor = processors.TemplateProcessing(
        single=[*names, "$A"],
        pair=[*names, "$A", "$B"],
        special_tokens=[
            {"id": name, "ids": [token], "tokens": [text]}
            for name, token, text in zip(names, begin, tokens, strict=True)
        ],
    )


class Encoder:
    """Tokenizes texts for a model and gives each position its weight in the pool.

    Args:
        tokenizer: a fast tokenizer of transformers.
        model: its embedding and its number of positions bound the tokens.
        most: the most tokens of a text; None for the number of the model's positions.
    """

    def __init__(self, tokenizer: Any, model: Any, most: int | None = MAX_TOKENS) -> None:
        self.tokenizer = tokenizer
        self.begin = beginning(tokenizer, needed=True)
        limits = [limit for limit in (most, num_positions(model)) if limit]
        self.max_tokens = min(limits, default=maxsize)
        self.vocabulary = model.get_input_embeddings().weight.shape[0]

    def __call__(self, text: str, pooling: Pooling, spans: Sequence[tuple[int, int]]) -> Sentence:
        """Encode one sentence or paragraph.

        A BOS (or the tokenizer's own first tokens, or another special token) comes first. It is the
        attention sink, whose huge activations would dominate, so its weight is 0. The weights of
        the others sum to 1, or are all 0 if ``pooling`` finds no position.

        Args:
            text: long texts are cut.
            pooling: ``predicting`` weighs the positions whose next token overlaps a span.
            spans: character ranges, used by ``predicting`` only.

        Raises:
            DataError: the model has no embedding for a token.
        """
        coded = self._encode(text)
        chosen = list(range(coded.start, len(coded.ids)))
        if pooling in LAST:
            chosen = chosen[-LAST[pooling] :]
        elif pooling == "predicting":
            inside = [any(start < b and end > a for a, b in spans) for start, end in coded.offsets]
            chosen = [i for i in chosen[:-1] if inside[i + 1]]
        weights = [0.0] * len(coded.ids)
        for i in chosen:
            weights[i] = 1.0 / len(chosen)
        return Sentence(coded.ids, weights, coded.start)

    def predicted(self, text: str) -> Sentence:
        """Encode a sentence with weight on every position that predicts a token of it."""
        coded = self._encode(text)
        weights = [float(coded.start <= i < len(coded.ids)) for i in range(1, len(coded.ids) + 1)]
        return Sentence(coded.ids, weights, coded.start)

    def words(
        self, text: str, spans: Sequence[tuple[int, int]]
    ) -> tuple[Sentence, list[tuple[int, ...]]]:
        """Encode a sentence, and find the tokens of each span.

        Returns:
            the sentence, with weight 1 on every position that predicts a token outside of all
            spans, and for each span that begins after the first token the places of its tokens in
            the ids.
        """
        coded = self._encode(text)
        places = (
            tuple(i for i, (a, b) in enumerate(coded.offsets) if a < end and b > start)
            for start, end in spans
        )
        found = [word for word in places if word and word[0] > coded.start]
        return Sentence(coded.ids, outside(coded, spans, coded.start), coded.start), found

    def _encode(self, text: str) -> Coded:
        """A text as tokens within the model's limits."""
        coded = encode(self.tokenizer, text, self.begin)
        ids = coded.ids[: self.max_tokens]
        if max(ids) >= self.vocabulary:
            raise DataError(
                "the tokenizer does not belong to the model",
                expected=f"tokens below {self.vocabulary}, the rows of the embedding",
                found=str(max(ids)),
            )
        return Coded(ids, coded.offsets[: self.max_tokens], coded.start)


@dataclass(frozen=True, slots=True)
class Batch:
    """Padded sentences: ``rows`` are their places in the list; the other fields are (B, T).

    ``content`` marks the tokens of the text: not padding, and not the tokens before the text.
    """

    rows: list[int]
    ids: Tensor
    mask: Tensor
    positions: Tensor
    content: Tensor
    weights: Tensor


def batches(
    sentences: Sequence[Sentence], size: int, device: str, side: Literal["left", "right"] = "right"
) -> list[Batch]:
    """Group sentences of like length, longest first, and pad each group.

    Padding has mask 0 and weight 0, and real tokens count their positions from 0, so neither
    ``size`` nor ``side`` changes a result beyond rounding.
    """
    order = _longest_first(sentences)
    groups = [order[i : i + size] for i in range(0, len(order), size)]
    return [_pad(sentences, rows, device, side) for rows in groups]


def logit_positions(model: Any) -> int:
    """The most positions with logits in a batch of a model."""
    vocabulary: int = model.get_input_embeddings().weight.shape[0]
    return max(min(BATCH_TOKENS, LOGITS_BYTES // (4 * vocabulary)), 1)


def token_batches(sentences: Sequence[Sentence], tokens: int, device: str) -> list[Batch]:
    """The same with at most ``tokens`` positions in a batch, padding included, or one sentence."""
    groups: list[list[int]] = []
    for i in _longest_first(sentences):
        if not groups or len(sentences[groups[-1][0]].ids) * (len(groups[-1]) + 1) > tokens:
            groups.append([])
        groups[-1].append(i)
    return [_pad(sentences, rows, device, "right") for rows in groups]


def _longest_first(sentences: Sequence[Sentence]) -> list[int]:
    return sorted(range(len(sentences)), key=lambda i: (-len(sentences[i].ids), i))


def _pad(sentences: Sequence[Sentence], rows: list[int], device: str, side: str) -> Batch:
    length = max(len(sentences[row].ids) for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    weights = torch.zeros(len(rows), length)
    starts = torch.tensor([[sentences[row].start] for row in rows])
    for i, s in enumerate(sentences[row] for row in rows):
        place = slice(0, len(s.ids)) if side == "right" else slice(length - len(s.ids), length)
        ids[i, place] = torch.tensor(s.ids)
        mask[i, place] = 1
        if s.weights:
            weights[i, place] = torch.tensor(s.weights)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    content = mask.bool() & (positions >= starts)
    return Batch(rows, *(x.to(device) for x in (ids, mask, positions, content, weights)))
