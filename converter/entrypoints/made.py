"""The edited copy of a model: a checkpoint, an adapter, or a manifest with its edit alone."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from converter.checkpoints.chat_template import is_template_file
from converter.checkpoints.fusing import CODE, is_fused
from converter.checkpoints.names import MANIFEST
from converter.checkpoints.resolve import resolve
from converter.checkpoints.source import Source
from converter.edits.base import Edit
from converter.errors import OptionError
from converter.evaluation.measure import load_whole
from converter.evaluation.refusals import recorded_lesson
from converter.evaluation.systems import System
from converter.manifest import Manifest
from converter.methods.workbench import Bench
from converter.models.loading import load_tokenizer
from converter.models.resident import LanguageModel
from converter.outputs.base import output_of
from converter.outputs.record_checks import edit_of, recorded_edit
from converter.release.manifest import read_manifest
from converter.release.recording import read_recording
from converter.runtime import progress


def made(place: str, name: str, bench: Bench) -> System:
    """Open an edited copy of a model. A checkpoint runs with its own weights. An adapter, a
    manifest alone, or a folder with a fused model runs its recorded edit through hooks.

    Args:
        place: a folder, a manifest's file, or a repo id.
        name: for tables.
        bench: of the unedited model.

    Raises:
        ConverterError: one of its children. The tokenizers differ, an edit alone is of other
            weights, or a fused model has no manifest in a folder.
    """
    path, recording = Path(place), None
    is_folder = (path / MANIFEST).is_file()
    if (is_folder and _is_hooked(read_manifest(path))) or (
        path.is_file() and path.suffix == Path(MANIFEST).suffix
    ):
        recording = read_recording(path)
    if recording is not None:
        if not _is_source_of(recording.manifest, bench.source):
            raise OptionError(
                f"{place} is an edit of other weights than those of {bench.source.name}",
                hint="give the model that it was made from as the unedited one",
            )
        return _recorded(name, recording.manifest, recording.edit(bench.plan), None)
    how, source = replace(bench.how, trust_remote_code=False), resolve(place)
    folder = source.folder
    if is_fused(source.config):
        raise OptionError(
            f"{place} is fused with a calibration model",
            expected=f"a local folder with {MANIFEST}", found="none",
            hint="give the whole folder, as gloss-convert wrote it",
        )  # fmt: skip
    if load_tokenizer(folder).get_vocab() != bench.vocabulary.tokenizer.get_vocab():
        raise OptionError(
            f"{place} and {bench.source.name} have different tokenizers",
            hint="give the model that it was made from as the unedited one",
        )
    load = partial(load_whole, place, bench.device, bench.held_out, how)
    if not (folder / MANIFEST).is_file():
        return System(name, load=load)
    manifest = read_manifest(folder)
    found = _recorded(name, manifest, edit_of(manifest, recorded_edit(folder, manifest)), load)
    if _is_source_of(manifest, bench.source):
        return found
    progress.warn(
        f"{name} was made from other weights than those of {bench.source.name}, so the measurement "
        f"is not of its edit alone"
    )
    return replace(found, is_of_unedited=False)


def _is_hooked(manifest: Manifest) -> bool:
    """Whether a recorded model runs through hooks: an adapter, or one that has code of its own."""
    return not output_of(manifest.run.output).has_shards or CODE in manifest.edit.files


def _is_source_of(manifest: Manifest, source: Source) -> bool:
    """Whether the weights of a source are those that a manifest's edit was made for."""
    weights = {*source.shards, *(path.name for path in source.originals)}
    found = {digest for name, digest in source.digests().items() if name in weights}
    return found <= {file.sha256 for file in manifest.source.all_files.values()}


def _recorded(
    name: str, manifest: Manifest, edit: Edit, load: Callable[[], LanguageModel] | None
) -> System:
    """The edit that a manifest records."""
    bias = any(tensor.role.endswith("_bias") for tensor in manifest.edited)
    strength, layers = manifest.choice.strength, tuple(manifest.layers)
    return System(
        name, None, strength, edit, load, layers, bias,
        lesson=recorded_lesson(manifest), suffix=_suffix(manifest),
    )  # fmt: skip


def _suffix(manifest: Manifest) -> str:
    """The text that an edited model's chat template puts behind user messages."""
    if not any(map(is_template_file, manifest.edit.patches)):
        return ""
    defence = manifest.guard.defence if manifest.guard else None
    said = defence.suffix if defence else manifest.method.evidence.get("suffix")
    return said if isinstance(said, str) else ""
