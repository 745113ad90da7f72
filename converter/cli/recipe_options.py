"""The options that make a ``Recipe``: typed, in the environment, or in a file."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import click

from converter.cli.fields import Part, parameter
from converter.entrypoints.recipe_file import read_recipe
from converter.option import Declared, Option, Options, declared_options
from converter.recipe import Recipe
from converter.runtime import progress


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeFile(Options):
    """Where a recipe is."""

    # fmt: off
    recipe_file: Annotated[Path | None, Option(
        "TOML file with a recipe, as gloss recipe prints it. What is typed counts more.",
        flag="--recipe", example="run.toml", path="file", exists=True,
    )] = None
    # fmt: on


@dataclass(frozen=True)
class RecipePart(Part):
    """A ``Recipe``, whose values, the source among them, may be in the file of ``--recipe``."""

    cls: type[Options] = Recipe

    @property
    def options(self) -> list[Declared]:
        source, *others = super().options
        return [source, *declared_options(RecipeFile).values(), *others]

    def parameters(self) -> list[click.Parameter]:
        source, *others = self.options
        place = click.Argument(
            [source.name], nargs=-1, metavar=f"[{source.flag}]", callback=_one_or_none
        )
        return [place, *map(parameter, others)]

    def values(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The values of the file and, over them, those that were typed.

        The file may hold options that the command does not have; they have no effect on it.

        Raises:
            OptionError: a value is wrong, or the file is.
        """
        typed = self.typed(values)
        path = typed.pop("recipe_file", None)
        names = {option.name for option in self.options}
        recorded = read_recipe(path) if path else {}
        recorded = {name: value for name, value in recorded.items() if name in names}
        if "options" in recorded and "options" in typed:
            typed["options"] = recorded["options"] | typed["options"]
        other = [key for key in typed if key in recorded and recorded[key] != typed[key]]
        if other:
            progress.note(f"{path.name} is overruled by what was typed: {', '.join(other)}")
        return recorded | typed

    def make(self, values: Mapping[str, Any]) -> Any:
        """The recipe.

        Raises:
            OptionError: a value is wrong, or the file is.
            click.UsageError: the source is neither typed nor in the file.
        """
        found = self.values(values)
        if "source" not in found:
            raise click.UsageError("Missing argument 'SOURCE', which no --recipe names either.")
        return Recipe(**found)


def _one_or_none(
    context: click.Context, place: click.Parameter, given: tuple[str, ...]
) -> str | None:
    """The value of an argument before one that is required; click gives the last to that one."""
    if len(given) > 1:
        raise click.UsageError(f"Got unexpected extra argument ({' '.join(given[1:])})", context)
    return given[0] if given else None
