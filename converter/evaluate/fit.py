"""From texts to a frozen subspace that has been examined: fit, choose the rank, guard.

One model is loaded at most, when it is first needed, and never written to: every edit that is tried
runs through hooks.
"""

from dataclasses import dataclass, replace

from converter.calibration.pairs import Pairs, Prose
from converter.calibration.split import Part, Parts, split
from converter.calibration.statistics import (
    Activations,
    texts_of_file,
)
from converter.edits.base import Projection
from converter.errors import DataError, GuardError
from converter.evaluate.guard import Verdict, examine
from converter.evaluate.heldout import probe_of
from converter.evaluate.strength import Choice, choose_rank
from converter.methods.base import Method
from converter.methods.subspace import Subspace
from converter.methods.workbench import Bench
from converter.runtime import progress


@dataclass(frozen=True, slots=True)
class Fitted:
    """What a fit gives.

    Attributes:
        parts: the texts, split.
        activations: that the fit has seen.
        subspace: of the chosen rank.
        edit: its projection.
        choice: how the rank came about.
        verdict: of the guard; None if it was switched off.
    """

    parts: Parts
    activations: Activations
    subspace: Subspace
    edit: Projection
    choice: Choice
    verdict: Verdict | None


def fit(bench: Bench, method: Method, pairs: Pairs, prose: Prose) -> Fitted:
    """Fit a method to a fetched source, choose the rank, examine the edit.

    Raises:
        ConverterError: one of its children; a GuardError if the edit must not be written.
    """
    run = bench.run
    parts = split(pairs, prose, run.seed)
    if run.activations is not None:
        fitted = Part(*texts_of_file(run.activations, parts.fit.pairs, parts.fit.prose))
        parts = replace(parts, fit=fitted)
        if not fitted.pairs.pairs and (run.guard or method.rank is None):
            raise DataError(
                f"{run.activations.name} does not say which pairs it was made from",
                hint="nothing is then known to be held out; give both -o rank and --no-guard",
            )
    seen, subspace = bench.fit(method, parts.fit)
    choice = Choice(subspace.rank, {})
    if method.rank is None:
        with progress.stage("choose", "choosing the rank on held-out text"):
            probe = probe_of(bench.load(), parts.choose)
            choice = choose_rank(probe, subspace, method, run.max_perplexity_ratio)
        subspace = subspace.truncated(choice.rank)
    edit = Projection(subspace.bases, method.edit_bias)
    verdict = None
    if run.guard:
        with progress.stage("guard", "measuring the edit and random ones on other held-out text"):
            verdict = guard(bench, method, edit, seen, parts.report)
    return Fitted(parts, seen, subspace, edit, choice, verdict)


def guard(bench: Bench, method: Method, edit: Projection, seen: Activations, part: Part) -> Verdict:
    """Examine an edit and refuse it, or with ``force`` warn, if it does not pass.

    Raises:
        GuardError: it does not pass.
    """
    run = bench.run
    verdict = examine(
        probe_of(bench.load(), part),
        edit,
        method.edit_layers,
        budget=run.max_perplexity_ratio,
        draws=run.guard_draws,
        seed=run.seed,
        moment=seen.second_moment,
        gains=bench.gains,
    )
    for warning in verdict.warnings:
        progress.warn(warning)
    if verdict.reasons:
        refusal = GuardError(
            "the edit is refused: " + "; and ".join(verdict.reasons),
            hint="nothing was written; see README, 'When the guard refuses'",
        )
        if not run.force:
            raise refusal
        progress.warn(f"--force writes an edit that the guard refuses: {refusal.what}")
    return verdict
