"""The files of a folder against its manifest, and manifest, card and SHA256SUMS against each other.

Links to files count as what they lead to: the Hub's client keeps downloads that way.
"""

import hashlib
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from converter.checkpoints.names import CARD, MANIFEST, SIGNATURE, SUMS, UNLISTED
from converter.checkpoints.safetensors.rewrite import digests_of, find_damage
from converter.errors import ConverterError
from converter.manifest import FileRecord, Manifest
from converter.outputs.record_checks import is_plain
from converter.outputs.staging.claim import files_not_ours
from converter.release.manifest import hash_line, sums_text
from converter.runtime import progress
from converter.runtime.cache import sha256_of
from converter.text import one_line

HIDDEN = {".DS_Store", ".cache", ".git", ".gitattributes", ".gitignore", "lost+found"}
"""What git, the Hub's client and file systems leave in a folder: no loader reads it."""


def check_files(
    folder: Path, manifest: Manifest, gone: Collection[str]
) -> tuple[dict[str, str], list[str]]:
    """Look at every file of a folder.

    Returns:
        the files that are missing, altered or unexpected, and how; and what the manifest says
        falsely of whole ones, a sentence each.

    Raises:
        OSError: a folder in it cannot be read.
    """
    files = {name: file for name, file in manifest.files.items() if name not in gone}
    damaged, false = {}, []
    with progress.bar("hash", sum(file.nbytes for file in files.values()), "B") as bar:
        for name, file in files.items():
            bar.set_postfix_str(one_line(name))
            if not is_plain(name):
                damaged[name] = "lies outside the folder"
            elif not (folder / name).is_file():
                damaged[name] = "is missing"
            else:
                sha256, size, prefixes = _look_at(folder / name, file)
                if sha256 != file.sha256:
                    damage = _damage(folder / name, file.prefixes)
                    damaged[name] = "is not as recorded" + damage
                elif prefixes != file.prefixes:
                    false.append(f"{MANIFEST}: {name} has other running digests")
                elif size != file.nbytes:
                    false.append(f"{MANIFEST}: {name} has {size:,} bytes")
            bar.update(file.nbytes)
    for name, what in _others(folder):
        if name not in files and name not in UNLISTED:
            damaged[name] = what
    return damaged, false


def _look_at(path: Path, file: FileRecord) -> tuple[str, int, dict[str, str] | None]:
    """sha256, bytes and, of a shard, prefixes of a file; no sha256 if it is no shard any more."""
    size = path.stat().st_size
    if file.prefixes is None:
        return sha256_of(path), size, None
    try:
        sha256, prefixes = digests_of(path)
    except ConverterError:
        return "", size, None
    return sha256, size, prefixes


def _damage(path: Path, prefixes: Mapping[str, str] | None) -> str:
    if prefixes is None:
        return ""
    try:
        return f": the first difference is in {find_damage(path, prefixes)}"
    except ConverterError as error:
        return f": {error}"


def _others(folder: Path) -> Iterator[tuple[str, str]]:
    """Everything in a folder that is no folder, and what is wrong if it is not in the manifest.

    Raises:
        OSError: a folder in it cannot be read.
    """

    def fail(error: OSError) -> None:
        raise error

    for place, folders, names in os.walk(folder, onerror=fail):
        inside = Path(place).relative_to(folder)
        if inside == Path():
            known = {path.name for path in files_not_ours(folder.resolve())} - HIDDEN
            folders[:] = [name for name in folders if name in known]
            names = [name for name in names if name in known]
        for name in sorted(folders):
            if (Path(place) / name).is_symlink():
                yield (inside / name).as_posix(), "is a link to a folder"
        for name in sorted(names):
            yield (inside / name).as_posix(), "is not in the manifest"


def check_sums(
    folder: Path, manifest: Manifest, digest: str, seen: dict[str, str]
) -> Iterator[str]:
    """The card names this manifest, and SHA256SUMS is exactly what follows from both.

    Args:
        folder: with the card and SHA256SUMS.
        manifest: of it.
        digest: sha256 of the manifest's bytes.
        seen: gets the sha256 of what was read here.
    """
    seen[MANIFEST] = digest
    try:
        card, found = ((folder / name).read_bytes() for name in (CARD, SUMS))
        if (folder / SIGNATURE).is_file():
            seen[SIGNATURE] = sha256_of(folder / SIGNATURE)
    except OSError as error:
        yield f"{Path(error.filename or SUMS).name}: {error.strerror}"
        return
    seen |= {CARD: _sha256(card), SUMS: _sha256(found)}
    line = hash_line(digest)
    start = line[: line.index(":")]
    lines = card.decode("utf-8", "replace").splitlines()
    if [text for text in lines if text.startswith(start)] != [line]:
        yield f"{CARD} does not state the sha256 of {MANIFEST}"
    expected = sums_text(manifest.digests | {name: seen[name] for name in (CARD, MANIFEST)})
    if found != expected.encode("utf-8", "surrogatepass"):
        known = found.decode("utf-8", "replace").splitlines()
        rest = (text for text in expected.splitlines() if text not in known)
        names = [text.partition("  ")[2] or text for text in rest]
        for name in names or ["its own form"]:
            yield f"{SUMS} is wrong about {name}"


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
