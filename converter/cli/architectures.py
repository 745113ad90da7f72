"""The command ``gloss architectures``: which models can be edited, and a draft of a data file."""

from dataclasses import dataclass
from typing import Annotated

from converter.cli.command import Answer, command, quiet_libraries
from converter.cli.fields import Part
from converter.errors import OptionError
from converter.option import Option, Options
from converter.recipe import TrustRemoteCode


@dataclass(frozen=True, slots=True, kw_only=True)
class _ArchitecturesOptions(Options):
    """Which architectures."""

    # fmt: off
    infer: Annotated[str | None, Option(
        "Print the inferred description of a checkpoint's model as a data file, not the table.",
        example="SOURCE", place=True,
    )] = None
    only: Annotated[str | None, Option(
        "Try only these model types, separated by commas.", by_default="all",
        example="llama,qwen3_next",
    )] = None
    trust_remote_code: TrustRemoteCode = False
    # fmt: on


@command("architectures", asked=Part(_ArchitecturesOptions))
def architectures_command(asked: _ArchitecturesOptions) -> Answer:
    """Try every language model of the installed transformers, and print which can be edited.

    Each class is described from its default config and proved at tiny sizes, in about a second, and
    gets a row of a Markdown table. With --infer, the model of one checkpoint is described in the
    same way, without reading its weights.
    """
    from converter.checkpoints.architectures import known_models
    from converter.entrypoints.architectures import draft, table, try_all

    quiet_libraries()
    if asked.infer is not None:
        text = draft(asked.infer, trust_remote_code=asked.trust_remote_code)
        return Answer({"data_file": text}, text)
    only = tuple(filter(None, (asked.only or "").replace(" ", "").split(",")))
    if unknown := [name for name in only if not known_models.knows(name)]:
        raise OptionError(
            "--only", expected=f"model types that transformers {known_models.version()} knows",
            found=", ".join(unknown),
        )  # fmt: skip
    tried = list(try_all(only))
    return Answer([each.record() for each in tried], table(tried))
