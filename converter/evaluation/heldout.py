"""Held-out text on which edits of one loaded model are compared with the model as it is."""

from converter.calibration.split import Part
from converter.checkpoints.plan import Plan
from converter.edits.base import Edit
from converter.errors import DataError
from converter.manifest import Measured
from converter.methods.workbench import Bench
from converter.models.batching import Encoder
from converter.models.edited import edited
from converter.models.likelihood import (
    LogProbabilities,
    log_probabilities,
    mean_change,
    perplexity,
    perplexity_ratio,
    teacher_forced,
    word_changes,
)
from converter.models.resident import Model
from converter.runtime import progress

LEAST_GROUPS = 5
"""Sentences, or frames that they are made from, without which a standard error is a guess."""


class Probe:
    """The held-out part of the texts, and how probable the unedited model finds it.

    Neutral text is prose and the neutral sides of pairs; toxic words are those of toxic sides that
    the neutral side lacks.

    Args:
        model: not edited.
        plan: of its checkpoint.
        part: of the split.

    Attributes:
        neutral_tokens, toxic_words: how many are scored.
        perplexity: of the unedited model on the neutral text.

    Raises:
        DataError: too few toxic sentences to know a standard error.
    """

    def __init__(self, model: Model, plan: Plan, part: Part) -> None:
        encode = Encoder(model.tokenizer, model.module)
        self.model, self.plan, pairs = model, plan, part.pairs.pairs
        texts = [*part.prose.paragraphs, *(pair.neutral for pair in pairs)]
        groups = [pair.group or pair.neutral for pair in pairs]
        self._neutral = [encode(text, "mean", ()) for text in texts]
        self._neutral_groups = [*part.prose.paragraphs, *groups]
        coded = [encode.words(pair.toxic, pair.spans) for pair in pairs]
        self._toxic = [sentence for sentence, words in coded if words]
        self._words = [words for _, words in coded if words]
        self._toxic_groups = [g for g, (_, words) in zip(groups, coded, strict=True) if words]
        self.neutral_tokens = sum(len(s.ids) - 1 for s in self._neutral)
        self.toxic_words = sum(len(words) for words in self._words)
        if len(set(self._toxic_groups)) < LEAST_GROUPS:
            raise DataError(
                "too few toxic sentences are left to measure the edit on",
                expected=f"at least {LEAST_GROUPS} that do not resemble each other",
                found=str(len(set(self._toxic_groups))),
                hint="give more pairs, or both -o rank and --no-guard",
            )
        self._before = self._run()
        self.perplexity = perplexity(self._before[0])

    def _run(self) -> list[LogProbabilities]:
        return log_probabilities(self.model, (self._neutral, self._toxic))

    def measure(self, edit: Edit) -> Measured:
        """Compare an edit with the unedited model, through hooks."""
        with edited(self.model.module, self.plan, edit):
            neutral, toxic = self._run()
        changes = word_changes(self._before[1], toxic, self._words)
        return Measured(
            perplexity_ratio=perplexity_ratio(self._before[0], neutral, self._neutral_groups),
            toxic_change=mean_change(changes, self._toxic_groups),
            teacher_forced=teacher_forced(changes, self._toxic_groups),
        )


def probe_of(bench: Bench, part: Part) -> Probe:
    """The unedited model's view of a held-out part."""
    count = len(part.prose.paragraphs) + 2 * len(part.pairs.pairs)
    with progress.bar("unedited", count, "text"):
        return Probe(bench.load(), bench.plan, part)
