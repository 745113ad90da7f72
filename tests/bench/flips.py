"""Every byte of finished outputs flipped in turn, and every value of their manifests forged.

    python -m tests.bench.flips [--step 16] [--processes 2]

Makes a tiny checkpoint in three shards and a tiny adapter, and for each: flips one bit of every
byte of every file (of tensors, of the first, the last and each ``--step``-th byte), one at a time,
and verifies; then puts other values in place of every value of the manifest, seals manifest, card
and SHA256SUMS again so that they agree, and verifies without and with the source. It prints how
many there were and how many were found, and exits with 1 if a flip was not found, if a forged value
was not that nothing contradicts (``tests.adversary``), or if anything but a sentence came of it.

What transformers says of a folder is left out: it takes longest and would only find more.
"""

import logging
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Literal

import click
import torch

from converter import verify as verification
from converter.manifest import read_manifest
from converter.pipeline import convert
from converter.resolve import resolve
from converter.run import Run
from tests.adversary import (
    BEFORE,
    CLAIMS,
    copy_of,
    flipped,
    forged,
    kind_of,
    leaves,
    others,
    places,
    put,
)
from tests.conftest import TINY, make_checkpoint

OUTPUTS: tuple[Literal["checkpoint", "adapter"], ...] = "checkpoint", "adapter"


def make(root: Path) -> None:
    """The source and its outputs."""
    source = make_checkpoint(root / "source", "llama", torch.bfloat16)
    for output in OUTPUTS:
        run = Run(source=str(source), num_pairs=64, options=TINY, guard=False, output=output)
        convert(run, root / output, cache=root / "cache")


Found = tuple[Counter[str], set[str]]


def flip(root: Path, output: str, step: int, part: int, parts: int) -> Found:
    """Flip every ``parts``-th byte from ``part`` on; how many of each file, and what was missed."""
    quiet()
    folder = copy_of(root / output, root / f"{output}-{part}")
    count: Counter[str] = Counter()
    missed = set()
    for path in sorted(folder.iterdir()):
        raw = path.read_bytes()
        for place in places(path, step)[part::parts]:
            path.write_bytes(flipped(raw, place))
            if not any(path.name in problem for problem in verification.verify(folder)):
                missed.add(f"{path.name}, byte {place}")
            count[path.name] += 1
        path.write_bytes(raw)
    assert verification.verify(folder) == []
    return count, missed


def forge(root: Path, output: str, part: int, parts: int) -> Found:
    """The same with values of the manifest; verified without and with the source."""
    quiet()
    folder = copy_of(root / output, root / f"forged-{output}-{part}")
    source = resolve(str(root / "source"), root / "cache")
    manifest, count, missed = read_manifest(folder), Counter[str](), set()
    for path, value in list(leaves(manifest))[part::parts]:
        for other in changes(value):
            put(folder, forged(manifest, path, other))
            kind = kind_of(path)
            for name, given in (("without the source", None), ("with it", source)):
                try:
                    found = bool(verification.verify(folder, given))
                except Exception as error:  # the very thing that must not happen
                    missed.add(f"{kind} = {other!r}: {type(error).__name__}: {error}")
                    continue
                count[name] += 1
                count[f"{name}, found"] += found
                free = CLAIMS + (BEFORE if given is None else ())
                if not found and not kind.startswith(free):
                    missed.add(f"{kind} = {other!r}, {name}")
    return count, missed


def changes(value: Any) -> Iterator[Any]:
    """Other values than this one."""
    return (other for other in others(value) if type(other) is not type(value) or other != value)


def quiet() -> None:
    """Nothing is loaded, and no library talks."""
    torch.set_num_threads(1)
    logging.disable()
    verification._check_loading = lambda *_: iter(())


@click.command()
@click.option("--step", default=16, show_default=True, help="Bytes of tensors from flip to flip.")
@click.option("--processes", default=2, show_default=True)
def main(step: int, processes: int) -> None:
    start, root = time.time(), Path(tempfile.mkdtemp(prefix="flips-"))
    wrong: set[str] = set()
    try:
        make(root)
        with ProcessPoolExecutor(processes) as pool:
            parts = range(processes)
            for output in OUTPUTS:
                flips = [pool.submit(flip, root, output, step, part, processes) for part in parts]
                forgeries = [pool.submit(forge, root, output, part, processes) for part in parts]
                for what, job in (("flipped", flips), ("forged", forgeries)):
                    counts: Counter[str] = Counter()
                    for done in job:
                        count, missed = done.result()
                        counts += count
                        wrong |= missed
                    print(f"{output}, {what}:")
                    for name, number in counts.items():
                        print(f"  {name:40} {number:,}")
                    if what == "flipped":
                        print(f"  {'all':40} {sum(counts.values()):,}, {len(wrong)} not found")
    finally:
        shutil.rmtree(root)
    print("\n".join(["not found, or no sentence:", *sorted(wrong)] if wrong else ["all found"]))
    print(f"{time.time() - start:.0f} seconds")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
