"""A manifest to be replayed: its recorded run, and the differences of the inputs here."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from converter.checkpoints.plan import Plan
from converter.checkpoints.source import Source
from converter.edits.base import Edit
from converter.edits.edit_file import load_edit_tensors
from converter.errors import VerificationError
from converter.manifest import Manifest
from converter.outputs.record_checks import edit_of, place_of
from converter.recipe import LocalInputs, Recipe
from converter.release.manifest import environment
from converter.release.reading import find_edit, recorded_recipe
from converter.runtime.cache import remembered_digest
from converter.version import __version__

NAMED = 5
"""The most files that a message names; the rest are counted."""


@dataclass(frozen=True, slots=True)
class Recording:
    """A manifest and its edit.

    Attributes:
        path: of the manifest.
        manifest: as it was written.
        sha256: of the manifest's bytes.
        edit_file: the file of the edit, checked against its recorded sha256.
        stored: its tensors, by name.
    """

    path: Path
    manifest: Manifest
    sha256: str
    edit_file: Path
    stored: Mapping[str, Tensor]

    def edit(self, plan: Plan) -> Edit:
        """The recorded edit.

        Raises:
            VerificationError: the checkpoint has no such tensor, or the edit's file is another.
        """
        weights = plan.find({tensor.name for tensor in self.manifest.edited})
        for tensor in self.manifest.edited:
            weight = weights.get(tensor.name)
            found = weight and (weight.layer, weight.axis, weight.info.shape)
            if found != (tensor.layer, tensor.axis, tensor.shape):
                raise VerificationError(
                    f"tensor {tensor.name} is recorded as edited and is not in the source"
                )
        return edit_of(self.manifest, self.stored)


def read_recording(path: Path) -> Recording:
    """Read a manifest, or that of a folder, and its edit.

    The edit's file must be beside the manifest, under its recorded name or under the manifest's
    own: ``some-model.tensors`` beside ``some-model.json``.

    Raises:
        VerificationError: one of them is missing, malformed, or not the recorded one.
    """
    path, manifest, digest, file = find_edit(path)
    return Recording(path, manifest, digest, file, load_edit_tensors(file))


def recipe_of(recording: Recording, given: LocalInputs, *, refit: bool) -> Recipe:
    """The recorded recipe, its inputs pinned to the recorded commits; texts only for a refit.

    Raises:
        OptionError: an input is local, and its place was not given.
        VerificationError: a name leads out of the source, or is not that of a repo.
    """
    return recorded_recipe(recording.manifest, given, refit=refit)


def differences(recording: Recording, device: str) -> list[dict[str, str]]:
    """The differences from the recorded tool, device, platform, Python and libraries."""
    then, now = recording.manifest.environment, environment(device)
    pairs = {"gloss-convert": (recording.manifest.tool.version, __version__)}
    for name in ("device", "platform", "python"):
        pairs[name] = (getattr(then, name), getattr(now, name))
    for name in sorted({*then.libraries, *now.libraries}):
        pairs[name] = (then.libraries.get(name, "none"), now.libraries.get(name, "none"))
    return [
        {"what": what, "recorded": before, "found": after}
        for what, (before, after) in pairs.items()
        if before != after
    ]


def check_source(recording: Recording, source: Source) -> None:
    """Check that every file that the recorded run read has the recorded bytes.

    For shards that are only on the Hub, the digests of its listing are compared. Shards in a store
    are fetched, since its listing has no sha256.

    Raises:
        VerificationError: naming the files that differ.
    """
    wrong = []
    for name, file in recording.manifest.source.all_files.items():
        recorded, found = file.sha256, digest_of(source, name)
        if found is None:
            wrong.append(f"{name} is missing")
        elif found != recorded:
            wrong.append(f"{name} has sha256 {found[:16]}..., not {recorded[:16]}...")
    if wrong:
        more = f"; and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
        raise VerificationError(
            f"the source {source.name} is not the one that was converted: "
            + "; ".join(wrong[:NAMED]) + more,
            hint="nothing was done; give the recorded one as --source",
        )  # fmt: skip


def digest_of(source: Source, name: str) -> str | None:
    """The sha256 of a file of the source, or None if there is no such file. It is fetched if no
    listing has its sha256.
    """
    path = place_of(source, name)
    if not path.is_file() and source.remote is not None:
        if known := source.remote.sha256.get(source.inside + name):
            return known
        if name in (*source.shards, *source.extras):
            source.fetch([name])
    return remembered_digest(path) if path.is_file() else None
