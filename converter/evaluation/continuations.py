"""Continuations of prompts, written by a model."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteriaList,
)

from converter.errors import OptionError, SourceError
from converter.models.batching import (
    Batch,
    Sentence,
    batches,
    beginning,
    encode,
    first_token,
    num_positions,
)
from converter.models.pieces import pieces_of
from converter.models.resident import LanguageModel
from converter.runtime import progress

CONTINUATION_VERSION = 2
"""Version of the drawing. Raise it if ``generate`` comes to give other texts."""


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

    Prompts begin with the tokens that the tokenizer puts before a text. A prompt that leaves no
    room for ``max_new_tokens`` loses its beginning, but not its BOS. A continuation ends before the
    first EOS. Penalties, temperatures, forced and suppressed tokens of the checkpoint's
    ``generation_config.json`` are ignored, since the measurement is of the weights.

    Args:
        model: in eval mode; its parts may be on several devices. Inputs go to the device of the
            embeddings, or to the model's if that is unknown (for offloaded weights).
        samples: continuations drawn for each prompt; 0 for a single greedy one.
        top_p: over 0; samples are drawn at temperature 1 from the fewest tokens that together have
            this share of the probability.
        batch_size: continuations written at a time. Samples depend on it; greedy continuations only
            by rounding.
        seed: of the samples. They neither depend on nor change the state of other random draws.

    Returns:
        For each prompt, in order, its continuations: 1, or ``samples``.

    Raises:
        OptionError: the model has too few positions for ``max_new_tokens``.
        DataError: the tokenizer has no special token to begin an empty prompt with.
        SourceError: the GPU is out of memory.
    """
    module, tokenizer = model.module, model.tokenizer
    copies = max(samples, 1)
    sentences = [
        Sentence(ids)
        for ids in _encode(module, tokenizer, prompts, max_new_tokens)
        for _ in range(copies)
    ]
    where: Any = module.get_input_embeddings().weight.device  # type: ignore[operator]
    where = model.device if where.type == "meta" else str(where)
    settings = _settings(module, tokenizer, max_new_tokens)
    nucleus = _Nucleus(top_p) if samples else None
    found: list[str] = [""] * len(sentences)
    with (
        _prepared(module),
        torch.random.fork_rng(devices=range(torch.cuda.device_count())),
        progress.bar("continuations", len(sentences) * max_new_tokens, "token"),
    ):
        torch.manual_seed(seed)  # a nucleus draws only from the global generators
        for batch in batches(sentences, batch_size, where, "left"):
            written = _continued(module, batch, settings, nucleus)
            for row, ids in zip(batch.rows, written, strict=True):
                found[row] = _decode(tokenizer, sentences[row].ids, ids, settings.eos_token_id)
            progress.advance(len(batch.rows) * (max_new_tokens - written.shape[1]))
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
    begin = beginning(tokenizer)
    for prompt in prompts:
        coded = encode(tokenizer, prompt, begin)
        ids = coded.ids or [first_token(tokenizer)]
        excess = 0 if positions is None else len(ids) + max_new_tokens - positions
        kept = coded.start or int(ids[0] == tokenizer.bos_token_id)
        yield ids if excess <= 0 else ids[:kept] + ids[kept + excess :]


def _settings(model: nn.Module, tokenizer: Any, max_new_tokens: int) -> GenerationConfig:
    """A generation config with our settings; of the checkpoint's own, only the EOS stays."""
    own: Any = getattr(model.generation_config, "eos_token_id", None)
    ends = {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id} - {None}
    # generate() needs a padding token even without padding; what it writes after an EOS is
    # cut off again
    pad = min(ends, default=0) if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=sorted(ends) or None,
        pad_token_id=pad,
    )  # fmt: skip


@contextmanager
def _prepared(module: nn.Module) -> Iterator[None]:
    """Empty the model's own generation config, from which generate() takes the settings that we
    omit; and give the head contiguous hidden states.

    After a prompt, generate() passes the last positions as a view with gaps. For such a view,
    PyTorch copies the head in bfloat16 once for each prompt: on a CPU, this takes longer than all
    the rest.
    """
    head, own = module.get_output_embeddings(), module.generation_config  # type: ignore[operator]
    with head.register_forward_pre_hook(_contiguous):
        module.generation_config = GenerationConfig()  # type: ignore[assignment, no-untyped-call]
        try:
            yield
        finally:
            module.generation_config = own


