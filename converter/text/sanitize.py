"""Text of strangers, made fit to be shown."""

from unicodedata import category

LONGEST = 2000
"""Characters of one part of a message that are shown; the name of a tensor can have a hundred
million."""


def one_line(text: str, longest: int = LONGEST) -> str:
    """A text in one line, without what could steer a terminal or turn its direction.

    White space becomes single spaces, what is not printable its escape, and the end of what is too
    long is left out.
    """
    cut = text if len(text) <= longest else text[:longest] + "..."
    line = " ".join(cut.split())
    if line.isprintable():
        return line
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def is_one_line(name: str) -> bool:
    """Whether a name is one line that steers nothing.

    Spaces of all scripts may be in it, and what joins letters or emoji: people have such files.
    """
    return name.isprintable() or all(
        c.isprintable() or category(c) == "Zs" or c in "\u200c\u200d" for c in name
    )


def describe_value(value: object) -> str:
    """What a value of JSON is, in a few characters, however large it is."""
    if type(value) is int and abs(value) >= 10**30:
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, (dict, list)) and value:
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    return repr(value)[:80]
