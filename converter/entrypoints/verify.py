"""Is an output what its manifest says? Every byte, every edit, and whether it loads."""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from converter.checkpoints.layout import read_index, read_json
from converter.checkpoints.names import INDEX
from converter.checkpoints.plan import make_plan
from converter.checkpoints.safetensors.header import read_header
from converter.checkpoints.source import Source
from converter.checkpoints.weights import Weight
from converter.errors import ConverterError, VerificationError
from converter.outputs.adapter.verify import check_adapter
from converter.outputs.adapter.write import Adapter
from converter.outputs.checkpoint.verify import check_edits, check_source
from converter.outputs.record_checks import edited_layers
from converter.release.manifest import read_manifest_bytes
from converter.release.verify_files import check_files, check_sums
from converter.release.verify_records import check_options, check_records


def verify(
    folder: Path,
    source: Source | None = None,
    trust_remote_code: bool = False,
    gone: Collection[str] = (),
    seen: dict[str, str] | None = None,
) -> list[str]:
    """Check a converted checkpoint or an adapter, and against its source if one is given.

    Every file of the manifest has the recorded bytes and there are no others but a signature, which
    is looked at in ``signing``; manifest, card and SHA256SUMS agree, and so does what the manifest
    says twice; index, headers and config fit together; every edited tensor has the recorded digest
    and norms and is orthogonal to its basis to rounding; config and tokenizer load in transformers.
    With a source, also: headers and untouched tensors are byte-identical to it, every element of an
    edited tensor is the rounded projection of the source's, and no file of it is missing. Of an
    adapter, see ``verify_adapter``.

    Shards that are ``gone``, checked before and moved elsewhere, are not looked for. Code of the
    folder runs last, and only if nothing was found to be wrong.

    Args:
        folder: that nothing else writes to meanwhile.
        source: that it was made from.
        trust_remote_code: whether code in the folder may run, to load config and tokenizer.
        gone: names of shards.
        seen: gets the sha256 of the files that no manifest lists, as they were read.

    Returns:
        what is wrong, a sentence each; empty if nothing is.
    """
    try:
        manifest, digest = read_manifest_bytes(folder)
        damaged, false = check_files(folder, manifest, gone)
    except (VerificationError, OSError) as error:
        return [str(error)]
    problems = [f"{name}: {what}" for name, what in damaged.items()] + false
    damaged |= dict.fromkeys(gone, "is elsewhere")
    problems += check_sums(folder, manifest, digest, {} if seen is None else seen)
    problems += check_records(manifest)
    check = CHECKS[manifest["run"].get("output", "checkpoint")]
    try:
        problems.extend(check(folder, manifest, damaged, source))
        if "config.json" in manifest["files"]:
            problems.extend(_check_loading(folder, trust_remote_code and not problems))
    except (ConverterError, OSError) as error:
        problems.append(str(error))
    return problems


def _check_checkpoint(
    folder: Path,
    manifest: Mapping[str, Any],
    damaged: Mapping[str, str],
    source: Source | None,
) -> Iterator[str]:
    """What a whole model must be, beside having its files."""
    structure = list(_check_structure(folder, manifest, damaged))
    yield from structure
    if not structure:
        yield from check_edits(folder, manifest, damaged)
        if source:
            yield from check_source(folder, manifest, damaged, source)


def _check_adapter(
    folder: Path,
    manifest: Mapping[str, Any],
    damaged: Mapping[str, str],
    source: Source | None,
) -> Iterator[str]:
    """What an adapter must be; its options depend on the sizes of its base, which a source has."""
    yield from check_adapter(folder, manifest, damaged, source)
    if source:
        plan = make_plan(source.config, source.weight_map, source.headers())
        yield from check_options(manifest, plan, Adapter.implied)


CHECKS = {"adapter": _check_adapter, "checkpoint": _check_checkpoint}
"""Of each output."""


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
    yield from check_options(manifest, plan)
    targets = {target.info.name: target for target in plan.targets}
    for entry in manifest["edited"]:
        target = targets.get(entry["name"])
        if target is None or _place_of(target) != _recorded_place(entry):
            yield f"tensor {entry['name']} is recorded as edited and is not that projection"
    layers = edited_layers(manifest)
    expected = {weight.info.name for weight in plan.weights("down_proj", layers)}
    if manifest["method"]["options"].get("bias") != "keep":
        expected |= {bias.info.name for bias in plan.biases("down_proj", layers)}
    for name in sorted(expected ^ {entry["name"] for entry in manifest["edited"]}):
        yield f"tensor {name}: the method's options and the list of edited tensors disagree"


def _place_of(target: Weight) -> tuple[Any, ...]:
    """What a plan says of a tensor to be edited; of FP8 also where its scales are."""
    info, scales = target.info, target.scales
    place = (target.shard, target.layer, target.axis, target.recorded_role, info.shape, info.dtype)
    return (*place, scales and (scales.info.name, scales.shard, tuple(scales.block)))


def _recorded_place(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    """The same as a manifest says."""
    fp8 = entry["requantized"]
    place = (*(entry[key] for key in ("shard", "layer", "axis", "role")), tuple(entry["shape"]))
    return (*place, entry["dtype"], fp8 and (fp8["scales"], fp8["shard"], tuple(fp8["block"])))


def _check_loading(folder: Path, trust_remote_code: bool) -> Iterator[str]:
    """Config and tokenizer load in transformers, without code of the folder unless trusted."""
    from transformers import AutoConfig, AutoTokenizer

    for kind in (AutoConfig, AutoTokenizer):
        try:
            kind.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
        except Exception as error:  # a third party's loader on files that may be damaged
            said = " ".join(str(error).split())[:200]
            yield f"{kind.__name__} cannot load the folder: {type(error).__name__}: {said}"
