"""Additions of an edit to a checkpoint: new tensors, changed small files, new files.

Tensors go into a shard of their own, so that the source's shards keep their bytes. A single file
``model.safetensors`` becomes the first of two shards, under another name: loaders that find a file
of that name ignore the index, and would miss the new tensors.
"""

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from msgspec.structs import replace
from safetensors.torch import save

from converter.checkpoints.chat_template import is_template_file
from converter.checkpoints.formats.virtual import index_text
from converter.checkpoints.names import INDEX, OURS, SINGLE
from converter.checkpoints.patch import merge, patched
from converter.checkpoints.plan import Plan, make_plan
from converter.checkpoints.safetensors.header import FLOATS, MAX_NAME, read_header
from converter.checkpoints.safetensors.rewrite import digests_of
from converter.checkpoints.source import Source
from converter.edits.base import Edit, Patch
from converter.edits.fused import fusion_of
from converter.errors import CheckpointError
from converter.manifest import CreatedTensor, FileRecord
from converter.outputs.base import file_entry, sha256_of_tensor
from converter.outputs.record_checks import is_addable

_EXTRA = "model-created.safetensors"
"""The shard of created tensors beside those of the source."""

_FIRST, _SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
"""Names of the two shards for a single file and its created tensors."""

_RESERVED = (*OURS, _EXTRA, _FIRST, _SECOND)
"""Names that an output may need for itself."""

_PATCHABLE = ("config.json", "generation_config.json")
"""Files of a source whose text an edit may change, besides those with chat templates."""


@dataclass(frozen=True, slots=True)
class Shards:
    """The shards of an output.

    Attributes:
        renamed: shard of the source -> its name in the output, if that is another one.
        extra: the shard of created tensors; None if there are none.
    """

    renamed: Mapping[str, str]
    extra: str | None

    @classmethod
    def of(cls, shards: tuple[str, ...], created: bool) -> "Shards":
        """The names for an output from these shards of a source."""
        if not created:
            return cls({}, None)
        if shards == (SINGLE,):
            return cls({SINGLE: _FIRST}, _SECOND)
        names = [_EXTRA, *(f"model-created-{n}.safetensors" for n in range(2, len(shards) + 2))]
        return cls({}, next(name for name in names if name not in shards))

    def output(self, shard: str) -> str:
        """The name of a source's shard in the output."""
        return self.renamed.get(shard, shard)

    def source(self, shard: str) -> str:
        """The reverse."""
        return next((old for old, new in self.renamed.items() if new == shard), shard)


def check_edit(edit: Edit, plan: Plan, source: Source) -> None:
    """Refuse an edit that cannot be written, before anything is.

    Raises:
        CheckpointError: naming a change that does not fit its tensor, a new tensor that already
            exists, a patch that does not apply, or a file that would replace another.
    """
    edit.check(plan)
    shards = Shards.of(source.shards, bool(edit.created))
    if taken := {shards.extra, *shards.renamed.values()} & {*source.extras}:
        raise CheckpointError(
            f"{min(filter(None, taken))} of the source has a name that the output needs",
            hint="rename the file",
        )
    for name, tensor in edit.created.items():
        if name in plan.names.tensors:
            raise CheckpointError(
                f"the edit creates tensor {name}", expected="a tensor that the source lacks",
                found="one that it has", hint="the method should change that one",
            )  # fmt: skip
        plain = 0 < len(name) <= MAX_NAME and name.isprintable() and name != "__metadata__"
        if not plain or tensor.dtype not in FLOATS.values():
            raise CheckpointError(
                f"the edit creates tensor {name}",
                expected="a plain name and a floating-point dtype of 16 to 64 bits",
                found=str(tensor.dtype).removeprefix("torch."),
            )  # fmt: skip
        if not bool(tensor.isfinite().all()):
            raise CheckpointError(f"the edit creates tensor {name}, which holds NaN or Inf")
    for name, patch in edit.patches.items():
        patched_text(name, patch, source)
    if fusion_of(plan, edit) is None:
        if "config.json" in edit.patches:
            _check_config(merge(source.config, edit.patches["config.json"]), plan)
        _check_asked_for(edit, plan, source.config)
    sizes = {name: len(data) for name, data in edit.files.items()}
    _check_files(sizes, {*source.small, *source.shards, *_RESERVED})


def _check_files(files: Mapping[str, int], taken: Iterable[str]) -> None:
    """Check that new files, with these sizes, have names of a model's texts that are free, also if
    case is ignored.
    """
    known, folders = {name.casefold() for name in taken}, set[str]()
    for name, nbytes in files.items():
        if not is_addable(name, nbytes):
            raise CheckpointError(
                f"the edit adds a file {name}", expected="a small file in the folder, no weights"
            )
        path = PurePosixPath(name)
        place, *above = (str(each).casefold() for each in (path, *path.parents))
        if place in known | folders or known & {*above}:
            raise CheckpointError(
                f"the edit adds a file {name}", expected="a name that is free",
                found="one of the source, of the output or of another new file",
            )  # fmt: skip
        known.add(place)
        folders |= {*above}


