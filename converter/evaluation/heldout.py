"""Compare edits with the unedited model on held-out text, and choose their strength."""

from collections.abc import Callable, Sequence

import torch
from msgspec.structs import asdict

from converter.calibration.split import Part
from converter.checkpoints.plan import Plan
from converter.edits.base import Edit
from converter.errors import DataError, GuardError
from converter.manifest import Choice, Estimate, Measured, Trial
from converter.methods.base import Proposal
from converter.methods.workbench import Bench
from converter.models.batching import Encoder
from converter.models.edited import editing, lowest_edited
from converter.models.hooks import UNEDITED
from converter.models.likelihood import (
    LogProbabilities,
    entering,
    log_probabilities_under,
    mean_change,
    perplexity,
    perplexity_ratio,
    teacher_forced,
    weighed,
    word_changes,
)
from converter.models.resident import Model
from converter.runtime import progress

LEAST_GROUPS = 5
"""The least number of sentences, or frames of sentences, for a standard error."""

MOST_CONTEXT = 1.25
"""The largest perplexity ratio of the other words of toxic text. An edit may harm informal text and
leave prose intact; a budget on prose does not show that.
"""


class Probe:
    """The held-out part of the texts, and its log-probabilities under the unedited model.

    Neutral text is prose and the neutral sides of pairs; toxic words are those of toxic sides that
    the neutral side lacks, and the context is all other words of these toxic sides.

    Args:
        first: the lowest layer that an edit is expected to change. The layers below it run once,
            for all edits that keep to this.

    Attributes:
        neutral_tokens, toxic_words, context_tokens: how many are scored.

    Raises:
        DataError: too few toxic sentences to know a standard error.
    """

    def __init__(self, model: Model, plan: Plan, part: Part, first: int = 0) -> None:
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
        others = [sum(w > 0 for w in sentence.weights) for sentence in self._toxic]
        known = {g for g, count in zip(self._toxic_groups, others, strict=True) if count}
        self.context_tokens = sum(others) if len(known) >= LEAST_GROUPS else 0
        if len(set(self._toxic_groups)) < LEAST_GROUPS:
            raise DataError(
                "too few toxic sentences are left to measure the edit on",
                expected=f"at least {LEAST_GROUPS} that do not resemble each other",
                found=str(len(set(self._toxic_groups))),
                hint="give more pairs, or both -o rank and --no-guard",
            )
        self._entered = entering(model, (self._neutral, self._toxic), first)
        self._before: list[LogProbabilities] = []  # of both kinds of text, once an edit is measured

    @property
    def perplexity(self) -> float:
        """The unedited model's, on the neutral text; there once an edit has been measured."""
        return perplexity(self._before[0])

    def measure(self, edit: Edit) -> Measured:
        """Compare an edit with the unedited model, through hooks."""
        return self.measure_all([edit])[0]

    def measure_all(self, edits: Sequence[Edit]) -> list[Measured]:
        """Compare several edits with the unedited model; a streamed model runs them together.

        The unedited model is run with the first edits only.
        """
        lowest = min(lowest_edited(self.plan, edit) for edit in edits)
        entered = self._entered if self._entered and self._entered.layer <= lowest else None
        runs = [editing(self.model.module, self.plan, edit) for edit in edits]
        if not self._before:
            runs = [*UNEDITED, *runs]
        texts = self._neutral, self._toxic
        found = log_probabilities_under(self.model, runs, texts, entered)
        self._before = self._before or found.pop(0)
        return [self._measured(neutral, toxic) for neutral, toxic in found]

    def _measured(self, neutral: LogProbabilities, toxic: LogProbabilities) -> Measured:
        changes = word_changes(self._before[1], toxic, self._words)
        return Measured(
            perplexity_ratio=perplexity_ratio(self._before[0], neutral, self._neutral_groups),
            toxic_change=mean_change(changes, self._toxic_groups),
            teacher_forced=teacher_forced(changes, self._toxic_groups),
            context_ratio=self._context_ratio(toxic),
        )

    def _context_ratio(self, after: LogProbabilities) -> Estimate | None:
        """The perplexity ratio of the other words of toxic sides, if they are enough."""
        if not self.context_tokens:
            return None
        before = weighed(self._before[1], self._toxic)
        return perplexity_ratio(before, weighed(after, self._toxic), self._toxic_groups)


