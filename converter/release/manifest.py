"""Make, read and write manifests.

Its format is ``converter.manifest``. Everything in it but ``measurements`` is a function of the
inputs, so two runs can be compared with ``diff``. It holds no absolute path, no host name and no
user name.
"""

import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from converter.calibration.pairs import Pairs, Prose
from converter.calibration.statistics import Activations, cache_key
from converter.checkpoints.architectures.architecture import Architecture
from converter.checkpoints.names import CARD, EDIT_FILE, INDEX, MANIFEST, SUMS
from converter.checkpoints.source import Source
from converter.errors import CheckpointError
from converter.evaluation.fit import Fitted, Step
from converter.manifest import (
    SCHEMA_VERSION,
    TOOL,
    ActivationsRecord,
    ArchitectureRecord,
    EditRecord,
    Environment,
    FileRecord,
    Manifest,
    Measurements,
    MethodRecord,
    PairsRecord,
    SourceRecord,
    StepRecord,
    TextRecord,
    to_text,
)
from converter.methods.base import Method
from converter.methods.known import METHODS
from converter.methods.together import options_of
from converter.methods.workbench import Bench
from converter.outputs.base import WriteJob, Written, file_entry
from converter.outputs.known import OUTPUTS
from converter.release.reading import read_manifest as read_manifest
from converter.release.reading import read_manifest_bytes as read_manifest_bytes
from converter.runtime import progress

_LIBRARIES = ("huggingface-hub", "numpy", "safetensors", "tokenizers", "torch", "transformers")


def make_manifest(
    bench: Bench,
    method: Method,
    pairs: Pairs,
    prose: Prose,
    fitted: Fitted,
    written: Written,
    read: dict[str, FileRecord],
) -> Manifest:
    """The manifest of a conversion, without evaluation, gates and ``files``."""
    recipe, source, words = bench.recipe, bench.source, bench.words
    repo, seen, taught = source.repo, fitted.activations, bench.taught
    originals = source.original_files()
    ran = bench.has_run or recipe.activations is None  # or ran in an earlier run
    several = len(fitted.steps) > 1
    measured = fitted.guard is not None or any(step.choice.automatic for step in fitted.steps)
    differs = measured and bench.held_out != bench.dtype
    other = str(bench.held_out).removeprefix("torch.") if differs else None
    return Manifest(
        schema_version=SCHEMA_VERSION,
        tool=TOOL,
        run=recipe.record(),
        source=SourceRecord(
            name=source.name,
            repo_id=repo.repo_id if repo else None,
            revision=repo.revision if repo else None,
            commit=repo.commit if repo else None,
            files=read,
            originals=originals,
            extras=source.extras if written.shards else (),
            left_out=source.left_out if written.shards else (),
            versions={n: v for n, v in source.versions.items() if n in read or n in originals},
        ),
        architecture=architecture_record(bench.plan.architecture),
        method=_method_record(recipe.method, method, {} if several else fitted.steps[0].evidence),
        pairs=PairsRecord(
            origin=pairs.origin,
            sha256=pairs.sha256,
            count=len(seen.toxic[min(seen.toxic)] if seen else fitted.parts.fit.pairs.pairs),
            skipped={reason: len(rows) for reason, rows in pairs.skipped.items()},
            drawn=pairs.drawn,
        ),
        neutral=TextRecord(origin=prose.origin, sha256=prose.sha256),
        word_list=TextRecord(origin=words.origin, sha256=words.sha256),
        instances=TextRecord(origin=taught.origin, sha256=taught.sha256) if taught else None,
        prompts=fitted.prompts.record() if fitted.prompts else None,
        split=fitted.parts.record(),
        activations=_activations_record(seen.inputs) if seen else None,
        edit=EditRecord(
            file=EDIT_FILE,
            rank=fitted.edit.rank,
            created=written.created,
            patches={
                n: p if isinstance(p, str) else dict(p) for n, p in fitted.edit.patches.items()
            },
            files=tuple(fitted.edit.files),
        ),
        choice=fitted.choice,
        guard=fitted.guard,
        output_package=OUTPUTS.package(recipe.output),
        edited=written.edits,
        environment=environment(bench.device),
        forward=bench.forward.record(other) if ran else None,
        evaluation=None,
        gates=(),
        files={},
        measurements=measurements(),
        steps=tuple(map(_step_record, fitted.steps)) if several else (),
    )


def _method_record(name: str, method: Method, evidence: Mapping[str, Any]) -> MethodRecord:
    """The manifest's record of a method, or of several together."""
    return MethodRecord(
        name=name,
        title=method.title,
        paper=method.paper,
        options=options_of(method),
        package=METHODS.package(name),
        strength=method.strength,
        evidence=dict(evidence),
    )


def _step_record(step: Step) -> StepRecord:
    """The record of one of several."""
    return StepRecord(
        method=_method_record(step.name, step.method, step.evidence),
        choice=step.choice,
        activations=_activations_record(step.activations.inputs) if step.activations else None,
    )


