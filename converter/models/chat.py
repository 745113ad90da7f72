"""A user message as the text that a model continues, and an answer behind it.

A template that takes a date always gets the same one, so that a run can be repeated.
"""

from typing import Any

from converter.errors import DataError

_DATE = "26 Jul 2024"
"""The date that templates like those of Llama 3 use by default."""


def as_prompt(tokenizer: Any, message: str, suffix: str = "") -> str:
    """A message with the suffix behind it, after a space, as the chat template writes it.

    Without a template it is the text itself; with one, the model's turn has begun. A template with
    the suffix (``checkpoints.chat_template``) renders the same from the message alone.

    Raises:
        DataError: the template cannot render it.
    """
    said = f"{message} {suffix}" if suffix else message
    if not tokenizer.chat_template:
        return said
    return _rendered(tokenizer, [{"role": "user", "content": said}], begins=True)


def as_dialogue(tokenizer: Any, message: str, answer: str) -> str:
    """A message and an answer as the chat template writes them. Raises DataError if it cannot."""
    said = {"role": "user", "content": message}, {"role": "assistant", "content": answer}
    return _rendered(tokenizer, list(said), begins=False)


def _rendered(tokenizer: Any, messages: list[dict[str, str]], *, begins: bool) -> str:
    try:
        return str(
            tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=begins, date_string=_DATE
            )
        )
    except Exception as error:  # an untrusted program may raise anything
        raise DataError(
            "the chat template cannot write a message of a user",
            found=f"{type(error).__name__}: {error}",
        ) from error


def exchange(tokenizer: Any, message: str, answer: str, suffix: str = "") -> tuple[str, int]:
    """The text of a message and an answer, and where in it the answer begins.

    Without a chat template a space is between them. Raises as ``as_prompt``.
    """
    prompt = as_prompt(tokenizer, message, suffix)
    space = "" if tokenizer.chat_template else " "
    return prompt + space + answer, len(prompt) + len(space)
