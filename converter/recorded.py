"""What verifying any output needs: the subspace, and the source, against what the manifest says."""

from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from converter.cache import sha256_of
from converter.errors import VerificationError
from converter.source import Source
from converter.subspace import load_bases

ORTHONORMAL = 1e-5
"""How far U^T U may be from the identity; float32 rounding leaves less than 1e-6."""

LAYERS = ("edit_layers", "layers")
"""Options of methods that say which layers are edited, the first that is there."""


def edited_layers(manifest: Mapping[str, Any]) -> tuple[int, ...]:
    """The layers that the method was to edit."""
    options = manifest["method"]["options"]
    return next((tuple(options[key]) for key in LAYERS if options.get(key)), ())


def recorded_bases(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Tensor]:
    """The bases of the subspace file, by name.

    Raises:
        VerificationError: it cannot be read, lacks one that an edited tensor has, or one has not
            the shape (D, R).
    """
    name, width = manifest["subspace"]["file"], manifest["subspace"]["hidden_size"]
    bases = load_bases(folder / name)
    if lacking := {entry["basis"] for entry in manifest["edited"]} - set(bases):
        raise VerificationError(f"{name}: holds no {', '.join(sorted(lacking))}")
    for label, basis in bases.items():
        if basis.ndim != 2 or basis.shape[0] != width:
            found = list(basis.shape)
            raise VerificationError(f"{name}: {label} has shape {found}, not ({width}, R)")
    return bases


def check_bases(name: str, bases: Mapping[str, Tensor]) -> Iterator[str]:
    """The columns of each basis must be orthonormal; ``name`` is that of their file."""
    for label, basis in bases.items():
        error = (basis.T @ basis - torch.eye(basis.shape[1])).abs().max()
        if not error <= ORTHONORMAL:
            yield f"{name}: {label} is not orthonormal: U^T U is off by {error:.1e}"


def check_source_files(manifest: Mapping[str, Any], source: Source) -> Iterator[str]:
    """The files of a source must be those that were read."""
    for name, sha256 in source_files(manifest).items():
        path = place_of(source, name)
        if not path.is_file() or sha256_of(path) != sha256:
            yield f"{name} of the source is not the file that was converted"


def source_files(manifest: Mapping[str, Any]) -> dict[str, str]:
    """The files of the source that were read, and their sha256."""
    entries = {**manifest["source"]["files"], **manifest["source"]["originals"]}
    return {name: entry["sha256"] for name, entry in entries.items()}


def place_of(source: Source, name: str) -> Path:
    """Where a source has a file that a manifest lists.

    Raises:
        VerificationError: the name leads out of it.
    """
    plain_name(name)
    known = {path.name: path for path in source.originals} | source.small
    return known.get(name, source.folder / name)


def plain_name(name: str) -> None:
    """Make sure that a name from a manifest stays in its folder. Raises VerificationError."""
    path = PurePosixPath(name)
    if path.is_absolute() or not path.parts or ".." in path.parts or "\\" in name:
        raise VerificationError(
            "the manifest is not one of gloss-convert", expected="names of files in a folder",
            found=name[:80],
        )  # fmt: skip
