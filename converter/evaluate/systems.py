"""What an evaluation compares: the unedited model, the edited one, and controls fitted beside it.

Controls never touch a weight: each is a projection that runs through hooks on the unedited model.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from converter.calibration.pairs import load_pairs, load_prose
from converter.calibration.split import Parts, split
from converter.edits.base import Projection
from converter.errors import GuardError, OptionError
from converter.evaluate.heldout import Probe, probe_of
from converter.evaluate.strength import RANKS, choose_rank
from converter.methods.base import Method, configure, method_names
from converter.methods.subspace import MAX_RANK, Subspace
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
        rank: None for the unedited model.
        edit: through hooks on the unedited model; None for none.
        layers: that it edits.
        options: of its method, defaults resolved.
    """

    name: str
    seed: int | None = None
    rank: int | None = None
    edit: Projection | None = None
    layers: tuple[int, ...] = ()
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
        if _name(control) not in method_names():
            raise OptionError(
                "--control", expected=", ".join(method_names()), found=control,
                hint=f"each may be followed by {AT_PERPLEXITY}",
            )  # fmt: skip
    return controls


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
            controls: names of methods. ``random`` has the rank of the reference.
            seeds: of draws and splits.
            reference: the edited model, if there is one; else the first control is the reference.
        """
        for seed in seeds:
            parts = self._parts(seed)
            probe: Probe | None = None
            first = reference
            for control in controls:
                method = self._method(control, seed, first)
                subspace = self.bench.fit(method, parts.fit)[1]
                ranks = self._given(control, method, first)
                if not ranks:
                    probe = probe or probe_of(self.bench.load(), parts.choose)
                    ranks = (self._choose(control, probe, subspace, method, first),)
                for rank in ranks:
                    if rank > subspace.rank:
                        progress.warn(f"{control} has no rank {rank}, and is left out")
                        continue
                    edit = Projection(subspace.truncated(rank).bases, method.edit_bias)
                    options = asdict(method)  # type: ignore[call-overload]
                    system = System(control, seed, rank, edit, method.edit_layers, options)
                    first = first or system
                    yield system

    def _parts(self, seed: int) -> Parts:
        run = self.bench.run
        pairs = load_pairs(run.pairs, self.bench.words, run.num_pairs, seed)
        return split(pairs, load_prose(run.neutral), seed)

    def _method(self, control: str, seed: int, first: System | None) -> Method:
        """A control with the layers and the biases of the reference."""
        name, run, dimensions = _name(control), self.bench.run, self.bench.plan.dimensions
        typed = {"rank": "auto"} | self.options
        if name == run.method == "gloss":  # the options typed are its own
            return configure(name, typed, dimensions)
        if first is not None and first.edit is not None:
            layers, bias = first.layers, first.edit.bias
        else:
            reference = configure(run.method, typed, dimensions)
            layers, bias = reference.edit_layers, reference.edit_bias
        options = {"layers": ",".join(map(str, layers)), "bias": "project" if bias else "keep"}
        if name == "random":
            rank = first.rank if first is not None and first.rank is not None else 0
            options |= {"draw": str(seed), "rank": str(max(rank, MAX_RANK, *self.ranks, 1))}
        elif name == "profs":
            options |= DATA_FIXES
        return configure(name, options, dimensions)

    def _given(self, control: str, method: Method, first: System | None) -> tuple[int, ...]:
        """The ranks that need no choice."""
        if control.endswith(AT_PERPLEXITY):
            return ()
        if self.ranks:
            return self.ranks
        if control == "random":
            return (first.rank,) if first is not None and first.rank is not None else ()
        return (method.rank,) if method.rank is not None else ()

    def _choose(
        self,
        control: str,
        probe: Probe,
        subspace: Subspace,
        method: Method,
        first: System | None,
    ) -> int:
        """The rank under the budget, or the one that comes nearest to the reference's ratio."""
        budget = self.bench.run.max_perplexity_ratio
        if not control.endswith(AT_PERPLEXITY):
            try:
                return choose_rank(probe, subspace, method, budget).rank
            except GuardError as error:
                progress.warn(f"{control}: {error.what}; rank 1 is measured")
                return 1
        if first is None or first.edit is None:
            raise OptionError(
                f"--control {control}",
                expected="an edit before it to match: another control, or a SOURCE with a manifest",
                found="none",
            )
        wanted = probe.measure(first.edit, first.layers).perplexity_ratio.value
        ranks = [rank for rank in RANKS if rank <= subspace.rank]
        found: dict[int, float] = {}
        low, high = 0, len(ranks)
        while low < high:  # perplexity grows with the rank
            rank = ranks[middle := (low + high) // 2]
            edit = Projection(subspace.truncated(rank).bases, method.edit_bias)
            found[rank] = probe.measure(edit, method.edit_layers).perplexity_ratio.value
            low, high = (middle + 1, high) if found[rank] < wanted else (low, middle)
        return min(found, key=lambda rank: abs(found[rank] - wanted))
