"""From texts to an edit that has been examined: fit, choose the strength, guard.

One model is loaded at most, when it is first needed, and never written to: every edit that is tried
runs through hooks.
"""

from dataclasses import dataclass, replace

from converter.calibration.pairs import Pairs, Prose
from converter.calibration.split import Part, Parts, split
from converter.calibration.statistics import Activations, texts_of_file
from converter.edits.base import FAULT, Edit
from converter.errors import DataError, FitError, GuardError
from converter.evaluation.defence import DefenceProbe
from converter.evaluation.guard import examine
from converter.evaluation.heldout import choose_strength, probe_of
from converter.manifest import Choice, GuardRecord
from converter.methods.base import Method, Proposal, aim_of
from converter.methods.workbench import Bench
from converter.runtime import progress


@dataclass(frozen=True, slots=True)
class Fitted:
    """What a fit gives.

    Attributes:
        parts: the texts, split.
        activations: that the method has seen; None if it needed none.
        proposal: of the method.
        edit: of the chosen strength.
        choice: how that came about.
        guard: what it measured; None if it was switched off.
    """

    parts: Parts
    activations: Activations | None
    proposal: Proposal
    edit: Edit
    choice: Choice
    guard: GuardRecord | None


def fit(bench: Bench, method: Method, pairs: Pairs, prose: Prose) -> Fitted:
    """Fit a method to a fetched source, choose the strength, examine the edit.

    Raises:
        ConverterError: one of its children; a GuardError if the edit must not be written.
    """
    recipe = bench.recipe
    if aim_of(method) == "defence":
        _ = bench.instances  # what is wrong with them is said before a model is loaded
    parts = split(pairs, prose, recipe.seed)
    if recipe.activations is not None:
        known = Part(*texts_of_file(recipe.activations, parts.fit.pairs, parts.fit.prose))
        parts = replace(parts, fit=known)
    proposal = bench.fit(method, parts.fit)
    _check_lesson(method, proposal)
    if (
        recipe.activations is not None
        and not parts.fit.pairs.pairs
        and (recipe.guard or proposal.is_free)
    ):
        raise DataError(
            f"{recipe.activations.name} does not say which pairs it was made from",
            hint=f"nothing is then known to be held out; give both -o {method.strength} and "
            "--no-guard",
        )
    choice = Choice(strength=proposal.strengths[-1], automatic=False, tried=())
    if proposal.is_free:
        with progress.stage("choose", f"choosing the {method.strength} on held-out text"):
            probe = probe_of(bench, parts.choose)
            choice = choose_strength(probe, proposal, recipe.max_perplexity_ratio)
    found = None
    if recipe.guard:
        with progress.stage("guard", "measuring the edit and controls on other held-out text"):
            found = _guard(bench, proposal, choice.strength, parts.report)
    edit = proposal.edit(choice.strength)
    return Fitted(parts, bench.seen, proposal, edit, choice, found)


def _check_lesson(method: Method, proposal: Proposal) -> None:
    """The guard must know what was learnt; and a strength is chosen by toxic words alone."""
    lesson, defends = proposal.lesson, aim_of(method) == "defence"
    fits = lesson and lesson.instances and not proposal.is_free if defends else lesson is None
    if not fits:
        raise FitError(
            f"what {method.title} proposes", hint=FAULT,
            expected="what was learnt, and a strength that needs no choice"
            if defends else "no lesson, since its aim is not defence",
        )  # fmt: skip


def _guard(bench: Bench, proposal: Proposal, strength: float, part: Part) -> GuardRecord:
    """Examine an edit and refuse it, or with ``force`` warn, if it does not pass.

    Raises:
        GuardError: it does not pass.
    """
    recipe, lesson = bench.recipe, proposal.lesson
    found = examine(
        probe_of(bench, part),
        proposal,
        strength,
        budget=recipe.max_perplexity_ratio,
        draws=recipe.guard_draws,
        seed=recipe.seed,
        defence=DefenceProbe(bench.load(), bench.plan, lesson) if lesson else None,
    )
    if found.reasons:
        refusal = GuardError(
            "the edit is refused: " + "; and ".join(found.reasons),
            hint="nothing was written; see README, 'When the guard refuses'",
        )
        if not recipe.force:
            raise refusal
        progress.warn(f"--force writes an edit that the guard refuses: {refusal.what}")
    return found
