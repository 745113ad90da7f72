"""Experiments on a decoder layer: change the input or output of modules, and observe the effect.

No name is used. A decoder layer is called many times with the arguments of a forward pass. Shapes:
B texts, T tokens, D hidden size; "a position" is one of the B T of them. Adding a vector at one
position shows whether positions are mixed, since others then change.
"""

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any, cast

import torch
from torch import Tensor, nn

from converter.checkpoints.architectures.tiny import Tiny, block_lists

Change = Callable[[Any], Any]
"""Replaces the output of a module."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a module: its input, before it ran, and its output."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    @property
    def key(self) -> str | None:
        """The name under which hidden states are given, if by name: else of the first tensor."""
        if self.args or "hidden_states" in self.kwargs:
            return None if self.args else "hidden_states"
        return next((key for key, value in self.kwargs.items() if isinstance(value, Tensor)), None)

    @property
    def state(self) -> Tensor | None:
        """Its input hidden states: the first tensor."""
        found: Any = self.args[0] if self.args else self.kwargs.get(self.key or "")
        return found if isinstance(found, Tensor) else None

    @property
    def given(self) -> Tensor | None:
        """The first tensor of its output."""
        return first_tensor(self.output)

    def again(self, module: nn.Module, state: Tensor | None = None) -> Tensor:
        """The output of the module for the same call with another state."""
        args, kwargs = _copied(self.args), _copied(self.kwargs)
        if state is not None and args:
            args = (state, *args[1:])
        elif state is not None and self.key:
            kwargs[self.key] = state
        with torch.no_grad():
            found = first_tensor(module(*args, **kwargs))
        assert found is not None
        return found


def first_tensor(output: Any) -> Tensor | None:
    """A tensor, or the first of several."""
    while isinstance(output, (tuple, list)) and output:
        output = output[0]
    return output if isinstance(output, Tensor) else None


def record(modules: Iterable[nn.Module], run: Callable[[], Any]) -> dict[nn.Module, list[Call]]:
    """The calls of modules while something runs."""
    calls: dict[nn.Module, list[Call]] = {module: [] for module in modules}
    given: dict[nn.Module, list[Any]] = {module: [] for module in calls}

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        given[module].append((_copied(args), _copied(kwargs)))

    def after(module: nn.Module, args: Any, output: Any) -> None:
        args, kwargs = given[module].pop()
        calls[module].append(Call(args, kwargs, _copied(output)))

    with ExitStack() as stack, torch.no_grad():
        for module in calls:
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(after).remove)
        run()
    return calls


def _copied(value: Any) -> Any:
    """A copy of all that code may change in place: tensors, and caches of keys and values."""
    if isinstance(value, Tensor):
        return value.clone()
    if type(value) in (tuple, list):
        return type(value)(map(_copied, value))
    if type(value) is dict:
        return {k: _copied(v) for k, v in value.items()}
    return copy.deepcopy(value) if hasattr(value, "update") else value


def decoder_layers(
    tiny: Tiny, name: str = ""
) -> tuple[str, list[nn.Module], dict[nn.Module, list[Call]]]:
    """The decoder layers of a tiny model: the name of their list, the layers, and their calls.

    Layers that text does not run through have no calls.

    Args:
        name: of the list, if it is known.

    Raises:
        ValueError: there is not exactly one such list, or layers run several times, or share
            weights.
    """
    lists = {n: blocks for n, blocks in block_lists(tiny.model).items() if name in ("", n)}
    calls = record([block for blocks in lists.values() for block in blocks], tiny.run)
    found = {name: blocks for name, blocks in lists.items() if _are_layers(blocks, calls)}
    exact = {name: blocks for name, blocks in found.items() if len(blocks) == tiny.layers}
    longest = max(map(len, found.values()), default=0)
    chosen = exact or {name: blocks for name, blocks in found.items() if len(blocks) == longest}
    if not chosen:
        raise ValueError("no list of modules is one of layers that give hidden states")
    for each, blocks in chosen.items():
        if any(len(calls[block]) > 1 for block in blocks):
            raise ValueError(
                f"the layers in {each} run several times in one pass: no one residual stream runs "
                "through them in order"
            )
    if len(chosen) > 1:
        raise ValueError(
            f"text runs through several lists of layers, {' and '.join(chosen)}, as of an encoder "
            "and a decoder, or of parts of layers: no one of them is the decoder layers"
        )
    ((found_name, blocks),) = chosen.items()
    check_unshared(found_name, list(blocks))
    return found_name, list(blocks), {block: calls[block] for block in blocks}


def check_positions(calls: Iterable[Call], shape: tuple[int, ...]) -> None:
    """Raise ValueError if layers get other positions than those of the tokens, (B, T)."""
    for call in calls:
        assert call.state is not None
        places = call.state.shape[:-1]
        if shape[1] not in places and places.numel() != shape[0] * shape[1]:
            raise ValueError(
                f"the model puts positions of its own beside the {shape[1]} tokens of a text: its "
                f"hidden states are {list(call.state.shape)}"
            )


def _are_layers(blocks: Iterable[nn.Module], calls: Mapping[nn.Module, list[Call]]) -> bool:
    """Whether text runs through modules from hidden states to hidden states."""
    ran = [call for block in blocks for call in calls[block]]
    return bool(ran) and all(
        call.state is not None
        and call.given is not None
        and call.state.is_floating_point()
        and call.state.ndim > 2
        and call.state.shape == call.given.shape
        for call in ran
    )


def check_unshared(name: str, blocks: list[nn.Module]) -> None:
    """Raise ValueError if two layers have a weight in common."""
    owners: dict[nn.Parameter, int] = {}
    for index, block in enumerate(blocks):
        for key, parameter in block.named_parameters():
            first = owners.setdefault(parameter, index)
            if first != index and parameter.ndim > 1:
                raise ValueError(
                    f"layers {first} and {index} of {name} have one {key} in common: what is "
                    "changed of one changes the other"
                )


class Layer:
    """A decoder layer that can be called again.

    Attributes:
        modules: those in it, by name.
        calls: of each, in one pass.
        width: D.
        positions: (B, T).
    """

    def __init__(self, block: nn.Module, call: Call, tolerance: float) -> None:
        self.block, self.call, self.tolerance = block, call, tolerance
        self.modules = {name: module for name, module in block.named_modules() if name}
        self.calls = record(self.modules.values(), lambda: call.again(block))
        state, given = call.state, call.given
        assert state is not None
        assert given is not None
        self.width, self.given = state.shape[-1], given
        self._alone: dict[str, bool] = {}
        self.positions = self._positions(state)
        self._end = self._norm_at_end()

    def _positions(self, state: Tensor) -> torch.Size:
        """The first axes of most hidden states; the layer may be given several residual streams."""
        calls = [call.state for calls in self.calls.values() for call in calls]
        states = [state, *(s for s in calls if s is not None and s.shape[-1] == self.width)]
        counts = Counter(s.shape[:2] for s in states if s.ndim == 3)
        return counts.most_common(1)[0][0] if counts else state.shape[:2]

    def only_call(self, name: str) -> Call | None:
        """The call of a module that is called once, from tensors to tensors."""
        calls = self.calls[self.modules[name]]
        once = len(calls) == 1 and calls[0].state is not None and calls[0].given is not None
        return calls[0] if once else None

    def alone(self, name: str) -> tuple[Call, Tensor, Tensor]:
        """The only call of a module, and its input and output tensors.

        Raises ValueError if it was not called exactly once, or has no input or output tensor.
        """
        call = self.only_call(name)
        if call is None or call.state is None or call.given is None:
            raise ValueError(f"{name} is not called once, with one tensor, and gives one")
        return call, call.state, call.given

    def has_matrices(self, name: str) -> bool:
        """Whether there is a weight of two or more axes in a module."""
        return any(p.ndim > 1 for p in self.modules[name].parameters())

    def states(self, seed: int, count: int) -> list[Tensor]:
        """Random hidden states for the layer."""
        generator, like = torch.Generator().manual_seed(seed), self.call.state
        assert like is not None
        return [torch.randn(like.shape, generator=generator).to(like.dtype) for _ in range(count)]

    def vectors(self, seed: int) -> Tensor:
        """A random unit vector, (D,)."""
        generator = torch.Generator().manual_seed(seed)
        found = torch.randn(self.width, generator=generator, dtype=torch.float64)
        unit: Tensor = found / found.norm()
        return unit.to(self.given.dtype)

    def shift(self, name: str, vector: Tensor) -> Tensor:
        """The change of the residual stream, (..., D), if a vector is added to a module's output.

        All other modules with matrices keep their original outputs. The stream is the output of the
        layer, or, if a norm makes that output, the input of the norm.
        """
        changes = self._pinned(name)
        changes[self.modules[name]] = lambda output: _replaced(output, lambda x: x + vector)
        found: list[Tensor] = []

        def see(module: nn.Module, args: Any, output: Any) -> None:
            found.append(args[0].clone())

        with ExitStack() as stack:
            if self._end is not None:
                stack.callback(self._end.register_forward_hook(see).remove)
            given = self._run(changes)
        if self._end is None:
            return given - self.given
        before = self.calls[self._end][-1].state
        assert before is not None
        return found[-1] - before

    def writes(self, name: str) -> bool:
        """Whether a module's output is added to the residual stream, up to a factor."""
        vector = self.vectors(2) * self.width**0.5
        return self.moves(name) and is_multiple(self.shift(name, vector), vector, self.tolerance)

    def moves(self, name: str) -> bool:
        """Whether a module's output reaches the residual stream other than through modules with
        matrices.
        """
        if not self.gives_width(name):
            return False
        return bool(self.shift(name, self.vectors(2)).abs().max() > 1e-9)

    def gives_width(self, name: str) -> bool:
        """Whether a module is called once and returns (..., D)."""
        call = self.only_call(name)
        return call is not None and call.given is not None and call.given.shape[-1] == self.width

    def reached_by(self, name: str) -> bool:
        """Whether the layer's output depends in any way on a module's output."""
        if not self.gives_width(name):
            return False
        moved = self.given_after(name, self.vectors(2)) - self.given
        return bool(moved.abs().max() > self.noise(self.given))

    def given_after(self, name: str, vector: Tensor) -> Tensor:
        """The layer's output if a vector is added to a module's output, with all later effects."""
        changes = {self.modules[name]: lambda output: _replaced(output, lambda x: x + vector)}
        return self._run(changes)

    def moves_within(self, name: str, outer: str) -> bool:
        """Whether a module's output reaches that of a surrounding module other than through modules
        with matrices.
        """
        _, _, given = self.alone(outer)
        vector = self.vectors(2)
        changes = self._pinned(name)
        changes[self.modules[name]] = lambda output: _replaced(output, lambda x: x + vector)
        after = self._given_by(outer, changes)
        return bool((after - given).abs().max() > self.noise(given))

    def feeds(self, name: str, other: str) -> bool:
        """Whether a module's output reaches another module other than through modules with
        matrices.
        """
        calls = self.calls[self.modules[other]]
        before = calls[-1].state if calls else None
        if before is None:
            return False
        vector, changes = self.vectors(2), self._pinned(name)
        changes[self.modules[name]] = lambda output: _replaced(output, lambda x: x + vector)
        return not torch.equal(self._fed(other, changes), before)

    def mixer_around(self, name: str) -> str | None:
        """The innermost module around one that mixes positions."""
        outer = name.rpartition(".")[0]
        while outer:
            if self.mixes(outer):
                return outer
            outer = outer.rpartition(".")[0]
        return None

    def mixes(self, name: str) -> bool:
        """Whether a module maps (..., D) to (..., D) and mixes positions."""
        return self.is_through(name) and not self.is_position_wise(name)

    def is_position_wise(self, name: str) -> bool:
        """Whether a module's output at a position depends only on its input there.

        Attention may put all its weight on one position, so that a change at another has no effect.
        So small states are tried, which spread the weight, and small and large shifts.
        """
        if name not in self._alone:
            self._alone[name] = self.is_through(name) and self._found_alone(name)
        return self._alone[name]

    def is_through(self, name: str) -> bool:
        """Whether a module is called once, from D to D numbers for each position."""
        if not self.only_call(name):
            return False
        _, state, given = self.alone(name)
        return state.shape[-1] == given.shape[-1] == self.width and state.numel() == given.numel()

    def _found_alone(self, name: str) -> bool:
        (call, given, _), module = self.alone(name), self.modules[name]
        generator = torch.Generator().manual_seed(4)
        noise = torch.randn(given.shape, generator=generator, dtype=torch.float64)
        moves = False
        for state in (given, 0.1 * noise.to(given.dtype)):
            before = call.again(module, state)
            for position, size in product((0, -1), (0.1, 1.0, 30.0)):
                shift = torch.zeros_like(state).reshape(-1, self.width)
                shift[position] = self.vectors(3) * size * self.width**0.5
                after = call.again(module, state + shift.reshape(state.shape))
                moved = (after - before).reshape(-1, self.width).abs().amax(-1)
                moves = moves or bool(moved[position] > 0)
                moved[position] = 0
                if moved.max() > max(self.noise(before), self.noise(after)):
                    return False
        return moves and self._is_same_everywhere(name)

    def _is_same_everywhere(self, name: str) -> bool:
        """Whether a module commutes with a permutation of positions. Attention to another layer's
        cache, or to an encoder, does not.
        """
        call, _, given = self.alone(name)
        after = self.reordered(call).again(self.modules[name]).reshape(given.shape)
        moved = (after - self.reorder(given)).abs().max()
        return bool(moved <= self.tolerance * given.abs().max())

    def reordered(self, call: Call) -> Call:
        """A call with the positions in another order."""

        def reorder(value: Any) -> Any:
            if isinstance(value, Tensor):
                return self.reorder(value)
            if type(value) in (tuple, list):
                return type(value)(map(reorder, value))
            return {k: reorder(v) for k, v in value.items()} if type(value) is dict else value

        return Call(reorder(call.args), reorder(call.kwargs), None)

    def reorder(self, tensor: Tensor) -> Tensor:
        """A tensor whose first axis, or first two axes, run over positions, permuted; else the same
        tensor.
        """
        order = torch.randperm(self.positions.numel(), generator=torch.Generator().manual_seed(6))
        if tensor.shape[:2] == self.positions:
            return tensor.flatten(0, 1)[order].reshape(tensor.shape)
        return tensor[order] if tensor.ndim and len(tensor) == len(order) else tensor

    def is_affine(self, name: str, silent: Iterable[str] = ()) -> bool:
        """Whether a module is a linear map plus a vector.

        Norms in it keep their factors, and modules in ``silent`` return zeros.
        """
        call, state, _ = self.alone(name)
        changes = {self.modules[other]: _silent for other in silent}
        inside = [other for other in self.modules if other.startswith(f"{name}.")]
        return self._is_affine(self.modules[name], call, state, changes, inside)

    def is_affine_but_for(self, names: Iterable[str]) -> bool:
        """Whether the layer is a linear map plus a vector, if the given modules keep their outputs
        and norms keep their factors.
        """
        changes = {
            self.modules[name]: _giving(
                [call.output for call in self.calls[self.modules[name]]] * 4
            )
            for name in names
        }
        assert self.call.state is not None
        return self._is_affine(self.block, self.call, self.call.state, changes, self.modules)

    def _is_affine(
        self,
        module: nn.Module,
        call: Call,
        state: Tensor,
        changes: Mapping[nn.Module, Change],
        inside: Iterable[str],
    ) -> bool:
        with ExitStack() as stack:
            for other, change in changes.items():
                stack.callback(other.register_forward_hook(_hook(change)).remove)
            for name in inside:
                if self.modules[name] not in changes and self.is_norm(name):
                    hook = _keeping_factor(self.calls[self.modules[name]][0])
                    stack.callback(self.modules[name].register_forward_hook(hook).remove)
            nothing = call.again(module, torch.zeros_like(state))
            one = call.again(module, state) - nothing
            other_one = call.again(module, state.flip(0, -1)) - nothing
            both = call.again(module, state + state.flip(0, -1)) - nothing
        largest = max(float(both.abs().max()), self.noise(nothing))
        return bool((both - one - other_one).abs().max() <= self.tolerance * largest)

    def is_norm(self, name: str) -> bool:
        """Whether a module without matrices gives the same output for a scaled input."""
        call, module = self.only_call(name), self.modules[name]
        if call is None or self.has_matrices(name) or len(call.args) + len(call.kwargs) != 1:
            return False
        state, given = call.state, call.given
        if state is None or given is None or state.shape != given.shape or not state.any():
            return False
        state = state / state.pow(2).mean().sqrt()
        once, thrice = call.again(module, state), call.again(module, 3 * state)
        return bool((once - thrice).abs().max() <= 1e-3 * once.abs().max())

    def linear_maps(self, inside: str = "") -> list[str]:
        """Modules with one matrix, none in submodules, that are called once."""
        return [
            name
            for name, module in self.modules.items()
            if (not inside or name == inside or name.startswith(f"{inside}."))
            and not any(True for _ in module.children())
            and isinstance(weight := getattr(module, "weight", None), Tensor)
            and weight.ndim == 2
            and self.only_call(name)
        ]

    def fed(self, name: str, given: Mapping[str, Tensor], state: Tensor | None = None) -> Tensor:
        """The input of a module if other modules' outputs, or the layer's input, are replaced."""
        return self._fed(name, self._giving(given), state)

    def _fed(
        self, name: str, changes: Mapping[nn.Module, Change], state: Tensor | None = None
    ) -> Tensor:
        found: list[Tensor | None] = []

        def see(module: nn.Module, args: Any, kwargs: Any) -> None:
            found.append(_copied(Call(args, kwargs, None).state))

        hook = self.modules[name].register_forward_pre_hook(see, with_kwargs=True)
        return self._seen(hook, found, changes, state)

    def given_by(
        self, name: str, given: Mapping[str, Tensor] | None = None, state: Tensor | None = None
    ) -> Tensor:
        """The output of a module if other modules' outputs, or the layer's input, are replaced."""
        return self._given_by(name, self._giving(given or {}), state)

    def _given_by(
        self, name: str, changes: Mapping[nn.Module, Change], state: Tensor | None = None
    ) -> Tensor:
        found: list[Tensor | None] = []

        def see(module: nn.Module, args: Any, output: Any) -> None:
            found.append(_copied(first_tensor(output)))  # before the layer changes it

        hook = self.modules[name].register_forward_hook(see)
        return self._seen(hook, found, changes, state)

    def _seen(
        self,
        hook: Any,
        found: list[Tensor | None],
        changes: Mapping[nn.Module, Change],
        state: Tensor | None = None,
    ) -> Tensor:
        """The last value that a hook saw."""
        try:
            self._run(changes, state)
        finally:
            hook.remove()
        seen = found[-1]
        assert seen is not None
        return seen

    def _giving(self, given: Mapping[str, Tensor]) -> dict[nn.Module, Change]:
        """Changes that replace modules' output tensors, and keep their other outputs."""

        def change(tensor: Tensor) -> Change:
            return lambda output: _replaced(output, lambda _: tensor)

        return {self.modules[name]: change(tensor) for name, tensor in given.items()}

    def noise(self, values: Tensor) -> float:
        """The largest change of values by rounding."""
        return 1e3 * torch.finfo(values.dtype).eps * float(values.abs().max())

    def _run(self, changes: Mapping[nn.Module, Change], state: Tensor | None = None) -> Tensor:
        with ExitStack() as stack:
            for module, change in changes.items():
                hook = _hook(change)
                stack.callback(module.register_forward_hook(hook).remove)
            return self.call.again(self.block, state)

    def _pinned(self, name: str) -> dict[nn.Module, Change]:
        """Changes that hold the outputs of all modules with matrices, except those inside or around
        a given one.
        """
        return {
            module: _giving([call.output for call in self.calls[module]])
            for other, module in self.modules.items()
            if self.calls[module] and self.has_matrices(other) and not related(name, other)
        }

    def _norm_at_end(self) -> nn.Module | None:
        """The norm whose output is the layer's output."""
        for name, module in self.modules.items():
            if self.is_norm(name):
                given = self.calls[module][0].given
                if given is not None and torch.equal(given, self.given):
                    return cast(nn.Module, module)
        return None


