"""Compare a folder with its manifest, and the manifest with itself.

Links to files count as their targets, since the Hub's client keeps downloads that way. A record
that occurs only once, such as a measurement, can only be checked by repeating the work: ``gloss
replay --refit``.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from msgspec import structs
from torch import Tensor

from converter.calibration.statistics import cache_key
from converter.checkpoints.chat_template import is_template_file, puts_suffix
from converter.checkpoints.names import (
    BOOKKEEPING,
    CARD,
    EDIT_FILE,
    INDEX,
    MANIFEST,
    PICTURE,
    SIGNATURE,
    SUMS,
    UNLISTED,
    is_companion,
    is_plain,
    may_be_extra,
)
from converter.checkpoints.plan import Plan
from converter.checkpoints.safetensors.rewrite import digests_of, find_damage
from converter.checkpoints.weights import drops_quantization
from converter.edits.base import Footprint
from converter.edits.edit_file import EVIDENCE
from converter.errors import ConverterError, OptionError
from converter.evaluation.gates import (
    DEFENCE,
    DROP,
    INFORMAL,
    LEAKAGE,
    OVER_REFUSAL,
    passes,
    refusals_of,
)
from converter.manifest import (
    Choice,
    DefenceMeasured,
    FileRecord,
    GuardRecord,
    Manifest,
    MethodRecord,
)
from converter.methods.base import Method, aim_of, footprint_of
from converter.methods.known import METHODS, SEPARATOR
from converter.methods.options import configure
from converter.methods.subspace import Removal, check_evidence, factor_of
from converter.methods.together import options_of, parts_of
from converter.outputs.base import Output
from converter.outputs.destination import files_not_ours
from converter.outputs.record_checks import is_addable
from converter.release.evidence import EvidenceCheck
from converter.release.licences import NOTICE
from converter.release.manifest import architecture_record, hash_line, sums_text
from converter.runtime import progress
from converter.runtime.cache import sha256_of
from converter.text import one_line
from converter.version import __version__


def check_files(
    folder: Path, manifest: Manifest, gone: Collection[str]
) -> tuple[dict[str, str], list[str]]:
    """Check every file of a folder.

    Returns:
        the missing, altered or unexpected files, and how they differ; and a sentence for each false
        record of an intact file.

    Raises:
        OSError: a folder in it cannot be read.
    """
    files = {name: file for name, file in manifest.files.items() if name not in gone}
    damaged, false = {}, []
    with progress.bar("hash", sum(file.nbytes for file in files.values()), "B") as bar:
        for name, file in files.items():
            bar.set_postfix_str(one_line(name))
            if not is_plain(name):
                damaged[name] = "lies outside the folder"
            elif not (folder / name).is_file():
                damaged[name] = "is missing"
            else:
                sha256, size, prefixes = _look_at(folder / name, file)
                if sha256 != file.sha256:
                    damage = _damage(folder / name, file.prefixes)
                    damaged[name] = "is not as recorded" + damage
                elif prefixes != file.prefixes:
                    false.append(f"{MANIFEST}: {name} has other running digests")
                elif size != file.nbytes:
                    false.append(f"{MANIFEST}: {name} has {size:,} bytes")
            bar.update(file.nbytes)
    for name, what in _others(folder):
        if name not in files and name not in UNLISTED:
            damaged[name] = what
    return damaged, false


def _look_at(path: Path, file: FileRecord) -> tuple[str, int, dict[str, str] | None]:
    """sha256, bytes and, of a shard, prefixes of a file; no sha256 if it is no longer a shard."""
    size = path.stat().st_size
    if file.prefixes is None:
        return sha256_of(path), size, None
    try:
        sha256, prefixes = digests_of(path)
    except ConverterError:
        return "", size, None
    return sha256, size, prefixes


def _damage(path: Path, prefixes: Mapping[str, str] | None) -> str:
    if prefixes is None:
        return ""
    try:
        return f": the first difference is in {find_damage(path, prefixes)}"
    except ConverterError as error:
        return f": {error}"


def _others(folder: Path) -> Iterator[tuple[str, str]]:
    """Everything in a folder except folders, with the fault to report if the manifest does not list
    it.
    """

    def fail(error: OSError) -> None:
        raise error

    for place, folders, names in os.walk(folder, onerror=fail):
        inside = Path(place).relative_to(folder)
        if inside == Path():
            known = {path.name for path in files_not_ours(folder.resolve())} - BOOKKEEPING
            folders[:] = [name for name in folders if name in known]
            names = [name for name in names if name in known]
        for name in sorted(folders):
            if (Path(place) / name).is_symlink():
                yield (inside / name).as_posix(), "is a link to a folder"
        for name in sorted(names):
            yield (inside / name).as_posix(), "is not in the manifest"


def check_sums(
    folder: Path, manifest: Manifest, digest: str, seen: dict[str, str]
) -> Iterator[str]:
    """Check that the card names this manifest, and that SHA256SUMS agrees with both.

    ``digest`` is the sha256 of the manifest's bytes; ``seen`` gets those of the files read here.
    """
    seen[MANIFEST] = digest
    try:
        card, found = ((folder / name).read_bytes() for name in (CARD, SUMS))
        if (folder / SIGNATURE).is_file():
            seen[SIGNATURE] = sha256_of(folder / SIGNATURE)
    except OSError as error:
        yield f"{Path(error.filename or SUMS).name}: {error.strerror}"
        return
    seen[CARD] = hashlib.sha256(card).hexdigest()
    seen[SUMS] = hashlib.sha256(found).hexdigest()
    line = hash_line(digest)
    start = line[: line.index(":")]
    lines = card.decode("utf-8", "replace").splitlines()
    if [text for text in lines if text.startswith(start)] != [line]:
        yield f"{CARD} does not state the sha256 of {MANIFEST}"
    expected = sums_text(manifest.digests | {name: seen[name] for name in (CARD, MANIFEST)})
    if found != expected.encode("utf-8", "surrogatepass"):
        known = found.decode("utf-8", "replace").splitlines()
        rest = (text for text in expected.splitlines() if text not in known)
        names = [text.partition("  ")[2] or text for text in rest]
        for name in names or ["its own form"]:
            yield f"{SUMS} is wrong about {name}"


def check_records(manifest: Manifest, output: Output) -> Iterator[str]:
    """Check repeated records: copies, the key of the activations, the rank, guard and gates."""
    seen = manifest.activations
    for record in (seen, *(step.activations for step in manifest.steps)):
        if record and (cache_key(record.inputs) if record.inputs else None) != record.key:
            yield f"{MANIFEST}: the key of the activations is not that of their inputs"
    yield from _check_origins(manifest, output)
    for what, holds in _claims(manifest):
        if not holds:
            yield f"{MANIFEST}: {what}"
    edit = manifest.edit
    for what, names in (
        ("tensor {} is recorded as edited", [entry.name for entry in manifest.edited]),
        ("tensor {} is recorded as created", [created.name for created in edit.created]),
        ("file {} is recorded as added", list(edit.files)),
    ):
        for name in sorted(name for name, count in Counter(names).items() if count > 1):
            yield f"{MANIFEST}: {what.format(name)} twice"


def _check_origins(manifest: Manifest, output: Output) -> Iterator[str]:
    """Check that each file is a shard, is made by a conversion, or is a copy from the source."""
    files, theirs = manifest.files, manifest.source.files
    edit = manifest.edit
    made = {EDIT_FILE, NOTICE, *edit.files, *output.own_files}
    changed = {*edit.patches, *([INDEX] if edit.created else [])}
    shards = {file.source or name for name, file in manifest.shards.items()}
    extras = {name for name in manifest.source.extras if may_be_extra(name, theirs)}
    for name in sorted({*manifest.source.extras} - (extras & theirs.keys()) - shards):
        yield f"{MANIFEST}: {name} is recorded as copied and cannot be"
    copied = set(output.companions(theirs)) - shards
    for name, file in files.items():
        ours = name in made or name.endswith(PICTURE)
        if file.prefixes is not None:
            if not output.has_shards or not name.endswith(".safetensors"):
                yield f"{name}: is recorded as a shard and cannot be one"
            elif file.nbytes != theirs.get(file.source or name, file).nbytes:
                yield f"{name}: has other bytes than the source's, by the manifest"
        elif name in theirs and (name == INDEX or is_companion(name) or name in extras):
            if name in changed:
                continue
            if file != theirs[name]:
                yield f"{name}: was to be a copy of the source's and is not"
            if name not in copied:
                yield f"{name}: does not belong into this output"
        elif not ours:
            yield f"{name}: is neither of the source nor made by a conversion"
    for name in sorted(copied - set(files)):
        yield f"{name}: was to be a copy of the source's and is not"
    for name in sorted({*edit.patches, *edit.files} - set(files)):
        yield f"{name}: is recorded as made by the edit and is not there"
    for name in sorted(name for name in edit.files if not is_addable(name)):
        yield f"{name}: is recorded as added by the edit and cannot be"
    if edit.file != EDIT_FILE:
        yield f"{MANIFEST}: the edit is in {edit.file}, not {EDIT_FILE}"


def _claims(manifest: Manifest) -> Iterator[tuple[str, bool]]:
    """Sentences that describe a false manifest, each with whether it does not apply."""
    run, choice, guard = manifest.run, manifest.choice, manifest.guard
    method = manifest.method
    yield "run and method disagree", run.method == method.name
    if manifest.subspace is not None and method.strength == "rank":
        same = choice.strength == manifest.edit.rank
        yield "the choice and the edit have different ranks", same
    for _, each in manifest.methods:
        yield "the choice of the strength contradicts itself", each.automatic == bool(each.tried)
    if steps := manifest.steps:
        names = SEPARATOR.join(step.method.name for step in steps)
        last = steps[-1].choice == choice
        yield "the steps and the method disagree", (names, last) == (method.name, True)
        seen = next((step.activations for step in steps if step.activations), None)
        yield "the steps and the run have seen other activations", seen == manifest.activations
        yield "the method has evidence beside that of its steps", not method.evidence
    yield "the guard's record contradicts --no-guard", (guard is not None) == run.guard
    if guard is not None:
        budget = run.max_perplexity_ratio
        yield "the guard's budget is not that of the run", guard.budget == budget
        yield "the guard refused, and nothing was forced", run.force or not guard.reasons
        measured = {each.context_ratio is not None for each in (guard.edit, *guard.controls)}
        yield (
            "the guard's measurements are not of the same texts",
            measured == {guard.context_tokens > 0},
        )
        draws = len(guard.controls)
        yield "the guard's controls are not those asked for", draws == run.guard_draws
        yield from _headline_claims(manifest, guard)
        if guard.defence is not None:
            same = len(guard.defence.controls) == draws
            yield "the guard measured refusals under other controls", same
            same = {*guard.defence.prompts} == {*DefenceMeasured.__struct_fields__}
            yield "the guard asked other prompts than it has measured", same
            for name, patch in manifest.edit.patches.items():
                same = not is_template_file(name) or puts_suffix(patch, guard.defence.suffix)
                yield f"{name} gets another suffix than the guard measured with", same
    for gate in manifest.gates:
        yield f"{gate.gate} {gate.limit:g} was not passed", passes(gate)
        if gate.gate == LEAKAGE:
            shares = (entry.measures.get("leakage", 0.0) for entry in manifest.edited)
            worst = max(shares, default=0.0)
            yield "the largest leakage is not the gate's", gate.measured == worst
        if gate.gate == DROP and gate.by == "guard":
            drop = 1 - guard.words.teacher_forced.value if guard else None
            yield "the guard has not measured what the gate says", gate.measured == drop
        if gate.gate == INFORMAL and gate.by == "guard":
            context = guard.words.context_ratio if guard else None
            ratio = context.value if context else None
            yield "the guard has not measured what the gate says", gate.measured == ratio
        if gate.gate in (DEFENCE, OVER_REFUSAL):
            known = guard.defence if guard else None
            found = refusals_of(known, gate.gate) if known else None
            yield "the guard has not measured what the gate says", gate.measured == found


def _headline_claims(manifest: Manifest, guard: GuardRecord) -> Iterator[tuple[str, bool]]:
    """The same for the measurements outside the pairs' kind."""
    told, prompts = guard.headline, manifest.prompts
    counts = (told and told.prompts, prompts and prompts.count)
    yield "the guard continued other prompts than those recorded", counts[0] == counts[1]
    judges = told is not None and told.words is not None
    yield "the guard judged by two kinds of toxic words", not (judges and guard.fallback)
    if told is None:
        return
    yield "the guard continued prompts, and none were to be", manifest.run.prompts != "none"
    yield "the prompts were continued with another seed", told.seed == manifest.run.seed
    draws = len(guard.controls)
    same = (len(told.control_divergences), len(told.control_words)) == (draws, judges * draws)
    yield "the guard measured continuations under other controls", same
    yield "toxic words stand after more prompts than there are", told.toxic_prompts <= told.prompts


