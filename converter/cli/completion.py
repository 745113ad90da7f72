"""The command ``gloss completion``: scripts with which a shell completes our options."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import click
from click.shell_completion import get_completion_class

from converter.cli.command import Answer, Console, command
from converter.cli.fields import Part
from converter.errors import DestinationError
from converter.option import Option, Options

PROGRAMS = ("gloss", "gloss-convert")


@dataclass(frozen=True, slots=True, kw_only=True)
class _CompletionOptions(Options):
    """For which shell."""

    # fmt: off
    shell: Annotated[Literal["bash", "zsh", "fish"], Option("Shell.", flag="SHELL")]
    install: Annotated[bool, Option("Write it to the place from which the shell loads it.")] = False
    # fmt: on


@command(
    "completion",
    Part(Console, without=("cache_dir", "verbose", "log_file")),
    loads=False,
    asked=Part(_CompletionOptions),
    examples=("gloss completion bash --install", "gloss completion zsh >> ~/.zshrc"),
)
def completion_command(asked: _CompletionOptions) -> Answer:
    """Print a script that makes SHELL (bash, zsh or fish) complete the options of gloss and
    gloss-convert.

    With --install it is kept in a file of the shell's own, for bash and fish, or added to .zshrc.
    """
    scripts = {name: _script(asked.shell, name) for name in PROGRAMS}
    if not asked.install:
        return Answer(scripts, "\n".join(scripts.values()))
    try:
        places = _install(asked.shell, scripts)
    except OSError as error:
        raise DestinationError(
            f"completion for {asked.shell} cannot be installed", found=str(error)
        ) from error
    written = sorted({str(place) for place in places})
    return Answer({"written": written}, f"written: {', '.join(written)}; open a new {asked.shell}")


def _script(shell: str, name: str) -> str:
    """A script that a shell runs once to complete a program."""
    kind = get_completion_class(shell)
    assert kind is not None  # click has these three
    variable = f"_{name.replace('-', '_')}_COMPLETE".upper()
    told = kind(click.Command(name), {}, name, variable)
    return told.source_template % told.source_vars()


def _install(shell: str, scripts: dict[str, str]) -> list[Path]:
    """Write the scripts. Raises OSError."""
    home = Path.home()
    if shell == "zsh":
        place = Path(os.environ.get("ZDOTDIR", home)) / ".zshrc"
        before = place.read_text("utf-8") if place.exists() else ""
        new = [script for script in scripts.values() if script.strip() not in before]
        with place.open("a", encoding="utf-8") as file:
            file.write("".join(f"\n{script}\n" for script in new))
        return [place]
    data = Path(os.environ.get("XDG_DATA_HOME") or home / ".local/share")
    config = Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config")
    folder = config / "fish/completions"
    if shell == "bash":
        folder = data / "bash-completion/completions"
    folder.mkdir(parents=True, exist_ok=True)
    places = []
    for name, script in scripts.items():
        places.append(folder / (name if shell == "bash" else f"{name}.fish"))
        places[-1].write_text(f"{script}\n", "utf-8")
    return places
