"""Parameters of a command made from classes of options: a field is an option."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from converter.option import Declared, Options, declared_options


@dataclass(frozen=True, slots=True)
class Part:
    """The options of a command that make one object.

    Attributes:
        cls: the class of the object.
        without: names of fields that are no options here; they have their defaults.
    """

    cls: type[Options]
    without: tuple[str, ...] = ()

    @property
    def options(self) -> list[Declared]:
        """The options, in the order of the fields."""
        return [
            option
            for name, option in declared_options(self.cls).items()
            if name not in self.without
        ]

    def parameters(self) -> list[click.Parameter]:
        """The options as click has them."""
        return [parameter(option) for option in self.options]

    def typed(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """What the user has given to the current command, as its fields want it.

        Args:
            values: of all parameters, by name.

        Raises:
            OptionError: a value is out of bounds; the message names the option or the variable.
        """
        found, context = {}, click.get_current_context()
        for option in self.options:
            source, label = context.get_parameter_source(option.name), option.label
            if source is ParameterSource.ENVIRONMENT:
                label = f"the environment variable {option.variable}"
            if source in (ParameterSource.ENVIRONMENT, ParameterSource.COMMANDLINE):
                found[option.name] = option.read(values[option.name], label)
        return found

    def make(self, values: Mapping[str, Any]) -> Any:
        """The object. Raises OptionError."""
        return self.cls(**self.typed(values))


def parameter(option: Declared) -> click.Parameter:
    """An option, or a positional argument. Its class checks bounds and has the default."""
    if not option.flag.startswith("-"):
        return click.Argument(
            [option.name],
            type=_type(option),
            required=option.default is MISSING,
            metavar=option.flag,
        )
    return click.Option(
        [option.flag, option.name],
        type=None if option.kind is bool else _type(option),
        is_flag=option.kind is bool,
        default=None,
        multiple=option.kind in (tuple, dict),
        metavar=option.option.metavar,
        envvar=option.variable,
        help=_help(option),
    )


def _help(option: Declared) -> str:
    """What an option does, its default and an example."""
    repeated = " Repeatable." if option.kind in (tuple, dict) else ""
    notes = [
        f"{name}: {text}"
        for name, text in (("default", option.default_text), ("example", option.option.example))
        if text and text != "off"
    ]
    return option.option.help + repeated + (f"  [{'; '.join(notes)}]" if notes else "")


def _type(option: Declared) -> click.ParamType[Any]:
    """The form of a value."""
    if option.choices:
        return click.Choice(option.choices)
    if option.kind is Path:
        path = option.option.path
        return click.Path(
            option.option.exists,
            file_okay=path != "folder",
            dir_okay=path != "file",
            path_type=Path,
        )
    is_text = option.option.parse or option.kind in (tuple, dict)
    return click.types.convert_type(str if is_text else option.kind)
