"""The linear algebra of toxic subspaces: candidates -> scores -> basis. Pure functions of tensors.

Letters: N pairs, D hidden size, C candidates, R rank. Rows are samples or candidates; a basis is
(D, R) with orthonormal columns. Everything is float64: the matrices are small beside the model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from converter.errors import FitError, VerificationError

SUBSPACE_FILE = "gloss_subspace.safetensors"

MAX_RANK = 8
"""Fitted if the rank is left to be chosen; larger ones bought nothing where they were tried."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A direction that may be toxic.

    Attributes:
        layer: counted from 0.
        kind: ``causal``, ``mean``, ``svd`` or ``random``; see ``methods.gloss``.
        index: its place among those of its layer and kind.
        score: of the ranking signal; larger is more toxic.
        kept: whether it went into the basis.
        tokens: what it decodes to, the nearest first.
    """

    layer: int
    kind: str
    index: int
    score: float
    kept: bool
    tokens: tuple[str, ...]


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
        return "U" if self.shared else f"U.{layer}"

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


def top_right_singular_vectors(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The leading right singular vectors of an uncentred matrix.

    Args:
        x: (N, D).
        count: at most min(N, D).

    Returns:
        (D, count) orthonormal columns, and all min(N, D) singular values, descending.
    """
    _, values, vectors = torch.linalg.svd(x.double(), full_matrices=False)
    return vectors[:count].T, values


SAME_DIRECTION = 0.1
"""A unit vector whose part outside a subspace is shorter than this adds no dimension to it: it is a
second estimate of what is there, and normalising the difference would make noise a direction."""


def extend(basis: Tensor, columns: Tensor) -> Tensor:
    """An orthonormal basis (D, a) with what orthonormal columns (D, b) add to its span.

    Returns:
        (D, at most a + b), the first a columns unchanged.
    """
    if columns.shape[1] == 0:
        return basis
    outside = columns - basis @ (basis.T @ columns)
    left, values, _ = torch.linalg.svd(outside, full_matrices=False)
    return torch.cat([basis, left[:, values > SAME_DIRECTION]], 1)


def remove(x: Tensor, basis: Tensor) -> Tensor:
    """Project rows away from a subspace: ``x - (x P) P^T`` for x (N, D) and P (D, k)."""
    x = x.double()
    return x - (x @ basis) @ basis.T


def leading_eigenvectors(moment: Tensor, count: int) -> Tensor:
    """The eigenvectors of a symmetric (D, D) matrix with the largest eigenvalues, (D, count)."""
    vectors: Tensor = torch.linalg.eigh(moment.double()).eigenvectors
    return vectors.flip(1)[:, :count]


def random_basis(width: int, rank: int, seed: int, spared: Tensor) -> Tensor:
    """A uniformly random subspace, as a control for fitted ones.

    Args:
        width: D.
        rank: R, at most D - k.
        seed: of the draw; the same on every device.
        spared: (D, k) orthonormal columns that the subspace is orthogonal to; k may be 0.

    Returns:
        (D, R) float32 with orthonormal columns.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(width, rank, generator=generator, dtype=torch.float64)
    x = x - spared @ (spared.T @ x)
    basis: Tensor = torch.linalg.qr(x).Q
    return basis.float().contiguous()


def shared_directions(moment: Tensor | None, count: int, width: int) -> Tensor:
    """The leading neutral directions of all layers, (D, count); (D, 0) without a moment (D, D)."""
    if moment is None or count == 0:
        return torch.empty(width, 0, dtype=torch.float64)
    return leading_eigenvectors(moment, count)


def mean_difference(differences: Tensor) -> Tensor:
    """The unit vector along the mean row of (N, D), as (1, D).

    Raises:
        FitError: the mean is zero: the two sides do not differ.
    """
    mean: Tensor = differences.double().mean(0, keepdim=True)
    if not mean.any():
        raise FitError("the toxic and the neutral side have the same mean", hint="check the pairs")
    return torch.nn.functional.normalize(mean)


def svd_directions(differences: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first ``count`` right singular vectors of (N, D) as rows, turned to the toxic side.

    The sign of a singular vector is arbitrary; here the mean difference has a component >= 0 along
    each.

    Returns:
        (count, D) and all singular values.

    Raises:
        FitError: all differences are zero.
    """
    vectors, values = top_right_singular_vectors(differences, count)
    if not values[0] > 0:
        raise FitError("the toxic and the neutral side are the same", hint="check the pairs")
    rows = vectors.T
    backwards = rows @ differences.double().mean(0) < 0
    return torch.where(backwards[:, None], -rows, rows), values


def eigen_directions(matrix: Tensor, count: int, toward: Tensor) -> Tensor:
    """The eigenvectors of a symmetric (D, D) matrix with the largest eigenvalues, as rows.

    Each has a component >= 0 along ``toward`` (D,), since its sign is arbitrary. A few of many are
    found by iteration (LOBPCG), since there is a matrix for every layer; the start is fixed.

    Returns:
        (count, D) float64.
    """
    width = len(matrix)
    if width < max(WIDE, 3 * count):
        rows = leading_eigenvectors(matrix, count).T
    else:
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(width, count, generator=generator, dtype=torch.float64)
        found = torch.lobpcg(matrix.double(), X=start, niter=500, tol=1e-10, largest=True)
        rows = found[1].T
    signs = torch.where(rows @ toward < 0, -1.0, 1.0).double()
    return signs[:, None] * rows


WIDE = 1024
"""Hidden size from which iterating is clearly faster than a whole decomposition."""


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
