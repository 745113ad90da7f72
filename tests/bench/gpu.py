"""All that a GPU does here, once, beside what the CPU of the same machine gives: one table.

    python -m tests.bench.gpu                                                  # under eight minutes
    python -m tests.bench.gpu --device cpu --gigabytes 0.2 --pairs 32 --unguarded     # a dry run

It needs PyTorch and the packages of ``pyproject.toml``; which of them are missing is said first.
Rows are printed as they come. Those that do not fit in ``--minutes`` are left out and say so, and
one that fails does not end the others. The exit code is 1 if a row says FAILED.

- ``copy``: of pinned memory to the device and back, 256 MB, the best of five.
- ``edit of one weight``: a down-projection of bfloat16 in memory, (4096, 14336), by one thread and
  by two, each with a stream; U has 4 columns. It crosses the bus twice. The share of the copy is
  2 x its bytes / seconds / the slower rate of ``copy``; the rest is arithmetic in float64.
- ``edit of a checkpoint``: a synthetic Llama on disk, sha256 and all. The bytes of the edited
  tensors are compared: all sums are float64, so no more than single roundings may differ.
- ``forward``: a Llama of 8 layers and hidden size 1024 in float32: means of activations, the
  second moment, gradients, logits; the largest difference, as a share of the largest number.
- ``out of memory``: the device is allowed nearly nothing; each time a sentence must come of it.
- ``demo``: ``gloss-convert demo`` on the device, verified, and on the CPU while time is left.
"""

import argparse
import gc
import hashlib
import io
import sys
import tempfile
import time
import tomllib
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

RANK = 4
"""Columns of the subspace that is taken out."""

O, I = 4096, 14336  # noqa: E741
"""Of the weight that is edited in memory: that of Llama-3-8B."""

COPIED = 1 << 28
"""Bytes of a copy."""

FAR = 1e-3
"""Share of the largest number by which a forward pass may be off; float32 in another order gives
1e-5 or so."""

