"""Star out listed words in continuations that are shown or written."""

from collections.abc import Sequence

from converter.calibration.word_list import WordList, load_words


def masks(words: WordList, *, mask: bool) -> tuple[WordList, ...]:
    """The lists of words to star out: the given one, and the built-in one.

    The built-in list is always included, since the built-in prompts and their continuations are
    English.

    Args:
        mask: whether any are.
    """
    builtin = load_words("builtin")
    lists = (words,) if words.sha256 == builtin.sha256 else (words, builtin)
    return lists if mask else ()


def masked(text: str, lists: Sequence[WordList], prompt: str = "") -> str:
    """A text of the same length, listed words starred out, also those that its prompt begins."""
    for words in lists:
        alone, whole = words.mask(text), words.mask(prompt + text)[len(prompt) :]
        text = "".join(a if a == b else "*" for a, b in zip(alone, whole, strict=True))
    return text
