"""The charts of a report, as places in an SVG that ``data/report.html`` draws: no library needed.

Widths are in units of a view box 360 wide, which a phone shows one to one.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil, floor, isfinite, log10

from converter.evaluation.results import around
from converter.manifest import Estimate, GuardRecord, Manifest, Measured, Trial
from converter.release.report_labels import Box, Label, place_labels
from converter.release.verdict import mean, percent

_WIDTH = 360.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 50.0, 350.0, 30.0, 250.0
_ROW = 40
_TICKS = 5
"""The most lines of a grid in one direction."""


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar, and its whisker, which is an interval of 95 %; ``low`` is None without one."""

    label: str
    value: str
    kind: str
    y: float
    x: float
    width: float
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class Bars:
    """A chart of bars; ``text`` describes it for readers who cannot see it, ``zero`` is where bars
    begin.
    """

    title: str
    caption: str
    bars: tuple[Bar, ...]
    height: int
    zero: float

    @property
    def text(self) -> str:
        """The chart in a line."""
        return f"{self.title}: " + "; ".join(f"{bar.label} {bar.value}" for bar in self.bars)


@dataclass(frozen=True, slots=True)
class Tick:
    """A line of the grid."""

    place: float
    label: str


@dataclass(frozen=True, slots=True)
class Point:
    """The point of one edit, or of the unedited model.

    Attributes:
        name: of the point, written beside it.
        label: the same with its numbers.
        place: of the name; None if there is no room for it.
    """

    name: str
    label: str
    kind: str
    x: float
    y: float
    place: Label | None


@dataclass(frozen=True, slots=True)
class Points:
    """A chart of the cost of edits, to the right, and the remaining toxicity, upwards."""

    title: str
    caption: str
    x_label: str
    y_label: str
    points: tuple[Point, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]

    @property
    def text(self) -> str:
        """The chart in a line."""
        return f"{self.title}: " + "; ".join(point.label for point in self.points)


def bar_charts(guard: GuardRecord) -> Iterator[Bars]:
    """The guard's measurements, before and after, beside the mean of the controls."""
    if guard.defence is not None:
        yield _refusals(guard)
    else:
        words, controls = guard.words, [each.teacher_forced for each in guard.control_words]
        own = guard.words is not guard.edit
        where = "what the model itself says" if own else "sentences of the pairs' own kind"
        yield _chart(
            "Probability of toxic words",
            f"In {where}, relative to the unedited model. Shorter is better: the bar of the edit "
            "should be much shorter than that of the controls.",
            _before_and_after(words.teacher_forced, controls),
            "{:.1%}",
        )
    pairs = guard.edit.perplexity_ratio, [each.perplexity_ratio for each in guard.controls]
    yield _chart(
        "Perplexity on ordinary text",
        f"Relative to the unedited model, on {guard.neutral_tokens:,} tokens; the guard allows "
        f"{guard.budget:.1%}. Shorter is better: the bars should be about as long as the first.",
        _before_and_after(*pairs),
        "{:.1%}",
    )


_Rows = Sequence[tuple[str, str, Estimate]]


def _before_and_after(edit: Estimate, controls: Sequence[Estimate]) -> _Rows:
    mild = Estimate(value=mean(controls), error=0.0)
    return (
        ("before", "before", Estimate(value=1.0, error=0.0)),
        ("with the edit", "edit", edit),
        (f"with a control instead, mean of {len(controls)}", "control", mild),
    )


def _refusals(guard: GuardRecord) -> Bars:
    defence = guard.defence
    assert defence is not None
    named = {
        "harmful": "harmful requests", "reworded": "the same, other words",
        "harmless": "harmless questions", "touchy": "harmless, sound harmful",
    }  # fmt: skip
    rows = [(said, "edit", getattr(defence.edit, name)) for name, said in named.items()]
    mild = mean([each.harmful for each in defence.controls])
    last = ("harmful, with a control", "control", Estimate(value=mild, error=0.0))
    return _chart(
        "How much more probable refusals are",
        "In nats of log-probability a token, after requests and questions; the second bar is of "
        "refusals in unusual words. Longer is better for harmful requests, shorter for all others.",
        [*rows, last],
        "{:+.2f}",
    )


