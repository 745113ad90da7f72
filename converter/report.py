"""What a run tells the terminal while it works: stages with their seconds, bars, notes.

All of it goes to standard error. Bars appear only on a terminal.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Never

import click
from tqdm import tqdm


@dataclass
class Report:
    """Collects seconds per stage and warnings; prints notes unless ``quiet``."""

    quiet: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str, title: str) -> Iterator[None]:
        """Announce a stage and add the seconds it took to ``seconds[name]``."""
        self.note(title)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    @contextmanager
    def bar(self, title: str, total: int, unit: str) -> Iterator["tqdm[Never]"]:
        """A progress bar on standard error; ``unit`` ``B`` counts bytes."""
        with tqdm(
            desc=title,
            total=total,
            unit=unit,
            unit_scale=unit == "B",
            unit_divisor=1000,
            leave=False,
            disable=self.quiet or not sys.stderr.isatty(),
            file=sys.stderr,
        ) as bar:
            yield bar

    def note(self, text: str) -> None:
        """A line for people who watch."""
        if not self.quiet:
            click.echo(text, err=True)

    def warn(self, text: str) -> None:
        """A line for everybody, ``quiet`` or not; it is also kept for the summary."""
        self.warnings.append(text)
        click.echo(f"warning: {text}", err=True)
