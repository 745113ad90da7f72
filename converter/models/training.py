"""Train the weight of one linear map: the layers above it run in each step, those below once.

    y = x W^T (+ b)         x (T, I) what the map is given, W (O, I) the parameter, b as it is
    dL/dW = G^T x           G (T, O) the gradient of L at y, summed over all texts

Nothing below the map depends on W, so the input of its layer is kept for each text, and every step
starts there. The layers run by the model's own code, so a norm behind the FFN or an FFN beside the
attention needs no special case. W is float32 for every dtype of the model; the other weights do not
change.
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
"""The loss of a text, by its number, from its logits (A, V) at its A positions of weight."""


class TrainedMap:
    """One linear map of a model, with ``W`` as its weight.

    Args:
        model: in memory or streamed.
        weight: the map; not a part of a tensor, and not an expert.
        W: (O, I) float32; it is the attribute ``W``, to be changed in place.
        texts: with weight on the positions whose logits are wanted, at least one in each.
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
        """dL/dW (O, I) float32, with L the sum of ``loss`` over all texts."""
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
        """Replace the map's output by its output with ``W``."""
        x: Tensor = args[0].detach()
        self._given = x
        W, bias = self.W.to(x.device), getattr(module, "bias", None)
        new = nn.functional.linear(x.to(W), W, None if bias is None else bias.to(W))
        return new.to(output)


def _memory() -> Any:
    return memory_errors("a text in training", hint="give --device cpu")