def related(name: str, other: str) -> bool:
    """Whether two modules are the same, or one is in the other."""
    return name == other or name.startswith(f"{other}.") or other.startswith(f"{name}.")


def is_multiple(shift: Tensor, vector: Tensor, tolerance: float) -> bool:
    """Whether every vector (..., D) of ``shift`` is a multiple of a given one, and not all are
    zero.
    """
    unit = vector / vector.norm()
    along = shift @ unit
    rest = (shift - along.unsqueeze(-1) * unit).abs().max()
    largest = float(along.abs().max())
    return largest > 1e-9 and float(rest) <= tolerance * largest


def _giving(outputs: list[Any]) -> Change:
    """A hook that replays outputs in order, as copies, which a layer may add to in place."""
    left: Iterator[Any] = iter(outputs)
    return lambda output: _copied(next(left, outputs[-1]))


def _silent(output: Any) -> Any:
    """The output with zeros as its first tensor."""
    return _replaced(output, torch.zeros_like)


@contextmanager
def silenced(module: nn.Module) -> Iterator[None]:
    """Within this context, the first tensor of a module's output is zeros."""
    handle = module.register_forward_hook(_hook(_silent))
    try:
        yield
    finally:
        handle.remove()


def _replaced(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same output with another first tensor."""
    if isinstance(output, (tuple, list)):
        return type(output)((_replaced(output[0], change), *output[1:]))
    return change(output)


def _keeping_factor(call: Call) -> Any:
    """A hook that makes a module multiply each number by its original factor."""
    state, given = call.state, call.given
    assert state is not None
    assert given is not None
    factor = given / torch.where(state == 0, torch.ones_like(state), state)
    return lambda module, args, output: (args[0] if args else output) * factor


def _hook(change: Change) -> Any:
    return lambda module, args, output: change(output)
