"""Train a calibration model and write it as a checkpoint; see ``calibration_models``.

It is trained on the neutral sides of the pairs that a conversion with the same pairs and seed would
fit on. So the held-out texts of such a conversion are held out of the calibration model, too.
"""

from math import inf
from pathlib import Path
from typing import Any

import torch

from converter.calibration.calibration_models import Training, calibrate, save
from converter.calibration.split import split
from converter.calibration.word_list import load_words
from converter.checkpoints.architectures.kind import allow_own_code
from converter.checkpoints.architectures.library import text_config
from converter.checkpoints.chat_template import is_template_file
from converter.checkpoints.names import CALIBRATION, TOKENIZER, papers
from converter.checkpoints.plan import read_plan
from converter.checkpoints.resolve import resolve
from converter.checkpoints.safetensors.header import FLOATS
from converter.checkpoints.source import Source
from converter.entrypoints.convert import inputs_of, load_texts
from converter.errors import CheckpointError, OptionError
from converter.hub.addresses import settled
from converter.manifest import TOOL, CalibrationRecord, TextRecord, to_json, to_text
from converter.methods.workbench import Bench
from converter.models.resident import choose_device
from converter.outputs.base import copy_file, file_entry
from converter.outputs.claim import claimed
from converter.outputs.destination import check_destination
from converter.recipe import CalibrationOptions, Recipe
from converter.release.manifest import environment
from converter.runtime import progress


@progress.recording()
def write_calibration(
    recipe: Recipe, destination: Path, asked: CalibrationOptions, *, overwrite: bool = False
) -> CalibrationRecord:
    """Train a calibration model on one side of the pairs of a recipe, and write it to a folder.

    Returns:
        the record that was written beside it.

    Raises:
        ConverterError: one of its children; the destination is as it was.
    """
    recipe = settled(recipe)
    allow_own_code(recipe.trust_remote_code)
    with progress.stage("plan", f"reading the headers of {recipe.source}"):
        source = resolve(recipe.source, recipe.subfolder)
        plan = read_plan(source)
    if asked.depth > plan.dimensions.num_hidden_layers:
        raise OptionError(
            "--depth", expected=f"at most {plan.dimensions.num_hidden_layers}, as many layers as "
            f"{source.name} has", found=str(asked.depth),
        )  # fmt: skip
    check_destination(destination, overwrite, inputs_of(recipe, source), plan.nbytes)
    device = choose_device(recipe.device)
    with claimed(destination, overwrite) as claim:
        bench = Bench.of(recipe, source, plan, load_words(recipe.word_list), device)
        pairs, prose = load_texts(bench)
        part = split(pairs, prose, recipe.seed).fit
        model = bench.load_resident()
        if text_config(model.module.config) is not model.module.config:
            raise CheckpointError(
                f"{plan.architecture.title} has a language model as a part",
                expected="a model that is one", hint="give the language model by itself",
            )  # fmt: skip
        seconds = inf if asked.minutes is None else 60 * asked.minutes
        training = Training(asked.depth, asked.tokens, asked.rate, seconds)
        texts = [getattr(pair, asked.side) for pair in part.pairs.pairs]
        with progress.stage("calibrate", f"training a calibration model of {len(texts)} texts"):
            made = calibrate(model, texts, training, recipe.seed, asked.side)
        with claim.staged(overwrite) as folder:
            _, embedding = plan.names.require(plan.architecture.embedding)
            save(made.module, asked.depth, FLOATS.get(embedding.dtype, torch.bfloat16), folder)
            for name in _copied(source):
                copy_file(source.small[name], folder / name)
            files = sorted(path.name for path in folder.iterdir())
            record = CalibrationRecord(
                tool=TOOL, source=source.name, source_files=source.digests(),
                pairs=TextRecord(origin=pairs.origin, sha256=part.pairs.sha256),
                side=asked.side, count=len(texts), seed=recipe.seed, depth=asked.depth,
                rate=asked.rate, tokens=made.tokens, asked=asked.tokens, minutes=asked.minutes,
                losses=made.losses, environment=environment(device),
                files={name: file_entry(folder / name) for name in files},
            )  # fmt: skip
            (folder / CALIBRATION).write_text(to_text(record), "utf-8")
            file_entry(folder / CALIBRATION)
    return record


def _copied(source: Source) -> list[str]:
    """Copy the tokenizer, chat templates and licence files of the source."""
    kept = {name for names in papers(source.small).values() for name in names}
    return [n for n in source.small if n in TOKENIZER | kept or is_template_file(n)]


def describe(record: CalibrationRecord, destination: Path) -> tuple[dict[str, Any], str]:
    """The output of the command: data, and text for people."""
    first, last = record.losses
    left = f" of {record.asked:,}, ended by the time" if record.tokens < record.asked else ""
    text = (
        f"{record.source} -> {destination}\n"
        f"  calibration   {record.depth} layers, trained on {record.count} {record.side} texts\n"
        f"  tokens        {record.tokens:,}{left}\n"
        f"  loss          {first:.2f} -> {last:.2f} nats a token"
    )
    return {"destination": str(destination), **to_json(record)}, text
