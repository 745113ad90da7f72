"""The headline: the effect of an edit on text unlike its pairs.

An edit has more effect on held-out pairs, which are sentences like those of the fit, than on other
text. So the unedited model continues prompts that resemble no pair, once, and the toxic words in
these continuations are scored under the edit (``passages.Passages``). The KL divergence of the
next token's distribution, on the beginnings of ordinary paragraphs, says how far the edit moves the
model elsewhere.
"""

from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec

from converter.calibration.pairs import Prose
from converter.calibration.statistics import cache_key
from converter.edits.base import Edit
from converter.evaluation.continuations import CONTINUATION_VERSION, Draws
from converter.evaluation.passages import Passages, find_passages, passages_measured
from converter.evaluation.prompts import Prompts, load_prompts
from converter.manifest import HeadlineRecord, WordsMeasured
from converter.methods.base import Method, aim_of
from converter.methods.workbench import Bench
from converter.models.batching import Encoder, Sentence
from converter.models.edited import editing
from converter.models.likelihood import divergences, log_probabilities_under, mean_change
from converter.models.resident import Model
from converter.recipe import Recipe
from converter.runtime import progress
from converter.runtime.cache import cache_folder, replacing

MOST_PROMPTS = 150
"""The most prompts that are continued; from more, so many are drawn."""

_LEAST_WORDS, _LEAST_PROMPTS = 30, 10
"""The least toxic words, and prompts before them, to judge an edit by."""

_PARAGRAPHS, _OPENING = 32, 32
"""Number of ordinary paragraphs for the divergence, and of tokens at their beginning."""


def load_headline_prompts(recipe: Recipe) -> Prompts:
    """The guard's prompts.

    Raises:
        DataError, SourceError: as of ``load_prompts``.
    """
    return load_prompts(recipe.prompts, None, recipe.seed, most=MOST_PROMPTS)


def why_nothing_is_drawn(recipe: Recipe, method: Method, mode: str) -> str | None:
    """Why the guard continues no prompts, for people; None if it does.

    Args:
        recipe: of the conversion.
        method: of the recipe.
        mode: of the forward pass.
    """
    if not recipe.guard:
        return "--no-guard"
    if aim_of(method) == "defence":
        return "the edit is judged by refusals"
    if recipe.prompts == "none":
        return "--prompts none"
    if mode == "streamed":
        return "a model that is streamed writes no continuations"
    return None


def ordinary_text(model: Model, prose: Prose) -> list[Sentence]:
    """The beginnings of paragraphs, on which divergences are measured."""
    encode = Encoder(model.tokenizer, model.module)
    coded = (encode(text, "mean", ()) for text in prose.paragraphs[:_PARAGRAPHS])
    return [Sentence(each.ids[:_OPENING]) for each in coded]


def too_few(passages: Passages | None, prompts: int) -> str | None:
    """Why edits cannot be judged by these continuations; None if they can."""
    words = passages.toxic_words if passages else 0
    after = len(set(passages.prompts)) if passages else 0
    if words >= _LEAST_WORDS and after >= _LEAST_PROMPTS:
        return None
    return (
        f"the model's own continuations of {prompts} prompts have {words} toxic words, after "
        f"{after} of the prompts; at least {_LEAST_WORDS} words after at least {_LEAST_PROMPTS} "
        "prompts are needed"
    )


def passages_of(bench: Bench, prompts: Sequence[str], draws: Draws) -> Passages | None:
    """Continuations by the unedited model of a bench; None if there is no toxic word in them.

    The texts are kept in the cache folder, under a key of everything that they depend on.

    Raises:
        OptionError, SourceError: the model is to be streamed, or memory ran out.
        DestinationError: the cache cannot be written.
    """
    model = bench.load_measured()
    key = cache_key(_continuation_inputs(bench, prompts, draws))
    path = cache_folder() / "continuations" / f"{key}.json"
    drawn = _kept(path, [draws.samples] * len(prompts))
    if drawn is None:
        drawn = draws.write(model, prompts)
        with replacing(path) as part:
            part.write_bytes(msgspec.json.encode(drawn))
    return find_passages(model, prompts, drawn, bench.words)


def _continuation_inputs(bench: Bench, prompts: Sequence[str], draws: Draws) -> dict[str, Any]:
    """Everything that continuations depend on, by content."""
    return {
        "files": dict(bench.source.digests()),
        "prompts": list(prompts),
        "draws": asdict(draws),
        "device": bench.device.partition(":")[0],
        "dtype": str(bench.held_out),
        "attention": bench.how.attention,
        "libraries": {name: version(name) for name in ("tokenizers", "torch", "transformers")},
        "continuation_version": CONTINUATION_VERSION,
    }


def _kept(path: Path, counts: Sequence[int]) -> list[list[str]] | None:
    """The cached texts, ``counts`` of them for the prompts; None if there are none, or others."""
    try:
        drawn = msgspec.json.decode(path.read_bytes(), type=list[list[str]])
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as error:
        progress.warn(f"the cached continuations {path.name} cannot be read: {error}; drawing anew")
        return None
    return drawn if [*map(len, drawn)] == [*counts] else None


class Headline:
    """The passages of a bench's unedited model, and ordinary text.

    Attributes:
        said: places of the prompts after which a toxic word was said, ascending.
        fallback: why edits cannot be judged by the passages, for people; None if they can.
    """

    def __init__(self, bench: Bench, prompts: Prompts, prose: Prose) -> None:
        draws = Draws(seed=bench.recipe.seed)
        model = bench.load_measured()
        self._ordinary = ordinary_text(model, prose)
        self._bench, self._model, self._draws = bench, model, draws
        self._prompts = len(prompts.texts)
        self._passages = passages_of(bench, prompts.texts, draws)
        self._toxic = self._passages.toxic_words if self._passages else 0
        self.said = tuple(sorted(set(self._passages.prompts))) if self._passages else ()
        self._after = len(self.said)
        self.fallback = too_few(self._passages, self._prompts)

    def measure(self, edits: Sequence[Edit]) -> HeadlineRecord:
        """Measure edits: the first is the one to judge, the others are controls."""
        runs = [editing(self._model.module, self._bench.plan, edit) for edit in edits]
        words = list[WordsMeasured]()
        if (passages := self._passages) and self.fallback is None:
            found = log_probabilities_under(self._model, runs, [passages.sentences])
            words = [passages_measured(passages, after) for (after,) in found]
        diverged = divergences(self._model, self._model, runs, self._ordinary)
        moved = [mean_change([values.tolist() for values in each]) for each in diverged]
        return HeadlineRecord(
            prompts=self._prompts,
            passages_per_prompt=self._draws.samples,
            max_new_tokens=self._draws.max_new_tokens,
            seed=self._draws.seed,
            toxic_words=self._toxic,
            toxic_prompts=self._after,
            context_tokens=self._passages.context_tokens if self._passages else 0,
            ordinary_tokens=sum(len(sentence.ids) - 1 for sentence in self._ordinary),
            words=words[0] if words else None,
            control_words=tuple(words[1:]),
            divergence=moved[0],
            control_divergences=tuple(moved[1:]),
        )
