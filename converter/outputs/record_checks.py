"""Checks for every output: the edit's file and the source against the manifest."""

from collections.abc import Iterable, Iterator, Mapping
from math import prod
from pathlib import Path

from torch import Tensor

from converter.checkpoints.names import EDIT_FILE, MANIFEST, is_companion, is_plain, plain_name
from converter.checkpoints.resolve import DEMO
from converter.checkpoints.safetensors.header import DTYPES, to_bytes
from converter.checkpoints.source import Source
from converter.checkpoints.weights import Weight
from converter.edits.base import ORTHONORMAL, Edit, skewness
from converter.edits.deltas import Delta, delta_of, misfit_of
from converter.edits.edit_file import ADDED, CREATED, EVIDENCE, load_edit_tensors
from converter.errors import VerificationError
from converter.manifest import EditedTensor, Manifest
from converter.outputs.base import sha256_of_tensor
from converter.runtime.cache import sha256_of


def recorded_edit(folder: Path, manifest: Manifest) -> dict[str, Tensor]:
    """The tensors of an edit's file, by name.

    Raises:
        VerificationError: it cannot be read, or lies outside the folder.
    """
    plain_name(manifest.edit.file)
    return load_edit_tensors(folder / manifest.edit.file)


def delta_of_record(tensor: EditedTensor, stored: Mapping[str, Tensor]) -> Delta:
    """The change of a tensor, from its record and the tensors of the edit's file.

    Raises:
        VerificationError: the file lacks a tensor, or its tensors do not fit.
    """
    what = f"{MANIFEST}: the edit of tensor {tensor.name}"
    if lacking := sorted(set(tensor.tensors.values()) - stored.keys()):
        raise VerificationError(f"{what}: {EDIT_FILE} holds no {', '.join(lacking)}")
    height = tensor.shape[tensor.axis] if tensor.axis < len(tensor.shape) else 0
    width = prod(tensor.shape) // max(height, 1)
    try:
        delta = delta_of(tensor.kind, {key: stored[n] for key, n in tensor.tensors.items()})
        delta.check((height, width))
    except ValueError as error:
        raise VerificationError(f"{what} is none", found=str(error)) from error
    if says := misfit_of(delta, DTYPES.get(tensor.dtype)):
        raise VerificationError(f"{what} is none", found=says)
    return delta


def base_of(manifest: Manifest) -> str | None:
    """Repo id of the base model in card and adapter; None if the run did not know it."""
    demo = DEMO if manifest.run.source == "demo" else None
    return manifest.run.base_model or manifest.source.repo_id or demo


def edit_of(manifest: Manifest, stored: Mapping[str, Tensor]) -> Edit:
    """The recorded edit, with the tensors of ``recorded_edit``.

    Raises:
        VerificationError: the edit's file is not that of the manifest.
    """
    edit = manifest.edit
    created = {tensor.name: CREATED + tensor.name for tensor in edit.created}
    files = {path: ADDED + path for path in edit.files}
    for name, key in [*created.items(), *files.items()]:
        if key not in stored:
            raise VerificationError(f"{edit.file} holds no {name}")
    return Edit(
        {tensor.name: delta_of_record(tensor, stored) for tensor in manifest.edited},
        {name: stored[key] for name, key in created.items()},
        edit.patches,
        {path: bytes(to_bytes(stored[key])) for path, key in files.items()},
    )


def check_edit_file(manifest: Manifest, stored: Mapping[str, Tensor]) -> Iterator[str]:
    """Check the tensors of ``recorded_edit`` against the manifest; bases must be orthonormal."""
    name, ranks = manifest.edit.file, [0]
    for tensor in {tuple(t.tensors.items()): t for t in manifest.edited}.values():
        basis = delta_of_record(tensor, stored).protects
        if basis is not None:
            ranks.append(basis.shape[1])
            error = skewness(basis)
            if not error <= ORTHONORMAL:
                label = ", ".join(tensor.tensors.values())
                yield f"{name}: {label} is not orthonormal: U^T U is off by {error:.1e}"
    if manifest.edit.rank != max(ranks):
        yield f"{name}: the rank is not {manifest.edit.rank}, as recorded"
    used = {field for tensor in manifest.edited for field in tensor.tensors.values()}
    used |= {CREATED + created.name for created in manifest.edit.created}
    used |= {ADDED + path for path in manifest.edit.files}
    for other in sorted(set(stored) - used):
        if not other.startswith(EVIDENCE):
            yield f"{name}: holds a tensor {other} that nothing was edited with"
    for created in manifest.edit.created:
        tensor_ = stored.get(CREATED + created.name)
        if tensor_ is None or sha256_of_tensor(tensor_) != created.sha256:
            yield f"{name}: the created tensor {created.name} is not as recorded"
    for path in manifest.edit.files:
        content, file = stored.get(ADDED + path), manifest.files.get(path)
        if content is None or file is None or sha256_of_tensor(content) != file.sha256:
            yield f"{name}: the added file {path} is not as recorded"


def check_source_files(manifest: Manifest, source: Source, copied: Iterable[str]) -> Iterator[str]:
    """Check that the files of a source are the recorded ones.

    ``copied`` are the files that this output has copies of, edited ones included.
    """
    shards = {file.source or name for name, file in manifest.shards.items()}
    for name in sorted({*copied} - {*manifest.files, *shards}):
        yield f"{name} of the source is missing from the record of what was converted"
    if manifest.shards:
        yield from check_left_out(manifest, source)
    for name, file in manifest.source.all_files.items():
        path, recorded = place_of(source, name), (file.sha256, file.nbytes)
        if not path.is_file() or (sha256_of(path), path.stat().st_size) != recorded:
            yield f"{name} of the source is not the file that was converted"


def check_left_out(manifest: Manifest, source: Source) -> Iterator[str]:
    """Check that exactly the unread files of a source are recorded as left out."""
    recorded, found = {*manifest.source.left_out}, {*source.left_out}
    known = source.repo is not None and source.repo.commit == manifest.source.commit
    for name in sorted(() if known else found - recorded):  # a cache need not have a whole commit
        yield f"{name} of the source was left out and is not recorded as such"
    if source.repo is None or source.repo.sizes:  # offline, unfetched files are not known
        for name in sorted(recorded - found):
            yield f"{name} is recorded as left out, and the source has no such file"


def is_recorded(weight: Weight, tensor: EditedTensor) -> bool:
    """Whether a plan has a weight as its record says, in any dtype."""
    found = weight.shard, weight.layer, weight.axis, weight.recorded_role, weight.info.shape
    return found == (tensor.shard, tensor.layer, tensor.axis, tensor.role, tensor.shape)


def place_of(source: Source, name: str) -> Path:
    """The path of a listed file in a source. Raises VerificationError if its name leads out."""
    plain_name(name)
    known = {path.name: path for path in source.originals} | source.small
    return known.get(name, source.folder / name)


def is_addable(name: str, nbytes: int = 0) -> bool:
    """Whether an edit may add a file of that name.

    Loaders must not take it for weights, and a conversion of the output must copy it.
    """
    return is_plain(name) and "\\" not in name and is_companion(name, nbytes)
