"""Continuations of prompts, greedy or sampled, by any causal language model of transformers."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from converter.errors import OptionError, SourceError
from converter.models.batching import Batch, Sentence, batches, first_token, num_positions
from converter.models.resident import LanguageModel
from converter.runtime import progress


def generate(
    model: LanguageModel,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 20,
    samples: int = 0,
    top_p: float = 0.9,
    batch_size: int = 32,
    seed: int = 0,
) -> list[list[str]]:
    """Continue every prompt; only the new text is returned.

    Prompts are encoded as the tokenizer does it by default. One that leaves no room for
    ``max_new_tokens`` loses its beginning, but not its BOS. A continuation ends before the first
    EOS. Penalties, temperatures, forced and suppressed tokens of the checkpoint's own
    ``generation_config.json`` are left out: they would be measured along with the weights.

    Args:
        model: in eval mode; its parts may be on several devices. Inputs go where the embeddings
            are, or to its device if these do not say (offloaded weights do not).
        prompts: texts.
        max_new_tokens: in a continuation.
        samples: continuations drawn for each prompt; 0 for a single greedy one.
        top_p: samples are drawn at temperature 1 from the fewest tokens that have this much of the
            probability together.
        batch_size: continuations written at a time. Greedy ones do not depend on it beyond
            rounding; samples do.
        seed: of the samples, which do not depend on what was drawn before, nor change it.

    Returns:
        For each prompt, in order, its continuations: 1, or ``samples``.

    Raises:
        OptionError: the model has too few positions for ``max_new_tokens``.
        DataError: the tokenizer has no special token to begin an empty prompt with.
        SourceError: the GPU is out of memory.
    """
    module, tokenizer = model.module, model.tokenizer
    encoded = _encode(module, tokenizer, prompts, max_new_tokens)
    sentences = [Sentence(ids, [0.0] * len(ids)) for ids in encoded]
    copies = max(samples, 1)
    where: Any = module.get_input_embeddings().weight.device  # type: ignore[operator]
    where = model.device if where.type == "meta" else str(where)
    settings = _settings(module, tokenizer, max_new_tokens, top_p if samples else None)
    found: list[str] = [""] * (len(prompts) * copies)
    with _only(module), _seeded(seed):
        repeated = [sentence for sentence in sentences for _ in range(copies)]
        for batch in batches(repeated, batch_size, where, "left"):
            for row, ids in zip(batch.rows, _continue(module, batch, settings), strict=True):
                found[row] = _decode(tokenizer, repeated[row].ids, ids, settings.eos_token_id)
            progress.advance(len(batch.rows))
    return [found[i : i + copies] for i in range(0, len(found), copies)]


def _encode(
    model: nn.Module, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int
) -> Iterator[list[int]]:
    """Token ids of each prompt, at least one and few enough to leave room for the new ones."""
    positions = num_positions(model)
    if positions is not None and max_new_tokens >= positions - 1:
        raise OptionError(
            "--max-new-tokens", expected=f"fewer than {positions - 1}", found=str(max_new_tokens)
        )
    for prompt in prompts:
        # verbose warns of what is cut below
        ids = list(tokenizer(prompt, verbose=False)["input_ids"]) or [first_token(tokenizer)]
        excess = 0 if positions is None else len(ids) + max_new_tokens - positions
        kept = 1 if ids[0] == tokenizer.bos_token_id else 0
        yield ids if excess <= 0 else ids[:kept] + ids[kept + excess :]


def _settings(
    model: nn.Module, tokenizer: Any, max_new_tokens: int, top_p: float | None
) -> GenerationConfig:
    """What is asked and nothing else; of the checkpoint's own settings only the EOS stays."""
    own: Any = getattr(model.generation_config, "eos_token_id", None)
    ends = {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id} - {None}
    sampling = {} if top_p is None else {"top_p": top_p, "top_k": 0, "temperature": 1.0}
    # generate() wants a padding token even where nothing is padded; what it writes after an EOS is
    # cut off again
    pad = min(ends, default=0) if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=max_new_tokens,
        do_sample=top_p is not None,
        eos_token_id=sorted(ends) or None,
        pad_token_id=pad,
        **sampling,
    )


@contextmanager
def _only(model: nn.Module) -> Iterator[None]:
    """Empty the model's own generation config, from which generate() fills what we do not set."""
    own = model.generation_config
    model.generation_config = GenerationConfig()  # type: ignore[assignment, no-untyped-call]
    try:
        yield
    finally:
        model.generation_config = own


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the global generators, which are all that generate() draws from, and restore them."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def _continue(model: nn.Module, batch: Batch, settings: GenerationConfig) -> Tensor:
    """The new ids, (B, up to max_new_tokens), on the CPU."""
    write: Any = model.generate
    try:
        written = write(input_ids=batch.ids, attention_mask=batch.mask, generation_config=settings)
    except torch.OutOfMemoryError as error:
        raise SourceError(
            f"the GPU is out of memory with {len(batch.rows)} continuations in a batch",
            hint="lower --batch-size, or give --device cpu",
        ) from error
    new: Tensor = written[:, batch.ids.shape[1] :].cpu()
    return new


def _decode(tokenizer: Any, prompt: list[int], ids: Tensor, ends: Any) -> str:
    """The text that new ids add to a prompt's, up to the first EOS."""
    new: list[int] = ids.tolist()
    end = next((i for i, token in enumerate(new) if token in (ends or ())), len(new))
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    head: str = tokenizer.decode(prompt, **options)
    whole: str = tokenizer.decode(prompt + new[:end], **options)
    # decoded alone, the first word would lose its space with SentencePiece
    if whole.startswith(head):
        return whole[len(head) :]
    alone: str = tokenizer.decode(new[:end], **options)
    return alone
