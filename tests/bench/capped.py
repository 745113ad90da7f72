"""A whole conversion of a model that does not fit into the memory that the process may have.

    python tests/bench/capped.py [--gigabytes 4] [--folder FOLDER]

It finds the least address space (RLIMIT_AS, what ``ulimit -v`` sets) in which torch and
transformers can be imported at all, gives a conversion 1 GB more, at least 3 GB, and prints the
cap, the exit code, the peaks, and how the forward pass was run. The model is a synthetic Llama with
random weights in bfloat16 and a tokenizer made from the built-in texts; nothing that it says means
anything, so the guard, which would refuse it, is off. ``--forward resident`` shows what happens to
a model that is loaded as a whole.

Linux only: it reads /proc. Address space is more than memory: code, stacks of threads and what
allocators reserve are in it.
"""

import json
import re
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import click

from converter.calibration.pairs import load_prose
from converter.checkpoints.names import MANIFEST
from tests.bench.synthetic import Llama, builtin_texts, shard_limit, write_llama

STEP = 64 << 20
"""The least cap is found to so many bytes."""

ROOM, LEAST = 1_000_000_000, 3_000_000_000
"""Bytes that a conversion has above that, and altogether."""

PEAKS = re.compile(r"^Vm(HWM|Peak):\s+(\d+) kB$", re.MULTILINE)
"""Of /proc/PID/status: the most that was in memory, and the most address space."""


def capped(nbytes: int) -> Callable[[], None]:
    """For a child, between fork and exec."""
    return lambda: resource.setrlimit(resource.RLIMIT_AS, (nbytes, nbytes))


def starts(nbytes: int) -> bool:
    """Whether Python can import what a conversion needs in so much address space."""
    command = [sys.executable, "-c", "import torch, transformers"]
    try:
        return not subprocess.run(
            command, preexec_fn=capped(nbytes), capture_output=True, timeout=120, check=False
        ).returncode
    except subprocess.TimeoutExpired:  # some libraries wait for memory for ever
        return False


def least_cap() -> int:
    """The least cap with which it starts, to one step."""
    fails, works = 0, 1
    while not starts(works * STEP):
        fails, works = works, 2 * works
    while works - fails > 1:
        middle = (fails + works) // 2
        if starts(middle * STEP):
            works = middle
        else:
            fails = middle
    return works * STEP


def watch(command: list[str], cap: int) -> tuple[int, dict[str, int]]:
    """Run a command under a cap; its exit code, and its peaks in bytes as of 0.1 s before it ended.

    They are read while it runs: what ``wait`` tells begins with those of the process that forked.
    """
    child = subprocess.Popen(command, preexec_fn=capped(cap), stdout=sys.stderr)
    peaks = {"HWM": 0, "Peak": 0}
    while child.poll() is None:
        with suppress(OSError):
            status = Path(f"/proc/{child.pid}/status").read_text()
            for name, kilobytes in PEAKS.findall(status):  # a stage may begin a new maximum
                peaks[name] = max(peaks[name], int(kilobytes) * 1024)
        time.sleep(0.1)
    return child.returncode, peaks


@click.command()
@click.option("--gigabytes", default=4.0, show_default=True, help="Of the checkpoint.")
@click.option("--shards", default=7, show_default=True, help="That it comes in.")
@click.option("--pairs", default=40, show_default=True, help="Drawn from the built-in ones.")
@click.option("--paragraphs", default=8, show_default=True, help="Of the built-in prose.")
@click.option("--forward", default="auto", show_default=True, help="auto, resident or streamed.")
@click.option(
    "--folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Where to write.  [default: a temporary folder]",
)
def main(
    gigabytes: float, shards: int, pairs: int, paragraphs: int, forward: str, folder: Path | None
) -> None:
    least = least_cap()
    cap = max(LEAST, least + ROOM)
    model = Llama.of_bytes(gigabytes * 1e9)
    with tempfile.TemporaryDirectory(dir=folder) as root:
        source, out = Path(root, "source"), Path(root, "out")
        source.mkdir()
        prose = Path(root, "prose.txt")
        prose.write_text("\n\n".join(load_prose("builtin").paragraphs[:paragraphs]))
        write_llama(source, model, shard_limit(model, shards), builtin_texts())
        code, peaks = watch(
            [
                *(str(Path(sysconfig.get_path("scripts"), "gloss-convert")), str(source), str(out)),
                *("--no-guard", "-o", "rank=2", "--num-pairs", str(pairs), "--forward", forward),
                *("--cache-dir", str(Path(root, "cache")), "--neutral", str(prose)),
            ],
            cap,
        )
        how = "none"
        if (out / MANIFEST).exists():
            manifest = json.loads((out / MANIFEST).read_text())
            how = manifest["forward"]["mode"]
    click.echo(
        "| weights, GB | needed to import, GB | cap, GB | peak of address space, GB "
        "| peak in memory, GB | forward | exit code |"
    )
    click.echo("|---|---|---|---|---|---|---|")
    sizes = [model.nbytes, least, cap, peaks["Peak"], peaks["HWM"]]
    cells = [*(f"{size / 1e9:.2f}" for size in sizes), how, str(code)]
    click.echo(f"| {' | '.join(cells)} |")
    sys.exit(code)


if __name__ == "__main__":
    main()
