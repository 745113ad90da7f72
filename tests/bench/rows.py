"""One way to edit or copy a checkpoint, in a process of its own; ``tests/bench/streaming.py`` asks.

    PYTHON tests/bench/rows.py KIND SOURCE OUT OPTIONS

The process imports what it needs, says ``ready``, waits for a line, works, says how many seconds of
CPU it took, and waits for another line. So what importing takes is not in what is measured, and the
process's counters can be read before and after. Only the standard library is imported at the top:
mergekit's interpreter may have no other.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

Work = Callable[[], None]

RANK = 4
"""Columns of U."""

EDITED = "mlp.down_proj.weight"
"""How the names of the edited tensors end."""


def dd(source: Path, out: Path) -> Work:
    """Each shard past the page cache: as fast as the disk writes. The small files stay behind."""

    def work() -> None:
        out.mkdir()
        for shard in sorted(source.glob("*.safetensors")):
            files = [f"if={shard}", f"of={out / shard.name}"]
            how = ["bs=8M", "oflag=direct", "conv=fsync", "status=none"]
            subprocess.run(["dd", *files, *how], check=True)

    return work


def cp(source: Path, out: Path) -> Work:
    """What everybody does. On a file system with reflinks it clones, as coreutils 9 do."""

    def work() -> None:
        subprocess.run(["cp", "-r", source, out], check=True)

    return work


def ours(source: Path, out: Path, rounding: Any = "null-space", refused: str = "") -> Work:
    """This project.

    Args:
        source, out: folders.
        rounding: of its engine, the rest of which is as it is by default.
        refused: by the operating system, as it seems: ``direct`` writes, ``clone``, or nothing.
    """
    from converter.checkpoints.plan import make_plan
    from converter.checkpoints.resolve import resolve
    from converter.checkpoints.safetensors import direct_writer
    from converter.edits.base import Edit
    from converter.edits.deltas import RemoveSubspace
    from converter.edits.engine import Engine
    from converter.outputs.base import WriteJob
    from converter.outputs.checkpoint.write import write_checkpoint

    if refused == "direct":
        direct_writer._open_direct = lambda path: None
    elif refused == "clone":
        direct_writer._clone = lambda source, target: False
    removal, engine = RemoveSubspace(subspace(source)), Engine(rounding=rounding)

    def work() -> None:
        out.mkdir()
        read = resolve(str(source))
        plan = make_plan(read.config, read.weight_map, read.headers())
        edit = Edit({weight.info.name: removal for weight in plan.targets})
        write_checkpoint(WriteJob(source=read, plan=plan, edit=edit, folder=out, engine=engine))

    return work


def loop(source: Path, out: Path) -> Work:
    """The script that one would write: a shard in memory, its tensors edited, the shard saved."""
    from safetensors.torch import load_file, save_file

    U = subspace(source)

    def work() -> None:
        out.mkdir()
        for shard in sorted(source.glob("*.safetensors")):
            tensors = load_file(shard)
            for name, W in tensors.items():
                if name.endswith(EDITED):
                    tensors[name] = project(W, U)
            save_file(tensors, out / shard.name, {"format": "pt"})
        copy_small(source, out)

    return work


def transformers(source: Path, out: Path, shard_size: int) -> Work:
    """Load the model, edit its parameters, save it."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401

    U = subspace(source)

    def work() -> None:
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
        with torch.no_grad():
            for name, W in model.named_parameters():
                if name.endswith(EDITED):
                    W.copy_(project(W, U))
        model.save_pretrained(out, max_shard_size=shard_size)
        copy_small(source, out)

    return work


def mergekit(source: Path, out: Path, shard_size: int) -> Work:
    """Its command ``mergekit-yaml`` with the least config that copies a model. It edits nothing."""
    from mergekit.scripts.run_yaml import main

    config = out.with_name("merge.yml")
    model = {"model": str(source)}
    recipe = {"models": [model], "merge_method": "passthrough", "dtype": "bfloat16"}
    config.write_text(json.dumps(recipe))  # JSON is YAML
    size = f"--out-shard-size={shard_size // 2}"  # in parameters
    flags = ("--lazy-unpickle", "--no-cuda", "--no-copy-tokenizer", "--no-write-model-card")
    arguments = [str(config), str(out), size, "--quiet", *flags]
    return lambda: main(arguments, standalone_mode=False)


KINDS: dict[str, Callable[..., Work]] = {
    row.__name__: row for row in (dd, cp, ours, loop, transformers, mergekit)
}


def subspace(source: Path) -> "Tensor":
    """U (D, RANK) float32, orthonormal columns, the same for every row. Wakes the BLAS threads."""
    import torch

    hidden = json.loads((source / "config.json").read_text())["hidden_size"]
    generator = torch.Generator().manual_seed(0)
    U: Tensor = torch.linalg.qr(torch.randn(hidden, RANK, generator=generator))[0]
    U.T @ torch.randn(hidden, 64)
    return U


def project(W: "Tensor", U: "Tensor") -> "Tensor":
    """W (D, F) without what it writes along U, in W's dtype: ``W - U (U^T W)`` in float32."""
    wide = W.float()
    wide -= U @ (U.T @ wide)
    return wide.to(W.dtype)


def copy_small(source: Path, out: Path) -> None:
    """Whatever is not a shard, and not there yet."""
    for file in source.iterdir():
        if file.suffix != ".safetensors" and not (out / file.name).exists():
            shutil.copy(file, out)


def leakage(source: Path, out: Path) -> float:
    """The largest ``||U^T W'|| / ||U^T W||`` over the edited tensors; 1 if nothing was edited.

    Raises:
        SystemExit: ``out`` has not the tensors of ``source``.
    """
    U = subspace(source)
    with _tensors(source) as before, _tensors(out) as after:
        if before.keys() != after.keys():
            raise SystemExit(f"what was written lacks {before.keys() - after.keys()}")
        shares = [
            (U.T @ after[name](name).float()).norm() / (U.T @ before[name](name).float()).norm()
            for name in before
            if name.endswith(EDITED)
        ]
    return float(max(shares))


@contextmanager
def _tensors(folder: Path) -> Iterator[dict[str, Callable[[str], "Tensor"]]]:
    """Tensor name -> what reads it."""
    from safetensors import safe_open

    with ExitStack() as stack:
        readers: dict[str, Callable[[str], Tensor]] = {}
        for shard in sorted(folder.glob("*.safetensors")):
            file = stack.enter_context(safe_open(shard, "pt"))
            readers |= dict.fromkeys(file.keys(), file.get_tensor)
        yield readers


def cpu_seconds() -> float:
    """User and system time of this process and of its children that have ended."""
    both = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


def main(kind: str, source: str, out: str, options: str) -> None:
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # whatever libraries print is no answer
        work = KINDS[kind](Path(source), Path(out), **json.loads(options))
        print("ready", file=answers, flush=True)
        sys.stdin.readline()
        before = cpu_seconds()
        work()
        print(cpu_seconds() - before, file=answers, flush=True)
        sys.stdin.readline()


if __name__ == "__main__":
    main(*sys.argv[1:])
