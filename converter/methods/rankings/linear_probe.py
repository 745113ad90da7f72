"""The cosine of a candidate with a linear probe of its layer: Fisher's discriminant."""

import torch
from torch import Tensor

from converter.methods.rankings import Evidence

NEEDS_GRADIENT = False

RIDGE = 0.1
"""Of the mean variance, added to every variance: there are fewer pairs than dimensions."""


def score(evidence: Evidence) -> list[float]:
    """cos(u, w_l) with w_l the probe of ``discriminant``."""
    probes = {layer: discriminant(T) for layer, T in evidence.differences.items()}
    pairs = zip(evidence.rows, evidence.layers, strict=True)
    return [float(u @ probes[layer]) for u, layer in pairs]


def discriminant(differences: Tensor) -> Tensor:
    """The unit direction that separates differences (N, D) from their mirror image best.

        w ~ (S + ridge tr(S) / D I)^-1 m      m, S: mean and covariance of the rows

    A pair is classified by the sign of w^T (x+ - x-), so the probe is trained on differences.
    """
    x = differences.double()
    mean = x.mean(0)
    S = (x - mean).T @ (x - mean) / len(x)
    S = S + RIDGE * S.trace() / len(S) * torch.eye(len(S), dtype=S.dtype)
    return torch.nn.functional.normalize(torch.linalg.solve(S, mean), dim=0)
