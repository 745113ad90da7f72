"""How long it takes to be told of a mistake: each is made by a program of its own.

    python -m tests.bench.mistakes

A row of a Markdown table for each of ``tests/builders/mistakes.py``: what was typed, what is said
first, the exit code, and seconds from the start of Python to its end.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

from tests.builders.mistakes import MISTAKES, Mistake, make_places


def told(mistake: Mistake, folder: Path) -> tuple[float, int, str]:
    """Seconds, exit code, and the first error that is printed."""
    hidden = f"sys.modules.update(dict.fromkeys({mistake.without!r}))"
    code = f"import sys; {hidden}; from converter.cli.main import gloss; gloss()"
    begun = time.perf_counter()
    made = subprocess.run(
        [sys.executable, "-c", code, *mistake.typed(folder)],
        capture_output=True, text=True, env={**os.environ, **mistake.variables},
    )  # fmt: skip
    seconds = time.perf_counter() - begun
    lines = [line for line in made.stderr.splitlines() if line.lower().startswith("error: ")]
    return seconds, made.returncode, (lines or made.stderr.splitlines() or [""])[0]


@click.command()
@click.option("--rounds", default=3, show_default=True, help="Of which the quickest counts.")
@click.argument("names", nargs=-1)
def main(rounds: int, names: tuple[str, ...]) -> None:
    """Make the mistakes NAMES, or all."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_places(folder)
        click.echo("| mistake | command | first message | exit code | seconds |")
        click.echo("|---|---|---|---|---|")
        slowest = 0.0
        for name in names or MISTAKES:
            found = [told(MISTAKES[name], folder) for _ in range(rounds)]
            seconds, code, said = min(found)
            slowest = max(slowest, seconds)
            typed = MISTAKES[name].args.replace("{}/", "")
            cells = (name, f"`gloss {typed}`", said.replace(place, "").replace("|", "/")[:160])
            click.echo(f"| {' | '.join(cells)} | {code} | {seconds:.2f} |")
        click.echo(f"\nslowest: {slowest:.2f} s")


if __name__ == "__main__":
    main()
