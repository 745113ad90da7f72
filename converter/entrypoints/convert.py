"""The whole job, in the order in which it happens."""

from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from msgspec import structs

from converter.calibration.instances import load_instances
from converter.calibration.pairs import (
    Pairs,
    Prose,
    check_drawn,
    describe_skipped,
    load_prose,
)
from converter.calibration.word_list import WordList, load_words
from converter.checkpoints.architectures.kind import allow_own_code
from converter.checkpoints.fusing import CODE
from converter.checkpoints.names import EDIT_FILE, QUANTIZED
from converter.checkpoints.plan import Plan, read_plan
from converter.checkpoints.resolve import resolve
from converter.checkpoints.source import Source
from converter.edits.base import Edit, Footprint
from converter.edits.edit_file import save_edit
from converter.edits.engine import Engine
from converter.entrypoints.calibration import check_calibration, check_forward
from converter.entrypoints.delivery import Delivery, Pictures
from converter.entrypoints.verify import verify
from converter.errors import CheckpointError, OptionError, VerificationError
from converter.evaluation.fit import Fitted, check_instances, fit
from converter.evaluation.headline import load_headline_prompts, why_nothing_is_drawn
from converter.evaluation.samples import samples_of
from converter.evaluation.search import with_kept
from converter.evaluation.self_pairs import is_same_draw, pairs_of
from converter.hub.addresses import repo_named, settled
from converter.manifest import Evaluation, GateRecord, Manifest, SampleRecord
from converter.methods.base import Method, aim_of, footprint_of
from converter.methods.known import SEPARATOR
from converter.methods.options import configure
from converter.methods.together import check_shared
from converter.methods.workbench import Bench
from converter.models.loading import check_relabelled
from converter.models.resident import choose_device
from converter.outputs.base import Output, WriteJob, Written, file_entry, output_of
from converter.outputs.checkpoint.additions import (
    Shards,
    additions_of,
    check_additions,
    check_edit,
)
from converter.outputs.claim import Claim, claimed
from converter.outputs.cluster import RayExecutor, joined
from converter.outputs.destination import check_destination
from converter.outputs.journal import Journal
from converter.recipe import SELF, Recipe, Settings
from converter.release.card import make_card, title_of
from converter.release.licences import terms_of, write_notice
from converter.release.manifest import (
    check_unchanged,
    file_list,
    files_read,
    make_manifest,
    measurements,
    seal,
    write_manifest,
)
from converter.release.signing import Signer
from converter.runtime import progress
from converter.text import few


@progress.recording()
def convert(
    recipe: Recipe,
    destination: Path,
    settings: Settings = Settings(),
    delivery: Delivery = Delivery(),
) -> Manifest:
    """Convert a checkpoint into a folder that does not exist or is empty.

    Returns:
        the manifest that was written.

    Raises:
        ConverterError: one of its children says what is wrong; the destination is as it was.
    """
    recipe = settled(recipe)
    stream, keep_source = delivery.stream, settings.keep_source
    source, plan, method, _ = prepare_to_write(recipe, destination, settings, delivery)
    device = choose_device(recipe.device)
    footprint, output = footprint_of(method, plan), output_of(recipe.output)
    if output.has_shards:
        _tell_of_others(source)
    engine = Engine(settings.workers, settings.memory_limit, device, recipe.rounding)
    most = output.at_a_time(source)
    engine.workers_for(most, footprint.weights, footprint.rank)  # refused now
    told = stream.told() if stream else nullcontext()
    bench = Bench.of(recipe, source, plan, load_words(recipe.word_list), device, settings)
    with (
        told,
        claimed(destination, delivery.overwrite) as claim,
        _edited_by(settings, output, device, source, claim) as executor,
        bench.keeping(),
    ):
        if executor:
            engine = replace(engine, workers=settings.workers or executor.workers)
        pairs, prose, fitted, measured = _examined(bench, method, delivery)
        footprint.check(fitted.edit)
        if output.has_shards:
            fitted = replace(fitted, edit=fitted.edit.and_patch(plan.stale))
        edit = fitted.edit
        check_edit(edit, plan, source)
        patch = edit.patches.get("config.json", {})
        if CODE not in edit.files:
            check_relabelled(source, patch, recipe.trust_remote_code)
        with claim.staged(delivery.overwrite) as folder:
            with progress.stage("edit", f"editing {len(edit.tensors)} tensors on {device}"):
                job = WriteJob(
                    source=source, plan=plan, edit=edit, folder=folder, engine=engine,
                    keep_source=keep_source, executor=executor,
                    receiver=stream.receiver(source, edit, recipe.rounding, folder, keep_source)
                    if stream
                    else Journal.of(claim, source, edit, engine),
                )  # fmt: skip
                written = output.write(job)
                _check_changed(written, edit)
                read = files_read(job, written)
                if fitted.activations:
                    check_unchanged(source, read, fitted.activations)
                passed = measured.gates + delivery.gates.check_edits(written.edits)
                layers = {tensor.name: tensor.layer for tensor in written.edits}
                save_edit(folder / EDIT_FILE, edit, layers, fitted.proposal.tensors)
            manifest = make_manifest(bench, method, pairs, prose, fitted, written, read)
            found = delivery.search and with_kept(delivery.search, fitted.guard)
            manifest = structs.replace(
                manifest, evaluation=measured.evaluation, gates=passed, samples=measured.samples,
                search=found,
            )  # fmt: skip
            manifest = write_records(source, written, folder, manifest, delivery.pictures)
            check_whole(recipe, folder, stream.gone if stream else ())
            if delivery.signer:
                with progress.stage("sign", "signing"):
                    delivery.signer.sign(folder, title_of(source, manifest))
            if stream:
                stream.commit(folder, manifest)
    if not keep_source:
        source.drop_originals()
    return manifest


