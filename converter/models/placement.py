"""Decide whether the forward pass holds the whole model, or one layer at a time."""

import re
from collections import Counter
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch

from converter.checkpoints.plan import Plan
from converter.errors import OptionError, SourceError
from converter.manifest import ForwardRecord
from converter.models.batching import BATCH_TOKENS, LOGITS_BYTES
from converter.runtime.memory import address_space, available_memory, free_memory

Mode = Literal["resident", "streamed"]


_WHY = "an evaluation writes continuations, for which"
_HINT = "give --forward resident or --device map, or do without the evaluation"


@dataclass(frozen=True, slots=True)
class Forward:
    """How the model is run, and why.

    Attributes:
        reason: depends on the inputs, not on how much memory happened to be free.
        budget: bytes of memory to plan with.
    """

    mode: Mode
    reason: str
    budget: int

    def record(self, held_out_dtype: str | None = None) -> ForwardRecord:
        """The record for the manifest, and for a plan, which does not know the dtype."""
        return ForwardRecord(mode=self.mode, reason=self.reason, held_out_dtype=held_out_dtype)

    def need_resident(self, why: str = _WHY, hint: str = _HINT) -> None:
        """Raise an error if the whole model must be in memory and is not.

        Args:
            why: the beginning of the message; by default for continuations, where each token is a
                separate pass.
            hint: of the message.
        """
        if self.mode == "resident":
            return
        what = f"{why} the whole model must be in memory"
        if self.reason == _ASKED:
            raise OptionError(what, found="--forward streamed", hint=hint)
        raise SourceError(what, found=self.reason, hint=hint)


_ASKED = "asked for"


def choose_forward(
    asked: Literal["auto"] | Mode,
    plan: Plan,
    dtype: torch.dtype,
    device: str,
    limit: int | None,
    *,
    spread: bool,
) -> Forward:
    """``auto`` is resident if the model fits in memory comfortably, else streamed.

    Args:
        limit: bytes of memory to plan with, if less than the available memory.
        spread: whether the model is spread over several devices, which only a resident model can
            be.

    Raises:
        OptionError: streamed and spread.
    """
    available = available_memory()
    budget = min(available, limit or available)
    if asked == "streamed" and spread:
        raise OptionError("--forward streamed", expected="one device", found="--device map")
    streams = plan.architecture.proof is None or plan.architecture.proof.streams
    if asked == "streamed" and not streams:
        raise OptionError(
            "--forward streamed", expected="layers that pass on hidden states and nothing else",
            found=f"{plan.architecture.title}, whose layers use the embedding or one another",
            hint="give --forward resident, or --device map",
        )  # fmt: skip
    if asked != "auto":
        return Forward(asked, _ASKED, budget)
    if spread:
        return Forward("resident", "--device map", budget)
    weights = plan.num_parameters * dtype.itemsize
    free = budget if device == "cpu" else free_memory(device)
    mapped = plan.nbytes  # transformers maps the shards into the address space
    fits = weights + margin(plan, dtype) <= free and weights + mapped <= address_space()
    size = f"{weights / 1e9:.1f} GB of weights"
    if fits:
        return Forward("resident", f"{size} fit in memory", budget)
    if not streams:
        return Forward("resident", f"{size}, and layers that cannot be run one by one", budget)
    return Forward("streamed", f"{size} do not fit in memory comfortably", budget)


def needed_weights(plan: Plan, dtype: torch.dtype, mode: Mode) -> int:
    """Bytes of weights in memory at a time during a forward pass.

    A layer's tensors are those whose names have the same beginning, up to the number, as its
    down-projections.
    """
    if mode == "resident":
        return plan.num_parameters * dtype.itemsize
    layers: Counter[str] = Counter()
    starts = {t.info.name.partition(f".{t.layer}.")[0] for t in plan.targets}
    pattern = re.compile(rf"({'|'.join(map(re.escape, starts))})\.\d+\.")
    for header in plan.headers.values():
        for name, info in header.tensors.items():
            if found := pattern.match(name):
                layers[found[0]] += prod(info.shape)
    return max(layers.values()) * dtype.itemsize


def margin(
    plan: Plan, dtype: torch.dtype, mode: Mode = "resident", *, gradients: bool = True
) -> int:
    """The approximate bytes that a forward pass and its gradients take besides the weights.

    Logits and their derivatives; about 10 hidden states and 3 FFN states that a layer keeps for the
    backward pass, for a batch of ``BATCH_TOKENS`` positions; and two (D, D) sums for each layer. A
    streamed model keeps what a layer does of one layer at a time.
    """
    sizes = plan.dimensions
    position = 10 * sizes.hidden_size + 3 * sizes.intermediate_size
    layers = sizes.num_hidden_layers if mode == "resident" else 1
    kept = gradients * BATCH_TOKENS * layers * position * dtype.itemsize
    return 4 * LOGITS_BYTES + kept + 2 * sizes.num_hidden_layers * sizes.hidden_size**2 * 4
