"""Shards are edited on a Ray cluster of this machine alone, which the tests start and end."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor, Future
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from converter.errors import OptionError
from converter.outputs import cluster
from converter.runtime import extras
from tests.builders.errors import refused
from tests.builders.invoke import Cli
from tests.builders.models import TINY_ARGS, Checkpoints, planned
from tests.test_formats import as_pickles
from tests.test_resume import content

ray = pytest.mark.skipif(
    find_spec("ray") is None, reason="Ray is not installed: pip install 'gloss-convert[ray]'"
)

SETTINGS = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # so that 127.0.0.1 is meant
    "RAY_USAGE_STATS_ENABLED": "0",
}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def processes_of(folder: Path) -> list[int]:
    """Those that name a folder on their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(folder).encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    port = free_port()
    folder = Path(f"/tmp/gloss-{os.getpid()}")  # sockets have short names
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
    command += ["--port", str(port), "--node-ip-address", "127.0.0.1", "--num-cpus", "2"]
    command += ["--include-dashboard=false", "--object-store-memory", "100000000"]
    command += ["--temp-dir", str(folder)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    head = subprocess.Popen(command, env={**os.environ, **SETTINGS}, **quiet)  # type: ignore[call-overload]
    try:
        end = time.monotonic() + 60
        while time.monotonic() < end and head.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                time.sleep(0.5)
        yield f"127.0.0.1:{port}"
    finally:
        head.terminate()
        head.wait(30)
        for pid in processes_of(folder):
            os.kill(pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


def run(*args: object) -> "subprocess.CompletedProcess[str]":
    """The program in a process of its own, since Ray changes the one that it is in."""
    command = [sys.executable, *map(str, args)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **SETTINGS}
    )


@ray
@pytest.mark.slow
def test_a_cluster_writes_what_this_machine_writes(
    checkpoints: Checkpoints, cli: Cli, tmp_path: Path, address: str
) -> None:
    source = checkpoints("llama", torch.bfloat16)
    args = (*TINY_ARGS, "--num-pairs", 32)
    cli("convert", source, tmp_path / "local", *args, code=0)
    engine = ("--engine", "ray", "--ray-address", address, "--json")
    done = run("-m", "converter", "convert", source, tmp_path / "ray", *args, *engine)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)
    assert "machines of the Ray cluster: 1" in done.stderr
    assert "raylet" not in done.stderr
    assert content(tmp_path / "ray") == content(tmp_path / "local")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["local", "ray"]


LOST = """
import sys
from pathlib import Path
from converter.outputs import cluster
from tests.builders.models import planned
from tests.test_cluster import die_once, refuse
source, _ = planned(Path(sys.argv[1]))
with cluster.joined(sys.argv[2], "cpu", source, Path(sys.argv[3])) as executor:
    print(executor.submit(die_once, sys.argv[3] + ".begun").result())
    error = executor.submit(refuse).exception()
    print(type(error).__name__, error, error.exit_code)
"""


def die_once(path: str) -> str:
    """The first time its process ends, as one does that is killed."""
    if Path(path).exists():
        return "done again"
    Path(path).touch()
    os._exit(9)


def refuse() -> None:
    raise OptionError("a thing", expected="another", found="this", hint="mend it")


@ray
@pytest.mark.slow
def test_a_lost_job_is_done_again_and_an_error_is_told_as_it_is(
    checkpoints: Checkpoints, tmp_path: Path, address: str
) -> None:
    done = run("-c", LOST, checkpoints("llama"), address, tmp_path / "new")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2, done.stdout
    lost, error = done.stdout.splitlines()
    assert lost == "done again"
    assert error == "OptionError a thing: expected another, found this; mend it 2"


def test_a_job_that_is_lost_each_time_breaks_the_executor() -> None:
    """Ray says so with an error of its own, which has no cause of ours."""
    done, found = Future[Any](), Future[Any]()
    done.set_exception(RuntimeError("the worker died"))
    cluster._pass_on(found, done)
    assert type(found.exception()) is BrokenExecutor


def test_without_the_package_it_is_refused(
    checkpoints: Checkpoints, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    result = cli("convert", checkpoints("llama"), tmp_path / "out", "--engine", "ray", code=2)
    assert "--engine ray needs the package ray; pip install 'gloss-convert[ray]'" in result.stderr
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("address", ["somewhere", "ray://127.0.0.1:10001", "host:port"])
def test_an_address_is_a_host_and_a_port(address: str) -> None:
    with refused(OptionError, what="--ray-address", expected="auto or HOST:PORT", found=address):
        cluster._connected(address)


def test_an_address_where_nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    place = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv("RAY_ADDRESS", place)
    for address in (place, "auto"):
        with refused(OptionError, what=f"--ray-address {place} does not answer"):
            cluster._connected(address)


def test_shards_that_are_made_are_refused_before_any_work(
    checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "need", lambda *args: None)
    source, _ = planned(as_pickles(checkpoints("llama"), tmp_path / "pickles", 2))
    with (
        refused(OptionError, what="the shards of this source cannot be edited in other processes"),
        cluster.joined("auto", "cpu", source, tmp_path / "new"),
    ):
        pytest.fail("it was joined")


class Machines:
    """As much of Ray as it takes to ask machines: one is as this, the other as ``there`` says."""

    def __init__(self, there: dict[str, str]) -> None:
        self.there = there
        self.util = self.scheduling_strategies = self.exceptions = self
        self.RayError = RuntimeError
        self.asked = 0

    def NodeAffinitySchedulingStrategy(self, node: str, soft: bool) -> str:
        return node

    def nodes(self) -> list[dict[str, object]]:
        names = ("a", "b", "c")
        return [{"NodeID": n, "NodeManagerHostname": n, "Alive": n != "c"} for n in names]

    def remote(self, *args: object, **options: object) -> "Machines":
        self.asked += len(args) == 2
        return self

    __call__ = remote

    def options(self, **given: object) -> "Machines":
        return self

    def get(self, refs: list[object], timeout: float) -> list[dict[str, str]]:
        return [self.mine, self.mine | self.there]

    mine: dict[str, str]


@pytest.mark.parametrize("what", ["PyTorch", "kind of processor", "folder of the destination"])
def test_a_machine_that_differs_is_named(
    what: str, checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = checkpoints("llama") / "config.json"
    machines = Machines({what: "other"})
    look = cluster.what_is_here

    def seen(word: Path, config: Path) -> dict[str, str]:
        machines.mine = look(word, config)
        return machines.mine

    monkeypatch.setattr(cluster, "what_is_here", seen)
    with refused(
        OptionError,
        what=f"machine b of the Ray cluster differs in its {what}",
        found="other",
        hint="nothing was written",
    ):
        cluster._check_machines(machines, config, tmp_path / "new")
    assert not [*tmp_path.iterdir()]
