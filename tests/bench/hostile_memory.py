"""Peak memory and time of the readers on the worst small files of a source.

    python tests/bench/hostile_memory.py

Headers and an index as large as they may be (100 MB), a config of 16 MB, each read in a process of
its own. The figures are what the resident set grew by while it was read, and processor time.
Linux only.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from converter.checkpoints.layout import MAX_CONFIG, MAX_INDEX, check_config, read_index, read_json
from converter.checkpoints.safetensors.header import MAX_HEADER, read_header
from converter.errors import CheckpointError
from tests.bench.processes import apart

ENTRY = b'{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
STEP = 10_000


def padded(start: bytes, part: Callable[[int], bytes], end: bytes, size: int) -> Iterator[bytes]:
    """A file of ``size`` bytes or little less; parts are numbered."""
    yield start
    done, number = len(start) + len(end), 0
    while True:
        block = b"".join(part(n) for n in range(number, number + STEP))
        if done + len(block) > size:
            break
        yield block
        done, number = done + len(block), number + STEP
    yield end


Write = Callable[[Path], None]
Part = Callable[[int], bytes]


def header(start: bytes, part: Part, end: bytes) -> Write:
    def write(path: Path) -> None:
        with path.open("wb") as file:
            file.write(bytes(8))
            for block in padded(start, part, end, MAX_HEADER):
                file.write(block)
            length = file.tell() - 8
            file.seek(0)
            file.write(length.to_bytes(8, "little"))

    return write


def plain(start: bytes, part: Part, end: bytes, size: int) -> Write:
    def write(path: Path) -> None:
        with path.open("wb") as file:
            file.writelines(padded(start, part, end, size))

    return write


def claim(path: Path) -> None:
    path.write_bytes((1 << 63).to_bytes(8, "little") + b"{}")


SHAPE = b'{"a":{"dtype":"U8","shape":['
MAP = b'{"weight_map":{"x":"a.safetensors"'
LAYER = b'"model.layers.%d.mlp.down_proj.weight":'

CASES: dict[str, tuple[Callable[[Path], None], Callable[[Path], Any]]] = {
    "header that claims 2^63 bytes": (claim, read_header),
    "header of empty tensors": (
        header(b'{"x":' + ENTRY, lambda n: b',"%d":%s' % (n, ENTRY), b"}"),
        read_header,
    ),
    "header of tensors with usual names": (
        header(b'{"x":' + ENTRY, lambda n: b"," + LAYER % n + ENTRY, b"}"), read_header,
    ),
    "header of empty lists": (header(SHAPE, lambda n: b"[],", b"0]}}"), read_header),
    "header of a shape with 5 million axes": (
        header(SHAPE + b"9", lambda n: b",9223372036854775807", b"]}}"), read_header,
    ),
    "header of metadata": (
        header(b'{"__metadata__":{"x":""', lambda n: b',"%x":""' % n, b"}}"), read_header,
    ),
    "header of one name": (header(b'{"', lambda n: b"\\n", b'":' + ENTRY + b"}"), read_header),
    "index of a million entries": (
        plain(MAP, lambda n: b"," + LAYER % n + b'"%d.safetensors"' % (n % 999), b"}}", 66_000_000),
        read_index,
    ),
    "index as large as it may be": (
        plain(MAP, lambda n: b',"%d":"a.safetensors"' % n, b"}}", MAX_INDEX), read_index,
    ),
    "index of empty lists": (plain(b'{"a":[', lambda n: b"[],", b"0]}", MAX_INDEX), read_index),
    "config of empty lists": (
        plain(b'{"a":[', lambda n: b"[],", b"0]}", MAX_CONFIG),
        lambda path: check_config(read_json(path, MAX_CONFIG)),
    ),
}  # fmt: skip


def resident(what: str) -> int:
    """``VmRSS`` or ``VmHWM`` of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what):
            return int(line.split()[1]) * 1024
    raise AssertionError(what)


def measure(name: str, path: Path) -> tuple[str, int, float]:
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that of now
    before, start = resident("VmRSS"), time.process_time()
    try:
        CASES[name][1](path)
        end = "read"
    except CheckpointError:
        end = "refused"
    return end, resident("VmHWM") - before, time.process_time() - start


def main() -> None:
    print("| file | MB | | peak, MB | times its size | seconds |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name, (write, _) in CASES.items():
            path = Path(folder) / "model.safetensors.index.json"
            write(path)
            end, peak, seconds = apart(measure, name, path)
            size = path.stat().st_size
            times = f"{peak / size:.1f}" if size > 1000 else "-"
            figures = f"{size / 1e6:.0f} | {end} | {peak / 1e6:,.0f} | {times} | {seconds:.1f}"
            print(f"| {name} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
