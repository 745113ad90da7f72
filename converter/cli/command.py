"""The common parts of all commands: options from fields and the environment, one answer, an exit
code.
"""

import os
import sys
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from signal import SIGINT
from typing import Annotated, Any, ClassVar

import click
from click.core import ParameterSource

from converter.cli.fields import Part, faults_of
from converter.cli.help import write_examples, write_options
from converter.cli.signals import Stopped, leave, stopping
from converter.cli.terminal import as_json, echo, printing, reporting, write
from converter.errors import (
    ConverterError,
    OptionError,
    SourceError,
    errors_in,
    is_out_of_memory,
)
from converter.evaluation.gates import Gates
from converter.option import PREFIX, Option, Options, declared_options
from converter.runtime import progress
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
  11 a release gate failed 130, 143, 129 stopped by Ctrl-C, SIGTERM, SIGHUP
\b
Every option is also read from the environment: --batch-size from
GLOSS_BATCH_SIZE, -o from GLOSS_OPTIONS.
"""


@dataclass(frozen=True, slots=True)
class Answer:
    """The output of a command, and its exit code.

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
    """The cache folder of a command, and the form of its results."""

    # fmt: off
    cache_dir: Annotated[Path | None, Option(
        "Cache folder, kept between runs: activations, digests, the demo model.",
        by_default="~/.cache/gloss-convert", example="/scratch/gloss", path="folder",
    )] = None
    json: Annotated[bool, Option("Print results as JSON.")] = False
    quiet: Annotated[bool, Option("Print no progress, only warnings and results.")] = False
    verbose: Annotated[bool, Option(
        "Also print how long each stage took, and where an error comes from.",
    )] = False
    log_file: Annotated[Path | None, Option(
        "File to append the log to, with times and tracebacks of errors; also with --quiet.",
        example="run.log", path="file",
    )] = None
    # fmt: on


def command(
    name: str,
    console: Part = Part(Console),
    *,
    loads: bool = True,
    look: Callable[..., None] | None = None,
    examples: tuple[str, ...] = (),
    **parts: Part,
) -> Callable[[Callable[..., Answer]], "Command"]:
    """Make a command of a function that gets one object for each part, and returns an answer.

    Args:
        name: of the command.
        console: options of ``Console`` that it has.
        loads: whether it loads libraries, which use cache folders.
        look: gets the same objects and ``faults``, before anything is loaded, and collects their
            mistakes there. All mistakes are reported together.
        examples: command lines for the help.
        parts: parameter of the function -> the options that make its value.
    """

    def decorate(function: Callable[..., Answer]) -> Command:
        def run(**values: Any) -> None:
            told = console.make(values)
            faults = faults_of(click.get_current_context())
            with (
                reporting(
                    quiet=told.quiet, cache_dir=told.cache_dir, verbose=told.verbose,
                    log_file=told.log_file,
                ),
                _plain_exit(told.json),
                progress.doing(f"gloss {name}"),
            ):  # fmt: skip
                if loads:
                    find_folders(told.cache_dir)
                made = {key: part.make(values) for key, part in parts.items()}
                if look:
                    look(faults=faults, **made)
                faults.settle()
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
            examples=examples,
            help=function.__doc__,
            epilog=_EXIT_CODES,
            context_settings={"help_option_names": ["-h", "--help"]},
        )

    return decorate


