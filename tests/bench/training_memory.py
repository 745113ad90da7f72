"""Peak anonymous memory of DINM's training, streamed and resident, over models of several depths.

    python tests/bench/training_memory.py [--layers 4 --layers 16 --layers 64] [--mode streamed]

Synthetic Llamas (hidden size 1024, FFN 2816, 16384 tokens, tied, stored in bfloat16, run in
float32) learn a built-in instance, with the general text and the four of ``contrast`` beside it, in
the layer before the last and in the middle one. The last column divides the peak of the first mode
by that of the first depth; the number of steps does not change it. Linux only: it reads RssAnon of
/proc, in a process of its own for each model, layer and mode.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

import click
import torch

from tests.bench.forward_memory import FFN, HIDDEN, SHARD, VOCAB
from tests.bench.processes import apart, peak_of
from tests.bench.synthetic import Llama, builtin_texts, write_llama
from tests.builders.models import planned, tiny_recipe


def build(folder: Path, layers: int) -> None:
    """Write a synthetic Llama with a tokenizer of words."""
    model = Llama(
        layers=layers, hidden=HIDDEN, ffn=FFN, vocabulary=VOCAB, heads=16, kv_heads=16, tied=True
    )
    write_llama(folder, model, SHARD, builtin_texts())


def measure(folder: Path, mode: str, layer: int, steps: int, limit: int) -> dict[str, Any]:
    """One training in one mode; its model is loaded inside of it."""
    from transformers import LlamaForCausalLM  # noqa: F401 - what is idle has it loaded

    from converter.calibration.word_list import load_words
    from converter.cli.command import quiet_libraries
    from converter.methods.dinm import Method
    from converter.methods.workbench import Bench
    from converter.recipe import Settings
    from converter.runtime.cache import using_cache

    quiet_libraries()
    source, plan = planned(folder)
    recipe = tiny_recipe(folder, method="dinm", options={}, forward=mode, forward_dtype="float32")
    settings = Settings(memory_limit=limit if mode == "streamed" else None)
    with using_cache(folder):  # hidden states go to the disk that is measured
        bench = Bench.of(recipe, source, plan, load_words("builtin"), "cpu", settings)
        assert bench.dtype == torch.float32
        method, start = Method(layer=layer, steps=steps, contrast=0.1), time.perf_counter()
        peak = peak_of(lambda: method.fit(bench))
    return {"peak": peak, "seconds": time.perf_counter() - start, "gigabytes": plan.nbytes / 1e9}


@click.command()
@click.option("--layers", multiple=True, type=int, default=[4, 16, 64], show_default=True)
@click.option("--mode", multiple=True, default=["streamed", "resident"], show_default=True)
@click.option("--steps", default=1, show_default=True)
@click.option("--memory-limit", default=400_000_000, show_default=True, help="Bytes to plan with.")
def main(layers: tuple[int, ...], mode: tuple[str, ...], steps: int, memory_limit: int) -> None:
    columns = [f"{each}, {unit}" for unit in ("MB", "s") for each in mode]
    titles = ["layers", "GB of weights", "edited layer", *columns, f"{mode[0]}, by the first depth"]
    click.echo(f"| {' | '.join(titles)} |\n{'|---' * len(titles)}|")
    first: dict[str, int] = {}
    for count in layers:
        with tempfile.TemporaryDirectory() as folder:
            build(Path(folder), count)
            freed = {"MALLOC_MMAP_THRESHOLD_": "262144"}  # what is freed is given back
            for name, layer in (("L - 2", count - 2), ("L / 2", count // 2)):
                found = [
                    apart(measure, Path(folder), each, layer, steps, memory_limit, **freed)
                    for each in mode
                ]
                peak = found[0]["peak"]
                cells = [
                    str(count), f"{found[0]['gigabytes']:.2f}", f"{layer} ({name})",
                    *(f"{each['peak'] / 1e6:.0f}" for each in found),
                    *(f"{each['seconds']:.0f}" for each in found),
                    f"{peak / first.setdefault(name, peak):.2f}",
                ]  # fmt: skip
                click.echo(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
