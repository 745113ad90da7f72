"""Find the FFN of a decoder layer by its behaviour.

A feed-forward network reads the residual stream and writes into it, computes each position
independently of the others, and is not linear. Attention, convolutions and state spaces mix
positions. Projections and norms are linear maps, or have no matrices. A weight writes if adding a
vector u along one of its axes, times anything along the others, changes the FFN's output by a
multiple of u. Projecting all such weights projects the output.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from converter.checkpoints.architectures.experiments import Layer, is_multiple, related


@dataclass(frozen=True, slots=True)
class Map:
    """A linear map: its module, name and output axis of its weight, and its part of the outputs.

    Names are within the layer. ``part`` is (i, n) if this is the i-th of n maps in the weight.
    """

    module: str
    weight: str
    axis: int
    part: tuple[int, int] = (0, 1)


@dataclass(frozen=True, slots=True)
class Norm:
    """A norm: its module, the name of its weight, and the offset added to the weight."""

    module: str
    weight: str
    offset: int


@dataclass(frozen=True, slots=True)
class Ffn:
    """An FFN of a layer. Names are within the layer.

    Attributes:
        module: the module whose output the down-projections make together.
        site: the module whose output is added to the residual stream: the same, or the norm.
        norm: between it and the residual stream.
        weights: of its down-projections, with their output axes; no biases.
        biases: of them.
        gate, up: the maps before the activation function and of its factor, or the only one; not of
            mixtures of experts.
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
        ValueError: something is like an FFN, but its output is not added to the residual stream up
            to a factor, or no set of weights makes it.
    """
    found: list[Ffn] = []
    problems: dict[str, ValueError] = {}
    for name in layer.modules:
        if not any(related(name, ffn.module) for ffn in found) and _is_like_ffn(layer, name):
            try:
                found.append(_examine(layer, name))
            except ValueError as error:  # modules in it may be FFNs
                problems[name] = error
    for name in [] if found else _flat(layer):
        try:
            found.append(_examine(layer, name))
        except ValueError as error:
            problems[name] = error
    for name, problem in problems.items():
        inside = [ffn.module for ffn in found if related(name, ffn.module)]
        if inside and layer.is_through(name):
            whole = _is_affine_without(layer, name, inside)
        else:
            whole = bool(inside) or (bool(found) and _prepares(layer, name))
        if not whole:
            raise problem
    if not found:
        _check_that_there_is_none(layer)
    return found


def check_complete(layer: Layer, ffns: Sequence[Ffn]) -> None:
    """Raise ValueError if a layer is not linear apart from its FFNs, norms and mixing of positions.
    Then something else is like an FFN, such as one that runs twice or is not a module.
    """
    known = [ffn.module for ffn in ffns]
    for name in layer.modules:
        if any(related(name, other) for other in known):
            continue
        if layer.mixes(name) or _gives_factors(layer, name):
            known.append(name)
    if not layer.is_affine_but_for(known):
        raise ValueError(
            f"beside {' and '.join(known)} something is not linear, and may be a feed-forward "
            "network, too"
        )


def _gives_factors(layer: Layer, name: str) -> bool:
    """Whether a nonlinear module with matrices returns fewer numbers for each position than a
    hidden state has, such as the factors by which hyper-connections mix streams.
    """
    call = layer.only_call(name)
    if call is None or name in layer.linear_maps() or not layer.has_matrices(name):
        return False
    given = call.given
    return given is not None and given.numel() < layer.positions.numel() * layer.width


def _check_that_there_is_none(layer: Layer) -> None:
    """Raise ValueError if a layer is not linear apart from norms and mixing of positions.

    Only the innermost mixing modules count as mixing: a module around them may contain an FFN.
    """
    mixing = [name for name in layer.modules if layer.mixes(name)]
    mixers = [n for n in mixing if not any(other.startswith(f"{n}.") for other in mixing)]
    if not layer.is_affine_but_for(mixers):
        known = " and ".join(mixers) or "norms"
        raise ValueError(f"no FFN is found, and the layer is not linear but for {known}")


def _is_affine_without(layer: Layer, name: str, inside: list[str]) -> bool:
    """Whether a module is linear without the given modules, for all choices of experts."""
    with _changed(_without_preference(layer)):
        return layer.is_affine(name, inside)


def _prepares(layer: Layer, name: str) -> bool:
    """Whether only attention or an FFN reads a module's output, as for a gated norm.

    Such modules are not linear, and do not write into the residual stream themselves.
    """
    if layer.moves(name):
        return False
    fed: list[str] = []
    for other in layer.modules:
        inside = any(other.startswith(f"{outer}.") for outer in fed)
        if layer.has_matrices(other) and not related(name, other) and not inside:
            if not layer.feeds(name, other):
                continue
            fed.append(other)
            given = layer.calls[layer.modules[other]][-1].given
            linear = layer.is_through(other) and layer.is_affine(other)
            if linear or (given is not None and torch.equal(given, layer.given)):
                return False
    return bool(fed)


def examine(layer: Layer, module: str) -> Ffn:
    """An FFN by its module.

    Raises:
        ValueError: it is not an FFN, not a whole one, or its output does not reach the residual
            stream; the message says why.
    """
    if module not in layer.modules:
        raise ValueError(f"there is no {module} in the layer")
    layer.alone(module)
    if not layer.has_matrices(module):
        raise ValueError(f"{module} has no matrices")
    if module in layer.linear_maps():
        if module not in _flat(layer):
            raise ValueError(f"{module} is a linear map, and not the second one of an FFN")
    elif layer.mixes(module):
        raise ValueError(f"{module} mixes positions, as attention does, and an FFN does not")
    elif not layer.is_position_wise(module):
        raise ValueError(f"{module} does not give a hidden state for each one that it is given")
    elif layer.is_affine(module):
        raise ValueError(f"{module} is a linear map but for norms: it has no activation function")
    outer = module.rpartition(".")[0]
    while outer:
        if layer.is_position_wise(outer) and not _is_affine_without(layer, outer, [module]):
            raise ValueError(f"{module} is not all of the FFN {outer}, which is not linear without")
        outer = outer.rpartition(".")[0]
    return _examine(layer, module)


def _examine(layer: Layer, module: str) -> Ffn:
    """An FFN by its module, which is like one."""
    site, norm = _site(layer, module)
    writing = _writing(layer, module)
    weights = tuple((name, axis) for name, axis, axes in writing if axes > 1)
    if not weights:
        inner = [name for name in layer.modules if name.startswith(f"{module}.")]
        norms = [name for name in inner if layer.is_norm(name)]
        between = f": {norms[-1]}, which is in it, comes after them" if norms else ""
        raise ValueError(f"no weight of {module} writes what it gives{between}")
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


def _is_like_ffn(layer: Layer, name: str) -> bool:
    """Whether a module treats positions separately, is nonlinear apart from norms, and contributes
    to the layer's output, not only within attention.
    """
    if not layer.has_matrices(name) or not layer.is_position_wise(name) or layer.is_affine(name):
        return False
    outer = layer.mixer_around(name)
    return layer.moves_within(name, outer) if outer else layer.reached_by(name)


def _site(layer: Layer, module: str) -> tuple[str, Norm | None]:
    """The site where a module's output reaches the residual stream, and the norm before it.

    Raises ValueError, naming it, if something else is on the way.
    """
    if layer.writes(module):
        return module, None
    after = _given_multiples(layer, module)
    for name in after:
        if layer.writes(name):
            if is_multiple_everywhere(layer, name):
                return name, None
            if norm := norm_of(layer, name):
                return name, norm
            raise ValueError(
                f"between {module} and the residual stream is {name}, which {_what(layer, name)}"
            )
    raise ValueError(
        f"what {module} gives does not reach the residual stream as a multiple of it: "
        f"{_obstacle(layer, module, after)}"
    )


def _given_multiples(layer: Layer, module: str) -> list[str]:
    """Modules without matrices whose input is a multiple of a module's output."""
    _, _, given = layer.alone(module)
    found = []
    for name in layer.modules:
        if related(name, module) or layer.has_matrices(name) or not layer.only_call(name):
            continue
        _, state, _ = layer.alone(name)
        if state.numel() != given.numel():
            continue
        x, y = given.flatten(), state.flatten()
        rest = y - x * (x @ y) / (x @ x)
        if rest.abs().max() <= layer.tolerance * y.abs().max():
            found.append(name)
    return found


