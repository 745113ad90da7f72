"""Whether a file of a source can be read, and is the file itself."""

from collections.abc import Iterator
from contextlib import contextmanager

from converter.errors import CheckpointError
from converter.runtime.files import placeholder


@contextmanager
def readable(name: str) -> Iterator[None]:
    """Raise CheckpointError where the operating system cannot read a file of that name."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{name} cannot be read", found=error.strerror) from error


def refuse_placeholder(start: bytes | bytearray, name: str, *, may_be_empty: bool = False) -> None:
    """Raise CheckpointError if a file of a source that begins so is not the file itself."""
    if not start and not may_be_empty:
        raise CheckpointError(f"{name} is empty", hint="fetch the file again")
    if found := placeholder(start):
        raise CheckpointError(f"{name} is {found[0]}, not the file itself", hint=found[1])
