"""Recipes: from typed options and from TOML files; and ``gloss recipe``, which prints one.

The keys of a file are the fields of ``Recipe``, and its ``[options]`` are the method's.
"""

import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from difflib import get_close_matches
from pathlib import Path
from textwrap import wrap
from typing import Any

import click
import msgspec

from converter.checkpoints.names import MANIFEST
from converter.cli.command import Answer, Console, command
from converter.cli.fields import Part, faults_of, parameter
from converter.errors import Faults, OptionError
from converter.manifest import Manifest
from converter.option import Declared, Option, Options, declared_options
from converter.recipe import Recipe, Settings
from converter.runtime import progress, strict_json
from converter.runtime.files import read_file, read_text, reason
from converter.text import readable

_HEADING = """\
# What a conversion is asked for. Use it with: gloss-convert --recipe FILE [SOURCE] DESTINATION
# A line such as "# num_pairs = 1000" is an example: the option has its default.
"""

_WIDTH = 98
"""Columns of a comment, without the sign that begins it."""

_LIKE = Declared(
    name="manifest_file",
    kind=Path,
    optional=True,
    default=None,
    option=Option(
        "Manifest, or folder with one, of an earlier conversion: the recipe that it records. What "
        "is in --recipe counts more, and what is typed most.",
        flag="--like", metavar="MANIFEST", example="out/gloss_manifest.json", exists=True,
    ),
)  # fmt: skip

