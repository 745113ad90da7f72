"""Experiments on one decoder layer: what a module does, found by changing what it is given or gives.

Nothing here reads a name. A decoder layer is called again and again with what a forward pass called
it with. Shapes: B texts, T tokens, D hidden size; "a position" is one of the B T of them. Adding a
vector at the first position shows whether positions are mixed, since all later ones see it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Change = Callable[[Any], Any]
"""Makes something else of what a module gives."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a module: what it was given, and what it gave."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    @property
    def state(self) -> Tensor | None:
        """The first tensor that it was given, or the one called ``hidden_states``."""
        found = self.args[0] if self.args else self.kwargs.get("hidden_states")
        return found if isinstance(found, Tensor) else None

    @property
    def given(self) -> Tensor | None:
        """The first tensor that it gave."""
        return first_tensor(self.output)

    def again(self, module: nn.Module, state: Tensor | None = None) -> Tensor:
        """What the module gives if it is called in the same way, with another state."""
        args, kwargs = self.args, dict(self.kwargs)
        if state is not None and args:
            args = (state, *args[1:])
        elif state is not None:
            kwargs["hidden_states"] = state
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

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        calls[module].append(Call(_copied(args), _copied(kwargs), _copied(output)))

    with ExitStack() as stack, torch.no_grad():
        for module in calls:
            handle = module.register_forward_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        run()
    return calls


def _copied(value: Any) -> Any:
    """Tensors apart from those that code may change in place."""
    if isinstance(value, Tensor):
        return value.clone()
    if type(value) in (tuple, list):
        return type(value)(map(_copied, value))
    return {k: _copied(v) for k, v in value.items()} if type(value) is dict else value


