"""Recognise a folder with the result of the same conversion, so that it need not run again."""

import dataclasses
from pathlib import Path

from msgspec import structs

from converter.calibration.pairs import load_pairs, load_prose
from converter.calibration.statistics import read_inputs
from converter.calibration.word_list import load_words
from converter.checkpoints.front_matter import read_card
from converter.checkpoints.names import CARD, MANIFEST, SIGNATURE
from converter.checkpoints.resolve import resolve
from converter.entrypoints.convert import check_whole, convert, other_texts
from converter.entrypoints.delivery import Delivery
from converter.errors import DestinationError, VerificationError
from converter.hub.addresses import settled
from converter.manifest import TOOL, Manifest, SearchRecord
from converter.outputs.base import output_of
from converter.outputs.claim import claimed
from converter.outputs.destination import interrupted
from converter.outputs.record_checks import check_left_out
from converter.recipe import SELF, Recipe, Settings
from converter.release.licences import fitting_name, terms_of
from converter.release.manifest import read_manifest
from converter.release.recording import digest_of
from converter.release.signing import Signer
from converter.runtime import progress


def convert_once(
    recipe: Recipe,
    destination: Path,
    settings: Settings = Settings(),
    delivery: Delivery = Delivery(),
    pictures: Path | None = None,
) -> Manifest:
    """``convert``, unless the destination already holds the result. Then verify it.

    Args:
        recipe, destination, settings, delivery: as of ``convert``.
        pictures: a folder within the destination that must have pictures.

    Raises:
        ConverterError: as ``convert`` and ``finish_existing``.
    """
    recipe = settled(recipe)
    if before := _done_before(recipe, destination, delivery, pictures):
        finish_existing(recipe, destination, before, delivery.signer)
        return before
    if delivery.scratch:
        delivery = dataclasses.replace(delivery, overwrite=True)
    return convert(recipe, destination, settings, delivery)


def _done_before(
    recipe: Recipe, destination: Path, delivery: Delivery, pictures: Path | None
) -> Manifest | None:
    """The manifest of an earlier result of the same run on the same inputs, whole or not; else
    None.

    Manifests name files without their folders, so the content of every input is compared, too. A
    run that evaluates never counts as the same, since not all its inputs are recorded. The gates
    must have been passed, ``pictures`` must hold some if it is given, and without a signer there
    must be no signature.

    Raises:
        SourceError, CheckpointError, DataError: an input cannot be read.
    """
    if delivery.stream or delivery.overwrite or delivery.evaluation:
        return None
    manifest = made_before(destination)
    same = bool(
        manifest
        and manifest.tool == TOOL
        and manifest.run == recipe.record()
        and manifest.evaluation is None
        and _searched(manifest.search) == _searched(delivery.search)
        and (delivery.signer or not (destination / SIGNATURE).is_file())
        and (not pictures or any(pictures in Path(name).parents for name in manifest.files))
        and {gate.gate: gate.limit for gate in manifest.gates} == delivery.gates.limits
        and all((destination / name).is_file() for name in manifest.files)
    )
    return manifest if manifest and same and _same_inputs(recipe, destination, manifest) else None


def _searched(search: SearchRecord | None) -> SearchRecord | None:
    """A search record without the measurements that only the conversion makes."""
    return search and structs.replace(search, kept=None)


def made_before(destination: Path) -> Manifest | None:
    """The manifest of a folder, whole or not; None if the run was killed in its last step."""
    try:
        if (destination / MANIFEST).is_file() and not interrupted(destination.resolve()):
            return read_manifest(destination)
    except (VerificationError, OSError):
        pass  # the step that writes there will report it
    return None


def _same_inputs(recipe: Recipe, destination: Path, manifest: Manifest) -> bool:
    """Whether texts, activations, source and its licence are those that a manifest records."""
    words, prose = load_words(recipe.word_list), load_prose(recipe.neutral)
    pairs = None
    if recipe.pairs != SELF:
        pairs = load_pairs(recipe.pairs, words, recipe.num_pairs, recipe.seed)
    if other_texts(manifest, recipe, pairs, prose, words):
        return False
    seen = manifest.activations.inputs if manifest.activations else {}
    if recipe.activations and read_inputs(recipe.activations) != seen:
        return False
    source, known = resolve(recipe.source, recipe.subfolder), manifest.source
    if source.repo is not None and source.repo.sizes:
        return (source.repo.repo_id, source.repo.commit) == (known.repo_id, known.commit)
    files = known.all_files
    card, terms = read_card(destination / CARD), terms_of(source, recipe.base_model or source.base)
    return (
        all(card.get(key) == value for key, value in terms.fields.items())
        and set(output_of(recipe.output).companions(source.small)) <= files.keys()
        and (not manifest.shards or not any(check_left_out(manifest, source)))
        and all(digest_of(source, name) == file.sha256 for name, file in files.items())
    )


def finish_existing(
    recipe: Recipe, folder: Path, manifest: Manifest, signer: Signer | None
) -> None:
    """Verify an earlier result, clean up beside it, and sign it with the present key.

    Raises:
        DestinationError: it is not whole, another run holds it or has replaced it, or it cannot be
            written.
    """
    progress.note(f"{folder} is the result of this run already")
    with claimed(folder, True) as claim:
        try:
            check_whole(recipe, folder)
            is_same = read_manifest(folder) == manifest  # nobody held it until now
        except VerificationError as error:
            raise _not_empty(
                folder, f"the result of this recipe, and it is damaged: {error.found}"
            ) from error
        if not is_same:
            raise _not_empty(folder, "the result of another recipe, written there a moment ago")
        if signer:
            name = f"{manifest.source.name.rpartition('/')[2]}-{manifest.method.name}"
            signer.sign(folder, fitting_name(read_card(folder / CARD), name), claim.holder)


def _not_empty(folder: Path, found: str) -> DestinationError:
    return DestinationError(
        f"destination {folder} is not empty", found=found,
        hint="choose another, or give --overwrite to delete it and write anew",
    )  # fmt: skip