class _Measured(NamedTuple):
    """The measurements of an edit other than the guard's; the fields are those of ``Manifest``."""

    evaluation: Evaluation | None
    gates: tuple[GateRecord, ...]
    samples: tuple[SampleRecord, ...]


def _examined(
    bench: Bench, method: Method, delivery: Delivery
) -> tuple[Pairs, Prose, Fitted, _Measured]:
    """The texts, the edit that was fitted to them, and its measurements; the model is released.

    Raises ConverterError: one of its children.
    """
    if why_nothing_is_drawn(bench.recipe, method, bench.forward.mode) is None:
        load_headline_prompts(bench.recipe)  # refused before the model draws pairs
    if delivery.evaluation:
        bench.forward.need_resident()
    measure = delivery.evaluation(bench) if delivery.evaluation else None
    pairs, prose = load_texts(bench)
    fitted = fit(bench, method, pairs, prose)
    results = measure(fitted, method) if measure else None
    passed = delivery.gates.check_effect(fitted.guard, results)
    samples = samples_of(bench, method, fitted)
    bench.unload()
    return pairs, prose, fitted, _Measured(results, passed, samples)


def _edited_by(
    settings: Settings, output: Output, device: str, source: Source, claim: Claim
) -> AbstractContextManager[RayExecutor | None]:
    """Who edits shards, if not threads of this process. Raises as ``joined``."""
    if settings.engine == "local" or not output.has_shards:
        return nullcontext()
    return joined(settings.ray_address, device, source, claim.part)


def _check_changed(written: Written, edit: Edit) -> None:
    """Warn if rounding undid most of an edit. Edits that remove a subspace are not checked.

    Raises CheckpointError if no edited tensor has changed: the output would only look edited.
    """
    created = any(bool(tensor.any()) for tensor in edit.created.values())
    if written.edits and not created and not any(e.relative_change for e in written.edits):
        raise CheckpointError(
            "the edit changes no number of the model", expected="a change that survives rounding",
            found=f"{len(written.edits)} unchanged tensors",
            hint="raise the strength",
        )  # fmt: skip
    lost = [e for e in written.edits if e.rounding_error > e.relative_change]
    lost = [e for e in lost if edit.tensors[e.name].protects is None]
    if lost:
        progress.warn(
            f"rounding to {lost[0].dtype} undid most of the edit of {len(lost)} of "
            f"{len(written.edits)} tensors, such as {lost[0].name}; raise the strength"
        )


def load_texts(bench: Bench) -> tuple[Pairs, Prose]:
    """The texts of a fit. Raises as ``pairs_of`` does."""
    prose, pairs = load_prose(bench.recipe.neutral), pairs_of(bench, bench.recipe.seed)
    if pairs.skipped:
        progress.note(f"  pairs skipped: {describe_skipped(pairs.skipped)}")
    return pairs, prose


def other_texts(
    manifest: Manifest, recipe: Recipe, pairs: Pairs | None, prose: Prose, words: WordList
) -> list[str]:
    """The texts whose sha256 is not the recorded one.

    ``pairs`` are None if the model would have to draw them: then the record of the draw counts.
    Raises DataError, SourceError or OptionError.
    """
    found = {"neutral": prose.sha256, "word_list": words.sha256}
    if pairs is not None:
        found["pairs"] = pairs.sha256
    elif not is_same_draw(manifest, recipe):
        found["pairs"] = ""
    if manifest.instances is not None:
        found["instances"] = load_instances(recipe.instances).sha256
    if manifest.prompts is not None:
        found["prompts"] = load_headline_prompts(recipe).sha256
    return [name for name in found if found[name] != getattr(manifest, name).sha256]


