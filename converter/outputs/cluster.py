"""Edit shards on the machines of a Ray cluster, which is joined and never started.

Every machine has the same packages and sees the folders of source and destination under the same
paths; that is looked at before any work. What becomes of a job is said by ``checkpoint.shard_job``.
A machine that is lost has its jobs done again by another one.
"""

import hashlib
import os
import platform
import shutil
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Executor, Future
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from secrets import token_hex
from typing import Any

import torch

from converter.checkpoints.source import Source
from converter.errors import OptionError
from converter.outputs.checkpoint.shard_job import parts_of, refuse_made
from converter.runtime import progress
from converter.runtime.extras import need
from converter.version import __version__

_EACH = 2
"""Shards that a machine edits at a time, unless told otherwise."""

_ATTEMPTS = 3
"""How often a job is begun again whose machine or process was lost."""

_PATIENCE = 5
"""Seconds that an address has to answer."""

_LOOKING = 120
"""Seconds that all machines have to say what they see; each starts a process first."""

_START = "start one with: ray start --head; this program joins a cluster and starts none"


@contextmanager
def joined(address: str, device: str, source: Source, folder: Path) -> Iterator["RayExecutor"]:
    """An executor of a Ray cluster.

    Args:
        address: ``HOST:PORT``, or ``auto``.
        device: that this machine edits on; a job takes a GPU if that is one.
        source: whose shards will be edited.
        folder: that will be written to; the folder that it is in is there.

    Raises:
        OptionError: there is no Ray or no such cluster, one of its machines differs from this one,
            or the shards of the source cannot be edited elsewhere.
    """
    need("--engine ray", "ray")
    refuse_made(source)
    ray = _connected(address)
    shutil.rmtree(parts_of(folder), ignore_errors=True)  # of a run that was killed
    try:
        machines = _check_machines(ray, source.folder / "config.json", folder)
        yield RayExecutor(ray, device, machines * _EACH)
    finally:
        ray.shutdown()


def _connected(address: str) -> Any:
    """The module ``ray``, with a connection."""
    place = os.environ.get("RAY_ADDRESS", "") if address == "auto" else address
    host, sign, port = place.rpartition(":")
    if place and not (sign and port.isdigit() and "/" not in host):
        raise OptionError("--ray-address", expected="auto or HOST:PORT", found=place)
    if place:
        try:
            socket.create_connection((host.strip("[]"), int(port)), _PATIENCE).close()
        except (OSError, OverflowError) as error:
            raise OptionError(
                f"--ray-address {place} does not answer", found=str(error), hint=_START
            ) from error
    if host in ("127.0.0.1", "localhost", "[::1]"):  # else Ray takes another address for it
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ["RAY_DEDUP_LOGS_SKIP_REGEX"] = ".*"  # or it prints to our standard output
    import ray

    on_stop = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            place or "auto", log_to_driver=False, configure_logging=False, logging_level="ERROR"
        )
    except Exception as error:  # what Ray raises is of many kinds
        raise OptionError(
            "the Ray cluster cannot be joined", found=str(error).partition("\n")[0][:200],
            hint=_START,
        ) from error  # fmt: skip
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_stop)  # Ray has set its own
    if os.environ.get("RAY_AUTH_MODE") != "token":
        progress.warn(
            "whoever reaches this Ray cluster can run programs on its machines: see RAY_AUTH_MODE"
        )
    return ray


class RayExecutor(Executor):
    """Gives work to the processes of a cluster that was joined; see ``joined``.

    An error of a job is its own. If its process was lost, again and again, it is BrokenExecutor.

    Attributes:
        workers: shards at a time, unless told otherwise.
    """

    def __init__(self, ray: Any, device: str, workers: int) -> None:
        self.workers = workers
        self._run = ray.remote(
            num_cpus=1, num_gpus=int(device != "cpu"), max_retries=_ATTEMPTS
        )(_called)  # fmt: skip

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        found: Future[Any] = Future()
        found.set_running_or_notify_cancel()
        self._run.remote(fn, *args, **kwargs).future().add_done_callback(partial(_pass_on, found))
        return found


def _called(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return fn(*args, **kwargs)


def _pass_on(found: Future[Any], done: Future[Any]) -> None:
    """What Ray gives; of its error that of the job, whose text is no remote traceback."""
    error = done.exception()
    if error is None:
        found.set_result(done.result())
    else:
        found.set_exception(getattr(error, "cause", None) or BrokenExecutor(str(error)))


def _check_machines(ray: Any, config: Path, folder: Path) -> int:
    """How many machines there are. Raises OptionError, naming one, unless all are as this one."""
    strategy = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
    word = folder.with_name(f"word-{token_hex(8)}")
    word.write_text(token_hex(8))
    nodes = {node["NodeID"]: node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]}
    look = ray.remote(num_cpus=0)(what_is_here)
    try:
        refs = [
            look.options(scheduling_strategy=strategy(node, soft=False)).remote(word, config)
            for node in nodes
        ]
        ours, all_theirs = what_is_here(word, config), ray.get(refs, timeout=_LOOKING)
    except ray.exceptions.RayError as error:
        raise OptionError(
            "a machine of the Ray cluster cannot say what it sees",
            found=str(error).strip().rpartition("\n")[2][:200],
            hint="install the same gloss-convert, Python and PyTorch on each",
        ) from error
    finally:
        word.unlink()
    for name, theirs in zip(nodes.values(), all_theirs, strict=True):
        for what, mine in ours.items():
            if theirs[what] != mine:
                raise OptionError(
                    f"machine {name} of the Ray cluster differs in its {what}",
                    expected=mine, found=theirs[what], hint="nothing was written",
                )  # fmt: skip
    progress.note(f"  machines of the Ray cluster: {len(nodes)}")
    return len(nodes)


def what_is_here(word: Path, config: Path) -> dict[str, str]:
    """What has to be the same on every machine, by its name for people.

    Args:
        word: a small file of this run beside the folder that is written to.
        config: in the folder of the source.
    """
    code = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        code.update(path.read_bytes())
    return {
        "folder of the destination": _seen(word.read_text),
        "folder of the source": _seen(lambda: f"{config.stat().st_size:,} bytes of {config.name}"),
        "gloss-convert": f"{__version__}, code {code.hexdigest()[:12]}",
        "PyTorch": str(torch.__version__),
        "Python": platform.python_version(),
        "kind of processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
    }


def _seen(look: Callable[[], str]) -> str:
    try:
        return look()
    except OSError as error:
        return error.strerror or str(error)
