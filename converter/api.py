"""The commands as functions; ``import converter`` provides them.

A function returns the data that its command prints, raises the errors that its command exits with,
and reports its progress to the logger ``converter``.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from converter.checkpoints.resolve import resolve
from converter.edits.base import Edit
from converter.entrypoints.delivery import Delivery
from converter.entrypoints.diff import diff_checkpoints
from converter.entrypoints.evaluate import evaluate_model
from converter.entrypoints.plan import describe_plan
from converter.entrypoints.replay import replay as write_replay
from converter.entrypoints.resume import convert_once
from converter.entrypoints.verify import verify as find_problems
from converter.evaluation.comparison import Comparison, parse_systems
from converter.evaluation.options import EvaluationOptions
from converter.manifest import Evaluation, Manifest
from converter.option import at_home
from converter.outputs.record_checks import edit_of
from converter.recipe import LocalInputs, Recipe, Settings
from converter.release.recording import read_recording
from converter.runtime import progress
from converter.runtime.registry import telling_packages

Place = str | PathLike[str]
"""A path, or a place as typed on a command line: a repo id, or the word demo."""


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep bars and advice of transformers off the screen; say whose package fails."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with progress.recording(), telling_packages():
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


@_quietly()
def convert(
    recipe: Recipe | Place,
    destination: Place,
    settings: Settings = Settings(),
    *,
    overwrite: bool = False,
) -> Manifest:
    """Fit an edit on a model, examine it, and write the edited model: ``gloss-convert``.

    If a run was interrupted, the same call continues it. If it was finished, the same call only
    verifies the result.

    Args:
        recipe: everything that the result depends on; or a source, for a recipe of defaults.
        destination: a folder that does not exist or is empty.
        settings: how this machine does the work; the bytes of the result do not depend on them.
        overwrite: replace a checkpoint that is already there.

    Returns:
        the manifest that was written beside the model.

    Raises:
        GuardError: the edit would break the model, or does no more than a random one.
        ConverterError: another of its children; the destination is unchanged.
    """
    delivery = Delivery(overwrite=overwrite is True)  # no text such as "no" deletes anything
    return convert_once(_recipe(recipe), Path(_text(destination)), settings, delivery)


@_quietly()
def plan(recipe: Recipe | Place, settings: Settings = Settings()) -> dict[str, Any]:
    """Say what ``convert`` would do, from the headers of the shards alone: ``gloss plan --json``.

    Args:
        recipe, settings: as for ``convert``.

    Returns:
        among others ``edited_layers``, ``edited_tensors``, ``bytes_to_read``, ``bytes_to_write``
        and ``expected_peak_bytes``.

    Raises:
        ConverterError: as ``convert`` would, as far as the headers show it.
    """
    return describe_plan(_recipe(recipe), settings=settings)


@_quietly()
def verify(
    destination: Place, source: Place | None = None, *, trust_remote_code: bool = False
) -> list[str]:
    """Check that a converted model is, byte for byte, what its manifest says: ``gloss verify``.

    Args:
        destination: its folder.
        source: the model that it was made from, to compare with it.
        trust_remote_code: whether code in the folder may run, to load its tokenizer.

    Returns:
        a sentence for each fault; empty if there is none.

    Raises:
        SourceError, CheckpointError: the source cannot be read.
    """
    original = None if source is None else resolve(_text(source))
    if original:
        original.fetch()
    return find_problems(Path(_text(destination)), original, trust_remote_code)


@_quietly()
def evaluate(
    recipe: Recipe | Place,
    edited: Place | None = None,
    asked: EvaluationOptions = EvaluationOptions(),
    settings: Settings = Settings(),
    *,
    systems: Sequence[str] = (),
    seeds: Sequence[int] = (0,),
    costs: Sequence[float] = (),
    controls: bool = False,
) -> Evaluation:
    """Measure toxicity and perplexity of a model and of its edited copy: ``gloss evaluate``.

    Args:
        recipe: as for ``convert``; its source is the unedited model.
        edited: folder or repo that ``convert`` made from it.
        asked: what to measure: scorers, samples, text. The prompts are the recipe's.
        settings: as for ``convert``.
        systems: other systems to measure: methods to fit, such as ``random``, and places of models.
        seeds: of the draws of pairs to fit these on, at least one.
        costs: perplexity ratios; each system is measured at the strengths nearest to them.
        controls: whether to measure the control of each fitted system, too.

    Returns:
        metrics of each system, with their intervals of 95 %.

    Raises:
        ConverterError: one of its children.
    """
    comparison = Comparison(parse_systems(systems), tuple(seeds), tuple(costs), controls)
    made = None if edited is None else _text(edited)
    return evaluate_model(_recipe(recipe), comparison, asked, settings, edited=made)


@_quietly()
def replay(
    manifest: Place,
    destination: Place,
    source: Place | None = None,
    settings: Settings = Settings(),
    *,
    overwrite: bool = False,
) -> Manifest:
    """Repeat a recorded conversion: ``gloss replay``.

    Args:
        manifest: the file, with that of the edit beside it, or a folder that holds both.
        destination, settings, overwrite: as for ``convert``.
        source: where the recorded source is, unless it is on the Hub.

    Returns:
        the manifest of the new folder, whose weights are byte for byte the recorded ones.

    Raises:
        VerificationError: the source or the outputs are not the recorded ones.
        ConverterError: another of its children; the destination is unchanged.
    """
    given = LocalInputs(source=None if source is None else _text(source))
    recording = read_recording(Path(_text(manifest)))
    done = write_replay(
        recording, Path(_text(destination)), given, settings, overwrite=overwrite is True
    )
    return done.manifest


@_quietly()
def diff(before: Place, after: Place) -> dict[str, Any]:
    """Compare two models tensor by tensor, however they are sharded: ``gloss diff``.

    Args:
        before, after: anything that can be converted.

    Returns:
        ``equal``, ``only_in_a``, ``only_in_b``, ``changed`` tensors with the norms and the spectrum
        of their change, and ``files``.

    Raises:
        SourceError, CheckpointError: one of them cannot be read.
    """
    return diff_checkpoints(_text(before), _text(after))


@_quietly()
def load_edit(destination: Place) -> Edit:
    """Load the edit of a converted model: its tensors, new tensors, patches and files.

    Args:
        destination: the model's folder, with its manifest.

    Raises:
        VerificationError: there is no manifest, or the edit's file is not the recorded one.
    """
    recording = read_recording(Path(_text(destination)))
    return edit_of(recording.manifest, recording.stored)


def _text(place: Place) -> str:
    """A place as text; ``~`` is expanded to the home folder."""
    return str(at_home(fspath(place), "the path"))


def _recipe(recipe: Recipe | Place) -> Recipe:
    return recipe if isinstance(recipe, Recipe) else Recipe(source=_text(recipe))
