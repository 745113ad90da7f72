"""What the commands share: the options that make a ``Run``, and errors as one line."""

import os
import sys
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from signal import SIGINT
from typing import Any

import click
from click.core import ParameterSource

from converter.cli.signals import Stopped, leave, stopping
from converter.errors import ConverterError, OptionError, SourceError, is_out_of_memory
from converter.recipe import Run
from converter.runtime.console import as_json as json_of
from converter.runtime.console import say

EXIT_CODES = """
\b
Exit codes:
  0  done                        5  pairs, word list or activations unusable
  2  wrong option or value       6  no subspace can be fitted as asked
  3  source cannot be reached    7  destination cannot be written
  4  not an editable checkpoint  8  verification failed
  9  the guard refuses the edit  10 the Hub refuses the upload or cannot be reached
  11 a gate is closed
  130, 143, 129  stopped by Ctrl-C, SIGTERM, SIGHUP
\b
Every option is also read from the environment: --batch-size from
GLOSS_BATCH_SIZE, -o from GLOSS_OPTIONS.
"""

Command = Callable[..., None]


@contextmanager
def plain_exit(as_json: bool) -> Iterator[None]:
    """Turn our errors and interruptions into one line on standard error and an exit code."""

    def refuse(error: ConverterError) -> None:
        if as_json:
            kind = type(error).__name__
            print_json({"error": kind, "message": str(error), "exit_code": error.exit_code})
        say(f"error: {error}", err=True)
        sys.exit(error.exit_code)

    try:
        with stopping():
            yield
    except ConverterError as error:
        refuse(error)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        refuse(SourceError("memory ran out", hint="run this on a larger machine, or with less"))
    except Stopped as stop:
        leave(stop.number)
    except KeyboardInterrupt:  # of a library that listens for Ctrl-C itself
        leave(SIGINT)


def print_json(data: Any) -> None:
    click.echo(json_of(data))


def quiet_libraries() -> None:
    """Their progress bars and advice do not belong into our output."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]


class Finite(click.FloatRange):
    """A number within bounds; neither infinity nor NaN, which the manifest could not hold."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        number: float = super().convert(value, param, ctx)
        if not isfinite(number):
            self.fail(f"{number} is not finite.", param, ctx)
        return number


