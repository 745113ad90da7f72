"""The data behind every number of an evaluation, as lines of JSON: ``gloss evaluate
--continuations``.

Each line is an object with its ``kind``, and the ``system``, ``seed``, ``cost`` and ``strength`` of
its row in the results. Log-probabilities are in nats, summed over tokens.

    continuation  of a prompt: its text, and the score of each scorer
    judged        of the continuations of a prompt: log p under --judge, and the tokens
    passage       a continuation drawn from the unedited model, with its listed words: log p of
                  each word, and of all other tokens, before and after
    window        of the text for perplexity: log p before and after, and the tokens
    divergence    of a window: the sum of KL over its tokens
    answer        to a request of --defence: whether it begins with a refusal
    response      to a prompt of --safeedit: how unsafe it is

The metrics ``ability/...`` are those of lm-eval, which has files of its own. Texts are masked by
default; scores are those of the unmasked text. Token ids, and the data of distinct-n and fluency,
are only there without masks. A value that is not a number is null.
"""

import json
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from converter.calibration.word_list import WordList
from converter.errors import DestinationError
from converter.evaluation.masks import masked
from converter.evaluation.passages import Passages
from converter.models.likelihood import LogProbabilities, weighed
from converter.runtime.files import reason


class Measured(Protocol):
    """The fields of a line that name its system."""

    @property
    def name(self) -> str: ...
    @property
    def seed(self) -> int | None: ...
    @property
    def cost(self) -> float | None: ...
    @property
    def strength(self) -> float | None: ...


class Rows:
    """Writes the lines into a new file.

    Args:
        path: of the file.
        lists: lists of words to star out; none to write unmasked texts and token ids.
    """

    def __init__(self, path: Path, lists: Sequence[WordList]) -> None:
        self._path, self._lists = path, lists
        self._of: dict[str, Any] = {}
        self._write("w", "")

    def of(self, system: Measured) -> None:
        """The next lines belong to this system."""
        self._of = {
            "system": system.name, "seed": system.seed, "cost": system.cost,
            "strength": system.strength,
        }  # fmt: skip

    def continuations(
        self,
        way: str,
        prompts: Sequence[str],
        texts: Sequence[Sequence[str]],
        scores: Mapping[str, NDArray[np.float64]],
    ) -> None:
        """Continuations of P prompts; ``scores`` are (P, S) of each scorer."""
        self._add(
            "continuation",
            (
                {
                    "way": way, "prompt": place, "prompt_text": masked(prompt, self._lists),
                    "sample": number, "text": masked(text, self._lists, prompt),
                    "scores": {name: _number(x[place, number]) for name, x in scores.items()},
                }
                for place, (prompt, group) in enumerate(zip(prompts, texts, strict=True))
                for number, text in enumerate(group)
            ),
        )  # fmt: skip

    def judged(self, way: str, losses: NDArray[np.float64]) -> None:
        """The result of ``conditional_losses``, (P, 2)."""
        self._add(
            "judged",
            (
                {"way": way, "prompt": place, "tokens": int(tokens), "log_p": _number(-loss)}
                for place, (loss, tokens) in enumerate(losses)
            ),
        )

    def passages(self, passages: Passages, prompts: Sequence[str], after: LogProbabilities) -> None:
        """The passages of the unedited model; ``after`` are the log-probabilities under the present
        system.
        """
        others = [weighed(x, passages.sentences) for x in (passages.before, after)]
        rows = []
        for i, (place, sentence, words) in enumerate(
            zip(passages.prompts, passages.sentences, passages.words, strict=True)
        ):
            text, spans = passages.texts[i], passages.spans[i]
            old, new = passages.before[i], after[i]
            rows.append(
                {
                    "prompt": place,
                    "prompt_text": masked(prompts[place], self._lists),
                    "text": masked(text, self._lists, prompts[place]),
                    **({} if self._lists else {"ids": sentence.ids}),
                    "words": [
                        {
                            "text": masked(text, self._lists, prompts[place])[start:end],
                            **({} if self._lists else {"places": list(word)}),
                            "log_p_before": _number(sum(old[t - 1] for t in word)),
                            "log_p_after": _number(sum(new[t - 1] for t in word)),
                        }
                        for word, (start, end) in zip(words, spans, strict=True)
                    ],
                    "others": {
                        "tokens": len(others[0][i]),
                        "log_p_before": _number(others[0][i].sum()),
                        "log_p_after": _number(others[1][i].sum()),
                    },
                }
            )
        self._add("passage", rows)

    def windows(self, before: LogProbabilities | None, now: LogProbabilities) -> None:
        """The text for perplexity; ``before`` is None of the unedited model."""
        self._add(
            "window",
            (
                {
                    "window": place, "tokens": len(values), "log_p": _number(values.sum()),
                    "log_p_before": None if before is None else _number(before[place].sum()),
                }
                for place, values in enumerate(now)
            ),
        )  # fmt: skip

    def divergences(self, found: LogProbabilities) -> None:
        """KL at every position of that text."""
        self._add(
            "divergence",
            (
                {"window": place, "tokens": len(values), "kl": _number(values.sum())}
                for place, values in enumerate(found)
            ),
        )

    def answers(self, metric: str, refusals: Sequence[bool], texts: Sequence[str]) -> None:
        """Answers to requests, by their metric."""
        self._add(
            "answer",
            (
                {"metric": metric, "request": i, "refuses": x, "text": masked(t, self._lists)}
                for i, (x, t) in enumerate(zip(refusals, texts, strict=True))
            ),
        )

    def responses(self, name: str, unsafe: NDArray[np.float64], texts: Sequence[str]) -> None:
        """Responses to a set of SafeEdit's prompts."""
        self._add(
            "response",
            (
                {"set": name, "instance": i, "unsafe": _number(x), "text": masked(t, self._lists)}
                for i, (x, t) in enumerate(zip(unsafe, texts, strict=True))
            ),
        )

    def _add(self, kind: str, rows: Any) -> None:
        lines = (json.dumps({"kind": kind, **self._of, **row}, ensure_ascii=False) for row in rows)
        self._write("a", "".join(f"{line}\n" for line in lines))

    def _write(self, mode: str, text: str) -> None:
        try:
            with self._path.open(mode, encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise DestinationError(
                f"--continuations {self._path} cannot be written", found=reason(error)
            ) from error


def _number(value: float) -> float | None:
    """A number for JSON: null if it is NaN or infinite."""
    return float(value) if isfinite(value) else None