class Command(click.Command):
    """A command that knows methods' options, and warns of unused variables.

    Attributes:
        known: the variables of all commands, which serve every command that has the option; and
            that of a secret, which must not be on a command line.
        parts: the sources of its options.
        examples: command lines for its help.
    """

    known: ClassVar[set[str]] = {"GLOSS_SIGN_PASSWORD"}

    def __init__(
        self,
        *args: Any,
        parts: tuple[Part, ...] = (),
        examples: tuple[str, ...] = (),
        **settings: Any,
    ) -> None:
        super().__init__(*args, **settings)
        self.parts, self.examples = parts, examples
        self.known.update(str(each.envvar) for each in self.params if each.envvar)

    def main(self, *args: Any, **settings: Any) -> Any:
        with printing():
            return super().main(*args, **settings)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        typed = list(args)
        try:
            return self._parsed(ctx, args, typed)
        except click.UsageError as error:
            if "--json" in typed:
                told = OptionError(error.format_message())
                write(as_json(_fault(told)))
            raise

    def _parsed(self, ctx: click.Context, args: list[str], typed: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            if said := _of_a_method(self, error.option_name, typed):
                raise click.UsageError(said, ctx) from error
            raise

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_help_text(ctx, formatter)
        write_examples(formatter, self.examples)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        write_options(formatter, self.get_params(ctx), ctx)

    def invoke(self, ctx: click.Context) -> Any:
        own = {str(each.envvar) for each in self.params if each.envvar}
        for name in sorted(set(os.environ) - self.known):
            if not name.startswith(PREFIX):
                continue
            said = f"{name} is not the variable of any option"
            near = get_close_matches(_plain(name), map(_plain, self.known), 1)
            gates = [_plain(each.variable) for each in _GATES if each.variable in own]
            gate = get_close_matches(_plain(name), gates, 1, 0.8)
            if gate:  # a misspelt gate would never be judged
                error = OptionError(said, hint=f"did you mean {PREFIX}{gate[0]}?")
                faults_of(ctx).found.append(error)
            else:
                hint = f"; did you mean {PREFIX}{near[0]}?" if near else ""
                echo(f"warning: {said}{hint}", err=True)
        return super().invoke(ctx)


_GATES = tuple(declared_options(Gates).values())


def _plain(variable: str) -> str:
    """The name of a variable without its prefix."""
    return variable.removeprefix(PREFIX)


def _of_a_method(command: click.Command, name: str, typed: list[str]) -> str | None:
    """The message for an option of a method that was typed as one of a command; None if it is not
    one.

    Args:
        command: that was typed.
        name: of the unknown option.
        typed: the arguments of the command.
    """
    if all(each.name != "options" for each in command.params):
        return None
    from converter.methods.known import SEPARATOR, described

    key = name.lstrip("-").replace("-", "_")
    owners = [method for method, each in described().items() if key in each.options]
    if not owners:
        return None
    words = [part for each in typed for part in each.split("=", 1)]
    after = words[words.index(name) + 1 :][:1] if name in words else []
    value = after[0] if after and not after[0].startswith("-") else "VALUE"
    asked = words[words.index("--method") + 1] if "--method" in words[:-1] else "gloss"
    own = {*asked.split(SEPARATOR)} & {*owners}
    beside = "" if own else f" with --method {' or '.join(owners)}"
    return f"No such option '{name}': it is an option of the method, give -o {key}={value}{beside}."


def _fault(error: ConverterError) -> dict[str, Any]:
    """An error as ``documents.Fault`` has it."""
    return {"error": type(error).__name__, "message": str(error), "exit_code": error.exit_code}


@contextmanager
def _plain_exit(in_json: bool) -> Iterator[None]:
    """Turn our errors and interruptions into one line on standard error and an exit code."""

    def refuse(*errors: ConverterError) -> None:
        progress.trace(errors[0])
        if in_json:
            told = [*map(_fault, errors)]
            write(as_json({**told[0], **({"others": told[1:]} if told[1:] else {})}))
        for error in errors:
            echo(f"error: {error}", err=True)
        sys.exit(errors[0].exit_code)

    try:
        with stopping(), telling_packages():
            yield
    except (ConverterError, ExceptionGroup) as error:
        refuse(*errors_in(error))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        refuse(SourceError("memory ran out", hint="run this on a larger machine, or with less"))
    except KeyboardInterrupt as stop:  # maybe of a library that listens for Ctrl-C itself
        leave(stop.args[0] if isinstance(stop, Stopped) else SIGINT)


def quiet_libraries() -> None:
    """Silence the progress bars and advice of libraries."""
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