def _check_config(config: Mapping[str, object], plan: Plan) -> None:
    """Check that a patched config is of the same weights, stored and tied in the same way."""
    routes = plan.architecture.bias_routes.values()
    labels = {plan.architecture.model_type, *(route.config.get("model_type") for route in routes)}
    same = config.get("model_type") in labels
    if same:
        new = make_plan(dict(config), None, plan.headers, plan.folder)
        was, now = ((p.dimensions, p.scheme, p.roles, p.vocabulary, p.targets) for p in (plan, new))
        same = was == now and not new.stale
    if not same:
        raise CheckpointError(
            "the patch of config.json changes the sizes of the model, its type, or how its weights "
            "are stored or tied",
            expected=f"{plan.architecture.model_type} of the same sizes",
        )


def _check_asked_for(edit: Edit, plan: Plan, before: Mapping[str, Any]) -> None:
    """Check that the config announces new biases or a new head if and only if they are created."""
    created, config = edit.created, merge(before, edit.patches.get("config.json", {}))
    for what, names, needed, patch in additions_of(plan):
        asked = merge(config, patch) == config
        lacking = [name for name in needed if name not in created]
        if asked and lacking and merge(before, patch) != before:
            raise CheckpointError(
                f"config.json asks for {what}", expected="an edit that creates all of them",
                found=f"none of the name {lacking[0]}",
            )  # fmt: skip
        useless = [name for name in names if name in created]
        if useless and not asked:
            raise CheckpointError(
                f"the edit creates tensor {useless[0]}", found="a config that ignores it",
                expected=f"a patch of config.json with {json.dumps(dict(patch))}",
            )  # fmt: skip


def additions_of(plan: Plan) -> Iterator[tuple[str, list[str], list[str], Mapping[str, Any]]]:
    """Possible additions to a checkpoint: in words, one name, all names that belong to it, and the
    patch.
    """
    for role in plan.architecture.bias_routes:
        route = plan.bias_route(role) if role in plan.roles else None
        if route is not None and route.created:
            yield "biases", list(route.biases.values()), list(route.created), route.config
    if head := plan.head_route():
        yield "a head of its own", [head.name], [head.name], head.config


def check_additions(created: Collection[str], plan: Plan, config: Mapping[str, Any]) -> None:
    """Refuse from the headers new tensors that no patch of ``config.json`` can make a model read.

    The key may already have that value while another place of the config, such as ``text_config``,
    overrules it; or the config asks for tensors that are missing.

    Raises:
        CheckpointError: naming the key.
    """
    for what, names, _, patch in additions_of(plan):
        if merge(config, patch) == config and not {*names}.isdisjoint(created):
            raise CheckpointError(
                f"config.json asks for {what} already: {json.dumps(dict(patch))}",
                expected="a config that agrees with itself and with the tensors",
                found=f"no {names[0]}",
                hint="give the key the same value in every part of config.json, such as "
                "text_config, or get an intact copy",
            )


def patched_text(name: str, patch: Patch, source: Source) -> str:
    """The new text of a small file of a source.

    Raises:
        CheckpointError: the source has no such file, or the patch does not apply.
    """
    known = [n for n in source.small if n in _PATCHABLE or is_template_file(n)]
    if name not in known:
        raise CheckpointError(
            f"the edit changes the file {name}", expected=f"one of {', '.join(known)}"
        )
    try:
        text = source.small[name].read_bytes().decode()  # keep the line ends
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{name} cannot be read", found=str(error)) from error
    return patched(name, text, patch)


def write_extra(
    folder: Path, shards: Shards, edit: Edit
) -> tuple[dict[str, FileRecord], tuple[CreatedTensor, ...]]:
    """Write the shard of created tensors, and rename the source's shards.

    Returns:
        its name and record, and its tensors; empty if the edit creates none.
    """
    if shards.extra is None:
        return {}, ()
    for old, new in shards.renamed.items():
        (folder / old).rename(folder / new)
    path = folder / shards.extra
    tensors = {name: tensor.cpu().clone().contiguous() for name, tensor in edit.created.items()}
    path.write_bytes(save(tensors, {"format": "pt"}))
    record = replace(file_entry(path), prefixes=digests_of(path)[1])
    created = tuple(
        CreatedTensor(
            name=name, shard=path.name, dtype=info.dtype, shape=info.shape,
            sha256=sha256_of_tensor(tensors[name]),
        )
        for name, info in read_header(path).tensors.items()
    )  # fmt: skip
    return {path.name: record}, created


def index_of(source: Source, plan: Plan, shards: Shards, created: Mapping[str, int]) -> str | None:
    """The text of the output's index; None if it has none, or keeps the source's.

    ``created`` is name of each created tensor -> its bytes.
    """
    if source.virtual_shards is not None and source.weight_map is not None:
        text = index_text(source.virtual_shards)
    elif not created:
        return None
    elif source.weight_map is not None and not shards.renamed:
        text = (source.folder / INDEX).read_bytes().decode()
    else:
        text = _whole_index(plan, shards)
    if not created:
        return text
    patch: dict[str, object] = {"weight_map": dict.fromkeys(sorted(created), shards.extra)}
    metadata = json.loads(text).get("metadata")  # an untrusted index may have any type here
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    if isinstance(total, int):
        patch["metadata"] = {"total_size": total + sum(created.values())}
    return patched(INDEX, text, patch)


def _whole_index(plan: Plan, shards: Shards) -> str:
    """A new index, for a source without one, or whose single file is renamed."""
    places: dict[str, str] = {}
    size = 0
    for shard, header in plan.headers.items():
        places |= dict.fromkeys(header.tensors, shards.output(shard))
        size += sum(info.nbytes for info in header.tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
    return json.dumps(index, indent=2) + "\n"
