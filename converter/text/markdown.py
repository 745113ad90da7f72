"""Text of strangers within Markdown: it stays text, and does not become markup, HTML or a row."""

import re

from converter.text.sanitize import one_line

_MARKUP = re.compile(r"[\\`*\[\]<>|~$]|&(?=#?\w+;)|(?<!\w)_|_(?!\w)|^[#+=-]")
"""What means something in CommonMark, in tables, or in the mathematics that the Hub shows."""


def escaped(text: str) -> str:
    """One line of Markdown that shows as this text."""
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
