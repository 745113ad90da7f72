"""The search part: held-out text on which a search tries edits, in shares that grow.

It consists of the part of the texts on which a strength is chosen, and continuations of its own
prompts. It shares no text with the guard. Whole sampling units are distributed to the shares at
random, so that each share is a small sample of the whole.
"""

import random
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, isfinite

from converter.calibration.split import Part
from converter.edits.base import Edit
from converter.errors import DataError
from converter.evaluation.continuations import Draws
from converter.evaluation.headline import ordinary_text, passages_of, too_few
from converter.evaluation.heldout import LEAST_GROUPS
from converter.evaluation.prompts import Prompts
from converter.manifest import Estimate, Measured
from converter.methods.workbench import Bench
from converter.models.batching import Encoder, Sentence
from converter.models.edited import editing, lowest_edited
from converter.models.hooks import Entered
from converter.models.likelihood import (
    LogProbabilities,
    Words,
    divergences,
    entering,
    log_probabilities,
    log_probabilities_under,
    mean_change,
    perplexity_ratio,
    teacher_forced,
    weighed,
    word_changes,
)
from converter.models.resident import LanguageModel

SHARES = (0.25, 0.5, 1.0)
"""The shares of the search part on which a trial is measured, in order."""

_LEAST = 2
"""The least sampling units of a share for a standard error."""

_NEUTRAL, _PAIRS, _OWN, _ORDINARY = "neutral", "pairs", "own", "ordinary"
_SCORED = (_NEUTRAL, _PAIRS, _OWN)


@dataclass(frozen=True, slots=True)
class _Text:
    """Sentences of one kind.

    Attributes:
        sentences: with weight on the positions that predict the words beside toxic ones.
        groups: the sampling unit of each.
        words: places of the toxic words of each.
    """

    sentences: Sequence[Sentence]
    groups: Sequence[Hashable]
    words: Words = ()

    def shares(self, seed: int) -> "list[_Text]":
        """The whole groups that each share adds to the former ones."""
        names = list(dict.fromkeys(self.groups))
        random.Random(seed).shuffle(names)  # noqa: S311 - not a secret
        place = {name: number for number, name in enumerate(names)}
        parts, low = [], 0
        for share in SHARES:
            high = max(ceil(share * len(names)), _LEAST)
            rows = [row for row, group in enumerate(self.groups) if low <= place[group] < high]
            parts.append(self._of(rows))
            low = high
        return parts

    def _of(self, rows: Sequence[int]) -> "_Text":
        words = [self.words[row] for row in rows] if self.words else ()
        groups = [self.groups[row] for row in rows]
        return _Text([self.sentences[row] for row in rows], groups, words)


@dataclass(frozen=True, slots=True)
class _Added:
    """The texts that one share adds.

    Attributes:
        texts: kind -> text.
        before: kind -> log-probabilities under the unedited model.
        entered: the input of the lowest layer that any trial edits.
    """

    texts: Mapping[str, _Text]
    before: Mapping[str, LogProbabilities]
    entered: Entered | None


