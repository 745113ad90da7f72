"""What an evaluation compares: systems, each of them the unedited model or what becomes of it.

A system is the unedited model, one that has been written, a recorded edit, or a method that is
fitted beside. All but written ones run through hooks on the unedited model. Two methods are
controls: ``random`` and ``profs`` edit what the first system edits.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

from converter.calibration.instances import Lesson
from converter.calibration.pairs import load_prose
from converter.calibration.split import Part, split
from converter.checkpoints.plan import Plan
from converter.edits.base import Edit
from converter.errors import GuardError, OptionError
from converter.evaluation.fit import fit_steps
from converter.evaluation.heldout import Probe, choose_strength, nearest_strength, probe_of
from converter.evaluation.self_pairs import pairs_of
from converter.methods.base import METHODS, Method, Proposal, footprint_of
from converter.methods.options import configure
from converter.methods.subspace import MAX_RANK
from converter.methods.together import SEPARATOR, check_shared, options_of, typed_for
from converter.methods.workbench import Bench
from converter.models.resident import LanguageModel
from converter.recipe import Recipe
from converter.runtime import progress

_AT_PERPLEXITY = "@perplexity"
"""After a method's name: its rank is the one whose perplexity comes nearest to the reference's."""

_DATA_FIXES = {"site": "ffn", "pooling": "predicting", "center": "4", "protect_shared": "16"}
"""ProFS as a control gets what GloSS has found out about the data: without pooling over the
positions that predict toxic words and without protection it is far worse, and beating it would say
nothing about the subspace."""


@dataclass(frozen=True, slots=True)
class System:
    """One thing to measure.

    Attributes:
        name: for tables.
        seed: of its pairs; None if nothing was fitted.
        strength: None for the unedited model.
        edit: through hooks on the unedited model; None for none, or if it is not known.
        load: gives a model that has been written, to be measured with its own weights; or None.
        layers: that it edits.
        bias: whether it edits biases, too.
        options: of its method, defaults resolved.
        lesson: that it has learnt, without an instance if these are not known; None if it has not.
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

    @property
    def title(self) -> str:
        """For people."""
        strength = "" if self.strength is None else f", strength {self.strength:g}"
        return self.name + strength + ("" if self.seed is None else f", seed {self.seed}")


@dataclass(frozen=True, slots=True)
class Comparison:
    """What to compare.

    Attributes:
        systems: methods to fit and places to look for others; see ``parse_systems``. ``random``
            has the rank of the first system, if that takes a subspace out.
        seeds: of draws and splits of the pairs.
        ranks: to measure of each; empty to choose one under the budget.

    Raises:
        OptionError: seeds or ranks are no whole numbers, there is no seed, or a rank is below 1.
    """

    systems: Sequence[str]
    seeds: Sequence[int]
    ranks: Sequence[int]

    def __post_init__(self) -> None:
        if not self.seeds or any(type(seed) is not int for seed in self.seeds):
            raise OptionError("--seeds", expected="whole numbers", found=str(self.seeds))
        if any(type(rank) is not int or rank < 1 for rank in self.ranks):
            raise OptionError("--ranks", expected="whole numbers from 1", found=str(self.ranks))

    @property
    def methods(self) -> list[str]:
        """The systems that are methods."""
        return [system for system in self.systems if _is_method(system)]

    def typed(self, name: str, recipe: Recipe) -> dict[str, str]:
        """The options that were typed for a method. Raises OptionError; see ``typed_for``."""
        return typed_for(name, recipe.options, recipe.method, [*map(_name, self.methods)])

    @property
    def places(self) -> list[str]:
        """The others: folders, manifests, repos."""
        return [system for system in self.systems if not _is_method(system)]


def _name(system: str) -> str:
    """The method of a system, or several with ``+``."""
    return system.removesuffix(_AT_PERPLEXITY)


def _is_method(system: str) -> bool:
    return {*_name(system).split(SEPARATOR)} <= {*METHODS.names()}


def parse_systems(systems: Sequence[str]) -> tuple[str, ...]:
    """Systems as typed: ``gloss``, ``gloss+profs``, ``random@perplexity``, a path or a repo id.

    Raises:
        OptionError: one of them is neither a method nor a place, or is given twice.
    """
    for system in systems:
        if not _is_method(system) and "/" not in system and not Path(system).exists():
            raise OptionError(
                "--system", found=system,
                expected=f"{', '.join(METHODS.names())}, a folder, a manifest or a repo id",
                hint=f"methods may be joined by {SEPARATOR}; one may end in {_AT_PERPLEXITY}",
            )  # fmt: skip
        if system.endswith(_AT_PERPLEXITY) and SEPARATOR in system:
            raise OptionError(
                "--system", expected=f"a single method before {_AT_PERPLEXITY}", found=system
            )
    return tuple(check_names(systems))


def check_names(names: Sequence[str]) -> Sequence[str]:
    """The names of systems. Raises OptionError if two are the same, whose rows would be one."""
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise OptionError("--system", expected="systems of different names", found=twice[0])
    return names


def edited_layers(
    method: Method, plan: Plan, edit: Edit | None = None
) -> tuple[tuple[int, ...], bool]:
    """The layers that a method edits, and whether their biases, too.

    Of those that a fit chooses among, the ones that ``edit`` changes.
    """
    every = footprint_of(method, plan).weights
    changed = {} if edit is None else edit.tensors
    weights = [weight for weight in every if weight.info.name in changed] or every
    layers = sorted({weight.layer for weight in weights})
    return tuple(layers), any(weight.is_bias for weight in weights)


