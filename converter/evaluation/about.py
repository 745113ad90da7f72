"""The settings of a comparison of two models, as files and JSON have them."""

import msgspec


class About(msgspec.Struct, frozen=True, kw_only=True):
    """The two models of a comparison, and how they ran.

    Attributes:
        base: name of the unedited model.
        edited: name of the other.
        how: the edited model was run, in words.
        seed: of the samples.
        max_new_tokens: of each continuation.
        top_p: of samples.
        chat: whether prompts went through the chat template.
        masked: whether listed words are starred out.
    """

    base: str
    edited: str
    how: str
    seed: int
    max_new_tokens: int
    top_p: float
    chat: bool
    masked: bool
