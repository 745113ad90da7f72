"""The command ``gloss compare``, and two texts side by side on a terminal."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from shutil import get_terminal_size
from typing import TYPE_CHECKING, Annotated, Any
from unicodedata import east_asian_width

import click

from converter.cli.command import Answer, command, quiet_libraries, refuse_typed
from converter.cli.fields import Part
from converter.cli.terminal import echo
from converter.errors import DestinationError, Faults, OptionError
from converter.evaluation.options import SampleOptions
from converter.option import Option, Options, declared_options
from converter.recipe import CLUSTER, Recipe, Settings
from converter.runtime import progress
from converter.runtime.files import reason
from converter.text import one_line, readable

if TYPE_CHECKING:
    from converter.evaluation.samples import Said, Sample

_RECIPE = (
    "prompts", "seed", "word_list", "device", "forward_dtype", "mask", "subfolder",
    "trust_remote_code",
)  # fmt: skip
"""Options of a recipe that affect continuations."""

_NARROW, _BETWEEN = 24, " | "
"""The least terminal columns for two texts side by side, and the text between them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _CompareOptions(Options):
    """The models to compare, and the destination of the result."""

    # fmt: off
    base: Annotated[str, Option(
        "Unedited model: a folder, a Hub repo id, or demo.", flag="BASE", place=True,
    )]
    edited: Annotated[str, Option(
        "Edited copy of it: a folder, an adapter, a manifest or a repo id.",
        flag="EDITED", place=True,
    )]
    output: Annotated[Path | None, Option(
        "File for the result: .html, .md, or .jsonl.", example="page.html",
        variable="GLOSS_COMPARE_OUTPUT",
    )] = None
    interactive: Annotated[bool, Option(
        "Continue typed prompts, a line each, until end of file.",
    )] = False
    chat: Annotated[bool | None, Option(
        "Treat prompts as user messages, through the chat template.",
        flag="--chat/--no-chat", by_default="with --interactive, where there is a template",
    )] = None
    # fmt: on


class _Typed(Part):
    """What was typed of some options."""

    def make(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return self.typed(values)


def _look(
    *,
    asked: _CompareOptions,
    how: SampleOptions,
    recipe: dict[str, Any],
    settings: Settings,
    faults: Faults,
) -> None:
    """Find what is wrong with a comparison before torch is loaded."""
    from converter.entrypoints import first_look
    from converter.evaluation.known import check_scorer

    with faults:
        _check_output(asked.output)
    with faults:
        if asked.interactive:
            refuse_typed(("prompts", "num_prompts"), "with --interactive", "type the prompts")
    with faults:
        first_look.look_at_recipe(Recipe(source=asked.base, **recipe), settings, faults)
    first_look.look_at_place("EDITED: ", asked.edited, faults)
    for name in how.scorers:
        with faults:
            check_scorer(name, "--scorer")


@command(
    "compare",
    asked=Part(_CompareOptions),
    how=Part(SampleOptions),
    recipe=_Typed(Recipe, without=tuple(declared_options(Recipe).keys() - {*_RECIPE})),
    settings=Part(Settings, without=("workers", *CLUSTER, "keep_source")),
    look=_look,
    examples=(
        "gloss compare demo ./out",
        "gloss compare demo ./out --prompts prompts.txt --output page.html",
        "gloss compare demo ./out --interactive",
    ),
)
def compare_command(
    asked: _CompareOptions, how: SampleOptions, recipe: dict[str, Any], settings: Settings
) -> Answer:
    """Show the continuations of the same prompts by BASE and EDITED, side by side.

    If the edit of EDITED is known, it runs in hooks on BASE, so that only one model is in memory.
    The texts illustrate an edit; gloss evaluate measures it.
    """
    from converter.entrypoints.compare import compare, two_models
    from converter.evaluation.pages import compared_data, means_text, write_page

    quiet_libraries()
    run = Recipe(source=asked.base, **recipe)
    two = two_models(
        run, asked.edited, how, settings, chat=asked.chat, interactive=asked.interactive
    )
    width = get_terminal_size((100, 24)).columns
    found: list[Sample] = []
    if asked.interactive:
        progress.note("a prompt a line, until end of file")
        for prompt in _typed_prompts():
            found += (said := two.say([prompt]))
            if not _in_json():
                echo(samples_text(two.about.base, two.about.edited, said, width))
    else:
        found = compare(two, run, how)
    if asked.output is not None:
        try:
            write_page(asked.output, two.about, found)
        except OSError as error:
            raise DestinationError(
                f"--output {asked.output} cannot be written", found=reason(error)
            ) from error
        progress.note(f"  written: {asked.output}")
    text = means_text(found) if found else ""
    if not asked.interactive:
        text = f"{samples_text(two.about.base, two.about.edited, found, width)}\n\n{text}"
    return Answer(compared_data(two.about, found), text)


def _check_output(path: Path | None) -> None:
    """Raise OptionError or DestinationError at once if the result could not be written."""
    endings = (".html", ".md", ".jsonl")
    if path is None:
        return
    if path.suffix.lower() not in endings:
        found = path.suffix or "no ending"
        raise OptionError(f"--output {path}", expected=" or ".join(endings), found=found)
    from converter.outputs.destination import check_beside

    check_beside("--output", path)


def _in_json() -> bool:
    """Whether the current command prints JSON, as one object at its end."""
    return bool(click.get_current_context().params.get("json"))


def _typed_prompts() -> Iterator[str]:
    """The lines of standard input that are not blank."""
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="backslashreplace")
    while line := _read_line():
        if prompt := readable(line.strip()):
            yield prompt


