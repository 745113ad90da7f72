"""The edit as a whole checkpoint."""

from collections.abc import Iterable, Iterator, Mapping
from math import prod
from pathlib import Path

from converter.checkpoints.names import INDEX
from converter.checkpoints.plan import Plan
from converter.checkpoints.source import Source
from converter.edits.base import Footprint
from converter.manifest import Manifest
from converter.outputs.base import WriteJob, Written
from converter.outputs.checkpoint.verify import check_checkpoint
from converter.outputs.checkpoint.write import at_a_time, write_checkpoint


class Checkpoint:
    """The source with the edited bytes replaced."""

    library, relation = "transformers", "finetune"
    implied: Mapping[str, str] = {}
    unused: tuple[str, ...] = ()
    has_shards = True
    own_files: tuple[str, ...] = (INDEX,)

    def check(self, plan: Plan, footprint: Footprint) -> None:
        """Every planned edit can be written as a checkpoint."""

    def nbytes(self, plan: Plan, footprint: Footprint) -> int:
        return plan.nbytes + sum(4 * prod(shape) for shape in footprint.created.values())

    def companions(self, names: Iterable[str]) -> list[str]:
        return list(names)

    def at_a_time(self, source: Source) -> int:
        return at_a_time(source)

    def write(self, job: WriteJob) -> Written:
        return write_checkpoint(job)

    def verify(
        self, folder: Path, manifest: Manifest, damaged: Mapping[str, str], source: Source | None
    ) -> Iterator[str]:
        """See ``outputs.checkpoint.verify``."""
        return check_checkpoint(folder, manifest, damaged, source)
