"""Edits as methods make them, from bases that a test has chosen."""

from collections.abc import Mapping

from torch import Tensor

from converter.checkpoints.plan import Plan
from converter.edits.base import Edit
from converter.edits.deltas import RemoveSubspace


def removal(plan: Plan, bases: Mapping[int, Tensor], bias: bool = True) -> Edit:
    """Subspaces taken out of down-projections.

    Args:
        plan: of the checkpoint.
        bases: layer -> (D, R) float32, orthonormal columns; layers may share one tensor.
        bias: whether the biases change, too.
    """
    weights = plan.weights("down_proj", bases)
    if bias:
        weights += plan.biases("down_proj", bases)
    deltas = {id(basis): RemoveSubspace(basis) for basis in bases.values()}
    return Edit({weight.info.name: deltas[id(bases[weight.layer])] for weight in weights})
