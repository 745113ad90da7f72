"""Check that a file of a source can be read, and is not a placeholder."""

from collections.abc import Iterator
from contextlib import contextmanager

from converter.errors import CheckpointError
from converter.runtime.files import placeholder


@contextmanager
def readable(name: str) -> Iterator[None]:
    """Within this context, turn an OSError for a file of that name into a CheckpointError."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{name} cannot be read", found=error.strerror) from error


def refuse_placeholder(start: bytes | bytearray, name: str, *, may_be_empty: bool = False) -> None:
    """Raise CheckpointError if the beginning of a file shows a placeholder."""
    if not start and not may_be_empty:
        raise CheckpointError(f"{name} is empty", hint="fetch the file again")
    if found := placeholder(start):
        raise CheckpointError(f"{name} is {found[0]}, not the file itself", hint=found[1])
