"""One small method for each kind of edit, to be run like any other: see ``tests/test_kinds.py``."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from converter.checkpoints.architectures.architecture import Dimensions
from converter.checkpoints.plan import Plan
from converter.checkpoints.safetensors.header import DTYPES
from converter.checkpoints.weights import Weight
from converter.edits.base import Edit, Footprint
from converter.edits.deltas import AddBits, AddLowRank, AddToRows, Replace
from converter.errors import OptionError
from converter.methods.base import Proposal, Workbench


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """What these methods have in common.

    Attributes:
        layer: that is edited.
        scale: of the change; by default chosen.
    """

    title: ClassVar[str] = "a method of the tests"
    paper: ClassVar[str] = "https://example.org"
    strength: ClassVar[str] = "scale"

    layer: int = 2
    scale: float | None = None

    @classmethod
    def defaults(cls, dimensions: Dimensions) -> dict[str, Any]:
        return {}

    def edit(self, bench: Workbench, scale: float, seed: int) -> Edit:
        raise NotImplementedError

    def fit(self, bench: Workbench) -> Proposal:
        return Proposal(
            (0.01, 0.02, 0.04) if self.scale is None else (self.scale,),
            self.scale is None,
            lambda scale: self.edit(bench, scale, 0),
            lambda scale, seed: self.edit(bench, scale, seed + 1),
            {"layer": self.layer},
        )


def the_weight(plan: Plan, role: Any, layer: int) -> Weight:
    (weight,) = plan.weights(role, [layer])
    return weight


@dataclass(frozen=True, slots=True, kw_only=True)
class RankOne(Base):
    """Adds a matrix of rank one to a down-projection."""

    def footprint(self, plan: Plan) -> Footprint:
        return Footprint((the_weight(plan, "down_proj", self.layer),), (AddLowRank,), 1)

    def edit(self, bench: Workbench, scale: float, seed: int) -> Edit:
        info = the_weight(bench.plan, "down_proj", self.layer).info
        height, width = info.shape
        delta = AddLowRank(scale * draw(seed, height, 1), draw(seed + 100, 1, width))
        return Edit({info.name: delta})


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows(Base):
    """Adds a vector to some rows of a gate projection."""

    def footprint(self, plan: Plan) -> Footprint:
        return Footprint((the_weight(plan, "gate_proj", self.layer),), (AddToRows,))

    def edit(self, bench: Workbench, scale: float, seed: int) -> Edit:
        info = the_weight(bench.plan, "gate_proj", self.layer).info
        rows = torch.tensor([1, 7, info.shape[0] - 1])
        return Edit({info.name: AddToRows(rows, scale * draw(seed, info.shape[1]))})


@dataclass(frozen=True, slots=True, kw_only=True)
class Replaced(Base):
    """Replaces what the attention writes, as training would."""

    def footprint(self, plan: Plan) -> Footprint:
        return Footprint((the_weight(plan, "o_proj", self.layer),), (Replace,))

    def edit(self, bench: Workbench, scale: float, seed: int) -> Edit:
        weight = the_weight(bench.plan, "o_proj", self.layer)
        new = bench.weight(weight)
        new = new + scale * draw(seed, *new.shape)
        return Edit({weight.info.name: Replace(new)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Bits(Base):
    """Changes the bit patterns of a down-projection."""

    def footprint(self, plan: Plan) -> Footprint:
        return Footprint((the_weight(plan, "down_proj", self.layer),), (AddBits,))

    def edit(self, bench: Workbench, scale: float, seed: int) -> Edit:
        weight = the_weight(bench.plan, "down_proj", self.layer)
        W = bench.weight(weight)
        stored = W.to(DTYPES[weight.info.dtype])
        return Edit({weight.info.name: AddBits.between(stored, W + scale * draw(seed, *W.shape))})


@dataclass(frozen=True, slots=True, kw_only=True)
class CreatedBias(Base):
    """Gives what the attention writes a bias that the source lacks, and tells the config."""

    def footprint(self, plan: Plan) -> Footprint:
        route = plan.bias_route("o_proj")
        if route is None or not route.created:
            raise OptionError(
                "--method created-bias", expected="a model whose o_proj can get a bias",
                found=plan.architecture.title, hint="choose another method",
            )  # fmt: skip
        return Footprint((), (), created=route.created, patches=("config.json",))

    def edit(self, bench: Workbench, scale: float, seed: int) -> Edit:
        route = bench.plan.bias_route("o_proj")
        assert route is not None
        created = {name: torch.zeros(shape) for name, shape in route.created.items()}
        name = route.biases[self.layer]
        created[name] = scale * draw(seed, *route.created[name])
        return Edit(created=created, patches={"config.json": route.config})


@dataclass(frozen=True, slots=True, kw_only=True)
class AddedFile(Base):
    """Adds a file and changes a setting of generation; the weights stay as they are."""

    def footprint(self, plan: Plan) -> Footprint:
        return Footprint(patches=("generation_config.json",), files=("notes/edit.txt",))

    def edit(self, bench: Workbench, scale: float, seed: int) -> Edit:
        return Edit(
            patches={"generation_config.json": {"repetition_penalty": 1 + scale}},
            files={"notes/edit.txt": f"scale {scale}\n".encode()},
        )


METHODS = {
    "rank-one": RankOne, "rows": Rows, "replaced": Replaced, "bits": Bits,
    "created-bias": CreatedBias, "added-file": AddedFile,
}  # fmt: skip
