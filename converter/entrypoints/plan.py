"""Plan a conversion from the headers alone."""

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from converter.calibration.datasets import is_dataset
from converter.calibration.pairs import load_pairs, load_prose
from converter.calibration.word_list import load_words
from converter.edits.engine import Engine
from converter.entrypoints.convert import prepare_to_write
from converter.entrypoints.delivery import Delivery
from converter.entrypoints.estimate import estimate_time, takes_gradients
from converter.evaluation.continuations import Draws
from converter.evaluation.headline import load_headline_prompts, why_nothing_is_drawn
from converter.evaluation.prompts import FORMATS as PROMPT_FORMATS
from converter.evaluation.self_pairs import plan_pairs
from converter.hub.addresses import settled
from converter.methods.base import Method, footprint_of
from converter.methods.together import options_of, strengths_of
from converter.models.placement import choose_forward, margin, needed_weights
from converter.models.resident import choose_device, choose_dtype, held_out_dtype
from converter.outputs.base import output_of
from converter.recipe import SELF, Recipe, Settings, without_folders
from converter.runtime.memory import resident_memory


def describe_plan(
    recipe: Recipe,
    destination: Path | None = None,
    settings: Settings = Settings(),
    delivery: Delivery = Delivery(),
    *,
    time: bool = False,
) -> dict[str, Any]:
    """Say what a conversion would do. Nothing is written.

    Args:
        time: measure how long it would take, for which the model is loaded; see ``estimate``.

    The destination, the instances of a method for defence, and local files of pairs, prose and
    words are checked, too.

    Raises:
        ConverterError: as ``convert`` would, as far as the headers show it.
    """
    recipe = settled(recipe)
    source, plan, method, room = prepare_to_write(recipe, destination, settings, delivery)
    words, _ = load_words(recipe.word_list), load_prose(recipe.neutral)
    if recipe.pairs != SELF and (recipe.pairs == "builtin" or not is_dataset(recipe.pairs)):
        load_pairs(recipe.pairs, words, recipe.num_pairs, recipe.seed)
    footprint, output = footprint_of(method, plan), output_of(recipe.output)
    changed = {*footprint.patches, *(plan.stale if output.has_shards else ())}
    weights, engine = footprint.weights, Engine(settings.workers, settings.memory_limit)
    edited = Counter(weight.shard for weight in weights)
    sizes = sorted((weight.info.nbytes for weight in weights), reverse=True)
    device = choose_device(recipe.device)
    held_out_dtype(recipe.forward_dtype, plan, device)  # refuses what it cannot be
    dtype = choose_dtype(recipe.forward_dtype, plan, device)
    forward = choose_forward(
        recipe.forward, plan, dtype, device, settings.memory_limit, spread=recipe.device == "map"
    )
    weights_of_pass = needed_weights(plan, dtype, forward.mode)
    needs_gradients = takes_gradients(method, plan)
    peak = {
        "process": resident_memory(),
        "weights": weights_of_pass,
        "forward": weights_of_pass + margin(plan, dtype, forward.mode, gradients=needs_gradients),
        "edit": engine.expected_memory(output.at_a_time(source), weights, footprint.rank),
    }
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
        "edited_at_most": footprint.most,
        "edited_bytes_at_most": sum(sizes[: footprint.most]),
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
        "continuations": _continuations(recipe, method, forward.mode),
        "self": plan_pairs(recipe, forward) if recipe.pairs == SELF else None,
        "expected_peak_bytes": {
            **peak,
            "total": peak["process"] + max(peak["forward"], peak["edit"]),
        },
        "time": estimate_time(recipe, source, plan, method, settings) if time else None,
    }


def _continuations(recipe: Recipe, method: Method, mode: str) -> dict[str, Any]:
    """The prompts that the unedited model will continue for the guard, or why there are none.

    The number of prompts in a dataset of the Hub is not known yet.
    """
    if why := why_nothing_is_drawn(recipe, method, mode):
        return {"prompts": 0, "why": why}
    address = recipe.prompts.partition("#")[0]
    known = recipe.prompts == "builtin" or not is_dataset(address, PROMPT_FORMATS)
    count = len(load_headline_prompts(recipe).texts) if known else None
    draws = Draws()
    return {
        "prompts": count,
        "origin": without_folders(recipe.prompts),
        "samples": draws.samples,
        "max_new_tokens": draws.max_new_tokens,
    }
