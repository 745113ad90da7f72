"""Is an output what its manifest says? Every byte, every edit, and whether it loads."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from io import RawIOBase
from math import isclose, sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from converter.activations import cache_key
from converter.cache import sha256_of
from converter.errors import ConverterError, VerificationError
from converter.header import TensorInfo, header_of, read_exactly, read_header
from converter.layout import CARD, INDEX, SIGNATURE, read_index, read_json
from converter.manifest import MANIFEST, SUMS, hash_line, read_manifest, sums_text
from converter.plan import make_plan
from converter.recorded import check_bases, check_source_files, edited_layers, recorded_bases
from converter.report import Report
from converter.rounding import Stored, is_projection, left_along, rounding_bound
from converter.shards import find_damage
from converter.source import Source
from converter.subspace import load_bases
from converter.verify_adapter import check_adapter
from converter.writer import BUFFER

LEFT = 0.05
"""Share of what was along U that rounding toward U^T W' = 0 may leave. Where there are hundreds of
rows to choose from it leaves 1e-4 in 16 bits and 1e-3 in FP8; to nearest, FP8 leaves 0.05 to 0.15.
"""

NOISE = {"F8_E4M3": 0.03}
"""Relative error of rounding; half an epsilon unless it is here. Were it independent of U, a share
sqrt(R / D) of it would be along R of D directions: no edit is asked to leave less than that."""


def verify(
    folder: Path,
    source: Source | None = None,
    report: Report | None = None,
    trust_remote_code: bool = False,
    gone: Collection[str] = (),
) -> list[str]:
    """Check a converted checkpoint or an adapter, and against its source if one is given.

    Every file of the manifest has the recorded bytes and there are no others but a signature, which
    is looked at in ``signing``; manifest, card and SHA256SUMS agree; index, headers and config fit
    together; every edited tensor has the recorded digest and is orthogonal to its basis to
    rounding; config and tokenizer load in transformers.
    With a source, also: headers and untouched tensors are byte-identical to it, and every element
    of an edited tensor is the rounded projection of the source's. Of an adapter, see
    ``verify_adapter``.

    Shards that are ``gone``, checked before and moved elsewhere, are not looked for.

    Returns:
        what is wrong, a sentence each; empty if nothing is.
    """
    report = report or Report(quiet=True)
    try:
        manifest = read_manifest(folder)
    except VerificationError as error:
        return [str(error)]
    damaged: dict[str, str] = {}
    damaged.update(_check_files(folder, manifest, report, gone))
    problems = [f"{name}: {what}" for name, what in damaged.items()]
    damaged |= dict.fromkeys(gone, "is elsewhere")
    problems += [*_check_sums(folder, manifest), *_check_records(manifest)]
    check = CHECKS[manifest["run"].get("output", "checkpoint")]
    try:
        problems.extend(check(folder, manifest, damaged, source, report, trust_remote_code))
    except (ConverterError, OSError) as error:
        problems.append(str(error))
    return problems


def _check_checkpoint(
    folder: Path,
    manifest: Mapping[str, Any],
    damaged: Mapping[str, str],
    source: Source | None,
    report: Report,
    trust_remote_code: bool,
) -> Iterator[str]:
    """What a whole model must be, beside having its files."""
    structure = list(_check_structure(folder, manifest, damaged))
    yield from structure
    yield from _check_loading(folder, trust_remote_code)
    if not structure:
        yield from _check_edits(folder, manifest, damaged, report)
        if source:
            yield from _check_source(folder, manifest, damaged, source, report)


CHECKS = {"adapter": check_adapter, "checkpoint": _check_checkpoint}
"""Of each output."""


def _check_files(
    folder: Path, manifest: Mapping[str, Any], report: Report, gone: Collection[str]
) -> Iterator[tuple[str, str]]:
    """The files that are missing, altered or unexpected, and how."""
    files = {name: entry for name, entry in manifest["files"].items() if name not in gone}
    with report.bar("hash", sum(entry["bytes"] for entry in files.values()), "B") as bar:
        for name, entry in files.items():
            path = folder / name
            bar.set_postfix_str(name)
            if Path(name).is_absolute() or ".." in Path(name).parts:
                yield name, "lies outside the folder"
            elif not path.is_file():
                yield name, "is missing"
            elif sha256_of(path) != entry["sha256"]:
                yield name, "is not as recorded" + _damage(path, entry.get("prefixes"))
            bar.update(entry["bytes"])
    known = {*files, CARD, MANIFEST, SUMS, SIGNATURE}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        hidden = any(part.startswith(".") for part in Path(name).parts)
        if path.is_file() and name not in known and not hidden:
            yield name, "is not in the manifest"


def _damage(path: Path, prefixes: Mapping[str, str] | None) -> str:
    if prefixes is None:
        return ""
    try:
        return f": the first difference is in {find_damage(path, prefixes)}"
    except ConverterError as error:
        return f": {error}"


def _check_sums(folder: Path, manifest: Mapping[str, Any]) -> Iterator[str]:
    """The card names this manifest, and SHA256SUMS is exactly what follows from both."""
    try:
        found = (folder / SUMS).read_bytes()
        card = (folder / CARD).read_bytes().decode("utf-8", "replace")
        expected = sums_text(folder, manifest)
    except OSError as error:
        yield f"{Path(error.filename or SUMS).name}: {error.strerror}"
        return
    line = hash_line(sha256_of(folder / MANIFEST))
    start = line[: line.index(":")]
    if [text for text in card.splitlines() if text.startswith(start)] != [line]:
        yield f"{CARD} does not state the sha256 of {MANIFEST}"
    if found != expected.encode():
        known = found.decode("utf-8", "replace").splitlines()
        names = [text.split("  ", 1)[1] for text in expected.splitlines() if text not in known]
        for name in names or ["its own form"]:
            yield f"{SUMS} is wrong about {name}"


def _check_records(manifest: Mapping[str, Any]) -> Iterator[str]:
    """What the manifest says twice must agree: the cache key, and files that were only copied."""
    inputs, key = manifest["activations"]["inputs"], manifest["activations"]["key"]
    if inputs and cache_key(inputs) != key:
        yield f"{MANIFEST}: the key of the activations is not that of their inputs"
    whole = manifest["run"].get("output") != "adapter"  # which leaves most files where they are
    for name, entry in manifest["source"]["files"].items():
        ours = manifest["files"].get(name, {})
        copied = "prefixes" not in ours and (whole or ours)
        if copied and ours.get("sha256") != entry["sha256"]:
            yield f"{name}: was to be a copy of the source's and is not"


def _check_structure(
    folder: Path, manifest: Mapping[str, Any], damaged: Mapping[str, str]
) -> Iterator[str]:
    """The index, the headers and the config must describe one checkpoint."""
    shards = [name for name, entry in manifest["files"].items() if "prefixes" in entry]
    if damaged.keys() & {*shards, INDEX, "config.json"}:
        return
    weight_map = read_index(folder / INDEX) if (folder / INDEX).exists() else None
    headers = {name: read_header(folder / name) for name in shards}
    plan = make_plan(read_json(folder / "config.json"), weight_map, headers)
    targets = {target.info.name: target for target in plan.targets}
    for entry in manifest["edited"]:
        target = targets.get(entry["name"])
        found = target and (target.shard, target.layer, target.axis, target.info.shape)
        if found != (entry["shard"], entry["layer"], entry["axis"], tuple(entry["shape"])):
            yield f"tensor {entry['name']} is recorded as edited and is not that projection"
    bias = manifest["method"]["options"].get("bias") != "keep"
    expected = {t.info.name for t in plan.select(edited_layers(manifest), bias)}
    for name in sorted(expected ^ {entry["name"] for entry in manifest["edited"]}):
        yield f"tensor {name}: the method's options and the list of edited tensors disagree"


def _check_edits(
    folder: Path, manifest: Mapping[str, Any], damaged: Mapping[str, str], report: Report
) -> Iterator[str]:
    """Edited tensors: their digests, and what is left of them along their bases."""
    name = manifest["subspace"]["file"]
    if name in damaged:
        return
    bases = recorded_bases(folder, manifest)
    yield from check_bases(name, bases)
    entries = [entry for entry in manifest["edited"] if not _shards_of(entry) & damaged.keys()]
    infos = infos_of(folder, {shard for entry in entries for shard in _shards_of(entry)})
    with report.bar("check edits", len(entries), "tensor") as bar:
        for entry in entries:
            basis, rounding = bases[entry["basis"]], manifest["run"]["rounding"]
            yield from check_edit(folder, entry, basis, infos, rounding)
            bar.update()


def check_edit(
    folder: Path,
    entry: Mapping[str, Any],
    basis: Tensor,
    infos: Mapping[str, TensorInfo],
    rounding: str,
) -> Iterator[str]:
    """An edited tensor: its digest, and what is left of it along its basis.

    Args:
        folder: with its shard.
        entry: of the manifest's ``edited``.
        basis: U (D, R).
        infos: of ``infos_of``.
        rounding: of the run.
    """
    name, shard, fp8 = entry["name"], entry["shard"], entry["requantized"]
    with Stored(_opener(folder), entry, infos) as stored:
        left, units = left_along(stored, basis)
    bound = _allowed(entry, stored.dtype, units, basis, rounding)
    if stored.digests != (entry["sha256_after"], fp8 and fp8["sha256_after"]):
        yield f"{shard}: tensor {name} has another sha256 than recorded"
    if not left <= bound:
        yield (
            f"{shard}: tensor {name} is not orthogonal to "
            f"{entry['basis']}: ||U^T W|| is {left:.3e}, rounding allows {bound:.3e}"
        )


def _allowed(
    entry: Mapping[str, Any], dtype: torch.dtype, units: float, basis: Tensor, rounding: str
) -> float:
    """The largest ||U^T W'|| that rounding explains."""
    if dtype.itemsize > 2 or (dtype.itemsize == 2 and rounding == "nearest"):
        return rounding_bound(units, len(basis), entry["norm"])
    noise = NOISE.get(entry["dtype"], torch.finfo(dtype).eps / 2)
    noise *= sqrt(basis.shape[1] / basis.shape[0])
    return max(LEFT * sqrt(entry["energy_removed"]), noise) * float(entry["norm"])


