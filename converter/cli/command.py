"""What all commands share: options from fields and the environment, one answer, an exit code."""

import os
import sys
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from signal import SIGINT
from typing import Annotated, Any, ClassVar

import click
from click.core import ParameterSource

from converter.cli.fields import Part
from converter.cli.signals import Stopped, leave, stopping
from converter.cli.terminal import as_json, echo, printing, reporting, write
from converter.errors import ConverterError, OptionError, SourceError, is_out_of_memory
from converter.option import PREFIX, Option, Options
from converter.runtime.cache import find_folders
from converter.runtime.registry import telling_packages

_EXIT_CODES = """
\b
Exit codes:
  0  done                        5  pairs, word list or activations unusable
  2  wrong option or value       6  the method cannot fit an edit
  3  source cannot be reached    7  destination cannot be written
  4  not an editable checkpoint  8  verification failed
  9  the guard refuses the edit  10 the Hub refuses the upload or cannot be reached
  11 a gate is closed
  130, 143, 129  stopped by Ctrl-C, SIGTERM, SIGHUP
\b
Every option is also read from the environment: --batch-size from
GLOSS_BATCH_SIZE, -o from GLOSS_OPTIONS.
"""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a command prints on standard output, and how it ends.

    Attributes:
        data: printed with ``--json``.
        text: printed without; nothing if it is empty.
        exit_code: of the process.
    """

    data: Any
    text: str
    exit_code: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Console(Options):
    """Where a command keeps things, and how it tells results."""

    # fmt: off
    cache_dir: Annotated[Path | None, Option(
        "Folder for what is kept between runs: activations, digests, the demo model.",
        by_default="~/.cache/gloss-convert", example="/scratch/gloss", path="folder",
    )] = None
    json: Annotated[bool, Option("Print results as JSON.")] = False
    quiet: Annotated[bool, Option("Print no progress, only warnings and results.")] = False
    # fmt: on


def command(
    name: str, console: Part = Part(Console), *, loads: bool = True, **parts: Part
) -> Callable[[Callable[..., Answer]], "Command"]:
    """Make a command of a function that gets one object for each part, and returns an answer.

    Args:
        name: of the command.
        console: options of ``Console`` that it has.
        loads: whether it loads libraries, which keep things in folders.
        parts: parameter of the function -> the options that make its value.
    """

    def decorate(function: Callable[..., Answer]) -> Command:
        def run(**values: Any) -> None:
            told = console.make(values)
            with _plain_exit(told.json), reporting(quiet=told.quiet, cache_dir=told.cache_dir):
                if loads:
                    find_folders(told.cache_dir)
                made = {key: part.make(values) for key, part in parts.items()}
                answer = function(**made)
                if told.json:
                    write(as_json(answer.data))
                elif answer.text:
                    echo(answer.text)
            if answer.exit_code:
                sys.exit(answer.exit_code)

        return Command(
            name,
            parts=(*parts.values(), console),
            callback=run,
            params=[each for part in (*parts.values(), console) for each in part.parameters()],
            help=function.__doc__,
            epilog=_EXIT_CODES,
        )

    return decorate


class Command(click.Command):
    """A command that warns of variables which no option is read from.

    Attributes:
        known: the variables of all commands, which serve every command that has the option; and
            that of a secret, which must not be on a command line.
        parts: that its options are from.
    """

    known: ClassVar[set[str]] = {"GLOSS_SIGN_PASSWORD"}

    def __init__(self, *args: Any, parts: tuple[Part, ...] = (), **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.parts = parts
        self.known.update(str(each.envvar) for each in self.params if each.envvar)

    def main(self, *args: Any, **settings: Any) -> Any:
        with printing():
            return super().main(*args, **settings)

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
                echo(f"warning: {name} is not the variable of any option", err=True)
        return super().invoke(ctx)


@contextmanager
def _plain_exit(in_json: bool) -> Iterator[None]:
    """Turn our errors and interruptions into one line on standard error and an exit code."""

    def refuse(error: ConverterError) -> None:
        if in_json:
            kind = type(error).__name__
            said = {"error": kind, "message": str(error), "exit_code": error.exit_code}
            write(as_json(said))
        echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)

    try:
        with stopping(), telling_packages():
            yield
    except ConverterError as error:
        refuse(error)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        refuse(SourceError("memory ran out", hint="run this on a larger machine, or with less"))
    except KeyboardInterrupt as stop:  # maybe of a library that listens for Ctrl-C itself
        leave(stop.args[0] if isinstance(stop, Stopped) else SIGINT)


def quiet_libraries() -> None:
    """Their progress bars and advice do not belong into our output."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def refuse_typed(names: Container[str | None], where: str, hint: str) -> None:
    """Raise OptionError if parameters of these names were typed, which have no effect.

    Args:
        names: of parameters of the current command.
        where: they have none, such as ``without --evaluate``.
        hint: what to do.
    """
    context = click.get_current_context()
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if parameter.name in names and source is ParameterSource.COMMANDLINE:
            raise OptionError(f"{parameter.opts[0]} has no effect {where}", hint=hint)
