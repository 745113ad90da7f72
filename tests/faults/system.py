"""The same operations as the kernel sees them, by strace, to prove that none is missed."""

import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

from tests.faults.scenes import Scene
from tests.faults.zygote import Ended

CALLS = {
    "write": "write", "pwrite64": "write", "writev": "write", "pwritev": "write",
    "pwritev2": "write", "fsync": "fsync", "fdatasync": "fsync", "sync_file_range": "fsync",
    "fallocate": "fallocate", "ftruncate": "truncate", "truncate": "truncate",
    "rename": "rename", "renameat": "rename", "renameat2": "rename", "link": "link",
    "linkat": "link", "symlink": "symlink", "symlinkat": "symlink", "mkdir": "mkdir",
    "mkdirat": "mkdir", "rmdir": "rmdir", "unlink": "unlink", "unlinkat": "unlink",
    "ioctl": "clone", "copy_file_range": "copy", "sendfile": "copy", "splice": "copy",
    "chmod": "chmod", "fchmod": "chmod", "fchmodat": "chmod", "chown": "chown", "fchown": "chown",
    "utimensat": "utime", "setxattr": "xattr", "mknod": "mknod", "mknodat": "mknod",
    "openat": "open", "open": "open", "creat": "open", "mmap": "map",
}  # fmt: skip
"""Every system call of Linux that can change a file or a name, and what ``operations`` calls it."""

SERIALIZE = ["open", "truncate", "write", "rename"]
"""What safetensors does to write a file."""

WRITES = re.compile(r"O_WRONLY|O_RDWR|O_CREAT|O_TRUNC")
CALL = re.compile(r"^(?:\[pid +\d+\] |\d+ +)?(\w+)\((.*)$")


def has_strace() -> bool:
    return shutil.which("strace") is not None


def traced(scene: Scene, *injected: str) -> tuple[Ended, Counter[str]]:
    """A run below strace: how it ended, and the calls that change something below ``root``.

    Args:
        injected: options of strace such as ``--inject=fsync:signal=KILL:when=3``.
    """
    scene.reset()
    log = scene.root.with_suffix(".strace")
    child = scene.zygote.start(scene.root, scene.args, stop=True, **scene.settings)
    calls = ",".join(CALLS)
    tracer = subprocess.Popen(
        ["strace", "-f", "-y", "-s", "0", "-e", f"trace={calls}", "-e", "signal=none",
         "-o", str(log), *injected, "-p", str(child)],
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        ended = scene.zygote.wait()
        tracer.wait(30)
        return ended, Counter(_changes(log, scene.root))
    finally:
        tracer.kill()
        log.unlink(missing_ok=True)


def _changes(log: Path, root: Path) -> list[str]:
    """The kind of each call in a log that changes something below ``root`` and succeeds."""
    found, unfinished = [], {}
    for line in log.read_text("utf-8", "replace").splitlines():
        pid = line.split(None, 1)[0]
        if "<unfinished ...>" in line:
            unfinished[pid] = line.replace("<unfinished ...>", "")
            continue
        if "resumed>" in line:
            line = unfinished.pop(pid, "") + line.partition("resumed>")[2]
        match = CALL.match(line)
        if match and f"{root}/" in line and (kind := _kind(match[1], match[2])):
            found.append(kind)
    return found


def _kind(call: str, rest: str) -> str | None:
    kind = CALLS.get(call)
    if kind == "open" and not WRITES.search(rest):
        return None
    if kind == "map" and not ("PROT_WRITE" in rest and "MAP_SHARED" in rest):
        return None
    if kind == "clone" and "FICLONE" not in rest:
        return None
    if call == "unlinkat" and "AT_REMOVEDIR" in rest:
        return "rmdir"
    return "exchange" if call == "renameat2" and "RENAME_EXCHANGE" in rest else kind


def counted(scene: Scene, ended: Ended) -> Counter[str]:
    """The same of a run in which Python counted; strace is not asked about ``close``."""
    other = {"ftruncate": ["truncate"], "fchmod": ["chmod"], "close": [], "serialize": SERIALIZE}
    return Counter(call for kind, _ in ended.trace for call in other.get(kind, [kind]))