def probe_of(bench: Bench, part: Part, first: int = 0, dtype: torch.dtype | None = None) -> Probe:
    """Make the ``Probe`` of a held-out part; see ``Bench.load``."""
    return Probe(bench.load(dtype), bench.plan, part, first)


def choose_strength(probe: Probe, proposal: Proposal, budget: float) -> Choice:
    """Choose the strength that makes toxic words least probable within the budget.

    A strength is within the budget if its perplexity ratio plus one standard error is, since on a
    few thousand tokens the best of several looks better than it is. The ratio of the other words of
    toxic text must keep the guard's limit in the same way. Perplexity grows with the strength, so
    bisection finds the largest strength within the budget.

    Raises:
        GuardError: even the weakest edit is over the budget.
    """

    def measure(strength: float) -> Measured:
        return probe.measure(proposal.edit(strength))

    tried = _bisect(measure, proposal.strengths, lambda found: not excess(found, budget))
    within = [strength for strength, found in tried.items() if not excess(found, budget)]
    if not within:
        text, most, ratio = excess(tried[min(tried)], budget)[0]
        raise GuardError(
            "not even the weakest edit keeps within the perplexity budget",
            expected=f"a perplexity ratio of at most {most:g} on {text}",
            found=f"{ratio.value:.4f} with a standard error of {ratio.error:.4f}",
            hint=("raise --max-perplexity-ratio, " if most == budget else "")
            + "edit fewer layers, or give more pairs",
        )
    best = min(within, key=lambda strength: tried[strength].toxic_change.value)
    trials = (Trial(strength=each, **asdict(tried[each])) for each in sorted(tried))
    return Choice(strength=best, automatic=True, tried=tuple(trials))


def excess(found: Measured, budget: float) -> list[tuple[str, float, Estimate]]:
    """The limits that an edit exceeds by a standard error: text, limit, ratio."""
    return [
        (text, most, ratio)
        for text, most, ratio in limits(found, budget)
        if not ratio.value + ratio.error <= most
    ]


def limits(found: Measured, budget: float) -> list[tuple[str, float, Estimate]]:
    """The limits of an edit: text, limit, ratio; the budget first."""
    context = found.context_ratio
    return [
        ("held-out neutral text", budget, found.perplexity_ratio),
        *([("the other words of held-out toxic text", MOST_CONTEXT, context)] if context else []),
    ]


def nearest_strength(
    measure: Callable[[float], Measured], strengths: Sequence[float], ratio: float
) -> float:
    """Find the strength whose perplexity ratio is nearest to a given one, by bisection.

    Args:
        measure: measures a strength on held-out text; it may be called twice for the same strength.
    """
    tried = _bisect(measure, strengths, lambda found: found.perplexity_ratio.value < ratio)
    return min(tried, key=lambda strength: abs(tried[strength].perplexity_ratio.value - ratio))


def _bisect(
    measure: Callable[[float], Measured],
    strengths: Sequence[float],
    is_low: Callable[[Measured], bool],
) -> dict[float, Measured]:
    """Measure strengths by bisection, up to the first that is not low."""
    tried: dict[float, Measured] = {}
    low, high = 0, len(strengths)
    with progress.bar("strengths", high.bit_length(), "strength") as shown:
        while low < high:
            middle = (low + high) // 2
            strength = strengths[middle]
            tried[strength] = measure(strength)
            low, high = (middle + 1, high) if is_low(tried[strength]) else (low, middle)
            shown.update(1)
    return tried
