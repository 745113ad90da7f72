"""Ways to write a checkpoint again, run in turn, and what each of them took."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from tests.bench import rows as kinds
from tests.bench.processes import Taken, measure
from tests.bench.synthetic import Llama, shard_limit, write_llama

EDITED_LEAVES = 0.1
"""An edit leaves less than this of what was along U; rounding to bfloat16 leaves about 1e-3."""

OTHERS = 0.3
"""Processors that all else on the machine may keep busy while the first row, dd, runs."""


@dataclass(frozen=True, slots=True)
class Row:
    """A line of a table: its name, which kind of ``tests/bench/rows.py`` it is, and its options."""

    name: str
    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    python: str = sys.executable

    @property
    def edits(self) -> bool:
        return self.kind not in ("dd", "cp", "mergekit")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A synthetic checkpoint on disk; ``nbytes`` are those of all its files."""

    folder: Path
    model: Llama
    shards: int
    nbytes: int

    def describe(self) -> str:
        edited = [name for name in self.model.shapes if name.endswith(kinds.EDITED)]
        share = 2 * len(edited) * self.model.hidden * self.model.ffn / self.model.nbytes
        return (
            f"{self.model.nbytes / 1e9:.2f} GB in {self.shards} shards, {self.model.layers} layers;"
            f" {len(edited)} tensors edited, {share:.0%} of the bytes"
        )


@contextmanager
def synthetic(folder: Path | None, gigabytes: float, shards: int) -> Iterator[Checkpoint]:
    """A checkpoint for a while.

    Raises:
        click.UsageError: the disk is too small for it and for a copy.
    """
    model = Llama.of_bytes(gigabytes * 1e9)
    with tempfile.TemporaryDirectory(dir=folder) as root:
        if shutil.disk_usage(root).free < 2.1 * model.nbytes:
            raise click.UsageError(f"{2.1 * model.nbytes / 1e9:.1f} GB of disk are needed")
        source = Path(root, "source").resolve()
        source.mkdir()
        write_llama(source, model, shard_limit(model, shards))
        os.sync()
        files = list(source.iterdir())
        written = sum(path.suffix == ".safetensors" for path in files)
        yield Checkpoint(source, model, written, sum(path.stat().st_size for path in files))


def run(row: Row, checkpoint: Checkpoint, out: Path) -> Taken:
    """Read the source once, then measure a row."""
    read: list[str | Path] = ["cat", *sorted(checkpoint.folder.iterdir())]
    subprocess.run(read, stdout=subprocess.DEVNULL, check=True)
    command = [row.python, kinds.__file__, row.kind, checkpoint.folder, out]
    return measure([*map(str, command), json.dumps(row.options)], out)


@dataclass(frozen=True, slots=True)
class Results:
    """What each row took in each round, and what it left along U."""

    rounds: dict[str, list[Taken]]
    left: dict[str, float]

    def ratios(self, row: str, base: str, what: str = "wall") -> list[float]:
        """``what`` of a row over the time of another, round by round."""
        pairs = zip(self.rounds[row], self.rounds[base], strict=True)
        return [getattr(taken, what) / other.wall for taken, other in pairs]

    def peak(self, row: str, what: str = "peak") -> float:
        """The highest of all rounds, in MB."""
        peaks: list[int] = [getattr(taken, what) for taken in self.rounds[row]]
        return max(peaks) / 1e6


def run_rounds(checkpoint: Checkpoint, chosen: Sequence[Row], rounds: int) -> Results:
    """Run the rows in turn, and look at what each wrote in the first round."""
    results = Results({row.name: [] for row in chosen}, {})
    for number in range(rounds):
        shift = number * len(chosen) // rounds
        for row in (*chosen[shift:], *chosen[:shift]):
            with tempfile.TemporaryDirectory(dir=checkpoint.folder.parent) as work:
                taken = run(row, checkpoint, Path(work, "out"))
                results.rounds[row.name].append(taken)
                if row.name not in results.left:
                    results.left[row.name] = kinds.leakage(checkpoint.folder, Path(work, "out"))
            os.sync()  # what deleting leaves to do is not the next row's
            click.echo(f"round {number + 1} of {rounds}, {row.name}: {taken}", err=True)
    others = max(taken.others / taken.wall for taken in results.rounds[chosen[0].name])
    if others > OTHERS:
        click.echo(f"not to be trusted: others kept {others:.1f} processors busy", err=True)
    for row in chosen:
        if row.edits != (results.left[row.name] < EDITED_LEAVES):
            raise SystemExit(f"{row.name} left {results.left[row.name]:.2g} of what was along U")
    return results
