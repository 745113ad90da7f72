"""How the weights of a model are stored in a checkpoint: their names there, axes and shapes.

transformers writes a tiny model of zeros, except for one weight, whose values are the numbers of
their outputs.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from converter.checkpoints.architectures import library
from converter.checkpoints.architectures.architecture import Architecture, WeightSpec
from converter.checkpoints.architectures.tiny import Tiny


@dataclass(slots=True)
class _Stored:
    """A weight as a tiny model's checkpoint has it.

    Attributes:
        names: of the tensors, in order; several if each expert has its own.
        axis: over the outputs.
        part: see ``WeightSpec``.
    """

    names: list[str]
    axis: int
    part: tuple[int, int]


class Storage:
    """Finds the weights of a model in its checkpoint.

    Args:
        model: of the real sizes, on the meta device.
        tiny: of the same class.
        place: name of the list of decoder layers in the class.
    """

    def __init__(self, model: Any, tiny: Tiny, place: str) -> None:
        self.model, self.tiny, self.place = model, tiny, place
        self._state = tiny.model.state_dict()
        self._shapes: dict[int, dict[str, tuple[int, ...]]] = {}

    def of_layer(
        self,
        number: int,
        inside: str,
        axis: int,
        module: str,
        *,
        mixed: bool = False,
        part: tuple[int, int] = (0, 1),
        bias: str = "",
    ) -> WeightSpec:
        """A weight of a layer.

        Args:
            number: of the layer.
            inside: name of the weight within the layer.
            axis: over its outputs, in the model.
            module, mixed, part: see ``WeightSpec``.
            bias: name of its bias within the layer, if it is not the usual one.

        Raises:
            ValueError: it is stored in an unknown way.
        """
        stored = self._stored(self.within(number, inside), axis, part)
        template, experts = _template(stored.names, number)
        shape, count = self._shape(number, template)
        key = self.within(number, bias or f"{inside.removesuffix('weight')}bias")
        named = f"{template.removesuffix('.weight')}.bias"
        if key in self._state:
            named, _ = _template(self._stored(key, -1, part).names, number)
        return WeightSpec(
            template, named, shape, stored.axis, module, mixed, stored.part, count if experts else 0
        )

    def of_model(self, name: str, axis: int) -> WeightSpec:
        """The weight of a linear map outside of the layers, by the map's name and output axis."""
        disk, shape = self.tensor_of(f"{name}.weight")
        bias = f"{disk.removesuffix('.weight')}.bias"
        return WeightSpec(disk, bias, shape, self._stored(f"{name}.weight", axis).axis, name)

    def tensor_of(self, key: str) -> tuple[str, tuple[int, ...]]:
        """The disk name and shape of a weight of the real model; of the first part, if several."""
        written = library.on_disk(self.model, {key: self.model.get_parameter(key)})
        name, tensor = next(iter(written.items()))
        return name, tuple(tensor.shape)

    def name_of(self, key: str, number: int | None = None) -> str:
        """The disk name of a weight of the model; as a template if it is in a layer."""
        state = {key: self._state[key]}
        name = next(iter(library.on_disk(self.tiny.model, state)))
        return name if number is None else _template([name], number)[0]

    def within(self, number: int, name: str) -> str:
        """The name in the model of a weight within a layer."""
        return f"{self.place}.{number}.{name}"

    def _stored(self, key: str, axis: int, part: tuple[int, int] = (0, 1)) -> _Stored:
        """How a weight of the tiny model is stored.

        Raises ValueError if a tensor does not hold a contiguous run of outputs of it.
        """
        weight = self._state[key]
        prefix = key.rpartition(".")[0]
        if key.startswith(f"{self.place}."):
            prefix = ".".join(key.split(".")[: self.place.count(".") + 2])
        near = {
            k: torch.zeros(t.shape) for k, t in self._state.items() if k.startswith(f"{prefix}.")
        }
        size = weight.shape[axis]
        along = [1] * weight.ndim
        along[axis] = size
        own = size // part[1]
        numbers = torch.arange(1.0, size + 1)
        inside = (numbers > own * part[0]) & (numbers <= own * (part[0] + 1))
        numbers = torch.where(inside, numbers - own * part[0], 0)
        near[key] = numbers.reshape(along).expand(weight.shape).clone()
        found: dict[str, tuple[int, tuple[int, int]]] = {}
        for name, tensor in library.on_disk(self.tiny.model, near).items():
            if tensor.any():
                found[name] = _numbered(name, tensor, own)
        if not found or len(set(found.values())) != 1:
            raise ValueError(f"{key} is stored in a way that is not known")
        return _Stored(sorted(found, key=_by_number), *next(iter(found.values())))

    def shapes(self, number: int) -> dict[str, tuple[int, ...]]:
        """The shapes of all tensors of the real model in a layer, by disk name with ``{layer}``."""
        if number not in self._shapes:
            start = f"{self.place}.{number}."
            state = {k: t for k, t in self.model.state_dict().items() if k.startswith(start)}
            written = library.on_disk(self.model, state).items()
            numbered = ((_numbered_once(name, number), tensor) for name, tensor in written)
            self._shapes[number] = {
                name: tuple(tensor.shape) for name, tensor in numbered if name is not None
            }
        return self._shapes[number]

    def _shape(self, number: int, template: str) -> tuple[tuple[int, ...], int]:
        """The shape of a tensor of the real model in a layer, and how many experts have one."""
        pattern = re.compile(re.escape(template).replace(r"\{expert\}", r"\d+"))
        shapes = [shape for name, shape in self.shapes(number).items() if pattern.fullmatch(name)]
        if len(set(shapes)) != 1:
            raise ValueError(f"the model has no tensor {template.format(layer=number, expert='*')}")
        return shapes[0], len(shapes)


