"""Run the model over the pairs once, and take what a fit needs."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from converter.calibration.gradients import gradients, slopes
from converter.calibration.linear_algebra import eigen_directions, remove, shared_directions
from converter.calibration.pairs import Pair, Pairs, Prose
from converter.calibration.split import Part
from converter.calibration.statistics import TEXTS, Activations, Moments, Request
from converter.checkpoints.architectures.architecture import Architecture
from converter.errors import DataError, FitError
from converter.models.batching import (
    LAST,
    MAX_TOKENS,
    Encoder,
    Pooling,
    Sentence,
    batches,
    logit_positions,
    token_batches,
)
from converter.models.hooks import Modules
from converter.models.resident import ChunkNorms, Group, Model, Pool, SecondMoment, run

EXTRACTION_VERSION = 1
"""Raised by whoever changes the numbers that are extracted, so that no cache holds the old ones.

``tests/test_extraction.py`` records some of them and fails when they change."""

_PIECE = 8
"""Positions of neutral text whose losses are taken together."""


def activation_inputs(
    digests: Mapping[str, str],
    architecture: Architecture,
    part: Part,
    request: Request,
    *,
    device: str,
    dtype: str,
    batch_size: int,
    mode: str,
) -> dict[str, Any]:
    """Everything the activations depend on, by content. Its hash is the cache key.

    The batch size and the mode of the forward pass change rounding only, but equal inputs have to
    give equal bytes.
    """
    return {
        "files": dict(digests),
        "pairs": part.pairs.sha256,
        "prose": part.prose.sha256,
        **asdict(request),
        "layers": list(request.layers),
        "module": list(_modules(architecture, request).values()),
        "max_tokens": MAX_TOKENS,
        "batch_size": batch_size,
        "device": device.partition(":")[0],
        "dtype": dtype,
        "forward": mode,
        "libraries": {name: version(name) for name in ("tokenizers", "torch", "transformers")},
        "extraction_version": EXTRACTION_VERSION,
    }


def _modules(architecture: Architecture, request: Request) -> dict[int, tuple[str, ...]]:
    """The modules whose output is wanted, those of an FFN together; by layer."""
    if request.site == "ffn":
        return {layer: architecture.sites(layer) for layer in request.layers}
    if request.site == "final":
        return dict.fromkeys(request.layers, ())
    if request.site == "attention":
        outputs = {n: architecture.layer(n).roles["o_proj"].module for n in request.layers}
        return {layer: (name.format(layer=layer),) for layer, name in outputs.items()}
    return {layer: (architecture.block.format(layer=layer),) for layer in request.layers}


def extract(
    model: Model, request: Request, pairs: Pairs, prose: Prose, *, batch_size: int
) -> tuple[Activations, int]:
    """Run the model over pairs and prose.

    Returns:
        the activations (without ``inputs``), and how many pairs were left out, since no position of
        their toxic side predicts a toxic token.

    Raises:
        DataError: no pair is left, or the activations are not finite.
        FitError: nothing is left to fit in.
    """
    modules = _modules(model.architecture, request)
    encode = Encoder(model.tokenizer, model.module)
    mean: Pooling = request.pooling if request.pooling in LAST else "mean"
    said = [_prompted(pair, request.prompts, bare=request.bare) for pair in pairs.pairs]
    toxic = [encode(p.toxic, request.pooling, p.spans) for p in said]
    plain = [encode(p.neutral, mean, ()) for p in said]
    neutral = [encode.predicted(p.neutral) for p in said] if request.slopes else plain
    kept = [i for i, s in enumerate(toxic) if any(s.weights) and any(neutral[i].weights)]
    spans = [encode(p.toxic, "predicting", p.spans) for p in said]
    if not kept or (request.gradient and not any(any(s.weights) for s in spans)):
        raise DataError("no pair has a position that predicts a toxic token", found="0 of them")
    both = [[side[i] for i in kept] for side in (toxic, neutral)]
    coded = [encode(text, "mean", ()) for text in prose.paragraphs]
    seen = _passed(model, modules, request, both, coded, batch_size)
    found = causal_moments(model, modules, spans) if request.gradient else iter(())
    if request.directions:
        shared = shared_directions(seen.second_moment, request.protect_shared, seen.width)
        V, leading = _directions(found, shared, request)
        moments = _moments(model, modules, encode, said, spans, prose, V)
        seen = replace(seen, leading=leading, moments=moments)
    else:
        seen = replace(seen, causal=dict(sorted(found)))
    if not all(torch.isfinite(tensor).all() for tensor in seen.tensors().values()):
        raise DataError(
            "the model gives NaN or Inf",
            hint="try --forward-dtype float32, and check the source's weights",
        )
    return seen, len(pairs.pairs) - len(kept)


def _passed(
    model: Model,
    modules: Modules,
    request: Request,
    sides: Sequence[Sequence[Sentence]],
    prose: Sequence[Sentence],
    batch_size: int,
) -> Activations:
    """What one forward pass gives over the two sides of pairs and prose, or one with gradients."""
    pools, groups = [Pool(len(side)) for side in sides], list[Group]()
    batched = [batches(side, batch_size, model.device) for side in sides]
    texts = batches(prose, batch_size, model.device)
    moment, norms = SecondMoment(), ChunkNorms(request.chunks)
    if request.slopes:
        pools = slopes(model, modules, sides)
    else:
        groups = [(side, [pool]) for side, pool in zip(batched, pools, strict=True)]
    if request.second_moment:
        groups[1] = (batched[1], [pools[1], moment.group(batched[1])])
        groups.append((texts, [moment.group(texts)]))
    if request.chunks:
        groups.append((texts, [norms]))
    if groups:
        run(model, modules, groups)
    second = moment.result() if request.second_moment else None
    return Activations(pools[0].pooled, pools[1].pooled, second, {}, norms=norms.result())


def _prompted(pair: Pair, prompts: tuple[str, str], *, bare: bool = False) -> Pair:
    """A pair with a prompt before either side, without the spaces and stops around the sides.

    ``bare`` leaves the sides away.
    """
    if bare:
        toxic, neutral = (prompt.rstrip() for prompt in prompts)
        return replace(pair, toxic=toxic, neutral=neutral, spans=())
    if not any(prompts):
        return pair
    toxic, neutral = (
        prompt + text.strip(" .")
        for prompt, text in zip(prompts, (pair.toxic, pair.neutral), strict=True)
    )
    moved = len(prompts[0]) - len(pair.toxic) + len(pair.toxic.lstrip(" ."))
    spans = tuple((start + moved, end + moved) for start, end in pair.spans)
    return replace(pair, toxic=toxic, neutral=neutral, spans=spans)


def _directions(
    causal: Iterator[tuple[int, Tensor]], shared: Tensor, request: Request
) -> tuple[Tensor, dict[int, tuple[Tensor, Tensor]]]:
    """What toxic words owe most to, in all layers together and in each, but for what is protected.

    ``shared`` (D, p) is. The causal moments of a streamed model come one by one and are not kept.

    Returns:
        V (D, K) float32, the leading eigenvectors of their sum, K as far as it goes; and of each
        layer its own with their eigenvalues, as ``Activations.leading``.

    Raises:
        FitError: all is protected.
    """
    width, protected = shared.shape
    if protected >= width:
        raise FitError(
            f"protecting {protected} of {width} dimensions leaves nothing of what toxic words "
            "depend on",
            hint="lower -o protect_shared",
        )
    total, leading = torch.zeros((), dtype=torch.float64), {}
    nowhere = torch.zeros(width, dtype=torch.float64)
    for layer, moment in causal:
        total = total + moment.double()  # of float32: exact, so layers may come in any order
        A = remove(remove(moment.double(), shared).T, shared)
        rows = eigen_directions(A, min(request.per_layer, width - protected), nowhere)
        worth = torch.einsum("kd,de,ke->k", rows, A, rows)
        leading[layer] = rows.float().contiguous(), worth.float()
    total = remove(remove(total, shared).T, shared)
    rows = eigen_directions(total, min(request.directions, width - protected), nowhere)
    V: Tensor = torch.linalg.qr(remove(rows, shared).T).Q
    return V.float().contiguous(), dict(sorted(leading.items()))


def _moments(
    model: Model,
    modules: Modules,
    encode: Encoder,
    pairs: Sequence[Pair],
    coded: Sequence[Sentence],
    prose: Prose,
    V: Tensor,
) -> Moments:
    """Moments of single words and of pieces of neutral text within the columns of V.

    A pair weighs as much as the sum of 1 / occurrences of its toxic words, so that every word of
    the corpus counts the same: in ParaDetox 63 % of the occurrences are forms of two.
    """
    said = [[pair.toxic[a:b].lower() for a, b in pair.spans] for pair in pairs]
    occurrences = Counter(word for words in said for word in words)
    chosen = [i for i, sentence in enumerate(coded) if any(sentence.weights)]
    weights = [sum(1 / occurrences[word] for word in said[i]) for i in chosen]
    neutral, tokens = {}, {}
    for name, whole in zip(TEXTS, ([p.neutral for p in pairs], prose.paragraphs), strict=True):
        predicted = [encode.predicted(text) for text in whole]
        neutral[name] = [sentence for sentence in predicted if len(sentence.ids) > 1]
        tokens[name] = sum(len(sentence.ids) - 1 for sentence in neutral[name])
    texts = [([coded[i] for i in chosen], None), *((part, _PIECE) for part in neutral.values())]
    words, *rest = moments_within(model, modules, texts, V)
    moments = dict(zip(neutral, rest, strict=True))
    return Moments(V, words, torch.tensor(weights), moments, tokens)


def causal_moments(
    model: Model, modules: Modules, sentences: Sequence[Sentence]
) -> Iterator[tuple[int, Tensor]]:
    """How much chosen tokens owe, to first order, to each direction of what a layer writes.

        A_l = (M + M^T) / 2,   M = 1/n  sum over tokens of  f g^T
        g   = gradient, with respect to f, of the sum of log p(chosen tokens)

    f (D,) is what the layer's FFN writes at a token. Removing u u^T from f at every token lowers
    the mean log-probability of the n chosen tokens by ``u^T A_l u``, to first order and in nats.
    The gradient with respect to weights is not needed, so the memory is that of a forward pass
    whose activations are kept.

    Args:
        model: not edited; its weights must not require gradients.
        modules: layer -> those whose output is f, together if there are several.
        sentences: a positive weight marks a position whose next token is chosen.

    Yields:
        layers and A_l (D, D) float32 on the CPU: each when it is complete, so that those of a
        streamed model are never all there.

    Raises:
        SourceError: the GPU is out of memory.
    """
    sums: dict[int, Tensor] = {}
    seen = Counter[int]()
    count = sum(w > 0 for s in sentences for w in s.weights)
    batched = token_batches(sentences, logit_positions(model.module), model.device)
    for number, layer, f, g in gradients(model, modules, batched):
        content = batched[number].content.to(f.device)
        if layer not in sums:
            sums[layer] = torch.zeros(f.shape[-1], f.shape[-1], device=f.device)
        sums[layer].addmm_(f[content].T, g[content])
        seen[layer] += 1
        if seen[layer] == len(batched):
            m = sums.pop(layer)
            yield layer, ((m + m.T) / (2 * max(count, 1))).cpu()


def moments_within(
    model: Model,
    modules: Modules,
    texts: Sequence[tuple[Sequence[Sentence], int | None]],
    directions: Tensor,
) -> list[Tensor]:
    """The same, of every sentence by itself, summed over layers, and seen in a few directions.

        M_i = sum over layers of  V^T (f g^T + g f^T) V / 2,   f and g as above

    For U = V X with orthonormal X (K, R), ``tr X^T M_i X`` is what the chosen tokens of sentence i
    lose together if the layers no longer write along U, to first order and in nats.

    Args:
        model, modules: as above.
        texts: sentences, each with a token to choose, and None or a number of positions: then they
            are cut into pieces of so many, and each piece has a moment: what the sentence loses if
            nothing is written along U there.
        directions: V (D, K), orthonormal columns.

    Returns:
        for each text (n, K, K) float32 on the CPU, n sentences or pieces, in their order.
    """
    positions = logit_positions(model.module)
    batched = [
        (place, piece or batch.ids.shape[1], batch)
        for place, (sentences, piece) in enumerate(texts)
        for batch in token_batches(sentences, positions, model.device)
    ]
    sums: dict[int, Tensor] = {}
    found = gradients(model, modules, [batch for _, _, batch in batched])
    for number, _, f, g in found:
        _, piece, batch = batched[number]
        V, content = directions.to(f), batch.content.to(f.device)[..., None]
        product = _pieces((f * content) @ V, piece).mT @ _pieces(g @ V, piece)
        sums[number] = sums.get(number, 0) + product.cpu()
    moments: list[list[Tensor]] = [[] for _ in texts]
    owners: list[list[Tensor]] = [[] for _ in texts]
    for number, (place, piece, batch) in enumerate(batched):
        filled = _pieces(batch.content[..., None], piece).flatten(1).any(1).cpu()
        moments[place].append(((sums[number] + sums[number].mT) / 2)[filled])
        rows = torch.tensor(batch.rows).repeat_interleave(-(-batch.ids.shape[1] // piece))
        owners[place].append(rows[filled])
    orders = [torch.cat(rows).argsort(stable=True) for rows in owners]
    return [torch.cat(part)[order] for part, order in zip(moments, orders, strict=True)]


def _pieces(x: Tensor, positions: int) -> Tensor:
    """(B, T, K) cut into pieces of so many positions, the last one padded: (-1, positions, K)."""
    rest = (0, 0, 0, -x.shape[1] % positions)
    return nn.functional.pad(x, rest).view(-1, positions, x.shape[2])