def check_whole(recipe: Recipe, folder: Path, gone: Collection[str] = ()) -> None:
    """Verify the output, except uploaded shards. Raises VerificationError."""
    with progress.stage("verify", "verifying what was written"):
        trust = recipe.trust_remote_code
        if problems := verify(folder, trust_remote_code=trust, gone=gone):
            raise VerificationError("the written folder is damaged", found="; ".join(problems))


def write_records(
    source: Source, written: Written, folder: Path, manifest: Manifest, pictures: Pictures | None
) -> Manifest:
    """Complete the manifest with the list of files and write it, then the card, then the sums.

    Each states the sha256 of the former ones, so that every changed byte shows.
    """
    terms = terms_of(source, source.base)
    drawn = pictures(manifest, folder) if pictures else []
    pictured = [path.relative_to(folder).as_posix() for path in drawn]
    made = (EDIT_FILE, *write_notice(terms, folder), *pictured)
    own = {name: file_entry(folder / name) for name in made}
    files = file_list(written, own)
    manifest = structs.replace(manifest, files=files, measurements=measurements())
    digest = write_manifest(folder, manifest)
    card, warnings = make_card(source, source.base, manifest, terms, digest)
    for warning in warnings:
        progress.warn(warning)
    seal(folder, manifest, card)
    return manifest


def prepare(recipe: Recipe) -> tuple[Source, Plan, Method]:
    """Everything known without reading a weight. Raises SourceError, CheckpointError or
    OptionError.
    """
    if recipe.base_model is not None:
        repo_named("--base-model", recipe.base_model)
    allow_own_code(recipe.trust_remote_code)
    with progress.stage("plan", f"reading the headers of {recipe.source}"):
        source = resolve(recipe.source, recipe.subfolder)
        if recipe.base_model is not None:
            if recipe.output == "adapter" and source.base not in (None, recipe.base_model):
                raise OptionError(
                    "--base-model", expected=f"{source.base}, the repo of SOURCE, or none",
                    found=recipe.base_model, hint="an adapter is for the model it was made from",
                )  # fmt: skip
            commit = source.base_commit if recipe.base_model == source.base else None
            source = replace(source, base=recipe.base_model, base_commit=commit)
        _warn_of_language(recipe, source)
        plan = read_plan(source)
        _check_head(plan)
        for name in plan.stale:
            progress.warn(
                f"{name} names a quantization, but no tensor is quantized; the model is read as it "
                f"is stored, and the {name} of a written checkpoint does not name one"
            )
        if plan.scheme is None and (named := QUANTIZED & {*source.companions}):
            progress.warn(
                f"{', '.join(sorted(named))}: names a quantization that no tensor has, and is "
                "copied unchanged; readers such as vLLM may rely on it, so delete it"
            )
        _tell_of_layers(plan)
        output = output_of(recipe.output)
        output.check(plan, Footprint())  # refuses the model, before a method refuses its options
        method = configure(recipe.method, recipe.options, plan.dimensions, output.implied)
        check_drawn(recipe)
        if recipe.activations is not None and SEPARATOR in recipe.method:
            raise OptionError("--activations", expected="a single method", found=recipe.method)
        footprint = footprint_of(method, plan)
        check_shared(recipe.method, method, plan)
        output.check(plan, footprint)
        check_additions(footprint.created, plan, source.config)
        check_calibration(recipe, source, plan, footprint)
        for _, names, _, patch in additions_of(plan) if footprint.created else ():
            if footprint.created.keys() & {*names}:
                check_relabelled(source, patch, recipe.trust_remote_code)
        return source, plan, method


def _check_head(plan: Plan) -> None:
    """Raise CheckpointError if the config says that the head is a weight of its own, and it is
    missing.
    """
    head = plan.architecture.head
    if head and plan.names.find(head.weight) is None:
        raise CheckpointError(
            "config.json says that the head is a weight of its own",
            expected=f"a tensor {plan.names.on_disk(head.weight)}", found="none",
            hint="get an intact copy; if the head is the embedding, set tie_word_embeddings to "
            "true in every part of config.json",
        )  # fmt: skip


