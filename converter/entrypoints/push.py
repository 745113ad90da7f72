"""Publish a checkpoint: from disk, or shard by shard as they are finished; or put it into a store.

A stream never holds the whole output on disk. A worker rewrites, checks, uploads and deletes a
shard before it takes the next. With at most ``_AT_A_TIME`` workers, at most as many shards are on
disk. The commit comes last: without it, the uploaded files belong to no repo, and the Hub deletes
them in time.
"""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

from converter.checkpoints.front_matter import read_card
from converter.checkpoints.names import CARD, MANIFEST, SIGNATURE, SUMS
from converter.checkpoints.plan import Plan
from converter.checkpoints.safetensors.rewrite import ShardRecord
from converter.checkpoints.source import Source
from converter.edits.base import Edit
from converter.entrypoints.upload import Copyable, Files, Published, Upload, changed
from converter.entrypoints.verify import verify
from converter.errors import ConverterError, VerificationError
from converter.hub.store_uploads import upload
from converter.manifest import Manifest
from converter.outputs.checkpoint.verify import check_edit, infos_of
from converter.outputs.claim import JOURNAL, LAST, claimed
from converter.outputs.journal import Done, Receiver, keep_only
from converter.recipe import Publication
from converter.release.licences import licence_name, warn_of_name
from converter.release.manifest import read_manifest_bytes
from converter.runtime import progress
from converter.runtime.cache import sha256_of

_AT_A_TIME = 2
"""Shards of a stream that are on disk at most."""

SMALL = 200_000_000
"""Bytes of disk for everything except shards."""


def push(
    folder: Path, place: Publication, trust_remote_code: bool = False, verified: bool = False
) -> Published:
    """Publish a converted checkpoint, which is verified first.

    Args:
        folder: with a manifest.
        place: of ``check_rights``.
        trust_remote_code: see ``verify``.
        verified: it was written and verified just now.

    Raises:
        VerificationError: it does not agree with its manifest; nothing was sent.
        PublishError: the Hub refuses. There is no commit, unless the message names one.
    """
    manifest, files = _verified(folder, trust_remote_code, verified)
    warn_of_name(licence_name(read_card(folder / CARD)), place)
    size = sum(path.stat().st_size for path, _ in files.values())
    with progress.stage("upload", f"uploading {size / 1e6:,.1f} MB to {place.repo_id}"):
        upload, copyable = Upload(place), _untouched(manifest, folder)
        for name, origin in copyable.items():
            file = manifest.files[name]
            upload.copy(name, file.sha256, file.nbytes, origin)
        upload.send({name: file for name, file in files.items() if name not in copyable})
        return upload.commit(manifest.source.name)


def put(
    folder: Path, address: str, trust_remote_code: bool = False, verified: bool = False
) -> None:
    """Upload a converted checkpoint to an object store; the files that show it is whole come last.

    Args:
        folder, trust_remote_code, verified: as of ``push``.
        address: of ``store_address``.

    Raises:
        VerificationError: it does not agree with its manifest; nothing was sent.
        DestinationError, OptionError, PublishError: as ``store_uploads.upload``.
    """
    manifest, files = _verified(folder, trust_remote_code, verified)
    order = {name: place for place, name in enumerate((*LAST, SIGNATURE), start=2)}
    order = dict.fromkeys(manifest.shards, 0) | order
    sent = {n: (files[n][0], files[n][1] or sha256_of(files[n][0])) for n in files}
    size = sum(path.stat().st_size for path, _ in sent.values())
    with progress.stage("upload", f"uploading {size / 1e6:,.1f} MB to {address}"):
        upload(address, {n: sent[n] for n in sorted(sent, key=lambda n: (order.get(n, 1), n))})


def put_and_drop(folder: Path, address: str, trust_remote_code: bool) -> None:
    """Upload a folder that was written and verified just now, then delete it.

    Raises as ``put``; then the folder stays, and the error says where it is. Raises
    DestinationError if another run on this machine holds the folder.
    """
    with claimed(folder, overwrite=True):
        try:
            put(folder, address, trust_remote_code, verified=True)
        except ConverterError as error:
            error.hint = "; ".join(filter(None, [error.hint, f"the result is kept in {folder}"]))
            raise
        shutil.rmtree(folder, ignore_errors=True)


def _verified(folder: Path, trust_remote_code: bool, verified: bool) -> tuple[Manifest, Files]:
    """The manifest of a folder and its files, after verification. Raises as ``push``."""
    seen: dict[str, str] = {}
    if not verified:
        with progress.stage("verify", f"verifying {folder.name}"):
            if problems := verify(folder, trust_remote_code=trust_remote_code, seen=seen):
                raise VerificationError(
                    f"{folder.name} is not published, since it fails verification",
                    found="; ".join(problems),
                )
    manifest, digest = read_manifest_bytes(folder)
    if digest != (verified_one := seen.get(MANIFEST, digest)):
        raise changed(MANIFEST, verified_one, digest)
    listed = published_files(folder, manifest)
    return manifest, {n: (path, seen.get(n, sha256)) for n, (path, sha256) in listed.items()}


