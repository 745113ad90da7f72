"""The recorded fit once more: does it give the recorded subspace?"""

import torch
from torch import Tensor

from converter.calibration.pairs import Pairs, Prose
from converter.calibration.word_list import WordList
from converter.entrypoints.convert import load_texts, prepare
from converter.errors import VerificationError
from converter.evaluate.fit import fit
from converter.methods.workbench import Bench
from converter.recipe import Run
from converter.release.recording import Recording


def compare_fit(
    recording: Recording,
    run: Run,
    device: str,
    max_angle: float,
    memory_limit: int | None = None,
) -> dict[str, list[float]]:
    """Fit as recorded, guard included, and measure the angles to the recorded bases.

    Returns:
        basis -> principal angles in degrees, ascending.

    Raises:
        VerificationError: the texts are not those recorded, the ranks differ, or an angle is larger
            than ``max_angle``.
        ConverterError: as a conversion would.
    """
    source, plan, method = prepare(run)
    pairs, prose, words = load_texts(run)
    check_texts(recording, pairs, prose, words)
    bench = Bench.of(run, source, plan, words, device, memory_limit=memory_limit)
    subspace = fit(bench, method, pairs, prose).subspace
    bench.unload()
    fitted = {subspace.basis_name(layer): basis for layer, basis in subspace.bases.items()}
    angles = compare_bases(recording, fitted)
    name = max(angles, key=lambda name: angles[name][-1])
    if not angles[name][-1] <= max_angle:
        raise VerificationError(
            f"the refitted basis {name} is not the recorded one",
            expected=f"an angle of at most {max_angle:g} degrees",
            found=f"{angles[name][-1]:.3f}",
            hint="nothing was written; batch size, device and libraries turn what the texts hardly "
            "determine",
        )
    return angles


def check_texts(recording: Recording, pairs: Pairs, prose: Prose, words: WordList) -> None:
    """The texts must be those of the recorded fit. Raises VerificationError naming others."""
    found = {"pairs": pairs.sha256, "neutral": prose.sha256, "word_list": words.sha256}
    wrong = [name for name in found if found[name] != recording.manifest[name]["sha256"]]
    if wrong:
        raise VerificationError(
            f"not the texts of the recorded fit, by their sha256: {', '.join(wrong)}",
            hint="nothing was done; give the recorded ones as "
            + ", ".join("--" + name.replace("_", "-") for name in wrong),
        )


def compare_bases(recording: Recording, fitted: dict[str, Tensor]) -> dict[str, list[float]]:
    """The angles of each basis. Raises VerificationError if names or ranks differ."""
    recorded = recording.bases
    for name in sorted({*recorded, *fitted}):
        ranks = [bases[name].shape[1] if name in bases else 0 for bases in (recorded, fitted)]
        if ranks[0] != ranks[1]:
            raise VerificationError(
                f"the refitted basis {name} has another rank than the recorded one",
                expected=str(ranks[0]),
                found=str(ranks[1]),
                hint="nothing was written; a rank at the edge of the budget is chosen by little",
            )
    return {n: principal_angles(recorded[n], fitted[n]).tolist() for n in sorted(fitted)}


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
