"""Output-layer fusion as in its paper: a calibration model that runs beside the model."""

from collections.abc import Mapping

import torch
from torch import Tensor

from converter.calibration.calibration_models import Training
from converter.calibration.linear_algebra import random_basis
from converter.checkpoints.fusing import ALIGNMENT, CODE, fused_dtype, fused_shapes, own_name
from converter.checkpoints.plan import Plan
from converter.edits.base import Edit, Footprint
from converter.edits.fused import fused_edit
from converter.errors import OptionError
from converter.methods.base import Proposal, Workbench

_SCALE = 0.1
"""The default scale. It is not chosen, since perplexity need not grow with it."""


def footprint(plan: Plan, depth: int, scale: float | None) -> Footprint:
    """The calibration model's tensors and A; a config of another type; the class of both models.

    Raises:
        OptionError: the scale is out of range, or the class cannot run two models.
    """
    if scale is not None and scale >= 1:
        raise OptionError("-o scale", expected="less than 1 with form=paper", found=f"{scale:g}")
    return Footprint(created=fused_shapes(plan, depth), patches=("config.json",), files=(CODE,))


def fit(bench: Workbench, training: Training, scale: float | None) -> Proposal:
    """``h' = (1 - a) h + a LN(t A)``, with A the identity, since both models begin as the same one.

    The controls replace A by a random rotation: they mix in as much, of meaningless directions. Two
    more edits are measured for comparison: (1 - a) h alone, which is a temperature of 1 / (1 - a),
    and a calibration model of toxic instead of neutral text.
    """
    plan, depth = bench.plan, training.depth
    created = fused_shapes(plan, depth)
    width, dtype = created.pop(ALIGNMENT)[0], fused_dtype(plan)
    models = bench.calibrate(training, [own_name(name) for name in created])
    same = torch.eye(width)

    def edit(scale: float, alignment: Tensor, side: str = "neutral") -> Edit:
        known: Mapping[str, Tensor] = models[side].tensors
        new = {name: known[own_name(name)].to(dtype) for name in created}
        return fused_edit(plan, depth, scale, {**new, ALIGNMENT: alignment.to(dtype)})

    def control(scale: float, seed: int) -> Edit:
        return edit(scale, random_basis(width, width, seed, torch.zeros(width, 0).double()))

    return Proposal(
        (_SCALE if scale is None else scale,),
        False,
        lambda scale: edit(scale, same),
        control,
        {side: dict(model.about) for side, model in models.items()},
        compared={
            "temperature alone": lambda scale: edit(scale, torch.zeros(width, width)),
            "a toxic calibration model": lambda scale: edit(scale, same, "toxic"),
        },
    )
