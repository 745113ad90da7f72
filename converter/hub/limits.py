"""Checks that the Hub's client lacks: of names that become paths, and of endless answers.

The client names a downloaded file after the server's ETag, and a folder after the server's commit,
and it reads and writes as long as bytes come. The Hub is trusted about its own files; another
server that answers in its place is not.

No other module knows that the client is one of ``httpx2``: that its session has ``event_hooks`` and
streams, that an answer's ``stream`` can be replaced, and that its errors are ``HTTPError``.
``tests/test_doors.py`` fails where another version of ``huggingface_hub`` does otherwise.
"""

import re
from collections.abc import Iterator
from typing import Any

from httpx2 import HTTPError, SyncByteStream
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    build_hf_headers,
    get_session,
    hf_raise_for_status,
    tqdm,
)

from converter.runtime import progress

NETWORK_ERRORS = (HTTPError, OSError)
"""Exceptions of the client if there is no network, it breaks, or the server is not a Hub."""

_NAMES = (("X-Linked-Etag", "ETag"), ("X-Repo-Commit",), ("X-Xet-Hash",))
"""Headers that become file names (the first present one of each group) when the client asks about a
file. In other answers an ETag may be anything: that of a list often has slashes.
"""

_PLAIN = re.compile(r'(W/)?"?(?!\.{1,2}"?$)[^/\\"\x00-\x1f\x7f]{1,200}"?')

MAX_ANSWER = 256_000_000
"""The most bytes of an answer in memory; a list of 200,000 files has a fifth of it."""

TIMES, SLACK = 2, 1 << 24
"""How often all listed bytes may arrive, and how many more: for data sent again after a broken
connection, and for Xet's overhead.
"""


class AnswerError(ValueError):
    """An answer that no Hub gives."""


def guard_session() -> None:
    """Check every answer from now on."""
    hooks = get_session().event_hooks["response"]
    if _look_at not in hooks:
        hooks.append(_look_at)


def _look_at(answer: Any) -> None:
    """Raises AnswerError."""
    for names in _NAMES if answer.request.method == "HEAD" else ():
        name = next((name for name in names if answer.headers.get(name)), None)
        if name and not _PLAIN.fullmatch(said := answer.headers[name]):
            raise AnswerError(f"{name} {said}")
    if answer.request.url.path.startswith("/api/"):  # else it is a file, and streamed
        answer.stream = _Bounded(answer.stream)


class _Bounded(SyncByteStream):
    """The body of an answer, up to ``MAX_ANSWER``."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[bytes]:
        seen = 0
        for piece in self._stream:
            seen += len(piece)
            if seen > MAX_ANSWER:
                raise AnswerError(f"an answer of more than {MAX_ANSWER:,} bytes")
            yield piece

    def close(self) -> None:
        self._stream.close()


def read_range(url: str, start: int, end: int) -> bytes:
    """The bytes of a file on the Hub from ``start`` up to ``end``, or fewer if it ends before.

    Reading stops there, even if the server sends more. From a server without ranges, which sends
    the whole file, only these bytes are used.
    """
    headers = {**build_hf_headers(), "Range": f"bytes={start}-{end - 1}"}
    headers["Accept-Encoding"] = "identity"
    found = bytearray()
    with get_session().stream("GET", url, headers=headers, follow_redirects=True) as answer:
        hf_raise_for_status(answer)
        skipped = start if answer.status_code == 200 else 0
        for piece in answer.iter_bytes():
            found += piece[skipped:]
            skipped = max(skipped - len(piece), 0)
            if len(found) >= end - start:
                break
    return bytes(found[: end - start])


def meter(most: int) -> type[tqdm]:
    """A progress bar for ``snapshot_download`` that stops it when too many bytes arrive.

    Args:
        most: bytes of all wanted files.
    """

    class Meter(tqdm):
        seen = 0.0

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs["disable"] = kwargs.get("disable") or not progress.current().shows_bars
            super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> bool | None:
            self.seen += n or 0
            if self.seen > TIMES * most + SLACK:
                raise AnswerError(f"more than the {most:,} bytes that were listed")
            moved: bool | None = super().update(n)
            return moved

    return Meter
