"""Compare two checkpoints, tensor by tensor, or two manifests."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from io import RawIOBase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from converter.checkpoints.names import EDIT_FILE, OURS
from converter.checkpoints.plan import locate_tensors, make_plan
from converter.checkpoints.resolve import resolve
from converter.checkpoints.safetensors.direct_writer import BUFFER
from converter.checkpoints.safetensors.header import FLOATS, TensorInfo, read_exactly
from converter.checkpoints.source import Source
from converter.checkpoints.weights import Weight
from converter.edits.edit_file import load_spans
from converter.edits.spectrum import Place, spectrum
from converter.entrypoints.diff_manifests import are_manifests, diff_manifests
from converter.errors import ConverterError
from converter.runtime import progress
from converter.runtime.cache import sha256_of

_GENERATED = tuple(sorted(OURS))
"""Files that a conversion adds to a checkpoint."""


@dataclass(slots=True)
class _Side:
    """One of two checkpoints.

    Attributes:
        source: of it.
        files: the files without tensors of the model, by name.
        tensors: name -> shard and entry.
        targets: name -> down-projection, if the architecture is known.
        opened: the last shard that was read.
    """

    source: Source
    files: dict[str, Path]
    tensors: dict[str, tuple[str, TensorInfo]]
    targets: dict[str, Weight]
    opened: dict[str, RawIOBase] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str) -> "_Side":
        """From headers, small files and extras. Raises SourceError or CheckpointError."""
        source = resolve(name)
        if (remote := source.remote) and remote.sizes:
            own = (source.inside + name for name in _GENERATED)
            remote.download([name for name in own if name in remote.sizes])
        made = [name for name in _GENERATED if (source.folder / name).is_file()]
        names = (*source.companions, *source.extras, *source.drawn, *made)
        source.fetch(source.extras)
        headers = source.headers()
        targets: dict[str, Weight] = {}
        with suppress(ConverterError):  # an architecture that cannot be edited can be compared
            plan = make_plan(source.config, source.weight_map, headers, source.folder)
            targets = {target.info.name: target for target in plan.targets}
        return cls(
            source=source,
            files={name: source.folder / name for name in names},
            tensors=locate_tensors(source.weight_map, headers),
            targets=targets,
        )

    def place(self, name: str) -> Place:
        """A tensor; its file stays open until another shard is read."""
        shard, info = self.tensors[name]
        if shard not in self.opened:
            self.close()
            self.opened[shard] = self.source.open(shard)
        return Place(self.opened[shard], info)

    def close(self) -> None:
        for file in self.opened.values():
            file.close()
        self.opened.clear()


def diff_checkpoints(a: str, b: str, subspace: Path | None = None) -> dict[str, Any]:
    """Compare two checkpoints by content, however they are sharded.

    Tensors are compared in blocks of bytes. Tensors that differ are read twice more.

    Args:
        a, b: anything that can be converted; the change is b minus a.
        subspace: a file of bases; by default that of b, or of a, if there is one.

    Returns:
        ``equal``, ``only_in_a``, ``only_in_b``, ``changed`` tensors and ``files``.

    Raises:
        ConverterError: one of them cannot be read.
    """
    one, two = _Side.of(a), _Side.of(b)
    place = subspace or two.files.get(EDIT_FILE) or one.files.get(EDIT_FILE)
    bases = _spans(load_spans(place)) if place else {}
    changed: list[dict[str, Any]] = []
    total = sum(info.nbytes for _, info in one.tensors.values())
    try:
        with progress.bar("compare", total, "B") as bar:
            for name, (_, info) in one.tensors.items():
                if name in two.tensors:
                    target = one.targets.get(name) or two.targets.get(name)
                    changed += _compare(one.place(name), two.place(name), target, bases)
                bar.update(info.nbytes)
    finally:
        one.close()
        two.close()
    tensors, files = _only_in(one.tensors, two.tensors), _only_in(one.files, two.files)
    files["changed"] = sorted(
        name
        for name in progress.each(one.files.keys() & two.files.keys(), "compare files", "file")
        if sha256_of(one.files[name]) != sha256_of(two.files[name])
    )
    return {
        "a": one.source.name,
        "b": two.source.name,
        "equal": not any((changed, *tensors.values(), *files.values())),
        "tensors": {"a": len(one.tensors), "b": len(two.tensors)},
        "subspace": place.name if place else None,
        **tensors,
        "changed": changed,
        "files": files,
    }


def _only_in(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, list[str]]:
    """The names that only one of the two has."""
    return {"only_in_a": sorted(a.keys() - b.keys()), "only_in_b": sorted(b.keys() - a.keys())}


def _spans(bases: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Orthonormal columns with the same spans, float64, since a file may hold any columns."""
    return {
        name: torch.linalg.qr(U.double()).Q
        for name, U in bases.items()
        if U.ndim == 2 and U.is_floating_point() and 0 < U.shape[1] <= U.shape[0]
    }


def _compare(
    before: Place, after: Place, target: Weight | None, bases: Mapping[str, Tensor]
) -> Iterator[dict[str, Any]]:
    """The difference of two tensors of one name; None if they are equal."""
    old, new = before.info, after.info
    alike = (old.dtype, old.shape) == (new.dtype, new.shape)
    if alike and _same_bytes(before, after):
        return
    entry: dict[str, Any] = {
        "name": old.name,
        "shape": [list(old.shape), list(new.shape)],
        "dtype": [old.dtype, new.dtype],
        "measured": None,
    }
    if old.shape == new.shape and old.nbytes and {old.dtype, new.dtype} <= set(FLOATS):
        basis, axis = _basis_for(old, target, bases)
        entry["measured"] = asdict(spectrum(before, after, basis, axis))
    yield entry


def _basis_for(
    info: TensorInfo, target: Weight | None, bases: Mapping[str, Tensor]
) -> tuple[Tensor | None, int | None]:
    """The basis that may have been removed from a tensor, and its axis.

    For a down-projection both are known. For another tensor it is a shared basis, along the last
    axis but one (the outputs of a Linear layer), or else the last, if the length fits.
    """
    if target is not None:
        basis = bases.get("U", bases.get(f"U.{target.layer}"))
        fits = basis is not None and info.shape[target.axis] == len(basis)
        return (basis, target.axis) if fits else (None, None)
    basis, end = bases.get("U"), len(info.shape)
    for axis in (end - 2, end - 1):
        if basis is not None and axis >= 0 and info.shape[axis] == len(basis) and end < 4:
            return basis, axis
    return None, None


def _same_bytes(before: Place, after: Place) -> bool:
    """Whether two tensors of one length have the same bytes. It stops at the first difference."""
    for start in range(0, before.info.nbytes, BUFFER):
        count = min(BUFFER, before.info.nbytes - start)
        read = []
        for place in (before, after):
            place.file.seek(place.info.start + start)
            read.append(read_exactly(place.file, count, place.info.name))
        if read[0] != read[1]:
            return False
    return True


def diff(a: str, b: str, subspace: Path | None = None) -> dict[str, Any]:
    """Compare two checkpoints, or two manifests, which are files of JSON.

    Raises:
        OptionError: one of each.
        ConverterError: see the two functions above.
    """
    if not are_manifests(a, b, subspace):
        return diff_checkpoints(a, b, subspace)
    return diff_manifests(Path(a), Path(b))
