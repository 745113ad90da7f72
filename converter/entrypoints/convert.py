"""The whole job, in the order in which it happens."""

from collections.abc import Callable, Collection
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from converter.calibration.pairs import Pairs, Prose, load_pairs, load_prose
from converter.calibration.word_list import WordList, load_words
from converter.checkpoints.plan import Plan, make_plan
from converter.checkpoints.resolve import resolve
from converter.checkpoints.source import Source
from converter.edits.engine import Engine
from converter.edits.subspace_file import SUBSPACE_FILE
from converter.entrypoints.stream_push import Streaming
from converter.entrypoints.verify import verify
from converter.errors import OptionError, VerificationError
from converter.evaluate.fit import Fitted, fit
from converter.evaluate.gates import Gates
from converter.hub.repos import check_repo_id
from converter.methods.base import Method, configure, targets_of
from converter.methods.subspace import MAX_RANK
from converter.methods.workbench import Bench
from converter.models.resident import choose_device
from converter.outputs.base import OUTPUTS
from converter.outputs.checkpoint.write import Written, file_entry
from converter.outputs.destination import check_destination
from converter.outputs.staging.claim import claimed
from converter.outputs.staging.journal import Journal
from converter.recipe import Run
from converter.release.card import make_card, title_of
from converter.release.licences import terms_of, write_notice
from converter.release.manifest import file_list, make_manifest, measurements, seal, write_manifest
from converter.release.provenance import check_unchanged, files_read
from converter.release.signing import Signer
from converter.runtime import progress

Evaluation = Callable[[Bench, Fitted, Method], dict[str, Any]]
Pictures = Callable[[dict[str, Any], Path], list[Path]]
"""Draws what a manifest says into a folder that holds the subspace; the files drawn."""


def no_pictures(manifest: dict[str, Any], folder: Path) -> list[Path]:
    return []


@progress.recording()
def convert(
    run: Run,
    destination: Path,
    *,
    overwrite: bool = False,
    keep_source: bool = True,
    workers: int = 0,
    evaluation: Evaluation | None = None,
    gates: Gates | None = None,
    pictures: Pictures = no_pictures,
    signer: Signer | None = None,
    memory_limit: int | None = None,
    stream: Streaming | None = None,
) -> dict[str, Any]:
    """Convert a checkpoint.

    Notes and warnings are logged, see ``runtime.progress``; the cache is that of ``using_cache``.

    Args:
        run: what to do.
        destination: a folder that does not exist or is empty.
        overwrite: replace a checkpoint that is already there.
        keep_source: if not, what was fetched from the Hub is deleted as soon as it is edited.
        workers: shards to edit at a time; 0 chooses.
        evaluation: measures the edit before it is written; its results go into the manifest.
        gates: limits on what is measured, beyond the guard's.
        pictures: draws into the new folder what the card then shows.
        signer: signs the folder once it is verified.
        memory_limit: bytes of memory that forward passes and the edit are planned with, if less
            than all.
        stream: publishes the shards as they are finished; the destination gets all else.

    Returns:
        the manifest that was written.

    Raises:
        ConverterError: one of its children says what is wrong; the destination is as it was.
    """
    gates = gates or Gates()
    source, plan, method, _ = prepare_to_write(
        run, destination, overwrite, keep_source, signer, stream
    )
    device = choose_device(run.device)
    targets, output = targets_of(method, plan), OUTPUTS[run.output]
    rank = method.rank or MAX_RANK
    engine = Engine(workers, memory_limit, device, run.rounding)
    engine.workers_for(output.at_a_time(source), targets, rank)  # or it says no now
    told = stream.told() if stream else nullcontext()
    with told, claimed(destination, overwrite) as claim:
        pairs, prose, words = load_texts(run)
        bench = Bench.of(run, source, plan, words, device, memory_limit=memory_limit)
        if evaluation:
            bench.forward.need_resident()
        fitted = fit(bench, method, pairs, prose)
        results = evaluation(bench, fitted, method) if evaluation else None
        bench.unload()
        passed = gates.check_effect(fitted.verdict, results)
        with claim.staged(overwrite) as folder:
            with progress.stage("edit", f"editing {len(targets)} tensors on {device}"):
                receiver = (
                    stream.receiver(source, fitted.subspace, run.rounding, folder, keep_source)
                    if stream
                    else Journal.of(claim, source, fitted.edit, targets, engine)
                )
                written = output.write(
                    source, plan, fitted.edit, targets, folder, engine, keep_source, receiver
                )
                read = files_read(source, plan, written)
                check_unchanged(source, read, fitted.activations)
                passed += gates.check_edits(written.edits)
                fitted.subspace.save(folder / SUBSPACE_FILE)
            manifest = make_manifest(
                run, source, method, pairs, prose, words, fitted, written, read, device
            )
            manifest["source"]["originals"] = source.original_files()
            ran = bench.has_run or run.activations is None  # or has run before
            manifest["forward"] = bench.forward.record() if ran else None
            manifest |= {"evaluation": results, "gates": passed}
            write_records(source, written, folder, manifest, pictures)
            check_whole(run, folder, stream.gone if stream else ())
            if signer:
                with progress.stage("sign", "signing"):
                    signer.sign(folder, title_of(source, manifest))
            if stream:
                stream.commit(folder, manifest)
    if not keep_source:
        source.drop_originals()
    return manifest


