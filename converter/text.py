"""Untrusted text, made safe to show: in one line, within Markdown, and without secrets."""

import logging
import os
import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from unicodedata import category

LONGEST = 2000
"""Characters of one part of a message that are shown; the name of a tensor can have a hundred
million."""


def one_line(text: str, longest: int = LONGEST) -> str:
    """A text in one line, without characters that control a terminal or change the text direction.

    White space becomes single spaces, unprintable characters become escapes, and long texts are
    cut.
    """
    cut = readable(text if len(text) <= longest else text[:longest] + "...")
    line = " ".join(cut.split())
    if line.isprintable():
        return line
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def readable(name: str) -> str:
    """A file name as text; bytes that are not UTF-8 become escapes.

    Python keeps bytes that the locale cannot decode as halves of surrogate pairs, which no file and
    no terminal takes.
    """
    try:
        return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # a half that is none of these, as JSON can hold
        return name


def is_one_line(name: str) -> bool:
    """Whether a name is one line without control characters.

    Spaces of all scripts and joiners of letters or emoji are allowed, since real names have them.
    """
    return name.isprintable() or all(
        c.isprintable() or category(c) == "Zs" or c in "\u200c\u200d" for c in name
    )


def few(names: Sequence[str], most: int = 5) -> str:
    """The first of some names, and how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def did_you_mean(name: str, names: Iterable[str]) -> str | None:
    """A hint with the name nearest to a misspelt one; None if none is near.

    Underscores are dashes, and case does not count.
    """
    plain = {known.replace("_", "-").lower(): known for known in names}
    close = get_close_matches(name.replace("_", "-").lower(), plain, n=1)
    return f"did you mean {plain[close[0]]}?" if close else None


def describe_value(value: object) -> str:
    """A short description of a JSON value of any size."""
    if type(value) is int and abs(value) >= 10**30:
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, (dict, list)) and value:
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    return repr(value)[:80]


_MARKUP = re.compile(r"[\\`*\[\]<>|~$]|&(?=#?\w+;)|(?<!\w)_|_(?!\w)|^[#+=-]")
"""Characters with a meaning in CommonMark, in tables, or in the Hub's mathematics."""


def escaped(text: str) -> str:
    """One line of Markdown that displays this text."""
    return _MARKUP.sub(
        lambda found: (
            "".join(f"&#{ord(c)};" for c in found[0]) if found[0] in "<>&|$" else "\\" + found[0]
        ),
        one_line(text),
    )


def code(token: str) -> str:
    """A token as Markdown code within a table, whatever it holds; empty if it is only space."""
    text = "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in token.strip())
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence, space = "`" * (longest + 1), " " * (longest > 0)
    return f"{fence}{space}{text}{space}{fence}".replace("|", "\\|") if text else ""


_VARIABLES = (
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_ID_TOKEN", "ACTIONS_ID_TOKEN_REQUEST_TOKEN",
    "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN",
)  # fmt: skip
"""Environment variables that hold a secret of the Hub's client, or of a store's."""

_SECRETS = (
    (re.compile(r"\bhf_(?:jwt|oauth)_[\w.-]+|\bhf_[A-Za-z0-9]{20,}"), "hf_***"),
    (re.compile(r"(?i)(?<=bearer )[^\s,;]+"), "***"),
    (re.compile(r"(?<=://)(?:[^/\s@]+|[^/\s:@]*:(?!\d*/)[^\s@]+)(?=@)"), "***"),
    (re.compile(r"(https?://[^\s?'\"]+)\?[^\s'\"]+"), r"\1"),
)
"""A token; the user and password of a URL; the query of a URL, which may be signed."""


def redacted(text: str) -> str:
    """The same text with stars for every token in it, and URLs without their queries."""
    for name in _VARIABLES:
        value = os.environ.get(name, "")
        if len(value) >= 8:
            text = text.replace(value, "***")
    for pattern, instead in _SECRETS:
        text = pattern.sub(instead, text)
    return text


def redact_log(name: str) -> None:
    """Redact the log records of a library, in all its present handlers."""
    for handler in logging.getLogger(name).handlers:
        handler.addFilter(_redact)  # which a handler has once, however often it is added


def _redact(record: logging.LogRecord) -> bool:
    record.msg, record.args = redacted(record.getMessage()), None
    return True
