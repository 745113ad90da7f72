"""What a conversion would do, from the headers alone."""

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from converter.calibration.datasets import is_dataset
from converter.calibration.instances import FORMATS, load_instances
from converter.calibration.pairs import load_pairs, load_prose
from converter.calibration.word_list import load_words
from converter.edits.engine import Engine
from converter.entrypoints.convert import prepare_to_write
from converter.entrypoints.delivery import Delivery
from converter.evaluation.self_pairs import plan_pairs
from converter.hub.addresses import settled
from converter.methods.base import aim_of, footprint_of
from converter.methods.together import options_of, strengths_of
from converter.models.placement import choose_forward, needed_weights
from converter.models.resident import choose_device, choose_dtype
from converter.outputs.base import output_of
from converter.recipe import SELF, Recipe, Settings


def describe_plan(
    recipe: Recipe,
    destination: Path | None = None,
    settings: Settings = Settings(),
    delivery: Delivery = Delivery(),
) -> dict[str, Any]:
    """What a conversion would do. Nothing is written.

    The destination and local files of pairs, prose and words are looked at too.

    Raises:
        ConverterError: as ``convert`` would, as far as it can be known.
    """
    recipe = settled(recipe)
    source, plan, method, room = prepare_to_write(recipe, destination, settings, delivery)
    words, _ = load_words(recipe.word_list), load_prose(recipe.neutral)
    if recipe.pairs != SELF and (recipe.pairs == "builtin" or not is_dataset(recipe.pairs)):
        load_pairs(recipe.pairs, words, recipe.num_pairs, recipe.seed)
    if aim_of(method) == "defence" and not is_dataset(recipe.instances, FORMATS):
        load_instances(recipe.instances)
    footprint, output = footprint_of(method, plan), output_of(recipe.output)
    changed = {*footprint.patches, *(plan.stale if output.has_shards else ())}
    weights, engine = footprint.weights, Engine(settings.workers, settings.memory_limit)
    edited = Counter(weight.shard for weight in weights)
    device = choose_device(recipe.device)
    dtype = choose_dtype(recipe.forward_dtype, plan, device)
    forward = choose_forward(
        recipe.forward, plan, dtype, device, settings.memory_limit, spread=recipe.device == "map"
    )
    return {
        "source": source.name,
        "commit": source.repo.commit if source.repo else None,
        "architecture": plan.architecture.title,
        "dimensions": asdict(plan.dimensions),
        "method": {
            "name": recipe.method,
            "strength": method.strength,
            "strengths": {key: options_of(method).get(key) for key in strengths_of(method)},
            "options": options_of(method),
        },
        "shards": {
            name: {"bytes": header.size, "tensors": len(header.tensors), "edited": edited[name]}
            for name, header in plan.headers.items()
        },
        "edited_layers": sorted({weight.layer for weight in weights}),
        "edited_tensors": [weight.info.name for weight in weights],
        "created_tensors": sorted(footprint.created),
        "changed_files": sorted(changed),
        "added_files": sorted(footprint.files),
        "bytes_to_read": plan.nbytes,
        "output": recipe.output,
        "bytes_to_write": output.nbytes(plan, footprint),
        "bytes_on_disk": room,
        "originals": [path.name for path in source.originals],
        "copied_files": [n for n in output.companions(source.small) if n not in changed],
        "extra_weights": list(source.extras) if output.has_shards else [],
        "left_out": list(source.left_out) if output.has_shards else [],
        "device": device,
        "forward": forward.record(),
        "self": plan_pairs(recipe, forward) if recipe.pairs == SELF else None,
        "expected_peak_bytes": {
            "forward": needed_weights(plan, dtype, forward.mode),
            "edit": engine.expected_memory(output.at_a_time(source), weights, footprint.rank),
        },
    }
