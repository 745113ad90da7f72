"""Run the model over the pairs once, and collect the statistics of a fit."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from converter.calibration.gradients import Take, gradients, remembering, slopes
from converter.calibration.linear_algebra import eigen_directions, remove, shared_directions
from converter.calibration.pairs import Pair, Pairs, Prose
from converter.calibration.split import Part
from converter.calibration.statistics import TEXTS, Activations, Moments, Request
from converter.checkpoints.architectures.architecture import Architecture
from converter.errors import DataError, FitError
from converter.models.batching import (
    LAST,
    MAX_TOKENS,
    Batch,
    Encoder,
    Pooling,
    Sentence,
    batches,
    logit_positions,
    token_batches,
)
from converter.models.hooks import Modules
from converter.models.resident import ChunkNorms, Group, Model, Pool, SecondMoment, Sink, run

EXTRACTION_VERSION = 2
"""Version of the extraction. Raise it with a change of the numbers, so that no old cache is used.

``tests/test_extraction.py`` records some of them and fails when they change."""

_PIECE = 8
"""Positions of neutral text in one piece, whose losses are summed."""


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

    The batch size and the mode of the forward pass change only the rounding, but equal inputs must
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
    """The modules to observe, by layer; the modules of an FFN together."""
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
        the activations (without ``inputs``), and the number of pairs left out because no position
        of their toxic side predicts a toxic token.

    Raises:
        DataError: no pair is left, or the activations are not finite.
        FitError: protection leaves no direction to fit.
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
    if request.directions:
        seen = _with_moments(model, modules, request, encode, [said[i] for i in kept], prose, both)
    else:
        coded = [encode(text, "mean", ()) for text in prose.paragraphs]
        batched = [batches(part, batch_size, model.device) for part in (*both, coded)]
        show = partial(run, model, modules)
        pools = slopes(model, modules, both) if request.slopes else None
        seen = _passed(request, batched, show, pools)
        found = causal_moments(model, modules, spans) if request.gradient else iter(())
        seen = replace(seen, causal=dict(sorted(found)))
    if not all(torch.isfinite(tensor).all() for tensor in seen.tensors().values()):
        raise DataError(
            "the model gives NaN or Inf",
            hint="try --forward-dtype float32, and check the source's weights",
        )
    return seen, len(pairs.pairs) - len(kept)


def _passed(
    request: Request,
    batched: Sequence[Sequence[Batch]],
    show: Callable[[Sequence[Group]], None],
    slopes: Sequence[Pool] | None = None,
) -> Activations:
    """The activations of one pass over the two sides of pairs and prose.

    Args:
        batched: the batches of either side and of prose.
        show: runs the model; see ``run``.
        slopes: pools of gradients, if these are wanted instead of activations.
    """
    pools = slopes or [Pool(sum(len(batch.rows) for batch in side)) for side in batched[:2]]
    moment, norms = SecondMoment(), ChunkNorms(request.chunks)
    sinks: list[list[Sink]] = [[], [], []]
    if not slopes:
        sinks[0].append(pools[0])
        sinks[1].append(pools[1])
    if request.second_moment:
        sinks[1].append(moment.group(batched[1]))
        sinks[2].append(moment.group(batched[2]))
    if request.chunks:
        sinks[2].append(norms)
    show(list(zip(batched, sinks, strict=True)))
    second = moment.result() if request.second_moment else None
    return Activations(pools[0].pooled, pools[1].pooled, second, {}, norms=norms.result())


def _with_moments(
    model: Model,
    modules: Modules,
    request: Request,
    encode: Encoder,
    pairs: Sequence[Pair],
    prose: Prose,
    sides: Sequence[Sequence[Sentence]],
) -> Activations:
    """The same with moments in the leading causal directions, which must be known first.

    The texts go through the model once, with gradients, and f and g of every token are kept. If the
    disk has no room for them, the texts go once without gradients and twice with some.

    Args:
        pairs: the pairs whose sides are in ``sides``.
    """
    paragraphs = [text for text in prose.paragraphs if len(encode.predicted(text).ids) > 1]
    words = [encode(pair.toxic, "predicting", pair.spans) for pair in pairs]
    neutral = {
        "pairs": [encode.predicted(pair.neutral) for pair in pairs],
        "prose": [encode.predicted(text) for text in paragraphs],
    }
    coded = [encode(text, "mean", ()) for text in paragraphs]
    batched, chosen = (
        [token_batches(part, logit_positions(model.module), model.device) for part in texts]
        for texts in ((*sides, coded), (words, *neutral.values()))
    )
    every = [batch for part in chosen for batch in part]
    with remembering(model, modules, every) as remembered:
        take = remembered or gradients

        def show(groups: Sequence[Group]) -> None:
            sinks = [(batch, sinks) for batches, sinks in groups for batch in batches]
            for number, layer, f, _ in take(model, modules, every):
                batch, shown = sinks[number]
                for sink in shown:
                    sink(batch, layer, f)

        seen = _passed(request, batched, show if remembered else partial(run, model, modules))
        shared = shared_directions(seen.second_moment, request.protect_shared, seen.width)
        V, leading = _directions(causal_moments(model, modules, words, take), shared, request)
        moments = _moments(model, modules, pairs, words, neutral, V, take)
    return replace(seen, leading=leading, moments=moments)


def _prompted(pair: Pair, prompts: tuple[str, str], *, bare: bool = False) -> Pair:
    """A pair with a prompt before each side, without the spaces and stops around the sides.

    ``bare`` omits the sides.
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
    """The directions that toxic words owe most to, in all layers together and in each layer,
    outside of the protected ones.

    ``shared`` (D, p) is protected. The causal moments of a streamed model come one by one and are
    not kept.

    Returns:
        V (D, K) float32, the leading eigenvectors of their sum, at most K; and the leading ones of
        each layer with their eigenvalues, as ``Activations.leading``.

    Raises:
        FitError: everything is protected.
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
    pairs: Sequence[Pair],
    words: Sequence[Sentence],
    neutral: Mapping[str, Sequence[Sentence]],
    V: Tensor,
    take: Take,
) -> Moments:
    """Moments of single words and of pieces of neutral text within the columns of V.

    A pair's weight is the sum of 1 / occurrences of its toxic words, so that every distinct word
    counts the same: in ParaDetox 63 % of the occurrences are forms of two words.
    """
    said = [[pair.toxic[a:b].lower() for a, b in pair.spans] for pair in pairs]
    occurrences = Counter(word for words in said for word in words)
    chosen = [i for i, sentence in enumerate(words) if any(sentence.weights)]
    weights = [sum(1 / occurrences[word] for word in said[i]) for i in chosen]
    tokens = {name: sum(len(s.ids) - 1 for s in neutral[name]) for name in TEXTS}
    texts = [(words, None), *((neutral[name], _PIECE) for name in TEXTS)]
    of_words, *rest = moments_within(model, modules, texts, V, take)
    moments = dict(zip(TEXTS, rest, strict=True))
    return Moments(V, of_words[chosen], torch.tensor(weights), moments, tokens)


def causal_moments(
    model: Model, modules: Modules, sentences: Sequence[Sentence], take: Take = gradients
) -> Iterator[tuple[int, Tensor]]:
    """How much chosen tokens owe, to first order, to each direction of a layer's output.

        A_l = (M + M^T) / 2,   M = 1/n  sum over tokens of  f g^T
        g   = gradient, with respect to f, of the sum of log p(chosen tokens)

    f (D,) is what the layer's FFN writes at a token. Removing u u^T from f at every token lowers
    the mean log-probability of the n chosen tokens by ``u^T A_l u``, to first order and in nats.
    No gradient with respect to weights is needed, so the memory is that of a forward pass with kept
    activations.

    Args:
        model: not edited; its weights must not require gradients.
        modules: layer -> those whose output is f, together if there are several.
        sentences: a positive weight marks a position whose next token is chosen.
        take: gives f and g.

    Yields:
        layers and A_l (D, D) float32 on the CPU, each when it is complete: a streamed model never
        has them all in memory.

    Raises:
        SourceError: the GPU is out of memory.
    """
    sums: dict[int, Tensor] = {}
    seen = Counter[int]()
    count = sum(w > 0 for s in sentences for w in s.weights)
    batched = token_batches(sentences, logit_positions(model.module), model.device)
    for number, layer, f, g in take(model, modules, batched):
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
    take: Take = gradients,
) -> list[Tensor]:
    """The same for every single sentence, summed over layers, within a few directions.

        M_i = sum over layers of  V^T (f g^T + g f^T) V / 2,   f and g as above

    For U = V X with orthonormal X (K, R), the chosen tokens of sentence i together lose ``tr X^T
    M_i X`` if the layers no longer write along U, to first order and in nats.

    Args:
        model, modules: as above.
        texts: sentences, each with a token to choose, and None or a number of positions. With a
            number, they are cut into pieces of that length, and each piece has a moment: the loss
            of the sentence if nothing is written along U in that piece.
        directions: V (D, K), orthonormal columns.
        take: gives f and g.

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
    found = take(model, modules, [batch for _, _, batch in batched])
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
    """(B, T, K) cut into pieces of ``positions``, the last one padded: (-1, positions, K)."""
    rest = (0, 0, 0, -x.shape[1] % positions)
    return nn.functional.pad(x, rest).view(-1, positions, x.shape[2])