_FILE = Declared(
    name="recipe_file",
    kind=Path,
    optional=True,
    default=None,
    option=Option(
        "TOML file with a recipe, as gloss recipe prints it. What is typed counts more.",
        flag="--recipe", example="run.toml", path="file", exists=True,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class RecipePart(Part):
    """A ``Recipe``, whose values, the source among them, may be in the file of ``--recipe``."""

    cls: type[Options] = Recipe

    @property
    def options(self) -> list[Declared]:
        source, *others = super().options
        return [source, _FILE, _LIKE, *others]

    def parameters(self) -> list[click.Parameter]:
        source, *others = self.options
        place = click.Argument(
            [source.name], nargs=-1, metavar=f"[{source.flag}]", callback=_one_or_none
        )
        return [place, *map(parameter, others)]

    def values(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The values of the manifest, overruled by those of the file, and these by typed options.

        Both may hold options that the command does not have; they have no effect on it. What is
        wrong is kept in ``faults_of`` the command.
        """
        found, typed = dict[str, Any](), self.typed(values)
        names = {option.name for option in self.options}
        places = typed.pop(_LIKE.name, None), typed.pop(_FILE.name, None)
        for path, read in zip(places, (recorded_recipe, read_recipe), strict=True):
            with faults_of(click.get_current_context()):
                known = read(path) if path else {}
                found = _over(found, {k: v for k, v in known.items() if k in names})
        every = _over(found, typed)
        if other := [key for key in typed if key in found and found[key] != every[key]]:
            read_from = [path.name for path in places if path]
            are = "is" if len(read_from) == 1 else "are"
            files = " and ".join(read_from)
            progress.note(f"{files} {are} overruled by what was typed: {', '.join(other)}")
        return every

    def make(self, values: Mapping[str, Any]) -> Any:
        """The recipe.

        Raises:
            OptionError: a value is wrong, or the file is.
            click.UsageError: the source is neither typed nor in the file.
        """
        found = self.values(values)
        if "source" not in found:
            faults_of(click.get_current_context()).settle()
            missing = "Missing argument 'SOURCE', which no --recipe or --like names."
            raise click.UsageError(missing)
        return Recipe(**found)


def _one_or_none(
    context: click.Context, place: click.Parameter, given: tuple[str, ...]
) -> str | None:
    """The value of an argument before one that is required; click gives the last to that one."""
    if len(given) > 1:
        raise click.UsageError(f"Got unexpected extra argument ({' '.join(given[1:])})", context)
    return given[0] if given else None


class _Values(RecipePart):
    """What there is of a recipe, which need not be whole."""

    def make(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return self.values(values)


@command("recipe", Part(Console, without=("cache_dir",)), loads=False, recipe=_Values())
def recipe_command(recipe: dict[str, Any]) -> Answer:
    """Print a recipe with every option, its value or its default, as TOML for --recipe.

    Options that are given here, or in a recipe that is, stand in it with their values.
    """
    return Answer(recipe, recipe_text(recipe).rstrip("\n"))


def _over(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a recipe with others that count more; options of methods each for itself."""
    both = {k: lower[k] | upper[k] for k in ("options",) if k in lower and k in upper}
    return {**lower, **upper, **both}


def recorded_recipe(place: Path) -> dict[str, Any]:
    """The recipe that a manifest, or that of a folder, records; defaults are left out.

    Of local files it knows the names alone, so they are looked for in the current folder.

    Raises:
        OptionError: there is no manifest, or it is none.
    """
    path = place / MANIFEST if place.is_dir() else place
    try:
        run = Manifest.from_json(strict_json.parse(read_file(path))).run
    except (OSError, ValueError, msgspec.ValidationError, OptionError) as error:
        said = str(error) if isinstance(error, OptionError) else reason(error)
        raise OptionError(f"--like {path.name} cannot be read", found=said[:200]) from error
    values = {name: getattr(run, name) for name in declared_options(Recipe)}
    defaults = {name: option.default for name, option in declared_options(Recipe).items()}
    return {name: value for name, value in values.items() if value != defaults[name]}


def read_recipe(path: Path) -> dict[str, Any]:
    """The values in a file, by the name of their field. Paths are as typed on a command line.

    ``Recipe(**read_recipe(path))`` is the recipe, if the file names its source.

    Raises:
        OptionError: the file cannot be read, is not TOML, or has a key or a value that no recipe
            has; an ExceptionGroup of several.
    """
    try:
        table = tomllib.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise OptionError(f"the recipe {path.name} cannot be read", found=reason(error)) from error
    known, values, faults = declared_options(Recipe), {}, Faults()
    for key, value in table.items():
        with faults:
            if key not in known:
                raise OptionError(f"{path.name} has an unknown key {key}", hint=_advice(key))
            values[key] = known[key].read(value, f"{path.name}: {key}")
    faults.settle()
    return values


def _advice(key: str) -> str:
    """What to do about an unknown key."""
    name = key.replace("-", "_")
    if name in declared_options(Settings):
        return f"it does not bear on the result; give --{name.replace('_', '-')} instead"
    close = get_close_matches(name, declared_options(Recipe), n=1)
    return f"did you mean {close[0]}?" if close else "see gloss recipe for those there are"


def recipe_text(values: Mapping[str, Any]) -> str:
    """A file that ``read_recipe`` reads back as these values, and the defaults of all others.

    Args:
        values: by the name of their field; what is left out or None stands there as a comment.
    """
    options = dict(declared_options(Recipe))
    last = options.pop("options")
    paragraphs = [_paragraph(option, values.get(option.name)) for option in options.values()]
    given = last.read(values.get(last.name, {}))
    lines = [f"{_key(key)} = {_as_typed(text)}" for key, text in given.items()]
    table = [_comment(last), f"[{last.name}]", *(lines or [f"# {last.option.example}"])]
    return "\n".join([_HEADING, *paragraphs, "\n".join(table)]) + "\n"


def _paragraph(option: Declared, value: Any) -> str:
    """The comment of an option, and its line."""
    value = option.default if value is None else value
    if value is None or value is MISSING:
        return f"{_comment(option)}\n# {option.name} = {_toml(option.example)}\n"
    return f"{_comment(option)}\n{option.name} = {_toml(option.read(value))}\n"


def _comment(option: Declared) -> str:
    default = f" Default: {option.default_text}." if option.default_text else ""
    return "\n".join(f"# {line}" for line in wrap(option.option.help + default, _WIDTH))


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _toml(name)


def _as_typed(text: str) -> str:
    """An option of a method, as a number if it reads back as the same text."""
    for kind in (int, float):
        try:
            if str(kind(text)) == text and text.lstrip("-")[0].isdigit():
                return text
        except ValueError:
            continue
    return _toml(text)


def _toml(value: Any) -> str:
    """A value in TOML, whose strings are those of JSON as long as every character is printable."""
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    text = json.dumps(readable(str(value)), ensure_ascii=False)
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in text)
