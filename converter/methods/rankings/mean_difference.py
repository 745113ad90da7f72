"""The cosine of a candidate with the mean difference of its layer; forward passes suffice."""

from converter.calibration.linear_algebra import mean_difference
from converter.methods.rankings import Evidence

NEEDS_GRADIENT = False


def score(evidence: Evidence) -> list[float]:
    """cos(u, mean row of T_l)."""
    means = {layer: mean_difference(T)[0] for layer, T in evidence.differences.items()}
    pairs = zip(evidence.rows, evidence.layers, strict=True)
    return [float(u @ means[layer]) for u, layer in pairs]