def _shards_of(entry: Mapping[str, Any]) -> set[str]:
    """The files that an edited tensor and its scales are in."""
    fp8 = entry["requantized"]
    return {entry["shard"]} | ({fp8["shard"]} if fp8 else set())


def infos_of(folder: Path, shards: Iterable[str]) -> dict[str, TensorInfo]:
    """Tensor name -> entry, of some shards; each header is read once."""
    return {
        name: info for shard in shards for name, info in read_header(folder / shard).tensors.items()
    }


def _opener(folder: Path) -> Callable[[str], RawIOBase]:
    return lambda shard: (folder / shard).open("rb", buffering=0)


def _check_loading(folder: Path, trust_remote_code: bool) -> Iterator[str]:
    """Config and tokenizer load in transformers, without code of the folder unless trusted."""
    from transformers import AutoConfig, AutoTokenizer

    for kind in (AutoConfig, AutoTokenizer):
        try:
            kind.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
        except Exception as error:  # a third party's loader on files that may be damaged
            said = " ".join(str(error).split())[:200]
            yield f"{kind.__name__} cannot load the folder: {type(error).__name__}: {said}"


def _check_source(
    folder: Path,
    manifest: Mapping[str, Any],
    damaged: Mapping[str, str],
    source: Source,
    report: Report,
) -> Iterator[str]:
    """Compare with the source, tensor by tensor."""
    shards = [name for name, entry in manifest["files"].items() if "prefixes" in entry]
    if sorted(shards) != sorted(source.shards):
        yield f"the source {source.name} has other shards: {', '.join(source.shards)}"
        return
    yield from check_source_files(manifest, source)
    name = manifest["subspace"]["file"]
    bases = {} if name in damaged else load_bases(folder / name)
    edited = {entry["name"]: entry for entry in manifest["edited"]}
    fp8 = (entry["requantized"] for entry in manifest["edited"])
    scales = {entry["scales"] for entry in fp8 if entry}
    infos, rounding = infos_of(folder, shards), manifest["run"]["rounding"]
    with report.bar("compare", sum(manifest["files"][n]["bytes"] for n in shards), "B") as bar:
        for shard in shards:
            with (folder / shard).open("rb", buffering=0) as ours, source.open(shard) as theirs:
                header = header_of(theirs, shard)
                if not _same_bytes(ours, theirs, 0, header.data_start):
                    yield f"{shard}: the header differs from that of the source"
                    continue
                for info in header.tensors.values():
                    entry = edited.get(info.name)
                    if entry is None and info.name not in scales:
                        if not _same_bytes(ours, theirs, info.start, info.end):
                            yield f"{shard}: tensor {info.name} differs from that of the source"
                    elif entry and entry["basis"] in bases:
                        with (
                            Stored(source.open, entry, infos) as before,
                            Stored(_opener(folder), entry, infos) as after,
                        ):
                            basis, nearest = bases[entry["basis"]], rounding == "nearest"
                            yield from _check_projection(entry, before, after, basis, nearest)
                    bar.update(info.nbytes)


def _check_projection(
    entry: Mapping[str, Any], before: Stored, after: Stored, basis: Tensor, nearest: bool
) -> Iterator[str]:
    """An edited tensor against the one it was made from."""
    place, fp8 = f"{entry['shard']}: tensor {entry['name']}", entry["requantized"]
    fits, norm = is_projection(after, before, basis, nearest=nearest)
    if before.digests != (entry["sha256_before"], fp8 and fp8["sha256_before"]):
        yield f"{place} was another one before the edit, by its sha256"
    if not isclose(norm, entry["norm"], rel_tol=1e-4):
        yield f"{place} had another norm before the edit than recorded"
    if not fits:
        yield f"{place} is not the projection of the source's"


def _same_bytes(ours: RawIOBase, theirs: RawIOBase, start: int, end: int) -> bool:
    ours.seek(start)
    theirs.seek(start)
    while start < end:
        count = min(BUFFER, end - start)
        if read_exactly(ours, count, "our shard") != read_exactly(theirs, count, "the source's"):
            return False
        start += count
    return True
