"""The whole job of ``gloss-convert`` and each of its stages, as multiples of one forward pass.

    python -m tests.bench.job [--source demo] [--forward resident --forward streamed] [--rounds 5]

The yardstick is one plain float32 forward pass of transformers over the same texts (both sides of
all pairs and all prose, batches of ``BATCH_TOKENS`` positions, logits computed and thrown away): a
multiple of it survives another machine, where seconds do not. In each round the pass and every way
to do the job run once, in turn, each in a process of its own with an empty cache; the demo model
is unpacked before. A table has the median over the rounds of the ratios within a round, of CPU
seconds; those of the wall follow. ``import`` is what importing takes, ``other`` what no stage says.
It also says what was chosen and the sha256 of the edited tensors: the same decision, or it is no
saving.
"""

import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import click

from tests.bench.processes import apart


@dataclass(frozen=True, slots=True)
class Took:
    """Seconds of a run: of the processors and of the clock, and of the processors in each stage."""

    cpu: float
    wall: float
    stages: dict[str, float] = field(default_factory=dict)
    said: str = ""


def plain(source: str, options: dict[str, Any]) -> Took:
    """One forward pass of transformers over all texts; loading is not counted."""
    import torch
    from transformers import AutoModelForCausalLM

    from converter.calibration.pairs import load_pairs, load_prose
    from converter.calibration.word_list import load_words
    from converter.checkpoints.resolve import resolve
    from converter.models.batching import Encoder, token_batches
    from converter.models.loading import load_tokenizer
    from converter.recipe import Recipe

    folder = resolve(source).folder
    load: Any = AutoModelForCausalLM.from_pretrained
    model = load(folder, dtype=torch.float32).eval()
    recipe = Recipe(source=source, **options)
    words, prose = load_words(recipe.word_list), load_prose(recipe.neutral)
    pairs = load_pairs(recipe.pairs, words, recipe.num_pairs, recipe.seed)
    sides = [text for pair in pairs.pairs for text in (pair.toxic, pair.neutral)]
    encode = Encoder(load_tokenizer(folder), model)
    sentences = [encode(text, "mean", ()) for text in (*sides, *prose.paragraphs)]
    batched = token_batches(sentences, 1024, "cpu")
    cpu, wall = time.process_time(), time.perf_counter()
    with torch.inference_mode():
        for batch in batched:
            model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
    said = f"{len(sentences)} texts, {sum(len(s.ids) for s in sentences)} tokens"
    return Took(time.process_time() - cpu, time.perf_counter() - wall, {}, said)


def job(source: str, options: dict[str, Any], out: str) -> Took:
    """A conversion; what a stage takes is that of the processors."""
    cpu, wall = time.process_time(), time.perf_counter()
    from converter.api import convert
    from converter.recipe import Recipe
    from converter.runtime import progress

    stages = {"import": time.process_time() - cpu}
    clock = SimpleNamespace(**{**vars(time), "perf_counter": time.process_time})
    with patch.object(progress, "time", clock), progress.recording() as told:
        manifest = convert(Recipe(source=source, **options), out)
    found = Took(time.process_time() - cpu, time.perf_counter() - wall)
    stages |= told.seconds
    stages["other"] = found.cpu - sum(stages.values())
    digests = json.dumps([edit.sha256_after for edit in manifest.edited])
    choice = manifest.choice
    said = f"strength {choice.strength:g}, {len(manifest.edited)} tensors"
    said += f", sha256 {hashlib.sha256(digests.encode()).hexdigest()[:16]}"
    return Took(found.cpu, found.wall, stages, said)


def in_new_cache(work: Callable[..., Took], *args: Any) -> Took:
    """What some work takes in a process of its own; its cache holds the demo model at most."""
    from converter.runtime.cache import default_cache

    with tempfile.TemporaryDirectory() as folder:
        demo = default_cache() / "demo"
        if demo.is_dir():
            Path(folder, "demo").symlink_to(demo.resolve())
        out = [str(Path(folder, "out"))] if work is job else []
        return apart(work, *args, *out, GLOSS_CACHE_DIR=folder, HF_HUB_OFFLINE="1")


def rows(jobs: Sequence[Took], passes: Sequence[Took]) -> dict[str, float]:
    """Medians of the ratios within rounds: each stage's CPU seconds, the whole, and the wall."""
    ratios: dict[str, list[float]] = {}
    for took, one in zip(jobs, passes, strict=True):
        for name, seconds in {**took.stages, "whole job": took.cpu}.items():
            ratios.setdefault(name, []).append(seconds / one.cpu)
        ratios.setdefault("whole job, wall", []).append(took.wall / one.wall)
    return {name: median(found) for name, found in ratios.items()}


@click.command(help=__doc__)
@click.option("--source", default="demo")
@click.option("--forward", multiple=True, default=["resident"], help="Ways to do the job.")
@click.option("--dtype", multiple=True, default=["auto"], help="Of the job's forward passes.")
@click.option("--rounds", default=5)
@click.option("-o", "given", multiple=True, help="KEY=VALUE of the recipe, for every job.")
def main(
    source: str, forward: Sequence[str], dtype: Sequence[str], rounds: int, given: Sequence[str]
) -> None:
    from converter.checkpoints.resolve import resolve

    resolve(source)
    more = {key: json.loads(value) for key, _, value in (text.partition("=") for text in given)}
    ways = [(f"{way}, {kind}", {"forward": way, "forward_dtype": kind, **more})
            for way in forward for kind in dtype]  # fmt: skip
    passes, jobs = list[Took](), {name: list[Took]() for name, _ in ways}
    for number in range(rounds):
        passes.append(in_new_cache(plain, source, more))
        click.echo(f"round {number + 1}, plain: {_line(passes[-1])}", err=True)
        for name, options in ways:
            jobs[name].append(in_new_cache(job, source, options))
            click.echo(f"round {number + 1}, {name}: {_line(jobs[name][-1])}", err=True)
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    one = median(took.cpu for took in passes), median(took.wall for took in passes)
    click.echo(
        f"one pass: {one[0]:.1f} CPU s, {one[1]:.1f} s, {passes[0].said}, {threads} threads, "
        f"median of {rounds}\n"
    )
    found = {name: rows(took, passes) for name, took in jobs.items()}
    click.echo(f"| stage | {' | '.join(found)} |\n|---|{'---|' * len(found)}")
    for stage in dict.fromkeys(stage for each in found.values() for stage in each):
        cells = (f"{each.get(stage, 0):.2f}" for each in found.values())
        click.echo(f"| {stage} | {' | '.join(cells)} |")
    for name, took in jobs.items():
        click.echo(f"\n{name}: {'; '.join(sorted({each.said for each in took}))}")


def _line(took: Took) -> str:
    stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in took.stages.items())
    return f"{took.cpu:.1f} CPU s, {took.wall:.1f} s; {stages or took.said}"


if __name__ == "__main__":
    sys.exit(main())
