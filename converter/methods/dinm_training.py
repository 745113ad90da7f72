"""The training of DINM: one weight learns an answer, and keeps its other answers.

    L(W) = c L_e + L_c + lambda L_s
    L_e  = mean over instances of  mean_j  -log p_W(y_j)              of the safe answer
    L_c  = mean over general texts of  mean_j  KL(p_W0 || p_W)        at the answer's tokens
    L_s  = mean over harmless questions of  mean_j (log p_W(y_j) - log p_W0(y_j))^2

L_s is our own: y is the safe answer behind a harmless question, which must not become likelier.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Literal

import torch
from torch import Tensor

from converter.checkpoints.weights import Weight
from converter.errors import FitError
from converter.methods.dialogue import Dialogues
from converter.models.training import TrainedMap
from converter.runtime import progress

Constraint = Literal["gradient", "value", "off"]
"""The use of the KL divergence: it is trained on; it only decides when to stop; none."""

_LEARNT = 1e-4
"""Training stops below this loss, as the authors' does."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """The settings of Adam; see ``dinm.Method``."""

    steps: int
    learning_rate: float
    c_edit: float
    kl: Constraint
    contrast: float


@dataclass(frozen=True, slots=True)
class Texts:
    """Prompts and answers of the training.

    Attributes:
        edits: the model learns these answers.
        generals, spared: the model is to answer these as before.
    """

    edits: Sequence[tuple[str, str]]
    generals: Sequence[tuple[str, str]]
    spared: Sequence[tuple[str, str]] = ()


@dataclass(slots=True)
class Curves:
    """The measurements before each step and after the last, in nats a token.

    Attributes:
        nll: L_e.
        kl: L_c, whether or not it is trained on.
        spared: L_s.
    """

    nll: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    spared: list[float] = field(default_factory=list)


class Training:
    """One weight in training.

    Args:
        write: makes dialogues of the texts, for the running model.
        W: (O, I) float32, the start; it is not changed.

    Attributes:
        curves: the measurements.
        steps: number of steps taken.
    """

    def __init__(
        self, write: Dialogues, weight: Weight, W: Tensor, texts: Texts, schedule: Schedule
    ) -> None:
        self._schedule, self._texts = schedule, texts
        given = [*texts.edits, *texts.generals, *texts.spared]
        self._dialogues = [write(prompt, answer) for prompt, answer in given]
        self._base: dict[int, Tensor] = {}  # of the unedited model: log p, of all tokens or some
        self.curves, self.steps = Curves(), 0
        sentences = [dialogue.sentence for dialogue in self._dialogues]
        self._map = TrainedMap(write.model, weight, W.clone(), sentences)
        with progress.bar("train", schedule.steps + 1, "step") as shown:
            self._run(shown.update)

    @property
    def result(self) -> Tensor:
        """The present weight, (O, I) float32 on the CPU."""
        return self._map.W.cpu()

    def measured(self, W: Tensor) -> tuple[float, float]:
        """L_e and L_c (nats a token) with another weight (O, I), such as the rounded one."""
        kept = self._map.W
        self._map.W = W.to(kept)
        self._gradient()
        self._map.W = kept
        self.curves.spared.pop()
        return self.curves.nll.pop(), self.curves.kl.pop()

    def _run(self, done: Callable[[int], object]) -> None:
        """Train.

        Args:
            done: called with 1 after every step.

        Raises:
            FitError: the loss is not finite.
        """
        plan, curves = self._schedule, self.curves
        adam = torch.optim.Adam([self._map.W], plan.learning_rate, foreach=False, fused=False)
        while True:
            self._map.W.grad = self._gradient()
            done(1)
            counted = curves.kl[-1] if plan.kl != "off" else 0.0
            loss = plan.c_edit * curves.nll[-1] + counted + plan.contrast * curves.spared[-1]
            if not isfinite(loss):
                raise FitError(
                    f"training diverges: the loss is {loss} after {self.steps} steps",
                    hint="give a smaller -o learning_rate or fewer -o steps",
                )
            if self.steps == plan.steps or loss < _LEARNT:
                self._map.W.grad = None
                return
            adam.step()
            self.steps += 1

    def _gradient(self) -> Tensor:
        """dL/dW (O, I); also appends to the curves."""
        for curve in (self.curves.nll, self.curves.kl, self.curves.spared):
            curve.append(0.0)
        return self._map.gradient(self._loss)

    def _loss(self, number: int, logits: Tensor) -> Tensor:
        """The loss of a text."""
        plan, texts, curves = self._schedule, self._texts, self.curves
        scores = logits.log_softmax(-1)
        wanted = torch.tensor(self._dialogues[number].wanted, device=logits.device)
        chosen = scores.gather(1, wanted[:, None])[:, 0]
        if number < len(texts.edits):
            nll = -chosen.mean() / len(texts.edits)
            curves.nll[-1] += float(nll.detach())
            return plan.c_edit * nll
        if number < len(texts.edits) + len(texts.generals):
            base = self._base.setdefault(number, scores.detach())
            kl = (base.exp() * (base - scores)).sum(-1).mean() / len(texts.generals)
            curves.kl[-1] += float(kl.detach())
            return kl if plan.kl == "gradient" else 0 * kl
        base = self._base.setdefault(number, chosen.detach())
        spared = (chosen - base).square().mean() / len(texts.spared)
        curves.spared[-1] += float(spared.detach())
        return plan.contrast * spared
