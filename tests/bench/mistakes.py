"""How long it takes to be told of a mistake: each is made by a program of its own.

    python -m tests.bench.mistakes

A row of a Markdown table for each of ``tests/builders/mistakes.py``: what was typed, what is said
first, the exit code, and seconds from the start of Python to its end: those that pass, and those of
a processor, which say the same on a machine that is busy.
"""

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

from tests.builders.mistakes import MISTAKES, Mistake, make_places


def told(mistake: Mistake, folder: Path) -> tuple[float, float, int, str]:
    """Seconds of a processor, seconds that pass, exit code, and the first error that is printed."""
    hidden = f"sys.modules.update(dict.fromkeys({mistake.without!r}))"
    code = f"import sys; {hidden}; from converter.cli.main import gloss; gloss()"
    begun, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    made = subprocess.run(
        [sys.executable, "-c", code, *mistake.typed(folder)],
        capture_output=True, text=True, env={**os.environ, **mistake.variables},
    )  # fmt: skip
    seconds, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    lines = [line for line in made.stderr.splitlines() if line.lower().startswith("error: ")]
    return busy, seconds, made.returncode, (lines or made.stderr.splitlines() or [""])[0]


@click.command()
@click.option("--rounds", default=3, show_default=True, help="Of which the quickest counts.")
@click.argument("names", nargs=-1)
def main(rounds: int, names: tuple[str, ...]) -> None:
    """Make the mistakes NAMES, or all."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_places(folder)
        click.echo("| mistake | command | first message | exit code | seconds | of a processor |")
        click.echo("|---|---|---|---|---|---|")
        slowest = 0.0
        for name in names or MISTAKES:
            found = [told(MISTAKES[name], folder) for _ in range(rounds)]
            busy, seconds, code, said = min(found)
            slowest = max(slowest, busy)
            typed = MISTAKES[name].args.replace("{}/", "")
            cells = (name, f"`gloss {typed}`", said.replace(place, "").replace("|", "/")[:160])
            click.echo(f"| {' | '.join(cells)} | {code} | {seconds:.2f} | {busy:.2f} |")
        click.echo(f"\nslowest: {slowest:.2f} s of a processor")


if __name__ == "__main__":
    main()