class SearchTexts:
    """The search part, and its log-probabilities under the unedited model.

    Args:
        bench: whose unedited model is run, in the dtype of its measurements. A fit in
            another dtype releases that model.
        part: the part of the texts on which a strength is chosen.
        prompts: to be continued by the unedited model; None for none.
        first: the lowest layer that any trial edits.

    Attributes:
        prompts: as given.
        fallback: why toxic words are those of pairs although there are prompts; else None.
        own: whether they are of the model's own continuations.
        toxic_words: that a trial is judged by.

    Raises:
        DataError: too few toxic sentences to know a standard error.
    """

    def __init__(self, bench: Bench, part: Part, prompts: Prompts | None, first: int) -> None:
        self._bench = bench
        texts, self.prompts = _texts_of(bench, part), prompts
        self.fallback: str | None = None
        self.own = False
        if prompts is not None:
            passages = passages_of(bench, prompts.texts, Draws(seed=bench.recipe.seed))
            self.fallback = too_few(passages, len(prompts.texts))
            if passages is not None and self.fallback is None:
                self.own = True
                texts[_OWN] = _Text(passages.sentences, passages.prompts, passages.words)
        self._judged = _OWN if self.own else _PAIRS
        self.toxic_words = sum(map(len, texts[self._judged].words))
        groups = len(set(texts[self._judged].groups))
        if groups < LEAST_GROUPS:
            raise DataError(
                "too few toxic sentences are left to search on",
                expected=f"at least {LEAST_GROUPS} that do not resemble each other",
                found=str(groups),
                hint="give more pairs, or --search-prompts that the model continues",
            )
        dealt = {kind: text.shares(bench.recipe.seed) for kind, text in texts.items()}
        self._added = [
            self._with_before({kind: parts[number] for kind, parts in dealt.items()}, first)
            for number in range(len(SHARES))
        ]

    @property
    def _model(self) -> LanguageModel:
        return self._bench.load_measured()

    def _with_before(self, texts: Mapping[str, _Text], first: int) -> _Added:
        scored, model = [texts[kind].sentences for kind in _SCORED if kind in texts], self._model
        entered = entering(model, scored, first)
        values = log_probabilities(model, scored, entered)
        kinds = (kind for kind in _SCORED if kind in texts)
        return _Added(texts, dict(zip(kinds, values, strict=True)), entered)

    def measure(self, edit: Edit) -> Iterator[tuple[float, Measured, Estimate]]:
        """Measure an edit on the texts, share after share.

        Yields the share, its measurements, and the divergence on ordinary text. A share is only run
        when it is asked for.
        """
        model, plan = self._model, self._bench.plan
        lowest, run = lowest_edited(plan, edit), editing(model.module, plan, edit)
        seen: dict[str, list[LogProbabilities]] = {}
        for number, share in enumerate(SHARES):
            added = self._added[number]
            entered = added.entered if added.entered and added.entered.layer <= lowest else None
            scored = [added.texts[kind].sentences for kind in added.before]
            (after,) = log_probabilities_under(model, [run], scored, entered)
            for kind, values in zip(added.before, after, strict=True):
                seen.setdefault(kind, []).append(values)
            ordinary = added.texts[_ORDINARY].sentences
            moved = divergences(model, model, [run], ordinary)
            seen.setdefault(_ORDINARY, []).extend(moved)
            yield share, self._measured(seen), _mean(seen[_ORDINARY])

    def _measured(self, seen: Mapping[str, list[LogProbabilities]]) -> Measured:
        added = self._added[: len(seen[_NEUTRAL])]

        def joined(kind: str) -> tuple[_Text, LogProbabilities, LogProbabilities]:
            parts = [each.texts[kind] for each in added]
            text = _Text(
                [sentence for part in parts for sentence in part.sentences],
                [group for part in parts for group in part.groups],
                [words for part in parts for words in part.words],
            )
            before = [values for each in added for values in each.before[kind]]
            return text, before, [values for part in seen[kind] for values in part]

        neutral, before, after = joined(_NEUTRAL)
        ratio = perplexity_ratio(before, after, neutral.groups)
        text, old, new = joined(self._judged)
        changes = word_changes(old, new, text.words)
        contexts = (
            perplexity_ratio(weighed(b, each.sentences), weighed(a, each.sentences), each.groups)
            for each, b, a in (joined(kind) for kind in (_PAIRS, _OWN) if kind in seen)
            if any(map(len, weighed(b, each.sentences)))
        )
        return Measured(
            perplexity_ratio=ratio,
            toxic_change=mean_change(changes, text.groups),
            teacher_forced=teacher_forced(changes, text.groups),
            context_ratio=max(
                (each for each in contexts if isfinite(each.error)),
                key=lambda each: each.value,
                default=None,
            ),
        )


def _texts_of(bench: Bench, part: Part) -> dict[str, _Text]:
    """The texts of a part, by kind: as ``heldout.Probe`` has them, and beginnings of prose.

    Raises:
        DataError: it has a single paragraph, at which no standard error can be known.
    """
    model = bench.load_measured()
    encode, pairs = Encoder(model.tokenizer, model.module), part.pairs.pairs
    groups = [pair.group or pair.neutral for pair in pairs]
    prose = part.prose.paragraphs
    if len(set(prose)) < 2:
        raise DataError(
            "too little neutral text is left to search on",
            expected="at least two paragraphs", found=str(len(set(prose))),
            hint="give a longer --neutral text",
        )  # fmt: skip
    texts = [*prose, *(pair.neutral for pair in pairs)]
    neutral = _Text([encode(text, "mean", ()) for text in texts], [*prose, *groups])
    coded = [encode.words(pair.toxic, pair.spans) for pair in pairs]
    toxic = _Text(
        [sentence for sentence, words in coded if words],
        [group for group, (_, words) in zip(groups, coded, strict=True) if words],
        [words for _, words in coded if words],
    )
    ordinary = ordinary_text(model, part.prose)
    return {
        _NEUTRAL: neutral,
        _PAIRS: toxic,
        _ORDINARY: _Text(ordinary, prose[: len(ordinary)]),
    }


def _mean(values: Sequence[LogProbabilities]) -> Estimate:
    return mean_change([each.tolist() for part in values for each in part])
