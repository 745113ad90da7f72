"""The command ``gloss evaluate``."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from converter.cli.command import Answer, command, quiet_libraries, refuse_typed
from converter.cli.fields import Part
from converter.cli.recipe import RecipePart
from converter.errors import Faults, OptionError
from converter.evaluation.options import EvaluationOptions
from converter.option import Option, Options
from converter.recipe import CLUSTER, Recipe, Settings
from converter.runtime import progress

if TYPE_CHECKING:
    from converter.evaluation.comparison import Comparison


@dataclass(frozen=True, slots=True, kw_only=True)
class _ComparisonOptions(Options):
    """The other systems of an evaluation, and the destination of the results."""

    # fmt: off
    base: Annotated[str | None, Option(
        "Model that SOURCE was made from: a folder, a Hub repo id, or demo.",
        example="demo", place=True,
    )] = None
    systems: Annotated[tuple[str, ...], Option(
        "Another system to measure: a method to fit, several joined by +, a control (random, "
        "profs), or a folder, an adapter, a manifest or a repo id of an edit of the same model. A "
        "method that ends in @perplexity is measured at the perplexity of the first system. "
        "Options of one system follow a colon.",
        flag="--system", metavar="NAME", example="gloss:rank=2,layers=3-8",
    )] = ()
    seeds: Annotated[int, Option(
        "Number of draws of the pairs to fit each system on.", example="3", least=1,
    )] = 1
    costs: Annotated[str, Option(
        "Perplexity ratios: each system that is fitted is measured at the strengths that come "
        "nearest to them on held-out text.",
        by_default="one strength, under the budget", metavar="NUMBERS", example="1.01,1.02,1.05",
    )] = ""
    controls: Annotated[bool, Option(
        "Measure the control of each fitted system: an edit of the same kind and size that uses no "
        "knowledge of toxicity.",
    )] = False
    results: Annotated[Path | None, Option(
        "File for the results as JSON, rewritten after every model.", example="results.json",
    )] = None
    continuations: Annotated[Path | None, Option(
        "File for the data behind the numbers, as lines of JSON: every continuation with its "
        "scores, every toxic word with its log-probabilities; masked unless --no-mask is given.",
        example="continuations.jsonl",
    )] = None
    plots: Annotated[Path | None, Option(
        "Folder for pictures.", example="./pictures", path="folder",
    )] = None
    # fmt: on


def _look(
    *,
    recipe: Recipe,
    comparison: _ComparisonOptions,
    asked: EvaluationOptions,
    settings: Settings,
    faults: Faults,
) -> None:
    """Find all mistakes in the request before torch is loaded."""
    from converter.entrypoints import first_look

    whole = replace(recipe, source=comparison.base or recipe.source, method="gloss", options={})
    first_look.look_at_recipe(whole, settings, faults)
    if comparison.base:
        first_look.look_at_place("", recipe.source, faults)
    first_look.look_at_plots(comparison.plots, None, faults)
    first_look.look_at_evaluation(asked, recipe.prompts, faults)
    with faults:
        files = {"--results": comparison.results, "--continuations": comparison.continuations}
        _check_files(files)
    with faults:
        compared = _compared(recipe, comparison)
        first_look.look_at_systems(compared, recipe, faults)
        if not compared.fitted:
            names = ("method", "options", "costs", "controls", "seeds")
            where = "without a --system that is a method"
            refuse_typed(names, where, "add --system METHOD")
            return
        first_look.look_at_method(recipe.method, {}, None, faults)


def _compared(recipe: Recipe, asked: _ComparisonOptions) -> "Comparison":
    """What is compared. Raises OptionError."""
    from converter.evaluation.comparison import Comparison, parse_costs, parse_systems

    seeds = [recipe.seed + i for i in range(asked.seeds)]
    systems, costs = parse_systems(asked.systems), parse_costs(asked.costs)
    return Comparison(systems, seeds, costs, asked.controls)


@command(
    "evaluate",
    recipe=RecipePart(without=("output",)),
    comparison=Part(_ComparisonOptions),
    asked=Part(EvaluationOptions),
    settings=Part(Settings, without=("workers", *CLUSTER, "keep_source")),
    look=_look,
    examples=(
        "gloss evaluate ./out --base demo",
        "gloss evaluate demo --system gloss --system profs --system random@perplexity",
    ),
)
def evaluate_command(
    recipe: Recipe, comparison: _ComparisonOptions, asked: EvaluationOptions, settings: Settings
) -> Answer:
    """Measure perplexity and toxicity of SOURCE, of its base, and of other systems.

    Methods are fitted on --pairs and run through hooks on the unedited model, which is --base, or
    SOURCE without one. -o METHOD.KEY=VALUE sets an option of one of several methods.
    """
    from converter.entrypoints.evaluate import evaluate_model
    from converter.evaluation.plots import plot_evaluation
    from converter.evaluation.tables import markdown

    quiet_libraries()
    base = comparison.base
    found = evaluate_model(
        replace(recipe, source=base or recipe.source),
        _compared(recipe, comparison),
        asked,
        settings,
        edited=recipe.source if base else None,
        results=comparison.results,
        continuations=comparison.continuations,
    )
    if comparison.plots is not None:
        for path in plot_evaluation(found, comparison.plots):
            progress.note(f"  drawn: {path}")
    return Answer(found, markdown(found))


def _check_files(files: Mapping[str, Path | None]) -> None:
    """Raise DestinationError at once if a file cannot be written, OptionError if two are one."""
    from converter.outputs.destination import check_beside

    for option, path in files.items():
        if path is not None:
            check_beside(option, path)
    given = [path.resolve() for path in files.values() if path is not None]
    if len(given) > len({*given}):
        raise OptionError(" and ".join(files), expected="different files", found="the same")
