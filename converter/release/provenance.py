"""What was read, by content, and whether it is what the fit has seen."""

from collections.abc import Mapping

from converter.calibration.statistics import Activations
from converter.checkpoints.plan import Plan
from converter.checkpoints.source import Source
from converter.errors import CheckpointError
from converter.outputs.checkpoint.write import Written
from converter.runtime import progress


def files_read(source: Source, plan: Plan, written: Written) -> dict[str, tuple[str, int]]:
    """sha256 and bytes of the source's files, but for those in another format.

    Shards that were not read from beginning to end have the digest that is remembered, asked for
    now that they were read, so that a change meanwhile shows in their times.
    """
    if written.shards:
        shards = {} if source.originals else written.shards
        read = {name: (record.source_sha256, record.nbytes) for name, record in shards.items()}
    else:
        sizes = {shard: header.size for shard, header in plan.headers.items()}
        originals = {path.name for path in source.originals}
        read = {
            name: (digest, sizes.get(name) or (source.folder / name).stat().st_size)
            for name, digest in source.digests().items()
            if name not in originals
        }
    return read | dict(written.copies)


def check_unchanged(source: Source, read: Mapping[str, tuple[str, int]], seen: Activations) -> None:
    """The shards that were edited must be those that the activations were taken from.

    Raises:
        CheckpointError: naming a shard that is not.
    """
    known: Mapping[str, str] = seen.inputs.get("files", {})
    found = {name: read[name][0] for name in source.shards if name in read}
    if source.originals:
        found = {n: entry["sha256"] for n, entry in source.original_files().items()}
    if not set(found) <= set(known):
        progress.warn("the activations do not say which weights they are from; this is not checked")
        return
    for name, digest in found.items():
        if digest != known[name]:
            raise CheckpointError(
                f"{name} is not the file that the activations were taken from",
                expected=f"sha256 {known[name][:16]}...",
                found=f"{digest[:16]}...",
                hint="it changed during the run, or --activations is of another model",
            )
