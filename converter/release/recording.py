"""A manifest to be replayed: its recorded run, and the differences of the inputs here."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from converter.checkpoints.names import EDIT_FILE, MANIFEST
from converter.checkpoints.plan import Plan
from converter.checkpoints.source import Source
from converter.edits.base import Edit
from converter.edits.edit_file import load_edit_tensors
from converter.errors import OptionError, VerificationError
from converter.hub.addresses import looks_like_repo, parse_address
from converter.manifest import Manifest, TextRecord
from converter.outputs.record_checks import edit_of, place_of, plain_name
from converter.recipe import SELF, LocalInputs, Recipe
from converter.release.manifest import environment, read_manifest_bytes
from converter.runtime.cache import remembered_digest, sha256_of
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
    path = path / MANIFEST if path.is_dir() else path
    if not path.is_file():
        raise VerificationError(f"there is no manifest {path.name}", hint="check the path")
    manifest, digest = read_manifest_bytes(path)
    recorded = manifest.edit.file
    for name in (recorded, *manifest.files):
        plain_name(name)
    places = [path.with_suffix(Path(EDIT_FILE).suffix), path.with_name(recorded)]
    found = [place for place in places if place.is_file()]
    if not found:
        raise VerificationError(
            f"the edit of {path.name} is missing",
            expected=" or ".join(place.name for place in places) + " beside it",
        )
    expected = manifest.files[recorded].sha256 if recorded in manifest.files else "none"
    whole = [place for place in found if sha256_of(place) == expected]
    if not whole:
        raise VerificationError(
            f"{found[0].name} is not the edit that {path.name} records",
            expected=f"sha256 {expected[:16]}...",
            found=f"{sha256_of(found[0])[:16]}...",
        )
    return Recording(path, manifest, digest, whole[0], load_edit_tensors(whole[0]))


def recipe_of(recording: Recording, given: LocalInputs, *, refit: bool) -> Recipe:
    """The recorded recipe, its inputs pinned to the recorded commits; texts only for a refit.

    Raises:
        OptionError: an input is local, and its place was not given.
        VerificationError: a name leads out of the source, or is not that of a repo.
    """
    manifest = recording.manifest
    asked = manifest.run
    if asked.trust_remote_code and not given.trust_remote_code:
        raise OptionError(
            "the recorded run executed code of its source",
            hint="give --trust-remote-code if this one may, too",
        )
    if asked.subfolder:
        plain_name(asked.subfolder)
    return replace(
        asked,
        source=_source(manifest, given.source),
        activations=given.activations,
        trust_remote_code=given.trust_remote_code,
        **(_texts(manifest, given) if refit else {}),
    )


def _source(manifest: Manifest, given: str | None) -> str:
    """The source to read: a repo at the recorded commit, unless a place is given."""
    source = manifest.source
    if given is not None:
        return given
    if source.repo_id:
        if not looks_like_repo(source.repo_id) or Path(source.repo_id).exists():
            raise VerificationError("the recorded source is not a repo", found=source.repo_id)
        return f"{source.repo_id}@{source.commit}"
    if manifest.run.source == "demo":
        return "demo"
    raise OptionError(
        f"the recorded source {source.name} was a local one", hint="say where it is with --source"
    )


def _texts(manifest: Manifest, given: LocalInputs) -> dict[str, Any]:
    """The texts of a refit, a dataset at its recorded commit."""
    asked = manifest.run
    if asked.activations is not None and given.activations is None:
        raise OptionError(
            f"the recorded fit took its activations from {asked.activations}",
            hint="say where it is with --activations",
        )
    names = ("pairs", "neutral", "word_list", "instances", "prompts")
    records: dict[str, TextRecord | None] = {name: getattr(manifest, name) for name in names}
    if drawn := manifest.pairs.drawn:
        records["self_prompts"] = drawn.prompts
    found = {}
    for name, record in records.items():
        if record is None:
            continue
        place, origin, said = getattr(given, name), record.origin, getattr(asked, name)
        if place is None and origin.repo_id is not None:
            address, sign, kept = said.partition("#")
            asked_for = parse_address(address, "dataset")
            place = replace(asked_for, repo_id=origin.repo_id, revision=origin.commit).text
            place += sign + kept
        if place is None and said not in ("builtin", SELF):
            raise OptionError(
                f"the recorded {name.replace('_', ' ')} was the file {said}",
                hint=f"say where it is with --{name.replace('_', '-')}",
            )
        found[name] = place or said
    return found


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

    For shards that are only on the Hub, the digests of its listing are compared.

    Raises:
        VerificationError: naming the files that differ.
    """
    wrong = []
    for name, file in recording.manifest.source.all_files.items():
        recorded, found = file.sha256, _digest(source, name)
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


def _digest(source: Source, name: str) -> str | None:
    """The sha256 of a file of the source; None if it has none of that name."""
    path = place_of(source, name)
    if not path.is_file() and source.repo is not None:
        if known := source.repo.sha256.get(source.inside + name):
            return known
        if name in (*source.shards, *source.extras):
            source.fetch([name])
    return remembered_digest(path) if path.is_file() else None
