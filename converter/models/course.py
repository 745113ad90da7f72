"""Keep the hidden states of a streamed pass now and then, so that a stopped run can continue it."""

from collections.abc import Mapping, Sequence
from time import monotonic

import torch

from converter.models.pieces import Pieces
from converter.models.streamed_memory import HiddenStates

_EVERY = 60.0
"""The least seconds between two layers that are kept; a stopped run loses a layer more."""


class Course:
    """The hidden states before one layer of a pass from the lowest layer to the highest.

    Args:
        pieces: of the run; None to keep nothing.
        names: of the batches, each under its edit.
        place: the layer under which ``HiddenStates`` has the states of the batches.
    """

    def __init__(self, pieces: Pieces | None, names: Sequence[str], place: int) -> None:
        self._pieces, self._names, self._place = pieces, names, place
        self._last = monotonic()
        self._kept: int | None = None

    def resumed(self, layers: range, states: HiddenStates, lengths: dict[int, int]) -> range:
        """The layers that are left to run, after those of a stopped run.

        Args:
            layers: to run.
            states: get the input of the first layer that is left, if layers were run.
            lengths: get those of the layers below; see ``hooks.Entered``.
        """
        for layer in range(layers.stop, layers.start, -1) if self._pieces else ():
            names = self._at(layer)
            if self._pieces and all(name in self._pieces for name in names):
                for number, name in enumerate(names):
                    found = self._pieces.get(name)
                    states.put((self._place, number), found["state"])
                    lengths |= {int(n): int(length) for n, length in found["lengths"]}
                self._kept = layer
                return range(layer, layers.stop)
        return layers

    def keep(self, layer: int, states: HiddenStates, lengths: Mapping[int, int]) -> None:
        """Keep the states before a layer, if it is time. Earlier ones are deleted."""
        if self._pieces is None or monotonic() - self._last < _EVERY:
            return
        known = torch.tensor([*lengths.items()], dtype=torch.int64)
        for number, name in enumerate(self._at(layer)):
            state = states.get((self._place, number), "cpu")
            self._pieces.put(name, {"state": state, "lengths": known})
        self.drop()
        self._last, self._kept = monotonic(), layer

    def drop(self) -> None:
        """Delete what is kept."""
        if self._pieces is not None and self._kept is not None:
            for name in self._at(self._kept):
                self._pieces.drop(name)
            self._kept = None

    def _at(self, layer: int) -> list[str]:
        return [f"{name}.{layer}" for name in self._names]
