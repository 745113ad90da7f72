"""Peak anonymous memory of a forward pass, streamed and resident, over models of several depths.

    python tests/bench/forward_memory.py [--layers 4 --layers 16 --layers 64] [--plot FILE]

Synthetic Llamas (hidden size 1024, FFN 2816, 16384 tokens, tied, stored in bfloat16, run in
float32) take random texts: first the pass that activations and second moments are taken from, then
the one for moments of gradients. Linux only: it reads RssAnon of /proc every millisecond, in a
process of its own for each model and mode. Hidden states have a quarter of ``--memory-limit``, and
the rest of them goes to a file.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from converter.memory import parse_size

HIDDEN, FFN, VOCAB = 1024, 2816, 16384
TEXTS, TOKENS = 32, 24


def anonymous() -> int:
    """Bytes of anonymous memory of this process now."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this system does not tell RssAnon")


def build(folder: Path, layers: int) -> None:
    """Write a synthetic Llama, a shard for each layer."""
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=layers, vocab_size=VOCAB,
        num_attention_heads=16, num_key_value_heads=16, tie_word_embeddings=True,
    )  # fmt: skip
    config.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    weight_map: dict[str, str] = {}

    def save(number: int, shapes: dict[str, tuple[int, ...]]) -> None:
        shard = f"model-{number:05}-of-{layers + 1:05}.safetensors"
        tensors = {
            name: (0.02 * torch.randn(shape) if len(shape) > 1 else torch.ones(shape)).bfloat16()
            for name, shape in shapes.items()
        }
        save_file(tensors, folder / shard, {"format": "pt"})
        weight_map.update(dict.fromkeys(shapes, shard))

    save(1, {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)})
    for n in range(layers):
        layer = f"model.layers.{n}"
        norms = {f"{layer}.{x}_layernorm.weight": (HIDDEN,) for x in ("input", "post_attention")}
        attention = {f"{layer}.self_attn.{x}_proj.weight": (HIDDEN, HIDDEN) for x in "qkvo"}
        ffn = {f"{layer}.mlp.{x}_proj.weight": (FFN, HIDDEN) for x in ("gate", "up")}
        save(n + 2, {**norms, **attention, **ffn, f"{layer}.mlp.down_proj.weight": (HIDDEN, FFN)})
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def peak_of(job: Callable[[], object]) -> int:
    """Bytes that a job needs above what the process has."""
    idle, peak, done = anonymous(), 0, threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, anonymous())
            time.sleep(0.001)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        job()
    finally:
        done.set()
        thread.join()
    return peak - idle


def measure(folder: Path, mode: str, limit: int) -> dict[str, Any]:
    """Both passes of one model in one mode."""
    from transformers import LlamaForCausalLM  # noqa: F401 - what is idle has it loaded

    from converter.forward import Model, Pool, SecondMoment, run
    from converter.gradients import moments_within
    from converter.models import load_language_model, stream_language_model
    from converter.options import quiet_libraries
    from converter.plan import make_plan
    from converter.resolve import resolve
    from converter.tokens import Sentence, batches

    quiet_libraries()
    source = resolve(str(folder), folder)
    plan = make_plan(source.config, source.weight_map, source.headers())
    draw = torch.Generator().manual_seed(0)
    texts = [
        Sentence(
            torch.randint(VOCAB, (TOKENS,), generator=draw).tolist(), [1.0] * (TOKENS - 1) + [0]
        )
        for _ in range(TEXTS)
    ]
    layers = plan.dimensions.num_hidden_layers
    modules = {n: plan.architecture.ffn.format(layer=n) for n in range(layers // 4, layers)}
    directions = torch.linalg.qr(torch.randn(HIDDEN, 32, generator=draw))[0]

    def model() -> Model:
        if mode == "resident":
            return load_language_model(source, plan, None, torch.float32, "cpu")
        return stream_language_model(source, plan, None, torch.float32, "cpu", limit, folder)

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
@click.option("--child", nargs=2, hidden=True)
def main(
    layers: tuple[int, ...], memory_limit: str, plot: Path | None, child: tuple[str, str] | None
) -> None:
    limit = parse_size(memory_limit)
    assert limit is not None
    if child:
        click.echo(json.dumps(measure(Path(child[0]), child[1], limit)))
        return
    click.echo(
        "| layers | GB of weights | streamed: activations, MB | gradients, MB "
        "| resident: activations, MB | gradients, MB | seconds, streamed | resident |"
    )
    click.echo("|---|---|---|---|---|---|---|---|")
    rows = []
    for count in layers:
        with tempfile.TemporaryDirectory() as folder:
            build(Path(folder), count)
            command = [sys.executable, __file__, "--child", folder]
            env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144"}  # freed is given back
            s, r = (
                json.loads(
                    subprocess.check_output(
                        [*command, mode, "--memory-limit", memory_limit], env=env
                    )
                )
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
