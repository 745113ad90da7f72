"""The command line: options become a ``Run``, errors become one line and an exit code."""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from converter import __version__
from converter.errors import ConverterError, OptionError, VerificationError
from converter.report import Report
from converter.run import Run

STOPPED = (signal.SIGTERM, signal.SIGHUP)
"""Signals that end a run as Ctrl-C does; the exit code is 128 and their number."""

EXIT_CODES = """
\b
Exit codes:
  0  done                        5  pairs, word list or activations unusable
  2  wrong option or value       6  no subspace can be fitted as asked
  3  source cannot be reached    7  destination cannot be written
  4  not an editable checkpoint  8  verification failed
  130, 143, 129  stopped by Ctrl-C, SIGTERM, SIGHUP
"""

Command = Callable[..., None]


@contextmanager
def plain_exit(as_json: bool) -> Iterator[None]:
    """Turn our errors and interruptions into one line on standard error and an exit code."""
    before = {number: signal.getsignal(number) for number in STOPPED}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, _stop)
    try:
        yield
    except ConverterError as error:
        if as_json:
            kind = type(error).__name__
            _print_json({"error": kind, "message": str(error), "exit_code": error.exit_code})
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt as error:
        number = error.args[0] if error.args else signal.SIGINT
        name = signal.Signals(number).name
        click.echo(f"stopped by {name}; no half-written checkpoint was left", err=True)
        sys.exit(128 + number)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(number: int, frame: object) -> None:
    raise KeyboardInterrupt(number)


def _print_json(data: Any) -> None:
    click.echo(json.dumps(data, indent=1, ensure_ascii=False))


def _quiet_libraries() -> None:
    """Their progress bars and advice do not belong into our output."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def run_options(command: Command) -> Command:
    """The options that make a ``Run``."""
    options = [
        click.argument("source"),
        click.option("--method", default="gloss", show_default=True, help="gloss or profs."),
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
            help="Pairs to draw.  [default: all usable, at most 2000]",
        ),
        click.option("--seed", default=0, show_default=True, help="Of that draw."),
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
            "--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:n."
        ),
        click.option(
            "--forward-dtype", default="auto", show_default=True,
            type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
            help="Dtype of the forward pass.",
        ),
        click.option(
            "--batch-size", default=16, show_default=True, type=click.IntRange(1),
            help="Sentences in one forward pass.",
        ),
        click.option("--base-model", help="Hub repo id that the card names as the base."),
        click.option(
            "--cache-dir", type=click.Path(file_okay=False, path_type=Path),
            envvar="GLOSS_CACHE_DIR", help="Kept between runs.  [default: ~/.cache/gloss-convert]",
        ),
        click.option("--json", "as_json", is_flag=True, help="Print results as JSON."),
        click.option("--quiet", is_flag=True, help="No progress, only warnings and results."),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def _make_run(source: str, options: tuple[str, ...], fields: dict[str, Any]) -> Run:
    pairs = {}
    for text in options:
        key, equals, value = text.partition("=")
        if not equals:
            raise OptionError("-o", expected="KEY=VALUE", found=text)
        name = key.strip().replace("-", "_")
        if name in pairs:
            raise OptionError(f"-o {name} is given twice")
        pairs[name] = value.strip()
    return Run(source=source, options=pairs, **fields)


@click.command("convert", epilog=EXIT_CODES)
@run_options
@click.argument("destination", type=click.Path(path_type=Path))
@click.option("--overwrite", is_flag=True, help="Replace a checkpoint at DESTINATION.")
@click.option("--dry-run", is_flag=True, help="Print the plan from the headers; touch nothing.")
@click.version_option(__version__, prog_name="gloss-convert")
def convert_command(
    source: str,
    destination: Path,
    options: tuple[str, ...],
    cache_dir: Path | None,
    as_json: bool,
    quiet: bool,
    overwrite: bool,
    dry_run: bool,
    **fields: Any,
) -> None:
    """Write a less toxic copy of the model SOURCE to the folder DESTINATION.

    SOURCE is a folder with a safetensors checkpoint, a Hub repo id with an optional @revision, or
    the word demo, which is SmolLM2-135M-Instruct.
    """
    with plain_exit(as_json):
        from converter.cache import default_cache
        from converter.pipeline import convert, describe_plan
        from converter.summary import plan_text, result_of, result_text

        _quiet_libraries()
        run = _make_run(source, options, fields)
        cache, report = cache_dir or default_cache(), Report(quiet)
        if dry_run:
            plan = describe_plan(run, cache, report, destination, overwrite)
            _print_json(plan) if as_json else click.echo(plan_text(plan))
            return
        manifest = convert(run, destination, overwrite=overwrite, cache=cache, report=report)
        result = result_of(manifest, destination, report)
        _print_json(result) if as_json else click.echo(result_text(result))


@click.command("plan", epilog=EXIT_CODES)
@run_options
def plan_command(
    source: str,
    options: tuple[str, ...],
    cache_dir: Path | None,
    as_json: bool,
    quiet: bool,
    **fields: Any,
) -> None:
    """Print what a conversion of SOURCE would do, from its headers alone."""
    with plain_exit(as_json):
        from converter.cache import default_cache
        from converter.pipeline import describe_plan
        from converter.summary import plan_text

        _quiet_libraries()
        run = _make_run(source, options, fields)
        plan = describe_plan(run, cache_dir or default_cache(), Report(quiet))
        _print_json(plan) if as_json else click.echo(plan_text(plan))


@click.command("verify", epilog=EXIT_CODES)
@click.argument("destination", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--source", help="What it was made from: a folder, a Hub repo id, or demo.")
@click.option(
    "--cache-dir", type=click.Path(file_okay=False, path_type=Path), envvar="GLOSS_CACHE_DIR"
)
@click.option("--json", "as_json", is_flag=True, help="Print results as JSON.")
@click.option("--quiet", is_flag=True, help="No progress, only results.")
def verify_command(
    destination: Path, source: str | None, cache_dir: Path | None, as_json: bool, quiet: bool
) -> None:
    """Check that the checkpoint DESTINATION is, byte for byte, what its manifest says."""
    with plain_exit(as_json):
        from converter.cache import default_cache
        from converter.source import resolve
        from converter.verify import verify

        _quiet_libraries()
        report = Report(quiet)
        original = resolve(source, cache_dir or default_cache()) if source else None
        if original:
            original.fetch()
        problems = verify(destination, original, report)
        if as_json:
            checked = {"destination": str(destination), "source": source}
            _print_json({"verified": not problems, "problems": problems, **checked})
        for problem in problems:
            click.echo(f"error: {problem}", err=True)
        if problems:
            sys.exit(VerificationError.exit_code)
        if not as_json:
            against = " and against its source" if source else ""
            click.echo(f"{destination}: verified against its manifest{against}")


@click.group()
@click.version_option(__version__, prog_name="gloss")
def gloss() -> None:
    """Make language models less toxic by editing their checkpoints."""


gloss.add_command(convert_command)
gloss.add_command(plan_command)
gloss.add_command(verify_command)
