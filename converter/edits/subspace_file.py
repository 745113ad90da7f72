"""The file that holds the subspace beside the weights."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from converter.errors import VerificationError

SUBSPACE_FILE = "gloss_subspace.safetensors"


def basis_name(layer: int, *, shared: bool) -> str:
    """The tensor that holds the basis of a layer; ``shared`` if it is that of all layers."""
    return "U" if shared else f"U.{layer}"


def load_bases(path: Path) -> dict[str, Tensor]:
    """The bases of a subspace file, by name (``U`` or ``U.layer``).

    Raises:
        VerificationError: the file cannot be read.
    """
    tensors = load_tensors(path)
    return {name: t for name, t in tensors.items() if name == "U" or name.startswith("U.")}


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Everything in a subspace file; see ``Subspace.save``. Raises VerificationError."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise VerificationError(f"{path.name} cannot be read", found=str(error)) from error
