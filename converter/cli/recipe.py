"""The command ``gloss recipe``, and the table of all options."""

from collections.abc import Iterable, Mapping
from typing import Any

from converter.cli.command import Answer, Command, Console, command
from converter.cli.fields import Part
from converter.cli.recipe_options import RecipePart
from converter.entrypoints.recipe_file import recipe_text
from converter.option import Declared


class RecipeValues(RecipePart):
    """What there is of a recipe, which need not be whole."""

    def make(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return self.values(values)


@command("recipe", recipe=RecipeValues(), console=Part(Console, without=("cache_dir",)))
def recipe_command(recipe: dict[str, Any]) -> Answer:
    """Print a recipe with every option, its value or its default, as TOML for --recipe.

    Options that are given here, or in a recipe that is, stand in it with their values.
    """
    return Answer(recipe, recipe_text(recipe).rstrip("\n"))


def options_table(commands: Iterable[Command]) -> str:
    """Every option of every command as Markdown, a table for each class of options."""
    owners: dict[type, list[str]] = {}
    options: dict[type, dict[str, Declared]] = {}
    for each in commands:
        for part in each.parts:
            owners.setdefault(part.cls, []).append(f"`{each.name}`")
            options.setdefault(part.cls, {}).update({o.name: o for o in part.options})
    return "\n\n".join(
        f"{_summary(cls)} ({', '.join(owners[cls])}):\n\n{_table(options[cls].values())}"
        for cls in owners
    )


def _summary(cls: type) -> str:
    """The first sentence about a class."""
    return " ".join((cls.__doc__ or "").partition("\n\n")[0].split()).removesuffix(".")


def _table(options: Iterable[Declared]) -> str:
    rows = [
        f"| {_typed(option)} | {option.default_text or ''} | {option.option.help} |"
        for option in options
    ]
    return "\n".join(["| option | default | meaning |", "|---|---|---|", *rows])


def _typed(option: Declared) -> str:
    """The option as people type it, with its values or an example of one."""
    if option.kind is bool:
        return ", ".join(f"`{flag}`" for flag in option.flag.split("/"))
    if not option.flag.startswith("-"):
        return f"`{option.flag}`"
    values = option.choices or (option.option.example,)
    return ", ".join(f"`{value}`" for value in (f"{option.flag} {values[0]}", *values[1:]))
