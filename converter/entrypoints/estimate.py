"""How long a conversion will take here: a few of its texts go through the model, and are scaled up.

The number of passes of each stage is known from the recipe and the method. Their cost is measured
on texts of the job, of all lengths, with the passes themselves: what a method asks of the model is
asked for few pairs and for more, and a line through both leaves out what is done once.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from math import ceil
from time import perf_counter
from typing import Any

import torch

from converter.calibration.collect import extract
from converter.calibration.pairs import Pairs, Prose, load_pairs, load_prose
from converter.calibration.split import Part, split
from converter.calibration.statistics import Request
from converter.calibration.word_list import load_words
from converter.checkpoints.plan import Plan
from converter.checkpoints.source import Source
from converter.entrypoints.methods import request_of
from converter.evaluation.continuations import Draws, generate
from converter.evaluation.fit import settle_dtype
from converter.evaluation.headline import (
    load_headline_prompts,
    ordinary_text,
    why_nothing_is_drawn,
)
from converter.evaluation.samples import SAMPLES, SAMPLES_TOKENS, why_no_samples
from converter.methods.base import Method, aim_of, footprint_of
from converter.methods.together import options_of, parts_of, strengths_of
from converter.methods.workbench import Bench
from converter.models.batching import Encoder, Sentence
from converter.models.edited import lowest_layer, modules_of
from converter.models.hooks import UNEDITED, Entered
from converter.models.likelihood import entering, log_probabilities_under
from converter.models.resident import LanguageModel, choose_device
from converter.recipe import SELF, Recipe, Settings
from converter.runtime import progress

_FEW, _MORE = 4, 16
"""Pairs that the two measurements of a fit take, each with as many paragraphs if there are."""

_TRIES = 4
"""Strengths that are tried where one is to be chosen: a search by halves among up to fifteen."""

_EDITS = 3
"""Edits that go through the model together in the second measurement of held-out text."""

_STEPS = (2, 6)
"""Tokens of each continuation that the two measurements of writing take."""

_WITH_WORDS = 3
"""Of so many continuations, one is taken to have a listed word, so that the guard reads it."""

_DIVERGENCE = 1.5
"""Passes that the divergence at a token costs, roughly: of two distributions, no single tokens."""


def takes_gradients(method: Method, plan: Plan) -> bool:
    """Whether a fit of the method, or of any of several, needs a backward pass; it may if it is not
    known."""
    asked = [request_of(part, plan) for part in parts_of("", method).values()]
    return any(
        request is None or request.gradient or request.slopes or request.directions > 0
        for request in asked
    )


@dataclass(frozen=True, slots=True)
class _Line:
    """Seconds as a line of the number of tokens.

    Attributes:
        once: what does not depend on it.
        each: of a token.
    """

    once: float
    each: float

    @classmethod
    def through(cls, few: tuple[int, float], more: tuple[int, float]) -> "_Line":
        """The line through two measurements; through the second and nothing, if it were to fall."""
        each = (more[1] - few[1]) / (more[0] - few[0]) if more[0] > few[0] else 0.0
        if each <= 0:
            return cls(0.0, more[1] / max(more[0], 1))
        return cls(max(few[1] - each * few[0], 0.0), each)

    def at(self, tokens: int) -> float:
        """Seconds of so many."""
        return self.once + self.each * tokens


def estimate_time(
    recipe: Recipe, source: Source, plan: Plan, method: Method, settings: Settings
) -> dict[str, Any]:
    """Seconds of each stage of a conversion. The weights are fetched, and the model is loaded.

    Returns:
        ``seconds`` in all, those of ``stages``, the ``basis`` they were measured on, and, in words,
        what is ``not_counted``.

    Raises:
        ConverterError: as ``convert`` would until the fit; SourceError if memory runs out.
    """
    words = load_words(recipe.word_list)
    bench = Bench.of(recipe, source, plan, words, choose_device(recipe.device), settings)
    settle_dtype(bench, method)
    origin = "builtin" if recipe.pairs == SELF else recipe.pairs
    pairs = load_pairs(origin, words, recipe.num_pairs, recipe.seed)
    parts = split(pairs, load_prose(recipe.neutral), recipe.seed)
    stages: dict[str, float] = {}
    with progress.stage("time", "measuring passes of a few texts"):
        source.fetch()
        stages["load"] = _timed(bench.load)[0]
        measured = _Measured(bench, method)
        not_counted = [*measured.fit(parts.fit, stages), *measured.others()]
        measured.held_out(parts.choose, parts.report, stages)
        measured.continuations(stages)
    return {
        "seconds": round(sum(stages.values()), 1),
        "stages": {name: round(seconds, 1) for name, seconds in stages.items()},
        "basis": {
            "texts": measured.texts,
            "tokens": measured.tokens,
            "seconds": round(measured.seconds, 1),
            "device": bench.device,
        },
        "not_counted": not_counted,
    }


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = perf_counter()
    found = work()
    return perf_counter() - start, found


class _Measured:
    """Measures passes of a bench, and scales them.

    Attributes:
        texts, tokens, seconds: that were measured on, and how long that took.
    """

    def __init__(self, bench: Bench, method: Method) -> None:
        self._bench, self._method = bench, method
        self._load(bench.dtype)
        self.texts, self.tokens, self.seconds = 0, 0, 0.0

    def _load(self, dtype: torch.dtype) -> float:
        """Take the model in a dtype, without the one before. Returns the seconds."""
        self._model: Any = None
        self._encode: Any = None
        seconds, self._model = _timed(lambda: self._bench.load(dtype))
        self._encode = Encoder(self._model.tokenizer, self._model.module)
        return seconds

    def _run(self, work: Callable[[], Any], texts: int, tokens: int) -> float:
        seconds, _ = _timed(work)
        self.texts, self.tokens = self.texts + texts, self.tokens + tokens
        self.seconds += seconds
        return seconds

    def fit(self, part: Part, stages: dict[str, float]) -> Iterator[str]:
        """Add what a fit asks of the model; says what of it is not counted."""
        stages["activations"] = 0.0
        for name, each in parts_of(self._bench.recipe.method, self._method).items():
            request = request_of(each, self._bench.plan)
            if request is None:
                yield f"what {name} does to be fitted, which is not only a pass over the pairs"
            else:
                stages["activations"] += self._line(request, part).at(self._size(part))

    def _line(self, request: Request, part: Part) -> _Line:
        self._extract(request, _some(part, 2))  # what the first pass of all does once

        def measured(count: int) -> tuple[int, float]:
            some = _some(part, count)
            tokens, texts = self._size(some), 2 * len(some.pairs.pairs) + len(some.prose.paragraphs)
            return tokens, self._run(lambda: self._extract(request, some), texts, tokens)

        return _Line.through(measured(_FEW), measured(_MORE))

    def _extract(self, request: Request, part: Part) -> None:
        size = self._bench.recipe.batch_size
        extract(self._model, request, part.pairs, part.prose, batch_size=size)

    def _size(self, part: Part) -> int:
        return sum(len(each.ids) for each in self._sentences(part))

    def _sentences(self, part: Part) -> list[Sentence]:
        sides = [text for pair in part.pairs.pairs for text in (pair.toxic, pair.neutral)]
        return [self._encode(text, "mean", ()) for text in (*sides, *part.prose.paragraphs)]

    def held_out(self, choose: Part, report: Part, stages: dict[str, float]) -> None:
        """Add the choice of the strength and the guard, which read held-out text."""
        plan, method, recipe = self._bench.plan, self._method, self._bench.recipe
        free = [name for name in strengths_of(method) if options_of(method).get(name) is None]
        if not free and not recipe.guard:
            return
        stages["load"] += self._load(self._bench.held_out)
        first = lowest_layer(plan.architecture, modules_of(plan, footprint_of(method, plan)))
        some = [self._sentences(_some(report, _MORE))]
        tokens, texts = sum(len(each.ids) for each in some[0]), len(some[0])

        def under(edits: int, entered: Entered | None = None) -> tuple[int, float]:
            """Tokens and seconds of one pass under several edits."""
            given = self._model, [*UNEDITED] * edits, some, entered
            work = partial(log_probabilities_under, *given)
            return edits * tokens, self._run(work, edits * texts, edits * tokens)

        _, whole = under(1)
        entered = entering(self._model, some, first)
        alone = under(1, entered)
        above, once = _Line.through(alone, under(_EDITS, entered)), whole / tokens
        below = max(once - alone[1] / tokens, 0.0)
        if free:
            size, tries = self._size(choose), _TRIES * len(free)
            stages["choose"] = size * below + above.at(2 * size) + (tries - 1) * above.at(size)
        if recipe.guard:
            edits, size = 1 + recipe.guard_draws, self._size(report)
            stages["guard"] = size * below + above.at((1 + edits) * size)
            if prompts := self._prompts():
                draws = Draws()
                read = prompts * draws.samples // _WITH_WORDS * 2 * draws.max_new_tokens
                moved = sum(len(each.ids) for each in ordinary_text(self._model, report.prose))
                stages["guard"] += (read * edits + _DIVERGENCE * moved * (1 + edits)) * once

    def _prompts(self) -> int:
        recipe, mode = self._bench.recipe, self._bench.forward.mode
        if why_nothing_is_drawn(recipe, self._method, mode) is not None:
            return 0
        return len(load_headline_prompts(recipe).texts)

    def continuations(self, stages: dict[str, float]) -> None:
        """Add those that the guard judges by, and the samples."""
        recipe, draws = self._bench.recipe, Draws()
        if count := self._prompts() * draws.samples:
            batch = self._writing(draws.batch_size).at(draws.max_new_tokens)
            stages["draw"] = ceil(count / draws.batch_size) * batch
        if why_no_samples(recipe, self._method, self._bench.forward.mode) is None:
            stages["samples"] = 2 * self._writing(SAMPLES).at(SAMPLES_TOKENS)

    def _writing(self, count: int) -> _Line:
        """Seconds of so many continuations together, by the tokens of each."""
        assert isinstance(self._model, LanguageModel)
        prompts = load_headline_prompts(replace(self._bench.recipe, prompts="builtin")).texts
        some, model = [*islice(_again(prompts), count)], self._model

        def measured(tokens: int) -> tuple[int, float]:
            def write() -> object:
                return generate(model, some, max_new_tokens=tokens, samples=1, batch_size=count)

            return tokens, self._run(write, count, count * tokens)

        return _Line.through(measured(_STEPS[0]), measured(_STEPS[1]))

    def others(self) -> Iterator[str]:
        """What else is not counted, in words."""
        recipe = self._bench.recipe
        yield "what the method computes of the activations"
        if aim_of(self._method) == "defence":
            yield "refusals, which the guard measures of an edit for defence"
        if recipe.pairs == SELF:
            yield "drawing pairs from the model itself"
        yield "downloads, writing, hashing and verifying of files"


def _again(prompts: Sequence[str]) -> Iterator[str]:
    while True:
        yield from prompts


def _some(part: Part, count: int) -> Part:
    """So many pairs and paragraphs of a part, of all lengths."""

    def spread(texts: Sequence[Any], length: Callable[[Any], int]) -> list[Any]:
        ordered = sorted(texts, key=length)
        return ordered[len(ordered) // (2 * count) :: max(len(ordered) // count, 1)][:count]

    pairs = spread(part.pairs.pairs, lambda pair: len(pair.toxic))
    prose = spread(part.prose.paragraphs, len)
    return Part(
        Pairs.of(pairs, part.pairs.origin, {}), Prose.of(prose[: count // 2], part.prose.origin)
    )


def time_text(found: Mapping[str, Any]) -> str:
    """The estimate for people."""
    stages = ", ".join(f"{name} {_clock(seconds)}" for name, seconds in found["stages"].items())
    basis = found["basis"]
    return (
        f"time about {_clock(found['seconds'])} ({stages}), by passes of {basis['texts']} texts "
        f"({basis['tokens']:,} tokens) in {basis['seconds']:.0f} s on this machine as it is now; "
        "what the cache has is not done again\n"
        f"  not counted: {'; '.join(found['not_counted'])}"
    )


def _clock(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
