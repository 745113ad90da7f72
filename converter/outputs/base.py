"""What an output is: a way to write an edit, and to verify what was written.

An output is a package beside this module and a line in ``OUTPUTS``, or an installed package with an
entry point in the group ``gloss_convert.outputs``.
"""

import hashlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from torch import Tensor

from converter.checkpoints.plan import Plan
from converter.checkpoints.safetensors.header import to_bytes
from converter.checkpoints.safetensors.rewrite import ShardRecord
from converter.checkpoints.source import Source
from converter.checkpoints.weights import Weight
from converter.edits.base import Edit, Footprint
from converter.edits.engine import Engine
from converter.errors import CheckpointError
from converter.manifest import CreatedTensor, EditedTensor, FileRecord, Manifest
from converter.outputs.journal import Receiver
from converter.outputs.known import OUTPUTS
from converter.runtime.cache import sha256_of, sync


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteJob:
    """One writing.

    Attributes:
        source: its shards are fetched as they come.
        plan: of that source.
        edit: what changes.
        folder: holds nothing but what ``receiver`` may know.
        engine: how it is computed.
        keep_source: if not, shards fetched from the Hub are deleted once they are not needed.
        receiver: is asked first what is finished, and told of each shard that is.
        executor: of processes that see the same folders, to edit shards in; None: threads of this
            one do. Who gives it shuts it down.
    """

    source: Source
    plan: Plan
    edit: Edit
    folder: Path
    engine: Engine
    keep_source: bool = True
    receiver: Receiver | None = None
    executor: Executor | None = None

    @property
    def weights(self) -> tuple[Weight, ...]:
        """The tensors that change."""
        return tuple(self.plan.find(self.edit.tensors).values())


@dataclass(frozen=True, slots=True)
class Written:
    """What was written.

    Attributes:
        shards: shard of the source -> digests of source and output; empty if none was written.
        copies: file name -> a file that was copied.
        made: the same, of a file that the source lacks or that is not a copy of it.
        edits: a record for each edited tensor, in order of layer.
        renamed: shard of the source -> its name in the output, where that is another.
        extra: name of the shard of created tensors -> its record; empty if there is none.
        created: those tensors.
    """

    shards: Mapping[str, ShardRecord]
    copies: Mapping[str, FileRecord]
    made: Mapping[str, FileRecord]
    edits: tuple[EditedTensor, ...]
    renamed: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, FileRecord] = field(default_factory=dict)
    created: tuple[CreatedTensor, ...] = ()


class Output(Protocol):
    """A way to write an edit.

    Attributes:
        library: that loads it, as the Hub calls it.
        relation: what it is to its base model, as the Hub calls it.
        implied: options of methods that have another default here.
        unused: parameters of the command line that have no effect here.
        has_shards: whether it holds every tensor of the model, in shards like those of the source.
        own_files: names of the files that it writes beside shards and copies.
    """

    library: str
    relation: str
    implied: Mapping[str, str]
    unused: tuple[str, ...]
    has_shards: bool
    own_files: tuple[str, ...]

    def check(self, plan: Plan, footprint: Footprint) -> None:
        """Refuse what cannot be written this way, before anything is computed.

        Raises:
            OptionError: naming what could be done instead.
        """

    def nbytes(self, plan: Plan, footprint: Footprint) -> int:
        """What will be written, about; the small files are not counted."""

    def companions(self, names: Iterable[str]) -> list[str]:
        """Which of the source's small files, by name, are copied."""

    def at_a_time(self, source: Source) -> int:
        """Shards that may be worked on at a time."""

    def write(self, job: WriteJob) -> Written:
        """Write all but the card, the edit's file and the manifest.

        Raises:
            CheckpointError: a shard is malformed or damaged.
            OSError: the folder cannot be written.
        """

    def verify(
        self, folder: Path, manifest: Manifest, damaged: Mapping[str, str], source: Source | None
    ) -> Iterator[str]:
        """What is wrong with the weights of an output, a sentence each.

        Args:
            folder: of the output.
            manifest: of it.
            damaged: files that are known to be wrong, and how; nothing more is said of them.
            source: that it was made from, to compare with.
        """


def output_of(name: str) -> Output:
    """An output by its name. Raises OptionError if there is none, or its package is broken."""
    kind = OUTPUTS.load(name)
    if not callable(kind):
        raise OUTPUTS.fault(name, f"it is a {type(kind).__name__}, not a class")
    output: Output = kind()
    OUTPUTS.check(name, output)
    return output


def copy_file(source: Path, target: Path) -> FileRecord:
    """Copy a small file and flush it to disk."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        reading = source.open("rb")
    except OSError as error:
        raise CheckpointError(f"{source.name} cannot be read", found=error.strerror) from error
    with reading, target.open("xb") as writing:
        shutil.copyfileobj(reading, writing)
    return file_entry(target)


def make_file(target: Path, content: bytes) -> FileRecord:
    """Write a small file and flush it to disk."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("xb") as writing:
        writing.write(content)
    return file_entry(target)


def sha256_of_tensor(tensor: Tensor) -> str:
    """Of its bytes, as a file has them."""
    return hashlib.sha256(to_bytes(tensor)).hexdigest()


def file_entry(path: Path) -> FileRecord:
    """Flush a file to disk; its record."""
    sync(path)
    return FileRecord(sha256=sha256_of(path), nbytes=path.stat().st_size)
