"""Verify an output against its manifest: every byte, every edit, and whether it loads."""

from collections.abc import Collection, Iterator, Mapping
from functools import partial
from pathlib import Path

from torch import Tensor

from converter.checkpoints.architectures.kind import allow_own_code
from converter.checkpoints.architectures.library import read_config
from converter.checkpoints.fusing import is_fused, target_config
from converter.checkpoints.layout import read_json
from converter.checkpoints.names import INDEX, MANIFEST
from converter.checkpoints.plan import Plan, read_plan
from converter.checkpoints.safetensors.header import TensorInfo
from converter.checkpoints.safetensors.rewrite import read_tensor
from converter.checkpoints.source import Source
from converter.checkpoints.weights import Weight
from converter.edits.base import Edit
from converter.edits.deltas import AddBits
from converter.edits.storage import read_weight
from converter.errors import ConverterError, OptionError, VerificationError
from converter.manifest import Manifest
from converter.models.loading import load_tokenizer
from converter.outputs.base import output_of
from converter.outputs.checkpoint.verify import plan_of
from converter.outputs.readers import check_readers
from converter.outputs.record_checks import edit_of, recorded_edit
from converter.release.evidence import EvidenceCheck, unchecked_parts
from converter.release.manifest import read_manifest_bytes
from converter.release.verify import (
    check_architecture,
    check_files,
    check_kept,
    check_method,
    check_records,
    check_sums,
)


def verify(
    folder: Path,
    source: Source | None = None,
    trust_remote_code: bool = False,
    gone: Collection[str] = (),
    seen: dict[str, str] | None = None,
    unchecked: dict[str, str] | None = None,
) -> list[str]:
    """Check a converted checkpoint or an adapter, also against its source if one is given.

    Every file of the manifest has the recorded bytes and there are no others but a signature, which
    is looked at in ``signing``; manifest, card and SHA256SUMS agree, and so does what the manifest
    says twice; index, headers and config fit together; every edited tensor has the recorded digest
    and norms and, where a subspace was taken out, is orthogonal to it to rounding; config and
    tokenizer load in transformers. With a source, also: headers and untouched tensors are
    byte-identical to it, every element of an edited tensor is that of the recorded edit, rounded,
    patched files and the index are the source's with the recorded change, and no file of it is
    missing. Of an adapter, see ``outputs.adapter.verify``.

    Args:
        folder: of the output; nothing may write to it meanwhile.
        source: the model that it was made from.
        trust_remote_code: whether code in the folder may run, to load config and tokenizer; it runs
            last, and only if nothing was found to be wrong.
        gone: names of shards that were checked before and are no longer in the folder.
        seen: gets the sha256 of files that no manifest lists, as read.
        unchecked: gets place in the manifest -> description, for records that this check cannot
            prove.

    Returns:
        what is wrong, a sentence each; empty if nothing is.
    """
    try:
        manifest, digest = read_manifest_bytes(folder)
        damaged, false = check_files(folder, manifest, gone)
    except (VerificationError, OSError) as error:
        return [str(error)]
    try:
        output = output_of(manifest.run.output)
    except OptionError as error:
        brought = manifest.output_package or "this program"
        return [f"{MANIFEST}: the output was written by {brought}: {error}"]
    problems = [f"{name}: {what}" for name, what in damaged.items()] + false
    damaged |= dict.fromkeys(gone, "is elsewhere")
    problems += check_sums(folder, manifest, digest, {} if seen is None else seen)
    problems += check_records(manifest, output)
    trusted = trust_remote_code and not problems
    allow_own_code(trusted)
    try:
        problems.extend(output.verify(folder, manifest, damaged, source))
        problems.extend(check_readers(folder, manifest, output, damaged))
        word: dict[str, str] = {} if unchecked is None else unchecked
        word |= unchecked_parts(manifest)
        problems.extend(_check_method(folder, manifest, damaged, source, output.implied, word))
        if "config.json" in manifest.files:
            problems.extend(_check_loading(folder, trusted and not problems))
    except (ConverterError, OSError) as error:
        problems.append(str(error))
    return problems


def _check_method(
    folder: Path,
    manifest: Manifest,
    damaged: Mapping[str, str],
    source: Source | None,
    implied: Mapping[str, str],
    unchecked: dict[str, str],
) -> Iterator[str]:
    """The record of the method; its options depend on the sizes of the model."""
    unchecked["method"] = "what the method says of itself"  # replaced once it is known
    if manifest.edit.file in damaged:
        return
    stored = recorded_edit(folder, manifest)
    yield from check_kept(manifest, stored)
    if damaged.keys() & {"config.json", INDEX, *manifest.shards}:
        return
    if manifest.shards:
        plan = plan_of(folder, manifest, edited=False)
    elif source:
        plan = read_plan(source)
    else:
        return
    yield from check_architecture(manifest, plan)
    edit = edit_of(manifest, stored)
    before = partial(_before, folder, edit, (source, read_plan(source)) if source else None)
    weight = before if manifest.shards or source else None
    evidence = EvidenceCheck(manifest, plan, edit, stored, weight)
    yield from check_method(manifest, plan, implied, evidence)
    if evidence.done:
        del unchecked["method"]
        unchecked |= evidence.unchecked


def _before(folder: Path, edit: Edit, source: tuple[Source, Plan] | None, weight: Weight) -> Tensor:
    """W (O, I) float32 of a weight before the edit: from the source, or by undoing the edit.

    Undoing is exact up to the rounding of the stored weight, and impossible if a subspace was
    removed.
    """

    def read(shard: str, info: TensorInfo) -> Tensor:
        if source:
            original, plan = source
            return original.read(*plan.names.tensors[info.name])
        with (folder / shard).open("rb", buffering=0) as file:
            return read_tensor(file, info)

    W = read_weight(read, weight)
    if source:
        return W
    delta = edit.tensors.get(weight.info.name)
    if delta is None:
        return W
    if isinstance(delta, AddBits):
        rows, columns = (slice(0, size) for size in W.shape)
        undone: Tensor = delta.undone(W.to(weight.dtype), rows, columns).float()
        return undone
    return 2 * W - delta.whole(W)


def _check_loading(folder: Path, trust_remote_code: bool) -> Iterator[str]:
    """Load config and tokenizer in transformers; code of the folder runs only if it is trusted."""
    from transformers import AutoConfig, AutoTokenizer

    config = read_json(folder / "config.json")
    if is_fused(config) and not trust_remote_code:  # its class is code that the user does not trust
        read = read_config(target_config(config), None, False)
        load_tokenizer(folder, config=read)
        return
    for kind in (AutoConfig, AutoTokenizer):
        try:
            kind.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
        except Exception as error:  # a third party's loader on files that may be damaged
            said = " ".join(str(error).split())[:200]
            yield f"{kind.__name__} cannot load the folder: {type(error).__name__}: {said}"
