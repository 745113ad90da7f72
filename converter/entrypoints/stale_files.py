"""What an earlier version has left in a repo, and the next one has to delete."""

from collections.abc import Collection, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi

from converter.checkpoints.layout import read_json
from converter.checkpoints.names import MANIFEST, SIGNATURE
from converter.errors import CheckpointError
from converter.hub.publication import Publication

LOADED = (".safetensors", ".safetensors.index.json", "adapter_config.json")
"""Endings of files in the repo's main folder that belong to a model only if its manifest says so.
A loader would read what an earlier model has left; transformers reads an adapter before a model."""


def leftovers(
    api: HfApi, place: Publication, there: Collection[str], ours: Collection[str]
) -> list[str]:
    """The files of a repo that belong to an earlier version, and not to the one that comes.

    They are weights, a signature, and what the manifest that is there lists, if it can be read.

    Args:
        api: the client, which raises errors of its own.
        place: repo and branch.
        there: names of its files.
        ours: names of the files that come.
    """
    listed = _listed(api, place) if MANIFEST in there else set()
    return [n for n in there if n not in ours and (n in listed or _is_loaded(n))]


def _is_loaded(name: str) -> bool:
    return name == SIGNATURE or ("/" not in name and name.endswith(LOADED))


def _listed(api: HfApi, place: Publication) -> set[str]:
    """The files of the manifest at the head of the branch; none if it is malformed."""
    with TemporaryDirectory() as folder:
        path = api.hf_hub_download(place.repo_id, MANIFEST, revision=place.branch, local_dir=folder)
        try:
            files = read_json(Path(path)).get("files")
        except CheckpointError:
            return set()
    return _visible(files) if isinstance(files, dict) else set()


def _visible(names: Iterable[str]) -> set[str]:
    """Without ``.gitattributes`` and the like, which no conversion writes."""
    return {name for name in names if not name.startswith(".")}
