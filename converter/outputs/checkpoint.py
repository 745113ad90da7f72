"""An edited checkpoint: output shard i is a function of source shard i, the rest are copies."""

import hashlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from converter.edit import Edit, EditRecord, apply
from converter.errors import CheckpointError
from converter.plan import Plan, Target
from converter.report import Report
from converter.shards import Change, ShardRecord, rewrite
from converter.source import INDEX, Source


@dataclass(frozen=True, slots=True)
class Written:
    """What was written.

    Attributes:
        shards: file name -> digests of source and output.
        copies: file name -> sha256 and bytes of a file that was copied.
        edits: a record for each edited tensor, in order of layer.
    """

    shards: Mapping[str, ShardRecord]
    copies: Mapping[str, tuple[str, int]]
    edits: tuple[EditRecord, ...]


def write_checkpoint(
    source: Source,
    plan: Plan,
    edit: Edit,
    targets: tuple[Target, ...],
    folder: Path,
    device: str,
    report: Report,
) -> Written:
    """Rewrite the shards one at a time, then copy the small files, index and config last.

    Args:
        source: a fetched source.
        plan: of that source.
        edit: what happens to ``targets``.
        targets: the tensors that must change.
        folder: an empty folder.
        device: where the edit is computed.
        report: for the progress bar.

    Raises:
        CheckpointError: a shard is malformed, or a target was left unchanged.
        OSError: the folder cannot be written.
    """
    records: list[EditRecord] = []
    changes: dict[str, dict[str, Change]] = {shard: {} for shard in source.shards}
    for target in targets:
        changes[target.shard][target.info.name] = _change(edit, target, device, records)
    shards = {}
    with report.bar("edit", plan.nbytes, "B") as bar:
        for shard in source.shards:
            bar.set_postfix_str(shard)
            shards[shard] = rewrite(
                source.folder / shard, folder / shard, changes[shard], bar.update
            )
    if len(records) != len(targets):
        raise CheckpointError(
            "not every down-projection of the chosen layers was edited",
            expected=f"{len(targets)} tensors",
            found=f"{len(records)}",
        )
    names = [name for name in source.companions if name != "config.json"]
    names += [INDEX] * (source.weight_map is not None) + ["config.json"]
    copies = {name: _copy(source.folder / name, folder / name) for name in names}
    records.sort(key=lambda record: (record.layer, record.name))
    return Written(shards, copies, tuple(records))


def _change(edit: Edit, target: Target, device: str, records: list[EditRecord]) -> Change:
    def change(tensor: Tensor) -> Tensor:
        new, record = apply(edit, target, tensor, device)
        if record is not None:
            records.append(record)
        return new

    return change


def _copy(source: Path, target: Path) -> tuple[str, int]:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        reading = source.open("rb")
    except OSError as error:
        raise CheckpointError(f"{source.name} cannot be read", found=error.strerror) from error
    with reading, target.open("xb") as writing:
        shutil.copyfileobj(reading, writing)
    return file_entry(target)


def file_entry(path: Path) -> tuple[str, int]:
    """Flush a file to disk; its sha256 and size."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return digest, file.tell()
