"""A process that has imported everything and forks a child for each run.

To start the program takes seconds, to fork it a hundredth. It reads a line of JSON for each run and
answers with one: exit code (negative: the signal), what was said, and the operations counted.
"""

import json
import os
import resource
import shutil  # noqa: F401 - before the functions that it looks at are replaced
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.faults import operations

LIMIT = 60.0
"""Seconds that a run may take; it takes a third of one."""

HUNG = -1000
"""What is said of a run that took longer, in place of an exit code."""


@dataclass
class Ended:
    """How a run ended.

    Attributes:
        code: exit code, or minus the signal that ended it.
        said: standard error and output.
        trace: kind and path of each change, unless it was killed.
        reads: readings.
        unseen: changes that were not counted.
        seconds: from the signal that a fault sent to the end; 0 without one.
    """

    code: int
    said: str
    trace: list[tuple[str, str]] = field(default_factory=list)
    reads: int = 0
    unseen: list[str] = field(default_factory=list)
    seconds: float = 0.0


class Zygote:
    """The helper process, from outside. A context manager."""

    def __init__(self, environment: dict[str, str] | None = None, prefix: tuple[str, ...] = ()):
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "tests.faults.zygote"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2],
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
            | (environment or {}),
        )  # fmt: skip

    def __enter__(self) -> "Zygote":
        return self

    def __exit__(self, *error: object) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(30)
        if self.process.stdout:
            self.process.stdout.close()

    def start(self, root: Path, args: list[str], **asked: Any) -> int:
        """Fork a run; its process id."""
        assert self.process.stdin
        assert self.process.stdout
        asked |= {"root": str(root), "args": args}
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def wait(self) -> Ended:
        """How the run that was started last, or first of several, ended."""
        assert self.process.stdout
        found = json.loads(self.process.stdout.readline())
        found["trace"] = [tuple(entry) for entry in found.get("trace", ())]
        return Ended(**found)

    def run(self, root: Path, args: list[str], **asked: Any) -> Ended:
        """A whole run; ``asked``: ``fault`` and the settings of ``_child``."""
        self.start(root, args, **asked)
        return self.wait()


def _child(asked: dict[str, Any], report: str) -> None:
    """One run; it never returns."""
    from tests.faults.inject import Fault
    from tests.faults.power import Disk

    signal.signal(signal.SIGINT, signal.default_int_handler)
    root = Path(asked["root"])
    fault = Fault(**asked.get("fault", {}))
    _settle(asked)
    disk = Disk(root, tuple(asked["leave"])) if fault.do == "power" else None
    watch = operations.Watch(root, fault, disk)
    watch.moment = Path(f"{report}.moment")
    if asked.get("stop"):
        _await_tracer()
    operations.watching.append(watch)
    code = _command(asked["args"])
    operations.watching.clear()
    for limit in (resource.RLIMIT_FSIZE, resource.RLIMIT_AS):
        resource.setrlimit(limit, (resource.getrlimit(limit)[1],) * 2)
    found = {"trace": watch.trace, "reads": watch.reads, "unseen": watch.unseen}
    Path(report).write_text(json.dumps(found))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _await_tracer() -> None:
    """Wait for strace, which is told this process's id."""
    while "TracerPid:\t0\n" in Path("/proc/self/status").read_text():
        time.sleep(0.01)
    time.sleep(0.1)  # until it has set itself up


def _command(args: list[str]) -> int:
    from converter.cli.convert import convert_command
    from converter.cli.main import gloss

    command = gloss if args[0] in gloss.commands else convert_command
    try:
        command.main(args, standalone_mode=True)
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
        return 1
    return 0


def _settle(asked: dict[str, Any]) -> None:
    """What a run is told besides its arguments."""
    from converter.entrypoints import convert
    from converter.manifest import Measurements
    from converter.release import manifest

    nothing = Measurements(seconds={}, memory_bytes={}, peak_memory_bytes=0)
    for module in (manifest, convert):
        module.measurements = lambda: nothing  # type: ignore[attr-defined]
    if asked.get("no_exchange"):
        _refuse_exchange()
    if mount := asked.get("mount"):
        plain = os.path.ismount
        os.path.ismount = lambda path: str(path) == mount or plain(path)
    if limit := asked.get("file_size"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    if more := asked.get("memory"):
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + more, resource.RLIM_INFINITY))
    if asked.get("powerless"):
        _drop_powers()
    if seconds := asked.get("storm"):
        signal.signal(signal.SIGALRM, lambda *_: None)
        signal.setitimer(signal.ITIMER_REAL, seconds, seconds)


def _drop_powers() -> None:
    """Permissions count for root, too, once it has no capabilities; see capset(2)."""
    import ctypes

    version, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    if ctypes.CDLL(None, use_errno=True).capset(version, nothing):
        raise OSError(ctypes.get_errno(), "capset")


def _refuse_exchange() -> None:
    """A file system that cannot exchange two names."""
    plain = operations._Function.__call__

    def refused(self: Any, *args: Any) -> Any:
        given = [getattr(arg, "value", arg) for arg in args]
        if self.name == "renameat2" and given[4] & 2:
            import ctypes

            ctypes.set_errno(22)
            return -1
        return plain(self, *args)

    operations._Function.__call__ = refused  # type: ignore[method-assign]


def _fork(asked: dict[str, Any], report: str, said: int) -> int:
    child = os.fork()
    if child:
        return child
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(said, 1)
    os.dup2(said, 2)
    try:
        _child(asked, report)
    finally:
        import traceback

        traceback.print_exc()
        os._exit(99)


def _wait(child: int, deadline: float) -> int:
    """The exit code of a child, which is killed at the deadline."""
    late = False
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if not late and time.monotonic() > deadline:
            late = True
            os.kill(child, signal.SIGKILL)
        time.sleep(0.002)
    return HUNG if late else os.waitstatus_to_exitcode(ended[1])


def _serve() -> None:
    for line in sys.stdin:
        asked = json.loads(line)
        with tempfile.TemporaryDirectory() as folder:
            report, output = f"{folder}/report", Path(folder, "said")
            os.chmod(folder, 0o777)
            with output.open("wb") as said:
                child = _fork(asked, report, said.fileno())
            print(child, flush=True)
            found: dict[str, Any] = {"code": _wait(child, time.monotonic() + LIMIT)}
            moment = Path(f"{report}.moment")
            if moment.exists():
                found["seconds"] = time.monotonic() - float(moment.read_text())
            found["said"] = output.read_text("utf-8", "replace")
            if os.path.exists(report):
                found |= json.loads(Path(report).read_text())
            print(json.dumps(found), flush=True)


def _import_everything() -> None:
    """What a conversion, a replay and their checks import on their way."""
    import importlib
    import pkgutil

    import torch
    import tqdm
    import transformers

    import converter

    for module in pkgutil.walk_packages(converter.__path__, "converter."):
        if module.name != "converter.__main__" and ".evaluate" not in module.name:
            importlib.import_module(module.name)
    import transformers.models.auto.tokenization_auto
    import transformers.models.llama.modeling_llama
    import transformers.tokenization_utils_tokenizers  # noqa: F401

    tqdm.tqdm.monitor_interval = 0
    torch.set_num_threads(1)


if __name__ == "__main__":
    operations.install()
    _import_everything()
    operations.wrap_safetensors()
    import gc

    gc.collect()
    gc.freeze()
    _serve()
