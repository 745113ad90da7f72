"""Parameters of a command made from classes of options: a field is an option."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from converter.errors import Faults, OptionError
from converter.option import Declared, Options, declared_options
from converter.text import did_you_mean


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
        """The values that the user gave to the current command, as its fields need them.

        Values that are wrong are left out and kept in ``faults_of`` the command, in messages that
        name the option or the variable.

        Args:
            values: of all parameters, by name.
        """
        found, context = {}, click.get_current_context()
        for option in self.options:
            source, label = context.get_parameter_source(option.name), option.label
            if source is ParameterSource.ENVIRONMENT:
                label = f"the environment variable {option.variable}"
            given = source in (ParameterSource.ENVIRONMENT, ParameterSource.COMMANDLINE)
            if given and values[option.name] is not None:
                with faults_of(context):
                    found[option.name] = option.read(values[option.name], label)
        return found

    def make(self, values: Mapping[str, Any]) -> Any:
        """The object, with defaults in the place of values that are wrong.

        Raises OptionError, or an ExceptionGroup of several, if one of them has no default.
        """
        found = self.typed(values)
        if any(each.default is MISSING and each.name not in found for each in self.options):
            faults_of(click.get_current_context()).settle()
        return self.cls(**found)


def faults_of(context: click.Context) -> Faults:
    """The mistakes in a command's options; its runner raises them."""
    faults: Faults = context.meta.setdefault("converter.faults", Faults())
    return faults


class _Keeping(click.Parameter):
    """A parameter whose faulty value becomes None, and whose fault its command collects."""

    def process_value(self, ctx: click.Context, value: Any) -> Any:
        try:
            return super().process_value(ctx, value)
        except click.MissingParameter:
            raise
        except click.BadParameter as error:
            if ctx.get_parameter_source(self.name or "") is ParameterSource.ENVIRONMENT:
                error.param_hint = f"the environment variable {self.envvar}"
            choices = self.type.choices if isinstance(self.type, click.Choice) else ()
            fault = OptionError(
                error.format_message().rstrip("."), hint=did_you_mean(str(value), choices)
            )
            faults_of(ctx).found.append(fault)
            return None


class _Option(_Keeping, click.Option):
    """An option."""


class _Argument(_Keeping, click.Argument):
    """A positional argument."""


class _Path(click.Path):
    """A path on this machine. An address is refused, since as a path it names an odd folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if "://" in str(value):
            self.fail(f"{str(value)!r} is an address; give a path on this machine", param, ctx)
        return super().convert(value, param, ctx)


def parameter(option: Declared) -> click.Parameter:
    """An option, or a positional argument. Its class checks bounds and has the default."""
    if not option.flag.startswith("-"):
        return _Argument(
            [option.name],
            type=_type(option),
            required=option.default is MISSING,
            metavar=option.flag,
        )
    return _Option(
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
        return _Path(
            option.option.exists,
            file_okay=path != "folder",
            dir_okay=path != "file",
            path_type=Path,
        )
    is_text = option.option.parse or option.kind in (tuple, dict)
    return click.types.convert_type(str if is_text else option.kind)
