"""The program ``gloss`` and its commands."""

import click

from converter.cli.command import Command
from converter.cli.convert import convert_command, plan_command
from converter.cli.diff import diff_command
from converter.cli.evaluate import evaluate_command
from converter.cli.push import push_command
from converter.cli.recipe import options_table, recipe_command
from converter.cli.replay import replay_command
from converter.cli.verify import verify_command
from converter.runtime.console import echo
from converter.version import __version__

COMMANDS = (
    convert_command,
    plan_command,
    recipe_command,
    verify_command,
    push_command,
    replay_command,
    diff_command,
    evaluate_command,
)


@click.command("architectures", cls=Command)
def architectures_command() -> None:
    """Print which models are supported, as a Markdown table."""
    from converter.checkpoints.architectures.architecture import architecture_table

    echo(architecture_table())


@click.command("options", cls=Command)
def options_command() -> None:
    """Print every option of every command, as Markdown tables."""
    echo(options_table(COMMANDS))


@click.group()
@click.version_option(__version__, prog_name="gloss")
def gloss() -> None:
    """Make language models less toxic by editing their checkpoints."""


for each in (*COMMANDS, architectures_command, options_command):
    gloss.add_command(each)
click.version_option(__version__, prog_name="gloss-convert")(convert_command)
