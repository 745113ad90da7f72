"""How strong an edit may be: the most effective strength within a budget of perplexity."""

from msgspec.structs import asdict

from converter.errors import GuardError
from converter.evaluation.heldout import Probe
from converter.manifest import Choice, Measured, Trial
from converter.methods.base import Proposal


def choose_strength(probe: Probe, proposal: Proposal, budget: float) -> Choice:
    """The strength that makes toxic words least probable among those within the budget.

    A strength is within the budget if its perplexity ratio plus one standard error is: measured on
    a few thousand tokens, the best of several looks better than it is. Perplexity grows with the
    strength, so the largest within the budget is found by bisection.

    Raises:
        GuardError: even the least is over the budget.
    """
    strengths = proposal.strengths
    tried: dict[float, Measured] = {}
    low, high = 0, len(strengths)
    while low < high:
        strength = strengths[middle := (low + high) // 2]
        tried[strength] = probe.measure(proposal.edit(strength))
        low, high = (middle + 1, high) if _is_within(tried[strength], budget) else (low, middle)
    within = [strength for strength, found in tried.items() if _is_within(found, budget)]
    if not within:
        ratio = tried[min(tried)].perplexity_ratio
        raise GuardError(
            "not even the weakest edit keeps within the perplexity budget",
            expected=f"a perplexity ratio of at most {budget:g} on held-out neutral text",
            found=f"{ratio.value:.4f} with a standard error of {ratio.error:.4f}",
            hint="raise --max-perplexity-ratio, edit fewer layers, or give more pairs",
        )
    best = min(within, key=lambda strength: tried[strength].toxic_change.value)
    trials = (Trial(strength=each, **asdict(tried[each])) for each in sorted(tried))
    return Choice(strength=best, automatic=True, tried=tuple(trials))


def nearest_strength(probe: Probe, proposal: Proposal, ratio: float) -> float:
    """The strength whose perplexity ratio comes nearest to a given one, by bisection."""
    strengths, found = proposal.strengths, dict[float, float]()
    low, high = 0, len(strengths)
    while low < high:
        strength = strengths[middle := (low + high) // 2]
        found[strength] = probe.measure(proposal.edit(strength)).perplexity_ratio.value
        low, high = (middle + 1, high) if found[strength] < ratio else (low, middle)
    return min(found, key=lambda strength: abs(found[strength] - ratio))


def _is_within(found: Measured, budget: float) -> bool:
    ratio = found.perplexity_ratio
    return ratio.value + ratio.error <= budget
