"""Pictures of a fit and of an evaluation: PNG files, the same bytes for the same data.

Decoded tokens are never drawn, since many of them are offensive. The colours are those of Okabe
and Ito, which colour-blind readers can tell apart.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from converter.edits.edit_file import EVIDENCE
from converter.errors import DestinationError, OptionError, VerificationError
from converter.evaluation.results import average
from converter.evaluation.tables import COSTS, systems_of
from converter.manifest import (
    Candidate,
    Evaluation,
    Manifest,
    Metric,
    SearchRecord,
    SearchTrial,
    SystemRecord,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_Array = NDArray[np.float64]

_SMALL, _NORMAL = 7, 8  # points
_BLUE, _ORANGE, _GREY = "#0072b2", "#e69f00", "#8c8c8c"
_COLOURS = (_BLUE, "#d55e00", "#009e73", "#cc79a7", _ORANGE, "#56b4e9")
_MARKERS = "osD^vP"
_STATES = ((True, "kept", _BLUE, _BLUE), (False, "not kept", _GREY, "white"))  # edge, face
_WAYS = {"greedy": (-0.2, _BLUE), "sampled": (0.2, _ORANGE)}  # shift of the bar
_UNITS = {"causal": " (nats)", "vocabulary": " (share of tokens)"}  # of rankings; others have none
_BOUNDARY: dict[str, Any] = {"color": "black", "linestyle": "--", "linewidth": 1}
_LEGEND: dict[str, Any] = {"frameon": False, "fontsize": _SMALL}
_ABOVE: dict[str, Any] = {**_LEGEND, "loc": "outside upper center", "ncols": 5}
_SPECTRUM_LENGTH = 24  # a flat tail follows, of hundreds of values in a layer of ProFS

READABLE = 10.0
"""Per cent of perplexity. A point beyond it, and beyond three times the median, is left out: it is
a broken model, and would compress the scale for the others.
"""


def plot_fit(manifest: Manifest, edit_file: Path, folder: Path) -> list[Path]:
    """Write ``spectrum.png``, ``scores.png`` and ``cosines.png``, those for which there are data.

    Raises:
        OptionError: matplotlib is not installed.
        VerificationError: the edit's file cannot be read.
        DestinationError: a picture cannot be written.
    """
    return _save(
        folder,
        spectrum=spectrum_figure(manifest),
        scores=scores_figure(manifest),
        cosines=cosines_figure(manifest, edit_file),
    )


def plot_evaluation(results: Evaluation, folder: Path) -> list[Path]:
    """Write ``tradeoff.png`` and ``scores_before_after.png``; everything else as ``plot_fit``."""
    bars = bars_figure(results)
    return _save(folder, tradeoff=tradeoff_figure(results), scores_before_after=bars)


def plot_search(record: SearchRecord, trials: Sequence[SearchTrial], folder: Path) -> list[Path]:
    """Write ``front.png``; everything else as ``plot_fit``."""
    return _save(folder, front=front_figure(record, trials))


def front_figure(record: SearchRecord, trials: Sequence[SearchTrial]) -> "Figure":
    """The change of toxic words over the divergence: all trials, the front, default and chosen."""
    figure, (axes,) = _figure((6, 3.6))

    def draw(some: Sequence[SearchTrial], label: str, **look: Any) -> None:
        points = [
            (t.divergence.value, t.measured.toxic_change.value)
            for t in some
            if t.divergence and t.measured
        ]
        if points:
            axes.plot(*np.array(points).T, label=label, **look)

    whole = [trial for trial in trials if not trial.stopped]
    stopped = [trial for trial in trials if trial.stopped]
    draw(stopped, "stopped early", marker="x", markersize=4, linestyle="", color=_GREY)
    draw(whole, "measured on everything", marker="o", markersize=4, linestyle="", color=_GREY)
    draw(record.front, "front", marker="o", markersize=4, linewidth=1, color=_BLUE)
    draw([record.default], "default", marker="D", markersize=6, linestyle="", color="black")
    draw([record.chosen], "chosen", marker="*", markersize=10, linestyle="", color=_ORANGE)
    axes.set(xlabel="KL on ordinary text (nats a token)")
    axes.set_ylabel("change of log p of toxic words (nats)", fontsize=_NORMAL)
    figure.legend(**_ABOVE)
    return figure


def spectrum_figure(manifest: Manifest) -> "Figure | None":
    """Left the squared singular values over their sum, right how many candidates have which score.

    A thin line for each layer if each has its own spectrum; None if there is none, as of a random
    subspace. A bin begins at the threshold, so that each bin has one colour.
    """
    subspace, rank = manifest.subspace, manifest.edit.rank
    if subspace is None or not subspace.singular_values:
        return None
    figure, (left, right) = _figure((6, 3.6), columns=2)
    linewidth, marker = (1.2, "o") if len(subspace.singular_values) == 1 else (0.6, "")
    for values in subspace.singular_values.values():
        shares = (100 * np.square(values) / np.square(values).sum())[:_SPECTRUM_LENGTH]
        x = range(1, len(shares) + 1)
        left.plot(x, shares, color=_BLUE, linewidth=linewidth, marker=marker, markersize=3)
    label = f"rank {rank}"
    if factors := manifest.factors.values():
        label += f"\nfactors from {min(factors):g} to {max(factors):g}"
    left.axvline(rank + 0.5, label=label, **_BOUNDARY)
    left.set(xlabel="singular value, the largest first", ylabel="share of the sum of squares (%)")
    left.set_ylim(bottom=0)
    left.locator_params(axis="x", integer=True)
    left.legend(**_LEGEND)
    candidates = subspace.candidates
    scores = np.array([c.score for c in candidates])
    threshold = score_threshold(candidates)
    start = scores.min() if threshold is None else threshold
    width = float(np.ptp(scores)) / 24 or 1.0
    for kept, label, colour, _ in _STATES:
        mine = scores[[c.kept is kept for c in candidates]]
        places, counts = np.unique(np.floor((mine - start) / width), return_counts=True)
        text = f"{len(mine)} {label}" if len(mine) else None
        right.bar(start + (places + 0.5) * width, counts, 0.9 * width, color=colour, label=text)
    if threshold is not None:
        right.axvline(threshold, label="threshold", **_BOUNDARY)
    right.set(xlabel=_score_label(manifest), ylabel="candidates")
    right.locator_params(axis="y", integer=True)
    right.legend(**_LEGEND)
    return figure


def score_threshold(candidates: Sequence[Candidate]) -> float | None:
    """Halfway between the lowest score kept and the highest not kept; None if all are kept."""
    lowest = min((c.score for c in candidates if c.kept), default=-math.inf)
    highest = max((c.score for c in candidates if not c.kept), default=math.inf)
    return (lowest + highest) / 2 if lowest > highest else None


def _score_label(manifest: Manifest) -> str:
    ranking = manifest.method.options.get("ranking")
    return f"{ranking} score{_UNITS.get(str(ranking), '')}" if ranking else "score"


def scores_figure(manifest: Manifest) -> "Figure | None":
    """Candidate scores over layers, side by side in each; filled if kept, a marker for a kind.

    None for a method without candidates.
    """
    if manifest.subspace is None:
        return None
    candidates = manifest.subspace.candidates
    figure, (axes,) = _figure((6, 3.6))
    layers = np.array([c.layer for c in candidates])
    order = np.array([np.count_nonzero(layers[:i] == layer) for i, layer in enumerate(layers)])
    x = layers + 0.6 * ((order + 0.5) / (order.max() + 1) - 0.5)
    scores = np.array([c.score for c in candidates])
    kinds = dict.fromkeys(c.kind for c in candidates)
    for kind, (_, marker) in zip(kinds, _looks(), strict=False):
        for kept, label, edge, face in _STATES:
            mine = np.array([c.kind == kind and c.kept is kept for c in candidates])
            axes.plot(
                x[mine], scores[mine], marker, color=edge, markerfacecolor=face, markersize=4,
                label=f"{kind}, {label}" if mine.any() else None,
            )  # fmt: skip
    if (threshold := score_threshold(candidates)) is not None:
        axes.axhline(threshold, label="threshold", **_BOUNDARY)
    axes.set(xlabel="layer", ylabel=_score_label(manifest))
    axes.locator_params(axis="x", integer=True)
    figure.legend(**_ABOVE)
    return figure


def cosines_figure(manifest: Manifest, edit_file: Path) -> "Figure | None":
    """A heat map of |cos| of each two layers' best candidates; None without two in the file."""
    if manifest.subspace is None:
        return None
    candidates = manifest.subspace.candidates
    try:
        vectors = load_file(edit_file).get(f"{EVIDENCE}candidates")
    except (OSError, SafetensorError) as error:
        raise VerificationError(f"{edit_file.name} cannot be read", found=str(error)) from error
    best: dict[int, int] = {}
    for row in sorted(range(len(candidates)), key=lambda row: candidates[row].score):
        best[candidates[row].layer] = row
    if vectors is None or len(best) < 2:
        return None
    layers = sorted(best)
    rows = vectors[[best[layer] for layer in layers]].astype(np.float64)
    figure, (axes,) = _figure((5.2, 4.2))
    axes.grid(visible=False)
    image = axes.imshow(np.abs(rows @ rows.T), cmap="Blues", vmin=0, vmax=1, origin="lower")
    places = range(0, len(layers), math.ceil(len(layers) / 12))
    names = [str(layers[place]) for place in places]
    axes.set(xticks=places, xticklabels=names, yticks=places, yticklabels=names)
    axes.set(xlabel="layer", ylabel="layer")
    bar = figure.colorbar(image, ax=axes)
    bar.set_label("|cosine| of the best candidates", fontsize=_NORMAL)
    bar.ax.tick_params(labelsize=_SMALL)
    return figure


