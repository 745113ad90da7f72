"""Options as data: one annotated field of a frozen dataclass declares one option.

    batch_size: Annotated[int, Option("Sentences in one forward pass.", least=1)] = 16

The command line, the ``GLOSS_*`` variable, the recipe file and the table of options are made from
this field. Name, type, default, bounds and help stand nowhere else. A class of options derives from
``Options``, which checks values from every source.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, MISSING, dataclass, fields
from math import isfinite
from operator import ge, gt, le
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from converter.errors import OptionError

PREFIX = "GLOSS_"
"""Begins the name of every variable that an option is read from."""

_MAX_EXACT = 1 << 53
"""The largest whole number up to which each is a float, too."""

NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "text"}
"""The name of a type for messages."""


@dataclass(frozen=True, slots=True)
class Option:
    """Everything about an option besides the name, type and default of its field.

    Attributes:
        help: what it does, in one or two sentences.
        by_default: the default in words, if the value itself does not say it.
        example: of a value, as typed.
        flag: as typed; by default ``--field-name``, and ``--field-name/--no-field-name`` if it is
            on by default. Without a dash, the option is a positional argument.
        metavar: stands for the value in the help.
        least: smallest value.
        above: every value must be larger.
        most: largest value.
        place: the value is a path or a public name. A manifest then records only the file name of a
            path, and a ``~`` at its beginning is the home folder.
        path: the kind of thing that the path leads to, if it is a path.
        exists: the path must exist. Only the command line checks this.
        variable: the name of its environment variable, where that of the flag is another option's
            of another command.
        parse: reads typed text. Its ValueError says what it expected.
    """

    help: str
    _: KW_ONLY
    by_default: str | None = None
    example: str | None = None
    flag: str | None = None
    metavar: str | None = None
    least: float | None = None
    above: float | None = None
    most: float | None = None
    place: bool = False
    path: Literal["file", "folder"] | None = None
    exists: bool = False
    variable: str | None = None
    parse: Callable[[str], Any] | None = None


@dataclass(frozen=True, slots=True)
class Declared:
    """One option of a class, with everything that its field declares.

    Attributes:
        name: of the field.
        kind: the type of its values, None left out: ``int``, ``float``, ``bool``, ``str``,
            ``Path``, a ``Literal``, ``tuple`` (of texts, repeatable) or ``dict`` (of texts).
        optional: whether the value may be None.
        default: of the field; ``dataclasses.MISSING`` if the option is required.
        option: the rest.
    """

    name: str
    kind: Any
    optional: bool
    default: Any
    option: Option

    @property
    def flag(self) -> str:
        """The option as typed."""
        flag = "--" + self.name.replace("_", "-")
        both = f"{flag}/--no-{flag[2:]}" if self.default is True else flag
        return self.option.flag or both

    @property
    def label(self) -> str:
        """The option as messages name it: ``--guard``, not ``--guard/--no-guard``."""
        return self.flag.partition("/")[0]

    @property
    def variable(self) -> str:
        """Its environment variable."""
        if self.option.variable:
            return self.option.variable
        long = self.label[2:] if self.label.startswith("--") else self.name
        return PREFIX + long.replace("-", "_").upper()

    @property
    def choices(self) -> tuple[str, ...]:
        """The values of a ``Literal``; empty for other types."""
        return get_args(self.kind) if get_origin(self.kind) is Literal else ()

    @property
    def default_text(self) -> str | None:
        """The default as shown in help; None if there is nothing to show."""
        if self.option.by_default or self.default in (MISSING, None, "", (), {}):
            return self.option.by_default
        if isinstance(self.default, bool):
            return "on" if self.default else "off"
        if isinstance(self.default, tuple):
            return " ".join(self.default)
        return str(self.default)

    @property
    def example(self) -> Any:
        """The example as a value to be read; None if there is none."""
        text = self.option.example
        number = self.kind in (int, float) and not self.option.parse
        return self.kind(text) if number and text is not None else text

    def read(self, value: Any, label: str | None = None) -> Any:
        """A value of the declared type, from typed text, a TOML value, or a value of that type.

        Args:
            value: to be read.
            label: names the option in a message.

        Raises:
            OptionError: the type is another, or the value is out of bounds.
        """
        label = label or self.label
        if value is None and self.optional:
            return None
        if self.kind is dict:
            return _read_table(value, label)
        if self.kind is tuple:
            return _read_texts(value, label)
        if self.option.parse and isinstance(value, str):
            try:
                value = self.option.parse(value)
            except ValueError as error:
                raise OptionError(label, expected=str(error), found=repr(value)) from error
        if self.kind is str and isinstance(value, os.PathLike):
            value = os.fspath(value)
        if self.kind is Path or self.option.place:
            value = at_home(value, label)
        if self.choices:
            if value not in self.choices:
                raise OptionError(label, expected=" or ".join(self.choices), found=_found(value))
            return value
        if self.kind is float and type(value) is int and abs(value) <= _MAX_EXACT:
            value = float(value)
        if self.kind is Path and isinstance(value, str):
            value = Path(value)
        if not isinstance(value, self.kind) or isinstance(value, bool) != (self.kind is bool):
            raise OptionError(label, expected=NAMES[self.kind], found=_found(value))
        if self.kind in (int, float):
            self._check_bounds(value, label)
        return value

    def _check_bounds(self, value: float, label: str) -> None:
        if isinstance(value, float) and not isfinite(value):
            raise OptionError(label, expected="a finite number", found=str(value))
        bounds = [
            (bound, words, holds)
            for bound, words, holds in (
                (self.option.least, "at least", ge),
                (self.option.above, "more than", gt),
                (self.option.most, "at most", le),
            )
            if bound is not None
        ]
        if not all(holds(value, bound) for bound, _, holds in bounds):
            expected = " and ".join(f"{words} {bound}" for bound, words, _ in bounds)
            raise OptionError(label, expected=expected, found=str(value)[:80])


def at_home(value: Any, label: str) -> Any:
    """Expand a leading ``~``, which a shell does not expand in quotes."""
    text = str(value)
    if text != "~" and not text.startswith("~/"):
        return value
    if (path := os.path.expanduser(text)).startswith("~"):  # noqa: PTH111 - pathlib's raises
        raise OptionError(
            label, expected="a path; there is no home folder that ~ could stand for", found=text,
            hint="give an absolute path",
        )  # fmt: skip
    return path if isinstance(value, str) else Path(path)


class Options:
    """A frozen dataclass whose annotated fields are options; values are checked when it is made."""

    __slots__ = ()

    def __post_init__(self) -> None:
        for name, declared in declared_options(type(self)).items():
            object.__setattr__(self, name, declared.read(getattr(self, name)))


def declared_options(cls: type[Any]) -> Mapping[str, Declared]:
    """The options of a class, by field name, in the order of its fields."""
    hints = get_type_hints(cls, include_extras=True)
    found = {}
    for field in fields(cls):
        hint = hints[field.name]
        if get_origin(hint) is not Annotated:
            continue
        kind, option = get_args(hint)
        optional = NoneType in get_args(kind)
        if optional:
            kind = next(member for member in get_args(kind) if member is not NoneType)
        if get_origin(kind) in (tuple, dict):
            kind = get_origin(kind)
        factory = field.default_factory
        default = field.default if factory is MISSING else factory()
        found[field.name] = Declared(field.name, kind, optional, default, option)
    return found


def _read_texts(value: Any, label: str) -> tuple[str, ...]:
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    wrong = [text for text in value if not isinstance(text, str)] if is_list else [value]
    if wrong:
        raise OptionError(label, expected="a list of texts", found=_found(wrong[0]))
    return tuple(value)


def _read_table(value: Any, label: str) -> dict[str, str]:
    """``KEY=VALUE`` texts, or a table; its numbers become text, as typed."""
    pairs: list[tuple[str, Any]] = []
    if isinstance(value, Mapping):
        pairs = list(value.items())
    else:
        for text in _read_texts(value, label):
            key, equals, rest = text.partition("=")
            if not equals:
                raise OptionError(label, expected="KEY=VALUE", found=text)
            pairs.append((key, rest))
    table: dict[str, str] = {}
    for key, item in pairs:
        if not isinstance(key, str):
            raise OptionError(label, expected="keys that are text", found=_found(key))
        name = key.strip().replace("-", "_")
        if name in table:
            raise OptionError(f"{label} {name} is given twice")
        if isinstance(item, bool) or not isinstance(item, str | int | float):
            raise OptionError(f"{label} {name}", expected="text or a number", found=_found(item))
        table[name] = str(item).strip()
    return table


def _found(value: Any) -> str:
    """A value of any type and length, shortened for a message."""
    return repr(value)[:80]