def _obstacle(layer: Layer, module: str, after: list[str]) -> str:
    """The obstacle between a module's output and the residual stream, in words."""
    if layer.moves(module):
        if weight := _scale(layer, module):
            return f"{weight} multiplies each channel by another number, outside of any module"
        if norms := [name for name in after if layer.is_norm(name)]:
            return f"{norms[0]} and something else come between"
        return "each channel is multiplied by another number, or mixed with others, on the way"
    for name in layer.modules:
        if layer.has_matrices(name) and not related(name, module) and layer.feeds(module, name):
            return f"it goes through {name}, which {_what(layer, name)}"
    return "something that is no norm, and has no matrices, comes between"


def _what(layer: Layer, name: str) -> str:
    """A description of a module that is not a norm."""
    if layer.mixes(name):
        return "mixes positions"
    if layer.has_matrices(name):
        return "has matrices"
    call, state, given = layer.alone(name)
    if layer.is_norm(name) and layer.width == state.shape[-1]:
        moved = call.again(layer.modules[name], state + state.abs().max()) - given
        if moved.abs().max() <= 1e-3 * given.abs().max():
            return "subtracts the mean of each position, as LayerNorm does"
    return (
        "is no norm that divides each position by one number and multiplies each channel by a "
        "weight"
    )