def architecture_record(architecture: Architecture) -> ArchitectureRecord:
    """How a model was described, for the manifest."""
    proof, sizes = architecture.proof, architecture.sizes
    assert proof is not None
    return ArchitectureRecord(
        name=architecture.title,
        described_by=proof.described_by,
        transformers=proof.transformers,
        layers_without_ffn=sizes.without_ffn,
        left_alone=architecture.left_alone,
        proved_layers=proof.layers,
        proved_tensors=proof.tensors,
        tolerance=proof.tolerance,
    )


def files_read(job: WriteJob, written: Written) -> dict[str, FileRecord]:
    """The records of the source's files, except those in another format.

    Shards that were not read as a whole have a remembered digest. It is looked up only now, after
    the reading, so that a change meanwhile shows in their times.
    """
    source = job.source
    if written.shards:
        shards = {} if source.originals else written.shards
        read = {
            name: FileRecord(sha256=record.source_sha256, nbytes=record.nbytes)
            for name, record in shards.items()
        }
    else:
        sizes = {shard: header.size for shard, header in job.plan.headers.items()}
        originals = {path.name for path in source.originals}
        read = {
            name: FileRecord(
                sha256=digest, nbytes=sizes.get(name) or (source.folder / name).stat().st_size
            )
            for name, digest in source.digests().items()
            if name not in originals
        }
    changed = {name: source.small[name] for name in job.edit.patches}
    if written.created and source.weight_map is not None and source.virtual_shards is None:
        changed[INDEX] = source.folder / INDEX
    return read | {name: file_entry(path) for name, path in changed.items()} | dict(written.copies)


def check_unchanged(source: Source, read: Mapping[str, FileRecord], seen: Activations) -> None:
    """Check that the edited shards are those from which the activations were taken.

    Raises:
        CheckpointError: naming a shard that differs.
    """
    known: Mapping[str, str] = seen.inputs.get("files", {})
    found = {name: read[name] for name in source.shards if name in read}
    if source.originals:
        found = source.original_files()
    if not set(found) <= set(known):
        progress.warn("the activations do not say which weights they are from; this is not checked")
        return
    for name, file in found.items():
        if file.sha256 != known[name]:
            raise CheckpointError(
                f"{name} is not the file that the activations were taken from",
                expected=f"sha256 {known[name][:16]}...",
                found=f"{file.sha256[:16]}...",
                hint="it changed during the run, or --activations is of another model",
            )


def _activations_record(inputs: Mapping[str, Any]) -> ActivationsRecord:
    """The manifest's record of activations with these inputs, if they are known."""
    return ActivationsRecord(key=cache_key(inputs) if inputs else None, inputs=dict(inputs))


def environment(device: str) -> Environment:
    """What may affect the result besides the inputs."""
    return Environment(
        device=torch.cuda.get_device_name(device) if device != "cpu" else "cpu",
        platform=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        libraries={name: version(name) for name in _LIBRARIES},
    )


def file_list(written: Written, others: Mapping[str, FileRecord]) -> dict[str, FileRecord]:
    """The output files, shards first."""
    shards = {
        written.renamed.get(name, name): FileRecord(
            sha256=shard.sha256,
            nbytes=shard.nbytes,
            source=name if name in written.renamed else None,
            prefixes=shard.prefixes,
        )
        for name, shard in written.shards.items()
    }
    small = {**written.copies, **written.made, **others}
    return {**shards, **written.extra, **dict(sorted(small.items()))}


def measurements() -> Measurements:
    """Seconds and memory up to now."""
    told = progress.current()
    return Measurements(
        seconds={name: round(seconds, 3) for name, seconds in told.seconds.items()},
        memory_bytes=dict(told.memory),
        peak_memory_bytes=max((progress.peak_memory(), *told.memory.values())),
    )


def write_manifest(folder: Path, manifest: Manifest) -> str:
    """Write the manifest; its sha256, which the card states."""
    (folder / MANIFEST).write_text(to_text(manifest), "utf-8")
    return file_entry(folder / MANIFEST).sha256


def seal(folder: Path, manifest: Manifest, card: str) -> None:
    """Write the card, which has the ``hash_line`` of the manifest, and ``SHA256SUMS`` of all files.

    The folder has everything else.
    """
    (folder / CARD).write_text(card, "utf-8")
    own = {name: file_entry(folder / name).sha256 for name in (CARD, MANIFEST)}
    (folder / SUMS).write_text(sums_text(manifest.digests | own), "utf-8")
    file_entry(folder / SUMS)


def hash_line(digest: str) -> str:
    """The line of the card that names its manifest, by sha256."""
    return f"sha256 of `{MANIFEST}`: `{digest}`"


def sums_text(digests: Mapping[str, str]) -> str:
    """The exact text of SHA256SUMS, in the format of sha256sum; ``digests`` is file -> sha256."""
    return "".join(f"{digests[name]}  {name}\n" for name in sorted(digests))
