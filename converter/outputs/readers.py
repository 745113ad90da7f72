"""Rules for the file names of every output, since programs recognise weights by them.

transformers takes ``model.safetensors`` before it looks for an index. vLLM takes every
``*.safetensors``; if there is an index, it drops the files that the index does not name. llama.cpp
and MLX take ``model*.safetensors``. Old versions know only old keys. So:

- What is not a weight looks like none, in folders, too. What the source has keeps its name.
- The weights are one ``model.safetensors``, or shards that the index names, all of them and no
  others. Those that the source does not name begin with ``model``.
- Small files that we make, rather than copy, say the same to old readers.
"""

from collections.abc import Iterator, Mapping, Set
from pathlib import Path

from converter.checkpoints.formats.version_4 import rope_keys
from converter.checkpoints.layout import read_index, read_json
from converter.checkpoints.names import INDEX, SINGLE, is_weights, weight_files
from converter.manifest import Manifest
from converter.outputs.base import Output


def check_readers(
    folder: Path, manifest: Manifest, output: Output, damaged: Mapping[str, str]
) -> Iterator[str]:
    """A sentence for each rule that an output breaks; ``damaged`` files are skipped.

    Raises:
        CheckpointError: the index or a config cannot be read.
    """
    weights = {*manifest.shards, *([INDEX] if output.has_shards else output.own_files)}
    for name in sorted(manifest.files.keys() - weights - manifest.source.files.keys()):
        if is_weights(name):
            yield f"{name}: readers that take all files of that ending for weights would load it"
    if not output.has_shards:
        return
    if INDEX not in damaged:
        yield from _check_shards(folder, manifest)
    originals = manifest.source.originals
    gguf = any(name.lower().endswith(".gguf") for name in originals)
    whole = gguf or manifest.run.source == "demo"
    if whole or weight_files(originals):
        yield from _check_made(folder, {*damaged, *manifest.edit.patches}, tokenizer=whole)


def _check_shards(folder: Path, manifest: Manifest) -> Iterator[str]:
    shards = manifest.shards.keys()
    if INDEX in manifest.files:
        indexed = {*read_index(folder / INDEX).values()}
        for name in sorted(shards - indexed):
            yield f"{name}: {INDEX} does not name it, so readers leave it out"
        for name in sorted(indexed - shards):
            yield f"{name}: {INDEX} names it, and it is no shard"
    elif shards != {SINGLE}:
        yield f"{INDEX} is missing: without it, readers find {SINGLE} and no other shard"
    if SINGLE in shards and len(shards) > 1:
        yield f"{SINGLE}: transformers takes it for the whole model, and leaves the others out"
    theirs = {} if manifest.source.originals else manifest.source.files
    for name in sorted(shards - theirs.keys()):
        if not name.startswith("model"):
            yield f"{name}: readers that look for model*.safetensors leave it out"


def _check_made(folder: Path, other: Set[str], *, tokenizer: bool) -> Iterator[str]:
    """Config, and where it is ours the tokenizer's, of a source that had none that transformers
    reads; but for ``other``, files that are damaged or patched."""
    if "config.json" not in other:
        config = read_json(folder / "config.json")
        try:
            old = {"torch_dtype": config["dtype"]} | rope_keys(config.get("rope_parameters"))
        except (AttributeError, KeyError, TypeError):  # of an altered one
            old = {"rope_theta": None}
        for key in sorted(old):
            if key not in config or config[key] != old[key]:
                yield f"config.json: {key} differs from newer keys, which old readers do not know"
    template, name = folder / "chat_template.jinja", "tokenizer_config.json"
    if tokenizer and template.is_file() and not other & {template.name, name}:
        said = str(read_json(folder / name).get("chat_template"))
        if said.encode("utf-8", "surrogatepass") != template.read_bytes():
            yield f"{name}: it lacks the text of {template.name}, which old readers do not know"
