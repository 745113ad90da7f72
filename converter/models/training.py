"""The weight of one linear map as a parameter: the layers above it run, those below have run once.

    y = x W^T (+ b)         x (T, I) what the map is given, W (O, I) the parameter, b as it is
    dL/dW = G^T x           G (T, O) the gradient of L at y, summed over all texts

Nothing below the map depends on W, so what its layer is given is kept for each text, and every step
begins there. The layers run by the model's own code, and no layer is known in detail: one with a
norm behind its FFN, or with its FFN beside the attention, is like any other. W is float32, whatever
the dtype of the model is; the other weights stay as they are.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from converter.checkpoints.weights import Weight
from converter.models.batching import Batch, Sentence, batches
from converter.models.hooks import hooked, memory_errors
from converter.models.resident import Model
from converter.runtime import progress

Loss = Callable[[int, Tensor], Tensor]
"""What a text, by its number, adds to L: made of its logits (A, V) at its A positions of weight."""


class TrainedMap:
    """One linear map of a model, whose weight is ``W`` whatever the checkpoint has.

    Args:
        model: in memory or streamed.
        weight: which map it is; no part of a tensor, and no expert.
        W: (O, I) float32; it is the attribute ``W``, to be changed in place.
        texts: with weight on the positions whose logits are wanted, one at least of each.
    """

    def __init__(self, model: Model, weight: Weight, W: Tensor, texts: Sequence[Sentence]) -> None:
        self.W = W.to(model.device)
        self._model, self._weight = model, weight
        self._batched = batches(texts, 1, model.device)  # no pads, so that a text is only itself
        self._given: Tensor | None = None
        proof = model.architecture.proof
        with _memory(), progress.bar("lower layers", len(texts), "text"):
            self._entered = (
                model.entering(weight.layer, self._batched)
                if proof is None or proof.streams
                else None  # layers use the embedding or one another: all of them run
            )

    def gradient(self, loss: Loss) -> Tensor:
        """dL/dW (O, I) float32, L the sum of what ``loss`` says of all texts."""
        total, weight = torch.zeros_like(self.W), self._weight

        def value(logits: Tensor, batch: Batch) -> Tensor:
            return loss(batch.rows[0], logits[0].to(total))

        modules = {weight.layer: (weight.module,)}
        found = (modules, self._batched, value, self._entered)
        with (
            _memory(),
            hooked(self._model.module, {weight.module: self._run}),
            progress.bar("gradients", len(self._batched), "text"),
        ):
            for _, _, _, G in self._model.gradients(*found):
                x = self._given
                assert x is not None
                G = G.reshape(-1, G.shape[-1]).to(total)
                total.addmm_(G.T, x.reshape(len(G), -1).to(total))
        self._given = None
        return total

    def _run(self, module: nn.Module, args: Any, output: Any) -> Tensor:
        """What the map gives with ``W``, in place of what it gave."""
        x: Tensor = args[0].detach()
        self._given = x
        W, bias = self.W.to(x.device), getattr(module, "bias", None)
        new = nn.functional.linear(x.to(W), W, None if bias is None else bias.to(W))
        return new.to(output)


def _memory() -> Any:
    return memory_errors("a text in training", hint="give --device cpu")