HEAD = ("what", "on the device", "on the CPU, or expected", "says", "s")


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table."""

    what: str
    found: str
    beside: str = ""
    says: str = ""


@dataclass(slots=True)
class Bench:
    """What all parts have in common.

    Attributes:
        end: when to begin no more, of ``time.perf_counter``.
        rate: bytes a second, of the slower copy.
    """

    device: str
    gigabytes: float
    source: str
    pairs: int | None
    unguarded: bool
    folder: Path
    end: float
    rate: float = 0.0

    @property
    def has_gpu(self) -> bool:
        return self.device != "cpu"

    def wait(self) -> None:
        """Until the device has done all that it was asked for."""
        if self.has_gpu:
            torch.cuda.synchronize(self.device)

    def seconds(self, work: Callable[[], object], times: int = 1) -> float:
        """The least that it takes, of so many times."""
        found = []
        for _ in range(times):
            self.wait()
            start = time.perf_counter()
            work()
            self.wait()
            found.append(time.perf_counter() - start)
        return min(found)


def copies(bench: Bench) -> Iterator[Row]:
    host = torch.ones(COPIED, dtype=torch.uint8, pin_memory=bench.has_gpu)
    there = torch.empty(COPIED, dtype=torch.uint8, device=bench.device)
    up = COPIED / bench.seconds(lambda: there.copy_(host, non_blocking=True), 5)
    down = COPIED / bench.seconds(lambda: host.copy_(there, non_blocking=True), 5)
    bench.rate = min(up, down)
    yield Row("copy", f"{up / 1e9:.1f} GB/s there, {down / 1e9:.1f} GB/s back")


def edit_of_a_weight(bench: Bench) -> Iterator[Row]:
    draw = torch.Generator().manual_seed(0)
    W = torch.randn(O, I, generator=draw).mul_(0.02).bfloat16()
    U = torch.linalg.qr(torch.randn(O, RANK, generator=draw))[0]
    own, norms = edited(W, U, "cpu")
    for threads in (1, 2):
        found: list[Any] = []

        def work(threads: int = threads, found: list[Any] = found) -> None:
            with ThreadPoolExecutor(threads) as pool:
                found[:] = pool.map(lambda _: edited(W, U, bench.device), range(threads))

        work()  # the first time, libraries are loaded
        seconds = bench.seconds(work, 3)
        moved = 2 * W.nbytes * threads / seconds
        yield Row(
            f"edit of one weight, {threads} at a time",
            f"{moved / 1e9:.2f} GB/s, {100 * moved / bench.rate:.0f} % of the copy",
        )
        for new, norm in found:
            other = int((new.view(torch.int16) != own.view(torch.int16)).sum())
            off = max(abs(norm[name] - norms[name]) / norms["W"] for name in norms)
            left = norm["left"] / norm["P"]
        yield Row(
            "its bytes",
            f"{other:,} of {W.numel():,} numbers are others; norms are off by {off:.0e}",
            f"left along U {norms['left'] / norms['P']:.0e}, here {left:.0e}",
            "FAILED" if other > W.numel() / 1000 or off > 1e-9 or left > 1e-3 else "good",
        )


def edited(W: Tensor, U: Tensor, device: str) -> tuple[Tensor, dict[str, float]]:
    """W (O, I) without what lies along U, as the streaming loop makes it; and the norms."""
    from converter.checkpoints.safetensors.header import TensorInfo, to_bytes
    from converter.checkpoints.safetensors.rewrite import Region, as_tensor
    from converter.checkpoints.weights import Weight
    from converter.edits.apply import _edited
    from converter.edits.deltas import RemoveSubspace
    from converter.edits.editor import Editor
    from converter.outputs.checkpoint.shard_job import _stream

    info = TensorInfo("w", "BF16", tuple(W.shape), 0, W.nbytes)
    region: Any = Region(io.BytesIO(to_bytes(W)), info)  # type: ignore[arg-type]
    with _stream(device):
        editor = Editor(RemoveSubspace(U), len(W), W.dtype, "null-space", device)
        new = b"".join(_edited(region, editor, Weight(info, "w", "down_proj", 0, 0)))
        return as_tensor(bytearray(new), info), editor.norms()


def edit_of_a_checkpoint(bench: Bench) -> Iterator[Row]:
    from converter.edits.engine import Engine
    from converter.outputs.base import WriteJob
    from converter.outputs.checkpoint.write import write_checkpoint
    from tests.bench.synthetic import Llama, shard_limit, write_llama
    from tests.builders.edits import removal
    from tests.builders.models import planned

    model = Llama.of_bytes(bench.gigabytes * 1e9)
    source = bench.folder / "large"
    source.mkdir()
    write_llama(source, model, shard_limit(model, 4))
    read, plan = planned(source)
    U = torch.linalg.qr(torch.randn(model.hidden, RANK))[0]
    edit = removal(plan, dict.fromkeys(range(model.layers), U))
    made, took = {}, {}
    for device in dict.fromkeys(("cpu", bench.device)):
        out = bench.folder / f"edited {device.replace(':', ' ')}"
        out.mkdir()
        job = WriteJob(source=read, plan=plan, edit=edit, folder=out, engine=Engine(device=device))
        start = time.perf_counter()
        made[device] = write_checkpoint(job).edits
        took[device] = time.perf_counter() - start
    pairs = list(zip(made[bench.device], made["cpu"], strict=True))
    same = sum(ours.sha256_after == theirs.sha256_after for ours, theirs in pairs)
    off = max(abs(ours.norm - theirs.norm) / theirs.norm for ours, theirs in pairs)
    left = max(ours.measures["leakage"] for ours, _ in pairs)
    yield Row(
        f"edit of a checkpoint, {plan.nbytes / 1e9:.1f} GB",
        f"{took[bench.device]:.1f} s; {same} of {len(pairs)} tensors have the CPU's bytes, norms "
        f"are off by {off:.0e}, left along U {left:.0e}",
        f"{took['cpu']:.1f} s",
        "good" if off < 1e-9 and left < 1e-3 else "FAILED",
    )


def forward(bench: Bench) -> Iterator[Row]:
    from converter.models.loading import load_language_model, stream_language_model
    from converter.models.transformers_loader import Loading
    from converter.runtime.cache import using_cache
    from tests.builders.models import planned

    source, plan = planned(small(bench))
    what = (source, plan, None, torch.float32)
    expected, took = passed(lambda: load_language_model(*what, "cpu"), plan)

    def streamed() -> Any:
        with using_cache(bench.folder):
            return stream_language_model(*what, bench.device, 10**9)

    spread = Loading(spread=True)
    ways: dict[str, Callable[[], Any]] = {
        "resident": lambda: load_language_model(*what, bench.device),
        "streamed": streamed,
        "--device map": lambda: load_language_model(*what, bench.device, spread),
    }
    for name, load in ways.items():
        found, seconds = passed(load, plan)
        off = {key: share(found[key], expected[key]) for key in expected}
        yield Row(
            f"forward, {name}",
            f"{seconds:.1f} s; off by " + ", ".join(f"{key} {x:.0e}" for key, x in off.items()),
            f"{took:.1f} s; at most {FAR:.0e}",
            "good" if max(off.values()) < FAR else "FAILED",
        )
        cleared(bench)


def passed(load: Callable[[], Any], plan: Any) -> tuple[dict[str, Tensor], float]:
    """All passes of a model, and the seconds that they took with loading it."""
    start = time.perf_counter()
    return passes(load(), plan), time.perf_counter() - start


def small(bench: Bench) -> Path:
    """A synthetic model of 0.1 GB."""
    from tests.bench.forward_memory import build

    folder = bench.folder / "small"
    if not folder.is_dir():
        folder.mkdir()
        build(folder, 8)
    return folder


def passes(model: Any, plan: Any) -> dict[str, Tensor]:
    """Every kind of pass over 32 random texts of 24 tokens."""
    from converter.calibration.collect import moments_within
    from converter.models.batching import Sentence, batches
    from converter.models.resident import Pool, SecondMoment, run

    draw, size = torch.Generator().manual_seed(0), plan.dimensions.hidden_size
    ids = torch.randint(1000, (32, 24), generator=draw).tolist()
    texts = [Sentence(row, [1.0] * 23 + [0]) for row in ids]
    layers = plan.dimensions.num_hidden_layers
    modules = {n: plan.architecture.sites(n) for n in range(2, layers)}
    directions = torch.linalg.qr(torch.randn(size, 32, generator=draw))[0]
    batched, pool, moment = batches(texts, 8, model.device), Pool(len(texts)), SecondMoment()
    run(model, modules, [(batched, [pool, moment.group(batched)])])
    logits = {number: each.float().cpu() for number, each in model.logits(batched)}
    return {
        "activations": torch.stack([pool.pooled[n] for n in sorted(pool.pooled)]),
        "second moment": moment.result(),
        "gradients": moments_within(model, modules, [(texts, None)], directions)[0],
        "logits": torch.cat([logits[number] for number in sorted(logits)]),
    }


def share(found: Tensor, expected: Tensor) -> float:
    """The largest difference as a share of the largest number."""
    return float((found - expected).abs().max() / expected.abs().max())


def out_of_memory(bench: Bench) -> Iterator[Row]:
    from converter.edits.engine import Engine
    from converter.errors import ConverterError
    from converter.models.batching import Sentence, batches
    from converter.models.loading import load_language_model
    from converter.models.resident import Pool, run
    from converter.outputs.base import WriteJob
    from converter.outputs.checkpoint.write import write_checkpoint
    from tests.builders.edits import removal
    from tests.builders.models import planned

    if not bench.has_gpu:
        yield Row("out of memory", "left out", "", "needs a GPU")
        return
    source, plan = planned(small(bench))
    modules = {n: plan.architecture.sites(n) for n in range(plan.dimensions.num_hidden_layers)}
    texts = [Sentence([7] * 500, [1.0] * 499 + [0])] * 256
    U = torch.linalg.qr(torch.randn(plan.dimensions.hidden_size, RANK))[0]
    out = bench.folder / "refused"
    out.mkdir()
    write = WriteJob(
        source=source, plan=plan, edit=removal(plan, dict.fromkeys(modules, U)), folder=out,
        engine=Engine(device=bench.device),
    )  # fmt: skip
    model = load_language_model(source, plan, None, torch.float32, bench.device)

    def pass_over() -> None:
        batched = batches(texts, len(texts), bench.device)
        run(model, modules, [(batched, [Pool(len(texts))])])

    cases: dict[str, tuple[Callable[[], object], int]] = {
        "a batch": (pass_over, 40_000_000),
        "loading": (
            lambda: load_language_model(source, plan, None, torch.float32, bench.device),
            20_000_000,
        ),
        "the edit": (lambda: write_checkpoint(write), 2_000_000),
    }
    for name, (work, more) in cases.items():
        says, found = "FAILED", "no error"
        try:
            with allowed(bench, more):
                work()
        except ConverterError as error:
            says, found = "good", f"{error} (exit code {error.exit_code})"
        except Exception as error:
            found = f"{type(error).__name__}: {str(error)[:100]}"
        yield Row(f"out of memory: {name}", found, "one sentence, exit code 3", says)


@contextmanager
def allowed(bench: Bench, more: int) -> Iterator[None]:
    """The device has so many bytes beyond what is allocated, and no more."""
    cleared(bench)
    total = torch.cuda.get_device_properties(bench.device).total_memory
    limit = (torch.cuda.memory_reserved(bench.device) + more) / total
    torch.cuda.set_per_process_memory_fraction(limit, bench.device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, bench.device)
        cleared(bench)


def cleared(bench: Bench) -> None:
    gc.collect()
    if bench.has_gpu:
        torch.cuda.empty_cache()


def demo(bench: Bench) -> Iterator[Row]:
    from converter.api import convert, verify
    from converter.recipe import Recipe
    from converter.runtime.cache import using_cache

    found, needed = {}, 0.0
    for device in dict.fromkeys((bench.device, "cpu")):
        if time.perf_counter() + 6 * needed > bench.end:  # a CPU is so much slower, or more
            break
        out = bench.folder / f"demo {device.replace(':', ' ')}"
        less: dict[str, Any] = {"guard": False, "prompts": "none"} if bench.unguarded else {}
        recipe = Recipe(source=bench.source, device=device, num_pairs=bench.pairs, **less)
        start = time.perf_counter()
        with using_cache(bench.folder / "cache"):
            manifest = convert(recipe, out)
        needed = time.perf_counter() - start
        problems = verify(out, bench.source)
        digest = hashlib.sha256("".join(f"{e.sha256_after}" for e in manifest.edited).encode())
        stages = ", ".join(f"{n} {s:.0f}" for n, s in manifest.measurements.seconds.items())
        found[device] = (
            f"{needed:.0f} s ({stages}); strength {manifest.choice.strength:g}, "
            f"{len(manifest.edited)} tensors, sha256 {digest.hexdigest()[:12]}"
            + "".join(f"; {problem}" for problem in problems)
        )
        if problems:
            yield Row("demo", found[device], "", "FAILED")
            return
    beside = found.get("cpu", "left out: no time") if bench.has_gpu else ""
    yield Row("demo", found[bench.device], beside, "good")


PARTS: Mapping[str, Callable[[Bench], Iterator[Row]]] = {
    "copy": copies,
    "edit of one weight": edit_of_a_weight,
    "forward": forward,
    "out of memory": out_of_memory,
    "edit of a checkpoint": edit_of_a_checkpoint,
    "demo": demo,
}


def show(*cells: str) -> None:
    print(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |", flush=True)


def went_well(part: str, bench: Bench) -> bool:
    """Print the rows of a part as they come; whether none of them has failed."""
    from converter.errors import ConverterError

    if time.perf_counter() > bench.end:
        show(part, "left out", "", "no time", "")
        return True
    start, good = time.perf_counter(), True
    try:
        for row in PARTS[part](bench):
            took = time.perf_counter() - start
            show(row.what, row.found, row.beside, row.says, f"{took:.0f}")
            good &= row.says != "FAILED"
            start = time.perf_counter()
    except ConverterError as error:
        show(part, str(error), "", "FAILED", "")
        return False
    except Exception as error:  # the others are still of use
        traceback.print_exc()
        show(part, f"{type(error).__name__}: {str(error)[:100]}", "", "FAILED", "")
        return False
    return good


def needs() -> list[str]:
    """The packages of pyproject.toml that are missing or too old."""
    from packaging.requirements import Requirement

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    wanted = list(map(Requirement, project["dependencies"]))
    wanted += [Requirement("accelerate")]
    found = []
    for each in wanted:
        try:
            if not each.specifier.contains(version(each.name), prereleases=True):
                found.append(f"{each} (found {version(each.name)})")
        except PackageNotFoundError:
            found.append(str(each))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of the checkpoint")
    parser.add_argument("--source", default="demo", help="of the whole run; none leaves it out")
    parser.add_argument("--pairs", type=int, help="of the whole run; all by default")
    parser.add_argument("--unguarded", action="store_true", help="no guard, no samples")
    parser.add_argument("--minutes", type=float, default=7.0, help="after which no part begins")
    parser.add_argument("--only", choices=PARTS, action="append", help="parts")
    given = parser.parse_args()
    if missing := needs():
        print(f"install first: {', '.join(missing)}", file=sys.stderr)
        return 2
    if given.device != "cpu" and not torch.cuda.is_available():
        print("PyTorch sees no GPU; --device cpu is a dry run", file=sys.stderr)
        return 2
    from converter.cli.command import quiet_libraries

    quiet_libraries()
    name = "CPU" if given.device == "cpu" else torch.cuda.get_device_name(given.device)
    print(f"{name}, torch {torch.__version__}, {torch.get_num_threads()} threads\n", flush=True)
    show(*HEAD)
    show(*["---"] * len(HEAD))
    begun, failed = time.perf_counter(), False
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(
            given.device, given.gigabytes, given.source, given.pairs, given.unguarded,
            Path(folder), begun + 60 * given.minutes,
        )  # fmt: skip
        for part in given.only or PARTS:
            if part != "demo" or bench.source != "none":
                failed |= not went_well(part, bench)
    print(f"\n{time.perf_counter() - begun:.0f} s in all", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
