"""What a manifest says twice must agree: nothing here looks at the files that it lists.

What is said once only, such as what was measured, cannot be checked without doing it again; see
``gloss replay --refit``.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import chain

from converter import __version__
from converter.calibration.statistics import cache_key
from converter.checkpoints.companions import PICTURE, is_companion, papers
from converter.checkpoints.names import INDEX, MANIFEST
from converter.checkpoints.plan import Plan
from converter.edits.subspace_file import SUBSPACE_FILE
from converter.errors import OptionError
from converter.evaluate.gates import DROP, LEAKAGE, passes
from converter.manifest import Manifest
from converter.methods.base import configure, method_names
from converter.outputs.adapter.write import CONFIG, WEIGHTS
from converter.release.licences import NOTICE


def check_records(manifest: Manifest) -> Iterator[str]:
    """Copies, the key of the activations, the rank, guard and gates."""
    inputs, key = manifest.activations.inputs, manifest.activations.key
    if (cache_key(inputs) if inputs else None) != key:
        yield f"{MANIFEST}: the key of the activations is not that of their inputs"
    yield from _check_origins(manifest)
    for what, holds in _claims(manifest):
        if not holds:
            yield f"{MANIFEST}: {what}"
    names = Counter(entry.name for entry in manifest.edited)
    for name in sorted(name for name, count in names.items() if count > 1):
        yield f"{MANIFEST}: tensor {name} is recorded as edited twice"


def is_whole(manifest: Manifest) -> bool:
    """Whether it is of a checkpoint; an adapter leaves most files where they are."""
    return manifest.run.output != "adapter"


def _check_origins(manifest: Manifest) -> Iterator[str]:
    """Each file is a shard, one that a conversion makes, or a copy of one of the source's."""
    files, theirs, whole = manifest.files, manifest.source.files, is_whole(manifest)
    made = {SUBSPACE_FILE, NOTICE} | ({INDEX} if whole else {WEIGHTS, CONFIG})
    copied = set(theirs) if whole else set(chain(*papers(theirs).values()))
    for name, file in files.items():
        ours = name in made or name.endswith(PICTURE)
        if file.prefixes is not None:
            if not whole or not name.endswith(".safetensors"):
                yield f"{name}: is recorded as a shard and cannot be one"
            elif file.nbytes != theirs.get(name, file).nbytes:
                yield f"{name}: has other bytes than the source's, by the manifest"
        elif name in theirs and (name == INDEX or is_companion(name)):
            if file != theirs[name]:
                yield f"{name}: was to be a copy of the source's and is not"
            if name not in copied:
                yield f"{name}: does not belong into an adapter"
        elif not ours:
            yield f"{name}: is neither of the source nor made by a conversion"
    for name in sorted(copied - set(files)):
        yield f"{name}: was to be a copy of the source's and is not"
    if manifest.subspace.file != SUBSPACE_FILE:
        yield f"{MANIFEST}: the subspace is in {manifest.subspace.file}, not {SUBSPACE_FILE}"


def _claims(manifest: Manifest) -> Iterator[tuple[str, bool]]:
    """Sentences that would be true of a false manifest, and whether this one is not."""
    run, choice, guard = manifest.run, manifest.choice, manifest.guard
    method, rank = manifest.method, manifest.subspace.rank
    yield "run and method disagree", run.method == method.name
    yield "choice and subspace have different ranks", choice.rank == rank
    yield "the choice of the rank contradicts itself", choice.automatic == bool(choice.tried)
    yield "the guard's record contradicts --no-guard", (guard is not None) == run.guard
    if guard is not None:
        budget = run.max_perplexity_ratio
        yield "the guard's budget is not that of the run", guard.budget == budget
        yield "the guard refused, and nothing was forced", run.force or not guard.reasons
        draws = len(guard.random)
        yield "the guard's random subspaces are not those asked for", draws == run.guard_draws
    for gate in manifest.gates:
        yield f"{gate.gate} {gate.limit:g} was not passed", passes(gate)
        if gate.gate == LEAKAGE:
            worst = max((entry.leakage for entry in manifest.edited), default=0.0)
            yield "the largest leakage is not the gate's", gate.measured == worst
        if gate.gate == DROP and gate.by == "guard":
            drop = 1 - guard.edit.teacher_forced.value if guard else None
            yield "the guard has not measured what the gate says", gate.measured == drop


def check_options(
    manifest: Manifest, plan: Plan, implied: Mapping[str, str] | None = None
) -> Iterator[str]:
    """The method's options must be those typed, and defaults; other versions have others."""
    run, method = manifest.run, manifest.method
    if run.method not in method_names() or manifest.tool.version != __version__:
        return
    try:
        expected = configure(run.method, run.options, plan.dimensions, implied)
    except OptionError as error:
        yield f"{MANIFEST}: {error}"
        return
    options = asdict(expected)  # type: ignore[call-overload]
    for key in sorted({*options, *method.options}):
        if options.get(key) != method.options.get(key):
            yield f"{MANIFEST}: the method's {key} is not what the run's options make it"
    if (method.title, method.paper) != (expected.title, expected.paper):
        yield f"{MANIFEST}: the method has another title or paper"
