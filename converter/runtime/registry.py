"""Things that are chosen by name: our own, and those that installed packages bring.

A package brings one by an entry point, for example in its ``pyproject.toml``:

    [project.entry-points."gloss_convert.methods"]
    my-method = "my_package.method:MyMethod"
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from converter.errors import OptionError


@dataclass(frozen=True, slots=True)
class Registry:
    """The things of one kind.

    Attributes:
        group: of entry points.
        option: by which one is chosen, for messages.
        own: name -> ``module:attribute`` of those that come with the program. They cannot be
            replaced.
    """

    group: str
    option: str
    own: Mapping[str, str]

    def names(self) -> list[str]:
        """All there are, in alphabetical order."""
        return sorted({*self.own, *self._brought()})

    def load(self, name: str) -> Any:
        """The thing of a name.

        Raises:
            OptionError: there is none, or its package cannot be loaded.
        """
        if name in self.own:
            return EntryPoint(name, self.own[name], self.group).load()
        if name not in self._brought():
            raise OptionError(self.option, expected=" or ".join(self.names()), found=name)
        try:
            return self._brought()[name].load()
        except Exception as error:  # a third party's package: of any kind
            raise OptionError(
                f"{self.option} {name}: the package {self.package(name)} cannot be loaded",
                found=f"{type(error).__name__}: {error}",
                hint="update or uninstall it",
            ) from error

    def package(self, name: str) -> str | None:
        """Name and version of the package that brings a thing; None for our own."""
        entry = None if name in self.own else self._brought().get(name)
        return f"{entry.dist.name} {entry.dist.version}" if entry and entry.dist else None

    def _brought(self) -> dict[str, EntryPoint]:
        return {entry.name: entry for entry in entry_points(group=self.group)}
