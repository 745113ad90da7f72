"""Parse the systems and costs that an evaluation compares."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from pathlib import Path

from converter.errors import OptionError
from converter.methods.known import METHODS, SEPARATOR
from converter.methods.typed import typed_for
from converter.recipe import LARGEST_SEED, Recipe
from converter.text import did_you_mean

_AT_PERPLEXITY = "@perplexity"
"""After a method's name: take the strength whose perplexity is nearest to the reference's."""

_COSTS = "perplexity ratios above 1, such as 1.01,1.02,1.05"


@dataclass(frozen=True, slots=True)
class Spec:
    """One system as typed, such as ``destein:direction=causal``.

    Attributes:
        name: as typed; also the name of its rows.
        methods: the methods to fit, joined by ``+``; empty if the system is a place of a model.
        options: key -> value, or ``METHOD.KEY`` -> value.
        matches: whether its perplexity is to match that of the first system.
    """

    name: str
    methods: str
    options: Mapping[str, str]
    matches: bool


@dataclass(frozen=True, slots=True)
class Comparison:
    """The systems of an evaluation.

    Attributes:
        systems: methods to fit and places of models; see ``parse_systems``. ``random`` has the rank
            of the first system, if that removes a subspace.
        seeds: of draws and splits of the pairs.
        costs: perplexity ratios; each system is measured at the strengths nearest to them. Empty:
            at the strength chosen under the budget.
        controls: whether to measure the control of every fitted system, too.

    Raises:
        OptionError: there is no seed, one is not a whole number from 0, or a cost is not above 1.
    """

    systems: Sequence[Spec]
    seeds: Sequence[int]
    costs: Sequence[float] = ()
    controls: bool = False

    def __post_init__(self) -> None:
        if not self.seeds or any(
            type(seed) is not int or not 0 <= seed <= LARGEST_SEED for seed in self.seeds
        ):
            raise OptionError(
                "--seeds", expected=f"whole numbers from 0 to {LARGEST_SEED}",
                found=", ".join(map(str, self.seeds)) or "none",
            )  # fmt: skip
        if not all(map(_is_cost, self.costs)):
            raise OptionError("--costs", expected=_COSTS, found=", ".join(map(str, self.costs)))

    @property
    def fitted(self) -> list[Spec]:
        """The systems that are methods."""
        return [system for system in self.systems if system.methods]

    @property
    def places(self) -> list[str]:
        """The others: folders, manifests, repos."""
        return [system.name for system in self.systems if not system.methods]

    def typed(self, name: str, recipe: Recipe) -> dict[str, str]:
        """The options that were typed for a method. Raises OptionError; see ``typed_for``."""
        others = [system.methods for system in self.fitted]
        return typed_for(name, recipe.options, recipe.method, others)


def parse_systems(systems: Sequence[str]) -> tuple[Spec, ...]:
    """Systems as typed: ``gloss``, ``gloss+profs``, ``random@perplexity``, a path or a repo id.

    Options of this system alone follow the method's name and a colon:
    ``destein:direction=causal,layers=3-8``.

    Raises:
        OptionError: one of them is neither a method nor a place, has an invalid option behind its
            colon, or is given twice.
    """
    found = [_parse(system) for system in systems]
    check_names([system.name for system in found])
    return tuple(found)


def _parse(text: str) -> Spec:
    head, colon, tail = text.partition(":")
    methods = head.removesuffix(_AT_PERPLEXITY)
    if not {*methods.split(SEPARATOR)} <= {*METHODS.names()}:
        if "/" in text or Path(text).exists():
            return Spec(text, "", {}, matches=False)
        raise OptionError(
            "--system", found=text,
            expected=f"{', '.join(METHODS.names())}, a folder, a manifest or a repo id",
            hint=did_you_mean(methods, METHODS.names())
            or f"methods may be joined by {SEPARATOR}; one may end in {_AT_PERPLEXITY}; options "
            "follow a colon, such as gloss:rank=2",
        )  # fmt: skip
    if methods != head and SEPARATOR in methods:
        raise OptionError(
            "--system", expected=f"a single method before {_AT_PERPLEXITY}", found=text
        )
    options = dict[str, str]()
    for typed in (
        re.split(r",(?=[^,=]*=)", tail) if colon else ()
    ):  # a value may contain commas: 3,5-8
        key, _, value = typed.partition("=")
        if not (key and value) or key in options:
            raise OptionError(
                f"--system {text}", expected="options behind the colon, each of them once, such as "
                "rank=2,layers=3-8", found=typed or "nothing",
            )  # fmt: skip
        options[key] = value
    return Spec(text, methods, options, matches=methods != head)


@contextmanager
def naming(spec: Spec) -> Iterator[None]:
    """Within this context, an error in an option behind a system's colon names that system."""
    try:
        yield
    except OptionError as error:
        behind = {f"-o {key.rpartition('.')[2]}" for key in spec.options}
        named = re.findall(r"-o \w+", error.what)
        if not behind.intersection(named):
            raise
        what = f"--system {spec.name}: {error.what.replace('-o ', '')}"
        told = {"expected": error.expected, "found": error.found, "hint": error.hint}
        raise OptionError(what, **told) from error


def parse_costs(text: str) -> Sequence[float]:
    """Costs as typed, ascending: ``1.01,1.02,1.05``; none for an empty text. Raises OptionError."""
    try:
        costs = sorted({float(part) for part in text.split(",")}) if text else []
    except ValueError:
        costs = [0.0]
    if not all(map(_is_cost, costs)):
        raise OptionError("--costs", expected=_COSTS, found=text)
    return costs


def _is_cost(cost: float) -> bool:
    return type(cost) in (int, float) and 1 < cost < inf


def check_names(names: Sequence[str]) -> None:
    """The names of systems. Raises OptionError if two are equal, since their rows would merge."""
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise OptionError("--system", expected="systems of different names", found=twice[0])
