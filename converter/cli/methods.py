"""The command ``gloss methods``: which methods there are, and the options of one."""

from dataclasses import asdict, dataclass
from typing import Annotated

import msgspec

from converter.cli.command import Answer, command, quiet_libraries
from converter.cli.fields import Part
from converter.errors import OptionError
from converter.option import Option, Options


@dataclass(frozen=True, slots=True, kw_only=True)
class _MethodsOptions(Options):
    """Which methods."""

    # fmt: off
    name: Annotated[str | None, Option(
        "Method whose options are printed; without it, all methods are.", flag="NAME",
    )] = None
    # fmt: on


@command(
    "methods", asked=Part(_MethodsOptions), examples=("gloss methods", "gloss methods destein")
)
def methods_command(asked: _MethodsOptions) -> Answer:
    """Print every method: its paper, and what it needs, changes and can be written as.

    Those of installed packages are among them. Each is looked at with its default options, on a
    small Llama; options of its own and another model can make a difference. Of the method NAME,
    print every option that -o sets: its values, its default, what it means.
    """
    if asked.name is not None:
        return _options(asked.name)
    from converter.entrypoints.methods import describe_methods, table

    quiet_libraries()
    methods = describe_methods()
    return Answer([asdict(method) for method in methods], table(methods))


def _options(name: str) -> Answer:
    """The options of one method. Raises OptionError."""
    from converter.methods.known import METHODS, described

    METHODS.need(name)
    known = described().get(name)
    if known is None:
        raise OptionError(
            f"the options of {name} are known to its package alone, {METHODS.package(name)}",
            hint="see what that says of them",
        )
    rows = []
    for key, option in known.options.items():
        default = "by the model" if option.default is None else option.default
        meaning = option.meaning.replace("|", "/")
        rows.append(f"| `{key}` | {option.values} | {default} | {meaning} |")
    head = f"{name}: {known.title} ({known.paper}). Its strength is {known.strength}."
    lines = [head, "", "| `-o` | value | default | meaning |", "|---|---|---|---|", *rows]
    return Answer({"name": name, **msgspec.to_builtins(known)}, "\n".join(lines))