def _numbered(name: str, tensor: Tensor, outputs: int) -> tuple[int, tuple[int, int]]:
    """The axis of a tensor that runs over numbered outputs, and which part of it they are."""
    for axis, size in enumerate(tensor.shape):
        rows = tensor.movedim(axis, 0).reshape(size, -1)
        first = rows[:, 0]
        if size % outputs or not torch.equal(rows, first[:, None].expand_as(rows)):
            continue
        numbers = torch.arange(1.0, outputs + 1)
        for place, chunk in enumerate(torch.split(first, outputs)):
            if torch.equal(chunk, numbers) and first.count_nonzero() == outputs:
                return axis, (place, size // outputs)
    raise ValueError(f"{name} does not hold the outputs in order")


def _template(names: Sequence[str], number: int) -> tuple[str, bool]:
    """Disk names of one weight in a layer with ``{layer}``, and with ``{expert}`` if several."""
    found = set()
    for name in names:
        parts = name.split(".")
        places = [i for i, part in enumerate(parts) if part.isdigit()]
        if not places or int(parts[places[0]]) != number:
            raise ValueError(f"the name {name} does not begin with the number of its layer")
        parts[places[0]] = "{layer}"
        if len(names) > 1:
            differing = [i for i in places[1:] if len({n.split(".")[i] for n in names}) > 1]
            if len(differing) != 1:
                raise ValueError(f"the names {', '.join(names[:2])} differ in more than a number")
            parts[differing[0]] = "{expert}"
        found.add(".".join(parts))
    if len(found) != 1:
        raise ValueError(f"the names {', '.join(names[:2])} differ in more than a number")
    return found.pop(), len(names) > 1


def _numbered_once(name: str, number: int) -> str | None:
    """A disk name with ``{layer}`` for its first number; None if that is another one."""
    start, dot, rest = name.partition(f".{number}.")
    if not dot or any(part.isdigit() for part in start.split(".")):
        return None
    return f"{start}.{{layer}}.{rest}"


def _by_number(name: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in name.split(".")]


def spelling(
    renaming: library.Renaming, architecture: Architecture, names: Iterable[str]
) -> dict[str, str]:
    """Beginning of names that ``save_pretrained`` writes -> beginning of those of a checkpoint.

    For checkpoints whose names transformers reads but does not write.

    Args:
        renaming: of the model.
        names: of all tensors of the checkpoint.
    """
    there: dict[str, str] = {}
    for name in names:
        if (key := renaming.weight_of(name)) is not None:
            there.setdefault(key, name)
    found: dict[str, str] = {}
    for ours in _anchors(architecture):
        key = renaming.weight_of(ours)
        theirs = there.get(key) if key else None
        if theirs and theirs != ours:
            one, other = ours.split("."), theirs.split(".")
            while one and other and one[-1] == other[-1]:
                one.pop()
                other.pop()
            found[_joined_all(one)] = _joined_all(other)
    return dict(sorted(found.items(), key=lambda item: -len(item[0])))


def _joined_all(parts: Sequence[str]) -> str:
    return "".join(f"{part}." for part in parts)


def _anchors(architecture: Architecture) -> Iterator[str]:
    """A disk name of each kind: those that may begin differently."""
    layer = architecture.sizes.ffn_layers[0]
    for spec, expert in architecture.specs("down_proj", layer):
        yield spec.weight.format(layer=layer, expert=expert)
        break
    yield architecture.embedding
    if architecture.head:
        yield architecture.head.weight
    if architecture.final_norm:
        yield architecture.final_norm
