"""What tokens owe to what layers write: outer products of activations and gradients."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from converter.errors import SourceError
from converter.forward import LanguageModel
from converter.tokens import BATCH_TOKENS, Batch, Sentence, token_batches

Advance = Callable[[int], object]


def causal_moments(
    model: LanguageModel,
    modules: Mapping[int, str],
    sentences: Sequence[Sentence],
    advance: Advance = lambda count: None,
) -> dict[int, Tensor]:
    """How much chosen tokens owe, to first order, to each direction of what a layer writes.

        A_l = (M + M^T) / 2,   M = 1/n  sum over tokens of  f g^T
        g   = gradient, with respect to f, of the sum of log p(chosen tokens)

    f (D,) is what the layer's FFN writes at a token. Removing u u^T from f at every token lowers
    the mean log-probability of the n chosen tokens by ``u^T A_l u``, to first order and in nats.
    The gradient with respect to weights is not needed, so the memory is that of a forward pass
    whose activations are kept.

    Args:
        model: not edited; its weights must not require gradients.
        modules: layer -> module whose output is f.
        sentences: a positive weight marks a position whose next token is chosen.
        advance: called with the number of sentences done since the last call.

    Returns:
        layer -> A_l (D, D) float32 on the CPU.

    Raises:
        SourceError: the GPU is out of memory.
    """
    sums: dict[int, Tensor] = {}
    count = sum(w > 0 for s in sentences for w in s.weights)
    for batch, products in _gradients(model, modules, sentences, advance):
        for layer, (f, g) in products.items():
            content = batch.content.to(f.device)
            if layer not in sums:
                sums[layer] = torch.zeros(f.shape[-1], f.shape[-1], device=f.device)
            sums[layer].addmm_(f[content].T, g[content])
    return {layer: ((m + m.T) / (2 * max(count, 1))).cpu() for layer, m in sums.items()}


def moments_within(
    model: LanguageModel,
    modules: Mapping[int, str],
    sentences: Sequence[Sentence],
    directions: Tensor,
    positions: int | None = None,
    advance: Advance = lambda count: None,
) -> Tensor:
    """The same, of every sentence by itself, summed over layers, and seen in a few directions.

        M_i = sum over layers of  V^T (f g^T + g f^T) V / 2,   f and g as above

    For U = V X with orthonormal X (K, R), ``tr X^T M_i X`` is what the chosen tokens of sentence i
    lose together if the layers no longer write along U, to first order and in nats.

    Args:
        model, modules, sentences, advance: as above; every sentence has a token to choose.
        directions: V (D, K), orthonormal columns.
        positions: cut every sentence into pieces of so many positions, and give a moment for each:
            what the sentence loses if nothing is written along U there.

    Returns:
        (n, K, K) float32 on the CPU, n sentences or pieces, in their order.
    """
    found, owners = [], []
    for batch, products in _gradients(model, modules, sentences, advance):
        length = batch.ids.shape[1]
        piece = positions or length
        rest = (0, 0, 0, -length % piece)
        inside = nn.functional.pad(batch.content, rest[2:]).view(-1, piece).any(1).cpu()
        total = torch.zeros(len(inside), directions.shape[1], directions.shape[1])
        for f, g in products.values():
            V, content = directions.to(f), batch.content.to(f.device)[..., None]
            pieces = [
                nn.functional.pad(x, rest).view(-1, piece, V.shape[1])
                for x in ((f * content) @ V, g @ V)
            ]
            total += (pieces[0].transpose(1, 2) @ pieces[1]).cpu()
        found.append(((total + total.transpose(1, 2)) / 2)[inside])
        rows = torch.tensor(batch.rows).repeat_interleave(-(-length // piece))
        owners.append(rows[inside])
    order = torch.cat(owners).argsort(stable=True)
    return torch.cat(found)[order]


def _gradients(
    model: LanguageModel,
    modules: Mapping[int, str],
    sentences: Sequence[Sentence],
    advance: Advance,
) -> Iterator[tuple[Batch, dict[int, tuple[Tensor, Tensor]]]]:
    """Of each batch: layer -> f and g, (B, T, D) float32."""
    for batch in token_batches(sentences, BATCH_TOKENS, model.device):
        try:
            outputs, loss = _log_probability(model, modules, batch)
            gradients = torch.autograd.grad(loss, list(outputs.values()))
        except torch.OutOfMemoryError as error:
            raise SourceError(
                f"the GPU is out of memory with gradients of {len(batch.rows)} sentences",
                hint="do without gradients: -o basis=candidates "
                "-o candidates=mean+svd -o ranking=mean-difference",
            ) from error
        products = {}
        for (layer, f), g in zip(outputs.items(), gradients, strict=True):
            f, g = (x.detach().float().view(*batch.ids.shape, -1) for x in (f, g))
            products[layer] = f, g
        yield batch, products
        advance(len(batch.rows))


def _log_probability(
    model: LanguageModel, modules: Mapping[int, str], batch: Batch
) -> tuple[dict[int, Tensor], Tensor]:
    """The modules' outputs, in order of execution, and the sum of log p of the chosen tokens.

    The vocabulary is large, so logits are computed where a token is chosen and nowhere else.
    """
    outputs: dict[int, Tensor] = {}
    rows, places = torch.nonzero(batch.weights > 0, as_tuple=True)

    def hook(layer: int) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        def keep(module: nn.Module, args: Any, output: Any) -> Any:
            first = output[0] if isinstance(output, tuple) else output
            if not first.requires_grad:  # the graph starts here; layers below need none
                first = first.detach().requires_grad_()
            outputs[layer] = first
            copy = first.clone()  # some models add to it in place
            return (copy, *output[1:]) if isinstance(output, tuple) else copy

        return keep

    def choose(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0][rows.to(args[0].device), places.to(args[0].device)][None], *args[1:])

    head: Any = model.module
    handles = [
        model.module.get_submodule(name).register_forward_hook(hook(layer))
        for layer, name in modules.items()
    ]
    handles.append(head.get_output_embeddings().register_forward_pre_hook(choose))
    try:
        with torch.enable_grad():
            logits = model.module(
                input_ids=batch.ids,
                attention_mask=batch.mask,
                position_ids=batch.positions,
                use_cache=False,
            ).logits[0]
            wanted = batch.ids[rows, places + 1].to(logits.device)
            loss = -nn.functional.cross_entropy(logits.float(), wanted, reduction="sum")
    finally:
        for handle in handles:
            handle.remove()
    return outputs, loss
