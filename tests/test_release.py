"""What a release is made of: pinned, hashed, and the same bytes whoever builds it."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from converter.cli.guide import topics

ROOT = Path(__file__).parents[1]
LOCKS = "requirements.lock", "release.lock"
EXTRAS = "demo", "eval", "gguf", "native", "plot", "s3", "search", "sign"
"""Extras that requirements.lock is for."""


def locked(name: str) -> dict[str, Requirement]:
    """The requirements of a lock, each with at least one hash."""
    text = (ROOT / name).read_text()
    found: dict[str, Requirement] = {}
    for entry in re.split(r"\n(?=\S)", re.sub(r"(?m)^ *#.*\n", "", text)):
        first, *hashes = entry.replace("\\\n", " ").split("--hash=")
        assert hashes, entry
        assert all(re.fullmatch("sha256:[0-9a-f]{64}", text.strip()) for text in hashes), entry
        requirement = Requirement(first.strip())
        found[canonicalize_name(requirement.name)] = requirement
    return found


def pinned() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text().split()
    return {canonicalize_name(r.name): r for r in map(Requirement, lines)}


@pytest.mark.parametrize("lock", LOCKS)
def test_what_is_locked_is_what_was_tested(lock: str) -> None:
    """Versions are exact and hashed, and those of constraints.txt where it names them."""
    for name, requirement in locked(lock).items():
        assert re.fullmatch(r"==[^=*,]+", str(requirement.specifier)), requirement
        if name in pinned():
            assert requirement.specifier == pinned()[name].specifier, name


def test_everything_that_is_asked_for_is_locked() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    asked = list(project["project"]["dependencies"])
    for extra in EXTRAS:
        asked += project["project"]["optional-dependencies"][extra]
    for lock, wanted in (
        ("requirements.lock", asked),
        ("release.lock", project["dependency-groups"]["release"]),
        ("release.lock", project["build-system"]["requires"]),
    ):
        for requirement in map(Requirement, wanted):
            if (name := canonicalize_name(requirement.name)) != "gloss-convert":
                version = str(locked(lock)[name].specifier).removeprefix("==")
                assert requirement.specifier.contains(version), requirement


def build(place: Path, epoch: int) -> dict[str, bytes]:
    """The sdist and the wheel of a copy of the repository, made at another time."""
    ignored = shutil.ignore_patterns(".*", "build", "dist", "out", "__pycache__")
    tree = Path(shutil.copytree(ROOT, place / "tree", ignore=ignored, copy_function=shutil.copy))
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-d", place / "made"],
        check=True, capture_output=True, cwd=tree, env={"SOURCE_DATE_EPOCH": str(epoch)},
    )  # fmt: skip
    return {path.name: path.read_bytes() for path in (place / "made").iterdir()}


def test_two_builds_are_the_same_bytes(tmp_path: Path) -> None:
    """Whatever the times of the files; and the time of the release is in them."""
    first, second = (build(tmp_path / name, 1_700_000_000) for name in ("a", "b"))
    assert sorted(Path(name).suffix for name in first) == [".gz", ".whl"]
    assert first == second
    (wheel,) = (tmp_path / "a/made").glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        assert {info.date_time[:3] for info in file.infolist()} == {(2023, 11, 14)}
        names = set(file.namelist())
        assert "converter/data/card.md" in names
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        said = file.read(metadata).decode()
        assert "\nProject-URL: Paper, https://arxiv.org/abs/2505.17078\n" in said
        assert "\nDescription-Content-Type: text/markdown\n" in said
        assert {f"converter/guide/{topic}.md" for topic in (*topics(), "README")} <= names
