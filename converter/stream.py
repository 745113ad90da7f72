"""Publishing shards as they are finished, so that the disk never holds the output.

A shard is rewritten, checked, uploaded and deleted by one worker before it takes the next, and
there are at most ``AT_A_TIME`` workers, so no more shards than that are on disk. The commit comes
last: without it what was uploaded belongs to no repo, and the Hub forgets it.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

from converter.edit import EditRecord
from converter.errors import ConverterError, VerificationError
from converter.licences import licence_name
from converter.outputs.checkpoint import AT_A_TIME, Finished
from converter.plan import Plan
from converter.publication import Publication, warn_of_name
from converter.push import Copyable, Published, Upload, default_message, published_files
from converter.report import Report
from converter.shards import ShardRecord
from converter.source import Source
from converter.subspace import Subspace
from converter.verify_tensors import check_edit, infos_of

SMALL = 200_000_000
"""Bytes of room for everything but shards."""


class Streaming:
    """Takes finished shards to the Hub, and commits them in the end.

    Args:
        place: of ``check_rights``.
        report: for warnings.

    Attributes:
        gone: shards that were checked, uploaded and deleted.
        published: what is on the Hub, once it is.
    """

    def __init__(self, place: Publication, report: Report) -> None:
        self.place, self.report = place, report
        self.gone: set[str] = set()
        self.published: Published | None = None
        self._upload: Upload | None = None
        disable_progress_bars()  # of the client: that of the edit shows what is done

    def room(self, plan: Plan) -> int:
        """Bytes that the output takes on disk at most."""
        sizes = sorted((header.size for header in plan.headers.values()), reverse=True)
        return sum(sizes[:AT_A_TIME]) + SMALL

    def receiver(
        self, source: Source, subspace: Subspace, rounding: str, folder: Path, keep_source: bool
    ) -> Finished:
        """What ``write_checkpoint`` calls for each shard that it has written to ``folder``."""
        warn_of_name(licence_name(source.card), self.place, self.report)
        upload = self._upload = Upload(self.place, self.report)

        def finished(shard: str, record: ShardRecord, edits: Sequence[EditRecord]) -> None:
            path = folder / shard
            self._check(folder, shard, edits, subspace, rounding)
            origin = _origin(source, shard, record, keep_source)
            if origin is not None:
                upload.copy(shard, record.sha256, record.nbytes, origin)
            else:
                upload.send({shard: (path, record.sha256)})
            path.unlink()
            self.gone.add(shard)

        return finished

    def _check(
        self,
        folder: Path,
        shard: str,
        edits: Sequence[EditRecord],
        subspace: Subspace,
        rounding: str,
    ) -> None:
        """Read the edited tensors again, as ``verify`` does.

        A weight in FP8 whose scales are in another shard cannot be: that one may be gone.
        """
        infos = infos_of(folder, [shard])
        for record in edits:
            if record.requantized and record.requantized.shard != shard:
                self.report.warn(f"tensor {record.name} was not read again: its scales are apart")
                continue
            entry = asdict(record) | {"basis": subspace.basis_name(record.layer)}
            basis = subspace.bases[record.layer]
            if problems := list(check_edit(folder, entry, basis, infos, rounding)):
                raise VerificationError("what was written is not whole", found="; ".join(problems))

    def commit(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        """Upload what is left in ``folder``, all of it small, and make the commit."""
        assert self._upload is not None
        files = published_files(folder, manifest)
        with self.report.stage("publish", f"committing to {self.place.repo_id}"):
            self._upload.send({name: f for name, f in files.items() if name not in self.gone})
            self.published = self._upload.commit(default_message(manifest))

    @contextmanager
    def told(self) -> Iterator[None]:
        """An error of the block names the commit, if it was made by then."""
        try:
            yield
        except ConverterError as error:
            if self.published:
                self.published.stands(error)
            raise


def _origin(source: Source, shard: str, record: ShardRecord, keep_source: bool) -> Copyable | None:
    """Where the Hub has a shard in which nothing changed, if it does."""
    repo = source.repo
    if repo is None or source.recipes is not None or record.sha256 != record.source_sha256:
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
