"""Machines as they are: no home folder, no temporary folder, odd terminals, clocks and names."""

import json
import os
import pwd
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import converter
from converter.checkpoints.resolve import resolve
from converter.errors import DestinationError, OptionError
from converter.outputs import destination
from converter.recipe import Recipe
from converter.runtime import progress
from converter.runtime.cache import (
    cache_folder,
    default_cache,
    discard_stale,
    find_folders,
    remembered_digest,
    using_cache,
)
from tests.builders.errors import refused

GLOSS = (sys.executable, "-m", "converter")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Settle the folders with this environment, and a folder for temporary files: the warnings.

    A value of None stands for a variable that is not set.
    """
    names = ("GLOSS_CACHE_DIR", "XDG_CACHE_HOME", "HF_HOME", "MPLCONFIGDIR", "HOME")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))

    def nobody(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", nobody)

    def settle(cache_dir: Path | None = None, **environment: str | None) -> list[str]:
        for name in (*names, "TORCHINDUCTOR_CACHE_DIR"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            if value is not None:
                monkeypatch.setenv(name, value)
        with progress.recording() as told, using_cache(cache_dir):
            find_folders(cache_dir)
        return told.warnings

    return settle


def test_a_home_that_can_be_written_is_used_and_nothing_said(
    machine: Callable[..., list[str]], tmp_path: Path
) -> None:
    assert machine(HOME=str(tmp_path)) == []
    assert default_cache() == tmp_path / ".cache/gloss-convert"
    for relative in ("", "here", "./here"):
        assert machine(HOME=str(tmp_path), XDG_CACHE_HOME=relative, HF_HOME="") == []
        assert default_cache() == tmp_path / ".cache/gloss-convert"
        assert not {"HF_HOME", "XDG_CACHE_HOME"} & set(os.environ)  # the Hub's client obeys both
    assert machine(HOME=str(tmp_path), XDG_CACHE_HOME="~/x", GLOSS_CACHE_DIR="") == []
    assert default_cache() == tmp_path / "x/gloss-convert"
    assert machine(HOME=str(tmp_path), GLOSS_CACHE_DIR="~/mine") == []
    with using_cache(None):
        assert cache_folder() == tmp_path / "mine"


@pytest.mark.parametrize("home", [None, "here", "FILE", "FILE/below"])
def test_without_a_home_there_is_a_private_folder_and_one_warning(
    home: str | None, machine: Callable[..., list[str]], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("x")
    (warning,) = machine(HOME=home and home.replace("FILE", str(tmp_path / "file")))
    folder = tmp_path / f"temporary/gloss-convert-{os.getuid()}"
    assert str(folder) in warning
    assert "--cache-dir and HF_HOME" in warning
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert default_cache() == folder / "gloss-convert"
    assert os.environ["MPLCONFIGDIR"].startswith(str(folder))
    assert machine(tmp_path, HF_HOME=str(tmp_path)) == []  # all is said already


def test_what_the_hubs_client_has_is_still_read(
    machine: Callable[..., list[str]], tmp_path: Path
) -> None:
    (tmp_path / ".cache/huggingface").mkdir(parents=True)
    (tmp_path / ".cache/gloss-convert").write_text("no folder")
    (warning,) = machine(HOME=str(tmp_path))
    assert "HF_HOME" not in warning
    assert os.environ["HF_HOME"] == str(tmp_path / ".cache/huggingface")


def test_a_folder_that_others_can_reach_is_not_taken(
    machine: Callable[..., list[str]], tmp_path: Path
) -> None:
    trap = tmp_path / f"temporary/gloss-convert-{os.getuid()}"
    (tmp_path / "elsewhere").mkdir(0o700)
    trap.symlink_to(tmp_path / "elsewhere")
    machine()
    first = default_cache().parent
    trap.unlink()
    trap.mkdir()
    trap.chmod(0o777)
    machine()
    second = default_cache().parent
    for folder in (first, second):
        assert folder != trap
        assert folder.parent == tmp_path / "temporary"
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_what_cannot_work_is_one_sentence(
    machine: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_HOME", "XDG_CACHE_HOME", "MPLCONFIGDIR"):
        with refused(OptionError, what=f"the environment variable {name}", found="~/x"):
            machine(**{name: "~/x"})
    machine(HOME=str(tmp_path))
    monkeypatch.delenv("HOME")
    with using_cache(Path("~/x")), refused(OptionError, what="--cache-dir", found="~/x"):
        cache_folder()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    with refused(
        DestinationError, what="there is no folder for temporary...", hint="set TMPDIR..."
    ):
        machine()


def test_a_quoted_home_is_understood_as_a_shell_does(
    checkpoints: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = Recipe(source="~/my model", activations=Path("~/a"), word_list="~x", base_model="~/b")
    assert (recipe.source, recipe.activations) == (f"{tmp_path}/my model", tmp_path / "a")
    assert (recipe.word_list, recipe.base_model) == ("~x", "~/b")  # no path that is known, no path
    (tmp_path / "my model").symlink_to(checkpoints("llama"))
    assert converter.plan("~/my model")["output"] == "checkpoint"
    monkeypatch.setenv("HOME", "~")
    with refused(OptionError, what="SOURCE", found="~/x"):
        Recipe(source="~/x")


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, check=False, timeout=60
    )


def test_a_terminal_gets_what_it_can_show(tmp_path: Path) -> None:
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "COLUMNS": "0"}
    latin = {"PYTHONIOENCODING": "latin-1", "TERM": "dumb"}
    for environment, shown in (
        (plain, "模型-ü".encode()),  # click takes ASCII for a mistake
        ({"PYTHONIOENCODING": "ascii"}, "模型-ü".encode()),
        (latin, rb"\u6a21\u578b-" + "ü".encode("latin-1")),
    ):
        done = run(*GLOSS, "recipe", "模型-ü", **environment)
        assert (done.returncode, done.stderr) == (0, b"")
        assert b'source = "' + shown + b'"' in done.stdout
        told = run(*GLOSS, "recipe", "模型-ü", "--json", **environment)
        encoding = environment.get("PYTHONIOENCODING", "ascii")
        assert json.loads(told.stdout.decode(encoding))["source"] == "模型-ü"
    assert run(*GLOSS, "convert", "--help", **plain).returncode == 0
    strange = run(*GLOSS, "recipe", os.fsdecode(b"a\xff"))
    assert rb'source = "a\\xff"' in strange.stdout


def test_names_are_utf8_in_every_locale(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    place = shutil.copytree(checkpoints("llama"), tmp_path / "模型")
    (place / "词.txt").write_text("x", "utf-8")
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = run(*GLOSS, "plan", str(place), "--json", **plain)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["source"] == "模型"
    assert "词.txt" in plan["copied_files"]


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_is_no_file_of_ours(closed: str, tmp_path: Path) -> None:
    path = tmp_path / "opened first"
    program = (
        "import os, sys; from converter.cli.terminal import printing, echo\n"
        f"with printing(), open({str(path)!r}, 'w', encoding='utf-8') as file:\n"
        "    print(file.fileno(), file=file)\n"
        "    echo('x'); echo('y', err=True)"
    )
    done = run("sh", "-c", f'"$0" -c "$1" {closed}', sys.executable, program)
    assert done.returncode == 0, done.stderr
    assert int(path.read_text()) > 2


def test_a_full_disk_behind_standard_output_is_one_sentence() -> None:
    done = run("sh", "-c", f"{' '.join(GLOSS)} recipe demo >/dev/full")
    assert done.returncode == 7
    assert done.stderr.startswith(b"error: standard output cannot be written: No space left")
    assert b"Traceback" not in done.stderr
    assert run("sh", "-c", f"{' '.join(GLOSS)} recipe demo 2>/dev/full").returncode == 0


def test_no_clock_makes_a_digest_wrong_or_a_file_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, digests = tmp_path / "x", set()
    with using_cache(tmp_path / "cache"):
        for now, dated in ((0, 0), (0, -(2**31)), (2**33, 0), (10.0**9, 2**32), (2**33, 2**32)):
            path.write_text(f"{now} {dated}")
            os.utime(path, (dated, dated))
            monkeypatch.setattr(time, "time", lambda now=now: now)
            digests |= {remembered_digest(path), remembered_digest(path)}
        assert len(digests) == 5
        monkeypatch.setattr(time, "time", lambda: 0)
        discard_stale(tmp_path, "x")
        assert path.exists()


def test_a_name_that_is_no_text_is_shown_with_escapes(
    checkpoints: Callable[..., Path], tmp_path: Path
) -> None:
    place = shutil.copytree(checkpoints("llama"), tmp_path / os.fsdecode(b"caf\xe9"))
    assert resolve(str(place)).name == "caf\\xe9"
    assert Recipe(source=str(place)).record().source == "caf\\xe9"


def test_a_destination_is_known_however_its_name_is_spelt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the letter case of names does not count."""
    (tmp_path / "source").mkdir()

    def folded(path: Path) -> tuple[int, int]:
        return 0, hash(str(path).casefold())

    monkeypatch.setattr(destination, "_identity", folded)
    for place, what in (
        ("Source", "...is the source or lies inside it"),
        ("SOURCE/new", "...is the source or lies inside it"),
    ):
        with refused(DestinationError, what=what):
            destination.check_destination(tmp_path / place, True, [tmp_path / "source"], 0)
    with refused(DestinationError, what="...contains the input model"):
        destination.check_destination(tmp_path / "SOURCE", True, [tmp_path / "source/model"], 0)


def test_the_end_leaves_the_garbage_and_still_tidies_up(tmp_path: Path) -> None:
    """Python would look for garbage among all objects of torch, long after the last line."""
    program = (
        "import atexit, gc, sys, tempfile\n"
        "atexit.register(lambda: print('frozen', gc.get_freeze_count() > 1000))  # runs last\n"
        "import converter.cli.main\n"
        "class Held: pass\n"
        "held = Held(); held.itself = held\n"
        f"held.folder = tempfile.TemporaryDirectory(dir={str(tmp_path)!r})\n"
        "print('x' * 5000); sys.exit(9)"
    )
    done = run(sys.executable, "-c", program)
    assert done.returncode == 9, done.stderr
    assert done.stdout == b"x" * 5000 + b"\nfrozen True\n"
    assert not any(tmp_path.iterdir())
