"""Read a manifest, find its edit, and say what run it records; nothing of this needs torch."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from msgspec import ValidationError

from converter.checkpoints.names import EDIT_FILE, MANIFEST, plain_name
from converter.errors import OptionError, VerificationError
from converter.hub.addresses import looks_like_repo, parse_address
from converter.hub.store_addresses import is_store, store_address
from converter.manifest import Manifest, TextRecord
from converter.recipe import SELF, LocalInputs, Recipe
from converter.runtime import strict_json
from converter.runtime.cache import sha256_of
from converter.runtime.files import read_file, reason


def read_manifest(folder: Path) -> Manifest:
    """Read a folder's manifest.

    Raises:
        VerificationError: it is missing, is not JSON, or does not follow the schema.
    """
    return read_manifest_bytes(folder)[0]


def read_manifest_bytes(place: Path) -> tuple[Manifest, str]:
    """The same, or a file of any name; and the sha256 of the very bytes that were read."""
    path = place if place.is_file() else place / MANIFEST
    if not path.is_file():
        raise VerificationError(
            f"{place.name} has no {MANIFEST}", hint="only what gloss-convert wrote can be verified"
        )
    try:
        data = read_file(path)
        manifest = Manifest.from_json(strict_json.parse(data))
    except (ValidationError, OptionError) as error:
        raise _not_its_schema(path.name, str(error)) from error
    except (OSError, ValueError) as error:
        raise VerificationError(f"{path.name} cannot be read", found=reason(error)) from error
    return manifest, hashlib.sha256(data).hexdigest()


def _not_its_schema(name: str, said: str) -> VerificationError:
    """A sentence from one of msgspec's: ``Expected `int`, got `float` - at `$.edited[3].axis```."""
    problem, _, place = said.rpartition(" - at ")
    if not problem:  # with the whole
        problem, place = said, "$"
    problem = problem[:1].lower() + problem[1:200]
    return VerificationError(f"{name} does not follow its schema at {place.strip('`')}: {problem}")


def find_edit(path: Path) -> tuple[Path, Manifest, str, Path]:
    """The path of a manifest, or of that in a folder; the manifest; its sha256; its edit's file.

    The edit's file is looked for as ``recording.read_recording`` says. Raises VerificationError.
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
    return path, manifest, digest, whole[0]


def recorded_recipe(manifest: Manifest, given: LocalInputs, *, refit: bool) -> Recipe:
    """See ``recording.recipe_of``."""
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
    """What to read: a repo at the recorded commit, or a prefix, unless a place is given."""
    source = manifest.source
    if given is not None:
        return given
    if source.repo_id:
        if not looks_like_repo(source.repo_id) or Path(source.repo_id).exists():
            raise VerificationError("the recorded source is not a repo", found=source.repo_id)
        return f"{source.repo_id}@{source.commit}"
    if manifest.run.source == "demo":
        return "demo"
    if is_store(manifest.run.source):
        return store_address(manifest.run.source)
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
