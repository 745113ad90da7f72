"""Packages that bring methods, outputs or scorers, as pip would install them."""

from collections.abc import Mapping
from pathlib import Path

import pytest


def install(
    site: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    entries: Mapping[str, Mapping[str, str]],
    modules: Mapping[str, str] | None = None,
) -> None:
    """Installs version 1.2 of a package for the duration of a test.

    Args:
        entries: group of entry points -> name -> ``module:attribute``.
        modules: name -> text of the Python modules that it has.
    """
    info = site / f"{name.replace('-', '_')}-1.2.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
    lines = []
    for group, points in entries.items():
        lines += [f"[{group}]", *(f"{key} = {value}" for key, value in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    for module, text in (modules or {}).items():
        (site / f"{module}.py").write_text(text)
    monkeypatch.syspath_prepend(str(site))
