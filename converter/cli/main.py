"""The program ``gloss`` and its commands; the one that prints all options is here."""

import atexit
import gc
from typing import Any

import click

from converter.cli.architectures import architectures_command
from converter.cli.calibrate import calibrate_command
from converter.cli.command import Command
from converter.cli.compare import compare_command
from converter.cli.completion import completion_command
from converter.cli.convert import convert_command, plan_command
from converter.cli.converted import push_command, replay_command, verify_command
from converter.cli.diff import diff_command
from converter.cli.evaluate import evaluate_command
from converter.cli.guide import guide_command
from converter.cli.methods import methods_command
from converter.cli.recipe import recipe_command
from converter.cli.report import report_command
from converter.cli.schema import schema_command
from converter.cli.search import search_command
from converter.cli.terminal import echo, printing
from converter.option import Declared
from converter.version import __version__

_COMMANDS = (
    convert_command,
    plan_command,
    recipe_command,
    verify_command,
    push_command,
    replay_command,
    diff_command,
    evaluate_command,
    compare_command,
    report_command,
    search_command,
    architectures_command,
    methods_command,
    calibrate_command,
    completion_command,
    guide_command,
    schema_command,
)


# At its end Python looks for garbage among the 400,000 objects of torch and transformers and frees
# them one by one, for a second or more after the last line. The end of the process frees them too.
# Standard streams are flushed, and temporary folders removed, as ever.
atexit.register(gc.freeze)


class _Program(click.Group):
    def main(self, *args: Any, **settings: Any) -> Any:
        with printing():
            return super().main(*args, **settings)


@click.group(cls=_Program, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="gloss")
def gloss() -> None:
    """Make language models less toxic by editing their checkpoints."""


for each in _COMMANDS:
    gloss.add_command(each)
click.version_option(__version__, prog_name="gloss-convert")(convert_command)


@gloss.command("options", cls=Command)
def _options() -> None:
    """Print every option of every command, as Markdown tables."""
    owners: dict[type, list[str]] = {}
    options: dict[type, dict[str, Declared]] = {}
    for each in _COMMANDS:
        for part in each.parts:
            owners.setdefault(part.cls, []).append(f"`{each.name}`")
            options.setdefault(part.cls, {}).update({o.name: o for o in part.options})
    tables = []
    for cls, names in owners.items():
        about = " ".join((cls.__doc__ or "").partition("\n\n")[0].split()).removesuffix(".")
        rows = [
            f"| {_typed(option)} | {option.default_text or ''} | {option.option.help} |"
            for option in options[cls].values()
        ]
        head = f"{about} ({', '.join(names)}):\n\n| option | default | meaning |\n|---|---|---|"
        tables.append("\n".join([head, *rows]))
    echo("\n\n".join(tables))


def _typed(option: Declared) -> str:
    """The option as people type it, with its values or an example of one."""
    if option.kind is bool:
        return ", ".join(f"`{flag}`" for flag in option.flag.split("/"))
    if not option.flag.startswith("-"):
        return f"`{option.flag}`"
    values = option.choices or (option.option.example,)
    return ", ".join(f"`{value}`" for value in (f"{option.flag} {values[0]}", *values[1:]))
