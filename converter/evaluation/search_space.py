"""The space of options that a search varies, and their typed form.

The ``search`` of an option's metadata says how it is varied, unless it is typed:

    (1.0, 2.0, 5.0)     one of these, or the default; the method is fitted for each of them
    "layers"            from one layer to another; the method is fitted once, with all of them
    "factors"           one for each layer, by four numbers:

        factor of layer n = top (1 - (1 - floor) min(1, |n - p| / w))

with p at ``peak``, from the first edited layer (0) to the last (1), and w the share ``width`` of
their number. If ``layers`` or ``factors`` are typed, the edited layers are not searched. The
strength is one of those that the fit proposes. Every axis is a list of values, so that every trial
can be typed.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from converter.checkpoints.architectures.architecture import Dimensions
from converter.checkpoints.fusing import CODE
from converter.checkpoints.plan import Plan
from converter.errors import OptionError
from converter.evaluation.searchable import check_aim, check_beside
from converter.methods.base import Layers, Method, Proposal, aim_of, footprint_of
from converter.methods.options import configure

_SHAPES: Mapping[str, Sequence[float]] = {
    "peak": (0.0, 0.25, 0.5, 0.75, 1.0),
    "width": (0.25, 0.5, 0.75, 1.0),
    "floor": (0.0, 0.5, 1.0),
    "top": (0.6, 0.8, 1.0),
}
"""Axis of the factors -> its values."""

_FLAT = {"peak": 0.5, "width": 1.0, "floor": 1.0, "top": 1.0}
"""The axes' values for factor 1 in every layer."""

_UNTOUCHED = 8
"""The first 1 / _UNTOUCHED of the layers are never edited: an edit there affects all later layers,
and every trial can start from the layer behind them.
"""

Point = Mapping[str, Any]
"""Axis -> one of its values."""


