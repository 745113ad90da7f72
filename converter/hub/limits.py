"""What the Hub's client does not look at itself: names that it makes paths of, and endless answers.

The client names a downloaded file after the ETag, and a folder after the commit, that the server
says; and it reads and writes for as long as bytes come. The Hub is trusted to be right about its
own files, but not whoever answers in its place.

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
"""What the client raises when there is no network, or it breaks, or it is not that of a Hub."""

_NAMES = (("X-Linked-Etag", "ETag"), ("X-Repo-Commit",), ("X-Xet-Hash",))
"""Headers that become the names of files, the first that is there of each, where the client asks
what a file is. The ETag of another answer is anything: that of a list has slashes in it, often."""

_PLAIN = re.compile(r'(W/)?"?(?!\.{1,2}"?$)[^/\\"\x00-\x1f\x7f]{1,200}"?')

MAX_ANSWER = 256_000_000
"""Bytes of an answer that is held in memory; a list of 200,000 files has a fifth of it."""

TIMES, SLACK = 2, 1 << 24
"""How often all bytes that were listed may come, and how many more: what is sent again after a
connection broke, and what Xet packs around the parts of a file."""


class AnswerError(ValueError):
    """An answer that no Hub gives."""


def guard_session() -> None:
    """Have every answer looked at from now on."""
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

    Reading stops there, however many more are sent. A server that knows no ranges sends the whole
    file, of which these are taken.
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
    """A progress bar for ``snapshot_download`` that stops it when more comes than can be.

    Args:
        most: bytes of all files that are wanted.
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
