"""Do a recorded conversion again, and say whether the same bytes come out.

The recorded subspace is taken out of the recorded source: nothing is fitted, run or measured, so
what was measured then is kept. A refit repeats the whole fit to compare the subspaces, and then
writes with the recorded one all the same: its bytes are what can be compared.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from converter import __version__
from converter.checkpoints.names import MANIFEST
from converter.checkpoints.plan import make_plan
from converter.checkpoints.resolve import resolve
from converter.checkpoints.safetensors.rewrite import find_damage
from converter.checkpoints.source import Source
from converter.edits.engine import Engine
from converter.edits.subspace_file import SUBSPACE_FILE
from converter.entrypoints.convert import check_whole, inputs_of, no_pictures, write_records
from converter.entrypoints.refit import compare_fit
from converter.entrypoints.resume import settle
from converter.errors import VerificationError
from converter.models.resident import choose_device
from converter.outputs.base import OUTPUTS
from converter.outputs.checkpoint.write import Written
from converter.outputs.destination import check_destination
from converter.outputs.staging.claim import claimed, interrupted
from converter.outputs.staging.journal import Journal
from converter.recipe import Run
from converter.release.manifest import edited, environment, read_manifest
from converter.release.recording import NAMED, Given, Recording, check_source, differences, run_of
from converter.runtime import progress

MAX_ANGLE = 1.0
"""Degrees between a refitted subspace and the recorded one that are not held against it: other
batch sizes, threads and devices add in another order. The same machine gives the same subspace."""


@dataclass(frozen=True, slots=True)
class Replayed:
    """What a replay found.

    Attributes:
        manifest: that was written.
        differences: of tool, device and libraries, ``what``, ``recorded`` and ``found`` each.
        identical: files with the recorded bytes.
        other: names of generated files, such as the card, that have other bytes than recorded.
        angles: basis -> degrees between the refitted and the recorded one, ascending; None without
            a refit.
    """

    manifest: dict[str, Any]
    differences: list[dict[str, str]]
    identical: int
    other: list[str]
    angles: dict[str, list[float]] | None


@progress.recording()
def replay(
    recording: Recording,
    destination: Path,
    given: Given | None = None,
    *,
    refit: bool = False,
    max_angle: float = MAX_ANGLE,
    overwrite: bool = False,
    workers: int = 0,
    memory_limit: int | None = None,
) -> Replayed:
    """Write a recorded checkpoint once more.

    Args:
        recording: of the conversion.
        destination: a folder that does not exist or is empty.
        given: where local inputs are.
        refit: fit the subspace again, too, and compare.
        max_angle: degrees that it may be off.
        overwrite, workers, memory_limit: as for ``convert``.

    Raises:
        VerificationError: the source, the outputs or the refitted subspace differ.
        ConverterError: another of its children; the destination is as it was.
    """
    run = run_of(recording, given or Given(), refit=refit)
    device = device_like(recording, run)
    found = differences(recording, device)
    for entry in found:
        progress.warn(f"{entry['what']} is {entry['found']} here, recorded is {entry['recorded']}")
    with progress.stage("plan", f"comparing {run.source} with the source of {recording.path.name}"):
        source = as_recorded(recording, run, resolve(run.source, run.subfolder))
        check_source(recording, source)
        plan = make_plan(source.config, source.weight_map, source.headers())
        edit, targets = recording.edit(plan)
    if not (overwrite or refit) and (before := replayed_before(recording, destination)):
        settle(run, destination, before, None)
        other = others(recording, before)
        identical = len(before["files"].keys() - {SUBSPACE_FILE, *other})
        return Replayed(before, found, identical, other, None)
    inputs = [*inputs_of(run, source), recording.path, recording.subspace]
    output, rank = OUTPUTS[run.output], recording.manifest["subspace"]["rank"]
    check_destination(destination, overwrite, inputs, output.nbytes(plan, targets, rank))
    engine = Engine(workers, memory_limit, device, run.rounding)
    engine.workers_for(output.at_a_time(source), targets, rank)
    angles = None
    with claimed(destination, overwrite) as claim:
        if refit:
            angles = compare_fit(recording, run, device, max_angle, memory_limit)
        journal = Journal.of(claim, source, edit, targets, engine)
        with claim.staged(overwrite) as folder:
            with progress.stage("edit", f"editing {len(targets)} tensors on {device}"):
                written = output.write(
                    source, plan, edit, targets, folder, engine, receiver=journal
                )
                shutil.copyfile(recording.subspace, folder / SUBSPACE_FILE)
            identical = check_outputs(recording, written, folder, found)
            manifest = replayed_manifest(recording, written, device)
            write_records(source, written, folder, manifest, no_pictures)
            check_whole(run, folder)
    return Replayed(manifest, found, identical, others(recording, manifest), angles)


def replayed_before(recording: Recording, destination: Path) -> dict[str, Any] | None:
    """The manifest of a folder that holds a replay of this recording already; whole or not."""
    if not (destination / MANIFEST).is_file() or interrupted(destination.resolve()):
        return None
    try:
        manifest = read_manifest(destination)
    except VerificationError:
        return None
    then, now = recording.manifest["files"], manifest["files"]
    same = (
        manifest.get("replay_of") == recording.sha256
        and manifest["tool"]["version"] == __version__
        and all(now.get(name) == entry for name, entry in then.items() if "prefixes" in entry)
    )
    return manifest if same else None


def device_like(recording: Recording, run: Run) -> str:
    """A device of the recorded kind if there is one: other kinds add in another order."""
    if recording.manifest["environment"]["device"] == "cpu" or not torch.cuda.is_available():
        return "cpu"
    return choose_device("auto" if run.device == "cpu" else run.device)


def as_recorded(recording: Recording, run: Run, source: Source) -> Source:
    """The source under its recorded name, and of its small files those that were there then."""
    recorded = recording.manifest["source"]
    known, base = recorded["files"], run.base_model or recorded["repo_id"] or source.base
    return replace(
        source,
        name=recorded["name"],
        base=base,
        base_commit=recorded["commit"] if base == recorded["repo_id"] else None,
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
    digests = {name: record.sha256 for name, record in written.shards.items()}
    digests |= {name: sha256 for name, (sha256, _) in {**written.copies, **written.made}.items()}
    recorded, wrong = recording.manifest["files"], []
    for name in sorted({*digests, *(n for n, entry in recorded.items() if "prefixes" in entry)}):
        entry = recorded.get(name, {})
        if name not in digests:
            wrong.append(f"{name} is not there")
        elif digests[name] != entry.get("sha256"):
            prefixes = entry.get("prefixes")
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


def replayed_manifest(recording: Recording, written: Written, device: str) -> dict[str, Any]:
    """The recorded manifest with what was done now, but without ``files``."""
    return recording.manifest | {
        "tool": {"name": "gloss-convert", "version": __version__},
        "replay_of": recording.sha256,
        "edited": edited(written, recording.basis_name),
        "environment": environment(device),
    }


def others(recording: Recording, manifest: Mapping[str, Any]) -> list[str]:
    """Generated files that are not as recorded, or were not there, or are not any more."""
    then, now = recording.manifest["files"], manifest["files"]
    return sorted(n for n in {*then, *now} if then.get(n) != now.get(n))