def published_files(folder: Path, manifest: Manifest) -> Files:
    """The files to publish: those that the manifest lists, and those that it cannot list."""
    known = manifest.digests
    own = [name for name in (CARD, MANIFEST, SUMS, SIGNATURE) if (folder / name).is_file()]
    return {n: (folder / n, known.get(n)) for n in (*known, *own)}


def _untouched(manifest: Manifest, folder: Path) -> dict[str, Copyable]:
    """The shards that equal those of a source on the Hub, byte for byte."""
    source, inside = manifest.source, manifest.run.subfolder
    if source.repo_id is None or source.commit is None:
        return {}
    found = {}
    for name, file in manifest.shards.items():
        original = file.source or name
        theirs = source.files.get(original)
        if theirs and theirs.sha256 == file.sha256:
            there = f"{inside.strip('/')}/{original}" if inside else original
            local = nullcontext(folder / name)
            found[name] = Copyable(source.repo_id, source.commit, there, local)
    return found


class Streaming:
    """Uploads finished shards to the Hub, and commits them at the end.

    Args:
        place: of ``check_rights``.

    Attributes:
        gone: shards that were checked, uploaded and deleted.
        published: the commit, once it is made.
    """

    def __init__(self, place: Publication) -> None:
        self.place = place
        self.gone: set[str] = set()
        self.published: Published | None = None
        self._upload: Upload | None = None
        disable_progress_bars()  # of the client: the progress bar of the edit is enough

    def room(self, plan: Plan) -> int:
        """The most bytes that the output takes on disk."""
        sizes = sorted((header.size for header in plan.headers.values()), reverse=True)
        return sum(sizes[:_AT_A_TIME]) + SMALL

    def receiver(
        self, source: Source, edit: Edit, rounding: str, folder: Path, keep_source: bool
    ) -> Receiver:
        """The receiver of each shard that is written to ``folder``."""
        warn_of_name(licence_name(source.card), self.place)
        self._upload = Upload(self.place)
        return _Receiver(self, self._upload, source, edit, rounding, folder, keep_source)

    def commit(self, folder: Path, manifest: Manifest) -> None:
        """Upload the small files left in ``folder``, and make the commit."""
        assert self._upload is not None
        files = published_files(folder, manifest)
        with progress.stage("publish", f"committing to {self.place.repo_id}"):
            self._upload.send({name: f for name, f in files.items() if name not in self.gone})
            self.published = self._upload.commit(manifest.source.name)

    @contextmanager
    def told(self) -> Iterator[None]:
        """An error in the block names the commit, if it was made by then."""
        try:
            yield
        except ConverterError as error:
            if self.published:
                self.published.stands(error)
            raise


@dataclass(frozen=True, slots=True)
class _Receiver:
    """The ``Receiver`` of a stream. Shards that a failed run uploaded are made again, since they
    were deleted here. If the Hub still has them, they are not sent again.
    """

    stream: Streaming
    upload: Upload
    source: Source
    edit: Edit
    rounding: str
    folder: Path
    keep_source: bool
    at_a_time: int | None = _AT_A_TIME

    def before(self, users: Mapping[str, set[str]]) -> dict[str, Done]:
        keep_only(self.folder, ())
        (self.folder.parent / JOURNAL).unlink(missing_ok=True)
        return {}

    def finished(self, shard: str, done: Done) -> None:
        path, record = self.folder / shard, done.record
        self._check(shard, done)
        origin = _origin(self.source, shard, record, self.keep_source)
        if origin is not None:
            self.upload.copy(shard, record.sha256, record.nbytes, origin)
        else:
            self.upload.send({shard: (path, record.sha256)})
        path.unlink()
        self.stream.gone.add(shard)

    def _check(self, shard: str, done: Done) -> None:
        """Read the edited tensors again, as ``verify`` does.

        This cannot be done for an FP8 weight whose scales are in another shard, which may be
            deleted.
        """
        infos = infos_of(self.folder, [shard])
        for record in done.edits:
            if record.requantized and record.requantized.shard != shard:
                progress.warn(f"tensor {record.name} was not read again: its scales are apart")
                continue
            delta = self.edit.tensors[record.name]
            if problems := list(check_edit(self.folder, record, delta, infos, self.rounding)):
                raise VerificationError("a written shard is damaged", found="; ".join(problems))


def _origin(source: Source, shard: str, record: ShardRecord, keep_source: bool) -> Copyable | None:
    """The place of an unchanged shard on the Hub, if it is there."""
    repo = source.repo
    if repo is None or source.virtual_shards is not None or record.sha256 != record.source_sha256:
        return None
    name = source.inside + shard
    if repo.sha256.get(name) != record.sha256:
        return None

    @contextmanager
    def local() -> Iterator[Path]:
        source.fetch([shard])  # it may have been dropped
        try:
            yield source.folder / shard
        finally:
            if not keep_source:
                source.drop(shard)

    return Copyable(repo.repo_id, repo.commit, name, local())
