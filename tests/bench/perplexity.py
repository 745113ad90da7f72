"""Perplexity of checkpoints on a plain text file, the first of them as the reference.

    python tests/bench/perplexity.py TEXT MODEL [MODEL ...] [--window 512] [--tokens N]

The text is tokenized as a whole and cut into windows that do not overlap; each window's first token
is not scored, every other counts the same. Compare only numbers of one call.
"""

import math
import time
from pathlib import Path
from typing import Any

import click
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def perplexity(folder: Path, text: str, window: int, limit: int | None) -> tuple[float, int]:
    """exp of the mean negative log-likelihood per scored token, and their number."""
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")["input_ids"][0][:limit]
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.eval()
    total, count = 0.0, 0
    windows = [ids[i : i + window] for i in range(0, len(ids), window)]
    whole = [w for w in windows if len(w) == window]
    for group in torch.split(torch.stack(whole), 4):
        with torch.inference_mode():
            logits = model(group).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), group[:, 1:].flatten(), reduction="sum"
        )
        total, count = total + loss.item(), count + group[:, 1:].numel()
    return math.exp(total / count), count


@click.command()
@click.argument("text", type=click.Path(exists=True, path_type=Path))
@click.argument("models", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--window", default=512, show_default=True)
@click.option("--tokens", type=int, help="Use only so many tokens of the text.")
def main(text: Path, models: tuple[Path, ...], window: int, tokens: int | None) -> None:
    reference = None
    for model in models:
        start = time.perf_counter()
        value, count = perplexity(model, text.read_text("utf-8"), window, tokens)
        reference = reference or value
        click.echo(
            f"{model.name:32} perplexity {value:9.4f}  x {value / reference:.4f}  "
            f"({count} tokens, {time.perf_counter() - start:.0f} s)"
        )


if __name__ == "__main__":
    main()
