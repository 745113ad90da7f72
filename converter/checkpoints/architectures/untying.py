"""How a model whose head is its embedding gets a head of its own."""

from collections.abc import Iterator
from typing import Any

from converter.checkpoints.architectures import library
from converter.checkpoints.architectures.architecture import HeadSpec

_TIED = "tie_word_embeddings"
"""The key of a config that says whether the head is the embedding."""


def find_untying(kind: Any, config: Any) -> HeadSpec | None:
    """The key of the config that makes the head a weight of its own; None if there is none.

    In a wrapper, the language model's part is tried first. The result is the same whether the head
    is the embedding now or not.

    Args:
        kind: class of transformers.
        config: of a small model of it.
    """
    before = _head(kind, config)
    for said, other, patch in _others(config):
        found = _head(kind, other)
        if before and found and before[1] == said != found[1]:
            return HeadSpec(patch, found[0])
    return None


def _others(config: Any) -> Iterator[tuple[bool, Any, dict[str, Any]]]:
    """The value at a place of a config, a config with the opposite, and the patch to untie."""
    text = library.text_config(config)
    said = getattr(text, _TIED, None)
    if type(said) is bool:
        yield said, library.changed(config, _TIED, not said), library.patch(config, _TIED, False)
    said = getattr(config, _TIED, None)
    if text is not config and type(said) is bool:
        other = library.changed(config, _TIED, getattr(text, _TIED, None))  # a copy
        setattr(other, _TIED, not said)
        yield said, other, {_TIED: False}


def _head(kind: Any, config: Any) -> tuple[str, bool] | None:
    """The module that makes the logits of such a model, and whether its weight is the embedding."""
    try:
        model = library.on_meta(kind, config)
    except Exception:  # the class refuses the config
        return None
    head = model.get_output_embeddings()
    if head is None:
        return None
    name = next(name for name, module in model.named_modules() if module is head)
    return name, head.weight is model.get_input_embeddings().weight