def _scale(layer: Layer, module: str) -> str | None:
    """The parameter that multiplies each channel of a module's output on the way."""
    vector = layer.vectors(2) * layer.width**0.5
    ratio = layer.shift(module, vector) / vector
    for name, parameter in layer.block.named_parameters():
        if parameter.shape == (layer.width,) and is_multiple(ratio, parameter, layer.tolerance):
            return name
    return None


def is_multiple_everywhere(layer: Layer, name: str) -> bool:
    """Whether a module multiplies its input by one factor for each position."""
    _, state, given = layer.alone(name)
    x, y = state.reshape(-1, layer.width), given.reshape(-1, layer.width)
    along = (x * y).sum(-1, keepdim=True) / (x * x).sum(-1, keepdim=True)
    return bool((y - along * x).abs().max() <= 1e-4 * y.abs().max())


def norm_of(layer: Layer, name: str) -> Norm | None:
    """A module as a norm that multiplies by its weight, or its weight + 1; None if it is not a
    norm.
    """
    _, state, given = layer.alone(name)
    x, y = state.reshape(-1, layer.width), given.reshape(-1, layer.width)
    for key, weight in layer.modules[name].named_parameters():
        for offset in (0, 1) if weight.shape == (layer.width,) else ():
            ratio = y / (x * (weight + offset))
            middle = ratio.median(-1, keepdim=True).values
            if ((ratio - middle).abs() <= 1e-3 * middle.abs()).all():
                return Norm(name, f"{name}.{key}", offset)
    return None


