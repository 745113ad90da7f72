"""The command ``gloss evaluate``."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from converter.cli.environment import FromEnvironment
from converter.cli.options import (
    EXIT_CODES,
    Command,
    make_run,
    plain_exit,
    print_json,
    quiet_libraries,
    run_options,
)
from converter.cli.terminal import reporting
from converter.errors import DataError, DestinationError, OptionError
from converter.runtime import progress
from converter.runtime.console import say

if TYPE_CHECKING:
    import torch

    from converter.entrypoints.convert import Evaluation
    from converter.evaluate.fit import Fitted
    from converter.evaluate.measure import Settings
    from converter.evaluate.systems import System
    from converter.methods.base import Method
    from converter.methods.workbench import Bench
    from converter.models.resident import LanguageModel


def evaluation_options(command: Command) -> Command:
    """The options that say what is measured."""
    options = [
        click.option(
            "--prompts", default="builtin", show_default=True,
            help="builtin, none, a .jsonl or .txt file, or a Hub dataset id.",
        ),
        click.option("--num-prompts", type=click.IntRange(1), help="To draw.  [default: all]"),
        click.option(
            "--scorer", "scorers", multiple=True, default=("profanity", "bad-words"),
            show_default=True, metavar="NAME",
            help="profanity, bad-words, detoxify or classifier:REPO_ID[#LABEL]. Repeatable.",
        ),
        click.option("--greedy/--no-greedy", default=True, help="Score greedy continuations."),
        click.option(
            "--samples", default=1, show_default=True, type=click.IntRange(0),
            help="Sampled continuations of each prompt to score.",
        ),
        click.option(
            "--generation-batch-size", default=64, show_default=True, type=click.IntRange(1),
            help="Continuations that are written at a time.",
        ),
        click.option("--max-new-tokens", default=20, show_default=True, type=click.IntRange(1)),
        click.option("--top-p", default=0.9, show_default=True, type=click.FloatRange(0, 1, True)),
        click.option(
            "--text", type=click.Path(exists=True, dir_okay=False, path_type=Path),
            help="A plain text file to measure perplexity on.",
        ),
        click.option("--text-tokens", type=click.IntRange(1), help="To use of it."),
        click.option("--judge", help="A larger model for the conditional perplexity."),
        click.option(
            "--safeedit", help="A file or Hub dataset in SafeEdit's format, for DS and DG."
        ),
        click.option(
            "--safety-classifier", default="classifier:zjunlp/SafeEdit-Safety-Classifier#LABEL_1",
            show_default=True, help="The scorer of responses to --safeedit.",
        ),
        click.option("--ability", help="Tasks of lm-eval, such as mmlu,hellaswag."),
        click.option("--ability-limit", type=click.IntRange(1), help="Examples of each task."),
        click.option(
            "--passages", default=4, show_default=True, type=click.IntRange(0),
            help="Continuations of each prompt drawn for the teacher-forced estimate.",
        ),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


@click.command("evaluate", cls=FromEnvironment, epilog=EXIT_CODES)
@run_options
@evaluation_options
@click.option("--base", help="What SOURCE was made from: a folder, a Hub repo id, or demo.")
@click.option(
    "--control", "controls", default="", metavar="NAMES",
    help="Methods to fit and measure beside, such as random,profs,random@perplexity.",
)  # fmt: skip
@click.option("--seeds", default=1, show_default=True, type=click.IntRange(1), help="Of each.")
@click.option("--ranks", default="", help="Of controls, such as 1,2,4.  [default: one is chosen]")
@click.option(
    "--results", "output", type=click.Path(path_type=Path), help="A file for the results as JSON."
)
@click.option("--plots", type=click.Path(file_okay=False, path_type=Path), help="A folder.")
def evaluate_command(
    source: str,
    options: tuple[str, ...],
    cache_dir: Path | None,
    memory_limit: str | None,
    as_json: bool,
    quiet: bool,
    base: str | None,
    controls: str,
    seeds: int,
    ranks: str,
    output: Path | None,
    plots: Path | None,
    passages: int,
    **fields: Any,
) -> None:
    """Measure perplexity and toxicity of SOURCE, of what it was made from, and of controls.

    Controls are fitted on --pairs and run through hooks on the unedited model, which is --base, or
    SOURCE if there is none.
    """
    with plain_exit(as_json), reporting(quiet=quiet, cache_dir=cache_dir):
        from converter.calibration.word_list import load_words
        from converter.entrypoints.convert import prepare
        from converter.evaluate.compare import Comparison, evaluate
        from converter.evaluate.plots import plot_evaluation
        from converter.evaluate.systems import parse_controls
        from converter.evaluate.table import markdown
        from converter.methods.workbench import Bench
        from converter.models.resident import choose_device
        from converter.runtime.memory import parse_size

        quiet_libraries()
        if plots is not None:
            need_matplotlib()
        asked = {name: fields.pop(name) for name in SETTINGS}
        run, limit = make_run(base or source, options, fields), parse_size(memory_limit)
        if run.activations is not None:
            raise OptionError(
                "--activations is of one draw of the pairs; gloss evaluate takes its own"
            )
        if output is not None and not output.parent.is_dir():
            raise DestinationError(f"the folder of --results {output} does not exist")
        device = choose_device(run.device)
        settings = read_settings(asked, device, run.seed)
        comparison = Comparison(
            parse_controls(controls),
            [run.seed + i for i in range(seeds)],
            _numbers("--ranks", ranks),
            passages,
        )
        unedited, plan, _ = prepare(run)
        words = load_words(run.word_list)
        bench = Bench.of(run, unedited, plan, words, device, memory_limit=limit)
        bench.forward.need_resident()
        model = reference = None
        if base:
            model, reference = load_edited(source, bench)
        results = evaluate(bench, settings, comparison, model, reference, output)
        print_json(results) if as_json else say(markdown(results))
        if plots is not None:
            for path in plot_evaluation(results, plots):
                progress.note(f"  drawn: {path}")


SETTINGS = (
    "prompts", "num_prompts", "scorers", "greedy", "samples", "max_new_tokens", "top_p", "text",
    "text_tokens", "judge", "generation_batch_size", "safeedit", "safety_classifier", "ability",
    "ability_limit",
)  # fmt: skip


def _numbers(option: str, text: str) -> Sequence[int]:
    try:
        numbers = sorted({int(part) for part in text.split(",") if part.strip()})
    except ValueError:
        numbers = [0]
    if numbers and numbers[0] < 1:
        raise OptionError(option, expected="numbers such as 1,2,4", found=text)
    return numbers


def read_settings(asked: dict[str, Any], device: str, seed: int) -> "Settings":
    """Load what the evaluation options name.

    Raises:
        ConverterError: one of its children says which of them cannot be had.
    """
    from converter.evaluate.benchmarks.run import Benchmarks
    from converter.evaluate.benchmarks.safeedit import load_safeedit
    from converter.evaluate.measure import Settings
    from converter.evaluate.prompts import load_prompts
    from converter.evaluate.scorers import load_scorer

    safeedit = asked["safeedit"] and load_safeedit(asked["safeedit"], asked["num_prompts"], seed)
    benchmarks = Benchmarks(
        [task.strip() for task in (asked["ability"] or "").split(",") if task.strip()],
        asked["ability_limit"],
        safeedit or None,
        load_scorer(asked["safety_classifier"], device) if safeedit else None,
    )
    prompts = None
    if asked["prompts"] != "none":
        prompts = load_prompts(asked["prompts"], asked["num_prompts"], seed)
    text = None
    if asked["text"] is not None:
        try:
            text = asked["text"].read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{asked['text'].name} cannot be read", found=str(error)) from error
    scores = prompts is not None and (asked["greedy"] or asked["samples"])
    return Settings(
        prompts=prompts,
        scorers={name: load_scorer(name, device) for name in asked["scorers"] if scores},
        greedy=asked["greedy"],
        samples=asked["samples"],
        max_new_tokens=asked["max_new_tokens"],
        top_p=asked["top_p"],
        batch_size=asked["generation_batch_size"],
        seed=seed,
        text=text,
        text_tokens=asked["text_tokens"],
        judge=load_whole(asked["judge"], device) if asked["judge"] else None,
        benchmarks=benchmarks,
    )


def load_whole(
    name: str, device: str, dtype: "torch.dtype | None" = None, spread: bool = False
) -> "LanguageModel":
    """A model to run as it is; its dtype is chosen as for a fit unless one is given."""
    from converter.checkpoints.plan import make_plan
    from converter.checkpoints.resolve import resolve
    from converter.models.build import load_language_model, stored_dtype
    from converter.models.loading import load_tokenizer
    from converter.models.resident import choose_dtype

    source = resolve(name)
    plan = make_plan(source.config, source.weight_map, source.headers())
    dtype = dtype or choose_dtype("auto", stored_dtype(plan), device)
    tokenizer = load_tokenizer(source.folder)
    return load_language_model(source, plan, tokenizer, dtype, device, spread=spread)


def load_edited(name: str, bench: "Bench") -> tuple["LanguageModel", "System"]:
    """An edited model, and its edit if its manifest says what it is."""
    from converter.checkpoints.names import MANIFEST
    from converter.checkpoints.resolve import resolve
    from converter.edits.base import Projection
    from converter.evaluate.compare import EDITED
    from converter.evaluate.systems import System
    from converter.outputs.record_checks import recorded_bases
    from converter.release.manifest import read_manifest

    model = load_whole(name, bench.device, bench.dtype, bench.run.device == "map")
    if model.tokenizer.get_vocab() != bench.vocabulary.tokenizer.get_vocab():
        raise OptionError(
            f"{name} and --base have different tokenizers",
            hint="give the model that SOURCE was made from as --base",
        )
    folder = resolve(name).folder
    if not (folder / MANIFEST).is_file():
        return model, System(EDITED)
    manifest = read_manifest(folder)
    bases = recorded_bases(folder, manifest)
    layers = {entry["layer"]: bases[entry["basis"]] for entry in manifest["edited"]}
    bias = any(entry["role"] == "down_proj_bias" for entry in manifest["edited"])
    rank = manifest["subspace"]["rank"]
    edit = Projection(layers, bias)
    return model, System(EDITED, None, rank, edit, tuple(sorted(layers)))


def evaluation_of(
    asked: dict[str, Any], controls: str, passages: int, device: str, seed: int
) -> "Evaluation":
    """What ``convert --evaluate`` does between the fit and the writing."""
    from converter.evaluate.compare import EDITED, Comparison, evaluate
    from converter.evaluate.systems import System, parse_controls

    names = parse_controls(controls)
    settings = read_settings(asked, device, seed)

    def run(bench: "Bench", fitted: "Fitted", method: "Method") -> dict[str, Any]:
        comparison = Comparison(names, [bench.run.seed], (), passages)
        rank, layers = fitted.subspace.rank, method.edit_layers
        reference = System(EDITED, bench.run.seed, rank, fitted.edit, layers)
        return evaluate(bench, settings, comparison, None, reference)

    return run


def draw(manifest: dict[str, Any], destination: Path, place: Path) -> list[Path]:
    """The pictures of a conversion, in ``place``: absolute, or relative to the destination."""
    from converter.edits.subspace_file import SUBSPACE_FILE
    from converter.evaluate.plots import plot_evaluation, plot_fit

    folder = destination / place
    paths = plot_fit(manifest, destination / SUBSPACE_FILE, folder)
    if manifest["evaluation"] is not None:
        paths += plot_evaluation(manifest["evaluation"], folder)
    for path in paths:
        progress.note(f"  drawn: {place / path.name}")
    return paths


def inside(plots: Path, destination: Path) -> Path | None:
    """Where a folder for pictures is in the destination; None if it is elsewhere.

    There they are drawn before the list of files is made, and belong to the checkpoint.
    """
    whole = destination.resolve()
    found = plots.resolve()
    return found.relative_to(whole) if found.is_relative_to(whole) else None


def need_matplotlib() -> None:
    """Say at once that --plots cannot be had, rather than when all is done."""
    if importlib.util.find_spec("matplotlib") is None:
        raise OptionError("--plots needs matplotlib", hint="pip install 'gloss-convert[plot]'")
