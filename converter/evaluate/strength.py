"""How strong an edit may be: the largest rank within a budget of perplexity."""

from msgspec.structs import asdict

from converter.edits.base import Projection
from converter.errors import GuardError
from converter.evaluate.heldout import Probe
from converter.manifest import Choice, Measured, Trial
from converter.methods.base import Method
from converter.methods.subspace import MAX_RANK, Subspace

RANKS = (1, 2, 3, 4, 6, MAX_RANK)
"""Tried in this order."""


def choose_rank(probe: Probe, subspace: Subspace, method: Method, budget: float) -> Choice:
    """The rank that makes toxic words least probable among those within the budget.

    A rank is within the budget if its perplexity ratio plus one standard error is: measured on a
    few thousand tokens, the best of several ranks looks better than it is. The bases of smaller
    ranks are leading columns of larger ones, so perplexity grows with the rank, and the largest
    within the budget is found by bisection.

    Raises:
        GuardError: even rank 1 is over the budget.
    """
    ranks = [rank for rank in RANKS if rank <= subspace.rank]
    tried: dict[int, Measured] = {}
    low, high = 0, len(ranks)
    while low < high:
        rank = ranks[middle := (low + high) // 2]
        edit = Projection(subspace.truncated(rank).bases, method.edit_bias)
        tried[rank] = probe.measure(edit, method.edit_layers)
        ratio = tried[rank].perplexity_ratio
        low, high = (middle + 1, high) if ratio.value + ratio.error <= budget else (low, middle)
    within = [
        rank
        for rank, m in tried.items()
        if m.perplexity_ratio.value + m.perplexity_ratio.error <= budget
    ]
    if not within:
        ratio = tried[min(tried)].perplexity_ratio
        raise GuardError(
            "not even one dimension can be removed within the perplexity budget",
            expected=f"a perplexity ratio of at most {budget:g} on held-out neutral text",
            found=f"{ratio.value:.4f} with a standard error of {ratio.error:.4f}",
            hint="raise --max-perplexity-ratio, edit fewer layers, or give more pairs",
        )
    best = min(within, key=lambda rank: tried[rank].toxic_change.value)
    trials = (Trial(rank=rank, **asdict(tried[rank])) for rank in sorted(tried))
    return Choice(rank=best, automatic=True, tried=tuple(trials))
