"""What was read, by content, and whether it is what the fit has seen."""

from collections.abc import Mapping

from converter.calibration.statistics import Activations
from converter.checkpoints.names import INDEX
from converter.checkpoints.source import Source
from converter.errors import CheckpointError
from converter.manifest import FileRecord
from converter.outputs.base import WriteJob, Written, file_entry
from converter.runtime import progress


def files_read(job: WriteJob, written: Written) -> dict[str, FileRecord]:
    """The records of the source's files, but for those in another format.

    Shards that were not read from beginning to end have the digest that is remembered, asked for
    now that they were read, so that a change meanwhile shows in their times.
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
    """The shards that were edited must be those that the activations were taken from.

    Raises:
        CheckpointError: naming a shard that is not.
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
