"""The edit as a LoRA adapter."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from converter.checkpoints.plan import Plan
from converter.checkpoints.source import Source
from converter.edits.base import Footprint
from converter.edits.deltas import RemoveSubspace
from converter.errors import OptionError
from converter.manifest import Manifest
from converter.outputs.adapter.verify import check_adapter
from converter.outputs.adapter.write import CONFIG, LOW_RANK, WEIGHTS, companions, write_adapter
from converter.outputs.base import WriteJob, Written
from converter.outputs.known import UNUSED


class Adapter:
    """A few megabytes, to load on the unchanged source."""

    library, relation = "peft", "adapter"
    implied: Mapping[str, str] = {"bias": "keep"}
    unused: tuple[str, ...] = UNUSED["adapter"]
    has_shards = False
    own_files: tuple[str, ...] = (WEIGHTS, CONFIG)

    def check(self, plan: Plan, footprint: Footprint) -> None:
        """Refuse edits that are not a matrix of low rank added to the weights of Linear or Conv1D
        modules.
        """
        if plan.architecture.is_mixture:
            raise OptionError(
                "--output adapter",
                expected="one feed-forward network in each layer",
                found=f"a mixture of experts ({plan.architecture.title}), whose experts share "
                "parameters in memory that a LoRA of this kind cannot name",
                hint="use --output checkpoint",
            )
        biases = [f"the bias {w.info.name}" for w in footprint.weights if w.is_bias][:1]
        if biases and any(issubclass(kind, RemoveSubspace) for kind in footprint.kinds):
            raise OptionError(
                "-o bias=project",
                expected="bias=keep with --output adapter, since a LoRA changes no bias",
                found="project, and a model with biases",
                hint="leave the option out, or use --output checkpoint",
            )
        others = [kind.kind for kind in footprint.kinds if kind not in LOW_RANK]
        others += biases
        others += [f"the new tensor {name}" for name in sorted(footprint.created)[:1]]
        others += [f"the file {name}" for name in (*footprint.patches, *footprint.files)]
        if others:
            raise OptionError(
                "--output adapter", expected="an edit of low rank, which is all that a LoRA holds",
                found=f"an edit with {others[0]}", hint="use --output checkpoint",
            )  # fmt: skip

    def nbytes(self, plan: Plan, footprint: Footprint) -> int:
        return sum(4 * footprint.rank * sum(w.info.shape) for w in footprint.weights)

    def companions(self, names: Iterable[str]) -> list[str]:
        """The licence files; config and tokenizer stay with the source."""
        return companions(names)

    def at_a_time(self, source: Source) -> int:
        return 1

    def write(self, job: WriteJob) -> Written:
        return write_adapter(job)

    def verify(
        self, folder: Path, manifest: Manifest, damaged: Mapping[str, str], source: Source | None
    ) -> Iterator[str]:
        """See ``outputs.adapter.verify``."""
        return check_adapter(folder, manifest, damaged, source)
