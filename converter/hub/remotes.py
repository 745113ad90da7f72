"""The place that files are fetched from: a repo of the Hub at a commit, or a prefix of a store."""

from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar, Protocol

from converter.hub import repos
from converter.hub.store_addresses import is_store
from converter.hub.stores import open_store


class Remote(Protocol):
    """Files that are fetched one by one; see ``repos.Repo`` and ``stores.Store``.

    Attributes:
        room: the hint for a disk that is too small for them.
        name: without folders and credentials.
        sizes: file name -> bytes; empty if it cannot be asked, and only fetched files are known.
        sha256: file name -> digest, of files whose digest is listed.
    """

    room: ClassVar[str]

    @property
    def name(self) -> str: ...
    @property
    def sizes(self) -> dict[str, int]: ...
    @property
    def sha256(self) -> dict[str, str]: ...

    def download(self, names: Iterable[str], *, first: bool = False) -> Path:
        """Fetch files, and return their folder. Raises SourceError."""

    def read(self, name: str, start: int, end: int) -> bytes:
        """The bytes of a file from ``start`` up to ``end``. Raises SourceError."""


def find_remote(source: str) -> Remote:
    """The prefix of a store, or the repo of the Hub, that a source names.

    Raises:
        SourceError: as ``open_store`` or ``repos.resolve``.
        OptionError: a package is missing.
    """
    return open_store(source) if is_store(source) else repos.resolve("model", source)