class Layer:
    """A decoder layer that can be called again.

    Attributes:
        modules: those in it, by name.
        calls: of each, in one pass.
        width: D.
    """

    def __init__(self, block: nn.Module, call: Call, tolerance: float) -> None:
        self.block, self.call, self.tolerance = block, call, tolerance
        self.modules = {name: module for name, module in block.named_modules() if name}
        self.calls = record(self.modules.values(), lambda: call.again(block))
        state, given = call.state, call.given
        assert state is not None and given is not None
        self.width, self.given = state.shape[-1], given
        self._end = self._norm_at_end()

    def only_call(self, name: str) -> Call | None:
        """The call of a module that is called once, and is given and gives tensors."""
        calls = self.calls[self.modules[name]]
        once = len(calls) == 1 and calls[0].state is not None and calls[0].given is not None
        return calls[0] if once else None

    def has_matrices(self, name: str) -> bool:
        """Whether there is a weight of two or more axes in a module."""
        return any(p.ndim > 1 for p in self.modules[name].parameters())

    def vectors(self, seed: int) -> Tensor:
        """A random unit vector, (D,)."""
        generator = torch.Generator().manual_seed(seed)
        found = torch.randn(self.width, generator=generator, dtype=torch.float64)
        return (found / found.norm()).to(self.given.dtype)

    def shift(self, name: str, vector: Tensor) -> Tensor:
        """How the residual stream moves, (..., D), when a vector is added to what a module gives.

        All other modules with matrices give what they gave without it. The stream is what the layer
        gives, or if that comes out of a norm, what the norm is given.
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
        """Whether what a module gives reaches the residual stream as a multiple of it."""
        vector = self.vectors(2) * self.width**0.5
        return self.moves(name) and is_multiple(self.shift(name, vector), vector, self.tolerance)

    def moves(self, name: str) -> bool:
        """Whether what a module gives reaches the residual stream at all, other than by modules
        with matrices."""
        call = self.only_call(name)
        given = call.given if call else None
        if given is None or given.shape[-1] != self.width:
            return False
        return bool(self.shift(name, self.vectors(2)).abs().max() > 1e-9)

    def is_position_wise(self, name: str) -> bool:
        """Whether what a module gives at a position hangs on what it is given there alone."""
        call = self.only_call(name)
        if call is None or call.state is None or call.given is None:
            return False
        state, before = call.state, call.given
        if not state.shape[-1] == before.shape[-1] == self.width or state.numel() != before.numel():
            return False
        shift = torch.zeros_like(state).reshape(-1, self.width)
        shift[0] = self.vectors(3) * self.width**0.5
        after = call.again(self.modules[name], state + shift.reshape(state.shape))
        moved = (after - before).reshape(-1, self.width).abs().amax(-1)
        return bool(moved[0] > 0) and bool(moved[1:].max() <= self._noise(before))

    def is_affine(self, name: str) -> bool:
        """Whether a module is a linear map, and perhaps adds a vector."""
        call = self.only_call(name)
        assert call is not None and call.state is not None
        nothing = call.again(self.modules[name], torch.zeros_like(call.state))
        once = call.again(self.modules[name], call.state) - nothing
        twice = call.again(self.modules[name], 2 * call.state) - nothing
        return bool((twice - 2 * once).abs().max() <= self.tolerance * twice.abs().max())

    def linear_maps(self, inside: str = "") -> list[str]:
        """Modules with one matrix and none in them, that are called once."""
        return [
            name
            for name, module in self.modules.items()
            if (not inside or name == inside or name.startswith(f"{inside}."))
            and not any(True for _ in module.children())
            and isinstance(weight := getattr(module, "weight", None), Tensor)
            and weight.ndim == 2
            and self.only_call(name)
        ]

    def fed(self, name: str, changes: Mapping[str, Change], state: Tensor | None = None) -> Tensor:
        """What a module is given when others give something else, or the layer is given it."""
        found: list[Tensor] = []

        def see(module: nn.Module, args: Any) -> None:
            found.append(args[0].clone())

        handle = self.modules[name].register_forward_pre_hook(see)
        try:
            self._run({self.modules[n]: change for n, change in changes.items()}, state)
        finally:
            handle.remove()
        return found[-1]

    def _noise(self, values: Tensor) -> float:
        """The most by which rounding changes values."""
        return 1e3 * torch.finfo(values.dtype).eps * float(values.abs().max())

    def _run(self, changes: Mapping[nn.Module, Change], state: Tensor | None = None) -> Tensor:
        with ExitStack() as stack:
            for module, change in changes.items():
                hook = _hook(change)
                stack.callback(module.register_forward_hook(hook).remove)
            return self.call.again(self.block, state)

    def _pinned(self, name: str) -> dict[nn.Module, Change]:
        """Have every module with matrices give what it gave, but those that one is in or that are
        in it."""
        return {
            module: _giving([call.output for call in self.calls[module]])
            for other, module in self.modules.items()
            if self.calls[module] and self.has_matrices(other) and not related(name, other)
        }

    def _norm_at_end(self) -> nn.Module | None:
        """The module without matrices that gives what the layer gives, if it has weights."""
        for name, module in self.modules.items():
            calls = self.calls[module]
            if calls and not self.has_matrices(name) and any(True for _ in module.parameters()):
                given = calls[-1].given
                if given is not None and given.shape == self.given.shape:
                    if torch.equal(given, self.given):
                        return module
        return None


def related(name: str, other: str) -> bool:
    """Whether two modules are the same, or one is in the other."""
    return name == other or name.startswith(f"{other}.") or other.startswith(f"{name}.")


def is_multiple(shift: Tensor, vector: Tensor, tolerance: float) -> bool:
    """Whether every vector (..., D) of ``shift`` is a multiple of one, and not all are zero."""
    unit = vector / vector.norm()
    along = shift @ unit
    rest = (shift - along.unsqueeze(-1) * unit).abs().max()
    largest = float(along.abs().max())
    return largest > 1e-9 and float(rest) <= tolerance * largest


def _giving(outputs: list[Any]) -> Change:
    """Give what was given, in the same order."""
    left: Iterator[Any] = iter(outputs)
    return lambda output: next(left, outputs[-1])


def _replaced(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same output with another first tensor."""
    if isinstance(output, (tuple, list)):
        return type(output)((_replaced(output[0], change), *output[1:]))
    return change(output)


def _hook(change: Change) -> Any:
    return lambda module, args, output: change(output)
