"""Prove a description of an architecture on a tiny model, before it is used.

Theorem, of which each sentence is tested: A vector added to a site's output moves the residual
stream by a multiple of it, at each position; so an output without a component along U adds none to
the stream. The FFN's output at a position depends only on that position. After the named tensors of
the checkpoint are projected along their axes and loaded again by transformers, the model computes
the same as with projected FFN outputs; behind a norm, along diag(g) U.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import wraps
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn

from converter.checkpoints.architectures import known_models, library
from converter.checkpoints.architectures.architecture import (
    Architecture,
    FfnSpec,
    Proof,
    WeightSpec,
)
from converter.checkpoints.architectures.experiments import Layer, first_tensor, related
from converter.checkpoints.architectures.ffn import examine, find_ffns
from converter.checkpoints.architectures.inference import Inferred
from converter.checkpoints.architectures.tiny import Tiny

_RANK = 2
"""Number of removed directions."""


def prove(inferred: Inferred, described_by: str = "inference") -> Proof:
    """Prove a description.

    Args:
        described_by: what it was made by.

    Raises:
        ValueError: a sentence of the theorem is false; the message names it.
    """
    architecture, tiny = inferred.architecture, inferred.tiny
    for number, layer in enumerate(inferred.layers):
        ffns = architecture.layer(number).ffns
        if layer is not None:
            _check_layer(number, layer, [_inside(architecture, ffn) for ffn in ffns])
        elif ffns:
            raise ValueError(f"text does not run through layer {number}")
    U = _directions(next(layer.width for layer in inferred.layers if layer)).to(tiny.dtype)
    bases = {
        (number, ffn): _before(U, ffn, number, tiny.tensors)
        for number in range(len(inferred.layers))
        for ffn in architecture.layer(number).ffns
    }
    tensors, changed = dict(tiny.tensors), 0
    for (number, ffn), basis in bases.items():
        for spec in ffn.weights:
            for name, axis in _named(spec, number, tensors):
                tensors[name] = _projected(tensors[name], axis, basis)
                changed += 1
    edited = tiny.reloaded(tensors)
    _check_round_trip(edited, tensors)
    error, left = _compared(tiny, edited, bases, U)
    if not error <= tiny.tolerance:
        raise ValueError(
            "projecting the named tensors does not project what the feed-forward networks give: "
            f"logits differ by {error:.1e} of what the projection changes"
        )
    if not left <= tiny.tolerance:
        raise ValueError(
            "a norm after the feed-forward network turns what it gives: "
            f"{left:.1e} of it is left along the directions that were taken out"
        )
    return Proof(
        described_by, known_models.version(), len(inferred.layers), changed, tiny.tolerance, error,
        left, _streams(inferred),
    )  # fmt: skip


def _directions(width: int) -> Tensor:
    """U (D, R) float64, orthonormal columns."""
    generator = torch.Generator().manual_seed(13)
    drawn = torch.randn((width, _RANK), generator=generator, dtype=torch.float64)
    basis: Tensor = torch.linalg.qr(drawn)[0]
    return basis


def _compared(
    tiny: Tiny, edited: nn.Module, bases: Mapping[tuple[int, FfnSpec], Tensor], U: Tensor
) -> tuple[float, float]:
    """``Proof.error`` and ``Proof.left`` of a model with projected tensors.

    Args:
        bases: to project out of the FFNs' outputs in the tiny model, by hooks.
        U: of the output that reaches the residual stream.
    """
    plain, sites = tiny.run(), dict[str, Tensor]()
    with ExitStack() as stack:
        for (number, ffn), basis in bases.items():
            module = tiny.model.get_submodule(ffn.module.format(layer=number))
            stack.callback(module.register_forward_hook(_projecting(basis)).remove)
        wanted = tiny.run()
    with ExitStack() as stack:
        for number, ffn in bases:
            name = ffn.site.format(layer=number)
            hook = _keeping(sites, name)
            stack.callback(edited.get_submodule(name).register_forward_hook(hook).remove)
        found = tiny.run(edited)
    effect = float((wanted - plain).abs().max())
    error = float((found - wanted).abs().max()) / effect if effect else float("inf")
    return error, max(float((f @ U).abs().max() / f.abs().max()) for f in sites.values())


def _streams(inferred: Inferred) -> bool:
    """Whether each layer gives the same output if no other layer runs."""
    blocks = [layer.block for layer in inferred.layers if layer]
    try:
        for number, layer in enumerate(inferred.layers):
            if layer is None:
                continue
            found = _alone(inferred.tiny, layer, blocks, embeds=number == 0)
            if not torch.equal(found, layer.given):
                return False
    except Exception:  # a class may need anything that other layers leave behind
        return False
    return len(blocks) == len(inferred.layers)


def _alone(tiny: Tiny, layer: Layer, blocks: Sequence[nn.Module], *, embeds: bool) -> Tensor:
    """The output of a layer for its original input, if all other layers return their input.

    Args:
        embeds: whether the embedding works, or returns zeros, as for a streamed layer that is not
            the first.
    """
    state = layer.call.state
    seen: list[Tensor] = []
    wrapped: dict[nn.Module, Any] = {block: block.forward for block in blocks}
    embedding = tiny.model.get_input_embeddings()

    def stand_in(block: nn.Module) -> Any:
        length = len(layer.call.output) if isinstance(layer.call.output, tuple) else 0

        @wraps(wrapped[block])
        def forward(*args: Any, **kwargs: Any) -> Any:
            if block is layer.block:
                if args:
                    output = wrapped[block](state, *args[1:], **kwargs)
                else:
                    output = wrapped[block](**kwargs | {"hidden_states": state})
                given = first_tensor(output)
                assert given is not None
                seen.append(given)
                return output
            first = args[0] if args else kwargs["hidden_states"]
            return (first, *[None] * (length - 1)) if length else first

        return forward

    def zeros(*args: Any, **kwargs: Any) -> Tensor:
        return torch.zeros_like(wrapped[embedding](*args, **kwargs))

    try:
        for block in blocks:
            block.forward = stand_in(block)
        if not embeds:
            wrapped[embedding] = embedding.forward
            embedding.forward = zeros
        tiny.run()
    finally:
        for module, forward in wrapped.items():
            module.forward = forward
    return seen[0]


def _inside(architecture: Architecture, ffn: FfnSpec) -> tuple[str, str]:
    """The module and the site of an FFN, within the layer."""
    start = f"{architecture.block}."
    return ffn.module.removeprefix(start), ffn.site.removeprefix(start)


def _check_layer(number: int, layer: Layer, ffns: list[tuple[str, str]]) -> None:
    """Raise ValueError if the described FFNs of a layer are not its real ones."""
    for module, site in ffns:
        if module not in layer.modules or site not in layer.modules:
            raise ValueError(f"layer {number} has no module {module}")
        if not layer.writes(site):
            raise ValueError(
                f"a vector added to what {site} gives in layer {number} does not move the residual "
                "stream by a multiple of it"
            )
        try:
            examine(layer, module)
        except ValueError as error:
            raise ValueError(f"in layer {number}, {error}") from error
    _check_together(number, layer, ffns)
    for found in find_ffns(layer):
        if not any(related(found.module, module) for module, _ in ffns):
            raise ValueError(
                f"layer {number} has a feed-forward network {found.module} that is not described"
            )


def _check_together(number: int, layer: Layer, ffns: list[tuple[str, str]]) -> None:
    """Raise ValueError if the FFNs of a layer do not add to the stream in parallel and with equal
    weight: activations are their sum, so the gradient must be the same for each.
    """
    vector = layer.vectors(3)
    shifts = [layer.shift(site, vector) for _, site in ffns]
    for (one, site), (other, _) in permutations(ffns, 2):
        if layer.feeds(site, other):
            raise ValueError(f"in layer {number}, {other} reads what {one} has written")
    for shift in shifts[1:]:
        if (shift - shifts[0]).abs().max() > layer.tolerance * shifts[0].abs().max():
            raise ValueError(f"in layer {number}, feed-forward networks are weighted differently")


def _before(U: Tensor, ffn: FfnSpec, number: int, tensors: Mapping[str, Any]) -> Tensor:
    """The basis for the down-projections' output, from U (D, R) for the site's output."""
    if not ffn.norm:
        return U
    gain = tensors[ffn.norm.format(layer=number)].to(U.dtype) + ffn.norm_offset
    basis: Tensor = torch.linalg.qr(gain[:, None] * U)[0]
    return basis


def _named(spec: WeightSpec, number: int, tensors: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Names and output axes of the tensors of a weight in a layer, and of its bias."""
    for template in (spec.weight, spec.bias):
        name = re.escape(template.replace("{layer}", str(number))).replace(r"\{expert\}", r"\d+")
        pattern = re.compile(name)
        for found in [n for n in tensors if pattern.fullmatch(n)]:
            yield found, spec.output_axis if template == spec.weight else -1


def _projected(tensor: Any, axis: int, basis: Tensor) -> Tensor:
    if not isinstance(tensor, Tensor) or tensor.shape[axis] != len(basis):
        raise ValueError(f"axis {axis} of a down-projection is not that of its outputs")
    moved = tensor.movedim(axis, -1)
    return (moved - (moved @ basis) @ basis.T).movedim(-1, axis).contiguous()


def _check_round_trip(model: Any, tensors: Mapping[str, Any]) -> None:
    """Raise ValueError if transformers does not write the tensors that it read."""
    written = library.on_disk(model, model.state_dict())
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and name not in written:
            raise ValueError(f"transformers reads the tensor {name}, and does not write it")


def _projecting(basis: Tensor) -> Any:
    def project(x: Tensor) -> Tensor:
        return x - (x @ basis) @ basis.T

    def hook(module: Any, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (project(output[0]), *output[1:])
        return project(output)

    return hook


def _keeping(found: dict[str, Tensor], name: str) -> Any:
    def hook(module: Any, args: Any, output: Any) -> None:
        given = first_tensor(output)
        assert given is not None
        found[name] = given.clone()

    return hook
