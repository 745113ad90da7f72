"""An edited checkpoint: output shard i is a function of source shard i, the rest are copies."""

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from converter.edit import Edit, EditRecord, apply
from converter.errors import CheckpointError
from converter.formats import index_text
from converter.layout import INDEX
from converter.plan import Plan, Target
from converter.report import Report
from converter.shards import Change, ShardRecord, read_tensor, rewrite
from converter.source import Source


@dataclass(frozen=True, slots=True)
class Written:
    """What was written.

    Attributes:
        shards: file name -> digests of source and output.
        copies: file name -> sha256 and bytes of a file that was copied.
        made: the same, of a file that the source lacks.
        edits: a record for each edited tensor, in order of layer.
    """

    shards: Mapping[str, ShardRecord]
    copies: Mapping[str, tuple[str, int]]
    made: Mapping[str, tuple[str, int]]
    edits: tuple[EditRecord, ...]


def write_checkpoint(
    source: Source,
    plan: Plan,
    edit: Edit,
    targets: tuple[Target, ...],
    folder: Path,
    device: str,
    report: Report,
    keep_source: bool = True,
) -> Written:
    """Rewrite the shards one at a time, then copy the small files, index and config last.

    Args:
        source: its shards are fetched as they come, the next one while one is edited.
        plan: of that source.
        edit: what happens to ``targets``.
        targets: the tensors that must change.
        folder: an empty folder.
        device: where the edit is computed.
        report: for the progress bar.
        keep_source: if not, shards fetched from the Hub are deleted once they are edited.

    Raises:
        CheckpointError: a shard is malformed, or a target was left unchanged.
        OSError: the folder cannot be written.
    """
    records: list[EditRecord] = []
    changes: dict[str, dict[str, Change]] = {shard: {} for shard in source.shards}
    for target in targets:
        weight, scales = _changes(source, edit, target, device, records)
        changes[target.shard][target.info.name] = weight
        if target.scales:
            changes[target.scales.shard][target.scales.info.name] = scales
    shards, last_use = {}, _last_use(source, targets)
    with report.bar("edit", plan.nbytes, "B") as bar:
        for place, shard in enumerate(fetched(source)):
            bar.set_postfix_str(shard)
            with source.open(shard) as file:
                shards[shard] = rewrite(file, folder / shard, changes[shard], bar.update)
            for done in last_use[place] if not keep_source else ():
                source.drop(done)
    if len(records) != len(targets):
        raise CheckpointError(
            "not every down-projection of the chosen layers was edited",
            expected=f"{len(targets)} tensors",
            found=f"{len(records)}",
        )
    copies = {
        name: _copy(source.folder / name, folder / name)
        for name in source.companions
        if name != "config.json"
    }
    made = {}
    if source.recipes is None and source.weight_map is not None:
        copies[INDEX] = _copy(source.folder / INDEX, folder / INDEX)
    elif source.recipes is not None and source.weight_map is not None:
        (folder / INDEX).write_text(index_text(source.recipes), "utf-8")
        made[INDEX] = file_entry(folder / INDEX)
    copies["config.json"] = _copy(source.folder / "config.json", folder / "config.json")
    records.sort(key=lambda record: (record.layer, record.name))
    return Written(shards, copies, made, tuple(records))


def _last_use(source: Source, targets: tuple[Target, ...]) -> list[list[str]]:
    """The shards that are not needed any more after each one; an FP8 weight needs two of them."""
    number = {shard: place for place, shard in enumerate(source.shards)}
    last = dict(number)
    for target in targets:
        both = {target.shard, target.scales.shard if target.scales else target.shard}
        for shard in both:
            last[shard] = max(last[shard], *(number[other] for other in both))
    return [[s for s, n in last.items() if n == place] for place in range(len(source.shards))]


def fetched(source: Source) -> Iterator[str]:
    """The shards in order, each on disk; the next one is fetched while one is used."""
    with ThreadPoolExecutor(1) as pool:
        ahead = [pool.submit(source.fetch, [shard]) for shard in source.shards[:1]]
        for place, shard in enumerate(source.shards):
            current = ahead.pop()
            if place + 1 < len(source.shards):
                ahead.append(pool.submit(source.fetch, [source.shards[place + 1]]))
            current.result()
            yield shard


def _changes(
    source: Source, edit: Edit, target: Target, device: str, records: list[EditRecord]
) -> tuple[Change, Change]:
    """What becomes of a target, and of its scales if it is in FP8.

    They are two tensors of the file, in any order and even in two shards. Whichever is met first
    reads the other; if that is the scales, the edit is computed twice.
    """
    held: list[Tensor] = []

    def scale_now() -> Tensor | None:
        if target.scales is None:
            return None
        with source.open(target.scales.shard) as file:
            return read_tensor(file, target.scales.info)

    def weight(tensor: Tensor) -> Tensor:
        edited = apply(edit, target, tensor, device, scale_now())
        if edited is None:
            return tensor
        records.append(edited.record)
        if edited.scale is not None:
            held.append(edited.scale)
        return edited.tensor

    def scales(scale: Tensor) -> Tensor:
        if held:
            return held.pop()
        with source.open(target.shard) as file:
            edited = apply(edit, target, read_tensor(file, target.info), device, scale)
        return scale if edited is None or edited.scale is None else edited.scale

    return weight, scales


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
