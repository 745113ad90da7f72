"""From texts to an examined edit: fit, choose the strength, guard.

At most one model is loaded, when it is first needed. Its weights never change: every tried edit
runs through hooks.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from converter.calibration.instances import Lesson, load_instances
from converter.calibration.pairs import Pairs, Prose
from converter.calibration.split import Part, Parts, split
from converter.calibration.statistics import Activations, texts_of_file
from converter.checkpoints.plan import Plan
from converter.edits.base import FAULT, Edit
from converter.errors import DataError, FitError, GuardError, OptionError
from converter.evaluation.defence import DefenceProbe, unseen
from converter.evaluation.guard import examine
from converter.evaluation.headline import Headline, load_headline_prompts, why_nothing_is_drawn
from converter.evaluation.heldout import Probe, choose_strength, probe_of
from converter.evaluation.prompts import Prompts
from converter.manifest import Choice, GuardRecord
from converter.methods.base import Method, Proposal, aim_of, footprint_of, learnt_by
from converter.methods.known import SEPARATOR
from converter.methods.together import after, parts_of
from converter.methods.workbench import Bench
from converter.models.edited import lowest_layer, modules_of
from converter.recipe import Recipe
from converter.runtime import progress


@dataclass(frozen=True, slots=True)
class Step:
    """One method, fitted to the model as the former ones left it.

    Attributes:
        name, method: which.
        activations: the activations that it used; None if it needed none.
        proposal: its edits and controls on top of those of the former methods.
        choice: of its strength, by the joint effect of all methods so far.
    """

    name: str
    method: Method
    activations: Activations | None
    proposal: Proposal
    choice: Choice

    @property
    def evidence(self) -> Mapping[str, Any]:
        """The tensors that the method keeps."""
        return self.proposal.evidence

    @property
    def edit(self) -> Edit:
        """The edit of all methods so far, with the chosen strength."""
        return self.proposal.edit(self.choice.strength)


@dataclass(frozen=True, slots=True)
class Fitted:
    """The result of a fit.

    Attributes:
        parts: the texts, split.
        steps: the methods, in order; mostly one.
        edit: of all methods, with the chosen strengths.
        guard: its measurements; None if it was switched off.
        prompts: the guard's prompts; None if it had none.
        said: places of the prompts after which the unedited model said a listed word.
    """

    parts: Parts
    steps: tuple[Step, ...]
    edit: Edit
    guard: GuardRecord | None
    prompts: Prompts | None = None
    said: tuple[int, ...] = ()

    @property
    def proposal(self) -> Proposal:
        """The proposal of the last method, on top of the others."""
        return self.steps[-1].proposal

    @property
    def choice(self) -> Choice:
        """The choice of the last method's strength."""
        return self.steps[-1].choice

    @property
    def activations(self) -> Activations | None:
        """The first activations that a method used; None if there are none."""
        return next((step.activations for step in self.steps if step.activations), None)


def fit(bench: Bench, method: Method, pairs: Pairs, prose: Prose) -> Fitted:
    """Fit a method to a fetched source, choose the strength, examine the edit.

    Raises:
        ConverterError: one of its children; a GuardError if the edit must not be written.
    """
    fitted = fit_and_measure(bench, method, pairs, prose)
    if fitted.guard and fitted.guard.reasons:
        refusal = GuardError(
            "the edit is refused: " + "; and ".join(fitted.guard.reasons),
            hint="nothing was written; see gloss guide guard",
        )
        if not bench.recipe.force:
            raise refusal
        progress.warn(f"--force writes an edit that the guard refuses: {refusal.what}")
    return fitted


def fit_and_measure(bench: Bench, method: Method, pairs: Pairs, prose: Prose) -> Fitted:
    """The same, but do not raise if the guard refuses the edit.

    Raises:
        ConverterError: one of its children; a GuardError if no strength is within the budget.
    """
    recipe = bench.recipe
    why = why_nothing_is_drawn(recipe, method, bench.forward.mode)
    prompts = load_headline_prompts(recipe) if why is None else None
    parts = split(pairs, prose, recipe.seed)
    if recipe.activations is not None:
        known = Part(*texts_of_file(recipe.activations, parts.fit.pairs, parts.fit.prose))
        parts = replace(parts, fit=known)
    settle_dtype(bench, method)
    first = _lowest_layer(bench.plan, method)
    probe = cache(lambda: probe_of(bench, parts.choose, first, bench.held_out))
    steps = fit_steps(bench, recipe.method, method, parts.fit, probe)
    probe.cache_clear()  # it holds a model, and inputs of a layer
    last, found = steps[-1], None
    headline: Headline | str | None = why if aim_of(method) != "defence" else None
    if prompts is not None:
        with progress.stage("draw", f"continuing {len(prompts.texts)} prompts, unedited"):
            headline = Headline(bench, prompts, parts.report.prose)
    if recipe.guard:
        with progress.stage("guard", "measuring the edit and controls on other held-out text"):
            report = probe_of(bench, parts.report, first, bench.held_out)
            found = _guard(bench, report, last, headline)
    said = headline.said if isinstance(headline, Headline) else ()
    return Fitted(parts, steps, last.edit, found, prompts, said)


