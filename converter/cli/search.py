"""The command ``gloss search``."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from converter.cli.command import Answer, command, quiet_libraries
from converter.cli.fields import Part
from converter.cli.recipe import RecipePart
from converter.cli.terminal import as_json
from converter.errors import DestinationError, Faults
from converter.evaluation.options import SearchOptions
from converter.manifest import Estimate, GuardRecord, SearchRecord, SearchTrial
from converter.option import Option, Options
from converter.recipe import CLUSTER, Recipe, Settings
from converter.runtime import progress
from converter.text import escaped

if TYPE_CHECKING:
    from converter.entrypoints.search import Searched


@dataclass(frozen=True, slots=True, kw_only=True)
class _ResultOptions(Options):
    """Where the results of a search go."""

    # fmt: off
    results: Annotated[Path | None, Option(
        "File for the results as JSON, every trial among them.", example="results.json",
    )] = None
    plots: Annotated[Path | None, Option(
        "Folder for a picture of the front.", example="./pictures", path="folder",
    )] = None
    # fmt: on


def _look(
    *,
    recipe: Recipe,
    asked: SearchOptions,
    places: _ResultOptions,
    settings: Settings,
    faults: Faults,
) -> None:
    """Find all that is wrong with a search before torch is loaded."""
    from converter.entrypoints import first_look
    from converter.outputs.destination import check_beside

    joined = first_look.look_at_search("gloss search", recipe, asked, faults)
    first_look.look_at_recipe(joined, settings, faults)
    first_look.look_at_plots(places.plots, None, faults)
    with faults:
        if places.results is not None:
            check_beside("--results", places.results)


@command(
    "search",
    recipe=RecipePart(without=("activations", "force")),
    asked=Part(SearchOptions),
    places=Part(_ResultOptions),
    settings=Part(Settings, without=("workers", *CLUSTER, "keep_source")),
    look=_look,
    examples=(
        "gloss search demo --trials 20",
        "gloss search SOURCE --method gloss,destein -o gloss.rank=2 --results search.json",
    ),
)
def search_command(
    recipe: Recipe, asked: SearchOptions, places: _ResultOptions, settings: Settings
) -> Answer:
    """Search the options of --method for SOURCE: fewest toxic words against least change elsewhere.

    What is typed with -o is not searched. Several methods have commas between them and take turns.
    Trials are measured on held-out text of their own and kept in the cache, so a search that was
    interrupted goes on; what is chosen is measured once more, by the guard, on text that no trial
    has seen. Nothing is written: the last line is the conversion that makes the chosen edit.
    """
    from converter.entrypoints.search import search_model
    from converter.evaluation.plots import plot_search

    quiet_libraries()
    found = search_model(recipe, asked, settings)
    if places.plots is not None:
        for path in plot_search(found.record, found.trials, places.plots):
            progress.note(f"  drawn: {path}")
    data = _data(found)
    if places.results is not None:
        _write(places.results, as_json(data))
    return Answer(data, _text(found))


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text + "\n", "utf-8")
    except OSError as error:
        raise DestinationError(f"--results {path} cannot be written", found=str(error)) from error


def _data(found: "Searched") -> dict[str, Any]:
    return {
        "source": found.recipe.source,
        "command": found.command,
        "method": found.recipe.method,
        "options": found.recipe.options,
        "search": found.record,
        "guard": found.guard,
        "trials": list(found.trials),
    }


def _text(found: "Searched") -> str:
    """The front as a Markdown table, the share of the effect on unseen text, and the command."""
    record, first = found.record, found.record.default
    rows = [_row("default", first)]
    rows += [_row("chosen" if t == record.chosen else "", t) for t in record.front]
    words = "of held-out pairs" if record.prompts is None or record.fallback else "of its own"
    return "\n".join([
        "| | trial | toxic words | nats | KL | perplexity | words beside | options |",
        "|---|---|---|---|---|---|---|---|",
        *rows,
        "",
        f"{record.trials} trials, {record.stopped} of them stopped early; {record.toxic_words} "
        f"toxic words {words} in the search part"
        + (f", since {record.fallback}" if record.fallback else ""),
        *_unseen(record, found.guard),
        found.command,
    ])  # fmt: skip


def _row(name: str, trial: SearchTrial) -> str:
    options = " ".join(f"{key}={text}" for key, text in trial.options.items())
    measured = trial.measured
    cells = [name, str(trial.number)]
    if measured is None or trial.divergence is None:
        cells += ["no numbers", "", "", "", ""]
    else:
        change, context = measured.toxic_change, measured.context_ratio
        cells += [
            f"x {_number(measured.teacher_forced)}",
            f"{change.value:+.2f} +- {change.error:.2f}",
            _number(trial.divergence, 4),
            f"x {_number(measured.perplexity_ratio, 4)}",
            f"x {_number(context)}" if context else "",
        ]
    stopped = f" (stopped at {trial.share:.0%}: {trial.stopped})" if trial.stopped else ""
    return "| " + " | ".join([*cells, escaped(f"{trial.method} {options}{stopped}")]) + " |"


def _number(estimate: Estimate, places: int = 3) -> str:
    return f"{estimate.value:.{places}f} +- {estimate.error:.{places}f}"


def _unseen(record: SearchRecord, guard: GuardRecord | None) -> Sequence[str]:
    """The effect of the chosen options on text that no trial has seen."""
    if guard is None:
        return ["on unseen text nothing was measured (--no-guard)"]
    words, ratio = guard.words, guard.edit.perplexity_ratio
    line = (
        f"on unseen text: toxic words x {_number(words.teacher_forced)} "
        f"({words.toxic_change.value:+.2f} nats), perplexity x {_number(ratio, 4)}"
    )
    line += (
        "; words of another kind than in the search"
        if record.kept is None
        else f"; {record.kept:.0%} of the drop in nats is kept"
    )
    if guard.reasons:
        return [line, "the guard would refuse it: " + "; and ".join(guard.reasons)]
    return [line, "the guard would pass it"]
