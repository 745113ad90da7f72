"""The linear algebra of toxic subspaces: candidates -> scores -> basis. Pure functions of tensors.

Letters: N pairs, D hidden size, C candidates, R rank. Rows are samples or candidates; a basis is
(D, R) with orthonormal columns. Everything is float64: the matrices are small beside the model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from converter.calibration.linear_algebra import top_right_singular_vectors
from converter.edits.subspace_file import basis_name
from converter.errors import FitError
from converter.manifest import Candidate

MAX_RANK = 8
"""Fitted if the rank is left to be chosen; larger ones bought nothing where they were tried."""


@dataclass(frozen=True, slots=True)
class Subspace:
    """The frozen result of a fit.

    Attributes:
        bases: edited layer -> (D, R) float32, orthonormal columns.
        shared: whether all layers have the same basis, as in GloSS.
        singular_values: of the matrix from which the basis was taken; one tensor under the key
            ``U``, or one for each layer under ``U.layer``.
        candidates: all of them, in order of layer.
        rows: (C, D) float32, their directions, unit vectors.
    """

    bases: Mapping[int, Tensor]
    shared: bool
    singular_values: Mapping[str, Tensor]
    candidates: tuple[Candidate, ...]
    rows: Tensor

    def basis_name(self, layer: int) -> str:
        """The tensor of the subspace file that holds the basis of ``layer``."""
        return basis_name(layer, shared=self.shared)

    @property
    def rank(self) -> int:
        """Columns of the widest basis."""
        return max(basis.shape[1] for basis in self.bases.values())

    def truncated(self, rank: int) -> "Subspace":
        """The same with the first ``rank`` columns of every basis."""
        bases = {layer: basis[:, :rank].contiguous() for layer, basis in self.bases.items()}
        return replace(self, bases=bases)

    def save(self, path: Path) -> None:
        """Write bases, singular values, candidates and their scores to a safetensors file."""
        tensors = {self.basis_name(layer): basis for layer, basis in self.bases.items()}
        for name, values in self.singular_values.items():
            tensors[name.replace("U", "singular_values", 1)] = values.float()
        tensors["scores"] = torch.tensor([c.score for c in self.candidates])
        tensors["candidates"] = self.rows
        tensors["score_layers"] = torch.tensor([c.layer for c in self.candidates])
        tensors = {name: t.clone().contiguous() for name, t in tensors.items()}  # none shared
        path.write_bytes(save(tensors, {"format": "pt"}))


EQUAL = 1e-9
"""Scores that differ by less than this share of the largest are equal."""


def above_threshold(scores: Sequence[float], alpha: float) -> list[bool]:
    """Which scores exceed mean + alpha * std of all of them (population std).

    The threshold rule of GloSS (arXiv 2505.17078). Scores that are all equal say nothing, and all
    are kept.

    Raises:
        FitError: none does.
    """
    values = torch.tensor(scores, dtype=torch.float64)
    if values.max() - values.min() <= EQUAL * values.abs().max():
        return [True] * len(scores)
    threshold = values.mean() + alpha * values.std(correction=0)
    kept = [bool(v > threshold) for v in values]
    if not any(kept):
        raise FitError(
            "no candidate direction is over the threshold",
            expected=f"a score over {threshold:.4f} (mean + {alpha} standard deviations)",
            found=f"a highest score of {values.max():.4f}",
            hint="lower -o alpha",
        )
    return kept


def global_basis(candidates: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The leading subspace of stacked candidates, by uncentred principal component analysis.

    Args:
        candidates: (C, D) rows, each as long as it should count.
        rank: R, columns wanted.

    Returns:
        U (D, R) float32 with orthonormal columns, each turned so that the candidates have a
        positive sum along it, and all singular values.

    Raises:
        FitError: the candidates span fewer than ``rank`` dimensions.
    """
    spanned = int(torch.linalg.matrix_rank(candidates.double()))
    if rank > spanned:
        raise FitError(
            f"rank {rank} is larger than the candidates allow",
            expected=f"at most {spanned}, the dimensions that {len(candidates)} candidates span",
            found=str(rank),
            hint="lower -o rank, or lower -o alpha to keep more candidates",
        )
    vectors, values = top_right_singular_vectors(candidates, rank)
    signs = torch.where((candidates.double() @ vectors).sum(0) < 0, -1.0, 1.0).double()
    return (vectors * signs).float().contiguous(), values
