"""Peak anonymous memory of the edit stage, over checkpoints of several sizes.

    python tests/bench/edit_memory.py [--folder CHECKPOINT] [--layers 30 --layers 270] [--native 15]

Synthetic checkpoints have SmolLM2-135M's tensors (hidden size 576, FFN 1536, bfloat16, shards of
60 MB) and as many layers as asked for: the number of shards grows, the largest tensor does not.
``--native`` makes one in Meta's layout, a single consolidated.00.pth in float16 (hidden size 1024,
FFN 2816).
Linux only: it reads RssAnon of /proc every 0.3 ms, in a process of its own for each checkpoint.
Each is run twice: as it is, and with MALLOC_MMAP_THRESHOLD_ set, so that glibc gives freed blocks
back at once. The second figure is what the stage needs; the first also has what the allocator
keeps.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import click
import torch
from tokenizers import Tokenizer, models

from tests.bench.processes import apart, peak_of
from tests.bench.synthetic import Llama, write_llama
from tests.builders.models import planned

SHARD = 60_000_000


def build(folder: Path, layers: int) -> None:
    """Write a synthetic Llama checkpoint."""
    model = Llama(
        layers=layers, hidden=576, ffn=1536, vocabulary=49152, heads=9, kv_heads=3, tied=True
    )
    write_llama(folder, model, SHARD)


def build_native(folder: Path, layers: int) -> None:
    """Write a synthetic Llama in Meta's layout."""
    dim, ffn, vocab = 1024, 2816, 32000
    shapes = {"tok_embeddings": (vocab, dim), "norm": (dim,), "output": (vocab, dim)}
    for n in range(layers):
        shapes |= {f"layers.{n}.attention.w{x}": (dim, dim) for x in "qkvo"}
        shapes |= {f"layers.{n}.feed_forward.w{x}": (ffn, dim) for x in "13"}
        shapes[f"layers.{n}.feed_forward.w2"] = (dim, ffn)
        shapes |= {f"layers.{n}.{x}_norm": (dim,) for x in ("attention", "ffn")}
    weights = {f"{name}.weight": torch.randn(shape).half() for name, shape in shapes.items()}
    torch.save(weights, folder / "consolidated.00.pth")
    params = {"dim": dim, "multiple_of": 256, "n_heads": 16, "n_layers": layers, "vocab_size": -1}
    (folder / "params.json").write_text(json.dumps(params))
    Tokenizer(models.WordLevel({"a": 0}, "a")).save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def measure(folder: Path) -> dict[str, Any]:
    """Edit all layers of a checkpoint and sample this process's memory meanwhile."""
    from converter.edits.base import Edit
    from converter.edits.deltas import RemoveSubspace
    from converter.edits.engine import Engine
    from converter.outputs.base import WriteJob
    from converter.outputs.checkpoint.write import write_checkpoint

    source, plan = planned(folder)
    hidden = plan.dimensions.hidden_size
    basis = torch.linalg.qr(torch.randn(hidden, 4))[0]
    removal = RemoveSubspace(basis)
    edit = Edit({weight.info.name: removal for weight in plan.targets})
    basis.T @ torch.randn(hidden, 8)  # wake the BLAS threads before the idle reading
    with tempfile.TemporaryDirectory(dir=folder.parent) as out:
        job = WriteJob(source=source, plan=plan, edit=edit, folder=Path(out), engine=Engine())
        peak = peak_of(lambda: write_checkpoint(job))
    return {
        "gigabytes": plan.nbytes / 1e9,
        "shards": len(source.shards),
        "edited": len(edit.tensors),
        "peak": peak,
    }


@click.command()
@click.option("--folder", "folders", multiple=True, type=click.Path(path_type=Path))
@click.option("--layers", multiple=True, type=int, default=[30, 90, 270], show_default=True)
@click.option("--native", multiple=True, type=int, help="Layers of one in Meta's layout.")
def main(folders: tuple[Path, ...], layers: tuple[int, ...], native: tuple[int, ...]) -> None:
    click.echo("| checkpoint | GB | shards | tensors edited | peak above idle, MB | needed, MB |")
    click.echo("|---|---|---|---|---|---|")
    names: dict[Path | str, Any] = dict.fromkeys(folders)
    names |= {f"{n} layers": (build, n) for n in layers}
    names |= {f"Meta's layout, {n} layers": (build_native, n) for n in native}
    for item, made in names.items():
        with tempfile.TemporaryDirectory() as temporary:
            folder = item if isinstance(item, Path) else Path(temporary)
            if made:
                made[0](folder, made[1])
            r = apart(measure, folder)
            needed = apart(measure, folder, MALLOC_MMAP_THRESHOLD_="262144")
        name = folder.name if isinstance(item, Path) else item
        click.echo(
            f"| {name} | {r['gigabytes']:.2f} | {r['shards']} | {r['edited']} | "
            f"{r['peak'] / 1e6:.0f} | {needed['peak'] / 1e6:.0f} |"
        )


if __name__ == "__main__":
    main()