def tradeoff_points(
    systems: Sequence[SystemRecord], cost: str = "perplexity_ratio"
) -> dict[str, dict[float | None, _Array]]:
    """Edited systems -> strengths, ascending -> (2, 3), averaged over seeds; see ``_estimate``.

    The rows are the increase of ``cost``, a metric, in per cent and the probability of toxic words.
    """
    points: dict[str, dict[float | None, _Array]] = {}
    for system, members in systems_of(systems).items():
        groups: dict[float | None, list[SystemRecord]] = {}
        for entry in members:
            groups.setdefault(entry.strength if entry.group is None else entry.group, []).append(
                entry
            )
        for key in sorted(groups, key=lambda r: r or 0):
            ratio, toxic = (
                _estimate(average([entry.metrics.get(name) for entry in groups[key]]))
                for name in (cost, "teacher_forced")
            )
            point = np.stack([100 * (ratio - [1, 0, 0]), toxic])
            strengths = [entry.strength for entry in groups[key] if entry.strength is not None]
            strength = float(np.mean(strengths)) if strengths else None
            if not np.isnan(point).any():
                points.setdefault(system, {})[strength] = point
    return points


def _estimate(metric: Metric) -> _Array:
    """The value, and how far its interval reaches below and above it; NaN if not measured."""
    if metric is None:
        return np.full(3, math.nan)
    value = metric.value
    return np.array([value, *np.maximum([value - metric.low, metric.high - value], 0)])


