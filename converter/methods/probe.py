"""Linear probes that tell toxic sentences from neutral ones, and their accuracy.

    p(toxic | x) = softmax(W x + c)    W (2, D), c (2,), x (D,) a mean of hidden states

All of it is float64.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from converter.errors import FitError

TOXIC = 1
"""The row of W that is the toxic class's."""

_RATE, _EPOCHS, _BATCH = 1e-4, 20, 32
"""Of the paper's training."""

_RIDGE = 1.0
"""Weight of the probe's penalty, in units of the mean variance of its inputs."""

_HELD = 5
"""One pair in so many is held out when the probe's accuracy is measured."""

_STEPS, _TOLERANCE = 50, 1e-9
"""The most Newton steps, and the relative size of the last step: its square is the remaining error.
With this penalty a few steps are enough.
"""


def fit_probe(toxic: Tensor, neutral: Tensor) -> tuple[Tensor, float]:
    """The direction w and the constant c that best tell toxic sentences from neutral ones.

        mean of log(1 + exp(-y (w^T x + c)))  +  r / 2 |w|^2    y = 1 of toxic ones, -1 of neutral

    r is ``_RIDGE`` times the mean variance of x's elements, so that w rotates with x and scales
    with its unit. This is softmax regression from zero, with w = 2 W[toxic]. It is strictly convex:
    Newton's method finds the one minimum up to the rounding error of float64, in any order of
    additions.

    Args:
        toxic, neutral: (N, D), of any dtype.

    Returns:
        w (D,) float64, and c.

    Raises:
        FitError: both sides have the same mean, so that w is zero; or Newton's method fails.
    """
    x = torch.cat([toxic, neutral]).double()
    mean = x.mean(0)
    x = x - mean
    if not (toxic.double().mean(0) - neutral.double().mean(0)).any():
        raise FitError("the toxic and the neutral side have the same mean", hint="check the pairs")
    ridge = _RIDGE * float(x.square().mean())
    y = torch.cat([x.new_ones(len(toxic)), -x.new_ones(len(neutral))])
    # w is a sum of sentences: fewer unknowns if there are fewer sentences than D
    basis = torch.linalg.qr(x.T).Q if len(x) < x.shape[1] else torch.eye(x.shape[1]).double()
    signed = y[:, None] * torch.cat([x @ basis, torch.ones_like(x[:, :1])], 1)
    found = _minimum(signed, ridge)
    w = basis @ found[:-1]
    return w, float(found[-1] - mean @ w)


def _minimum(signed: Tensor, ridge: float) -> Tensor:
    """The minimum t (k,) of ``mean of log(1 + exp(-signed t)) + ridge / 2 |t|^2``, by Newton.

    ``signed`` is (n, k); the last element of t has no penalty. Raises FitError.
    """
    penalty = torch.full_like(signed[0], ridge)
    penalty[-1] = 0
    t: Tensor = torch.zeros_like(penalty)
    for _ in range(_STEPS):
        wrong = torch.sigmoid(-(signed @ t))
        slope = penalty * t - signed.T @ wrong / len(signed)
        bend = (signed.T * (wrong * (1 - wrong))) @ signed / len(signed) + penalty.diag()
        step: Tensor = torch.linalg.solve(bend, slope)
        t = t - step
        if float(step.norm()) <= _TOLERANCE * float(t.norm()):
            return t
    raise FitError(f"the probe is not found in {_STEPS} steps", hint="check the pairs")


def train_probe(toxic: Tensor, neutral: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """The paper's probe: a linear layer with its usual random start, trained by Adam on softmax
    cross-entropy, at a rate of 1e-4, in 20 epochs of batches of 32 in another order each.

    Args:
        toxic, neutral: (N, D), of any dtype.
        seed: of the start and of the orders.

    Returns:
        W (2, D) and c (2,), and W at the start, all float64; row ``TOXIC`` is the toxic class's.
    """
    drawn = torch.Generator().manual_seed(seed)
    x = torch.cat([toxic, neutral]).double()
    is_toxic = torch.arange(len(x)) < len(toxic)
    wanted = nn.functional.one_hot(torch.where(is_toxic, TOXIC, 1 - TOXIC)).double()
    bound = x.shape[1] ** -0.5  # of nn.Linear
    start = bound * (2 * torch.rand(2, x.shape[1], generator=drawn, dtype=torch.float64) - 1)
    W, c = start.clone(), bound * (2 * torch.rand(2, generator=drawn, dtype=torch.float64) - 1)
    adam = torch.optim.Adam([W, c], lr=_RATE)
    for _ in range(_EPOCHS):
        for batch in torch.split(torch.randperm(len(x), generator=drawn), _BATCH):
            wrong = ((x[batch] @ W.T + c).softmax(1) - wanted[batch]) / len(batch)
            W.grad, c.grad = wrong.T @ x[batch], wrong.sum(0)
            adam.step()
    return W, c, start


def held_accuracy(
    toxic: Tensor,
    neutral: Tensor,
    fit: Callable[[Tensor, Tensor], tuple[Tensor, float]] = fit_probe,
) -> float | None:
    """The accuracy of a probe fitted without every fifth pair, on both sides of these pairs.

    None if there are fewer than five pairs. Similar pairs may be on both sides of the split.
    """
    held = torch.arange(len(toxic)) % _HELD == _HELD - 1
    if not held.any():
        return None
    w, c = fit(toxic[~held], neutral[~held])
    right = [toxic[held].double() @ w + c > 0, neutral[held].double() @ w + c < 0]
    return float(torch.cat(right).double().mean())
