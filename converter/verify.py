"""Is an output what its manifest says? Every byte, every edit, and whether it loads."""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from converter.activations import cache_key
from converter.cache import sha256_of
from converter.errors import ConverterError, VerificationError
from converter.header import read_header
from converter.layout import CARD, INDEX, MANIFEST, SUMS, UNLISTED, read_index, read_json
from converter.manifest import hash_line, read_manifest, sums_text
from converter.plain import shown
from converter.plan import make_plan
from converter.recorded import edited_layers
from converter.report import Report
from converter.shards import find_damage
from converter.source import Source
from converter.verify_adapter import check_adapter
from converter.verify_tensors import check_edits, check_source


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
        yield from check_edits(folder, manifest, damaged, report)
        if source:
            yield from check_source(folder, manifest, damaged, source, report)


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
            bar.set_postfix_str(shown(name))
            if Path(name).is_absolute() or ".." in Path(name).parts:
                yield name, "lies outside the folder"
            elif not path.is_file():
                yield name, "is missing"
            elif sha256_of(path) != entry["sha256"]:
                yield name, "is not as recorded" + _damage(path, entry.get("prefixes"))
            bar.update(entry["bytes"])
    known = {*files, *UNLISTED}
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


def _check_loading(folder: Path, trust_remote_code: bool) -> Iterator[str]:
    """Config and tokenizer load in transformers, without code of the folder unless trusted."""
    from transformers import AutoConfig, AutoTokenizer

    for kind in (AutoConfig, AutoTokenizer):
        try:
            kind.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
        except Exception as error:  # a third party's loader on files that may be damaged
            said = " ".join(str(error).split())[:200]
            yield f"{kind.__name__} cannot load the folder: {type(error).__name__}: {said}"
