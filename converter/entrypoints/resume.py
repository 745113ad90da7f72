"""Whether a folder holds already what a conversion would write, so that it need not run again."""

import json
from pathlib import Path
from typing import Any

from converter import __version__
from converter.calibration.pairs import load_pairs, load_prose
from converter.calibration.statistics import read_inputs
from converter.calibration.word_list import load_words
from converter.checkpoints.layout import read_card
from converter.checkpoints.names import CARD, MANIFEST, SIGNATURE
from converter.checkpoints.resolve import resolve
from converter.checkpoints.source import Source
from converter.entrypoints.convert import check_whole
from converter.errors import DestinationError, VerificationError
from converter.evaluate.gates import Gates
from converter.outputs.base import OUTPUTS
from converter.outputs.record_checks import place_of, source_files
from converter.outputs.staging.claim import claimed, interrupted
from converter.recipe import Run
from converter.release.licences import families, fitting_name, licence_name, terms_of
from converter.release.manifest import read_manifest, recorded
from converter.release.signing import Signer
from converter.runtime import progress
from converter.runtime.cache import remembered_digest


def done_before(
    run: Run, destination: Path, signed: bool, gates: Gates, pictures: Path | None
) -> dict[str, Any] | None:
    """The manifest of a checkpoint that the same run has made of the same inputs.

    Manifests name files without their folders, so the content of every input is compared, too. A
    run that evaluates is never taken for the same: not all that it depends on is recorded.

    Args:
        run: what is asked for now, without an evaluation.
        destination: where it is asked for.
        signed: whether it will be signed anew; else there must be no signature.
        gates: that it has to have passed.
        pictures: a folder within it that has to hold some.

    Returns:
        None if there is no checkpoint, or one of another run, or one that was killed in its last
        step. Whether its files are whole is not looked at.

    Raises:
        SourceError, CheckpointError, DataError: an input cannot be read.
    """
    try:
        if not (destination / MANIFEST).is_file() or interrupted(destination.resolve()):
            return None
        manifest = read_manifest(destination)
    except (VerificationError, OSError):  # who writes there will say what is wrong
        return None
    same = (
        manifest["tool"]["version"] == __version__
        and manifest["run"] == json.loads(json.dumps(recorded(run)))
        and manifest["evaluation"] is None
        and (signed or not (destination / SIGNATURE).is_file())
        and (not pictures or any(pictures in Path(name).parents for name in manifest["files"]))
        and {passed["gate"]: passed["limit"] for passed in manifest["gates"]} == gates.limits
        and all((destination / name).is_file() for name in manifest["files"])
    )
    return manifest if same and _same_inputs(run, destination, manifest) else None


def _same_inputs(run: Run, destination: Path, manifest: dict[str, Any]) -> bool:
    words, prose = load_words(run.word_list), load_prose(run.neutral)
    pairs = load_pairs(run.pairs, words, run.num_pairs, run.seed)
    for name, found in (("word_list", words), ("neutral", prose), ("pairs", pairs)):
        if manifest[name]["sha256"] != found.sha256:
            return False
    if run.activations and read_inputs(run.activations) != manifest["activations"]["inputs"]:
        return False
    source, known = resolve(run.source, run.subfolder), manifest["source"]
    if source.repo is not None:
        return (source.repo.repo_id, source.repo.commit) == (known["repo_id"], known["commit"])
    files = source_files(manifest)
    card, terms = read_card(destination / CARD), terms_of(source, run.base_model or source.base)
    return (
        all(card.get(key) == value for key, value in terms.fields.items())
        and set(OUTPUTS[run.output].companions(source)) <= files.keys()
        and all(_sha256(source, name) == sha256 for name, sha256 in files.items())
    )


def _sha256(source: Source, name: str) -> str | None:
    path = place_of(source, name)
    return remembered_digest(path) if path.is_file() else None


def settle(run: Run, folder: Path, manifest: dict[str, Any], signer: Signer | None) -> None:
    """Verify what was done before, clean up beside it, and sign it by the key that is given now.

    Raises:
        DestinationError: it is not whole, another run holds it or has replaced it, or it cannot be
            written.
    """
    progress.note(f"{folder} is the result of this run already")
    with claimed(folder, True) as claim:
        try:
            check_whole(run, folder)
            is_same = read_manifest(folder) == manifest  # nobody held it until now
        except VerificationError as error:
            raise _not_empty(
                folder, f"the result of this run, and it is not whole: {error.found}"
            ) from error
        if not is_same:
            raise _not_empty(folder, "the result of another run, which has just come there")
        if signer:
            family = families().get(licence_name(read_card(folder / CARD)) or "")
            name = f"{manifest['source']['name'].rpartition('/')[2]}-{manifest['method']['name']}"
            signer.sign(folder, fitting_name(family, name), claim.holder)


def _not_empty(folder: Path, found: str) -> DestinationError:
    return DestinationError(
        f"destination {folder} is not empty", found=found,
        hint="choose another, or give --overwrite to delete it and write anew",
    )  # fmt: skip