def shared_options(command: Command) -> Command:
    """Where things are kept, and how results are told."""
    options = [
        click.option(
            "--cache-dir", type=click.Path(file_okay=False, path_type=Path),
            help="Kept between runs.  [default: ~/.cache/gloss-convert]",
        ),
        click.option("--json", "as_json", is_flag=True, help="Print results as JSON."),
        click.option("--quiet", is_flag=True, help="No progress, only warnings and results."),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def run_options(command: Command) -> Command:
    """The options that make a ``Run``."""
    options = [
        click.argument("source"),
        click.option(
            "--method", default="gloss", show_default=True, help="gloss, profs or random."
        ),
        click.option(
            "-o", "options", multiple=True, metavar="KEY=VALUE",
            help="An option of the method, such as rank=4 or layers=10-24. Repeatable.",
        ),
        click.option(
            "--pairs", default="builtin", show_default=True,
            help="builtin, a .jsonl, .tsv or .csv file, or a Hub dataset id.",
        ),
        click.option(
            "--num-pairs", type=click.IntRange(1),
            help="Pairs to draw, held-out ones included.  [default: all usable, at most 2000]",
        ),
        click.option("--seed", default=0, show_default=True, help="Of every random draw."),
        click.option(
            "--neutral", default="builtin", show_default=True,
            help="builtin, or a text file of ordinary prose.",
        ),
        click.option(
            "--word-list", default="builtin", show_default=True,
            help="builtin, or a text file with one offensive word a line.",
        ),
        click.option(
            "--activations", type=click.Path(exists=True, dir_okay=False, path_type=Path),
            help="Activations of an earlier run; no forward pass.",
        ),
        click.option(
            "--device", default="auto", show_default=True,
            help="auto, cpu, cuda, cuda:n, or map: the model spread over all there is.",
        ),
        click.option(
            "--forward-dtype", default="auto", show_default=True,
            type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
            help="Dtype of the forward pass.",
        ),
        click.option(
            "--forward", default="auto", show_default=True,
            type=click.Choice(["auto", "resident", "streamed"]),
            help="The whole model in memory, or a layer at a time; auto: what the memory allows.",
        ),
        click.option(
            "--memory-limit", metavar="SIZE",
            help="Memory to plan the forward pass with, such as 4GB.  [default: what is available]",
        ),
        click.option(
            "--batch-size", default=16, show_default=True, type=click.IntRange(1),
            help="Sentences in one forward pass.",
        ),
        click.option(
            "--rounding", default="null-space", show_default=True,
            type=click.Choice(["null-space", "nearest"]),
            help="Of edited weights: leaving nothing along the subspace, or each for itself.",
        ),
        click.option(
            "--max-perplexity-ratio", default=1.03, show_default=True,
            type=Finite(1.0, min_open=True),
            help="Budget on held-out neutral text: after over before.",
        ),
        click.option(
            "--guard/--no-guard", default=True, show_default=True,
            help="Examine the edit on held-out text before anything is written.",
        ),
        click.option(
            "--guard-draws", default=3, show_default=True, type=click.IntRange(1),
            help="Random subspaces that the edit is compared with.",
        ),
        click.option("--force", is_flag=True, help="Write even what the guard refuses."),
        click.option(
            "--mask/--no-mask", default=True, show_default=True,
            help="Star out offensive words in what is written.",
        ),
        click.option("--base-model", help="Hub repo id that the card names as the base."),
        click.option("--subfolder", default="", help="Of SOURCE, that the checkpoint is in."),
        click.option(
            "--trust-remote-code", is_flag=True,
            help="Execute code that SOURCE brings along; otherwise it is only copied.",
        ),
    ]  # fmt: skip
    command = shared_options(command)
    for option in reversed(options):
        command = option(command)
    return command


def output_option(command: Command) -> Command:
    """What is written; not for commands that only measure."""
    option = click.option(
        "--output", default="checkpoint", show_default=True,
        type=click.Choice(["checkpoint", "adapter"]),
        help="The whole model again, or a LoRA adapter to load on SOURCE.",
    )  # fmt: skip
    return option(command)


def make_run(source: str, options: tuple[str, ...], fields: dict[str, Any]) -> Run:
    pairs = {}
    for text in options:
        key, equals, value = text.partition("=")
        if not equals:
            raise OptionError("-o", expected="KEY=VALUE", found=text)
        name = key.strip().replace("-", "_")
        if name in pairs:
            raise OptionError(f"-o {name} is given twice")
        pairs[name] = value.strip()
    seed = fields.get("seed", 0)
    if not -(1 << 63) <= seed < 1 << 63:  # a manifest can hold no other
        raise OptionError("--seed", expected="a number of 64 bits", found=str(seed)[:80])
    return Run(source=source, options=pairs, **fields)


def refuse_settings(names: Container[str | None], where: str, hint: str) -> None:
    """Raise OptionError if one of these parameters of the current command was typed.

    They would have no effect, and their user would not learn it.

    Args:
        names: of the parameters.
        where: they have none, such as ``without --evaluate``.
        hint: what to do.
    """
    context = click.get_current_context()
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if parameter.name in names and source is ParameterSource.COMMANDLINE:
            raise OptionError(f"{parameter.opts[0]} has no effect {where}", hint=hint)


def refuse_unused(run: Run) -> None:
    """Raise OptionError if an option was typed that has no effect on the output that was chosen."""
    from converter.outputs.registry import output_of

    where = f"with --output {run.output}"
    refuse_settings(output_of(run.output).unused, where, "leave it out")
