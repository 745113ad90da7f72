"""The outputs there are. A new one is a module beside this one, and a line here."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from converter.checkpoints.plan import Plan
from converter.checkpoints.source import Source
from converter.checkpoints.weights import Weight
from converter.edits.base import Edit
from converter.edits.engine import Engine
from converter.outputs.adapter.write import Adapter
from converter.outputs.checkpoint.write import Checkpoint, Written
from converter.outputs.staging.journal import Receiver


class Output(Protocol):
    """What the pipeline needs of an output."""

    @property
    def implied(self) -> Mapping[str, str]:
        """Options of methods that have another default here."""

    @property
    def unused(self) -> tuple[str, ...]:
        """Parameters of the command line that have no effect here."""

    def check(self, plan: Plan, targets: tuple[Weight, ...]) -> None:
        """Refuse what cannot be written this way, before anything is computed.

        Raises:
            OptionError: naming what could be done instead.
        """

    def nbytes(self, plan: Plan, targets: tuple[Weight, ...], rank: int) -> int:
        """What will be written, about; the small files are not counted."""

    def companions(self, source: Source) -> list[str]:
        """The small files of the source that are copied."""

    def at_a_time(self, source: Source) -> int:
        """Shards that may be worked on at a time."""

    def write(
        self,
        source: Source,
        plan: Plan,
        edit: Edit,
        targets: tuple[Weight, ...],
        folder: Path,
        engine: Engine,
        keep_source: bool = True,
        receiver: Receiver | None = None,
    ) -> Written:
        """Write all but the card, the subspace and the manifest.

        Args:
            source: its shards are fetched as they come.
            plan: of that source.
            edit: what happens to ``targets``.
            targets: the tensors that change.
            folder: holds nothing but what ``receiver`` may know.
            engine: how it is computed.
            keep_source: if not, shards fetched from the Hub are deleted once they are not needed.
            receiver: is asked first what is finished, and told of each shard that is.

        Raises:
            CheckpointError: a shard is malformed or damaged.
            OSError: the folder cannot be written.
        """


OUTPUTS: Mapping[str, Output] = {"adapter": Adapter(), "checkpoint": Checkpoint()}
"""Name, as in ``Run.output`` -> the output."""
