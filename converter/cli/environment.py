"""Options from the environment: ``--batch-size`` is also read as ``GLOSS_BATCH_SIZE``."""

import os
from typing import Any, ClassVar

import click
from click.core import ParameterSource

from converter.runtime.console import say

PREFIX = "GLOSS_"
OTHERS = ("GLOSS_SIGN_PASSWORD",)
"""Variables that are not options: what they hold must not be on a command line."""


class FromEnvironment(click.Command):
    """A command whose options are taken from the environment where they are not typed.

    The variable is named like the long option: ``--json`` is ``GLOSS_JSON``, ``--guard/--no-guard``
    is ``GLOSS_GUARD=0``, and ``-o``, which has none, is ``GLOSS_OPTIONS``. What can be given
    repeatedly is separated by spaces. One variable serves every command that has the option.

    Attributes:
        known: the variables of all commands.
    """

    known: ClassVar[set[str]] = set(OTHERS)

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        for option in self.params:
            if isinstance(option, click.Option) and not option.is_eager:
                option.envvar = variable_of(option)
                self.known.add(option.envvar)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.BadParameter as error:
            option = error.param
            typed = ctx.get_parameter_source(option.name or "") if option else None
            if isinstance(option, click.Option) and typed is ParameterSource.ENVIRONMENT:
                error.param_hint = f"the environment variable {option.envvar}"
            raise

    def invoke(self, ctx: click.Context) -> Any:
        for name in sorted(set(os.environ) - self.known):
            if name.startswith(PREFIX):
                say(f"warning: {name} is not the variable of any option", err=True)
        return super().invoke(ctx)


def variable_of(option: click.Option) -> str:
    """The variable that an option is read from."""
    name = next((text for text in option.opts if text.startswith("--")), option.name or "")
    return PREFIX + name.removeprefix("--").replace("-", "_").upper()
