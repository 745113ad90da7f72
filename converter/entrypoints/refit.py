"""The recorded fit once more: does it give the recorded edit?"""

from collections.abc import Mapping

import torch
from torch import Tensor

from converter.calibration.pairs import Pairs, Prose
from converter.calibration.word_list import WordList
from converter.edits.edit_file import EVIDENCE, file_tensors
from converter.entrypoints.convert import load_texts, prepare
from converter.errors import VerificationError
from converter.evaluation.fit import fit
from converter.methods.workbench import Bench
from converter.recipe import Recipe
from converter.release.recording import Recording


def compare_fit(
    recording: Recording,
    recipe: Recipe,
    device: str,
    max_angle: float,
    memory_limit: int | None = None,
) -> dict[str, list[float]]:
    """Fit as recorded, guard included, and measure the angles to the recorded bases.

    Returns:
        tensor of the edit -> angles in degrees, ascending: the principal ones of a basis, one of
        any other tensor.

    Raises:
        VerificationError: the texts are not those recorded, the edits have other tensors, or an
            angle is larger than ``max_angle``.
        ConverterError: as a conversion would.
    """
    source, plan, method = prepare(recipe)
    pairs, prose, words = load_texts(recipe)
    check_texts(recording, pairs, prose, words)
    bench = Bench.of(recipe, source, plan, words, device, memory_limit)
    edit = fit(bench, method, pairs, prose).edit
    bench.unload()
    layers = {weight.info.name: weight.layer for weight in plan.find(edit.tensors).values()}
    fitted = file_tensors(edit, layers, {})
    angles = compare_tensors(recording, fitted)
    name = max(angles, key=lambda name: angles[name][-1])
    if not angles[name][-1] <= max_angle:
        raise VerificationError(
            f"the refitted {name} is not the recorded one",
            expected=f"an angle of at most {max_angle:g} degrees",
            found=f"{angles[name][-1]:.3f}",
            hint="nothing was written; batch size, device and libraries turn what the texts hardly "
            "determine",
        )
    return angles


def check_texts(recording: Recording, pairs: Pairs, prose: Prose, words: WordList) -> None:
    """The texts must be those of the recorded fit. Raises VerificationError naming others."""
    found = {"pairs": pairs.sha256, "neutral": prose.sha256, "word_list": words.sha256}
    wrong = [name for name in found if found[name] != getattr(recording.manifest, name).sha256]
    if wrong:
        raise VerificationError(
            f"not the texts of the recorded fit, by their sha256: {', '.join(wrong)}",
            hint="nothing was done; give the recorded ones as "
            + ", ".join("--" + name.replace("_", "-") for name in wrong),
        )


def compare_tensors(recording: Recording, fitted: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """The angles of each tensor of the edit. Raises VerificationError if names or shapes differ."""
    recorded = {n: t for n, t in recording.stored.items() if not n.startswith(EVIDENCE)}
    for name in sorted({*recorded, *fitted}):
        shapes = [list(known[name].shape) if name in known else [] for known in (recorded, fitted)]
        if shapes[0] != shapes[1]:
            raise VerificationError(
                f"the refitted {name} has another shape than the recorded one",
                expected=str(shapes[0]),
                found=str(shapes[1]),
                hint="nothing was written; a rank at the edge of the budget is chosen by little",
            )
    return {name: _angles(name, recorded[name], fitted[name]).tolist() for name in sorted(fitted)}


def _angles(name: str, a: Tensor, b: Tensor) -> Tensor:
    """Between two bases, or between two other tensors as vectors."""
    if name == "U" or name.startswith("U."):
        return principal_angles(a, b)
    if torch.equal(a, b):
        return torch.zeros(1)
    return principal_angles(a.double().reshape(-1, 1), b.double().reshape(-1, 1))


def principal_angles(a: Tensor, b: Tensor) -> Tensor:
    """The principal angles between two subspaces, in degrees, ascending.

    The singular values of ``A^T B`` are their cosines, and those of ``B - A A^T B`` their sines.
    Below 45 degrees the sine is taken: cosines near 1 cannot tell small angles apart.

    Args:
        a: (D, R) of full rank; made orthonormal here, since float32 columns are so to 1e-7 only.
        b: (D, S), S at most R.

    Returns:
        (S,) float64.
    """
    A, B = (torch.linalg.qr(basis.double()).Q for basis in (a, b))
    inside = A.T @ B
    cosines = torch.linalg.svdvals(inside).clamp(max=1)
    sines = torch.linalg.svdvals(B - A @ inside).clamp(max=1).flip(0)
    angles = torch.where(sines < cosines, sines.asin(), cosines.acos())
    return torch.rad2deg(angles)
