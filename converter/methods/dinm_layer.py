"""Which layer DINM edits, by the rule of its authors, which locates nothing.

    layer = argmax over l < L - 1 of  || H_l(safe) - H_l(unsafe) ||_F      H_l: what layer l gives

Hidden states grow with the layer, so any two texts give the same one, those of a control pair of
harmless texts, too. The last layer is left out: the authors compare what it gives after the final
norm with others that have not been through it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from converter.models.batching import Sentence, batches, beginning, encode
from converter.models.hooks import memory_errors
from converter.models.resident import Model

Pair = tuple[str, str]


def distances(model: Model, layers: Sequence[int], pairs: Sequence[Pair]) -> list[list[float]]:
    """For each pair of texts, the distance between what each of the layers gives for them.

    A distance is over the real tokens of the first places that both texts have, so padding, which
    alone decided the layer in the authors' code, has no part in it.
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
    with memory_errors("a pair of answers", hint="give --device cpu, or -o layer"):
        model.visit(modules, batched, show)
    return found