def settle_dtype(bench: Bench, method: Method) -> None:
    """Set the dtype of measurements to that of the fit where one model has to serve both: with
    several methods, of which each is measured before the next is fitted, and with defences.
    """
    if SEPARATOR in bench.recipe.method or aim_of(method) == "defence":
        bench.held_out = bench.dtype
        if bench.recipe.forward_dtype == "mixed":
            progress.warn("--forward-dtype mixed: several methods, and defences, run in float32")


def check_instances(recipe: Recipe, method: Method, *, examined: bool) -> None:
    """Refuse, before a model is loaded, instances that a method for defence cannot be fitted to.

    Args:
        examined: whether a guard will measure on the rest of the built-in set.

    Raises:
        DataError, SourceError: they cannot be read.
        OptionError: the options name an instance that does not exist.
        FitError: they leave too little of the built-in set.
    """
    parts = [part for part in parts_of("", method).values() if aim_of(part) == "defence"]
    if parts:
        known = load_instances(recipe.instances)
        learnt = tuple(each for part in parts for each in learnt_by(part, known))
        if examined and learnt:
            unseen(Lesson(learnt))


def fit_steps(
    bench: Bench, name: str, method: Method, part: Part, probe: Callable[[], Probe]
) -> tuple[Step, ...]:
    """Fit a method to some texts and choose its strength; several, one after the other.

    n methods share the perplexity budget: the first i of them together must keep within i / n of
    it.

    Args:
        name, method: see ``configure``.
        probe: makes the probe on which a strength is chosen, if one must be.

    Raises:
        ConverterError: one of its children; a GuardError if no strength is within the budget.
    """
    recipe, steps = bench.recipe, list[Step]()
    methods = parts_of(name, method)
    try:
        for number, (each, one) in enumerate(methods.items(), 1):
            bench.former = steps[-1].edit if steps else None
            proposal, seen = bench.fit(one, part), bench.seen
            if recipe.activations is not None and seen is None:
                raise OptionError(
                    "--activations", expected="a method that is fitted to activations", found=each
                )
            _check_lesson(one, proposal)
            if len(methods) > 1:
                tensors = {f"{each}.{key}": tensor for key, tensor in proposal.tensors.items()}
                proposal = replace(proposal, tensors=tensors)
            if steps:
                proposal = after(steps[-1].proposal, steps[-1].choice.strength, proposal)
            _check_texts(recipe, part, proposal, one.strength)
            budget = 1 + (recipe.max_perplexity_ratio - 1) * number / len(methods)
            choice = Choice(strength=proposal.strengths[-1], automatic=False, tried=())
            if proposal.is_free:
                with progress.stage("choose", f"choosing the {one.strength} on held-out text"):
                    choice = choose_strength(probe(), proposal, budget)
            steps.append(Step(each, one, seen, proposal, choice))
    finally:
        bench.former = None
    return tuple(steps)


def _check_texts(recipe: Recipe, part: Part, proposal: Proposal, strength: str) -> None:
    """Raise DataError if unseen texts are needed, and the texts that the fit saw are not known."""
    needed = recipe.guard or proposal.is_free
    if recipe.activations is not None and not part.pairs.pairs and needed:
        raise DataError(
            f"{recipe.activations.name} does not say which pairs it was made from",
            hint=f"nothing is then known to be held out; give both -o {strength} and --no-guard",
        )


def _check_lesson(method: Method, proposal: Proposal) -> None:
    """Check a proposal for defence: the guard needs the lesson, and no strength can be chosen by
    it.
    """
    lesson, defends = proposal.lesson, aim_of(method) == "defence"
    fits = lesson and lesson.instances and not proposal.is_free if defends else lesson is None
    if not fits:
        raise FitError(
            f"what {method.title} proposes", hint=FAULT,
            expected="what was learnt, and a strength that needs no choice"
            if defends else "no lesson, since its aim is not defence",
        )  # fmt: skip


def _lowest_layer(plan: Plan, method: Method) -> int:
    """The first layer that an edit of the method changes, by its footprint; 0 if unknown."""
    return lowest_layer(plan.architecture, modules_of(plan, footprint_of(method, plan)))


def _guard(bench: Bench, probe: Probe, step: Step, headline: Headline | str | None) -> GuardRecord:
    """Examine the edit of a step. Raises GuardError if a measurement is not a number."""
    recipe, lesson = bench.recipe, step.proposal.lesson
    return examine(
        probe,
        step.proposal,
        step.choice.strength,
        budget=recipe.max_perplexity_ratio,
        draws=recipe.guard_draws,
        seed=recipe.seed,
        defence=DefenceProbe(bench.load(), bench.plan, lesson) if lesson else None,
        headline=headline,
    )
