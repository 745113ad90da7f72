"""An edit that fuses a model with a calibration model, and the check that it is complete."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from converter.checkpoints.fusing import (
    ALIGNMENT,
    CODE,
    fused_code,
    fused_patch,
    fused_shapes,
    is_fused,
)
from converter.checkpoints.plan import Plan
from converter.edits.base import Edit
from converter.errors import CheckpointError


def fused_edit(plan: Plan, depth: int, scale: float, created: Mapping[str, Tensor]) -> Edit:
    """The edit that adds a calibration model; ``created`` are its tensors, and A."""
    patches = {"config.json": fused_patch(plan, depth, scale)}
    return Edit(created=created, patches=patches, files={CODE: fused_code(plan)})


def fusion_of(plan: Plan, edit: Edit) -> tuple[int, float] | None:
    """Depth and scale of an edit of ``fused_edit``; None for other edits.

    Raises:
        CheckpointError: it fuses, but lacks a part or does more.
    """
    patch: Any = edit.patches.get("config.json", {})
    claims = isinstance(patch, Mapping) and is_fused(patch)
    if not claims and CODE not in edit.files and ALIGNMENT not in edit.created:
        return None
    fusion = patch.get("fusion") if isinstance(patch, Mapping) else None
    depth, scale = (fusion.get(key) for key in ("depth", "scale")) if fusion else (0, 0.0)
    if type(depth) is int and depth > 0 and type(scale) in (int, float) and 0 < scale < 1:
        shapes = {name: tuple(tensor.shape) for name, tensor in edit.created.items()}
        same = edit.patches == {"config.json": fused_patch(plan, depth, scale)}
        alone = {*edit.files} == {CODE} and not edit.tensors
        if same and alone and shapes == fused_shapes(plan, depth):
            return depth, scale
    raise CheckpointError(
        "an edit that makes a fused model", expected="all that one needs, and nothing else",
        found="one that lacks a part of it, or does more",
    )  # fmt: skip
