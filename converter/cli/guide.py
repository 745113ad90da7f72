"""The command ``gloss guide``: the pages of the guide, on a terminal or in a pipe."""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import click

from converter.cli.command import Answer, Console, command
from converter.cli.fields import Part
from converter.errors import OptionError
from converter.option import Option, Options
from converter.runtime import progress
from converter.text import did_you_mean

GUIDE = Path(__file__).parents[1] / "guide"
"""The folder of the pages; ``README.md`` in it lists them."""

_COMMENT = re.compile(r"<!--.*?-->\n*", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class _GuideOptions(Options):
    """Which page of the guide."""

    # fmt: off
    topic: Annotated[str | None, Option(
        "Topic of a page; without it, the topics are listed.", flag="TOPIC", example="guard",
    )] = None
    # fmt: on


@command(
    "guide",
    Part(Console, without=("cache_dir", "quiet", "verbose", "log_file")),
    loads=False,
    asked=Part(_GuideOptions),
    examples=("gloss guide", "gloss guide guard", "gloss guide options > options.md"),
)
def guide_command(asked: _GuideOptions) -> Answer:
    """Print a page of the guide; without a TOPIC, the list of them.

    On a terminal it is styled and paged; a pipe or a file gets Markdown.
    """
    text = page(asked.topic)
    if _is_terminal() and not click.get_current_context().params["json"]:
        with progress.doing(""):  # the terminal is the pager's
            click.echo_via_pager(_styled(text), color=True)
        return Answer(None, "")
    return Answer({"topic": asked.topic, "text": text}, text)


def topics() -> list[str]:
    """The names of the pages, in alphabetical order."""
    return sorted({path.stem for path in GUIDE.glob("*.md")} - {"README"})


def page(topic: str | None) -> str:
    """The Markdown of a page, without comments; of None, the list of topics.

    Raises:
        OptionError: there is no such page.
    """
    names = topics()
    if topic is not None and topic not in names:
        raise OptionError(
            "TOPIC", expected=" or ".join(names), found=topic, hint=did_you_mean(topic, names)
        )
    path = GUIDE / f"{topic or 'README'}.md"
    return _COMMENT.sub("", path.read_text("utf-8")).rstrip("\n")


def _is_terminal() -> bool:
    return sys.stdout.isatty()


def _styled(text: str) -> str:
    """Markdown as a terminal shows it, as wide as the terminal, with its escape sequences."""
    from rich.console import Console as Terminal
    from rich.markdown import Markdown

    terminal = Terminal(force_terminal=True)
    with terminal.capture() as shown:
        terminal.print(Markdown(text))
    return shown.get()
