"""Prompts and answers as tokens, with weight on the positions whose logits matter.

ids      = P + Y        P prompt, with what a chat template puts around it; Y the answer
weighted = |P| - 1 ... |P| + |Y| - 2        position p predicts token p + 1
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from converter.errors import DataError
from converter.models.batching import Sentence, beginning, encode, num_positions
from converter.models.chat import as_dialogue, as_prompt
from converter.models.resident import Model

_PROBE = "gloss"
"""A placeholder answer, to find the end of an answer in a rendered chat template."""


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A prompt with its answer.

    Attributes:
        sentence: the tokens, and weight 1 on the positions whose logits matter.
        wanted: the tokens that these positions must predict, in order.
    """

    sentence: Sentence
    wanted: list[int]


@dataclass(frozen=True, slots=True)
class Dialogues:
    """Makes dialogues for a model.

    Attributes:
        suffix: S, put behind every prompt after a space; empty for none.
        end: whether the token that ends a turn belongs to the answer.
        parity: join texts as the authors of DINM do: no chat template, two spaces before the
            answer, and the answer's tokens are counted from the right, as those of a separate text.
            If the tokenizer begins a text with a special token, that token is then predicted, too,
            in the place of the prompt's last token.
    """

    model: Model
    suffix: str
    end: bool
    parity: bool

    def __call__(self, prompt: str, answer: str) -> Dialogue:
        """The dialogue of a prompt and its answer, as token ids.

        Raises:
            DataError: the answer has no token, the texts are too long for the model, the model has
                no embedding for a token, or the chat template rejects a user message alone.
        """
        tokenizer = self.model.tokenizer
        prompt = f"{prompt} {self.suffix}" if self.suffix else prompt
        begin = beginning(tokenizer)
        if self.parity:
            ids = encode(tokenizer, f"{prompt}  {answer}", begin).ids
            wanted = encode(tokenizer, f" {answer}", begin).ids
        else:
            start, wanted = self._parts(prompt, answer, begin)
            ids = start + wanted
        self._check(ids, wanted)
        first = len(ids) - len(wanted) - 1
        weights = [float(first <= place < len(ids) - 1) for place in range(len(ids))]
        return Dialogue(Sentence(ids, weights, len(begin)), wanted)

    def _parts(self, prompt: str, answer: str, begin: Sequence[int]) -> tuple[list[int], list[int]]:
        """The tokens of the prompt, and of the answer."""
        tokenizer = self.model.tokenizer
        end = [end_of_turn(tokenizer)] if self.end else []
        if tokenizer.chat_template:
            start = encode(tokenizer, as_prompt(tokenizer, prompt), begin).ids
        else:
            start, answer = encode(tokenizer, prompt, begin).ids, f" {answer}"
        own = encode(tokenizer, answer, ()).ids
        return start, [*own, *(token for token in end if own and token is not None)]

    def _check(self, ids: Sequence[int], wanted: Sequence[int]) -> None:
        if not 0 < len(wanted) < len(ids):
            raise DataError("an answer of the instances", expected="tokens", found="none")
        most = num_positions(self.model.module)
        if most is not None and len(ids) > most:
            raise DataError(
                "a prompt and its answer are too long for the model",
                expected=f"at most {most} tokens", found=str(len(ids)),
                hint="choose another -o instance",
            )  # fmt: skip
        module: Any = self.model.module
        rows = module.get_input_embeddings().weight.shape[0]
        if max(ids) >= rows:
            raise DataError(
                "the tokenizer does not belong to the model",
                expected=f"tokens below {rows}, the rows of the embedding", found=str(max(ids)),
            )  # fmt: skip


def end_of_turn(tokenizer: Any) -> int | None:
    """The token that ends an answer: the one that the chat template puts behind it, or else EOS."""
    eos: int | None = tokenizer.eos_token_id
    if not tokenizer.chat_template:
        return eos
    behind = as_dialogue(tokenizer, _PROBE, _PROBE).rpartition(_PROBE)[2].lstrip()
    ids = encode(tokenizer, behind, ()).ids if behind else []
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return ids[0] if ids and ids[0] in special else eos
