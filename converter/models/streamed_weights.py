"""The weights of a model of which only a part is in memory at a time."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from converter.checkpoints.formats.virtual import VirtualTensor
from converter.errors import CheckpointError
from converter.models.transformers_loader import LazyTensor, PartLoader


class Weights:
    """Loads and drops a model's weights part by part.

    A part is a decoder layer, or what one module outside of them holds itself: the embedding, the
    last norm, the head. Which tensors of the checkpoint a part is made from, and how, is for
    transformers to say, which renames, splits and fuses tensors by rules for each architecture. A
    weight that two modules share belongs to the one under whose name the checkpoint has it.

    Args:
        module: from ``loading.load_skeleton``. Its weights are on the meta device, and return to it
            when their part is dropped.
        recipes: make the tensors of the checkpoint, by name.
        blocks: names of the decoder layers.
        dtype: of the weights in memory.
        device: where to.

    Attributes:
        loaded: the parts that are in memory now.
    """

    def __init__(
        self,
        module: Any,
        recipes: Mapping[str, VirtualTensor],
        blocks: Sequence[str],
        dtype: torch.dtype,
        device: str,
    ) -> None:
        self.module = module
        self.loaded: set[str] = set()
        self._recipes, self._device = recipes, device
        self._meta: dict[str, Tensor] = module.state_dict(keep_vars=True)
        for key, buffer in list(module.named_buffers()):
            if key not in self._meta:  # no weight: a table of frequencies, or the like
                self._set(key, buffer.to(device))
        self._loader = PartLoader(module, dtype, device)
        self._sources = self._find_sources(set(blocks))
        self._keys = self._find_keys(set(blocks))
        self._coming: dict[str, Future[dict[str, Tensor]]] = {}
        self._side: Any = None  # a stream and a thread, on a GPU

    def _find_sources(self, blocks: set[str]) -> dict[str, list[str]]:
        """Part -> the tensors of the checkpoint that it is made from; some make nothing."""
        found: dict[str, list[str]] = {}
        for name in self._recipes:
            if (key := self._loader.weight_of(name)) is not None:
                found.setdefault(part_of(key, blocks), []).append(name)
        return found

    def _find_keys(self, blocks: set[str]) -> dict[str, list[str]]:
        """Part -> the weights of the model that it loads, by all of their names."""
        groups: dict[int, list[str]] = {}
        for key, tensor in self._meta.items():
            groups.setdefault(id(tensor), []).append(key)
        found: dict[str, list[str]] = {}
        for keys in groups.values():
            parts = [part_of(key, blocks) for key in keys]
            home = next((part for part in parts if part in self._sources), parts[0])
            found.setdefault(home, []).extend(keys)
        return found

    def parts_of(self, module: str) -> set[str]:
        """The parts that what a module holds itself is in."""
        return {
            part
            for part, keys in self._keys.items()
            if any(key.rpartition(".")[0] == module for key in keys)
        }

    def nbytes(self, part: str) -> int:
        """Bytes of a part in memory."""
        tensors = {id(self._meta[key]): self._meta[key] for key in self._keys[part]}
        return sum(tensor.nbytes for tensor in tensors.values())

    @property
    def parts(self) -> list[str]:
        """All of them."""
        return list(self._keys)

    def load(self, part: str) -> None:
        """Read a part, unless it is there.

        Raises:
            CheckpointError: it cannot be read, or is not what its header said.
        """
        if part in self.loaded:
            return
        names = self._sources.get(part, [])
        tensors: dict[str, Any] = {name: LazyTensor(self._recipes[name]) for name in names}
        if part in self._coming:
            tensors = dict(self._coming.pop(part).result())
            torch.cuda.current_stream(self._device).wait_stream(self._side[0])
            for tensor in tensors.values():
                tensor.record_stream(torch.cuda.current_stream(self._device))
        self.loaded.add(part)
        problems = self._loader.load(tensors)
        del tensors
        for key in self._keys[part]:
            found = self._get(key)
            if found.is_meta:
                continue
            found.requires_grad_(False)
            for other in self._keys[part]:
                if self._meta[other] is self._meta[key]:
                    self._set(other, found)
        for key in self._keys[part]:
            if self._get(key).is_meta:
                raise CheckpointError(
                    f"the model's {key} cannot be made from the checkpoint",
                    found=problems[0].strip().splitlines()[-1] if problems else "nothing",
                )

    def drop(self, part: str) -> None:
        """Let a part go."""
        if part in self.loaded:
            self.loaded.remove(part)
            for key in self._keys[part]:
                self._set(key, self._meta[key])

    def drop_all(self) -> None:
        """Let all parts go, those too that are on their way."""
        self._coming.clear()
        for part in list(self.loaded):
            self.drop(part)

    def expect(self, part: str) -> None:
        """Begin to copy a part to the GPU, which computes meanwhile; on the CPU do nothing.

        There memory is the point, and a part that waits would double it.
        """
        if self._device == "cpu" or part in self.loaded or part in self._coming:
            return
        if self._side is None:
            stream: Any = torch.cuda.Stream
            self._side = stream(self._device), ThreadPoolExecutor(1)
        stream, thread = self._side

        def copy() -> dict[str, Tensor]:
            with torch.cuda.stream(stream):
                return {
                    name: self._recipes[name]
                    .make()
                    .pin_memory()
                    .to(self._device, non_blocking=True)
                    for name in self._sources.get(part, [])
                }

        self._coming[part] = thread.submit(copy)

    def _get(self, key: str) -> Tensor:
        owner, _, name = key.rpartition(".")
        found: Tensor = getattr(self.module.get_submodule(owner), name)
        return found

    def _set(self, key: str, tensor: Tensor) -> None:
        owner, _, name = key.rpartition(".")
        setattr(self.module.get_submodule(owner), name, tensor)


def part_of(key: str, blocks: set[str]) -> str:
    """The part that a weight of the model is in by its name: its layer, or else its module."""
    owner = place = key.rpartition(".")[0]
    while place:
        if place in blocks:
            return place
        place = place.rpartition(".")[0]
    return owner
