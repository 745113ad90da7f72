"""The memory of a streamed model: parts of its weights, and hidden states up to a limit."""

import tempfile
from collections.abc import Collection, Hashable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from converter.checkpoints.formats.virtual import VirtualTensor
from converter.checkpoints.safetensors.header import read_exactly, to_bytes
from converter.errors import CheckpointError, SourceError
from converter.models.transformers_loader import LazyTensor, PartLoader


class Weights:
    """Loads and drops a model's weights part by part.

    A part is a decoder layer, or the own weights of one module outside of the layers: the
    embedding, the last norm, the head. transformers makes a part from tensors of the checkpoint; it
    renames, splits and fuses them by rules for each architecture. A weight that two modules share
    belongs to the one under whose name the checkpoint has it.

    Args:
        module: from ``transformers_loader``. Its weights are on the meta device, and return to it
            when their part is dropped.
        recipes: make the tensors of the checkpoint, by name.
        blocks: names of the decoder layers.

    Attributes:
        loaded: the parts in memory.
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
            if key not in self._meta:  # not a weight: a table of frequencies, or the like
                self._set(key, buffer.to(device))
        self._loader = PartLoader(module, dtype, device)
        self._sources = self._find_sources(set(blocks))
        self._keys = self._find_keys(set(blocks))
        self._coming: dict[str, Future[dict[str, Tensor]]] = {}
        self._side: Any = None  # a stream and a thread, on a GPU

    def _find_sources(self, blocks: set[str]) -> dict[str, list[str]]:
        """Part -> its tensors in the checkpoint; some tensors make nothing."""
        found: dict[str, list[str]] = {}
        for name in self._recipes:
            if (key := self._loader.weight_of(name)) is not None:
                found.setdefault(_part_of(key, blocks), []).append(name)
        return found

    def _find_keys(self, blocks: set[str]) -> dict[str, list[str]]:
        """Part -> its weights in the model, by all of their names."""
        groups: dict[int, list[str]] = {}
        for key, tensor in self._meta.items():
            groups.setdefault(id(tensor), []).append(key)
        found: dict[str, list[str]] = {}
        for keys in groups.values():
            parts = [_part_of(key, blocks) for key in keys]
            home = next((part for part in parts if part in self._sources), parts[0])
            found.setdefault(home, []).extend(keys)
        return found

    def parts_of(self, module: str) -> set[str]:
        """The parts that hold a module's own weights."""
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
        """Read a part, unless it is loaded.

        Raises:
            CheckpointError: it cannot be read, or contradicts its header.
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

    def drop(self, *parts: str) -> None:
        """Release parts."""
        for part in self.loaded.intersection(parts):
            self.loaded.remove(part)
            for key in self._keys[part]:
                self._set(key, self._meta[key])

    def drop_all(self, but: Collection[str] = ()) -> None:
        """Release all parts except some, including those that are being copied."""
        self._coming.clear()
        self.drop(*self.loaded.difference(but))

    def expect(self, part: str) -> None:
        """Start copying a part to the GPU while it computes; on the CPU do nothing.

        On the CPU memory is the limit, and a waiting part would double it.
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


def _part_of(key: str, blocks: set[str]) -> str:
    """The part that a weight of the model is in by its name: its layer, or else its module."""
    owner = place = key.rpartition(".")[0]
    while place:
        if place in blocks:
            return place
        place = place.rpartition(".")[0]
    return owner


class HiddenStates:
    """A store of tensors by name.

    Tensors beyond ``limit`` bytes go to an unnamed file in ``folder``, which is only made if
    needed. It is read and written with plain calls, since a mapped file would count as memory if
    the address space is limited. A name keeps its place, so that the states of a layer replace
    those of the layer before.

    Attributes:
        filed: bytes in the file.
    """

    def __init__(self, limit: int, folder: Path) -> None:
        self.left, self.folder, self.filed = limit, folder, 0
        self._held: dict[Hashable, Tensor] = {}
        self._places: dict[Hashable, tuple[int, torch.Size, torch.dtype]] = {}
        self._file: FileIO | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *reason: object) -> None:
        self._held.clear()
        if self._file is not None:
            self._file.close()

    def put(self, name: Hashable, tensor: Tensor) -> None:
        """Keep a tensor in the place of the last one of this name, which must have the same size.

        Raises:
            SourceError: the disk is full.
        """
        tensor = tensor.detach().cpu().contiguous()
        if name not in self._held and name not in self._places:
            if tensor.nbytes <= self.left:
                self.left -= tensor.nbytes
            else:
                self._places[name] = self.filed, tensor.shape, tensor.dtype
                self.filed += tensor.nbytes
        if name not in self._places:
            self._held[name] = tensor
            return
        view = to_bytes(tensor)
        try:
            if self._file is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._file = tempfile.TemporaryFile(dir=self.folder, buffering=0)  # noqa: SIM115
            self._file.seek(self._places[name][0])
            while view:
                view = view[self._file.write(view) :]
        except OSError as error:
            raise SourceError(
                f"hidden states of {self.filed / 1e9:.1f} GB do not fit on the disk of the cache",
                found=error.strerror,
                hint="give --cache-dir on a larger disk, or fewer pairs: --num-pairs",
            ) from error

    def get(self, name: Hashable, device: str) -> Tensor:
        """The tensor of a name, on a device."""
        if name in self._held:
            return self._held[name].to(device)
        assert self._file is not None
        start, shape, dtype = self._places[name]
        self._file.seek(start)
        data = read_exactly(self._file, shape.numel() * dtype.itemsize, "of the hidden states")
        return torch.frombuffer(data, dtype=dtype).reshape(shape).to(device)

    def drop(self, name: Hashable) -> None:
        """Remove a tensor, and free its place in memory."""
        if name in self._held:
            self.left += self._held.pop(name).nbytes
