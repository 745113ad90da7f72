"""Hidden states of many batches between two layers: in memory, and past a limit in a file."""

import tempfile
from collections.abc import Hashable
from io import FileIO
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from converter.checkpoints.safetensors.header import read_exactly, to_bytes
from converter.errors import SourceError


class HiddenStates:
    """Tensors by name, as long as this is open.

    What does not fit under the limit goes to a file without a name, which is read and written with
    plain calls: a mapped file would count as memory where the address space is limited. A name
    keeps its place, so that the states of a layer take that of the layer before.

    Args:
        limit: bytes of tensors to hold in memory.
        folder: for the file, which exists only if it is needed.

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
        """Keep a tensor in the place of the last one of this name, which was as large.

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
        try:
            self._write(self._places[name][0], to_bytes(tensor))
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
        """Forget a tensor; its place in memory, if it had one, is free for others."""
        if name in self._held:
            self.left += self._held.pop(name).nbytes

    def _write(self, start: int, view: memoryview) -> None:
        if self._file is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=self.folder, buffering=0)  # noqa: SIM115
        self._file.seek(start)
        while view:
            view = view[self._file.write(view) :]