def _writing(layer: Layer, module: str) -> list[tuple[str, int, int]]:
    """Parameters of a module that write: name, output axis, and number of axes."""
    within, u = layer.modules[module], layer.vectors(7)
    generator = torch.Generator().manual_seed(7)
    (state,) = layer.states(7, 1)
    with _changed(_without_preference(layer)):
        before = layer.given_by(module, state=state)
    found = []
    for name, parameter in within.named_parameters():
        for axis, size in enumerate(parameter.shape):
            if size != layer.width:
                continue
            along = [1] * parameter.ndim
            along[axis] = size
            other = [1 if i == axis else n for i, n in enumerate(parameter.shape)]
            values = torch.randn(other, generator=generator).to(parameter.dtype)
            changed = {parameter: parameter + u.reshape(along) * values}
            with _changed(_without_preference(layer) | changed):
                moved = layer.given_by(module, state=state) - before
            if is_multiple(moved, u, layer.tolerance):
                found.append((name, axis, parameter.ndim))
                break
    return found


def check_projection(layer: Layer, module: str, axes: Mapping[str, int]) -> None:
    """Raise ValueError if projecting parameters does not project a module's output.

    Several states are tried, with the routers' biases evened out, so that all experts run.
    """
    u, parameters = layer.vectors(9), dict(layer.modules[module].named_parameters())
    projected = {}
    for name, axis in axes.items():
        weight = parameters[name].movedim(axis, -1)
        new = weight - (weight @ u).unsqueeze(-1) * u
        projected[parameters[name]] = new.movedim(-1, axis)
    with _changed(_without_preference(layer)):
        for state in layer.states(9, 8):
            before = layer.given_by(module, state=state)
            wanted = before - (before @ u).unsqueeze(-1) * u
            with _changed(projected):
                found = layer.given_by(module, state=state)
            if (found - wanted).abs().max() > layer.tolerance * before.abs().max():
                raise ValueError(
                    f"projecting {', '.join(axes)} does not project what {module} gives: something "
                    "else adds to it, as experts do that give what they are given"
                )


def _without_preference(layer: Layer) -> dict[Tensor, Tensor]:
    """Vectors of the layer, such as biases of a router, that are not of width D: their means."""
    return {
        vector: vector.mean().expand_as(vector)
        for vector in (*layer.block.parameters(), *layer.block.buffers())
        if vector.ndim == 1 and len(vector) != layer.width and vector.is_floating_point()
    }