def check_kept(manifest: Manifest, stored: Mapping[str, Tensor]) -> Iterator[str]:
    """Check that the manifest's evidence of a subspace is that of the edit's file, ``stored``."""
    kept = {n.removeprefix(EVIDENCE): t for n, t in stored.items() if n.startswith(EVIDENCE)}
    for method, _ in manifest.methods:
        own = f"{method.name}." if manifest.steps else ""
        theirs = {n.removeprefix(own): t for n, t in kept.items() if n.startswith(own)}
        for name in check_evidence(method.subspace, theirs) if method.subspace else ():
            yield f"{manifest.edit.file}: {own}{name} is not as recorded"


def check_architecture(manifest: Manifest, plan: Plan) -> Iterator[str]:
    """Check the manifest's record of the model against its config.

    Another version of transformers may prove it in another way.
    """
    told, found = manifest.architecture, architecture_record(plan.architecture)
    if told.transformers != found.transformers:
        told = structs.replace(
            found,
            name=told.name,
            layers_without_ffn=told.layers_without_ffn,
            left_alone=told.left_alone,
        )
    if "model_type" in manifest.edit.patches.get("config.json", {}):  # under another name
        told = structs.replace(told, name=found.name)
    if told != found:
        yield f"{MANIFEST}: the architecture is not what config.json makes it"


