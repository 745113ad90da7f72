"""Pairs from the model itself: toxic and neutral continuations of the same prompts.

A listed word marks a toxic continuation, as it marks the toxic side of a pair from a file. Both
sides have the same prompt and the same distribution, so they differ only in the continuation.
"""

import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from converter.calibration.datasets import NO_TEXT, draw
from converter.calibration.pairs import MIN_PAIRS, Pair, Pairs, check_num_pairs, load_pairs
from converter.calibration.statistics import cache_key
from converter.calibration.word_list import WordList
from converter.errors import DataError
from converter.evaluation.continuations import CONTINUATION_VERSION, generate
from converter.evaluation.prompts import Prompts, load_prompts
from converter.evaluation.scorers import load_scorer, origin_of, scores_of
from converter.manifest import DrawnRecord, Manifest, Origin
from converter.methods.workbench import Bench
from converter.models.placement import Forward
from converter.recipe import SELF, Recipe
from converter.runtime import progress
from converter.runtime.cache import cache_folder, replacing

_WANTED = 400
"""Number of pairs by default."""

_ROUNDS, _SAMPLES = 8, 4
"""The most rounds of drawing, and continuations of each prompt in a round."""

_NEW_TOKENS = 24
"""Tokens of a continuation, at most."""

_BATCH = 64
"""Continuations written at a time; the samples depend on it."""

_TOXIC_SCORE = 0.5
"""Score from which on a text counts as toxic."""

_CUT = "\ufffd"
"""The character that a tokenizer gives for an incomplete letter."""

_VERSION = 1
"""File of the built-in prompts."""


def pairs_of(bench: Bench, seed: int) -> Pairs:
    """The pairs of a run: read, or drawn from the unedited model.

    Args:
        bench: its recipe names the pairs. The model is loaded if they are drawn and not cached.
        seed: of the draw.

    Raises:
        ConverterError: see ``load_pairs`` and ``draw_pairs``.
    """
    recipe = bench.recipe
    if recipe.pairs != SELF:
        return load_pairs(recipe.pairs, bench.words, recipe.num_pairs, seed)
    with progress.stage("self", "drawing pairs from the model's own continuations"):
        return draw_pairs(bench, seed)


def check_resident(forward: Forward) -> None:
    """Raise OptionError or SourceError if the whole model cannot be in memory."""
    forward.need_resident(
        f"--pairs {SELF} draws continuations, for which",
        "give --forward resident or --device map, or pairs from a file",
    )


def plan_pairs(recipe: Recipe, forward: Forward) -> dict[str, Any]:
    """Plan ``draw_pairs``: numbers of prompts, continuations and pairs, for people.

    Raises:
        ConverterError: as ``draw_pairs`` would, as far as it shows without the model.
    """
    check_resident(forward)
    check_num_pairs(recipe.num_pairs)
    prompts = load_self_prompts(recipe)
    return {
        "prompts": len(prompts.texts),
        "prompts_origin": prompts.origin.title,
        "most_continuations": _ROUNDS * _SAMPLES * len(prompts.texts),
        "max_new_tokens": _NEW_TOKENS,
        "pairs": recipe.num_pairs or _WANTED,
        "scorer": recipe.self_scorer,
    }


def load_self_prompts(recipe: Recipe) -> Prompts:
    """The prompts to continue. Raises as ``load_prompts``."""
    found = load_prompts(recipe.self_prompts, None, 0, builtin="self_prompts.txt")
    if recipe.self_prompts != "builtin":
        return found
    return replace(found, origin=Origin(name="builtin", version=_VERSION))


def is_same_draw(manifest: Manifest, recipe: Recipe) -> bool:
    """Whether a draw now would give the pairs that a manifest records.

    Raises:
        ConverterError: prompts or scorer cannot be loaded.
    """
    drawn, spec = manifest.pairs.drawn, recipe.self_scorer
    if drawn is None or drawn.prompts.sha256 != load_self_prompts(recipe).sha256:
        return False
    return spec is None or origin_of(spec, load_scorer(spec, "cpu")) == drawn.scorer


@dataclass(slots=True)
class _Said:
    """A prompt, and its different continuations, as drawn."""

    prompt: str
    toxic: dict[str, None] = field(default_factory=dict)
    neutral: dict[str, None] = field(default_factory=dict)

    def pairs(self, words: WordList) -> list[Pair]:
        """Pair each toxic continuation with a neutral one, while both last."""
        return [
            Pair(whole, self.prompt + neutral, words.spans(whole), group=self.prompt)
            for whole, neutral in zip(
                map(self.prompt.__add__, self.toxic), self.neutral, strict=False
            )
        ]


