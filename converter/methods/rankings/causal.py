"""What toxic words lose, to first order, when a candidate is removed from its layer."""

from converter.methods.rankings import Evidence

NEEDS_GRADIENT = True


def score(evidence: Evidence) -> list[float]:
    """u^T A_l u, in nats; see ``calibration.causal_moments``."""
    pairs = zip(evidence.rows, evidence.layers, strict=True)
    return [float(u @ evidence.causal[layer].double() @ u) for u, layer in pairs]