def _check_options(told: MethodRecord, choice: Choice, made: Method) -> Iterator[str]:
    """Check a manifest's record of a method against the method."""
    options = options_of(made)
    for key in sorted({*options, *told.options}):
        if options.get(key) != told.options.get(key):
            yield f"{MANIFEST}: the method's {key} is not what the run's options make it"
    claimed = (told.title, told.paper, told.strength, told.package)
    if claimed != (made.title, made.paper, made.strength, METHODS.package(told.name)):
        yield f"{MANIFEST}: the method has another title, paper or package"
    given = getattr(made, told.strength, None)
    if isinstance(given, float) and choice.strength != given:
        yield f"{MANIFEST}: the {told.strength} of {told.name} is not the one that was given"


def _check_aim(manifest: Manifest, made: Method, footprint: Footprint) -> Iterator[str]:
    """Check that edits for defence have instances and were judged by refusals, and no others."""
    defends, guard = aim_of(made) == "defence", manifest.guard
    if (manifest.instances is not None) != defends:
        yield f"{MANIFEST}: the instances are not what a method for {aim_of(made)} has"
    if guard is not None and (guard.defence is not None) != defends:
        yield f"{MANIFEST}: the guard judged by other rules than those for {aim_of(made)}"
    if guard is not None and guard.defence is not None and guard.defence.suffix:
        for name in sorted(
            {*filter(is_template_file, footprint.patches)} - {*manifest.edit.patches}
        ):
            yield f"{name} gets no suffix, and the guard measured with one"