def _contiguous(head: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(each.contiguous() if isinstance(each, Tensor) else each for each in given)


class _Nucleus(LogitsProcessor):
    """Draws the next token from the fewest that together have the probability ``top_p``, and leaves
    it as the only choice. Tokens as likely as the last of them count as well.

    A token is drawn from the whole vocabulary, and kept if the likelier ones have less than
    ``top_p`` together; else another is drawn. generate() would sort the vocabulary, and take a
    random number for each token of it: two thirds of the time of a small model on a CPU.
    """

    def __init__(self, top_p: float) -> None:
        self.top_p = top_p

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (B, V): 0 for the token that is drawn, -inf for all others."""
        chosen = torch.full_like(scores, -torch.inf)
        chances, rows = scores.softmax(-1), torch.arange(len(scores), device=scores.device)
        while len(rows):
            # for a single draw, multinomial would take V random numbers
            token = torch.multinomial(chances, 2, replacement=True)[:, :1]
            likelier = (chances * (chances > chances.gather(-1, token))).sum(-1)
            inside = (likelier < self.top_p) | (self.top_p >= 1)
            chosen[rows[inside], token[inside, 0]] = 0
            chances, rows = chances[~inside], rows[~inside]
        return chosen


def _continued(
    model: nn.Module, batch: Batch, settings: GenerationConfig, nucleus: _Nucleus | None
) -> Tensor:
    """``_continue``, or its result in a stopped run. Either leaves the same state of the
    generators.
    """
    pieces = pieces_of(model)
    if pieces is None:
        return _continue(model, batch, settings, nucleus)
    sampled = str(nucleus and nucleus.top_p)
    given = batch.ids, batch.mask, settings.to_json_string(), sampled, *_generators().values()
    name = pieces.name("continuations", *given)
    if name not in pieces:
        new = _continue(model, batch, settings, nucleus)
        pieces.put(name, {"new": new, **_generators()})
        return new
    found = pieces.get(name)
    torch.set_rng_state(found["cpu"])
    torch.cuda.set_rng_state_all([found[f"cuda:{i}"] for i in range(len(found) - 2)])
    progress.advance(found["new"].numel())
    return found["new"]


def _generators() -> dict[str, Tensor]:
    """The state of the global generator of each device, from which a nucleus draws."""
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else ()
    return {"cpu": torch.get_rng_state()} | {f"cuda:{i}": state for i, state in enumerate(gpus)}


def _continue(
    model: nn.Module, batch: Batch, settings: GenerationConfig, nucleus: _Nucleus | None
) -> Tensor:
    """The new ids, (B, up to max_new_tokens), on the CPU."""
    write: Any = model.generate
    try:
        written = write(
            input_ids=batch.ids, attention_mask=batch.mask, generation_config=settings,
            logits_processor=LogitsProcessorList([nucleus] if nucleus else []),
            stopping_criteria=StoppingCriteriaList([_moving]),
        )  # fmt: skip
    except torch.OutOfMemoryError as error:
        raise SourceError(
            f"the GPU is out of memory with {len(batch.rows)} continuations in a batch",
            hint="lower --generation-batch-size, or give --device cpu",
        ) from error
    new: Tensor = written[:, batch.ids.shape[1] :].cpu()
    return new


def _moving(ids: Tensor, scores: Any, **others: Any) -> Tensor:
    """A criterion that ends nothing, and moves the bar by the token of each continuation."""
    progress.advance(len(ids))
    return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)


def _decode(tokenizer: Any, prompt: list[int], ids: Tensor, ends: Any) -> str:
    """The text that new ids add to the prompt, up to the first EOS."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Draws:
    """How continuations are drawn from the unedited model for the teacher-forced estimate.

    They are sampled at temperature 1 from the whole distribution (top_p = 1), so that the mean of
    p_after / p_before over their toxic words is an importance-weighted estimate.

    Attributes:
        samples: of each prompt.
        max_new_tokens: of each continuation, at most.
        batch_size: continuations written at a time, on which samples depend.
        seed: of the samples.
    """

    samples: int = 2
    max_new_tokens: int = 20
    batch_size: int = 64
    seed: int = 0

    def write(self, model: LanguageModel, prompts: Sequence[str]) -> list[list[str]]:
        """The continuations of each prompt."""
        return generate(
            model,
            prompts,
            max_new_tokens=self.max_new_tokens,
            samples=self.samples,
            top_p=1.0,
            batch_size=self.batch_size,
            seed=self.seed,
        )
