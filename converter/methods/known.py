"""The methods and their options, without importing their modules, since torch takes seconds.

``data/methods.json`` has the options of the built-in methods. It is made from their classes by

    python -m converter.entrypoints.methods > converter/data/methods.json
"""

from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any, Literal

import msgspec

from converter.runtime.registry import Registry

METHODS = Registry(
    "gloss_convert.methods",
    "--method",
    {
        "fusion": "converter.methods.fusion:Method",
        "gloss": "converter.methods.gloss:Method",
        "gloss-paper": "converter.methods.gloss_paper:Method",
        "destein": "converter.methods.destein:Method",
        "model-surgery": "converter.methods.model_surgery:ModelSurgery",
        "profs": "converter.methods.baselines:Profs",
        "dinm": "converter.methods.dinm:Method",
        "random": "converter.methods.baselines:RandomSubspace",
    },
    ("title", "paper", "strength", "defaults", "footprint", "fit"),
)
"""Name -> a class like ``base.Method``."""

SEPARATOR = "+"
"""Between the names of several methods."""

Layers = tuple[int, ...]

Factors = tuple[float, ...]
"""A factor from 0 to 1 for each layer of a model: how much of a subspace is removed from it. Empty
for 1 in all layers.
"""

_HINTS: dict[str, Any] = {
    "layers": Layers, "factors": Factors, "int": int, "float": float, "bool": bool, "str": str,
}  # fmt: skip
"""Kind of an option -> the type of its field."""


_NAMED = {
    "layers": "layers, such as 10-24 or 3,5,8",
    "factors": "a number from 0 to 1, or layers with theirs, such as 4:0.5,5-12:0.9",
    "int": "a whole number", "float": "a number", "bool": "true or false", "str": "text",
}  # fmt: skip


class MethodOption(msgspec.Struct, frozen=True, omit_defaults=True):
    """An option of a method, typed after ``-o``.

    Attributes:
        kind: of its values, a key of ``_HINTS``, or ``choice``.
        meaning: its description, from its class.
        default: as typed; None if it depends on the model.
        choices: its values, if it is a ``choice`` or a text with fixed values.
        automatic: whether it can be ``auto``.
        least: smallest number.
    """

    kind: str
    meaning: str
    default: str | None = None
    choices: tuple[str, ...] = ()
    automatic: bool = False
    least: float | None = None

    @property
    def hint(self) -> Any:
        """The type of its field."""
        kind = Literal[self.choices] if self.kind == "choice" else _HINTS[self.kind]
        return kind | None if self.automatic else kind

    @property
    def values(self) -> str:
        """The valid values, in words."""
        text = ", ".join(self.choices) or _NAMED[self.kind]
        text += f" from {self.least:g}" if self.least is not None else ""
        return text + (", or auto" if self.automatic else "")


class MethodTitle(msgspec.Struct, frozen=True):
    """A method in three texts; see ``base.Method``.

    Attributes:
        title: for people.
        paper: a URL.
        strength: the option that says how strong the edit is.
    """

    title: str
    paper: str
    strength: str


class KnownMethod(MethodTitle, frozen=True):
    """The description of a built-in method.

    Attributes:
        aim: what it is for.
        options: by name.
    """

    aim: str
    options: dict[str, MethodOption]


@cache
def described() -> Mapping[str, KnownMethod]:
    """Name -> description of each built-in method; methods of packages are not included."""
    text = files("converter").joinpath("data/methods.json").read_text("utf-8")
    return msgspec.json.decode(text, type=dict[str, KnownMethod])
