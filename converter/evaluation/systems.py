"""What an evaluation compares: the unedited model, the edited one, and controls fitted beside it.

Controls never touch a weight: each is a projection that runs through hooks on the unedited model.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from converter.calibration.instances import Lesson
from converter.calibration.pairs import load_pairs, load_prose
from converter.calibration.split import split
from converter.checkpoints.plan import Plan
from converter.edits.base import Edit
from converter.errors import GuardError, OptionError
from converter.evaluation.heldout import Probe, choose_strength, nearest_strength, probe_of
from converter.methods.base import METHODS, Method, Proposal, footprint_of
from converter.methods.options import configure
from converter.methods.subspace import MAX_RANK
from converter.methods.workbench import Bench
from converter.runtime import progress

_AT_PERPLEXITY = "@perplexity"
"""After a control's name: its rank is the one whose perplexity comes nearest to the reference's."""

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
        edit: through hooks on the unedited model; None for none.
        layers: that it edits.
        bias: whether it edits biases, too.
        options: of its method, defaults resolved.
        lesson: that it has learnt, as far as that is known.
    """

    name: str
    seed: int | None = None
    strength: float | None = None
    edit: Edit | None = None
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
        controls: methods to fit beside; see ``parse_controls``. ``random`` has the rank of the
            reference, if that takes a subspace out.
        seeds: of draws and splits of the pairs.
        ranks: to measure of each; empty to choose one under the budget.

    Raises:
        OptionError: seeds or ranks are no whole numbers, there is no seed, or a rank is below 1.
    """

    controls: Sequence[str]
    seeds: Sequence[int]
    ranks: Sequence[int]

    def __post_init__(self) -> None:
        if not self.seeds or any(type(seed) is not int for seed in self.seeds):
            raise OptionError("--seeds", expected="whole numbers", found=str(self.seeds))
        if any(type(rank) is not int or rank < 1 for rank in self.ranks):
            raise OptionError("--ranks", expected="whole numbers from 1", found=str(self.ranks))


def _name(control: str) -> str:
    """The method of a control."""
    return control.removesuffix(_AT_PERPLEXITY)


def parse_controls(text: str) -> tuple[str, ...]:
    """``random,profs,random@perplexity`` -> its parts.

    Raises:
        OptionError: one of them is not a method.
    """
    controls = tuple(part.strip() for part in text.split(",") if part.strip())
    for control in controls:
        if _name(control) not in METHODS.names():
            raise OptionError(
                "--control", expected=", ".join(METHODS.names()), found=control,
                hint=f"each may be followed by {_AT_PERPLEXITY}",
            )  # fmt: skip
    return controls


def edited_layers(method: Method, plan: Plan) -> tuple[tuple[int, ...], bool]:
    """The layers that a method edits, and whether their biases, too."""
    weights = footprint_of(method, plan).weights
    layers = sorted({weight.layer for weight in weights})
    return tuple(layers), any(weight.is_bias for weight in weights)


@dataclass(frozen=True, slots=True)
class Fits:
    """Fits controls beside the unedited model of ``bench``, for one seed after another."""

    bench: Bench
    comparison: Comparison

    def systems(self, reference: System | None) -> Iterator[System]:
        """The controls, fitted on pairs drawn and split with each seed.

        Args:
            reference: the edited model, if there is one; else the first control is the reference.
        """
        recipe = self.bench.recipe
        for seed in self.comparison.seeds:
            pairs = load_pairs(recipe.pairs, self.bench.words, recipe.num_pairs, seed)
            parts = split(pairs, load_prose(recipe.neutral), seed)
            probe: Probe | None = None
            first = reference
            for control in self.comparison.controls:
                method = self._method(control, seed, first)
                proposal = self.bench.fit(method, parts.fit)
                wanted = first.edit if first else None
                strengths = self._given(control, proposal, wanted)
                if not strengths:
                    probe = probe or probe_of(self.bench, parts.choose)
                    strengths = (self._choose(control, probe, proposal, wanted),)
                for strength in strengths:
                    if strength > proposal.strengths[-1]:
                        progress.warn(
                            f"{control} has no {method.strength} {strength:g}, and is left out"
                        )
                        continue
                    options = asdict(method)  # type: ignore[call-overload]
                    system = System(
                        control, seed, strength, proposal.edit(strength),
                        *edited_layers(method, self.bench.plan), options,
                    )  # fmt: skip
                    first = first or system
                    yield system

    def _method(self, control: str, seed: int, first: System | None) -> Method:
        """A control with the layers and the biases of the reference."""
        name, recipe, dimensions = _name(control), self.bench.recipe, self.bench.plan.dimensions
        free = {"rank": "auto"}
        if name == recipe.method and name not in ("random", "profs"):  # what is typed is its own
            return configure(name, recipe.options, dimensions, free)
        if first is not None and first.edit is not None:
            layers, bias, rank = first.layers, first.bias, first.edit.rank
        else:
            reference = configure(recipe.method, recipe.options, dimensions, free)
            (layers, bias), rank = edited_layers(reference, self.bench.plan), 0
        options = {"bias": "project" if bias else "keep"}
        if inner := [str(layer) for layer in layers if layer < dimensions.num_hidden_layers]:
            options["layers"] = ",".join(inner)
        if name == "random":
            most = max(rank, MAX_RANK, *self.comparison.ranks)
            options |= {"draw": str(seed), "rank": str(most)}
        elif name == "profs":
            options |= _DATA_FIXES
        return configure(name, {}, dimensions, options)  # as far as it has them

    def _given(self, control: str, proposal: Proposal, wanted: Edit | None) -> Sequence[float]:
        """The strengths that need no choice."""
        if control.endswith(_AT_PERPLEXITY):
            return ()
        if self.comparison.ranks:
            return self.comparison.ranks
        if control == "random":
            return (wanted.rank,) if wanted and wanted.rank else ()
        return () if proposal.is_free else (proposal.strengths[-1],)

    def _choose(self, control: str, probe: Probe, proposal: Proposal, wanted: Edit | None) -> float:
        """The strength under the budget, or what comes nearest to the reference's ratio."""
        if not control.endswith(_AT_PERPLEXITY):
            try:
                budget = self.bench.recipe.max_perplexity_ratio
                return choose_strength(probe, proposal, budget).strength
            except GuardError as error:
                least = proposal.strengths[0]
                progress.warn(f"{control}: {error.what}; strength {least:g} is measured")
                return least
        if wanted is None:
            raise OptionError(
                f"--control {control}",
                expected="an edit before it to match: another control, or a SOURCE with a manifest",
                found="none",
            )
        ratio = probe.measure(wanted).perplexity_ratio.value
        return nearest_strength(probe, proposal, ratio)
