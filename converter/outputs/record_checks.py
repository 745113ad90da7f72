"""What verifying any output needs: the subspace, and the source, against what the manifest says."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from converter.checkpoints.names import MANIFEST
from converter.checkpoints.source import Source
from converter.edits.subspace_file import basis_name, load_bases, load_tensors
from converter.errors import VerificationError
from converter.manifest import Manifest
from converter.runtime.cache import sha256_of
from converter.text.sanitize import is_one_line

ORTHONORMAL = 1e-5
"""How far U^T U may be from the identity; float32 rounding leaves less than 1e-6."""

LONGEST_NAME = 255
"""Bytes of the name of a file, on every usual system."""

LAYERS = ("edit_layers", "layers")
"""Options of methods that say which layers are edited, the first that is there."""


def edited_layers(manifest: Manifest) -> tuple[int, ...]:
    """The layers that the method was to edit."""
    options = manifest.method.options
    listed = next((options[key] for key in LAYERS if options.get(key)), ())
    return listed if isinstance(listed, tuple) else ()


def recorded_bases(folder: Path, manifest: Manifest) -> dict[str, Tensor]:
    """The bases of the subspace file, by name.

    Raises:
        VerificationError: it cannot be read, lacks one that an edited tensor has, or one is not a
            float32 of shape (D, R), R at least 1.
    """
    name, width = manifest.subspace.file, manifest.subspace.hidden_size
    bases = load_bases(folder / name)
    if lacking := {entry.basis for entry in manifest.edited} - set(bases):
        raise VerificationError(f"{name}: holds no {', '.join(sorted(lacking))}")
    for label, basis in bases.items():
        if not is_basis(basis, width):
            found = f"{str(basis.dtype).removeprefix('torch.')} {list(basis.shape)}"
            raise VerificationError(f"{name}: {label} is {found}, not float32 [{width}, R]")
    return bases


def is_basis(tensor: Tensor, width: int) -> bool:
    """Whether it may be a U (D, R) of D dimensions, by dtype and shape."""
    fits = tensor.ndim == 2 and tensor.shape[0] == width and 0 < tensor.shape[1] <= width
    return fits and tensor.dtype == torch.float32


def check_subspace(folder: Path, manifest: Manifest, bases: Mapping[str, Tensor]) -> Iterator[str]:
    """The columns of each basis must be orthonormal, and all be as the manifest says.

    Args:
        folder: with the subspace's file.
        manifest: of it.
        bases: of ``recorded_bases``.
    """
    about = manifest.subspace
    for label, basis in bases.items():
        error = (basis.T @ basis - torch.eye(basis.shape[1])).abs().max()
        if not error <= ORTHONORMAL:
            yield f"{about.file}: {label} is not orthonormal: U^T U is off by {error:.1e}"
    for entry in manifest.edited:
        if entry.basis != basis_name(entry.layer, shared=about.shared):
            yield f"{MANIFEST}: tensor {entry.name} is recorded with basis {entry.basis}"
    if set(bases) - {entry.basis for entry in manifest.edited}:
        yield f"{about.file}: holds a basis that nothing was edited with"
    if about.rank != max((basis.shape[1] for basis in bases.values()), default=0):
        yield f"{about.file}: the rank is not {about.rank}, as recorded"
    candidates = about.candidates
    expected = {
        "scores": torch.tensor([c.score for c in candidates]),
        "score_layers": torch.tensor([c.layer for c in candidates]).float(),
    } | {
        name.replace("U", "singular_values", 1): torch.tensor(values)
        for name, values in about.singular_values.items()
    }
    found = load_tensors(folder / about.file)
    rest = {name for name in found if name not in bases} - {"candidates"}
    for name in sorted(rest | set(expected)):
        ours, theirs = found.get(name), expected.get(name)
        if ours is None or theirs is None or not torch.equal(ours.float(), theirs):
            yield f"{about.file}: {name} is not as recorded"


def check_source_files(
    manifest: Manifest, source: Source, companions: Iterable[str]
) -> Iterator[str]:
    """The files of a source must be those that were read.

    Args:
        manifest: with their digests.
        source: that they may be of.
        companions: those that this output copies.
    """
    for name in sorted({*companions, *source.shards} - set(manifest.files)):
        if name in companions or manifest.run.output != "adapter":
            yield f"{name} of the source is missing from the record of what was converted"
    for name, file in manifest.source.all_files.items():
        path, recorded = place_of(source, name), (file.sha256, file.nbytes)
        if not path.is_file() or (sha256_of(path), path.stat().st_size) != recorded:
            yield f"{name} of the source is not the file that was converted"


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
    if not is_plain(name) or "\\" in name:
        raise VerificationError(
            "the manifest is not one of gloss-convert", expected="names of files in a folder",
            found=name[:80],
        )  # fmt: skip


def is_plain(name: str) -> bool:
    """Whether a name from a manifest is that of a file in its folder, and plain text."""
    path = PurePosixPath(name)
    inside = bool(path.parts) and not path.is_absolute() and ".." not in path.parts
    if not (inside and is_one_line(name) and str(path) == name):
        return False
    return all(len(part.encode()) <= LONGEST_NAME for part in path.parts)
