"""Find the FFN of a decoder layer by what it does.

A feed-forward network reads the residual stream and writes into it, treats every position by
itself, and is not linear. Attention, convolutions and state spaces mix positions; projections and
norms are linear maps, or have no matrices. The weights that write are those to which a vector u can
be added along one axis, times anything along the others, so that all that changes of the FFN's
output is a multiple of u; projecting all of them projects the output.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from converter.checkpoints.architectures.experiments import Layer, is_multiple, related


@dataclass(frozen=True, slots=True)
class Map:
    """A linear map: its module, name and output axis of its weight, and its part of the outputs.

    Names are within the layer. ``part`` is (i, n) if the weight holds n maps, this being the i-th.
    """

    module: str
    weight: str
    axis: int
    part: tuple[int, int] = (0, 1)


@dataclass(frozen=True, slots=True)
class Norm:
    """A norm: its module, the name of its weight, and what it adds to that before it multiplies."""

    module: str
    weight: str
    offset: int


@dataclass(frozen=True, slots=True)
class Ffn:
    """An FFN of a layer. Names are within the layer.

    Attributes:
        module: what its down-projections give together.
        site: the module whose output is added to the residual stream: the same, or the norm.
        norm: between it and the residual stream.
        weights: of its down-projections, with their output axes; no biases.
        biases: of them.
        gate, up: what the activation function is applied to, and what it is multiplied by, or the
            only one, of an FFN that is no mixture of experts.
    """

    module: str
    site: str
    norm: Norm | None
    weights: tuple[tuple[str, int], ...]
    biases: tuple[str, ...]
    gate: Map | None = None
    up: Map | None = None


def find_ffns(layer: Layer) -> list[Ffn]:
    """All FFNs of a decoder layer.

    Raises:
        ValueError: something is like an FFN, and what it writes does not reach the residual stream
            as a multiple, or no set of weights makes it.
    """
    found: list[Ffn] = []
    problems: list[str] = []
    for name in layer.modules:
        if any(related(name, ffn.module) for ffn in found) or not layer.has_matrices(name):
            continue
        if layer.is_position_wise(name) and not layer.is_affine(name) and _has_part_in(layer, name):
            try:
                found.append(examine(layer, name))
            except ValueError as error:  # a module in it may be one
                problems.append(str(error))
    if not found and (flat := _second_of_two(layer)):
        found.append(examine(layer, flat))
    if problems and not found:
        raise ValueError(problems[-1])
    return found


def is_ffn(layer: Layer, module: str) -> bool:
    """Whether a module is an FFN, or the second of two linear maps that are one."""
    if layer.is_position_wise(module) and not layer.is_affine(module):
        return True
    return module in layer.linear_maps() and any(
        _feeds(layer, one, module) for one in layer.linear_maps()
    )


def examine(layer: Layer, module: str) -> Ffn:
    """An FFN by its module.

    Raises:
        ValueError: it does not do what an FFN does; what it does instead.
    """
    if not layer.only_call(module):
        raise ValueError(f"{module} is not called once, with one tensor, and gives one")
    site, norm = _site(layer, module)
    writing = _writing(layer, module)
    weights = tuple((name, axis) for name, axis, axes in writing if axes > 1)
    if not weights:
        raise ValueError(f"no weight of {module} writes what it gives")
    check_projection(layer, module, {name: axis for name, axis, _ in writing})
    # the bias of experts has an axis for them
    ndim = max(dict(layer.modules[module].named_parameters())[name].ndim for name, _ in weights)
    stems = {name.removesuffix(".weight").removesuffix("weight") for name, _ in weights}
    biases = tuple(name for name, _, axes in writing if axes == 1 or _is_bias(name, stems))
    weights = tuple((name, axis) for name, axis in weights if name not in biases)
    gate = up = None
    if len(weights) == 1 and ndim == 2:
        gate, up = _gate_and_up(layer, module, weights[0][0])
    return Ffn(module, site, norm, weights, biases, gate, up)


def _is_bias(name: str, stems: set[str]) -> bool:
    return name.endswith("bias") and any(name.startswith(stem) for stem in stems)


def _has_part_in(layer: Layer, name: str) -> bool:
    """Whether what a module gives, or what a norm makes of it, reaches the residual stream."""
    return layer.moves(name) or bool(_norms_of(layer, name))


def _norms_of(layer: Layer, module: str) -> list[str]:
    """Modules without matrices that are given a multiple of what a module gives, and write."""
    call = layer.only_call(module)
    given = call.given if call else None
    if given is None:
        return []
    found = []
    for name in layer.modules:
        if related(name, module) or layer.has_matrices(name):
            continue
        other = layer.only_call(name)
        state = other.state if other else None
        if state is None or state.numel() != given.numel():
            continue
        x, y = given.flatten(), state.flatten()
        rest = y - x * (x @ y) / (x @ x)
        if rest.abs().max() <= layer.tolerance * y.abs().max() and layer.writes(name):
            found.append(name)
    return found


def _site(layer: Layer, module: str) -> tuple[str, Norm | None]:
    """Where what a module gives reaches the residual stream, and the norm on its way."""
    if layer.writes(module):
        return module, None
    for name in _norms_of(layer, module):
        if norm := norm_of(layer, name):
            return name, norm
        raise ValueError(
            f"between {module} and the residual stream is {name}, which is no norm that divides "
            "each position by one number and multiplies each channel by a weight"
        )
    raise ValueError(
        f"what {module} gives does not reach the residual stream as a multiple of it: something "
        "else than a norm comes between"
    )


def norm_of(layer: Layer, name: str) -> Norm | None:
    """A module as a norm that multiplies by its weight, or its weight + 1; None if it is none."""
    call = layer.only_call(name)
    assert call is not None and call.state is not None and call.given is not None
    x, y = call.state.reshape(-1, layer.width), call.given.reshape(-1, layer.width)
    for key, weight in layer.modules[name].named_parameters():
        for offset in (0, 1) if weight.shape == (layer.width,) else ():
            ratio = y / (x * (weight + offset))
            middle = ratio.median(-1, keepdim=True).values
            if ((ratio - middle).abs() <= 1e-3 * middle.abs()).all():
                return Norm(name, f"{name}.{key}", offset)
    return None


def _writing(layer: Layer, module: str) -> list[tuple[str, int, int]]:
    """Parameters of a module that write: name, output axis, and number of axes."""
    call, within = layer.only_call(module), layer.modules[module]
    assert call is not None and call.state is not None
    generator = torch.Generator().manual_seed(7)
    state = torch.randn(call.state.shape, generator=generator).to(call.state.dtype)
    before, u = call.again(within, state), layer.vectors(7)
    found = []
    for name, parameter in within.named_parameters():
        for axis, size in enumerate(parameter.shape):
            if size != layer.width:
                continue
            along = [1] * parameter.ndim
            along[axis] = size
            other = [1 if i == axis else n for i, n in enumerate(parameter.shape)]
            values = torch.randn(other, generator=generator).to(parameter.dtype)
            with _changed(parameter, parameter + u.reshape(along) * values):
                moved = call.again(within, state) - before
            if is_multiple(moved, u, layer.tolerance):
                found.append((name, axis, parameter.ndim))
                break
    return found


def check_projection(layer: Layer, module: str, axes: Mapping[str, int]) -> None:
    """Raise ValueError if projecting parameters does not project what a module gives."""
    call, within = layer.only_call(module), layer.modules[module]
    assert call is not None and call.state is not None
    generator = torch.Generator().manual_seed(9)
    state = torch.randn(call.state.shape, generator=generator).to(call.state.dtype)
    u = layer.vectors(9)
    before = call.again(within, state)
    wanted = before - (before @ u).unsqueeze(-1) * u
    parameters = dict(within.named_parameters())
    old = {name: parameters[name].detach().clone() for name in axes}
    try:
        with torch.no_grad():
            for name, axis in axes.items():
                weight = parameters[name].movedim(axis, -1)
                new = weight - (weight @ u).unsqueeze(-1) * u
                parameters[name].copy_(new.movedim(-1, axis))
        found = call.again(within, state)
    finally:
        with torch.no_grad():
            for name, value in old.items():
                parameters[name].copy_(value)
    if (found - wanted).abs().max() > layer.tolerance * wanted.abs().max():
        raise ValueError(
            f"projecting {', '.join(axes)} does not project what {module} gives: something else "
            "adds to it"
        )


class _changed:
    """While this lasts, a parameter has other values."""

    def __init__(self, parameter: Tensor, values: Tensor) -> None:
        self.parameter, self.values = parameter, values

    def __enter__(self) -> None:
        self.old = self.parameter.detach().clone()
        with torch.no_grad():
            self.parameter.copy_(self.values)

    def __exit__(self, *reason: object) -> None:
        with torch.no_grad():
            self.parameter.copy_(self.old)


def _second_of_two(layer: Layer) -> str | None:
    """A linear map that hangs on another one alone, and on that position by position.

    Of an FFN that is no module of its own.
    """
    maps = layer.linear_maps()
    found = (second for second in maps if any(_feeds(layer, one, second) for one in maps))
    return next(found, None)


def _feeds(layer: Layer, one: str, second: str) -> bool:
    """Whether two linear maps are an FFN: the first reads the stream, the second hangs on it."""
    call, other = layer.only_call(second), layer.only_call(one)
    assert call is not None and call.given is not None and call.state is not None
    assert other is not None and other.given is not None and other.state is not None
    same = one != second and other.given.shape == call.state.shape
    width = call.given.shape[-1] == other.state.shape[-1] == layer.width
    return same and width and _hangs_on(layer, second, one)


def _hangs_on(layer: Layer, second: str, one: str) -> bool:
    """Whether a module is given a function, position by position, of what one other gives."""
    call, other, state = layer.only_call(second), layer.only_call(one), layer.call.state
    assert call is not None and call.state is not None and state is not None
    assert other is not None and other.given is not None
    output, given = other.output, other.given
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(state.shape, generator=generator).to(state.dtype)
    cut = layer.fed(second, {one: lambda _: output}, state + noise)
    if not torch.equal(cut, call.state):
        return False
    shifted = given.clone()
    shifted.reshape(-1, given.shape[-1])[0] += 1
    moved = (layer.fed(second, {one: lambda _: shifted}) - call.state).reshape(-1, cut.shape[-1])
    size = moved.abs().amax(-1)
    return bool(size[0] > 0 and size[1:].max() == 0)


def _gate_and_up(layer: Layer, module: str, down: str) -> tuple[Map | None, Map | None]:
    """The maps before the down-projection: it is linear in what ``up`` gives, not ``gate``."""
    within = f"{module}." if down != "weight" else ""
    name = within + down.removesuffix(".weight") if within else module
    call = layer.only_call(name) if name in layer.modules else None
    if call is None or call.state is None:
        return None, None
    before, size = call.state, call.state.shape[-1]
    inside = layer.linear_maps(module if within else "")
    found: dict[bool, Map] = {}
    for other in inside:
        known = layer.only_call(other)
        given = known.given if known else None
        if other == name or given is None or given.shape[-1] not in (size, 2 * size):
            continue
        parts = given.shape[-1] // size
        for part in range(parts):
            linear = _is_linear_in(layer, name, other, before, (part, parts))
            axis = output_axis(layer.modules[other])
            if linear is not None and axis is not None:
                found[linear] = Map(other, f"{other}.weight", axis, (part, parts))
    gate, up = found.get(False), found.get(True)
    return (gate, up) if up else (None, gate)


def _is_linear_in(
    layer: Layer, name: str, other: str, before: Tensor, part: tuple[int, int]
) -> bool | None:
    """Whether what a module is given doubles with what another gives; None if it stays."""
    call = layer.only_call(other)
    assert call is not None and call.given is not None
    doubled = call.given.clone()
    chunk = doubled.chunk(part[1], -1)[part[0]]
    chunk.mul_(2)
    after = layer.fed(name, {other: lambda _: doubled})
    if after.shape != before.shape or torch.equal(after, before):
        return None
    moved = (after - 2 * before).abs().max()
    return bool(moved <= layer.tolerance * before.abs().max())


def output_axis(module: nn.Module) -> int | None:
    """The axis of a linear map's weight that runs over its outputs; None if it is no such map."""
    weight = module.weight
    assert isinstance(weight, Tensor) and weight.ndim == 2
    generator = torch.Generator().manual_seed(11)
    for axis in (0, 1):
        outputs, inputs = weight.shape[axis], weight.shape[1 - axis]
        x = torch.randn((3, inputs), generator=generator).to(weight.dtype)
        u = torch.randn(outputs, generator=generator).to(weight.dtype)
        r = torch.randn(inputs, generator=generator).to(weight.dtype)
        added = torch.outer(u, r) if axis == 0 else torch.outer(r, u)
        try:
            with torch.no_grad():
                before = module(x)
                with _changed(weight, weight + added):
                    moved = module(x) - before
        except RuntimeError:
            continue
        if moved.shape == (3, outputs) and is_multiple(moved, u, 1e-3):
            return axis
    return None


def find_o_proj(layer: Layer, ffns: list[Ffn]) -> Map | None:
    """The linear map that gives what a module that mixes positions gives; None if not just one."""
    found: set[str] = set()
    for name in layer.linear_maps():
        call = layer.only_call(name)
        assert call is not None
        if call.given is None or call.given.shape[-1] != layer.width:
            continue
        if any(related(name, ffn.module) for ffn in ffns):
            continue
        above = name.rpartition(".")[0]
        while above:
            outer = layer.only_call(above)
            outer_call = outer or next(iter(layer.calls[layer.modules[above]]), None)
            given = outer_call.given if outer_call else None
            if given is not None and given.numel() == call.given.numel():
                if torch.equal(given.flatten(), call.given.flatten()):
                    found.add(name)
            above = above.rpartition(".")[0]
    if len(found) != 1:
        return None
    name = found.pop()
    axis = output_axis(layer.modules[name])
    return None if axis is None else Map(name, f"{name}.weight", axis)
