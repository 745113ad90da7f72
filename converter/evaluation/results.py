"""The results of an evaluation, averaged over seeds, with intervals."""

from collections.abc import Sequence

import numpy as np

from converter.manifest import (
    Estimate,
    Interval,
    Metric,
    RowRecord,
    Strength,
    SystemRecord,
)

_NORMAL = 1.96
"""Standard errors on either side that hold 95 % of a normal distribution."""


def around(estimate: Estimate) -> Metric:
    """A value with a normal interval."""
    value, half = estimate.value, _NORMAL * estimate.error
    return Interval.of(value, value - half, value + half)


def summarise(systems: Sequence[SystemRecord]) -> tuple[RowRecord, ...]:
    """One row for each system, its seeds averaged.

    The interval of a mean over S seeds has the variance ``v + s^2 / S``, v that of a single seed's
    interval (all seeds share the prompts, so it does not shrink), s^2 the variance between seeds.
    """
    groups: dict[tuple[str, Strength | None], list[SystemRecord]] = {}
    for system in systems:
        groups.setdefault((system.system, system.group), []).append(system)
    rows = []
    for (name, _), members in groups.items():
        strengths = sorted({m.strength for m in members if m.strength is not None})
        names = list(dict.fromkeys(key for m in members for key in m.metrics))
        metrics = {key: average([m.metrics.get(key) for m in members]) for key in names}
        text = ", ".join(f"{strength:g}" for strength in strengths)
        rows.append(RowRecord(system=name, strength=text, seeds=len(members), metrics=metrics))
    return tuple(rows)


def average(values: Sequence[Metric]) -> Metric:
    """The mean of one metric over seeds, with the interval that ``summarise`` explains."""
    known = [v for v in values if v is not None]
    if not known:
        return None
    mean = float(np.mean([v.value for v in known]))
    spread = np.var([v.value for v in known], ddof=1) / len(known) if len(known) > 1 else 0.0
    low = float(np.mean([v.low - v.value for v in known]))
    high = float(np.mean([v.high - v.value for v in known]))
    more = _NORMAL**2 * spread
    low, high = (float(np.sqrt(distance**2 + more)) for distance in (low, high))
    return Interval.of(mean, mean - low, mean + high)
