"""What an evaluation compares: the unedited model, the edited one, and controls fitted beside it.

Controls never touch a weight: each is a projection that runs through hooks on the unedited model.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from converter.calibration.pairs import load_pairs, load_prose
from converter.calibration.split import Parts, split
from converter.checkpoints.plan import Plan
from converter.edits.base import Edit
from converter.errors import GuardError, OptionError
from converter.evaluation.heldout import Probe, probe_of
from converter.evaluation.strength import choose_strength, nearest_strength
from converter.methods.base import METHODS, Method, Proposal, footprint_of
from converter.methods.options import configure
from converter.methods.subspace import MAX_RANK
from converter.methods.workbench import Bench
from converter.runtime import progress

AT_PERPLEXITY = "@perplexity"
"""After a control's name: its rank is the one whose perplexity comes nearest to the reference's."""

DATA_FIXES = {
    "site": "ffn",
    "pooling": "predicting",
    "center": "4",
    "protect_shared": "16",
}
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
    """

    name: str
    seed: int | None = None
    strength: float | None = None
    edit: Edit | None = None
    layers: tuple[int, ...] = ()
    bias: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)


def _name(control: str) -> str:
    """The method of a control."""
    return control.removesuffix(AT_PERPLEXITY)


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
                hint=f"each may be followed by {AT_PERPLEXITY}",
            )  # fmt: skip
    return controls


def edited_layers(method: Method, plan: Plan) -> tuple[tuple[int, ...], bool]:
    """The layers that a method edits, and whether their biases, too."""
    weights = footprint_of(method, plan).weights
    layers = sorted({weight.layer for weight in weights})
    return tuple(layers), any(weight.is_bias for weight in weights)


class Fits:
    """Fits controls, for one seed after another.

    Args:
        bench: the unedited model.
        options: of the reference method, as typed.
        ranks: to measure of every fitted method; empty to choose one under the budget.
    """

    def __init__(self, bench: Bench, options: Mapping[str, str], ranks: Sequence[int]) -> None:
        self.bench, self.options, self.ranks = bench, dict(options), tuple(ranks)

    def systems(
        self, controls: Sequence[str], seeds: Sequence[int], reference: System | None
    ) -> Iterator[System]:
        """The controls, fitted on pairs drawn and split with each seed.

        Args:
            controls: names of methods. ``random`` has the rank of the reference, if that takes a
                subspace out.
            seeds: of draws and splits.
            reference: the edited model, if there is one; else the first control is the reference.
        """
        for seed in seeds:
            parts = self._parts(seed)
            probe: Probe | None = None
            first = reference
            for control in controls:
                method = self._method(control, seed, first)
                proposal = self.bench.fit(method, parts.fit)
                strengths = self._given(control, proposal, first)
                if not strengths:
                    probe = probe or probe_of(self.bench, parts.choose)
                    strengths = (self._choose(control, probe, proposal, first),)
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

    def _parts(self, seed: int) -> Parts:
        recipe = self.bench.recipe
        pairs = load_pairs(recipe.pairs, self.bench.words, recipe.num_pairs, seed)
        return split(pairs, load_prose(recipe.neutral), seed)

    def _method(self, control: str, seed: int, first: System | None) -> Method:
        """A control with the layers and the biases of the reference."""
        name, recipe, dimensions = _name(control), self.bench.recipe, self.bench.plan.dimensions
        free = {"rank": "auto"}
        if name == recipe.method and name not in ("random", "profs"):  # what is typed is its own
            return configure(name, self.options, dimensions, free)
        if first is not None and first.edit is not None:
            layers, bias = first.layers, first.bias
        else:
            reference = configure(recipe.method, self.options, dimensions, free)
            layers, bias = edited_layers(reference, self.bench.plan)
        options = {"bias": "project" if bias else "keep"}
        if inner := [str(layer) for layer in layers if layer < dimensions.num_hidden_layers]:
            options["layers"] = ",".join(inner)
        if name == "random":
            rank = first.edit.rank if first is not None and first.edit is not None else 0
            options |= {"draw": str(seed), "rank": str(max(rank, MAX_RANK, *self.ranks, 1))}
        elif name == "profs":
            options |= DATA_FIXES
        return configure(name, {}, dimensions, options)  # as far as it has them

    def _given(self, control: str, proposal: Proposal, first: System | None) -> tuple[float, ...]:
        """The strengths that need no choice."""
        if control.endswith(AT_PERPLEXITY):
            return ()
        if self.ranks:
            return self.ranks
        if control == "random":
            return (first.edit.rank,) if first and first.edit and first.edit.rank else ()
        return () if proposal.is_free else (proposal.strengths[-1],)

    def _choose(
        self, control: str, probe: Probe, proposal: Proposal, first: System | None
    ) -> float:
        """The strength under the budget, or what comes nearest to the reference's ratio."""
        if not control.endswith(AT_PERPLEXITY):
            try:
                budget = self.bench.recipe.max_perplexity_ratio
                return choose_strength(probe, proposal, budget).strength
            except GuardError as error:
                least = proposal.strengths[0]
                progress.warn(f"{control}: {error.what}; strength {least:g} is measured")
                return least
        if first is None or first.edit is None:
            raise OptionError(
                f"--control {control}",
                expected="an edit before it to match: another control, or a SOURCE with a manifest",
                found="none",
            )
        wanted = probe.measure(first.edit).perplexity_ratio.value
        return nearest_strength(probe, proposal, wanted)
