"""Repeat a recorded conversion, and check that it gives the same bytes.

The recorded edit is applied to the recorded source. Nothing is fitted, run or measured, so the
recorded measurements stay. A refit repeats the whole fit to compare the edits, and still writes
with the recorded edit, since only its bytes can be compared.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import radians, sin
from pathlib import Path

import torch
from msgspec import structs
from torch import Tensor

from converter.calibration.word_list import load_words
from converter.checkpoints.architectures.kind import allow_own_code
from converter.checkpoints.names import EDIT_FILE
from converter.checkpoints.plan import Plan, read_plan
from converter.checkpoints.resolve import resolve
from converter.checkpoints.safetensors.rewrite import find_damage
from converter.checkpoints.source import Source
from converter.checkpoints.weights import Weight
from converter.edits.base import Edit, Footprint
from converter.edits.engine import Engine
from converter.edits.likeness import Likeness, likeness, principal_angles, tensors_alike
from converter.entrypoints.convert import (
    check_whole,
    inputs_of,
    load_texts,
    other_texts,
    prepare,
    write_records,
)
from converter.entrypoints.resume import finish_existing, made_before
from converter.errors import VerificationError
from converter.evaluation.fit import fit
from converter.manifest import TOOL, Manifest
from converter.methods.workbench import Bench
from converter.models.resident import choose_device
from converter.outputs.base import WriteJob, Written, output_of
from converter.outputs.checkpoint.additions import check_edit
from converter.outputs.claim import claimed
from converter.outputs.destination import check_destination
from converter.outputs.journal import Journal
from converter.outputs.record_checks import base_of
from converter.recipe import LocalInputs, Recipe, Settings
from converter.release.manifest import environment, file_list
from converter.release.recording import NAMED, Recording, check_source, differences, recipe_of
from converter.runtime import progress


@dataclass(frozen=True, slots=True)
class Refitted:
    """How far a refitted edit is from the recorded one.

    Attributes:
        angles: basis in the edit's file -> the principal angles between the two subspaces, in
            degrees, ascending.
        changes: tensor of the checkpoint -> how similar its two changes are, for changes that
            remove no subspace.
    """

    angles: dict[str, list[float]]
    changes: dict[str, Likeness]


@dataclass(frozen=True, slots=True)
class Replayed:
    """The results of a replay.

    Attributes:
        manifest: the written one.
        differences: of tool, device and libraries, ``what``, ``recorded`` and ``found`` each.
        identical: files with the recorded bytes.
        other: names of generated files, such as the card, that have other bytes than recorded.
        refitted: how far the refitted edit is from the recorded one; None without a refit.
    """

    manifest: Manifest
    differences: list[dict[str, str]]
    identical: int
    other: list[str]
    refitted: Refitted | None


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
    """Repeat a recorded conversion.

    Args:
        recording: of the conversion.
        destination: a folder that does not exist or is empty, unless it is to be overwritten.
        given: where local inputs are.
        settings: how this machine does it.
        max_angle: fit the edit again, too, and allow a difference of so many degrees; for changes
            that are not subspaces, of the corresponding share of their norm. None: no fit.

    Raises:
        VerificationError: the source, the outputs or the refitted edit differ.
        ConverterError: another of its children; the destination is as it was.
    """
    recipe = recipe_of(recording, given, refit=max_angle is not None)
    allow_own_code(recipe.trust_remote_code)
    device = _device_like(recording, recipe)
    found = differences(recording, device)
    for entry in found:
        progress.warn(f"{entry['what']} is {entry['found']} here, recorded is {entry['recorded']}")
    title = f"comparing {recipe.source} with the source of {recording.path.name}"
    with progress.stage("plan", title):
        source = _as_recorded(recording, recipe, resolve(recipe.source, recipe.subfolder))
        check_source(recording, source)
        plan = read_plan(source)
        edit = recording.edit(plan)
        check_edit(edit, plan, source)
    if not overwrite and max_angle is None and (before := _replayed_before(recording, destination)):
        finish_existing(recipe, destination, before, None)
        other = _others(recording, before)
        identical = len(before.files.keys() - {EDIT_FILE, *other})
        return Replayed(before, found, identical, other, None)
    inputs = [*inputs_of(recipe, source), recording.path, recording.edit_file]
    output, weights = output_of(recipe.output), tuple(plan.find(edit.tensors).values())
    footprint = Footprint(weights, rank=edit.rank)
    check_destination(destination, overwrite, inputs, output.nbytes(plan, footprint))
    engine = Engine(settings.workers, settings.memory_limit, device, recipe.rounding)
    engine.workers_for(output.at_a_time(source), weights, edit.rank)
    refitted = None
    with claimed(destination, overwrite) as claim:
        if max_angle is not None:
            refitted = _compare_fit(recording, recipe, device, max_angle, settings)
        with claim.staged(overwrite) as folder:
            with progress.stage("edit", f"editing {len(weights)} tensors on {device}"):
                job = WriteJob(
                    source=source, plan=plan, edit=edit, folder=folder, engine=engine,
                    receiver=Journal.of(claim, source, edit, engine),
                )  # fmt: skip
                written = output.write(job)
                shutil.copyfile(recording.edit_file, folder / EDIT_FILE)
            identical = _check_outputs(recording, written, folder, found)
            manifest = structs.replace(
                recording.manifest,
                tool=TOOL,
                edited=written.edits,
                environment=environment(device),
                replay_of=recording.sha256,
            )
            manifest = write_records(source, written, folder, manifest, None)
            check_whole(recipe, folder)
    return Replayed(manifest, found, identical, _others(recording, manifest), refitted)


def _replayed_before(recording: Recording, destination: Path) -> Manifest | None:
    """The manifest of a folder that already holds a replay of this recording, whole or not."""
    manifest = made_before(destination)
    if manifest is None or (manifest.replay_of, manifest.tool) != (recording.sha256, TOOL):
        return None
    shards = recording.manifest.shards
    is_same = all(manifest.files.get(name) == file for name, file in shards.items())
    return manifest if is_same else None


def _device_like(recording: Recording, recipe: Recipe) -> str:
    """A device of the recorded kind if there is one, since other kinds sum in another order."""
    if recording.manifest.environment.device == "cpu" or not torch.cuda.is_available():
        return "cpu"
    return choose_device("auto" if recipe.device == "cpu" else recipe.device)


def _as_recorded(recording: Recording, recipe: Recipe, source: Source) -> Source:
    """The source under its recorded name, with the recorded ones of its small files."""
    recorded = recording.manifest.source
    known, base = recorded.files, base_of(recording.manifest)
    return replace(
        source,
        name=recorded.name,
        base=base,
        base_commit=recorded.commit if base == recorded.repo_id else None,
        companions=tuple(name for name in source.companions if name in known),
        extras=tuple(name for name in source.extras if name in known),
        above=tuple(path for path in source.above if path.name in known),
    )


def _check_outputs(
    recording: Recording, written: Written, folder: Path, found: Sequence[Mapping[str, str]]
) -> int:
    """Check the written files against the recorded ones, and return their number.

    Raises:
        VerificationError: naming the files that differ, and the first tensor that differs in a
            shard.
    """
    digests = {name: file.sha256 for name, file in file_list(written, {}).items()}
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
        cause = "tool, device and libraries are as recorded, so the manifest may be altered"
        if found:
            listed = (f"{d['what']} {d['found']} instead of {d['recorded']}" for d in found)
            cause = "the probable cause is " + ", ".join(listed)
        more = f"; and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
        raise VerificationError(
            "the replay gave other bytes than recorded: " + "; ".join(wrong[:NAMED]) + more,
            hint="nothing was written; " + cause,
        )
    return len(digests)


def _others(recording: Recording, manifest: Manifest) -> list[str]:
    """Generated files that differ from the recorded ones, are new, or are missing."""
    then, now = recording.manifest.files, manifest.files
    return sorted(n for n in {*then, *now} if then.get(n) != now.get(n))


def _compare_fit(
    recording: Recording, recipe: Recipe, device: str, max_angle: float, settings: Settings
) -> Refitted:
    """Fit as recorded, guard included, and compare the edits.

    Raises:
        VerificationError: the texts are not those recorded, the edits change other things, or they
            are further apart than ``max_angle``.
        ConverterError: as a conversion would.
    """
    source, plan, method = prepare(recipe)
    bench = Bench.of(recipe, source, plan, load_words(recipe.word_list), device, settings)
    if (ran := recording.manifest.forward) is not None:
        named = ran.held_out_dtype
        bench.held_out = getattr(torch, named) if named else bench.dtype
    pairs, prose = load_texts(bench)
    if others := other_texts(recording.manifest, recipe, pairs, prose, bench.words):
        raise VerificationError(
            f"not the texts of the recorded fit, by their sha256: {', '.join(others)}",
            hint="nothing was done; give the recorded ones as "
            + ", ".join("--" + name.replace("_", "-") for name in others),
        )
    edit = fit(bench, method, pairs, prose).edit
    if output_of(recipe.output).has_shards:
        edit = edit.and_patch(plan.stale)
    bench.unload()
    found = _compare_edits(recording, edit, bench)
    hint = "nothing was written; batch size, device and libraries turn weakly determined directions"
    for name, angles in found.angles.items():
        if not angles[-1] <= max_angle:
            raise VerificationError(
                f"the refitted {name} is not the recorded one", hint=hint,
                expected=f"an angle of at most {max_angle:g} degrees", found=f"{angles[-1]:.3f}",
            )  # fmt: skip
    for name, alike in found.changes.items():
        if not alike.degrees <= max_angle:
            most = 2 * sin(radians(max_angle) / 2)
            raise VerificationError(
                f"the refitted change of {name} is not the recorded one", hint=hint,
                expected=f"at most {most:.3%} of its norm, or {max_angle:g} degrees, between them",
                found=f"{alike.distance:.3%}, a cosine of {alike.cosine:.6f}",
            )  # fmt: skip
    return found


def _compare_edits(recording: Recording, fitted: Edit, bench: Bench) -> Refitted:
    """Compare the refitted edit with the recorded one, change by change.

    Raises VerificationError if they change other tensors, other files or subspaces of other ranks.
    """
    plan = bench.plan
    recorded = recording.edit(plan)
    for what, then, now in (
        ("tensors", _kinds(recorded), _kinds(fitted)),
        ("files", {**recorded.patches, **recorded.files}, {**fitted.patches, **fitted.files}),
    ):
        if wrong := sorted(name for name in {*then, *now} if then.get(name) != now.get(name)):
            raise VerificationError(
                f"the refitted edit changes other {what} than the recorded one, such as {wrong[0]}",
                hint="nothing was written; rounding can decide a rank at the edge of the budget",
            )
    weights = plan.find(recorded.tensors)
    angles: dict[str, list[float]] = {}
    changes: dict[str, Likeness] = {}
    stored = {entry.name: entry.tensors for entry in recording.manifest.edited}
    for name, delta in recorded.tensors.items():
        other = fitted.tensors[name]
        if delta.protects is None or other.protects is None:
            changes[name] = likeness(delta, other, partial(_stored, bench, weights[name]))
        elif stored[name]["U"] not in angles:
            angles[stored[name]["U"]] = principal_angles(delta.protects, other.protects).tolist()
    origins = _embedding_of(bench.source, plan, recorded)
    for name, tensor in recorded.created.items():
        origin = origins.get(name, torch.zeros(()))
        pair = (new.double() - origin for new in (tensor, fitted.created[name]))
        changes[name] = tensors_alike("created", *pair)
    return Refitted(angles, changes)


def _kinds(edit: Edit) -> dict[str, str]:
    """A description of each tensor's change; two changes can be compared if it is the same."""
    ranks = {n: "" if d.protects is None else d.protects.shape[1] for n, d in edit.tensors.items()}
    found = {n: f"{d.kind} {ranks[n]} {d.factor}" for n, d in edit.tensors.items()}
    return found | {name: f"created {list(t.shape)}" for name, t in edit.created.items()}


def _stored(bench: Bench, weight: Weight) -> Tensor:
    """W (O, I) in its stored dtype, or float32 if that is 8 bits."""
    W = bench.weight(weight)
    return W if weight.scales else W.to(weight.dtype)


def _embedding_of(source: Source, plan: Plan, edit: Edit) -> dict[str, Tensor]:
    """The tensor that a created head is made of, by the head's name; empty if no head is created.

    Two such heads are almost parallel, whatever the edits add to the embedding.
    """
    route = plan.head_route() if edit.created else None
    if route is None or route.name not in edit.created:
        return {}
    place = route.embedding
    return {route.name: source.read(place.shard, place.info).double()}
