"""Whether a folder holds already what a conversion would write, so that it need not run again."""

import json
from pathlib import Path
from typing import Any

from converter import __version__
from converter.activations import read_inputs
from converter.errors import VerificationError
from converter.gates import Gates
from converter.layout import SIGNATURE
from converter.manifest import MANIFEST, read_manifest, recorded
from converter.pairs import load_pairs, load_prose
from converter.resolve import resolve
from converter.run import Run
from converter.words import load_words


def done_before(
    run: Run, destination: Path, evaluated: bool, signed: bool, gates: Gates, cache: Path
) -> dict[str, Any] | None:
    """The manifest of a checkpoint that the same run has made of the same inputs.

    Manifests name files without their folders, so the content of every input is compared, too.

    Args:
        run: what is asked for now.
        destination: where it is asked for.
        evaluated: whether the edit is to be measured.
        signed: whether the folder is to be signed.
        gates: that it has to have passed.
        cache: the user's cache folder.

    Returns:
        None if there is no checkpoint, or one of another run. Whether its files are whole is not
        looked at.

    Raises:
        SourceError, CheckpointError, DataError: an input cannot be read.
    """
    if not (destination / MANIFEST).is_file():
        return None
    try:
        manifest = read_manifest(destination)
    except VerificationError:
        return None
    same = (
        manifest["tool"]["version"] == __version__
        and manifest["run"] == json.loads(json.dumps(recorded(run)))
        and (manifest["evaluation"] is not None) == evaluated
        and (destination / SIGNATURE).is_file() == signed
        and {passed["gate"]: passed["limit"] for passed in manifest["gates"]} == gates.limits
        and all((destination / name).is_file() for name in manifest["files"])
    )
    return manifest if same and _same_inputs(run, manifest, cache) else None


def _same_inputs(run: Run, manifest: dict[str, Any], cache: Path) -> bool:
    words, prose = load_words(run.word_list), load_prose(run.neutral)
    pairs = load_pairs(run.pairs, words, run.num_pairs, run.seed)
    for name, found in (("word_list", words), ("neutral", prose), ("pairs", pairs)):
        if manifest[name]["sha256"] != found.sha256:
            return False
    if run.activations and read_inputs(run.activations) != manifest["activations"]["inputs"]:
        return False
    source, known = resolve(run.source, cache, run.subfolder), manifest["source"]
    if source.repo is not None:
        return (source.repo.repo_id, source.repo.commit) == (known["repo_id"], known["commit"])
    files = {**known["files"], **known["originals"]}
    digests = source.digests(cache)
    return all(files.get(name, {}).get("sha256") == sha for name, sha in digests.items())