def load_texts(run: Run) -> tuple[Pairs, Prose, WordList]:
    """The texts of a fit. Raises DataError or SourceError."""
    words, prose = load_words(run.word_list), load_prose(run.neutral)
    pairs = load_pairs(run.pairs, words, run.num_pairs, run.seed)
    if pairs.skipped:
        progress.note(f"  pairs skipped: {pairs.describe_skipped()}")
    return pairs, prose, words


def check_whole(run: Run, folder: Path, gone: Collection[str] = ()) -> None:
    """Verify what was written, except shards that are gone. Raises VerificationError."""
    with progress.stage("verify", "verifying what was written"):
        trust = run.trust_remote_code
        if problems := verify(folder, trust_remote_code=trust, gone=gone):
            raise VerificationError("what was written is not whole", found="; ".join(problems))


def write_records(
    source: Source,
    written: Written,
    folder: Path,
    manifest: dict[str, Any],
    pictures: Pictures,
) -> None:
    """Complete the manifest with the list of files and write it, then the card, then the sums.

    Each states the sha256 of those before, so no byte of the three can change unnoticed.
    """
    terms = terms_of(source, source.base)
    drawn = [path.relative_to(folder).as_posix() for path in pictures(manifest, folder)]
    made = (SUBSPACE_FILE, *write_notice(terms, folder), *drawn)
    own = {name: file_entry(folder / name) for name in made}
    manifest |= {"files": file_list(written, own), "measurements": measurements()}
    digest = write_manifest(folder, manifest)
    card, warnings = make_card(source, source.base, manifest, terms, digest)
    for warning in warnings:
        progress.warn(warning)
    seal(folder, manifest, card)


def prepare(run: Run) -> tuple[Source, Plan, Method]:
    """Everything that can be known without reading a weight.

    Raises:
        SourceError, CheckpointError, OptionError.
    """
    if run.base_model is not None:
        check_repo_id("--base-model", run.base_model)
    with progress.stage("plan", f"reading the headers of {run.source}"):
        source = resolve(run.source, run.subfolder)
        if run.base_model is not None:
            commit = source.base_commit if run.base_model == source.base else None
            source = replace(source, base=run.base_model, base_commit=commit)
        asked = run.source.partition("@")[0]
        if source.repo is not None and source.repo.repo_id != asked:
            progress.warn(f"{asked} is now called {source.repo.repo_id}")
        plan = make_plan(source.config, source.weight_map, source.headers())
        output = OUTPUTS[run.output]
        method = configure(run.method, run.options, plan.dimensions, output.implied)
        output.check(plan, targets_of(method, plan))
        sparse = set(plan.dimensions.sparse_layers)
        expert_bias = any(bias.layer in sparse for bias in plan.biases("down_proj"))
        if expert_bias and not method.edit_bias:
            raise OptionError(
                "-o bias=keep",
                expected="bias=project for experts with biases",
                found="keep",
                hint="what a mixture gives holds its biases as the router weighs them, so an edit "
                "that keeps them could not be examined",
            )
        return source, plan, method


def prepare_to_write(
    run: Run,
    destination: Path | None,
    overwrite: bool = False,
    keep_source: bool = True,
    signer: Signer | None = None,
    stream: Streaming | None = None,
) -> tuple[Source, Plan, Method, int]:
    """``prepare``, and whether the result can be written; of ``convert`` and of a dry run.

    Returns:
        also the bytes that the disk of the destination must have free.

    Raises:
        SourceError, CheckpointError, OptionError, DestinationError.
    """
    if signer:
        signer.keep_out_of(run.source)
        if stream:
            raise OptionError(
                "--sign", expected="a folder that is whole", found="--stream-to-hub",
                hint="give --push-to-hub alone",
            )  # fmt: skip
    source, plan, method = prepare(run)
    if not keep_source and source.repo is None:
        raise OptionError("--no-keep-source", expected="a source on the Hub", found=run.source)
    if not keep_source and source.repo is not None and not source.repo.sizes:
        raise OptionError(
            "--no-keep-source", expected="a Hub that can be reached",
            found="HF_HUB_OFFLINE, so what is deleted could not be fetched again",
        )  # fmt: skip
    targets, rank = targets_of(method, plan), method.rank or MAX_RANK
    room = stream.room(plan) if stream else OUTPUTS[run.output].nbytes(plan, targets, rank)
    if destination is not None:
        check_destination(destination, overwrite, inputs_of(run, source, signer), room)
    return source, plan, method, room


def inputs_of(run: Run, source: Source, signer: Signer | None = None) -> list[Path]:
    """Every local file that a run reads."""
    named = [Path(p) for p in (run.pairs, run.neutral, run.word_list, run.activations) if p]
    key = [signer.path] if signer else []
    return [*source.files, *(path for path in named if path.is_file()), *key]
