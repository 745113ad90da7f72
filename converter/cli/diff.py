"""The command ``gloss diff``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from converter.cli.command import Answer, command, quiet_libraries
from converter.cli.fields import Part
from converter.errors import VerificationError
from converter.option import Option, Options


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffOptions(Options):
    """What is compared."""

    # fmt: off
    a: Annotated[str, Option("Anything that can be converted, or a file of JSON.", flag="A")]
    b: Annotated[str, Option("Another one of the same kind.", flag="B")]
    subspace: Annotated[Path | None, Option(
        "File of bases to compare changes with.",
        by_default="the gloss_edit.safetensors of B, or of A",
        example="gloss_edit.safetensors", path="file", exists=True,
    )] = None
    exit_code: Annotated[bool, Option("Exit with 8 if they differ.")] = False
    # fmt: on


@command("diff", asked=Part(DiffOptions))
def diff_command(asked: DiffOptions) -> Answer:
    """Print what differs between the checkpoints A and B, or between two manifests.

    A and B are anything that can be converted, or two files of JSON. Of each tensor that differs:
    the norm of the change over that of A's tensor, the rank of the part that rounding does not
    explain, and the share of the change's squared norm in the span of a subspace.
    """
    from converter.cli.diff_text import diff_text
    from converter.entrypoints.diff import diff

    quiet_libraries()
    found = diff(asked.a, asked.b, asked.subspace)
    fails = asked.exit_code and not found["equal"]
    return Answer(found, diff_text(found), VerificationError.exit_code if fails else 0)
