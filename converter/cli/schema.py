"""The command ``gloss schema``: the JSON schemas of what the commands print with ``--json``."""

from dataclasses import dataclass
from typing import Annotated, Any

from converter.cli.command import Answer, Console, command
from converter.cli.documents import DOCUMENTS, VERSION
from converter.cli.fields import Part
from converter.cli.terminal import as_json
from converter.errors import OptionError
from converter.option import Option, Options
from converter.text import did_you_mean

_NAMES = (*DOCUMENTS, "manifest")


@dataclass(frozen=True, slots=True, kw_only=True)
class _SchemaOptions(Options):
    """Which document."""

    # fmt: off
    name: Annotated[str | None, Option(
        "A command, or error, or manifest; without it, these names are listed.", flag="NAME",
        example="verify",
    )] = None
    # fmt: on


@command(
    "schema",
    Part(Console, without=("cache_dir", "verbose", "log_file")),
    loads=False,
    asked=Part(_SchemaOptions),
    examples=("gloss schema", "gloss schema verify > verify.schema.json"),
)
def schema_command(asked: _SchemaOptions) -> Answer:
    """Print the JSON schema of what the command NAME prints with --json.

    A command that fails prints an object of the schema error instead, whichever command it is; its
    exit code is not 0. The schema manifest is that of gloss_manifest.json.
    """
    if asked.name is None:
        return Answer(list(_NAMES), "\n".join(_NAMES))
    found = schema_named(asked.name)
    return Answer(found, as_json(found))


def schema_named(name: str) -> dict[str, Any]:
    """A schema. Raises OptionError if there is none of that name."""
    from converter.release.schema import schema, schema_of

    if name == "manifest":
        return schema()
    if name not in DOCUMENTS:
        hint = did_you_mean(name, _NAMES)
        raise OptionError("NAME", expected=" or ".join(_NAMES), found=name, hint=hint)
    return schema_of(name, VERSION, DOCUMENTS[name])
