"""The options of a method: typed text after -o, read by the type of its field."""

import dataclasses
from collections.abc import Mapping
from math import inf, isfinite
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, cast, get_args, get_origin, get_type_hints

import msgspec

from converter.checkpoints.architectures.architecture import Dimensions
from converter.errors import OptionError
from converter.manifest import OptionValue
from converter.methods.bounds import bounds_of, defaults_cut_down
from converter.methods.known import METHODS, SEPARATOR, Factors, Layers
from converter.methods.typed import share_out
from converter.runtime import strict_json
from converter.text import did_you_mean

if TYPE_CHECKING:
    from converter.methods.base import Method

_BITS = 63
"""The most digits of a whole number, as in a manifest."""


def configure(
    name: str,
    options: Mapping[str, str],
    dimensions: Dimensions,
    implied: Mapping[str, str] | None = None,
) -> "Method":
    """A method with its options: typed ones, and defaults, which may depend on the dimensions.

    Args:
        name, dimensions: of the method, of the model. Several methods are joined by ``+``.
        options: key -> value, as typed; for several methods, see ``share_out``.
        implied: other defaults; options that the method lacks are ignored.

    Raises:
        OptionError: an unknown method, or a class that is not a method; an unknown option, a value
            out of range, or a missing value.
    """
    if SEPARATOR in name:
        kinds = {each: _load(each) for each in name.split(SEPARATOR)}
        if len(kinds) <= name.count(SEPARATOR):
            raise OptionError("--method", expected="different methods", found=name)
        known = {each: {field.name for field in dataclasses.fields(k)} for each, k in kinds.items()}
        shared = share_out(known, options)
        parts = {each: configure(each, shared[each], dimensions, implied) for each in kinds}
        from converter.methods.together import Together  # loads torch, not needed elsewhere

        return cast("Method", Together(parts))
    kind = _load(name)
    try:
        hints = get_type_hints(kind)
    except Exception as error:  # a package's annotations may be anything
        raise METHODS.fault(name, f"{type(error).__name__}: {error}") from error
    fields = {field.name: field for field in dataclasses.fields(kind)}
    values = {**defaults_cut_down(fields.values(), dimensions), **kind.defaults(dimensions)}
    for key in values.keys() & {k for k, hint in hints.items() if hint == Layers}:
        values[key] = with_ffn(key, values[key], dimensions)
    others = {key: text for key, text in (implied or {}).items() if key in fields}
    for key, text in {**others, **options}.items():
        if key not in fields:
            raise OptionError(
                f"-o {key}: method {name}", expected=", ".join(fields), found=key,
                hint=did_you_mean(key, fields),
            )  # fmt: skip
        try:
            values[key] = _parse(key, text, hints[key], dimensions)
        except TypeError as error:
            raise METHODS.fault(name, f"its option {key} is of a type that has no text") from error
        bounds = bounds_of(fields[key], hints[key], dimensions)
        if bounds and not bounds.hold(values[key]):
            raise OptionError(f"-o {key}", expected=bounds.words, found=text)
        if (names := fields[key].metadata.get("names")) and values[key] not in names():
            raise OptionError(f"-o {key}", expected=" or ".join(names()), found=text)
    for key, option in fields.items():
        if key not in values and option.default is option.default_factory is dataclasses.MISSING:
            raise OptionError(f"-o {key}: method {name}", expected="a value", found="none")
    try:
        method = kind(**values)
        options = strict_json.plain(dataclasses.asdict(method))
        msgspec.convert(options, dict[str, OptionValue])
    except (TypeError, ValueError, msgspec.ValidationError) as error:
        raise METHODS.fault(name, f"options that cannot be kept: {error}") from error
    return cast("Method", method)


def _load(name: str) -> Any:
    """The class of a method. Raises OptionError."""
    kind = METHODS.load(name)
    if not isinstance(kind, type) or not dataclasses.is_dataclass(kind):
        raise METHODS.fault(name, "it is not a dataclass")
    METHODS.check(name, kind)
    return kind


def _parse(key: str, text: str, hint: Any, dimensions: Dimensions) -> Any:
    """A value as typed. Raises as ``parse_value``."""
    if hint == Layers:
        return with_ffn(key, parse_layers(key, text, dimensions.num_hidden_layers), dimensions)
    if hint == Factors:
        return parse_factors(key, text, dimensions.num_hidden_layers)
    return parse_value(key, text, hint)


def parse_value(key: str, text: str, hint: Any) -> Any:
    """A value that does not depend on the model, as typed.

    Raises OptionError, and TypeError if the type cannot be typed as text.
    """
    kinds = get_args(hint) if get_origin(hint) in (UnionType, Union) else (hint,)
    if NoneType in kinds and text == "auto":  # int | None: a number, or left to the program
        return None
    kinds = tuple(kind for kind in kinds if kind is not NoneType)
    expected: list[str] = []
    for kind in kinds:
        choices = get_args(kind) if get_origin(kind) is Literal else ()
        known = {str(choice): choice for choice in choices}
        if kind is bool:
            known = {"true": True, "false": False}
        if kind is str or text in known:
            return known.get(text, text)
        if not known and kind not in (int, float):
            raise TypeError(kind)
        try:
            value: Any = inf if known else kind(text)
            if kind is int and value.bit_length() > _BITS:
                expected.append("a whole number of 64 bits")
                continue
            if isfinite(value):
                return value
        except (ValueError, OverflowError):
            pass
        expected += known or [{int: "a whole number", float: "a number"}[kind]]
    raise OptionError(f"-o {key}", expected=" or ".join(expected), found=text)


def with_ffn(key: str, layers: Layers, dimensions: Dimensions) -> Layers:
    """The layers among these that have an FFN. Raises OptionError if none has."""
    found = tuple(layer for layer in layers if layer in dimensions.ffn_layers)
    if layers and not found:
        raise OptionError(
            f"-o {key}", expected=f"a layer with a feed-forward network: "
            f"{', '.join(map(str, dimensions.ffn_layers))}",
            found=", ".join(map(str, layers)),
        )  # fmt: skip
    return found


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
            # one past the end suffices for the refusal below, and avoids expanding a huge range
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


def parse_factors(key: str, text: str, num_layers: int) -> Factors:
    """``0.7`` for all layers, or ``4:0.5,5-12:0.9``; layers that are not named have 1.

    Raises:
        OptionError: malformed, not from 0 to 1, or a layer that is repeated or missing.
    """
    found: dict[int, float] = {}
    for part in text.split(","):
        where, colon, number = part.rpartition(":")
        try:
            factor = float(number)
            if not (0 <= factor <= 1 and bool(colon) >= ("," in text)):
                raise ValueError(part)  # noqa: TRY301 - as malformed as the others
        except ValueError as error:
            raise OptionError(
                f"-o {key}", found=text,
                expected="a number from 0 to 1, or layers with theirs, such as 4:0.5,5-12:0.9",
            ) from error  # fmt: skip
        layers = parse_layers(key, where, num_layers) if colon else range(num_layers)
        if twice := [layer for layer in layers if layer in found]:
            raise OptionError(f"-o {key}", expected=f"one number of layer {twice[0]}", found=text)
        found |= dict.fromkeys(layers, factor)
    return tuple(found.get(layer, 1.0) for layer in range(num_layers))
