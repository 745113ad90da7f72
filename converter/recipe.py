"""``Run``: everything the result of a conversion depends on, and nothing else."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One conversion, as asked for. The manifest records it with paths cut down to file names.

    Attributes:
        source: a folder, a Hub repo id with an optional ``@revision``, or ``demo``.
        method: name of a module in ``converter.methods``.
        options: the method's own options as typed (``-o key=value``), before their defaults.
        pairs: ``builtin``, a file, or a Hub dataset id with an optional ``@revision``.
        num_pairs: pairs to draw, or None for all that are usable, at most
            ``converter.pairs.MAX_PAIRS``.
        seed: of that draw, of the split into parts, and of the guard's random subspaces.
        neutral: ``builtin`` or a plain text file: ordinary prose for the neutral statistics.
        word_list: ``builtin`` (the list of the package better-profanity) or a file, a word a line.
        output: ``checkpoint``, the whole model again, or ``adapter``, a LoRA to load on the source;
            see ``converter.outputs.registry``.
        activations: a file written by an earlier run, used instead of a forward pass.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:n``; or ``map``, over all GPUs and the memory.
        forward_dtype: dtype of the forward pass: ``auto``, ``float32``, ``bfloat16``, ``float16``.
        forward: ``resident``, the whole model in memory; ``streamed``, a layer at a time, which
            changes the result by rounding only; ``auto`` to stream what does not fit comfortably.
        batch_size: sentences in one forward pass; changes the result by rounding only.
        rounding: how edited weights are rounded: ``null-space`` or ``nearest``; see
            ``converter.projector``.
        max_perplexity_ratio: the budget: perplexity on held-out neutral text, after over before.
        guard: whether the edit is examined before anything is written.
        guard_draws: random subspaces that it is compared with.
        force: write an edit that the guard refuses.
        mask: star out offensive words in what is written.
        base_model: Hub repo id that the card names as the base when the source is a folder.
        subfolder: of the source, that the checkpoint is in.
        trust_remote_code: execute code that the source brings along, as transformers may.
    """

    source: str
    method: str = "gloss"
    options: dict[str, str] = field(default_factory=dict)
    pairs: str = "builtin"
    num_pairs: int | None = None
    seed: int = 0
    neutral: str = "builtin"
    word_list: str = "builtin"
    output: Literal["checkpoint", "adapter"] = "checkpoint"
    activations: Path | None = None
    device: str = "auto"
    forward_dtype: str = "auto"
    forward: Literal["auto", "resident", "streamed"] = "auto"
    batch_size: Annotated[int, Meta(ge=1)] = 16
    rounding: Literal["null-space", "nearest"] = "null-space"
    max_perplexity_ratio: float = 1.03
    guard: bool = True
    guard_draws: Annotated[int, Meta(ge=1)] = 3
    force: bool = False
    mask: bool = True
    base_model: str | None = None
    subfolder: str = ""
    trust_remote_code: bool = False


def without_folders(text: str) -> str:
    """A path cut down to its file name; repo ids and keywords as they are."""
    path = Path(text)
    is_path = path.is_absolute() or path.exists() or text.startswith((".", "~"))
    return path.resolve().name if is_path else text
