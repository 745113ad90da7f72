"""The systems that an evaluation compares.

A system is the unedited model, a written model, a recorded edit, or a method that is fitted for the
comparison. A written model runs with its own weights; all others run through hooks on the unedited
model. Two methods are controls: ``random`` and ``profs`` edit the layers of the first system.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

from converter.calibration.instances import Lesson
from converter.calibration.pairs import load_prose
from converter.calibration.split import Part, split
from converter.checkpoints.plan import Plan
from converter.edits.base import Edit
from converter.errors import GuardError, OptionError
from converter.evaluation.comparison import Comparison, Spec, naming
from converter.evaluation.fit import check_instances, fit_steps
from converter.evaluation.heldout import Probe, choose_strength, nearest_strength, probe_of
from converter.evaluation.self_pairs import pairs_of
from converter.manifest import Measured
from converter.methods.base import Method, Proposal, footprint_of
from converter.methods.known import SEPARATOR
from converter.methods.options import configure
from converter.methods.subspace import MAX_RANK
from converter.methods.together import check_shared, options_of
from converter.methods.workbench import Bench
from converter.models.resident import LanguageModel
from converter.runtime import progress

CONTROLS = ("random", "profs")
"""Methods that edit the layers of the first system, or else of --method."""

_DATA_FIXES = {"site": "ffn", "pooling": "predicting", "center": "4", "protect_shared": "16"}
"""ProFS as a control pools over the positions that predict toxic words, and protects neutral
directions, as GloSS does. Without these it is far worse, and a better result would say nothing
about the subspace.
"""


@dataclass(frozen=True, slots=True)
class System:
    """One system to measure.

    Attributes:
        name: for tables.
        seed: of its pairs; None if nothing was fitted.
        strength: None for the unedited model.
        edit: for hooks on the unedited model; None if there is none, or if it is not known.
        load: loads a written model, to be measured with its own weights; or None.
        layers: edited layers.
        bias: whether it edits biases, too.
        options: of its method, defaults resolved.
        lesson: that it has learnt, without instances if these are not known; None if there is none.
        cost: the requested cost that its strength was chosen for.
        suffix: text that its chat template puts behind user messages.
        is_of_unedited: whether the edit was made for the unedited model's weights.
    """

    name: str
    seed: int | None = None
    strength: float | None = None
    edit: Edit | None = None
    load: Callable[[], LanguageModel] | None = None
    layers: tuple[int, ...] = ()
    bias: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)
    lesson: Lesson | None = None
    cost: float | None = None
    suffix: str = ""
    is_of_unedited: bool = True

    @property
    def title(self) -> str:
        """For people."""
        strength = "" if self.strength is None else f", strength {self.strength:g}"
        return self.name + strength + ("" if self.seed is None else f", seed {self.seed}")


def edited_layers(
    method: Method, plan: Plan, edit: Edit | None = None
) -> tuple[tuple[int, ...], bool]:
    """The layers that a method edits, and whether it edits their biases, too.

    If a fit chooses among layers, the ones that ``edit`` changes.
    """
    every = footprint_of(method, plan).weights
    changed = {} if edit is None else edit.tensors
    weights = [weight for weight in every if weight.info.name in changed] or every
    layers = sorted({weight.layer for weight in weights})
    return tuple(layers), any(weight.is_bias for weight in weights)


@dataclass(frozen=True, slots=True)
class Fits:
    """Fits methods to the unedited model of ``bench``, seed after seed."""

    bench: Bench
    comparison: Comparison

    def check(self, reference: System | None) -> None:
        """Refuse systems that cannot be fitted, by the headers.

        Raises OptionError; see ``systems``.
        """
        for spec in self.comparison.fitted:
            with naming(spec):
                method = self._method(spec, self.comparison.seeds[0], reference)
                footprint_of(method, self.bench.plan)
                check_shared(spec.methods, method, self.bench.plan)
                check_instances(self.bench.recipe, method, examined=False)

    def systems(self, reference: System | None) -> Iterator[System]:
        """The fitted systems, on pairs drawn and split with each seed, and their controls.

        Args:
            reference: the first system, to which controls are matched; by default the first fitted
                one.
        """
        recipe = self.bench.recipe
        for seed in self.comparison.seeds:
            pairs = pairs_of(self.bench, seed)
            parts = split(pairs, load_prose(recipe.neutral), seed)
            probe = cache(partial(probe_of, self.bench, parts.choose))
            first = reference
            for spec in self.comparison.fitted:
                method = self._method(spec, seed, first)
                try:
                    proposal, chosen = self._fit(spec, method, parts.fit, probe)
                except GuardError as error:
                    progress.warn(f"{spec.name}: {error.what}; it is left out")
                    continue
                wanted = first.edit if first else None
                for strength, cost in self._strengths(spec, proposal, chosen, probe, wanted):
                    edit = proposal.edit(strength)
                    system = System(
                        spec.name, seed, strength, edit, None,
                        *edited_layers(method, self.bench.plan, edit), options_of(method),
                        proposal.lesson, cost,
                    )  # fmt: skip
                    first = first or system
                    yield system
                    if self.comparison.controls and spec.methods != "random":
                        yield replace(
                            system,
                            name=f"{spec.name}, its control",
                            edit=proposal.control(strength, seed),
                            lesson=None,
                        )

    def _fit(
        self, spec: Spec, method: Method, part: Part, probe: Callable[[], Probe]
    ) -> tuple[Proposal, float | None]:
        """The proposal of a system, and its strength if that is known.

        Raises:
            GuardError: no strength of an earlier one of several methods is within the budget.
        """
        if SEPARATOR in spec.methods:  # their strengths are chosen in turn
            last = fit_steps(self.bench, spec.methods, method, part, probe)[-1]
            return last.proposal, last.choice.strength
        proposal = self.bench.fit(method, part)
        return proposal, None if proposal.is_free else proposal.strengths[-1]

    def _method(self, spec: Spec, seed: int, first: System | None) -> Method:
        """The method of a system; a control has the layers, factors and biases of the reference."""
        name, recipe, dimensions = spec.methods, self.bench.recipe, self.bench.plan.dimensions
        typed = self._typed(spec)
        if name not in CONTROLS:
            return configure(name, typed, dimensions)
        if first is not None and first.edit is not None:
            layers, bias, rank = first.layers, first.bias, first.edit.rank
            found = self.bench.plan.find(first.edit.tensors)
            factors = {w.layer: first.edit.tensors[n].factor for n, w in found.items()}
        else:
            asked = self.comparison.typed(recipe.method, recipe)
            reference = configure(recipe.method, asked, dimensions)
            (layers, bias), rank = edited_layers(reference, self.bench.plan), 0
            factors = dict(enumerate(options_of(reference).get("factors", ())))
        options = {"bias": "project" if bias else "keep"}
        if inner := [str(layer) for layer in layers if layer < dimensions.num_hidden_layers]:
            options["layers"] = ",".join(inner)
        mild = [f"{n}:{factors[n]!r}" for n in layers if factors.get(n, 1) < 1]
        if name == "random":
            if mild and "layers" not in typed and not spec.matches:
                options["factors"] = ",".join(mild)
            options |= {"draw": str(seed), "rank": str(max(rank, MAX_RANK))}
        else:
            options |= _DATA_FIXES
        return configure(name, typed, dimensions, options)

    def _typed(self, spec: Spec) -> dict[str, str]:
        """The options of a system; its own come before those of all systems of its method."""
        return {**self.comparison.typed(spec.methods, self.bench.recipe), **spec.options}

    def _strengths(
        self, spec: Spec, proposal: Proposal, chosen: float | None, probe: Callable[[], Probe],
        wanted: Edit | None,
    ) -> Iterator[tuple[float, float | None]]:  # fmt: skip
        """The strengths to measure, each with the nearest of the costs."""
        is_random = spec.methods == "random" and "rank" not in self._typed(spec)

        @cache
        def measured(strength: float) -> Measured:
            return probe().measure(proposal.edit(strength))

        def nearest(ratio: float) -> float:
            return nearest_strength(measured, proposal.strengths, ratio)

        if self.comparison.costs and not (proposal.is_free or is_random or spec.matches):
            progress.warn(
                f"--system {spec.name}: its strength is given by its options, so --costs does not "
                "apply to it"
            )
        if spec.matches:
            if wanted is None:
                raise OptionError(
                    f"--system {spec.name}",
                    expected="an edit before it to match: another system, or a SOURCE with a "
                    "manifest",
                    found="none",
                )
            yield nearest(probe().measure(wanted).perplexity_ratio.value), None
        elif self.comparison.costs and (proposal.is_free or is_random):
            costs = {nearest(cost): cost for cost in sorted(self.comparison.costs, reverse=True)}
            yield from sorted(costs.items())
        elif is_random and wanted and wanted.rank:
            yield wanted.rank, None
        elif chosen is not None and not is_random:
            yield chosen, None
        else:
            yield self._choose(spec, probe(), proposal), None

    def _choose(self, spec: Spec, probe: Probe, proposal: Proposal) -> float:
        """The strength under the budget; the least, if that is over it."""
        try:
            budget = self.bench.recipe.max_perplexity_ratio
            return choose_strength(probe, proposal, budget).strength
        except GuardError as error:
            least = proposal.strengths[0]
            progress.warn(f"{spec.name}: {error.what}; strength {least:g} is measured")
            return least
