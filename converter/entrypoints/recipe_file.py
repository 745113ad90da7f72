"""A recipe as a TOML file: keys are the fields of ``Recipe``, and ``[options]`` is the method's."""

import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING
from difflib import get_close_matches
from pathlib import Path
from textwrap import wrap
from typing import Any

from converter.errors import OptionError
from converter.option import Declared, declared_options
from converter.recipe import Recipe, Settings
from converter.runtime.files import read_text, reason

HEADING = """\
# What a conversion is asked for. Use it with: gloss-convert --recipe FILE [SOURCE] DESTINATION
# A line such as "# num_pairs = 1000" is an example: the option has its default.
"""

WIDTH = 98
"""Columns of a comment, without the sign that begins it."""


def read_recipe(path: Path) -> dict[str, Any]:
    """The values in a file, by the name of their field. Paths are as typed on a command line.

    ``Recipe(**read_recipe(path))`` is the recipe, if the file names its source.

    Raises:
        OptionError: the file cannot be read, is not TOML, or has a key or a value that no recipe
            has.
    """
    try:
        table = tomllib.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise OptionError(f"the recipe {path.name} cannot be read", found=reason(error)) from error
    known, values = declared_options(Recipe), {}
    for key, value in table.items():
        if key not in known:
            raise OptionError(f"{path.name} has an unknown key {key}", hint=_advice(key))
        values[key] = known[key].read(value, f"{path.name}: {key}")
    return values


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
    return "\n".join([HEADING, *paragraphs, "\n".join(table)]) + "\n"


def _advice(key: str) -> str:
    """What to do about an unknown key."""
    name = key.replace("-", "_")
    if name in declared_options(Settings):
        return f"it does not bear on the result; give --{name.replace('_', '-')} instead"
    close = get_close_matches(name, declared_options(Recipe), n=1)
    return f"did you mean {close[0]}?" if close else "see gloss recipe for those there are"


def _paragraph(option: Declared, value: Any) -> str:
    """The comment of an option, and its line."""
    value = option.default if value is None else value
    if value is None or value is MISSING:
        return f"{_comment(option)}\n# {option.name} = {_toml(option.example)}\n"
    return f"{_comment(option)}\n{option.name} = {_toml(option.read(value))}\n"


def _comment(option: Declared) -> str:
    default = f" Default: {option.default_text}." if option.default_text else ""
    return "\n".join(f"# {line}" for line in wrap(option.option.help + default, WIDTH))


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
    text = json.dumps(str(value), ensure_ascii=False)
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in text)