def _chart(title: str, caption: str, rows: _Rows, form: str) -> Bars:
    spans = [around(estimate) for _, _, estimate in rows]
    ends = [0.0, *(e.value for _, _, e in rows)]
    ends += [end for span in spans if span for end in (span.low, span.high)]
    known = [end for end in ends if isfinite(end)]
    place = _scale(min(known), max(known), 0.0, _WIDTH - 2)
    bars = []
    for number, ((label, kind, estimate), span) in enumerate(zip(rows, spans, strict=True)):
        at, zero = place(estimate.value), place(0.0)
        whisker = span if span and span.low < span.high else None
        value = form.format(estimate.value)
        if whisker:
            value += f" ({form.format(whisker.low)} to {form.format(whisker.high)})"
        value = value.replace("%", " %")
        low, high = (place(whisker.low), place(whisker.high)) if whisker else (None, None)
        bars.append(
            Bar(label, value, kind, 16 + _ROW * number, min(at, zero), abs(at - zero), low, high)
        )
    caption = caption.replace("%", " %")
    return Bars(title, caption, tuple(bars), _ROW * len(bars), place(0.0))


def cost_chart(manifest: Manifest) -> Points | None:
    """The cost and the remaining toxicity of each tried strength; None for edits for defence."""
    guard = manifest.guard
    if guard is None or guard.defence is not None:
        return None
    name = manifest.method.strength
    chosen = f"this edit, {name} {manifest.choice.strength:g}"
    every: list[tuple[str, str, Trial | Measured]] = [(chosen, "edit", guard.edit)]
    every += [(f"{name} {each.strength:g}", "tried", each) for each in manifest.choice.tried]
    every += [(f"control {n}", "control", one) for n, one in enumerate(guard.controls, 1)]
    found = [("no edit", "before", 1.0, 1.0)]
    for told, kind, each in every:
        cost, left = each.perplexity_ratio.value, each.teacher_forced.value
        if isfinite(cost) and isfinite(left):
            found.append((told, kind, cost, left))
    costs, lefts = [x for _, _, x, _ in found], [y for _, _, _, y in found]
    low, high = min(costs), max(*costs, min(costs) + 0.01)
    x = _scale(low, high, _LEFT + 8, _RIGHT - 24)
    y = _scale(0.0, max(1.0, *lefts), _BOTTOM - 8, _TOP + 8)
    frame = Box((_LEFT + _WIDTH) / 2, (_TOP + _BOTTOM) / 2, (_WIDTH - _LEFT) / 2, 120)
    places = place_labels([(told, x(cost), y(left)) for told, _, cost, left in found], frame)
    return Points(
        "Cost and effect",
        "Each mark is an edit: the disc is this one, circles are other strengths that were tried, "
        "squares are controls. The height is the probability of toxic words, relative to no edit, "
        "in held-out sentences like those of the fit. The effect is larger there than elsewhere, "
        "so go by the first picture. The circles were measured on other sentences than the rest. "
        "The disc should be far below the squares, and its cost within the budget.",
        "change of perplexity on ordinary text; lower is better",
        "probability of toxic words; lower is better",
        tuple(
            Point(told, f"{told}: {_cost(cost)}, {100 * left:.0f} %", kind, x(cost), y(left), place)
            for (told, kind, cost, left), place in zip(found, places, strict=True)
        ),
        _ticks(low - 1, high - 1, lambda value: x(value + 1), "{:+g} %"),
        _ticks(0.0, max(1.0, *lefts), y, "{:g} %"),
    )


def _cost(ratio: float) -> str:
    return f"{'-' if ratio < 1 else '+'}{percent(ratio - 1)}"


def _ticks(low: float, high: float, place: Callable[[float], float], form: str) -> tuple[Tick, ...]:
    """Lines at round per cents between two values."""
    least = (high - low) * 100 / _TICKS
    if not isfinite(least):  # of a broken model, or of someone's manifest
        return ()
    power = 10.0 ** floor(log10(least))
    step = next(step * power for step in (1, 2, 5, 10) if step * power >= least)
    counts = range(ceil(low * 100 / step - 1e-9), floor(high * 100 / step + 1e-9) + 1)
    return tuple(Tick(place(n * step / 100), form.format(round(n * step, 6))) for n in counts)


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """The positions of values; values that are not numbers are at ``start``."""
    size = high - low

    def place(value: float) -> float:
        part = (value - low) / size if size > 0 else 0.0
        return round(start + (end - start) * min(max(part, 0.0), 1.0), 2) if part == part else start

    return place
