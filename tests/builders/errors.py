"""What a test says of one of our errors: its class and its fields, never its whole sentence.

The sentences themselves stand in ``tests/test_errors.py``.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from converter.errors import ConverterError


@contextmanager
def refused(
    kind: type[ConverterError],
    *,
    what: str | None = None,
    expected: str | None = None,
    found: str | None = None,
    hint: str | None = None,
) -> Iterator[pytest.ExceptionInfo[ConverterError]]:
    """The block ends in an error of exactly this class, with these fields.

    A text must equal its field, but that each ``...`` in the text stands for anything. None is not
    looked at.
    """
    with pytest.raises(kind) as caught:
        yield caught
    assert type(caught.value) is kind
    texts = {"what": what, "expected": expected, "found": found, "hint": hint}
    for name, text in texts.items():
        if text is None:
            continue
        field = getattr(caught.value, name)
        pattern = ".*".join(map(re.escape, text.split("...")))
        assert field is not None, f"no {name}, for {text!r}"
        assert re.fullmatch(pattern, field, re.DOTALL), f"{name} {field!r} for {text!r}"
