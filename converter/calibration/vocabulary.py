"""Decode directions of the residual stream to tokens."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from converter.calibration.word_list import WordList, follows_a_space
from converter.checkpoints.plan import Plan
from converter.checkpoints.safetensors.header import FLOATS
from converter.checkpoints.safetensors.rewrite import read_rows
from converter.checkpoints.source import Source
from converter.models.batching import encode

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
        checkpoint's unembedding is missing, not stored as plain numbers, or of another width, as
        where the head reads more than one hidden state.
        """
        place = self.plan.vocabulary.get("unembedding")
        width = directions.shape[1]
        if place is None or place[1].dtype not in FLOATS or place[1].shape[1] != width:
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
        """The share of the listed words that are one token behind a space.

        A ranking by vocabulary says little if most words are several tokens.
        """
        spaced = (f" {w}" if follows_a_space(w) else w for w in sorted(words.words))
        single = (len(encode(self.tokenizer, text, ()).ids) == 1 for text in spaced)
        return sum(single) / len(words.words)
