"""``python -m converter`` is ``gloss``."""

from converter.cli import gloss

gloss()
