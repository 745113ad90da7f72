"""What a conversion would do, from the headers alone."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from converter.calibration.datasets import is_dataset
from converter.calibration.pairs import load_pairs, load_prose
from converter.calibration.word_list import load_words
from converter.edits.engine import Engine
from converter.entrypoints.convert import prepare_to_write
from converter.entrypoints.stream_push import Streaming
from converter.methods.base import targets_of
from converter.methods.subspace import MAX_RANK
from converter.models.build import stored_dtype
from converter.models.placement import choose_forward, needed_weights
from converter.models.resident import choose_device, choose_dtype
from converter.outputs.base import OUTPUTS
from converter.recipe import Run
from converter.release.signing import Signer


def describe_plan(
    run: Run,
    destination: Path | None = None,
    overwrite: bool = False,
    workers: int = 0,
    memory_limit: int | None = None,
    keep_source: bool = True,
    signer: Signer | None = None,
    stream: Streaming | None = None,
) -> dict[str, Any]:
    """What a conversion would do, from the headers alone. Nothing is written.

    The destination and local files of pairs, prose and words are looked at too.

    Raises:
        ConverterError: as ``convert`` would, as far as it can be known.
    """
    source, plan, method, room = prepare_to_write(
        run, destination, overwrite, keep_source, signer, stream
    )
    words, _ = load_words(run.word_list), load_prose(run.neutral)
    if run.pairs == "builtin" or not is_dataset(run.pairs):
        load_pairs(run.pairs, words, run.num_pairs, run.seed)
    targets, output = targets_of(method, plan), OUTPUTS[run.output]
    rank, engine = method.rank or MAX_RANK, Engine(workers, memory_limit)
    device = choose_device(run.device)
    dtype = choose_dtype(run.forward_dtype, stored_dtype(plan), device)
    forward = choose_forward(
        run.forward, plan, dtype, device, memory_limit, spread=run.device == "map"
    )
    return {
        "source": source.name,
        "commit": source.repo.commit if source.repo else None,
        "architecture": plan.architecture.title,
        "dimensions": asdict(plan.dimensions),
        "method": {"name": run.method, "options": asdict(method)},  # type: ignore[call-overload]
        "shards": {
            name: {
                "bytes": header.size,
                "tensors": len(header.tensors),
                "edited": sum(target.shard == name for target in targets),
            }
            for name, header in plan.headers.items()
        },
        "edited_layers": list(method.edit_layers),
        "edited_tensors": [target.info.name for target in targets],
        "bytes_to_read": plan.nbytes,
        "output": run.output,
        "bytes_to_write": output.nbytes(plan, targets, rank),
        "bytes_on_disk": room,
        "originals": [path.name for path in source.originals],
        "copied_files": output.companions(source),
        "device": device,
        "forward": forward.record(),
        "expected_peak_bytes": {
            "forward": needed_weights(plan, dtype, forward.mode),
            "edit": engine.expected_memory(output.at_a_time(source), targets, rank),
        },
    }
