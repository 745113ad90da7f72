"""``python -m converter`` is ``gloss``."""

from converter.cli.main import gloss

gloss()
