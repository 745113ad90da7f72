"""Check the request for a search before a model library is loaded."""

from dataclasses import fields, replace

from converter.errors import OptionError
from converter.methods.known import METHODS, SEPARATOR, described
from converter.methods.typed import share_out
from converter.recipe import Recipe

BETWEEN = ","
"""Separates methods that are searched in turns."""

WHY = "a search tries many edits on a model that is loaded once, for which"
HINT = "give --forward resident or --device map, or options without a search"
"""The error and the hint for a streamed model; see ``Forward.need_resident``."""


def each_method(recipe: Recipe) -> list[Recipe]:
    """The recipe of each method to search; commas separate their names.

    An option of several of them is ``METHOD.KEY=VALUE``.

    Raises:
        OptionError: a method is unknown or cannot be searched, or no method has an option.
    """
    names = names_of(recipe)
    if len(names) == 1:
        return [recipe]
    shared = share_out({name: _options(name) for name in names}, recipe.options)
    return [replace(recipe, method=name, options=shared[name]) for name in names]


def names_of(recipe: Recipe) -> list[str]:
    """The methods to search. Raises OptionError."""
    names = recipe.method.split(BETWEEN)
    if len({*names}) < len(names):
        raise OptionError("--method", expected="different methods", found=recipe.method)
    for name in names:
        if SEPARATOR in name:
            raise OptionError(
                "a search", expected=f"methods by themselves, with {BETWEEN} between them",
                found=f"--method {name}",
            )  # fmt: skip
    return names


def _options(name: str) -> set[str]:
    """The names of the options of a method. Raises OptionError if there is none."""
    if known := described().get(name):
        return {*known.options}
    return {field.name for field in fields(METHODS.load(name))}


def check_recipe(recipe: Recipe) -> None:
    """Raise OptionError if a recipe has options that no search can use."""
    if recipe.activations is not None:
        raise OptionError(
            "--activations is of one fit, and a search takes its own", hint="leave it out"
        )


def check_aim(name: str, aim: str) -> None:
    """Raise OptionError if a method would have to be trained for each trial."""
    if aim == "defence":
        raise OptionError(
            "a search", expected="a method whose edits are judged by toxic words",
            found=f"--method {name}, which is judged by refusals and trained for each trial",
        )  # fmt: skip


def check_beside(name: str, is_beside: bool) -> None:
    """Raise OptionError if a method runs another model instead of editing weights."""
    if is_beside:
        raise OptionError(
            "a search", expected="a method that edits weights",
            found=f"--method {name}, which runs another model beside it",
            hint="choose form=folded",
        )  # fmt: skip
