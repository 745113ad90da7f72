"""What a conversion would do, from the headers alone."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from converter.calibration.datasets import is_dataset
from converter.calibration.pairs import load_pairs, load_prose
from converter.calibration.word_list import load_words
from converter.edits.engine import Engine
from converter.entrypoints.convert import prepare_to_write
from converter.entrypoints.delivery import Delivery
from converter.methods.base import targets_of
from converter.methods.subspace import MAX_RANK
from converter.models.build import stored_dtype
from converter.models.placement import choose_forward, needed_weights
from converter.models.resident import choose_device, choose_dtype
from converter.outputs.base import OUTPUTS
from converter.recipe import Recipe, Settings


def describe_plan(
    recipe: Recipe,
    destination: Path | None = None,
    settings: Settings = Settings(),
    delivery: Delivery = Delivery(),
) -> dict[str, Any]:
    """What a conversion would do, from the headers alone. Nothing is written.

    The destination and local files of pairs, prose and words are looked at too.

    Raises:
        ConverterError: as ``convert`` would, as far as it can be known.
    """
    source, plan, method, room = prepare_to_write(recipe, destination, settings, delivery)
    words, _ = load_words(recipe.word_list), load_prose(recipe.neutral)
    if recipe.pairs == "builtin" or not is_dataset(recipe.pairs):
        load_pairs(recipe.pairs, words, recipe.num_pairs, recipe.seed)
    targets, output = targets_of(method, plan), OUTPUTS[recipe.output]
    rank, engine = method.rank or MAX_RANK, Engine(settings.workers, settings.memory_limit)
    device = choose_device(recipe.device)
    dtype = choose_dtype(recipe.forward_dtype, stored_dtype(plan), device)
    forward = choose_forward(
        recipe.forward, plan, dtype, device, settings.memory_limit, spread=recipe.device == "map"
    )
    return {
        "source": source.name,
        "commit": source.repo.commit if source.repo else None,
        "architecture": plan.architecture.title,
        "dimensions": asdict(plan.dimensions),
        "method": {"name": recipe.method, "options": asdict(method)},  # type: ignore[call-overload]
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
        "output": recipe.output,
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
