"""The one way to a terminal, or to the log of a job: nothing in a text can steer either.

Names of tensors, files and tokens, and what a manifest or a server says, are chosen by strangers.
Printed as they are they could move the cursor, hide or reverse what follows, begin lines that look
like ours, or give orders to the program that keeps the log.
"""

import json
import re
from typing import Any

import click

from converter.manifest import to_json
from converter.text.sanitize import one_line
from converter.text.secrets import redacted

ORDERS = re.compile(r"^(\s*)::|##(?=\w*\[)")
"""What GitHub, Azure and TeamCity take for an order in a line of a log."""


def echo(text: str, *, err: bool = False) -> None:
    """Print lines of ours that may quote strangers; what is quoted is one line by then."""
    click.echo("\n".join(map(harmless, text.split("\n"))), err=err)


def harmless(line: str) -> str:
    """A line with its spaces, without tokens, and with escapes for what could steer."""
    line = redacted(line)
    if not line.isprintable():
        line = "".join(c if c.isprintable() else one_line(c) or " " for c in line)
    return ORDERS.sub(lambda found: f"{found[1]}\\x3a:" if found[1] is not None else "#\\x23", line)


def as_json(data: Any) -> str:
    """JSON with the letters of all languages, and escapes for what could steer a terminal.

    Args:
        data: may hold parts of a manifest.
    """
    text = json.dumps(data, indent=1, ensure_ascii=False, default=to_json)
    if text.replace("\n", "").isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)
