"""Publishing a checkpoint: one that is on disk, or its shards as they are finished.

Of a stream the disk never holds the output. A shard is rewritten, checked, uploaded and deleted by
one worker before it takes the next, and there are at most ``_AT_A_TIME`` workers, so no more shards
than that are on disk. The commit comes last: without it what was uploaded belongs to no repo, and
the Hub forgets it.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

from converter.checkpoints.layout import read_card
from converter.checkpoints.names import CARD, MANIFEST, SIGNATURE, SUMS
from converter.checkpoints.plan import Plan
from converter.checkpoints.safetensors.rewrite import ShardRecord
from converter.checkpoints.source import Source
from converter.edits.base import Edit
from converter.entrypoints.upload import Copyable, Files, Published, Upload, changed
from converter.entrypoints.verify import verify
from converter.errors import ConverterError, VerificationError
from converter.manifest import Manifest
from converter.outputs.checkpoint.verify import check_edit, infos_of
from converter.outputs.claim import JOURNAL
from converter.outputs.journal import Done, Receiver, keep_only
from converter.recipe import Publication
from converter.release.licences import licence_name, warn_of_name
from converter.release.manifest import read_manifest_bytes
from converter.runtime import progress

_AT_A_TIME = 2
"""Shards of a stream that are on disk at most."""

SMALL = 200_000_000
"""Bytes of room for everything but shards."""


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
        VerificationError: it is not what its manifest says; nothing was sent.
        PublishError: the Hub refuses; there is no commit, unless it says so.
    """
    seen: dict[str, str] = {}
    if not verified:
        with progress.stage("verify", f"verifying {folder.name}"):
            if problems := verify(folder, trust_remote_code=trust_remote_code, seen=seen):
                raise VerificationError(
                    f"{folder.name} is not published, for it is not whole",
                    found="; ".join(problems),
                )
    manifest, digest = read_manifest_bytes(folder)
    if digest != (verified_one := seen.get(MANIFEST, digest)):
        raise changed(MANIFEST, verified_one, digest)
    warn_of_name(licence_name(read_card(folder / CARD)), place)
    listed = published_files(folder, manifest)
    files = {name: (path, seen.get(name, sha256)) for name, (path, sha256) in listed.items()}
    size = sum(path.stat().st_size for path, _ in files.values())
    with progress.stage("upload", f"uploading {size / 1e6:,.1f} MB to {place.repo_id}"):
        upload, copyable = Upload(place), _untouched(manifest, folder)
        for name, origin in copyable.items():
            file = manifest.files[name]
            upload.copy(name, file.sha256, file.nbytes, origin)
        upload.send({name: file for name, file in files.items() if name not in copyable})
        return upload.commit(manifest.source.name)


def published_files(folder: Path, manifest: Manifest) -> Files:
    """What is published of a checkpoint: what the manifest lists, and what cannot be listed."""
    known = manifest.digests
    own = [name for name in (CARD, MANIFEST, SUMS, SIGNATURE) if (folder / name).is_file()]
    return {n: (folder / n, known.get(n)) for n in (*known, *own)}


def _untouched(manifest: Manifest, folder: Path) -> dict[str, Copyable]:
    """The shards that are those of a source on the Hub, byte for byte."""
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
    """Takes finished shards to the Hub, and commits them in the end.

    Args:
        place: of ``check_rights``.

    Attributes:
        gone: shards that were checked, uploaded and deleted.
        published: what is on the Hub, once it is.
    """

    def __init__(self, place: Publication) -> None:
        self.place = place
        self.gone: set[str] = set()
        self.published: Published | None = None
        self._upload: Upload | None = None
        disable_progress_bars()  # of the client: that of the edit shows what is done

    def room(self, plan: Plan) -> int:
        """Bytes that the output takes on disk at most."""
        sizes = sorted((header.size for header in plan.headers.values()), reverse=True)
        return sum(sizes[:_AT_A_TIME]) + SMALL

    def receiver(
        self, source: Source, edit: Edit, rounding: str, folder: Path, keep_source: bool
    ) -> Receiver:
        """Who is told of each shard that is written to ``folder``."""
        warn_of_name(licence_name(source.card), self.place)
        self._upload = Upload(self.place)
        return _Receiver(self, self._upload, source, edit, rounding, folder, keep_source)

    def commit(self, folder: Path, manifest: Manifest) -> None:
        """Upload what is left in ``folder``, all of it small, and make the commit."""
        assert self._upload is not None
        files = published_files(folder, manifest)
        with progress.stage("publish", f"committing to {self.place.repo_id}"):
            self._upload.send({name: f for name, f in files.items() if name not in self.gone})
            self.published = self._upload.commit(manifest.source.name)

    @contextmanager
    def told(self) -> Iterator[None]:
        """An error of the block names the commit, if it was made by then."""
        try:
            yield
        except ConverterError as error:
            if self.published:
                self.published.stands(error)
            raise


@dataclass(frozen=True, slots=True)
class _Receiver:
    """The ``Receiver`` of a stream. What was uploaded by a run that failed is made again: its
    shards are gone, but the Hub, which may still have them, does not have them sent again."""

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

        A weight in FP8 whose scales are in another shard cannot be: that one may be gone.
        """
        infos = infos_of(self.folder, [shard])
        for record in done.edits:
            if record.requantized and record.requantized.shard != shard:
                progress.warn(f"tensor {record.name} was not read again: its scales are apart")
                continue
            delta = self.edit.tensors[record.name]
            if problems := list(check_edit(self.folder, record, delta, infos, self.rounding)):
                raise VerificationError("what was written is not whole", found="; ".join(problems))


def _origin(source: Source, shard: str, record: ShardRecord, keep_source: bool) -> Copyable | None:
    """Where the Hub has a shard in which nothing changed, if it does."""
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