def check_method(
    manifest: Manifest, plan: Plan, implied: Mapping[str, str], evidence: EvidenceCheck
) -> Iterator[str]:
    """Check that the records of the method and its edit follow from the run.

    Args:
        manifest: of an output.
        plan: of the source, or of the output, which has the same tensors.
        implied: other defaults of the method's options with this output.
        evidence: checks the kept tensors and evidence of the methods.
    """
    run = manifest.run
    names = run.method.split(SEPARATOR)
    if not {*names} <= {*METHODS.names()} or manifest.tool.version != __version__:
        return  # other versions have other options
    packages = {name: METHODS.package(name) for name in names}
    for told, _ in manifest.methods:
        package = packages.get(told.name)
        if package is not None and package != told.package:
            return
    try:
        expected = configure(run.method, run.options, plan.dimensions, implied)
        footprint = footprint_of(expected, plan)
    except OptionError as error:
        yield f"{MANIFEST}: {error}"
        return
    yield from _check_options(manifest.method, manifest.choice, expected)
    yield from _check_aim(manifest, expected, footprint)
    parts = parts_of(run.method, expected)
    if [step.method.name for step in manifest.steps] != (list(parts) if len(parts) > 1 else []):
        yield f"{MANIFEST}: the steps are not those of the method"
        return
    for step in manifest.steps:
        yield from _check_options(step.method, step.choice, parts[step.method.name])
    asked = {weight.info.name for weight in footprint.weights}
    edited = {entry.name for entry in manifest.edited}
    whole = all(method.subspace is not None for method, _ in manifest.methods)
    for name in sorted(asked ^ edited if whole else edited - asked):
        yield f"tensor {name}: the method's options and the list of edited tensors disagree"
    factors = {
        weight.info.name: part.taken(choice.strength)[1] * factor_of(part.factors, weight.layer)
        for (_, choice), part in zip(manifest.methods, parts.values(), strict=True)
        if isinstance(part, Removal)
        for weight in footprint_of(part, plan).weights
    }
    for entry in manifest.edited:
        if entry.measures.get("factor", 1.0) != factors.get(entry.name, 1.0):
            yield f"tensor {entry.name}: its factor is not that of the method's options"
    if len(edited) > footprint.most:
        yield f"{MANIFEST}: the method edits {footprint.most} of the tensors, not {len(edited)}"
    edit = manifest.edit
    for what, found, possible in (
        ("an edit of kind", {e.kind for e in manifest.edited}, {k.kind for k in footprint.kinds}),
        ("the new tensor", {created.name for created in edit.created}, set(footprint.created)),
        (
            "a patch of",
            {n for n, p in edit.patches.items() if not drops_quantization(p)},
            set(footprint.patches),
        ),
        ("the file", set(edit.files), set(footprint.files)),
    ):
        for name in sorted(found - possible):
            yield f"{MANIFEST}: the method makes no such edit: {what} {name}"
    yield from evidence.problems(parts)
