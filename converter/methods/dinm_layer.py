"""The layer that DINM edits: one with a trainable weight, by the rule of its authors.

The rule locates nothing.

    layer = argmax over l < L - 1 of  || H_l(safe) - H_l(unsafe) ||_F      H_l: what layer l gives

Hidden states grow with the layer, so any two texts give the same layer, even a control pair of
harmless texts. The last layer is left out: the authors compare its output after the final norm with
outputs before it.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from converter.checkpoints.plan import Plan
from converter.checkpoints.weights import Weight
from converter.errors import OptionError
from converter.models.batching import Sentence, batches, beginning, encode
from converter.models.hooks import memory_errors
from converter.models.resident import Model
from converter.runtime import progress

_DTYPES = ("BF16", "F16", "F32")
"""Dtypes of trainable weights: float32 holds their numbers."""

Pair = tuple[str, str]


def distances(model: Model, layers: Sequence[int], pairs: Sequence[Pair]) -> list[list[float]]:
    """For each pair of texts, the distance between their outputs of each layer.

    A distance is over the first positions that both texts have, real tokens only. In the authors'
    code padding alone decided the layer; here it has no influence.
    """
    begin = beginning(model.tokenizer)
    texts = [[encode(model.tokenizer, text, begin).ids for text in pair] for pair in pairs]
    batched = [batches([Sentence(ids) for ids in pair], 2, model.device)[0] for pair in texts]
    places = {layer: place for place, layer in enumerate(layers)}
    found = [[0.0] * len(places) for _ in pairs]

    def show(number: int, layer: int, states: Tensor) -> None:
        common = min(map(len, texts[number]))
        one, other = states[:, :common]
        found[number][places[layer]] = float(torch.dist(one, other))

    modules = {layer: (model.architecture.block.format(layer=layer),) for layer in layers}
    with (
        memory_errors("a pair of answers", hint="give --device cpu, or -o layer"),
        progress.bar("distances", 2 * len(pairs), "text"),
    ):
        model.visit(modules, batched, show)
    return found


def weights_of(plan: Plan, layers: Sequence[int]) -> dict[int, Weight]:
    """Layer -> its down-projection.

    Raises:
        OptionError: a layer has several, or one that cannot be trained alone.
    """
    users = Counter(weight.info.name for weight in plan.targets)
    by_layer: dict[int, list[Weight]] = {layer: [] for layer in layers}
    for weight in plan.weights("down_proj", layers):
        by_layer[weight.layer].append(weight)
    for layer, weights in by_layer.items():
        if found := _obstacle(weights, users):
            raise OptionError(
                f"--method dinm, layer {layer}", found=found,
                expected="one down-projection in 16 or 32 bits with a tensor of its own",
                hint="choose another -o layer if the model has one, or another method",
            )  # fmt: skip
    return {layer: weights[0] for layer, weights in by_layer.items()}


def _obstacle(weights: Sequence[Weight], users: Mapping[str, int]) -> str | None:
    """Why the down-projections of a layer cannot be trained, or None; ``users`` counts each
    tensor's uses.
    """
    weight = weights[0]
    if len(weights) > 1 or weight.mixed or weight.expert is not None or len(weight.info.shape) > 2:
        return "a mixture of experts or several networks, so that no one weight makes its output"
    if weight.scales is not None:
        return "one in FP8, whose steps are larger than the edit"
    if weight.rows is not None or users[weight.info.name] > 1:
        return "one that shares its tensor with others"
    return None if weight.info.dtype in _DTYPES else f"dtype {weight.info.dtype}"
