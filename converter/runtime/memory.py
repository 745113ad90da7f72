"""The available memory."""

import re
import resource
import sys
from pathlib import Path


def available_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that this process can still use without swapping or being stopped for it.

    The least of: the system's available memory, the address space that ``ulimit -v`` leaves, and
    the memory that the process's control groups (version 1 and 2) leave. File pages in a group do
    not count as used, since the kernel drops them when needed. Without ``/proc`` there is no bound,
    and the result is ``UNKNOWN``.
    """
    system = number_in(proc / "meminfo", "MemAvailable")
    free = UNKNOWN if system is None else system * 1024
    return max(min(address_space(proc), free, *_groups(proc, cgroups)), 0)


UNKNOWN = 1 << 62
"""More bytes than any machine has."""


def address_space(proc: Path = Path("/proc")) -> int:
    """The address space that ``ulimit -v`` leaves, or ``UNKNOWN``."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    used = number_in(proc / "self/status", "VmSize")
    return UNKNOWN if limit == resource.RLIM_INFINITY or used is None else limit - used * 1024


def resident_memory() -> int:
    """Bytes of memory that this process has now; where the system cannot tell, the most it had."""
    kilobytes = number_in(Path("/proc/self/status"), "VmRSS")
    if kilobytes is not None:
        return kilobytes * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def free_memory(device: str) -> int:
    """The available memory of a device; for a GPU, by its driver."""
    if device == "cpu":
        return available_memory()
    import torch  # the import takes seconds, and the CPU's memory does not need it

    return int(torch.cuda.mem_get_info(device)[0])


def _read(path: Path) -> str:
    """A small file of the system; empty if there is none."""
    try:
        return path.read_text("utf-8", "replace")
    except OSError:
        return ""


def number_in(path: Path, name: str) -> int | None:
    """The number behind a name at the beginning of a line of a small file, if any."""
    found = re.search(rf"^{name}:?\s+(\d+)", _read(path), re.MULTILINE)
    return int(found[1]) if found else None


def _groups(proc: Path, cgroups: Path) -> list[int]:
    """The memory that each control group above the process leaves; a container may see its own
    group as the root.

    A line of ``/proc/self/cgroup`` is ``number:controllers:path``; version 2 has number 0 and no
    controllers. Version 1 writes a huge number where there is no limit.
    """
    left = []
    for line in _read(proc / "self/cgroup").splitlines():
        number, controllers, path = [*line.split(":", 2), "", ""][:3]
        if number == "0" and not controllers:
            roots = [cgroups, cgroups / "unified"]
            names = ("memory.max", "memory.current", ("inactive_file", "active_file"))
        elif "memory" in controllers.split(","):
            roots = [cgroups / "memory"]
            names = (
                "memory.limit_in_bytes", "memory.usage_in_bytes",
                ("total_inactive_file", "total_active_file"),
            )  # fmt: skip
        else:
            continue
        inside = Path(path.lstrip("/"))
        for root in roots:
            for folder in (root / inside, *(root / parent for parent in inside.parents), root):
                left += _left(folder, *names)
    return left


def _left(folder: Path, limit: str, usage: str, reclaimable: tuple[str, ...]) -> list[int]:
    most, used = _read(folder / limit).strip(), _read(folder / usage).strip()
    if not (most.isdigit() and used.isdigit()):  # "max" is no limit
        return []
    files = sum(number_in(folder / "memory.stat", name) or 0 for name in reclaimable)
    return [int(most) - max(int(used) - files, 0)]