@dataclass(frozen=True, slots=True)
class Space:
    """The search space of one method.

    Attributes:
        name: of the method.
        typed: its options, as typed.
        implied: other defaults of them.
        dimensions: of the model.
        default: the method as it is without a search.
        values: option -> its values; the method is fitted for each.
        layers: the option of the edited layers, if it is searched.
        places: layers that may be edited.
        shaped: whether factors are searched.
    """

    name: str
    typed: Mapping[str, str]
    implied: Mapping[str, str]
    dimensions: Dimensions
    default: Method
    values: Mapping[str, Sequence[Any]]
    layers: str | None
    places: Layers
    shaped: bool

    @classmethod
    def of(
        cls, name: str, typed: Mapping[str, str], implied: Mapping[str, str], plan: Plan
    ) -> "Space":
        """The space of a method, without its strengths, which a fit proposes.

        Raises:
            OptionError: it cannot be searched, or nothing is left to search.
        """
        method = configure(name, typed, plan.dimensions, implied)
        check_aim(name, aim_of(method))
        check_beside(name, CODE in footprint_of(method, plan).files)
        fields = {f.name: f for f in dataclasses.fields(method) if f.name not in typed}  # type: ignore[arg-type]
        kinds = {key: f.metadata["search"] for key, f in fields.items() if "search" in f.metadata}
        layers = next((key for key, kind in kinds.items() if kind == "layers"), None)
        if {"layers", "factors"} & typed.keys():
            layers = None
        inner = plan.dimensions.ffn_layers
        own = _edited(method, layers)
        least = min(own[0], plan.dimensions.num_hidden_layers // _UNTOUCHED) if own else 0
        space = cls(
            name=name, typed=typed, implied=implied, dimensions=plan.dimensions, default=method,
            values={
                key: sorted({*kind, getattr(method, key)})
                for key, kind in kinds.items()
                if isinstance(kind, tuple)
            },
            layers=layers,
            places=tuple(layer for layer in inner if layer >= least) if layers else own,
            shaped="factors" in kinds.values(),
        )  # fmt: skip
        if not space.axes(()) and getattr(method, method.strength, None) is not None:
            raise OptionError(
                "a search", expected=f"an option of {name} that is left to it",
                found="all of them typed", hint="leave out an -o, or the search",
            )  # fmt: skip
        footprint_of(space.widest(method), plan).check_shared()
        return space

    def axes(self, strengths: Sequence[float]) -> dict[str, Sequence[Any]]:
        """Axis -> its values, ascending; only axes with more than one value."""
        found: dict[str, Sequence[Any]] = {"strength": strengths, **self.values}
        if self.layers:
            found |= {"first": self.places, "last": self.places}
        if self.shaped:
            found |= _SHAPES
        return {key: values for key, values in found.items() if len(values) > 1}

    def default_point(self, strength: float | None) -> Point:
        """The point of the method's defaults, with a strength, or the typed one."""
        own = {key: getattr(self.default, key) for key in self.values}
        layers = _edited(self.default, self.layers) or (0,)
        chosen = {} if strength is None else {"strength": strength}
        return {**chosen, **own, "first": layers[0], "last": layers[-1], **_FLAT}

    def options(self, point: Point) -> dict[str, str]:
        """A point as options, including the typed ones."""
        found = {**self.typed, **{key: str(point[key]) for key in self.values}}
        if "strength" in point:
            found[self.default.strength] = str(point["strength"])
        layers = self.places
        if self.layers:
            low, high = sorted((point["first"], point["last"]))
            layers = tuple(layer for layer in layers if low <= layer <= high)
            found[self.layers] = _range(layers)
        if self.shaped and (text := _factors_text(layers, point)):
            found["factors"] = text
        return found

    def method(self, options: Mapping[str, str]) -> Method:
        """The method with options."""
        return configure(self.name, options, self.dimensions, self.implied)

    def widest(self, method: Method) -> Method:
        """The method whose fit serves all trials that differ in strength, layers and factors."""
        free: dict[str, Any] = {}
        if method.strength not in self.typed and hasattr(method, method.strength):
            free[method.strength] = getattr(self.default, method.strength)
        if self.layers:
            free[self.layers] = self.places
        if self.shaped:
            free["factors"] = ()
        return dataclasses.replace(method, **free)  # type: ignore[type-var]

    def narrowed(self, proposal: Proposal, method: Method) -> Proposal:
        """The proposal of the fit of ``widest``, with the layers and factors of a method."""
        layers, factors = _edited(method, self.layers), getattr(method, "factors", ())
        if proposal.with_factors is not None and (self.layers or self.shaped):
            count = self.dimensions.num_hidden_layers
            left = {*self.places} - {*layers}
            return proposal.with_factors(
                tuple(0.0 if n in left else factors[n] if factors else 1.0 for n in range(count))
            )
        if proposal.with_layers is not None and self.layers:
            return proposal.with_layers(layers)
        return proposal


def _edited(method: Any, option: str | None) -> Layers:
    """The layers that a method edits: by an option, or those of its fit."""
    own: Layers = getattr(method, option or "layers", ()) or getattr(method, "layers", ())
    return getattr(method, "edited", own)


def _range(layers: Sequence[int]) -> str:
    """A run of layers as typed."""
    return str(layers[0]) if len(layers) == 1 else f"{layers[0]}-{layers[-1]}"


def _factors_text(layers: Layers, point: Point) -> str:
    """Factors as typed, such as ``7-9:0.55,10:0.62``; empty if all of them are 1."""
    peak, width = round(point["peak"] * (len(layers) - 1)), point["width"] * len(layers)

    def factor(place: int) -> float:
        far = min(1.0, abs(place - peak) / width)
        return round(float(point["top"] * (1 - (1 - point["floor"]) * far)), 2)

    runs = [(f, [layers[place] for place in run]) for f, run in groupby(range(len(layers)), factor)]
    if all(f == 1 for f, _ in runs):
        return ""
    return ",".join(f"{_range(run)}:{f}" for f, run in runs)
