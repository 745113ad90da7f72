"""Model Surgery: the direction of a toxicity probe is added to the gate rows that point away from
it.

    p(toxic | x) = softmax(W x + c)    W (2, D), c (2,); v = W[toxic]
    chosen       = the K rows g of all gate projections with the smallest cos(g, v)
    g'           = g + a v             for g chosen

arXiv 2407.08770. x (D,) is the mean, over the tokens of a sentence, of the head's input: the hidden
states after the final norm. Letters: N pairs, D hidden size, R gate rows of the whole model. All of
it is float64.

**Differences from the paper.** The paper trains W with Adam (1e-4, 20 epochs, batches of 32) from a
random initialisation. Most of that remains in v at the end, so v differs with every seed:
``probe=paper``. By default W starts at zero and goes to the minimum of a convex loss
(``fit_probe``), so v is a function of the sentences alone. Then ``W[toxic] = -W[neutral]``. The
token that the encoder puts before a text is not in the mean. The paper has a = ``alpha`` = 1, whose
meaning depends on the lengths of v and of the rows. Here a is chosen, in units of the median row.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from math import inf, isclose
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity as cosine

from converter.calibration.statistics import Request
from converter.checkpoints.architectures.architecture import Dimensions
from converter.checkpoints.plan import Plan
from converter.checkpoints.weights import Weight
from converter.edits.base import Edit, Footprint
from converter.edits.deltas import AddToRows
from converter.errors import FitError, OptionError
from converter.methods.base import Proposal, Recorded, Workbench
from converter.methods.probe import TOXIC, fit_probe, held_accuracy, train_probe
from converter.recipe import LARGEST_SEED

_SCALES = (0.125, 0.25, 0.5, 1.0)
"""Lengths of the added vector to choose from, in median rows."""

_ROWS_OF_WIDTH = 4
"""K / D by default: 5 % of the rows of a model of 135M parameters, as of one of 7B."""

_CONTROLS = ("random rows", "a random vector")
"""The kinds of controls, of even and of odd seeds."""

_ROUNDED = 0.01
"""A relative difference that rounding of weights to 16 bits explains."""

_BLOCK = 1024
"""Gate rows in float64 at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSurgery:
    """Model Surgery; see the module.

    The guard compares with two kinds of controls in turn, by the parity of their seeds, and the
    edit must beat both. Even: v is added to random rows, which tests the choice of the rows. Odd: a
    random vector of the same length is added to the same rows, which tests v. With ``rows=random``
    the rows claim nothing, and all controls are of the second kind.

    Attributes:
        probe: ``convex``, which starts at zero and goes to the minimum, or ``paper``.
        scale: length of the added vector, over the median length of all gate rows; by default the
            most effective of a few within the perplexity budget.
        alpha: the paper's a instead of ``scale``; it depends on the length of v, and so on the
            training of the probe.
        rows: ``cosine``, the rows that point away from v, as in the paper; or ``random``.
        count: K, number of changed rows; by default 4 D.
        draw: seed of random rows, and of the paper's probe.
    """

    title: ClassVar[str] = "Model Surgery, a toxicity probe added to gate rows"
    paper: ClassVar[str] = "https://arxiv.org/abs/2407.08770"
    strength: ClassVar[str] = "scale"

    probe: Literal["convex", "paper"] = "convex"
    scale: float | None = field(default=None, metadata={"min": 1e-6, "max": 1e3})
    alpha: float | None = field(default=None, metadata={"min": 1e-6, "max": 1e6})
    rows: Literal["cosine", "random"] = "cosine"
    count: int | None = field(default=None, metadata={"min": 1})
    draw: int = field(default=0, metadata={"min": 0, "max": LARGEST_SEED})

    @classmethod
    def defaults(cls, dimensions: Dimensions) -> dict[str, Any]:
        """None depends on the model."""
        return {}

    def footprint(self, plan: Plan) -> Footprint:
        """The gate projections of all layers; only the fit knows which of them have chosen rows.

        Raises:
            OptionError: FFNs without a gate, or experts; fewer rows than ``count``; two strengths.
        """
        if self.scale is not None and self.alpha is not None:
            raise OptionError(
                "-o scale and -o alpha", expected="one of them", found="both: each is the strength"
            )
        gates = plan.weights("gate_proj")
        if plan.architecture.is_mixture:
            raise OptionError(
                "--method model-surgery",
                expected="a model without experts",
                found=plan.architecture.title,
                hint="the paper has no rule for the gates of experts; choose another method",
            )
        width, total = plan.dimensions.hidden_size, sum(map(_height, gates))
        head = plan.architecture.head
        given = (head.shape if head else plan.architecture.embedding_shape)[-1]
        if given != width:
            raise OptionError(
                "--method model-surgery",
                expected=f"a head that is given vectors of {width:,}, as the gates are",
                found=f"{given:,}",
            )
        if self._count(width) > total:
            raise OptionError(
                "-o count",
                expected=f"at most {total:,}, the gate rows of the model",
                found=f"{self._count(width):,}",
            )
        return Footprint(gates, (AddToRows,))

    def fit(self, bench: Workbench) -> Proposal:
        """Fit the probe, and compare it with all gate rows, projection by projection.

        Raises:
            FitError: the sides have the same mean, or the gate rows are not finite, or zero.
        """
        end = bench.plan.dimensions.num_hidden_layers
        seen = bench.activations(Request("final", "mean", (end,), second_moment=False))
        sides = seen.toxic[end], seen.neutral[end]
        if self.probe == "paper":
            W, _, start = train_probe(*sides, self.draw)
            v, told = W[TOXIC], {"probe_start_cosine": float(cosine(W[TOXIC], start[TOXIC], 0))}
        else:
            v, told = fit_probe(*sides)[0] / 2, {}
        weights = bench.plan.weights("gate_proj")
        cosines, lengths = compare(bench.weight, weights, v)
        median, length, unit = float(lengths.median()), float(v.norm()), v / v.norm()
        if not 0 < median < inf:
            raise FitError(
                "the gate rows of the model", expected="finite numbers, most of them not all zero",
                found=f"a median length of {median}",
            )  # fmt: skip
        gates, count = _Gates(weights, median), self._count(len(v))
        chosen = cosines.argsort(stable=True)[:count].sort().values
        if self.rows == "random":
            chosen = _drawn_rows(len(cosines), count, self.draw)

        def control(scale: float, seed: int) -> Edit:
            if self.rows == "cosine" and seed % 2 == 0:
                return gates.edit(_drawn_rows(len(cosines), count, seed), unit, scale)
            drawn = torch.Generator().manual_seed(seed)
            other = torch.randn(len(v), generator=drawn, dtype=torch.float64)
            return gates.edit(chosen, other / other.norm(), scale)

        scale = self.scale if self.alpha is None else self.alpha * length / median
        evidence = {
            "probe_length": length,
            "probe_accuracy": held_accuracy(*sides, self._line),
            **told,
            "median_row": median,
            "largest_cosine": float(cosines[chosen].max()),
            "rows_of_layers": {str(gate.layer): len(rows) for gate, rows in gates.split(chosen)},
        }
        return Proposal(
            _SCALES if scale is None else (scale,),
            scale is None,
            lambda scale: gates.edit(chosen, unit, scale),
            control,
            evidence,
            {"probe": v.float()},
            control_kinds=_CONTROLS if self.rows == "cosine" else _CONTROLS[1:],
        )

    def implied(self, found: Recorded) -> dict[str, Any]:
        """The length of the added vector, and, if weights are at hand, a check of the edited rows.

        Without the source, the original rows are the edited ones minus the added vector. Rounding
        then leaves an error of a cosine, in proportion to their length over sqrt(D), which is large
        near 0.

        Raises FitError: the added vector is not along the recorded probe, or the changed rows are
        not those that the options choose.
        """
        gates, v = found.plan.weights("gate_proj"), found.tensors["probe"].double()
        edits = found.edit.tensors
        rows, added = [], []
        for gate, start in zip(gates, accumulate(map(_height, gates), initial=0), strict=False):
            delta = edits.get(gate.info.name)
            if isinstance(delta, AddToRows):
                rows.append(delta.rows + start)
                added.append(delta.v.double())
        chosen, length = torch.cat(rows), float(v.norm())
        lengths = torch.stack(added) @ v / length
        if not bool((torch.stack(added) - lengths[:, None] * v / length).norm(dim=1).max()
                    <= _ROUNDED * lengths.min()):  # fmt: skip
            raise FitError("what is added to the rows", expected="the recorded probe",
                           found="another direction")  # fmt: skip
        implied = {
            "probe_length": length,
            "rows_of_layers": {
                str(gate.layer): len(d.rows) if isinstance(d, AddToRows) else 0
                for gate in gates
                for d in [edits.get(gate.info.name)]
            },
        }  # fmt: skip
        wanted, median = self._count(len(v)), float(found.evidence["median_row"])
        if found.weight is not None and not any(gate.scales for gate in gates):  # 8 bits are few
            cosines, sizes = compare(found.weight, gates, v)
            median = float(sizes.median())
            noise = _ROUNDED * (1 + float(lengths.mean()) / median) / len(v) ** 0.5
            largest, told = float(cosines[chosen].max()), found.evidence["largest_cosine"]
            known = told if abs(largest - told) <= noise else largest
            implied |= {"median_row": median, "largest_cosine": known}
            least = float(cosines.sort().values[wanted - 1])
            if self.rows == "cosine" and not largest <= least + max(noise, _ROUNDED * abs(least)):
                raise FitError("the rows that are changed", found="others",
                               expected="those that point away from the probe")  # fmt: skip
        if len(chosen) != wanted or (
            self.rows == "random"
            and not torch.equal(chosen, _drawn_rows(sum(map(_height, gates)), wanted, self.draw))
        ):
            raise FitError("the rows that are changed", expected="those of count and draw",
                           found="others")  # fmt: skip
        scale = float(lengths.mean()) / median
        if self.alpha is not None and not isclose(
            scale, self.alpha * length / median, rel_tol=_ROUNDED
        ):
            raise FitError("-o alpha", expected=f"{scale * median / length:g}, by the edit",
                           found=f"{self.alpha:g}")  # fmt: skip
        return {"scale": scale, **implied}

    def _line(self, toxic: Tensor, neutral: Tensor) -> tuple[Tensor, float]:
        """The direction (D,) and the constant of the probe's decision."""
        if self.probe == "convex":
            return fit_probe(toxic, neutral)
        W, c, _ = train_probe(toxic, neutral, self.draw)
        return W[TOXIC] - W[1 - TOXIC], float(c[TOXIC] - c[1 - TOXIC])

    def _count(self, width: int) -> int:
        """K, for a hidden size."""
        return self.count or _ROWS_OF_WIDTH * width


