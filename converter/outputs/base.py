"""Outputs: ways to write an edit, and to verify the written folder.

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
        folder: to write into; it holds only files that ``receiver`` knows.
        engine: computes the changes.
        keep_source: if not, shards fetched from the Hub are deleted once they are not needed.
        receiver: says first which shards are finished, and gets each finished shard.
        executor: of processes that see the same folders, to edit shards in; None: threads of this
            process edit them. The caller shuts it down.
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
    """The results of writing.

    Attributes:
        shards: shard of the source -> digests of source and output; empty if none was written.
        copies: file name -> record of a copied file.
        made: the same for files that are not copies from the source.
        edits: a record for each edited tensor, in order of layer.
        renamed: shard of the source -> its name in the output, if that is another one.
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
        library: that loads it, by its name on the Hub.
        relation: to its base model, by its name on the Hub.
        implied: other defaults of methods' options with this output.
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
        """Refuse an edit that cannot be written this way, before anything is computed.

        Raises:
            OptionError: naming an alternative.
        """

    def nbytes(self, plan: Plan, footprint: Footprint) -> int:
        """The approximate number of bytes to write, without the small files."""

    def companions(self, names: Iterable[str]) -> list[str]:
        """Names of the source's small files that are copied."""

    def at_a_time(self, source: Source) -> int:
        """The most shards in work at a time."""

    def write(self, job: WriteJob) -> Written:
        """Write everything except the card, the edit's file and the manifest.

        Raises:
            CheckpointError: a shard is malformed or damaged.
            OSError: the folder cannot be written.
        """

    def verify(
        self, folder: Path, manifest: Manifest, damaged: Mapping[str, str], source: Source | None
    ) -> Iterator[str]:
        """A sentence for each fault of an output's weights.

        Args:
            folder: of the output.
            manifest: of it.
            damaged: files with known faults; they are not checked further.
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
    """Flush a file to disk, and return its record."""
    sync(path)
    return FileRecord(sha256=sha256_of(path), nbytes=path.stat().st_size)