def _tell_of_layers(plan: Plan) -> None:
    """Report layers without an FFN, and layers of the checkpoint that the model does not use."""
    sizes = plan.dimensions
    if left := sizes.without_ffn:
        named = few([str(layer) for layer in left])
        idle = ", or which text alone does not run through" if sizes.idle_layers else ""
        progress.note(f"  layers without a feed-forward network{idle}, left alone: {named}")
    if also := plan.architecture.left_alone:
        progress.note(f"  not edited, though they write into the residual stream: {also}")
    if sizes.unused_layers:
        progress.note(
            f"  layers after the last, for predicting several tokens at once: up to "
            f"{sizes.unused_layers}, copied as they are"
        )


def _warn_of_language(recipe: Recipe, source: Source) -> None:
    """Warn if built-in English texts are used for a model of other languages."""
    said = source.card.get("language") or []
    languages = [said] if isinstance(said, str) else said
    english = ("en", "eng", "english", "multilingual", "mul")
    texts = ("pairs", "word_list", "neutral", "prompts")
    given = {name.replace("_", "-"): getattr(recipe, name) for name in texts}
    if recipe.pairs == SELF:
        given["self-prompts"] = recipe.self_prompts
    flags = ", ".join(f"--{name}" for name, value in given.items() if value == "builtin")
    known = any(name.lower().replace("_", "-").partition("-")[0] in english for name in languages)
    if flags and languages and not known:
        progress.warn(
            f"the card says that the model's language is {', '.join(languages[:5])}, and the "
            f"built-in texts are English; give {flags}"
        )


def prepare_to_write(
    recipe: Recipe, destination: Path | None, settings: Settings, delivery: Delivery
) -> tuple[Source, Plan, Method, int]:
    """``prepare``, and the number of bytes that must be free at the destination.

    Raises:
        SourceError, CheckpointError, OptionError, DestinationError: it cannot be converted or
            written.
        DataError, FitError: the instances of a method for defence cannot be used.
    """
    signer, stream = delivery.signer, delivery.stream
    if signer:
        signer.keep_out_of(recipe.source)
        if stream:
            raise OptionError(
                "--sign", expected="a folder with all its files", found="--stream-to-hub",
                hint="give --push-to-hub alone",
            )  # fmt: skip
    source, plan, method = prepare(recipe)
    check_forward(recipe, settings, plan, method)
    if not settings.keep_source and source.remote is None:
        raise OptionError(
            "--no-keep-source", expected="a source on the Hub or in a store", found=recipe.source
        )
    if not settings.keep_source and source.remote is not None and not source.remote.sizes:
        raise OptionError(
            "--no-keep-source", expected="a repo by its name, and a Hub that can be reached",
            found="the client's cache alone, so what is deleted could not be fetched again",
        )  # fmt: skip
    footprint = footprint_of(method, plan)
    delivery.gates.require_defence(measured=recipe.guard and aim_of(method) == "defence")
    delivery.gates.require_subspace({kind.kind for kind in footprint.kinds})
    if stream and Shards.of(source.shards, bool(footprint.created)).renamed:
        raise OptionError(
            "--stream-to-hub", expected="a source in shards, since the method creates tensors",
            found=f"the single file {source.shards[0]}", hint="give --push-to-hub alone",
        )  # fmt: skip
    output = output_of(recipe.output)
    copied = source.nbytes_of_extras if output.has_shards else 0
    room = copied + (stream.room(plan) if stream else output.nbytes(plan, footprint))
    if destination is not None:
        inputs = inputs_of(recipe, source, signer)
        overwrite = delivery.overwrite or delivery.scratch
        check_destination(destination, overwrite, inputs, room)
    check_instances(recipe, method, examined=recipe.guard)
    return source, plan, method, room


def _tell_of_others(source: Source) -> None:
    """Report which other files of the source are copied, and which are left out."""
    if source.extras:
        progress.note(f"  copied and not edited: {few(source.extras)}")
    if source.left_out:
        progress.note(f"  left out: {few(source.left_out)}")


def inputs_of(recipe: Recipe, source: Source, signer: Signer | None = None) -> list[Path]:
    """Every local file that a run reads."""
    texts = (
        recipe.pairs, recipe.instances, recipe.neutral, recipe.word_list, recipe.activations,
        *(place for name in (recipe.prompts, recipe.self_prompts)
          for place in (name, name.partition("#")[0])),
    )  # fmt: skip
    named = [Path(place) for place in texts if place]
    key = [signer.path] if signer else []
    return [*source.files, *(path for path in named if path.is_file()), *key]
