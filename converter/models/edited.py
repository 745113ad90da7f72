"""Apply an edit without writing a weight: hooks that change modules' outputs."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from converter.checkpoints.architectures.architecture import Architecture
from converter.checkpoints.patch import merge
from converter.checkpoints.plan import Plan
from converter.edits.base import Edit, Footprint
from converter.edits.deltas import Delta
from converter.edits.fused import fusion_of
from converter.errors import OptionError
from converter.models.fused import blending
from converter.models.hooks import Editing, hooked
from converter.models.pieces import pieces_of, under


@dataclass(slots=True)
class _ModuleEdit:
    """The change of one module.

    Attributes:
        weight, bias: of its weight and of its bias; None if they do not change.
        created: (O,) a bias that it lacks.
        own: (O, I) a weight of its own, in place of one that it shares.
        axis: of its weight, over its outputs.
    """

    weight: Delta | None = None
    bias: Delta | None = None
    created: Tensor | None = None
    own: Tensor | None = None
    axis: int = 0

    def applied(
        self, x: Tensor, y: Tensor, bias: Tensor | None, weight: Tensor | None = None
    ) -> Tensor:
        """The output that a module with y (..., O) from x (..., I) would have with the edit.

        Its bias (O,) is part of y, if it has one. Its weight is (O, I).
        """
        new = y if self.own is None else nn.functional.linear(x, self.own.to(x), bias)
        together = bias is None or _same_subspace(self.weight, self.bias)
        if self.weight is not None:
            alone = y if together or bias is None else y - bias
            new = new + self.weight.shift(x, alone, weight)
        if self.bias is not None and bias is not None and not together:
            new = new + self.bias.shift(bias.new_ones(1), bias, bias[:, None])
        if self.created is not None:
            new = new + self.created.to(y)
        return new

    def hook(self, module: nn.Module, args: Any, output: Any) -> Any:
        """A forward hook; of several outputs, the first one changes."""
        first, *rest = output if isinstance(output, tuple) else (output,)
        weight, bias = (getattr(module, name, None) for name in ("weight", "bias"))
        matrix = weight.movedim(self.axis, 0) if isinstance(weight, Tensor) else None
        new = self.applied(args[0], first, bias if isinstance(bias, Tensor) else None, matrix)
        return (new, *rest) if isinstance(output, tuple) else new


def _same_subspace(one: Delta | None, other: Delta | None) -> bool:
    """Whether both take as much of one subspace out, and so of the sum of weight and bias."""
    if one is None or other is None or one.protects is None:
        return False
    same = one.protects is other.protects and one.written is other.written
    return same and one.factor == other.factor


@contextmanager
def edited(model: nn.Module, plan: Plan, edit: Edit) -> Iterator[None]:
    """Within this context, the model computes as if ``edit`` were written into its weights.

    Raises as ``editing``.
    """
    with editing(model, plan, edit)():
        yield


def editing(model: nn.Module, plan: Plan, edit: Edit) -> Editing:
    """``edited`` as a context that may be entered several times; the edit is checked once, here.

    Raises:
        CheckpointError: the edit does not fit the checkpoint.
        OptionError: see ``module_edits``.
    """
    edit.check(plan)
    if fusion := fusion_of(plan, edit):
        hooks: Editing = partial(blending, model, *fusion, edit.created)
    else:
        changes = module_edits(plan, edit)
        hooks = partial(hooked, model, {name: change.hook for name, change in changes.items()})
    if pieces_of(model) is None:
        return hooks
    return partial(_known_as, edit.digest(), model, hooks)


@contextmanager
def _known_as(digest: str, model: nn.Module, hooks: Editing) -> Iterator[None]:
    """The context of ``hooks``; pieces kept in it are named by the edit's digest, too."""
    with under(model, digest), hooks():
        yield


def lowest_layer(architecture: Architecture, modules: Iterable[str]) -> int:
    """The lowest layer that has one of the modules in it; 0 if one of them is in none."""
    block = re.escape(architecture.block).replace(re.escape("{layer}"), r"(\d+)")
    found = [re.match(rf"{block}(?:\.|$)", name) for name in modules]
    return min((int(place[1]) if place else 0 for place in found), default=0)


def lowest_edited(plan: Plan, edit: Edit) -> int:
    """The lowest layer that an edit changes; 0 if that is not known. Raises as ``edited``."""
    return 0 if fusion_of(plan, edit) else lowest_layer(plan.architecture, module_edits(plan, edit))


def modules_of(plan: Plan, footprint: Footprint) -> list[str]:
    """The modules whose outputs change, from the headers; "" stands for one not known."""
    biases = plan.bias_modules() if footprint.created else {}
    created = [biases.get(name, "") for name in footprint.created]
    return [weight.module for weight in footprint.weights] + created


def module_edits(plan: Plan, edit: Edit) -> dict[str, _ModuleEdit]:
    """Module of the transformers class -> its change.

    Raises:
        OptionError: a change whose effect on a running model is not known: experts of one module
            that change in different ways, or in another way than by a subspace that is taken out,
            a tensor that belongs to no known weight, or a patch of the config that does more than
            to tell of created biases or of a created head.
    """
    changes: dict[str, _ModuleEdit] = {}
    for name, weight in plan.find(edit.tensors).items():
        delta, change = edit.tensors[name], changes.setdefault(weight.module, _ModuleEdit())
        if weight.mixed and delta.protects is None:  # the module is the FFN; its input is another
            raise OptionError(
                f"the edit of tensor {name}",
                expected="a subspace taken out, in a mixture of experts",
                found=f"{delta.kind}, whose effect on the layer cannot be examined",
            )
        known = change.bias if weight.is_bias else change.weight
        if known is not None and known is not delta and not _same_subspace(known, delta):
            raise OptionError(
                f"the edit of tensor {name}", expected="the same for all experts of a layer",
                found="another one, whose effect on the layer cannot be examined",
            )  # fmt: skip
        if weight.is_bias:
            change.bias = delta
        else:
            change.weight, change.axis = delta, weight.axis
    _check_patch(plan, edit)
    biases = plan.bias_modules() if edit.created else {}
    head = plan.head_route() if edit.created else None
    for name, tensor in edit.created.items():
        if name in biases:
            changes.setdefault(biases[name], _ModuleEdit()).created = tensor
        elif head is not None and name == head.name:
            changes.setdefault(head.embedding.module, _ModuleEdit()).own = tensor
        elif bool(tensor.any()):
            raise OptionError(
                f"the tensor {name} that the edit creates",
                expected="a bias of a known weight, or a head of its own",
                found="one whose effect on the model cannot be examined",
            )  # fmt: skip
    return changes


def _check_patch(plan: Plan, edit: Edit) -> None:
    """A config may say that there are biases, or a head, which the edit creates; hooks show nothing
    else."""
    said: Any = {}
    for role in plan.architecture.bias_routes if edit.created else ():
        route = plan.bias_route(role) if role in plan.roles else None
        if route is not None and route.created and route.created.keys() <= edit.created.keys():
            said = merge(said, route.config)
    head = plan.head_route() if edit.created else None
    if head is not None and head.name in edit.created:
        said = merge(said, head.config)
    if merge(said, edit.patches.get("config.json", {})) != said:
        raise OptionError(
            "the patch of config.json that the edit makes",
            expected="nothing but the biases or the head that it creates",
            found="one whose effect on the model cannot be examined",
        )