def _read_line() -> str:
    """A line that is typed, while nothing else is drawn; empty at the end of file."""
    with progress.doing(""):
        return sys.stdin.readline()


def samples_text(base: str, edited: str, samples: "Sequence[Sample]", width: int) -> str:
    """Samples for a terminal: two columns, or one below the other where it is narrow.

    Words that only one continuation has are between ``[-`` and ``-]``, or ``{+`` and ``+}``.
    """
    lines = []
    for sample in samples:
        kind = f" (sample {sample.number})" if sample.number else ""
        lines += ["", *wrapped(f"> {one_line(sample.prompt)}{kind}", width)]
        sides = [
            (base, _marked(sample.before, "[-", "-]"), sample.before),
            (edited, _marked(sample.after, "{+", "+}"), sample.after),
        ]
        blocks = [(one_line(name), text, _scores(said)) for name, text, said in sides]
        column = (width - len(_BETWEEN)) // 2
        if column < _NARROW:
            for name, text, scores in blocks:
                lines += [*wrapped(f"{name}: {text}", width), *wrapped(scores, width)]
            continue
        left, right = (
            [line for part in block for line in wrapped(part, column)] for block in blocks
        )
        for i in range(max(len(left), len(right))):
            first, second = (side[i] if i < len(side) else "" for side in (left, right))
            pad = " " * (column - columns(first))
            lines.append(f"{first}{pad}{_BETWEEN}{second}".rstrip())
    return "\n".join(lines).lstrip("\n")


def _marked(said: "Said", begin: str, end: str) -> str:
    """A continuation in one line."""
    found = ""
    for piece, differs in said.parts:
        text = one_line(piece)
        if not text:
            found += " " if piece else ""
            continue
        lead, trail = (" " if c.isspace() else "" for c in (piece[0], piece[-1]))
        found += lead + (f"{begin}{text}{end}" if differs else text) + trail
    return found.strip() or "(nothing)"


def _scores(said: "Said") -> str:
    return "(" + ", ".join(f"{one_line(n)} {value:.3g}" for n, value in said.scores.items()) + ")"


def columns(text: str) -> int:
    """The columns of a terminal that a text takes: two for each letter of Chinese and the like."""
    return sum(2 if east_asian_width(c) in "WF" else 1 for c in text)


def wrapped(text: str, width: int) -> list[str]:
    """A line of words as lines of at most so many columns; words that are too long are cut."""
    lines = [""]
    for word in text.split():
        if lines[-1] and columns(lines[-1]) + 1 + columns(word) <= width:
            lines[-1] += f" {word}"
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if columns(lines[-1]) + columns(letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines
