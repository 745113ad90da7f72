"""A manifest to be replayed: the run that it records, and how the inputs here differ from its."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from converter import __version__
from converter.checkpoints.names import MANIFEST
from converter.checkpoints.plan import Plan
from converter.checkpoints.source import Source
from converter.checkpoints.weights import Weight
from converter.edits.base import Projection
from converter.edits.subspace_file import load_bases
from converter.errors import OptionError, VerificationError
from converter.hub.listing import looks_like_repo
from converter.outputs.record_checks import is_basis, place_of, plain_name, source_files
from converter.recipe import Run
from converter.release.manifest import environment, read_manifest_file
from converter.runtime.cache import remembered_digest, sha256_of

NAMED = 5
"""Files that are named one by one in a message; the rest are counted."""


@dataclass(frozen=True, slots=True)
class Recording:
    """A manifest and the subspace that belongs to it.

    Attributes:
        path: of the manifest.
        manifest: as it was written.
        sha256: of the manifest's bytes.
        subspace: the file of the bases, whose sha256 is the recorded one.
        bases: its content, by name.
    """

    path: Path
    manifest: dict[str, Any]
    sha256: str
    subspace: Path
    bases: Mapping[str, Tensor]

    def basis_name(self, layer: int) -> str:
        """The basis that ``layer`` lost."""
        return next(str(e["basis"]) for e in self.manifest["edited"] if e["layer"] == layer)

    def edit(self, plan: Plan) -> tuple[Projection, tuple[Weight, ...]]:
        """The recorded edit, and what it changes.

        Raises:
            VerificationError: the checkpoint has no such tensor.
        """
        known = {target.info.name: target for target in plan.targets}
        targets, bases = [], {}
        for entry in self.manifest["edited"]:
            target, basis = known.get(entry["name"]), self.bases.get(entry["basis"])
            if target is None or (target.layer, target.axis) != (entry["layer"], entry["axis"]):
                raise VerificationError(
                    f"tensor {entry['name']} is recorded as edited and is not in the source"
                )
            width = plan.dimensions.hidden_size
            if basis is None or not is_basis(basis, width):
                raise VerificationError(
                    f"{self.subspace.name} holds no basis {entry['basis']} of this width"
                )
            targets.append(target)
            bases[target.layer] = basis
        bias = any(target.is_bias for target in targets)
        return Projection(bases, bias), tuple(targets)


def read_recording(path: Path) -> Recording:
    """Read a manifest and its subspace.

    The subspace is looked for beside the manifest, under the name that it is recorded with or under
    the manifest's own: ``some-model.safetensors`` beside ``some-model.json``.

    Args:
        path: a manifest, or a folder with one.

    Raises:
        VerificationError: one of them is missing, malformed, or not the recorded one.
    """
    path = path / MANIFEST if path.is_dir() else path
    if not path.is_file():
        raise VerificationError(f"there is no manifest {path.name}", hint="check the path")
    manifest = read_manifest_file(path)
    recorded = manifest["subspace"]["file"]
    for name in (recorded, *manifest["files"]):
        plain_name(name)
    places = [path.with_suffix(".safetensors"), path.with_name(recorded)]
    found = [place for place in places if place.is_file()]
    if not found:
        raise VerificationError(
            f"the subspace of {path.name} is missing",
            expected=" or ".join(place.name for place in places) + " beside it",
        )
    expected = manifest["files"].get(recorded, {}).get("sha256")
    whole = [place for place in found if sha256_of(place) == expected]
    if not whole:
        raise VerificationError(
            f"{found[0].name} is not the subspace that {path.name} records",
            expected=f"sha256 {str(expected)[:16]}...",
            found=f"{sha256_of(found[0])[:16]}...",
        )
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Recording(path, manifest, digest, whole[0], load_bases(whole[0]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """Where local inputs are, whose paths no manifest records; None where they are not needed.

    ``trust_remote_code`` is never taken from a manifest.
    """

    source: str | None = None
    pairs: str | None = None
    neutral: str | None = None
    word_list: str | None = None
    activations: Path | None = None
    trust_remote_code: bool = False


def run_of(recording: Recording, given: Given, *, refit: bool) -> Run:
    """The recorded run, its inputs pinned to what they resolved to.

    Args:
        recording: of it.
        given: what a manifest does not know.
        refit: whether texts will be read.

    Raises:
        OptionError: an input is local, and it is not said where it is.
        VerificationError: a name leads out of the source, or is not that of a repo.
    """
    manifest = recording.manifest
    asked = dict(manifest["run"])
    if asked["trust_remote_code"] and not given.trust_remote_code:
        raise OptionError(
            "the recorded run executed code of its source",
            hint="give --trust-remote-code if this one may, too",
        )
    if asked["subfolder"]:
        plain_name(asked["subfolder"])
    asked |= {"source": _source(manifest, given.source), "activations": given.activations}
    asked["trust_remote_code"] = given.trust_remote_code
    if refit:
        asked |= _texts(manifest, given)
    return Run(**asked)


def _source(manifest: Mapping[str, Any], given: str | None) -> str:
    """What to read: a repo at the recorded commit, unless a place is given."""
    source = manifest["source"]
    if given is not None:
        return given
    if source["repo_id"]:
        if not looks_like_repo(source["repo_id"]) or Path(source["repo_id"]).exists():
            raise VerificationError("the recorded source is not a repo", found=source["repo_id"])
        return f"{source['repo_id']}@{source['commit']}"
    if manifest["run"]["source"] == "demo":
        return "demo"
    raise OptionError(
        f"the recorded source {source['name']} was a local one",
        hint="say where it is with --source",
    )


def _texts(manifest: Mapping[str, Any], given: Given) -> dict[str, str]:
    """The texts of a refit, a dataset at its recorded commit."""
    asked = manifest["run"]
    if asked["activations"] is not None and given.activations is None:
        raise OptionError(
            f"the recorded fit took its activations from {asked['activations']}",
            hint="say where it is with --activations",
        )
    found = {}
    for name in ("pairs", "neutral", "word_list"):
        place, origin = getattr(given, name), manifest[name]["origin"]
        if place is None and "repo_id" in origin:
            place = f"{origin['repo_id']}@{origin['commit']}"
        if place is None and asked[name] != "builtin":
            raise OptionError(
                f"the recorded {name.replace('_', ' ')} was the file {asked[name]}",
                hint=f"say where it is with --{name.replace('_', '-')}",
            )
        found[name] = place or "builtin"
    return found


def differences(recording: Recording, device: str) -> list[dict[str, str]]:
    """What is not as recorded of tool, device, platform, Python and libraries, each with a name."""
    then, now = recording.manifest["environment"], environment(device)
    pairs = {"gloss-convert": (recording.manifest["tool"]["version"], __version__)}
    pairs |= {name: (then[name], now[name]) for name in ("device", "platform", "python")}
    for name in sorted({*then["libraries"], *now["libraries"]}):
        pairs[name] = (then["libraries"].get(name, "none"), now["libraries"].get(name, "none"))
    return [
        {"what": what, "recorded": before, "found": after}
        for what, (before, after) in pairs.items()
        if before != after
    ]


def check_source(recording: Recording, source: Source) -> None:
    """Every file that the recorded run read must have the recorded bytes.

    Shards that are on the Hub only are known by the digests that it lists.

    Raises:
        VerificationError: naming those that do not.
    """
    wrong = []
    for name, recorded in source_files(recording.manifest).items():
        found = _digest(source, name)
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
        if name in source.shards:
            source.fetch([name])
    return remembered_digest(path) if path.is_file() else None
