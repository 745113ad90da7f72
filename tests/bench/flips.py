"""Every byte of finished outputs flipped in turn, and every value of their manifests forged.

    python -m tests.bench.flips [--step 16] [--every 1] [--processes 2]

Makes a tiny checkpoint in three shards and a tiny adapter, and for each: flips one bit of every
byte of every file (of tensors, of the first, the last and each ``--step``-th byte), one at a time,
and verifies; does the same to a signature, with its key; then puts other values in place of every
value of the manifest, seals manifest, card and SHA256SUMS again so that they agree, and verifies
without and with the source. It prints how many there were and how many were found, and exits with 1
if a flip was not found, if a forged value was not that should be (``tests.builders.adversary``
lists what nothing contradicts), or if anything but a sentence came of it.

What transformers says of a folder is left out: it takes longest and would only find more.
"""

import logging
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

from converter.checkpoints.names import SIGNATURE
from converter.checkpoints.resolve import resolve
from converter.entrypoints import verify as verification
from converter.entrypoints.convert import convert
from converter.release.signing import load_public_key, load_signer
from converter.runtime.cache import using_cache
from tests.builders.adversary import (
    BEFORE,
    CLAIMS,
    NOISE,
    copy_of,
    flipped,
    forged,
    kind_of,
    leaves,
    load_manifest,
    others,
    places,
    put,
)
from tests.builders.models import make_checkpoint, tiny_recipe
from tests.test_signing import write_key

OUTPUTS = "checkpoint", "adapter"


def make(root: Path) -> None:
    """The source and its outputs."""
    source = make_checkpoint(root / "source", "llama", torch.bfloat16)
    for output in OUTPUTS:
        with using_cache(root / "cache"):
            convert(tiny_recipe(source, num_pairs=64, output=output), root / output)


Found = tuple[Counter[str], set[str]]


def flip(root: Path, output: str, every: int, part: int, parts: int, step: int) -> Found:
    """Flip every ``parts``-th byte from ``part`` on; how many of each file, and what was missed."""
    quiet()
    folder = copy_of(root / output, root / f"{output}-{part}")
    count: Counter[str] = Counter()
    missed = set()
    for path in sorted(folder.iterdir()):
        raw = path.read_bytes()
        for place in places(path, step)[part * every :: parts * every]:
            path.write_bytes(flipped(raw, place))
            if not any(path.name in problem for problem in verification.verify(folder)):
                missed.add(f"{path.name}, byte {place}")
            count[path.name] += 1
        path.write_bytes(raw)
    assert verification.verify(folder) == []
    return count, missed


def forge(root: Path, output: str, every: int, part: int, parts: int) -> Found:
    """The same with values of the manifest; verified without and with the source."""
    quiet()
    folder = copy_of(root / output, root / f"forged-{output}-{part}")
    source = resolve(str(root / "source"))
    manifest, count, missed = load_manifest(folder), Counter[str](), set()
    for path, value in list(leaves(manifest))[part * every :: parts * every]:
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
                if output == "adapter" and other == 0:
                    free += NOISE
                if not found and not kind.startswith(free):
                    missed.add(f"{kind} = {other!r}, {name}")
    return count, missed


def flip_signature(root: Path, output: str, every: int, part: int, parts: int) -> Found:
    """Every byte of a signature, asked of the key alone."""
    quiet()
    key = write_key(root, f"key-{part}")
    folder = copy_of(root / output, root / f"signed-{output}-{part}")
    load_signer(key).sign(folder, "tiny")
    public, path = load_public_key(key.with_suffix(".pub")), folder / SIGNATURE
    raw, missed, count = path.read_bytes(), set(), Counter[str]()
    for place in range(len(raw))[part * every :: parts * every]:
        path.write_bytes(flipped(raw, place))
        if not public.check(folder):
            missed.add(f"{path.name}, byte {place}")
        count[path.name] += 1
    path.write_bytes(raw)
    assert public.check(folder) == []
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
@click.option("--every", default=1, show_default=True, help="Of flips and values, each so many.")
@click.option("--processes", default=2, show_default=True)
def main(step: int, every: int, processes: int) -> None:
    start, root = time.time(), Path(tempfile.mkdtemp(prefix="flips-"))
    wrong: set[str] = set()
    try:
        make(root)
        with ProcessPoolExecutor(processes) as pool:
            parts = range(processes)
            for output in OUTPUTS:
                jobs: dict[str, Callable[..., Found]] = {
                    "flipped": partial(flip, step=step),
                    "forged": forge,
                    "signature flipped": flip_signature,
                }
                submitted = {
                    what: [pool.submit(job, root, output, every, p, processes) for p in parts]
                    for what, job in jobs.items()
                }
                for what, job in submitted.items():
                    counts: Counter[str] = Counter()
                    for done in job:
                        count, missed = done.result()
                        counts += count
                        wrong |= missed
                    click.echo(f"{output}, {what}:")
                    for name, number in sorted(counts.items()):
                        click.echo(f"  {name:40} {number:,}")
                    if what == "flipped":
                        click.echo(f"  {'all':40} {sum(counts.values()):,}")
    finally:
        shutil.rmtree(root)
    click.echo(
        "\n".join(["not found, or no sentence:", *sorted(wrong)] if wrong else ["all found"])
    )
    click.echo(f"{time.time() - start:.0f} seconds")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