@dataclass(frozen=True, slots=True)
class _Gates:
    """The gate rows of a model, numbered in order of layer and row, and their median length."""

    weights: Sequence[Weight]
    median: float

    def split(self, rows: Tensor) -> list[tuple[Weight, Tensor]]:
        """Each projection, with those of the ascending rows that are in it, counted from its first
        row.
        """
        starts = list(accumulate(map(_height, self.weights), initial=0))
        cuts = torch.searchsorted(rows, torch.tensor(starts)).tolist()
        parts = zip(self.weights, pairwise(cuts), starts, strict=False)
        return [(weight, rows[a:b] - start) for weight, (a, b), start in parts]

    def edit(self, rows: Tensor, unit: Tensor, scale: float) -> Edit:
        """The edit that adds a unit vector (D,), times ``scale`` median lengths, to some rows."""
        added = (scale * self.median * unit).float()
        parts = self.split(rows)
        return Edit({w.info.name: AddToRows(part, added) for w, part in parts if len(part)})


def compare(
    read: Callable[[Weight], Tensor], weights: Sequence[Weight], v: Tensor
) -> tuple[Tensor, Tensor]:
    """cos(g, v) and |g| of the rows g of some weights, one of which is in memory at a time.

    Args:
        read: gives a weight (O, D), of any dtype.
        weights: to read, in order.
        v: (D,) float64, not zero.

    Returns:
        both (R,) float64, in order of weight and row; the cosine of a row of zeros is 0.
    """
    parts: list[Tensor] = []
    for weight in weights:
        parts += _products(read(weight), v)  # free the last weight before the next is read
    along, lengths = torch.cat(parts, 1)
    return along / (lengths * v.norm()).clamp(min=torch.finfo(v.dtype).tiny), lengths


def _products(matrix: Tensor, v: Tensor) -> Iterator[Tensor]:
    """g^T v and |g| of the rows g of a matrix (O, D), as (2, n) for blocks of rows in order."""
    for start in range(0, len(matrix), _BLOCK):
        rows = matrix[start : start + _BLOCK].double()
        yield torch.stack([rows @ v, rows.norm(dim=1)])


def _height(gate: Weight) -> int:
    """O, the rows of a gate projection (O, D), however it is stored."""
    return gate.info.shape[gate.axis]


def _drawn_rows(total: int, count: int, seed: int) -> Tensor:
    """``count`` of ``total`` rows, ascending."""
    drawn = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    return drawn[:count].sort().values
