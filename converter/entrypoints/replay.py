"""Do a recorded conversion again, and say whether the same bytes come out.

The recorded edit is applied to the recorded source: nothing is fitted, run or measured, so what was
measured then is kept. A refit repeats the whole fit to compare the edits, and then writes with the
recorded one all the same: its bytes are what can be compared.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from msgspec import structs

from converter.checkpoints.names import MANIFEST
from converter.checkpoints.plan import make_plan
from converter.checkpoints.resolve import resolve
from converter.checkpoints.safetensors.rewrite import find_damage
from converter.checkpoints.source import Source
from converter.edits.base import Footprint
from converter.edits.edit_file import EDIT_FILE
from converter.edits.engine import Engine
from converter.entrypoints.convert import check_whole, inputs_of, write_records
from converter.entrypoints.delivery import no_pictures
from converter.entrypoints.refit import compare_fit
from converter.entrypoints.resume import finish_existing
from converter.errors import VerificationError
from converter.manifest import TOOL, Manifest
from converter.models.resident import choose_device
from converter.outputs.base import WriteJob, Written, output_of
from converter.outputs.checkpoint.additions import check_edit
from converter.outputs.claim import claimed
from converter.outputs.destination import check_destination, interrupted
from converter.outputs.journal import Journal
from converter.recipe import Recipe, Settings
from converter.release.local_inputs import LocalInputs
from converter.release.manifest import environment, read_manifest
from converter.release.recording import NAMED, Recording, check_source, differences, recipe_of
from converter.runtime import progress


@dataclass(frozen=True, slots=True)
class Replayed:
    """What a replay found.

    Attributes:
        manifest: that was written.
        differences: of tool, device and libraries, ``what``, ``recorded`` and ``found`` each.
        identical: files with the recorded bytes.
        other: names of generated files, such as the card, that have other bytes than recorded.
        angles: tensor of the edit -> degrees between the refitted and the recorded one, ascending;
            None without a refit.
    """

    manifest: Manifest
    differences: list[dict[str, str]]
    identical: int
    other: list[str]
    angles: dict[str, list[float]] | None


@progress.recording()
def replay(
    recording: Recording,
    destination: Path,
    given: LocalInputs = LocalInputs(),
    settings: Settings = Settings(),
    *,
    max_angle: float | None = None,
    overwrite: bool = False,
) -> Replayed:
    """Write a recorded checkpoint once more.

    Args:
        recording: of the conversion.
        destination: a folder that does not exist or is empty.
        given: where local inputs are.
        settings: how this machine does it.
        max_angle: fit the edit again, too; degrees that it may be off. None to fit nothing.
        overwrite: replace a checkpoint that is already there.

    Raises:
        VerificationError: the source, the outputs or the refitted edit differ.
        ConverterError: another of its children; the destination is as it was.
    """
    recipe = recipe_of(recording, given, refit=max_angle is not None)
    device = device_like(recording, recipe)
    found = differences(recording, device)
    for entry in found:
        progress.warn(f"{entry['what']} is {entry['found']} here, recorded is {entry['recorded']}")
    place, name = recipe.source, recording.path.name
    with progress.stage("plan", f"comparing {place} with the source of {name}"):
        source = as_recorded(recording, recipe, resolve(recipe.source, recipe.subfolder))
        check_source(recording, source)
        plan = make_plan(source.config, source.weight_map, source.headers())
        edit = recording.edit(plan)
        check_edit(edit, plan, source)
    if not overwrite and max_angle is None and (before := replayed_before(recording, destination)):
        finish_existing(recipe, destination, before, None)
        other = others(recording, before)
        identical = len(before.files.keys() - {EDIT_FILE, *other})
        return Replayed(before, found, identical, other, None)
    inputs = [*inputs_of(recipe, source), recording.path, recording.edit_file]
    output, weights = output_of(recipe.output), tuple(plan.find(edit.tensors).values())
    footprint = Footprint(weights, rank=edit.rank)
    check_destination(destination, overwrite, inputs, output.nbytes(plan, footprint))
    engine = Engine(settings.workers, settings.memory_limit, device, recipe.rounding)
    engine.workers_for(output.at_a_time(source), weights, edit.rank)
    angles = None
    with claimed(destination, overwrite) as claim:
        if max_angle is not None:
            angles = compare_fit(recording, recipe, device, max_angle, settings.memory_limit)
        journal = Journal.of(claim, source, edit, engine)
        with claim.staged(overwrite) as folder:
            with progress.stage("edit", f"editing {len(weights)} tensors on {device}"):
                job = WriteJob(
                    source=source, plan=plan, edit=edit, folder=folder, engine=engine,
                    receiver=journal,
                )  # fmt: skip
                written = output.write(job)
                shutil.copyfile(recording.edit_file, folder / EDIT_FILE)
            identical = check_outputs(recording, written, folder, found)
            manifest = structs.replace(
                recording.manifest,
                tool=TOOL,
                edited=written.edits,
                environment=environment(device),
                replay_of=recording.sha256,
            )
            manifest = write_records(source, written, folder, manifest, no_pictures)
            check_whole(recipe, folder)
    return Replayed(manifest, found, identical, others(recording, manifest), angles)


def replayed_before(recording: Recording, destination: Path) -> Manifest | None:
    """The manifest of a folder that holds a replay of this recording already; whole or not."""
    if not (destination / MANIFEST).is_file() or interrupted(destination.resolve()):
        return None
    try:
        manifest = read_manifest(destination)
    except VerificationError:
        return None
    now = manifest.files
    same = (
        manifest.replay_of == recording.sha256
        and manifest.tool == TOOL
        and all(now.get(name) == file for name, file in recording.manifest.shards.items())
    )
    return manifest if same else None


def device_like(recording: Recording, recipe: Recipe) -> str:
    """A device of the recorded kind if there is one: other kinds add in another order."""
    if recording.manifest.environment.device == "cpu" or not torch.cuda.is_available():
        return "cpu"
    return choose_device("auto" if recipe.device == "cpu" else recipe.device)


def as_recorded(recording: Recording, recipe: Recipe, source: Source) -> Source:
    """The source under its recorded name, and of its small files those that were there then."""
    recorded = recording.manifest.source
    known, base = recorded.files, recipe.base_model or recorded.repo_id or source.base
    return replace(
        source,
        name=recorded.name,
        base=base,
        base_commit=recorded.commit if base == recorded.repo_id else None,
        companions=tuple(name for name in source.companions if name in known),
        above=tuple(path for path in source.above if path.name in known),
    )


def check_outputs(
    recording: Recording, written: Written, folder: Path, found: Sequence[Mapping[str, str]]
) -> int:
    """Compare what was written with what is recorded.

    Returns:
        the number of files, all of them as recorded.

    Raises:
        VerificationError: naming those that are not, and the tensor where a shard departs.
    """
    digests = {written.renamed.get(n, n): record.sha256 for n, record in written.shards.items()}
    digests |= {name: file.sha256 for name, file in written.extra.items()}
    digests |= {name: file.sha256 for name, file in {**written.copies, **written.made}.items()}
    wrong = []
    for name in sorted({*digests, *recording.manifest.shards}):
        file = recording.manifest.files.get(name)
        if name not in digests:
            wrong.append(f"{name} is not there")
        elif file is None or digests[name] != file.sha256:
            prefixes = file and file.prefixes
            place = f" from {find_damage(folder / name, prefixes)} on" if prefixes else ""
            wrong.append(f"{name} differs{place}")
    if wrong:
        more = f"; and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
        raise VerificationError(
            "the replay gave other bytes than recorded: " + "; ".join(wrong[:NAMED]) + more,
            hint="nothing was written; " + probable_cause(found),
        )
    return len(digests)


def probable_cause(found: Sequence[Mapping[str, str]]) -> str:
    """Why outputs may differ although the source does not."""
    if not found:
        return "tool, device and libraries are as recorded, so the manifest may be altered"
    listed = (f"{d['what']} {d['found']} instead of {d['recorded']}" for d in found)
    return "the probable cause is " + ", ".join(listed)


def others(recording: Recording, manifest: Manifest) -> list[str]:
    """Generated files that are not as recorded, or were not there, or are not any more."""
    then, now = recording.manifest.files, manifest.files
    return sorted(n for n in {*then, *now} if then.get(n) != now.get(n))
