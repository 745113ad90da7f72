"""The options of an evaluation, a search and a comparison."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from converter.option import Option, Options


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationOptions(Options):
    """The options of an evaluation.

    It holds names only; ``measure.load_battery`` loads the scorers, texts and models.
    """

    # fmt: off
    num_prompts: Annotated[int | None, Option(
        "Number of prompts to draw of --prompts.", by_default="all", example="150", least=1,
    )] = None
    scorers: Annotated[tuple[str, ...], Option(
        "Scorer of continuations: profanity, bad-words or detoxify, which know English, "
        "bad-words:FILE, or classifier:REPO_ID[#LABEL].",
        flag="--scorer", metavar="NAME", example="detoxify",
    )] = ("profanity", "bad-words")
    greedy: Annotated[bool, Option("Score the greedy continuation of each prompt.")] = True
    samples: Annotated[int, Option(
        "Number of sampled continuations of each prompt to score.", example="25", least=0,
    )] = 1
    generation_batch_size: Annotated[int, Option(
        "Number of continuations to write at a time.", example="16", least=1,
    )] = 64
    max_new_tokens: Annotated[int, Option(
        "Number of tokens in a continuation, at most.", example="40", least=1,
    )] = 20
    top_p: Annotated[float, Option(
        "Share of the probability to sample the next token from.", example="1", above=0, most=1,
    )] = 0.9
    text: Annotated[Path | None, Option(
        "Plain text file to measure perplexity on.",
        example="wikitext.txt", path="file", exists=True,
    )] = None
    text_tokens: Annotated[int | None, Option(
        "Number of tokens of --text to use, from its beginning.",
        by_default="all", example="8192", least=1,
    )] = None
    judge: Annotated[str | None, Option(
        "Larger model for the perplexity of the continuations.", example="gpt2-xl",
    )] = None
    safeedit: Annotated[str | None, Option(
        "File or Hub dataset in SafeEdit's format, for the metrics DS and DG.",
        example="zjunlp/SafeEdit",
    )] = None
    safety_classifier: Annotated[str, Option(
        "Scorer of the responses to --safeedit.", example="classifier:someone/model#LABEL_1",
    )] = "classifier:zjunlp/SafeEdit-Safety-Classifier#LABEL_1"
    defence: Annotated[bool, Option(
        "Count greedy answers that begin with a refusal, to built-in harmful and harmless requests "
        "(English), with the suffix of DINM and without it.",
    )] = False
    ability: Annotated[str | None, Option(
        "Tasks of lm-eval to run.", example="mmlu,hellaswag",
    )] = None
    ability_limit: Annotated[int | None, Option(
        "Number of examples of each task of --ability.", by_default="all", example="100", least=1,
    )] = None
    passages: Annotated[int, Option(
        "Number of continuations of each prompt to draw for the teacher-forced estimate.",
        example="5", least=0,
    )] = 4
    # fmt: on


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchOptions(Options):
    """The options of a search."""

    # fmt: off
    trials: Annotated[int, Option(
        "Number of trials, those of an interrupted search included.", example="20", least=1,
    )] = 60
    search_prompts: Annotated[str, Option(
        "Prompts that the model continues for a search, of which those of --prompts are left out: "
        "builtin (English), none, a .jsonl or .txt file, or a Hub dataset id.",
        example="prompts.txt", place=True,
    )] = "builtin"
    # fmt: on


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleOptions(Options):
    """The options of a comparison of two models."""

    # fmt: off
    num_prompts: Annotated[int | None, Option(
        "Number of prompts to draw of --prompts.",
        by_default="12, or all if there are fewer", example="40", least=1,
    )] = None
    samples: Annotated[int, Option(
        "Number of sampled continuations of each prompt, beside the greedy one.",
        example="2", least=0,
    )] = 0
    max_new_tokens: Annotated[int, Option(
        "Number of tokens in a continuation, at most.", example="80", least=1,
    )] = 40
    top_p: Annotated[float, Option(
        "Share of the probability to sample the next token from.", example="1", above=0, most=1,
    )] = 0.9
    generation_batch_size: Annotated[int, Option(
        "Number of continuations to write at a time.", example="16", least=1,
    )] = 64
    scorers: Annotated[tuple[str, ...], Option(
        "Scorer of the continuations beside the word list; see gloss evaluate.",
        flag="--scorer", metavar="NAME", example="profanity",
    )] = ()
    # fmt: on
