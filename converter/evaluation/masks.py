"""Stars in what a model says, for all who show it or write it down."""

from collections.abc import Sequence

from converter.calibration.word_list import WordList, load_words


def masks(words: WordList, *, mask: bool) -> tuple[WordList, ...]:
    """The lists whose words are starred out of what is shown: the given one, and the built-in one.

    The built-in prompts and what follows them are English, whatever the given list knows.

    Args:
        mask: whether any are.
    """
    builtin = load_words("builtin")
    lists = (words,) if words.sha256 == builtin.sha256 else (words, builtin)
    return lists if mask else ()


def masked(text: str, lists: Sequence[WordList], prompt: str = "") -> str:
    """A text, as long as it was, without words of some lists, also those begun by its prompt."""
    for words in lists:
        alone, whole = words.mask(text), words.mask(prompt + text)[len(prompt) :]
        text = "".join(a if a == b else "*" for a, b in zip(alone, whole, strict=True))
    return text
