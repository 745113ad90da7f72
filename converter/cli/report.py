"""The command ``gloss report``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from converter.cli.command import Answer, command, quiet_libraries
from converter.cli.fields import Part
from converter.errors import Faults
from converter.option import Option, Options
from converter.text import one_line


@dataclass(frozen=True, slots=True, kw_only=True)
class _ReportOptions(Options):
    """What is told of, and where."""

    # fmt: off
    destination: Annotated[Path, Option(
        "What gloss-convert made, or its manifest.", flag="DESTINATION", exists=True,
    )]
    output: Annotated[Path, Option(
        "File for the report, outside of DESTINATION; one that is there is replaced.",
        example="report.html", variable="GLOSS_REPORT_OUTPUT",
    )] = Path("report.html")
    # fmt: on


def _look(*, asked: _ReportOptions, faults: Faults) -> None:
    """Look whether the page can be written."""
    from converter.outputs.destination import check_beside

    with faults:
        check_beside("--output", asked.output, asked.destination)


@command(
    "report",
    asked=Part(_ReportOptions),
    look=_look,
    examples=("gloss report ./out", "gloss report ./out --output report.html"),
)
def report_command(asked: _ReportOptions) -> Answer:
    """Write a report on a conversion as one page of HTML, for people.

    The page is made from the manifest of DESTINATION alone: a verdict in words, how far it can be
    trusted, pictures, samples, the edit layer by layer, how to undo it, and all numbers. It fetches
    nothing.
    """
    from converter.entrypoints.report import report

    quiet_libraries()
    found = report(asked.destination, asked.output)
    data = {"report": str(asked.output), "kind": found.kind, "verdict": found.text}
    return Answer(data, one_line(found.text))
