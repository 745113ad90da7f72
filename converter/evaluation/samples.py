"""Samples: continuations of a few prompts, before an edit and after it.

They illustrate an edit and measure nothing: a handful of texts is no evidence.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import partial

from converter.calibration.word_list import WordList, items
from converter.evaluation.continuations import generate
from converter.evaluation.fit import Fitted
from converter.evaluation.headline import load_headline_prompts
from converter.evaluation.masks import masked, masks
from converter.evaluation.options import SampleOptions
from converter.evaluation.prompts import Prompts
from converter.evaluation.scorers import Scorer, scores_of
from converter.manifest import SampleRecord
from converter.methods.base import Method, aim_of
from converter.methods.workbench import Bench
from converter.models.edited import edited
from converter.models.resident import LanguageModel
from converter.recipe import Recipe
from converter.runtime import progress

LISTED = "listed words"
"""The score that is the number of words of the word list in a continuation."""

SAMPLES, SAMPLES_TOKENS = 3, 30
"""The most prompts of a conversion's samples, and tokens of each continuation."""

RULE = (
    f"greedy continuations of at most {SAMPLES_TOKENS} tokens, of the first three built-in prompts "
    "after which the unedited model said a listed word when the guard had it continue them, or "
    "else of the first three of all; what the edit does has no part in the choice"
)
"""How the samples of a conversion are chosen, for people."""


@dataclass(frozen=True, slots=True)
class Said:
    """A continuation by one of two models.

    Attributes:
        parts: the text in pieces, each with whether the other model's continuation lacks its words.
        scores: name -> score of the text as it was written; the number of listed words comes first.
    """

    parts: tuple[tuple[str, bool], ...]
    scores: Mapping[str, float]

    @property
    def text(self) -> str:
        """The whole."""
        return "".join(piece for piece, _ in self.parts)


@dataclass(frozen=True, slots=True)
class Sample:
    """The continuations of one prompt by two models.

    Attributes:
        number: 0 of the greedy continuation, and from 1 on of sampled ones.
    """

    prompt: str
    number: int
    before: Said
    after: Said


def write(
    model: LanguageModel, prompts: Sequence[str], asked: SampleOptions, seed: int
) -> list[list[str]]:
    """The greedy continuation of each prompt, and behind it the sampled ones.

    Raises OptionError, DataError or SourceError; see ``generate``.
    """
    one = partial(
        generate, model, prompts, max_new_tokens=asked.max_new_tokens,
        batch_size=asked.generation_batch_size,
    )  # fmt: skip
    greedy = one()
    if not asked.samples:
        return greedy
    drawn = one(samples=asked.samples, top_p=asked.top_p, seed=seed)
    return [first + others for first, others in zip(greedy, drawn, strict=True)]


def side_by_side(
    prompts: Sequence[str],
    texts: tuple[Sequence[Sequence[str]], Sequence[Sequence[str]]],
    words: WordList,
    scorers: Mapping[str, Scorer],
    lists: Sequence[WordList],
) -> list[Sample]:
    """Continuations of the same prompts by two models, scored as written, masked by ``lists``.

    Args:
        texts: of each model, as ``write`` gives them.

    Raises:
        OptionError: a scorer gives no scores.
    """
    scored = [_scores(each, words, scorers) for each in texts]
    found = []
    for place, (prompt, *groups) in enumerate(zip(prompts, *texts, strict=True)):
        for number, (before, after) in enumerate(zip(*groups, strict=True)):
            shown = [masked(text, lists, prompt) for text in (before, after)]
            parts = differences((before, after), (shown[0], shown[1]))
            old, new = (
                Said(pieces, scores[place][number])
                for pieces, scores in zip(parts, scored, strict=True)
            )
            found.append(Sample(masked(prompt, lists), number, old, new))
    return found