def tradeoff_figure(results: Evaluation) -> "Figure | None":
    """The cost (x) and the effect (y) of each system: a line over its strengths, which stand beside
    it, and at its end the system's name.

    A panel for each kind of cost that was measured. Down and to the left is better. Points far out
    (``READABLE``) are left out and counted below. None without a point.
    """
    panels = {
        name: points
        for metric, (name, _) in COSTS.items()
        if (points := tradeoff_points(results.systems, metric))
    }
    if not panels:
        return None
    figure, columns = _figure((1.5 + 4.5 * len(panels), 4.4), columns=len(panels))
    captions = []
    for axes, (name, systems) in zip(columns, panels.items(), strict=True):
        costs = [point[0, 0] for points in systems.values() for point in points.values()]
        limit = max(READABLE, 3 * float(np.median(costs)))
        axes.plot(0, 1, "*", color="black", markersize=9, zorder=3, label="unedited")
        drawn = [("unedited", "black", np.array([0.0, 1.0]))]
        for (system, line), (colour, marker) in zip(systems.items(), _looks(), strict=False):
            inside = {key: point for key, point in line.items() if point[0, 0] <= limit}
            names = ["" if key is None else f"{key:.3g}" for key in inside]
            names[-1:] = [f"{system} {name}".strip() for name in names[-1:]]  # the line's end
            places = [point[:, 0] for point in inside.values()]
            drawn += [(name, colour, at) for name, at in zip(names, places, strict=True)]
            x, y = np.array([*inside.values()]).reshape(-1, 2, 3).transpose(1, 2, 0)
            axes.errorbar(
                x[0], y[0], y[1:], x[1:], color=colour, marker=marker, markersize=4.5,
                linewidth=1.2, elinewidth=0.6, label=system,
            )  # fmt: skip
        axes.set(xlabel=f"increase of perplexity, {name} (%)", ylim=(0, None))
        if left_out := len(costs) + 1 - len(drawn):
            captions.append(
                f"Left out: {left_out} beyond +{limit:.0f} %, up to +{max(costs):.0f} %."
            )
        _write_names(figure, axes, drawn)
    columns[0].set_ylabel("probability of toxic words (unedited: 1)")
    figure.legend(*columns[0].get_legend_handles_labels(), **_ABOVE)
    text = "Down and left is better. Numbers are strengths, bars are intervals of 95 %."
    figure.supxlabel(" ".join([text, *captions]), fontsize=_SMALL)
    return figure