@contextmanager
def _changed(values: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """Within this context, parameters have other values."""
    old = {parameter: parameter.detach().clone() for parameter in values}
    try:
        with torch.no_grad():
            for parameter, value in values.items():
                parameter.copy_(value)
        yield
    finally:
        with torch.no_grad():
            for parameter, value in old.items():
                parameter.copy_(value)


def _flat(layer: Layer) -> list[str]:
    """Linear maps that write like an FFN that is not a module of its own.

    The input of each depends only on other linear maps, position by position and nonlinearly.
    """
    found = []
    for name in layer.linear_maps():
        if layer.gives_width(name) and (first := _before(layer, name)):
            around = layer.mixer_around(name)
            if _hangs_on(layer, name, first) and not (around and _mixed_after(layer, name, around)):
                found.append(name)
    return found


def _mixed_after(layer: Layer, name: str, outer: str) -> bool:
    """Whether a module's output at one position changes that of a surrounding module at others."""
    _, _, given = layer.alone(name)
    shifted = given.clone()
    shifted.reshape(-1, layer.width)[0] += layer.vectors(5)
    moved = layer.given_by(outer, {name: shifted}) - layer.alone(outer)[2]
    return bool(moved.reshape(-1, layer.width)[1:].abs().max() > layer.noise(given))


def _before(layer: Layer, name: str) -> list[str]:
    """Linear maps on which a module's input depends, position by position."""
    _, state, _ = layer.alone(name)
    found = []
    for other in layer.linear_maps():
        _, _, given = layer.alone(other)
        rows = given.numel() // given.shape[-1]
        if other == name or rows != state.numel() // state.shape[-1]:
            continue
        shifted = given.clone()
        shifted.reshape(rows, -1)[0] += 1
        size = (layer.fed(name, {other: shifted}) - state).reshape(rows, -1).abs().amax(-1)
        if size[0] > 0 and size[1:].max() == 0:
            found.append(other)
    return found


def _hangs_on(layer: Layer, name: str, first: list[str]) -> bool:
    """Whether a module's input depends only on others' outputs, and nonlinearly."""
    _, state, _ = layer.alone(name)
    outer = layer.call.state
    assert outer is not None
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(outer.shape, generator=generator).to(outer.dtype)
    given = {other: layer.alone(other)[2] for other in first}
    if not torch.equal(layer.fed(name, given, outer + noise), state):
        return False
    reordered = layer.fed(name, {other: layer.reorder(x) for other, x in given.items()})
    if (reordered - layer.reorder(state)).abs().max() > layer.noise(state):
        return False
    nothing, once, opposite = (
        layer.fed(name, {other: factor * x for other, x in given.items()}) for factor in (0, 1, -1)
    )
    curved = (once + opposite - 2 * nothing).abs().max()
    return bool(curved > layer.tolerance * (once - nothing).abs().max())


def _gate_and_up(layer: Layer, module: str, down: str) -> tuple[Map | None, Map | None]:
    """The maps before the down-projection, whose input is linear in the output of ``up``, not of
    ``gate``.
    """
    within = f"{module}." if down != "weight" else ""
    name = within + down.removesuffix(".weight") if within else module
    if name not in layer.modules or not layer.only_call(name):
        return None, None
    _, before, _ = layer.alone(name)
    size = before.shape[-1]
    found: dict[bool, Map] = {}
    for other in layer.linear_maps(module if within else ""):
        _, _, given = layer.alone(other)
        if other == name or given.shape[-1] not in (size, 2 * size):
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
    """Whether a module's input scales with another's output; None if it does not change."""
    linear = True
    for factor in (2, -1):  # ReLU scales, too
        given = layer.alone(other)[2].clone()
        given.chunk(part[1], -1)[part[0]].mul_(factor)
        after = layer.fed(name, {other: given})
        if after.shape != before.shape or torch.equal(after, before):
            return None
        moved = (after - factor * before).abs().max()
        linear = linear and bool(moved <= layer.tolerance * before.abs().max())
    return linear


def output_axis(module: nn.Module) -> int | None:
    """The axis of a linear map's weight that runs over its outputs; None if it is no such map."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    assert weight.ndim == 2
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
                with _changed({weight: weight + added}):
                    moved = module(x) - before
        except RuntimeError:
            continue
        if moved.shape == (3, outputs) and is_multiple(moved, u, 1e-3):
            return axis
    return None


def takes_constant(layer: Layer, o_proj: Map, ffn: Ffn) -> bool:
    """Whether adding a vector to the bias of the only down-projection has the same effect on the
    layer's output as adding it to the output of ``o_proj``.

    This holds if attention and FFN read the same stream and their outputs are added: the FFN must
    not read the output of ``o_proj``.
    """
    if len(ffn.weights) != 1 or len(ffn.biases) != 1 or layer.feeds(o_proj.module, ffn.module):
        return False
    bias = layer.modules[ffn.module].get_parameter(ffn.biases[0])
    if bias.shape != (layer.width,):
        return False
    vector = layer.vectors(8) * layer.width**0.5
    wanted = layer.given_after(o_proj.module, vector)
    with _changed({bias: bias + vector}):
        found = layer.given_after(o_proj.module, torch.zeros_like(vector))
    moved = (wanted - layer.given).abs().max()
    return bool(moved > 0 and (found - wanted).abs().max() <= layer.tolerance * moved)


def find_o_proj(layer: Layer, ffns: list[Ffn]) -> Map | None:
    """The linear map that makes the output of a mixing module; None if there is not exactly one."""
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
            same = given is not None and given.numel() == call.given.numel()
            if given is not None and same and torch.equal(given.flatten(), call.given.flatten()):
                found.add(name)
            above = above.rpartition(".")[0]
    if len(found) != 1:
        return None
    name = found.pop()
    axis = output_axis(layer.modules[name])
    return None if axis is None else Map(name, f"{name}.weight", axis)