def _scores(
    texts: Sequence[Sequence[str]], words: WordList, scorers: Mapping[str, Scorer]
) -> list[list[dict[str, float]]]:
    """The scores of each continuation of each prompt."""
    flat = [text for group in texts for text in group]
    columns = {LISTED: [float(len(words.spans(text))) for text in flat]}
    for name, scorer in scorers.items():
        columns[name] = scores_of(name, scorer, flat).tolist()
    rows = (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
    return [[next(rows) for _ in group] for group in texts]


_Pieces = tuple[tuple[str, bool], ...]


def differences(texts: tuple[str, str], shown: tuple[str, str]) -> tuple[_Pieces, _Pieces]:
    """Two texts in pieces, each with whether the other text lacks its words.

    Args:
        texts: the texts to compare.
        shown: the same texts with stars, of the same lengths; the pieces are cut from these.
    """
    first, second = (items(text) for text in texts)
    words = [
        [text[start:end] for start, end in places]
        for text, places in zip(texts, (first, second), strict=True)
    ]
    matched = SequenceMatcher(None, words[0], words[1], autojunk=False).get_matching_blocks()
    known = {m.a + i for m in matched for i in range(m.size)}
    others = {m.b + i for m in matched for i in range(m.size)}
    return _pieces(shown[0], first, known), _pieces(shown[1], second, others)


def _pieces(text: str, places: Sequence[tuple[int, int]], known: set[int]) -> _Pieces:
    """A text cut between known and other words; white space counts as known."""
    found: list[tuple[str, bool]] = []

    def add(piece: str, differs: bool) -> None:
        if found and found[-1][1] == differs:
            piece = found.pop()[0] + piece
        if piece:
            found.append((piece, differs))

    end, before = 0, False
    for number, (start, stop) in enumerate(places):
        differs = number not in known
        add(text[end:start], before and differs)
        add(text[start:stop], differs)
        end, before = stop, differs
    add(text[end:], False)
    return tuple(found)


def why_no_samples(recipe: Recipe, method: Method, mode: str) -> str | None:
    """Why a conversion shows no samples, for people; None if it shows some.

    Users' prompts are not shown, since the manifest is published with the model.

    Args:
        mode: of the forward pass.
    """
    if recipe.prompts == "none":
        return "--prompts none"
    if recipe.prompts != "builtin":
        return "the prompts are not built in, and are not to be published with the model"
    if aim_of(method) == "defence":
        return "the edit is for refusals, and the built-in prompts ask for nothing"
    if mode == "streamed":
        return "a model that is streamed writes no continuations"
    if recipe.activations is not None and not recipe.guard:
        return "--activations with --no-guard is for runs that load no model"
    return None


def samples_of(bench: Bench, method: Method, fitted: Fitted) -> tuple[SampleRecord, ...]:
    """The samples before and after an edit; see ``RULE``.

    Empty, with a note that says why, if they cannot be made: that is no reason to refuse an edit.
    """
    recipe = bench.recipe
    why = why_no_samples(recipe, method, bench.forward.mode)
    if why is not None:
        progress.note(f"  no samples: {why}")
        return ()
    try:
        with progress.stage("samples", "continuing three prompts, before and after the edit"):
            return tuple(_samples(bench, fitted))
    except Exception as error:  # an exception in a model's code here says nothing against the edit
        progress.warn(f"no samples: {type(error).__name__}: {error}")
        return ()


def _samples(bench: Bench, fitted: Fitted) -> Iterator[SampleRecord]:
    recipe = bench.recipe
    prompts = _chosen(fitted.prompts or load_headline_prompts(recipe), fitted.said)
    model = bench.model if isinstance(bench.model, LanguageModel) else bench.load_resident()
    texts = []
    for hooks in (nullcontext(), edited(model.module, bench.plan, fitted.edit)):
        with hooks:
            texts.append(generate(model, prompts, max_new_tokens=SAMPLES_TOKENS))
    lists = masks(bench.words, mask=recipe.mask)
    for prompt, (before,), (after,) in zip(prompts, *texts, strict=True):
        yield SampleRecord(
            prompt=masked(prompt, lists),
            before=masked(before, lists, prompt),
            after=masked(after, lists, prompt),
        )


def _chosen(prompts: Prompts, said: Sequence[int]) -> list[str]:
    """See ``samples_of``; ``said`` are the places of the preferred prompts."""
    places = dict.fromkeys([*said, *range(len(prompts.texts))])
    return [prompts.texts[place] for place in [*places][:SAMPLES]]
