"""The file of an edit's tensors beside the weights, from which the edit can be repeated.

A tensor that several weights share is stored once: ``U`` if all do, else ``U.LAYER`` or ``U.NAME``.
The file also has the tensors that the edit creates, the files that it adds (as bytes), and the
method's evidence.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from converter.checkpoints.safetensors.header import read_header
from converter.edits.base import Edit
from converter.edits.deltas import tensors_of
from converter.errors import CheckpointError, VerificationError

CREATED, ADDED, EVIDENCE = "created.", "file.", "evidence."
"""Beginnings of names of tensors that do not belong to a delta."""


def stored_names(edit: Edit, layers: Mapping[str, int]) -> dict[str, dict[str, str]]:
    """The names of an edit's tensors in the file.

    Args:
        edit: whose deltas may share tensors.
        layers: tensor of the checkpoint -> its layer.

    Returns:
        tensor of the checkpoint -> field of its delta -> tensor of the file.
    """
    users: dict[str, dict[int, list[str]]] = {}
    for name, delta in edit.tensors.items():
        for field, tensor in tensors_of(delta).items():
            users.setdefault(field, {}).setdefault(id(tensor), []).append(name)
    called: dict[tuple[str, int], str] = {}
    for field, tensors in users.items():
        by_layer = [{layers[name] for name in names} for names in tensors.values()]
        apart = sum(map(len, by_layer)) == len(by_layer) == len(set().union(*by_layer))
        for (identity, names), found in zip(tensors.items(), by_layer, strict=True):
            first = min(names, key=lambda name: (layers[name], name))  # in any order
            end = f".{min(found)}" if apart else f".{first}"
            called[field, identity] = field if len(tensors) == 1 else field + end
    return {
        name: {field: called[field, id(tensor)] for field, tensor in tensors_of(delta).items()}
        for name, delta in edit.tensors.items()
    }


def save_edit(
    path: Path, edit: Edit, layers: Mapping[str, int], evidence: Mapping[str, Tensor]
) -> None:
    """Write the file; ``evidence`` are the tensors that the method keeps."""
    path.write_bytes(save(file_tensors(edit, layers, evidence), {"format": "pt"}))


def file_tensors(
    edit: Edit, layers: Mapping[str, int], evidence: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors of the file of ``save_edit``, by name."""
    names = stored_names(edit, layers)
    found = {
        names[name][field]: tensor
        for name, delta in edit.tensors.items()
        for field, tensor in tensors_of(delta).items()
    }
    found |= {CREATED + name: tensor for name, tensor in edit.created.items()}
    found |= {
        ADDED + name: torch.frombuffer(bytearray(content), dtype=torch.uint8)
        if content
        else torch.empty(0, dtype=torch.uint8)
        for name, content in edit.files.items()
    }
    found |= {EVIDENCE + name: tensor for name, tensor in evidence.items()}
    return {name: t.detach().cpu().clone().contiguous() for name, t in found.items()}


def load_bases(path: Path) -> dict[str, Tensor]:
    """The bases of subspaces in an edit file, by name (``U`` or ``U.LAYER``).

    Raises:
        VerificationError: the file cannot be read.
    """
    return _bases(load_edit_tensors(path))


def load_spans(path: Path) -> dict[str, Tensor]:
    """The columns along which an edit changes weights, by the names of ``load_bases``.

    They are the basis of a subspace, or A where the projection is oblique. Raises as
    ``load_bases``.
    """
    tensors = load_edit_tensors(path)
    others = {name: tensors.get(f"A{name[1:]}", U) for name, U in _bases(tensors).items()}
    return {n: A if A.shape == tensors[n].shape else tensors[n] for n, A in others.items()}


def _bases(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t for name, t in tensors.items() if name == "U" or name.startswith("U.")}


def load_edit_tensors(path: Path) -> dict[str, Tensor]:
    """Everything in a file of an edit, or of an adapter, by name.

    Raises:
        VerificationError: it cannot be read.
    """
    try:
        read_header(path)  # refuses headers on which the library raises unexpected errors
        return load_file(path)
    except (OSError, CheckpointError, SafetensorError) as error:
        raise VerificationError(f"{path.name} cannot be read", found=str(error)) from error
