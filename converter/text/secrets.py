"""Keep tokens out of whatever is printed."""

import logging
import os
import re

VARIABLES = (
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_ID_TOKEN", "ACTIONS_ID_TOKEN_REQUEST_TOKEN",
)  # fmt: skip
"""Environment variables that hold a secret of the Hub's client."""

SECRETS = (
    (re.compile(r"\bhf_(?:jwt|oauth)_[\w.-]+|\bhf_[A-Za-z0-9]{20,}"), "hf_***"),
    (re.compile(r"(?i)(?<=bearer )[^\s,;]+"), "***"),
    (re.compile(r"(?<=://)[^/\s@]+(?=@)"), "***"),
    (re.compile(r"(https?://[^\s?'\"]+)\?[^\s'\"]+"), r"\1"),
)
"""What a token looks like; who somebody is in an URL; and the query of one, which may be signed."""


def redacted(text: str) -> str:
    """The same text with stars for every token in it, and URLs without their queries."""
    for name in VARIABLES:
        value = os.environ.get(name, "")
        if len(value) >= 8:
            text = text.replace(value, "***")
    for pattern, instead in SECRETS:
        text = pattern.sub(instead, text)
    return text


class Redacting(logging.Filter):
    """Lets every line of a log through, redacted."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = redacted(record.getMessage()), None
        return True


def redact_log(name: str) -> None:
    """Redact what a library logs, whatever its handlers are by now."""
    for handler in logging.getLogger(name).handlers:
        if not any(isinstance(known, Redacting) for known in handler.filters):
            handler.addFilter(Redacting())
