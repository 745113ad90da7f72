"""What directions of the residual stream say in words: the unembedding, read in blocks of rows."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from converter.calibration.word_list import WordList
from converter.checkpoints.plan import Plan
from converter.checkpoints.safetensors.header import FLOATS
from converter.checkpoints.safetensors.rewrite import read_rows, read_tensor
from converter.checkpoints.source import Source

BLOCK = 8192
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

        Args:
            directions: (C, D).
            count: tokens for each.

        Returns:
            a tuple for each direction, the largest logit first; empty ones if the checkpoint's
            unembedding is missing or not stored as plain numbers.
        """
        if "unembedding" not in self.plan.vocabulary:
            return [()] * len(directions)
        shard, info = self.plan.vocabulary["unembedding"]
        if info.dtype not in FLOATS:
            return [()] * len(directions)
        directions = directions.float()
        if "final_norm" in self.plan.vocabulary:
            norm_shard, norm = self.plan.vocabulary["final_norm"]
            with self.source.open(norm_shard) as file:
                weight = read_tensor(file, norm).float()
            directions = directions * (weight + self.plan.architecture.norm_offset)
        best = torch.empty(len(directions), 0)
        ids = torch.empty(len(directions), 0, dtype=torch.long)
        with self.source.open(shard) as file:
            for start in range(0, info.shape[0], BLOCK):
                stop = min(start + BLOCK, info.shape[0])
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