def _looks() -> Iterator[tuple[str, str]]:
    """Colours and markers, of which no pair comes twice among the first 36."""
    for shift in count():
        for number, colour in enumerate(_COLOURS):
            yield colour, _MARKERS[(number + shift) % len(_MARKERS)]


def _write_names(figure: "Figure", axes: "Axes", drawn: Sequence[tuple[str, str, _Array]]) -> None:
    """Write texts near their points if they cover no marker or text; else leave them out.

    The long ones are first, as they find a place less easily.
    """
    figure.draw_without_rendering()  # settles the layout, and with it where the points are
    left, right = np.array(axes.get_window_extent().intervalx) * 72 / figure.dpi
    centres = [axes.transData.transform(point) * 72 / figure.dpi for *_, point in drawn]
    taken = [np.array([centre, (3.0, 3.0)]) for centre in centres]  # centres, half sizes
    sides = [(0.8, 0.8), (-0.8, -0.8), (0, 1), (0, -1), (1, 0), (-1, 0), (0.8, -0.8), (-0.8, 0.8)]
    found = sorted(zip(drawn, centres, strict=True), key=lambda each: -len(each[0][0]))
    for (text, colour, point), centre in found:
        half = np.array([2.2 * len(text), 3.2])
        beside = np.sign(sides) * [max(half[0] - 4.4, 0.0), 0.0]  # so that it begins at its point
        for offset in np.concatenate([np.multiply(far, sides) + beside for far in (8, 12)]):
            box = np.array([centre + offset, half])
            inside = left <= box[0, 0] - half[0] and box[0, 0] + half[0] <= right
            if inside and all((abs(box[0] - b[0]) >= box[1] + b[1]).any() for b in taken):
                axes.annotate(
                    text, tuple(point), tuple(offset), textcoords="offset points", color=colour,
                    ha="center", va="center", fontsize=_SMALL,
                )  # fmt: skip
                taken.append(box)
                break


def bars_figure(results: Evaluation) -> "Figure | None":
    """Mean toxicity of greedy and sampled text: bars by row, panels by scorer; None without any."""
    rows = results.rows
    found = {
        scorer: [
            [_estimate(row.metrics.get(f"toxicity/{scorer}/{way}")) for row in rows]
            for way in _WAYS
        ]
        for scorer in results.scorers
    }
    bars = {scorer: np.array(b) for scorer, b in found.items() if np.isfinite(b).any()}
    if not bars:
        return None
    names = [f"{r.system}\nstrength {r.strength}".removesuffix("\nstrength ") for r in rows]
    size = max(6, 1.2 + 2.2 * len(bars)), max(4, 1 + 0.35 * len(rows))
    figure, panels = _figure(size, columns=len(bars))
    for axes, (scorer, estimates) in zip(panels, bars.items(), strict=True):
        for (way, (shift, colour)), ours in zip(_WAYS.items(), estimates, strict=True):
            axes.barh(
                np.arange(len(rows)) + shift, ours[:, 0], 0.38, xerr=ours[:, 1:].T, color=colour,
                label=way if np.isfinite(ours).any() else None, error_kw={"elinewidth": 0.8},
            )  # fmt: skip
        axes.set_title(scorer, fontsize=_NORMAL)
        axes.set(xlabel="mean score (0 to 1)", ylim=(len(rows) - 0.4, -0.6))
        axes.set_yticks(range(len(rows)), names if axes is panels[0] else [])
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        axes.locator_params(axis="x", nbins=4, steps=[1, 2, 5, 10])
    figure.legend(*panels[0].get_legend_handles_labels(), **_ABOVE)
    return figure


def _figure(size: tuple[float, float], *, columns: int = 1) -> "tuple[Figure, list[Axes]]":
    """An empty white figure of a size in inches, apart from pyplot and its state."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        hint = "pip install 'gloss-convert[plot]'"
        raise OptionError("pictures need the package matplotlib", hint=hint) from error
    figure = Figure(size, 150, facecolor="white", layout=ConstrainedLayoutEngine(wspace=0.06))
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(1, columns, squeeze=False)[0])
    for axes in panels:
        axes.set_axisbelow(True)
        axes.grid(color="#e6e6e6", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=_SMALL)
        axes.xaxis.label.set_size(_NORMAL)
        axes.yaxis.label.set_size(_NORMAL)
    return figure, panels


def _save(folder: Path, **figures: "Figure | None") -> list[Path]:
    drawn = {folder / f"{name}.png": figure for name, figure in figures.items() if figure}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, figure in drawn.items():
            figure.savefig(path, metadata={"Software": None})
    except OSError as error:
        raise DestinationError(f"{folder} cannot be written", found=str(error)) from error
    return list(drawn)
