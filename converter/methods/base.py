"""Methods: one module each, holding a frozen dataclass ``Method`` whose fields are its options.

A new method is a new module here; nothing else has to know its name. The module's docstring is its
description, and ``Method`` carries ``title`` and ``paper``.
"""

import dataclasses
from collections.abc import Callable, Mapping
from importlib import import_module
from math import isfinite
from types import UnionType
from typing import Any, ClassVar, Literal, Protocol, get_args, get_origin, get_type_hints

from torch import Tensor

from converter.calibration.statistics import Activations, Request
from converter.calibration.word_list import WordList
from converter.checkpoints.architectures.dimensions import Dimensions
from converter.checkpoints.plan import Plan
from converter.checkpoints.weights import Weight
from converter.errors import OptionError
from converter.methods.subspace import Subspace

METHODS = {
    "gloss": "converter.methods.gloss",
    "profs": "converter.methods.profs",
    "random": "converter.methods.random_subspace",
}
"""Name -> module; a new method is a file beside these and a line here."""

Layers = tuple[int, ...]
Decode = Callable[[Tensor, int], list[tuple[str, ...]]]
"""Maps directions (C, D) and k to the k nearest tokens of each."""


class Method(Protocol):
    """What the pipeline needs of a method: an instance is the method with its options set."""

    title: ClassVar[str]
    paper: ClassVar[str]

    @property
    def rank(self) -> int | None:
        """Dimensions to remove; None if that is to be chosen under the perplexity budget."""

    @property
    def edit_layers(self) -> Layers:
        """The layers whose down-projections change."""

    @property
    def edit_bias(self) -> bool:
        """Whether the biases of these projections change too."""

    @property
    def request(self) -> Request:
        """What the fit has to see of the model."""

    def fit(self, activations: Activations, decode: Decode, words: WordList) -> Subspace:
        """Fit, then freeze. Raises FitError."""


def targets_of(method: Method, plan: Plan) -> tuple[Weight, ...]:
    """The tensors of a checkpoint that a method changes, in order of layer."""
    found = plan.weights("down_proj", method.edit_layers)
    if method.edit_bias:
        found += plan.biases("down_proj", method.edit_layers)
    return tuple(sorted(found, key=lambda weight: weight.layer))


def method_names() -> list[str]:
    """The methods there are."""
    return sorted(METHODS)


def configure(
    name: str,
    options: Mapping[str, str],
    dimensions: Dimensions,
    implied: Mapping[str, str] | None = None,
) -> Method:
    """A method with its options: as typed, or by default.

    Args:
        name: of a method.
        options: key -> value, as typed.
        dimensions: of the model; the defaults of some options depend on them.
        implied: other defaults, of those options that the method has.

    Raises:
        OptionError: an unknown method, an unknown option, or a value out of range.
    """
    if name not in method_names():
        raise OptionError("--method", expected=" or ".join(method_names()), found=name)
    kind = import_module(METHODS[name]).Method
    hints = get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    values = kind.defaults(dimensions)
    others = {key: text for key, text in (implied or {}).items() if key in fields}
    for key, text in {**others, **options}.items():
        if key not in fields:
            raise OptionError(f"-o {key}: method {name}", expected=", ".join(fields), found=key)
        values[key] = _parse(key, text, hints[key], dimensions.num_hidden_layers)
        least, names = fields[key].metadata.get("min"), fields[key].metadata.get("names")
        if least is not None and values[key] is not None and values[key] < least:
            raise OptionError(f"-o {key}", expected=f"at least {least}", found=text)
        if names is not None and values[key] not in names():
            raise OptionError(f"-o {key}", expected=" or ".join(names()), found=text)
    method: Method = kind(**values)
    return method


def _parse(key: str, text: str, hint: Any, num_layers: int) -> Any:
    if get_origin(hint) is Literal:
        if text not in get_args(hint):
            raise OptionError(f"-o {key}", expected=" or ".join(get_args(hint)), found=text)
        return text
    if hint == Layers:
        return parse_layers(key, text, num_layers)
    if get_origin(hint) is UnionType:  # int | None: a number, or left to the program
        if text == "auto":
            return None
        hint = get_args(hint)[0]
    if hint is str:
        return text
    try:
        value = hint(text)
        if not isfinite(value):
            raise ValueError(text)  # noqa: TRY301 - as malformed as the others
    except (ValueError, OverflowError) as error:
        expected = {"int": "a whole number", "float": "a number"}[hint.__name__]
        raise OptionError(f"-o {key}", expected=expected, found=text) from error
    return value


def parse_layers(key: str, text: str, num_layers: int) -> Layers:
    """``10-24`` (inclusive, from 0), ``3,5,8-9`` and the like, sorted.

    Raises:
        OptionError: malformed, or a layer that the model does not have.
    """
    layers: set[int] = set()
    try:
        for part in text.split(","):
            first, dash, last = part.partition("-")
            numbers = range(int(first), int(last if dash else first) + 1)
            if not numbers:
                raise ValueError(part)  # noqa: TRY301 - as malformed as the others
            # one past the end is enough to be refused below, and a huge range is not written out
            layers.update(numbers[: num_layers + 1])
    except ValueError as error:
        raise OptionError(
            f"-o {key}", expected="layers such as 10-24 or 3,5,8", found=text
        ) from error
    if not layers or min(layers) < 0 or max(layers) >= num_layers:
        raise OptionError(
            f"-o {key}", expected=f"layers from 0 to {num_layers - 1}", found=text or "nothing"
        )
    return tuple(sorted(layers))
