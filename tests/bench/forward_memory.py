"""Peak anonymous memory of a forward pass, streamed and resident, over models of several depths.

    python tests/bench/forward_memory.py [--layers 4 --layers 16 --layers 64] [--plot FILE]

Synthetic Llamas (hidden size 1024, FFN 2816, 16384 tokens, tied, stored in bfloat16, run in
float32) take random texts: first the pass that activations and second moments are taken from, then
the one for moments of gradients. Linux only: it reads RssAnon of /proc, in a process of its own for
each model and mode. Hidden states have their share of ``--memory-limit``; the rest is in a file.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

import click
import torch

from converter.recipe import parse_size
from tests.bench.processes import apart, peak_of
from tests.bench.synthetic import Llama, write_llama
from tests.builders.models import planned

HIDDEN, FFN, VOCAB, SHARD = 1024, 2816, 16384, 60_000_000
TEXTS, TOKENS = 32, 24


def build(folder: Path, layers: int) -> None:
    """Write a synthetic Llama."""
    model = Llama(
        layers=layers, hidden=HIDDEN, ffn=FFN, vocabulary=VOCAB, heads=16, kv_heads=16, tied=True
    )
    write_llama(folder, model, SHARD)


def measure(folder: Path, mode: str, limit: int) -> dict[str, Any]:
    """Both passes of one model in one mode."""
    from transformers import LlamaForCausalLM  # noqa: F401 - what is idle has it loaded

    from converter.calibration.collect import moments_within
    from converter.cli.command import quiet_libraries
    from converter.models.batching import Sentence, batches
    from converter.models.loading import load_language_model, stream_language_model
    from converter.models.resident import Model, Pool, SecondMoment, run
    from converter.runtime.cache import using_cache

    quiet_libraries()
    source, plan = planned(folder)
    draw = torch.Generator().manual_seed(0)
    texts = [
        Sentence(
            torch.randint(VOCAB, (TOKENS,), generator=draw).tolist(), [1.0] * (TOKENS - 1) + [0]
        )
        for _ in range(TEXTS)
    ]
    layers = plan.dimensions.num_hidden_layers
    modules = {n: plan.architecture.sites(n) for n in range(layers // 4, layers)}
    directions = torch.linalg.qr(torch.randn(HIDDEN, 32, generator=draw))[0]

    def model() -> Model:
        if mode == "resident":
            return load_language_model(source, plan, None, torch.float32, "cpu")
        with using_cache(folder):  # hidden states go to the disk that is measured
            return stream_language_model(source, plan, None, torch.float32, "cpu", limit)

    def activations() -> None:
        moment, batched = SecondMoment(), batches(texts, 8, "cpu")
        run(model(), modules, [(batched, [Pool(TEXTS), moment.group(batched)])])
        moment.result()

    def gradients() -> None:
        moments_within(model(), modules, [(texts, None)], directions)

    found: dict[str, Any] = {"gigabytes": plan.nbytes / 1e9}
    for job in (activations, gradients):
        start = time.perf_counter()
        found[job.__name__] = peak_of(job)
        found[f"{job.__name__} seconds"] = time.perf_counter() - start
    return found


@click.command()
@click.option("--layers", multiple=True, type=int, default=[4, 16, 64], show_default=True)
@click.option("--memory-limit", default="400MB", show_default=True)
@click.option("--plot", type=click.Path(path_type=Path), help="A picture of the table.")
def main(layers: tuple[int, ...], memory_limit: str, plot: Path | None) -> None:
    limit = parse_size(memory_limit)
    click.echo(
        "| layers | GB of weights | streamed: activations, MB | gradients, MB "
        "| resident: activations, MB | gradients, MB | seconds, streamed | resident |"
    )
    click.echo("|---|---|---|---|---|---|---|---|")
    rows = []
    for count in layers:
        with tempfile.TemporaryDirectory() as folder:
            build(Path(folder), count)
            freed = {"MALLOC_MMAP_THRESHOLD_": "262144"}  # what is freed is given back
            s, r = (
                apart(measure, Path(folder), mode, limit, **freed)
                for mode in ("streamed", "resident")
            )
        rows.append((count, s, r))
        peaks = (f"{x[name] / 1e6:.0f}" for x in (s, r) for name in ("activations", "gradients"))
        times = (f"{x['activations seconds'] + x['gradients seconds']:.0f}" for x in (s, r))
        size = f"{s['gigabytes']:.2f}"
        click.echo(f"| {' | '.join([str(count), size, *peaks, *times])} |")
    if plot is not None:
        draw(rows, plot)


def draw(rows: list[tuple[int, Any, Any]], path: Path) -> None:
    """Peaks over the number of layers."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    counts = [count for count, _, _ in rows]
    found = {"streamed": [s for _, s, _ in rows], "resident": [r for _, _, r in rows]}
    for mode, results in found.items():
        for name, style in (("activations", "-"), ("gradients", "--")):
            values = [result[name] / 1e9 for result in results]
            axes.plot(counts, values, style, marker="o", label=f"{mode}, {name}")
    axes.set(xlabel="layers", ylabel="peak above idle, GB", ylim=(0, None))
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