def draw_pairs(bench: Bench, seed: int) -> Pairs:
    """Draw continuations until they give enough pairs, or the limit is reached.

    A continuation is toxic if it has a listed word, and neutral if it has none. If a scorer
    disagrees (toxic from 1/2 on), the continuation is left out. Toxic and neutral continuations of
    a prompt make pairs, in order. They are sampled at temperature 1 from the whole distribution. A
    prompt with a listed word is left out, since the neutral side would have that word, too. Pairs
    of one prompt are one group of a split.

    Args:
        bench: of the unedited model; its recipe names the number of pairs, the prompts and the
            scorer.
        seed: of the continuations, and of the choice among surplus pairs.

    Raises:
        OptionError, SourceError: the whole model cannot be in memory, or there is no such scorer.
        DataError: prompts are unusable, or the continuations give too few pairs.
    """
    recipe, words, spec = bench.recipe, bench.words, bench.recipe.self_scorer
    check_resident(bench.forward)
    check_num_pairs(recipe.num_pairs)
    prompts = load_self_prompts(recipe)
    scorer = load_scorer(spec, bench.device) if spec else None
    score = partial(scores_of, spec, scorer) if spec and scorer else None
    listed = [number for number, text in enumerate(prompts.texts, 1) if words.spans(text)]
    said = [_Said(text) for text in prompts.texts if not words.spans(text)]
    wanted, rng, rounds = recipe.num_pairs or _WANTED, random.Random(seed), 0  # noqa: S311
    pairs: list[Pair] = []
    while said and rounds < _ROUNDS and len(pairs) < wanted:
        rounds += 1
        texts = _continuations(bench, [each.prompt for each in said], rng.getrandbits(63))
        _sort(said, texts, words, score)
        pairs = [pair for each in said for pair in each.pairs(words)]
    count, toxic = rounds * _SAMPLES * len(said), sum(len(each.toxic) for each in said)
    found = f"{toxic:,} toxic ones among {count:,} continuations of {len(said)} prompts"
    if len(pairs) < max(recipe.num_pairs or 0, MIN_PAIRS):
        raise _too_few(recipe, len(pairs), found, len(listed))
    progress.note(f"  {min(len(pairs), wanted)} pairs, of {found}")
    record = DrawnRecord(
        prompts=prompts.record(),
        seed=seed,
        continuations=count,
        toxic=toxic,
        scorer=origin_of(spec, scorer) if spec and scorer else None,
    )
    chosen = pairs if len(pairs) <= wanted else draw(pairs, wanted, seed)
    skipped = {"with a listed word in the prompt": listed} if listed else {}
    return replace(Pairs.of(chosen, Origin(name=SELF), skipped), drawn=record)


def _too_few(recipe: Recipe, count: int, found: str, listed: int) -> DataError:
    """The error that ``count`` pairs are too few."""
    return DataError(
        f"pairs {SELF}: the model says too little that is toxic",
        expected=f"at least {max(recipe.num_pairs or 0, MIN_PAIRS)} pairs of a toxic and a neutral "
        "continuation",
        found=f"{count} pairs, of {found}"
        + (f"; {listed} prompts have a listed word and were left out" if listed else ""),
        hint="give other --self-prompts, a --word-list in their language, a lower --num-pairs, or "
        "other --pairs",
    )


def _sort(
    said: Sequence[_Said],
    drawn: Sequence[Sequence[str]],
    words: WordList,
    score: Callable[[list[str]], NDArray[np.float64]] | None,
) -> None:
    """Sort the continuations of each prompt. Unreadable ones are left out."""
    # the last token may be the first bytes of a letter only
    ended = [
        (place, text.rstrip(_CUT).rstrip())
        for place, texts in zip(said, drawn, strict=True)
        for text in texts
    ]
    kept = [(place, text) for place, text in ended if text and not NO_TEXT.search(text)]
    # a continuation may go on within a word of the prompt
    listed = [bool(words.spans(place.prompt + text)) for place, text in kept]
    scores = None if score is None else score([text for _, text in kept])
    toxic = listed if scores is None else list(scores >= _TOXIC_SCORE)
    for (place, text), by_word, by_score in zip(kept, listed, toxic, strict=True):
        if by_word == by_score:
            (place.toxic if by_word else place.neutral)[text] = None


def _continuations(bench: Bench, prompts: Sequence[str], seed: int) -> list[list[str]]:
    """One round's continuations of each prompt, from the cache if they were drawn before.

    The judgements of scorer and word list are not cached, so others need no new draw.
    """
    inputs = {
        "files": bench.source.digests(),
        "prompts": list(prompts),
        "seed": seed,
        "options": [_SAMPLES, _NEW_TOKENS, _BATCH],
        "device": bench.device.partition(":")[0],
        "dtype": str(bench.dtype),
        "attention": bench.how.attention,
        "libraries": {name: version(name) for name in ("tokenizers", "torch", "transformers")},
        "continuation_version": CONTINUATION_VERSION,
    }
    path = cache_folder() / "continuations" / f"{cache_key(inputs)}.json"
    with suppress(OSError, msgspec.DecodeError):  # there are none, or they are damaged
        kept = msgspec.json.decode(path.read_bytes(), type=list[list[str]])
        if [len(group) for group in kept] == [_SAMPLES] * len(prompts):
            return kept
    model = bench.load_resident()
    drawn = generate(
        model, prompts, max_new_tokens=_NEW_TOKENS, samples=_SAMPLES, top_p=1.0,
        batch_size=_BATCH, seed=seed,
    )  # fmt: skip
    with replacing(path) as part:
        part.write_bytes(msgspec.json.encode(drawn))
    return drawn
