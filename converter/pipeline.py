"""The whole job, in the order in which it happens."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from converter import source as sources
from converter.activations import (
    Activations,
    activation_inputs,
    cache_key,
    extract,
    load_activations,
    save_activations,
    texts_of_file,
)
from converter.cache import default_cache
from converter.card import make_card
from converter.edit import Projection
from converter.errors import CheckpointError, DataError, VerificationError
from converter.forward import choose_device, choose_dtype, load_model, load_tokenizer
from converter.header import FLOATS
from converter.hub import check_repo_id
from converter.manifest import file_list, make_manifest, measurements, write_manifest
from converter.methods import Method, configure
from converter.outputs import check_destination, staged
from converter.outputs.checkpoint import Written, file_entry, write_checkpoint
from converter.pairs import Pairs, Prose, load_pairs, load_prose
from converter.plan import Plan, edit_memory, make_plan
from converter.report import Report
from converter.rows import is_dataset
from converter.run import Run
from converter.source import CARD, Source
from converter.subspace import SUBSPACE_FILE
from converter.verify import verify
from converter.vocabulary import Vocabulary
from converter.words import WordList, load_words


def convert(
    run: Run,
    destination: Path,
    *,
    overwrite: bool = False,
    cache: Path | None = None,
    report: Report | None = None,
) -> dict[str, Any]:
    """Convert a checkpoint.

    Args:
        run: what to do.
        destination: a folder that does not exist or is empty.
        overwrite: replace a checkpoint that is already there.
        cache: the user's cache folder.
        report: where progress is shown and seconds are kept.

    Returns:
        the manifest that was written.

    Raises:
        ConverterError: one of its children says what is wrong; the destination is as it was.
    """
    report, cache = report or Report(quiet=True), cache or default_cache()
    source, plan, method = prepare(run, cache, report)
    device = choose_device(run.device)
    check_destination(destination, overwrite, inputs_of(run, source), plan.nbytes)
    words, prose = load_words(run.word_list), load_prose(run.neutral)
    pairs = load_pairs(run.pairs, words, run.num_pairs, run.seed)
    if run.activations is not None:
        pairs, prose = texts_of_file(run.activations, pairs, prose, report)
    if pairs.skipped:
        report.note(f"  pairs skipped: {pairs.describe_skipped()}")
    if source.repo:
        with report.stage("fetch", f"fetching the weights of {source.name}"):
            source.fetch()
    with report.stage("activations", f"activations of {len(pairs.pairs) or 'unknown'} pairs"):
        seen = activations_of(run, source, plan, method, pairs, prose, device, cache, report)
    with report.stage("fit", f"fitting {run.method}"):
        vocabulary = Vocabulary(plan, source.folder, load_tokenizer(source.folder))
        warn_about_words(method, vocabulary, words, report)
        subspace = method.fit(seen, vocabulary.decode, words)
    edit = Projection(subspace.bases, method.edit_bias)
    targets = plan.select(method.edit_layers, method.edit_bias)
    with staged(destination, overwrite) as folder:
        with report.stage("edit", f"editing {len(targets)} tensors on {device}"):
            written = write_checkpoint(source, plan, edit, targets, folder, device, report)
            check_unchanged(written, seen, report)
            subspace.save(folder / SUBSPACE_FILE)
        manifest = make_manifest(
            run, source, method, pairs, prose, words, seen, subspace, written, device
        )
        write_records(run, source, written, folder, manifest, report)
        with report.stage("verify", "verifying what was written"):
            if problems := verify(folder, report=report):
                raise VerificationError("what was written is not whole", found="; ".join(problems))
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
        source = sources.resolve(run.source, cache)
        plan = make_plan(source.config, source.weight_map, source.headers())
        return source, plan, configure(run.method, run.options, plan.dimensions)


def inputs_of(run: Run, source: Source) -> list[Path]:
    """Every local file that a run reads."""
    named = [Path(p) for p in (run.pairs, run.neutral, run.word_list, run.activations) if p]
    return [*source.files, *(path for path in named if path.is_file())]


def stored_dtype(plan: Plan) -> torch.dtype:
    """That of the down-projections."""
    return FLOATS[plan.targets[0].info.dtype]


def activations_of(
    run: Run,
    source: Source,
    plan: Plan,
    method: Method,
    pairs: Pairs,
    prose: Prose,
    device: str,
    cache: Path,
    report: Report,
) -> Activations:
    """From the file that was given, from the cache, or from a forward pass."""
    request, hidden_size = method.request, plan.dimensions.hidden_size
    if run.activations is not None:
        return load_activations(run.activations, request, hidden_size)
    dtype = choose_dtype(run.forward_dtype, stored_dtype(plan), device)
    inputs = activation_inputs(
        source.digests(cache),
        plan.architecture,
        pairs,
        prose,
        request,
        device=device,
        dtype=str(dtype).removeprefix("torch."),
        batch_size=run.batch_size,
    )
    path = cache / "activations" / f"{cache_key(inputs)}.safetensors"
    if path.exists():
        try:
            found = load_activations(path, request, hidden_size)
        except DataError as error:
            report.warn(f"the cached {error}; running the model again")
        else:
            report.note(f"  cache hit, no forward pass: {path}")
            return found
    report.note("  cache miss, running the model")
    tokenizer = load_tokenizer(source.folder)
    needed = plan.num_parameters * dtype.itemsize
    model = load_model(source.folder, dtype, device, needed)
    total = 2 * len(pairs.pairs)
    total += len(prose.paragraphs) if request.second_moment else 0
    with report.bar("forward", total, "text") as bar:
        seen, dropped = extract(
            model,
            tokenizer,
            plan.architecture,
            request,
            pairs,
            prose,
            device=device,
            batch_size=run.batch_size,
            advance=bar.update,
        )
    if dropped:
        report.warn(f"{dropped} pairs have no token that predicts a toxic one and were left out")
    seen = replace(seen, inputs=inputs)
    save_activations(seen, path)
    report.note(f"  kept in {path}")
    return seen


def warn_about_words(
    method: Method, vocabulary: Vocabulary, words: WordList, report: Report
) -> None:
    """A ranking by vocabulary is worth little if the vocabulary splits the listed words."""
    if getattr(method, "ranking", None) != "vocabulary":
        return
    share = vocabulary.single_token_share(words)
    if share < 0.5:
        report.warn(
            f"only {share:.0%} of the word list are single tokens of this model, so ranking by "
            "vocabulary says little; -o ranking=mean-difference does not depend on it"
        )


def check_unchanged(written: Written, seen: Activations, report: Report) -> None:
    """The shards that were edited must be those that the activations were taken from.

    Raises:
        CheckpointError: naming a shard that is not.
    """
    known: Mapping[str, str] = seen.inputs.get("files", {})
    if not set(written.shards) <= set(known):
        report.warn("the activations do not say which shards they are from; this is not checked")
        return
    for name, record in written.shards.items():
        if record.source_sha256 != known[name]:
            raise CheckpointError(
                f"{name} is not the file that the activations were taken from",
                expected=f"sha256 {known[name][:16]}...",
                found=f"{record.source_sha256[:16]}...",
                hint="it changed during the run, or --activations is of another model",
            )


def describe_plan(
    run: Run,
    cache: Path,
    report: Report,
    destination: Path | None = None,
    overwrite: bool = False,
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
    width = choose_dtype(run.forward_dtype, stored_dtype(plan), device).itemsize
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
        "copied_files": list(source.companions),
        "device": device,
        "expected_peak_bytes": {
            "forward": plan.num_parameters * width,
            "edit": edit_memory(targets),
        },
    }
