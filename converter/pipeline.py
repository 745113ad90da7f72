"""The whole job, in the order in which it happens."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from converter.activations import Activations
from converter.cache import default_cache
from converter.card import make_card
from converter.engine import Engine
from converter.errors import CheckpointError, OptionError, VerificationError
from converter.fitting import Bench, Fitted, fit
from converter.forward import choose_device, choose_dtype
from converter.hub import check_repo_id
from converter.layout import CARD
from converter.manifest import file_list, make_manifest, measurements, write_manifest
from converter.methods import Method, configure
from converter.mode import choose_forward, needed_weights
from converter.models import stored_dtype
from converter.outputs import check_destination, staged
from converter.outputs.checkpoint import Written, file_entry, write_checkpoint
from converter.pairs import load_pairs, load_prose
from converter.plan import Plan, make_plan
from converter.report import Report
from converter.resolve import resolve
from converter.rows import is_dataset
from converter.run import Run
from converter.source import Source
from converter.stream import Streaming
from converter.subspace import MAX_RANK, SUBSPACE_FILE
from converter.verify import verify
from converter.words import load_words

Evaluation = Callable[[Bench, Fitted, Method], dict[str, Any]]


def convert(
    run: Run,
    destination: Path,
    *,
    overwrite: bool = False,
    keep_source: bool = True,
    workers: int = 0,
    evaluation: Evaluation | None = None,
    cache: Path | None = None,
    memory_limit: int | None = None,
    stream: Streaming | None = None,
    report: Report | None = None,
) -> dict[str, Any]:
    """Convert a checkpoint.

    Args:
        run: what to do.
        destination: a folder that does not exist or is empty.
        overwrite: replace a checkpoint that is already there.
        keep_source: if not, what was fetched from the Hub is deleted as soon as it is edited.
        workers: shards to edit at a time; 0 chooses.
        evaluation: measures the edit before it is written; its results go into the manifest.
        cache: the user's cache folder.
        memory_limit: bytes of memory that forward passes and the edit are planned with, if less
            than all.
        stream: publishes the shards as they are finished; the destination gets all else.
        report: where progress is shown and seconds are kept.

    Returns:
        the manifest that was written.

    Raises:
        ConverterError: one of its children says what is wrong; the destination is as it was.
    """
    report, cache = report or Report(quiet=True), cache or default_cache()
    source, plan, method = prepare(run, cache, report)
    if not keep_source and source.repo is None:
        raise OptionError("--no-keep-source", expected="a source on the Hub", found=run.source)
    if not keep_source and source.repo is not None and not source.repo.sizes:
        raise OptionError(
            "--no-keep-source", expected="a Hub that can be reached",
            found="HF_HUB_OFFLINE, so what is deleted could not be fetched again",
        )  # fmt: skip
    device = choose_device(run.device)
    room = stream.room(plan) if stream else plan.nbytes
    check_destination(destination, overwrite, inputs_of(run, source), room)
    targets = plan.select(method.edit_layers, method.edit_bias)
    engine = Engine(workers, memory_limit, device, run.rounding)
    engine.workers_for(len(source.shards), targets, method.rank or MAX_RANK)  # or it says no now
    words, prose = load_words(run.word_list), load_prose(run.neutral)
    pairs = load_pairs(run.pairs, words, run.num_pairs, run.seed)
    if pairs.skipped:
        report.note(f"  pairs skipped: {pairs.describe_skipped()}")
    bench = Bench.of(run, source, plan, words, device, cache, report, memory_limit=memory_limit)
    if evaluation:
        bench.forward.need_resident()
    fitted = fit(bench, method, pairs, prose)
    results = evaluation(bench, fitted, method) if evaluation else None
    bench.unload()
    with staged(destination, overwrite) as folder:
        with report.stage("edit", f"editing {len(targets)} tensors on {device}"):
            finished = None
            if stream:
                finished = stream.receiver(source, fitted.subspace, run.rounding, folder)
            written = write_checkpoint(
                source, plan, fitted.edit, targets, folder, engine, report, keep_source, finished
            )
            check_unchanged(source, written, fitted.activations, cache, report)
            fitted.subspace.save(folder / SUBSPACE_FILE)
        manifest = make_manifest(run, source, method, pairs, prose, words, fitted, written, device)
        manifest["source"]["originals"] = source.original_files(cache)
        manifest["forward"] = bench.forward.record() if bench.has_run else None
        manifest["evaluation"] = results
        write_records(run, source, written, folder, manifest, report)
        with report.stage("verify", "verifying what was written"):
            gone = stream.gone if stream else ()
            trust = run.trust_remote_code
            if problems := verify(folder, report=report, trust_remote_code=trust, gone=gone):
                raise VerificationError("what was written is not whole", found="; ".join(problems))
        if stream:
            stream.commit(folder, manifest)
    if not keep_source:
        source.drop_originals()
    return manifest


def write_records(
    run: Run,
    source: Source,
    written: Written,
    folder: Path,
    manifest: dict[str, Any],
    report: Report,
) -> None:
    """Write the card and, last of all, the manifest, which is completed with the list of files."""
    card, warnings = make_card(source, run.base_model or source.base, manifest)
    for warning in warnings:
        report.warn(warning)
    (folder / CARD).write_text(card, "utf-8")
    own = {name: file_entry(folder / name) for name in (SUBSPACE_FILE, CARD)}
    manifest |= {"files": file_list(written, own), "measurements": measurements(report)}
    write_manifest(folder, manifest)


def prepare(run: Run, cache: Path, report: Report) -> tuple[Source, Plan, Method]:
    """Everything that can be known without reading a weight.

    Raises:
        SourceError, CheckpointError, OptionError.
    """
    if run.base_model is not None:
        check_repo_id("--base-model", run.base_model)
    with report.stage("plan", f"reading the headers of {run.source}"):
        source = resolve(run.source, cache, run.subfolder)
        asked = run.source.partition("@")[0]
        if source.repo is not None and source.repo.repo_id != asked:
            report.warn(f"{asked} is now called {source.repo.repo_id}")
        plan = make_plan(source.config, source.weight_map, source.headers())
        method = configure(run.method, run.options, plan.dimensions)
        expert_bias = any(
            t.role == "down_proj_bias" and len(t.info.shape) > 1 for t in plan.targets
        )
        if expert_bias and not method.edit_bias:
            raise OptionError(
                "-o bias=keep",
                expected="bias=project for experts with biases",
                found="keep",
                hint="what a mixture gives holds its biases as the router weighs them, so an edit "
                "that keeps them could not be examined",
            )
        return source, plan, method


def inputs_of(run: Run, source: Source) -> list[Path]:
    """Every local file that a run reads."""
    named = [Path(p) for p in (run.pairs, run.neutral, run.word_list, run.activations) if p]
    return [*source.files, *(path for path in named if path.is_file())]


def check_unchanged(
    source: Source, written: Written, seen: Activations, cache: Path, report: Report
) -> None:
    """The shards that were edited must be those that the activations were taken from.

    Raises:
        CheckpointError: naming a shard that is not.
    """
    known: Mapping[str, str] = seen.inputs.get("files", {})
    found = {name: record.source_sha256 for name, record in written.shards.items()}
    if source.originals:
        found = {n: entry["sha256"] for n, entry in source.original_files(cache).items()}
    if not set(found) <= set(known):
        report.warn("the activations do not say which weights they are from; this is not checked")
        return
    for name, digest in found.items():
        if digest != known[name]:
            raise CheckpointError(
                f"{name} is not the file that the activations were taken from",
                expected=f"sha256 {known[name][:16]}...",
                found=f"{digest[:16]}...",
                hint="it changed during the run, or --activations is of another model",
            )


def describe_plan(
    run: Run,
    cache: Path,
    report: Report,
    destination: Path | None = None,
    overwrite: bool = False,
    workers: int = 0,
    memory_limit: int | None = None,
) -> dict[str, Any]:
    """What a conversion would do, from the headers alone. Nothing is written.

    The destination and local files of pairs, prose and words are looked at too.

    Raises:
        ConverterError: as ``convert`` would, as far as it can be known.
    """
    source, plan, method = prepare(run, cache, report)
    words, _ = load_words(run.word_list), load_prose(run.neutral)
    if run.pairs == "builtin" or not is_dataset(run.pairs):
        load_pairs(run.pairs, words, run.num_pairs, run.seed)
    if destination is not None:
        check_destination(destination, overwrite, inputs_of(run, source), plan.nbytes)
    targets = plan.select(method.edit_layers, method.edit_bias)
    device = choose_device(run.device)
    rank, engine = method.rank or MAX_RANK, Engine(workers, memory_limit)
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
        "bytes_to_write": plan.nbytes,
        "originals": [path.name for path in source.originals],
        "copied_files": list(source.companions),
        "device": device,
        "forward": forward.record(),
        "expected_peak_bytes": {
            "forward": needed_weights(plan, dtype, forward.mode),
            "edit": engine.expected_memory(len(source.shards), targets, rank),
        },
    }
