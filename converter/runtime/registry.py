"""Things that are chosen by name: built-in ones, and those of installed packages.

A package adds one by an entry point, for example in its ``pyproject.toml``:

    [project.entry-points."gloss_convert.methods"]
    my-method = "my_package.method:MyMethod"

A fault of a package is reported in one sentence that names it.
"""

import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from converter.errors import ConverterError, OptionError, is_out_of_memory
from converter.runtime import progress
from converter.text import did_you_mean

_GROUPS = ("gloss_convert.methods", "gloss_convert.outputs", "gloss_convert.scorers")
"""All groups of entry points."""

_FAULT = "it is a fault of the package; update or uninstall it"


@dataclass(frozen=True, slots=True)
class Registry:
    """The things of one kind.

    Attributes:
        group: of entry points.
        option: the option that chooses one, for messages.
        own: name -> ``module:attribute`` of the built-in ones. They cannot be replaced.
        needs: attributes that each must have, once it is made.
    """

    group: str
    option: str
    own: Mapping[str, str]
    needs: tuple[str, ...] = ()

    def names(self) -> list[str]:
        """All names, in alphabetical order."""
        return sorted({*self.own, *(entry.name for entry in entry_points(group=self.group))})

    def need(self, name: str) -> None:
        """Raise OptionError if there is no such thing, with the nearest name."""
        names = self.names()
        if name not in names:
            hint = did_you_mean(name, names)
            raise OptionError(self.option, expected=" or ".join(names), found=name, hint=hint)

    def load(self, name: str) -> Any:
        """The thing of a name.

        Raises:
            OptionError: there is none, two packages have one, or its package cannot be loaded.
        """
        brought = self._brought(name)
        if name in self.own:
            for entry in brought:
                progress.warn(f"{self.option} {name} is our own, not that of {_package(entry)}")
            return EntryPoint(name, self.own[name], self.group).load()
        self.need(name)
        if len(brought) > 1:
            raise OptionError(
                f"{self.option} {name}", expected="one package that brings it",
                found=" and ".join(sorted(_package(entry) or entry.value for entry in brought)),
                hint="uninstall the others",
            )  # fmt: skip
        try:
            return brought[0].load()
        except Exception as error:  # a third party's package: of any kind
            raise OptionError(
                f"{self.option} {name}: the package {self.package(name)} cannot be loaded",
                found=f"{type(error).__name__}: {error}",
                hint="update or uninstall it",
            ) from error

    def package(self, name: str) -> str | None:
        """Name and version of the package that brings a thing; None for our own."""
        brought = [] if name in self.own else self._brought(name)
        return _package(brought[0]) if brought else None

    def check(self, name: str, thing: Any) -> None:
        """Raise OptionError if a thing of a package lacks a required attribute."""
        if lacking := [need for need in self.needs if not hasattr(thing, need)]:
            raise self.fault(name, f"it has no {', '.join(lacking)}")

    def fault(self, name: str, said: str) -> OptionError:
        """The error about a fault of a package's thing."""
        return OptionError(
            f"{self.option} {name}: it is not what {self.package(name) or 'it'} should bring",
            found=said, hint=_FAULT,
        )  # fmt: skip

    def _brought(self, name: str) -> list[EntryPoint]:
        """The entry points of packages under a name, each once."""
        entries = entry_points(group=self.group, name=name)
        return list({(_package(entry), entry.value): entry for entry in entries}.values())


def _package(entry: EntryPoint) -> str | None:
    """Name and version of the package of an entry point."""
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else None


@contextmanager
def telling_packages() -> Iterator[None]:
    """An exception of a package's code in the block becomes an OptionError that names the package.

    The error itself is kept as its cause. All other errors are raised as they are.
    """
    try:
        yield
    except Exception as error:  # a third party's package: of any kind
        entry, place = _raised_in(error)
        if entry is None or isinstance(error, ConverterError) or is_out_of_memory(error):
            raise
        raise OptionError(
            f"the package {_package(entry) or entry.module} failed",
            found=f"{type(error).__name__}: {error} ({place})",
            hint=_FAULT,
        ) from error


def _raised_in(error: Exception) -> tuple[EntryPoint | None, str]:
    """The entry point of the package whose code last raised an error, and the line."""
    found = (entry for group in _GROUPS for entry in entry_points(group=group))
    brought = {entry.module.partition(".")[0]: entry for entry in found}
    entry, place = None, ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        top = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if top in brought and top != __name__.partition(".")[0]:
            entry, place = brought[top], f"{Path(frame.f_code.co_filename).name}:{line}"
    return entry, place