@dataclass(frozen=True, slots=True)
class Fits:
    """Fits methods beside the unedited model of ``bench``, for one seed after another."""

    bench: Bench
    comparison: Comparison

    def check(self, reference: System | None) -> None:
        """Refuse from the headers what could not be fitted, and say what no rank bears on.

        Raises OptionError; see ``systems``.
        """
        for name in self.comparison.methods:
            method = self._method(name, self.comparison.seeds[0], reference)
            footprint_of(method, self.bench.plan)
            check_shared(_name(name), method, self.bench.plan)
            if self.comparison.ranks and not self._takes_ranks(name, method):
                progress.warn(f"--ranks does not bear on {name}, which is measured once")

    def systems(self, reference: System | None) -> Iterator[System]:
        """Those that are fitted, on pairs drawn and split with each seed.

        Args:
            reference: the first system, which controls are matched to; without one it is the first
                that is fitted.
        """
        recipe = self.bench.recipe
        for seed in self.comparison.seeds:
            pairs = pairs_of(self.bench, seed)
            parts = split(pairs, load_prose(recipe.neutral), seed)
            probe = cache(partial(probe_of, self.bench, parts.choose))
            first = reference
            for name in self.comparison.methods:
                method = self._method(name, seed, first)
                for strength, edit, lesson in self._edits(name, method, parts.fit, probe, first):
                    system = System(
                        name, seed, strength, edit, None,
                        *edited_layers(method, self.bench.plan, edit), options_of(method), lesson,
                    )  # fmt: skip
                    first = first or system
                    yield system

    def _edits(
        self, name: str, method: Method, part: Part, probe: Callable[[], Probe],
        first: System | None,
    ) -> Iterator[tuple[float, Edit, Lesson | None]]:  # fmt: skip
        """The strengths of a system that are measured, their edits, and what these have learnt."""
        if SEPARATOR in name:  # their strengths are chosen in turn
            try:
                last = fit_steps(self.bench, name, method, part, probe)[-1]
            except GuardError as error:
                progress.warn(f"{name}: {error.what}; it is left out")
            else:
                yield last.choice.strength, last.edit, last.proposal.lesson
            return
        proposal = self.bench.fit(method, part)
        wanted = first.edit if first else None
        strengths = self._given(name, method, proposal, wanted)
        for strength in strengths or (self._choose(name, probe(), proposal, wanted),):
            if strength > proposal.strengths[-1]:
                progress.warn(f"{name} has no {method.strength} {strength:g}, and is left out")
            else:
                yield strength, proposal.edit(strength), proposal.lesson

    def _method(self, system: str, seed: int, first: System | None) -> Method:
        """The method of a system; a control has the layers and the biases of the reference."""
        name, recipe, dimensions = _name(system), self.bench.recipe, self.bench.plan.dimensions
        typed = self.comparison.typed(name, recipe)
        if name not in ("random", "profs"):
            return configure(name, typed, dimensions)
        if first is not None and first.edit is not None:
            layers, bias, rank = first.layers, first.bias, first.edit.rank
        else:
            asked = self.comparison.typed(recipe.method, recipe)
            reference = configure(recipe.method, asked, dimensions)
            (layers, bias), rank = edited_layers(reference, self.bench.plan), 0
        options = {"bias": "project" if bias else "keep"}
        if inner := [str(layer) for layer in layers if layer < dimensions.num_hidden_layers]:
            options["layers"] = ",".join(inner)
        if name == "random":
            most = max(rank, MAX_RANK, *self.comparison.ranks)
            options |= {"draw": str(seed), "rank": str(most)}
        else:
            options |= _DATA_FIXES
        return configure(name, typed, dimensions, options)

    @staticmethod
    def _takes_ranks(system: str, method: Method) -> bool:
        """Whether a system is measured at given ranks; the strengths of several are chosen."""
        return method.strength == "rank" and not system.endswith(_AT_PERPLEXITY)

    def _given(
        self, system: str, method: Method, proposal: Proposal, wanted: Edit | None
    ) -> Sequence[float]:
        """The strengths that need no choice."""
        if system.endswith(_AT_PERPLEXITY):
            return ()
        if self.comparison.ranks and self._takes_ranks(system, method):
            return self.comparison.ranks
        if system == "random" and "rank" not in self.comparison.typed(system, self.bench.recipe):
            return (wanted.rank,) if wanted and wanted.rank else ()
        return () if proposal.is_free else (proposal.strengths[-1],)

    def _choose(self, system: str, probe: Probe, proposal: Proposal, wanted: Edit | None) -> float:
        """The strength under the budget, or what comes nearest to the reference's ratio."""
        if not system.endswith(_AT_PERPLEXITY):
            try:
                budget = self.bench.recipe.max_perplexity_ratio
                return choose_strength(probe, proposal, budget).strength
            except GuardError as error:
                least = proposal.strengths[0]
                progress.warn(f"{system}: {error.what}; strength {least:g} is measured")
                return least
        if wanted is None:
            raise OptionError(
                f"--system {system}",
                expected="an edit before it to match: another system, or a SOURCE with a manifest",
                found="none",
            )
        ratio = probe.measure(wanted).perplexity_ratio.value
        return nearest_strength(probe, proposal, ratio)
