"""What commands print with ``--json``, as types: their schemas are made from these.

A document may get new fields without a new version; what is here keeps its name and its meaning.
"""

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from converter.evaluation.about import About
from converter.manifest import (
    CalibrationRecord,
    Choice,
    Evaluation,
    ForwardRecord,
    GuardRecord,
    Interval,
    SampleRecord,
    SearchRecord,
    SearchTrial,
)
from converter.methods.known import KnownMethod, MethodTitle

VERSION = 1
"""Of every document: raised if a field goes, or means something else."""


class Document(msgspec.Struct):
    """A JSON object."""


class OfModel(Document):
    """What a command does with a model.

    Attributes:
        source: name of the model.
        commit: of its repo; None of a folder.
    """

    source: str
    commit: str | None


class Made(OfModel):
    """A folder that a command has made.

    Attributes:
        destination: the folder, or the address of the prefix.
        tensors_edited: how many.
        verified: always true: a folder that is not whole is an error.
        seconds: of each stage.
        warnings: in order.
    """

    destination: str
    tensors_edited: int
    verified: Literal[True]
    seconds: dict[str, float]
    warnings: list[str]


class OfTwo(Document):
    """A comparison of A and B.

    Attributes:
        a: name of A.
        b: name of B.
        equal: whether nothing differs.
    """

    a: str
    b: str
    equal: bool


class Headline(Document):
    """What an edit does to toxic words, in one number.

    Attributes:
        toxic_words: how probable they are afterwards, as a multiple, with an interval of 95 %.
        controls: the mean of the same under the controls.
        words: how many were measured.
        pairs_kind_only: whether they stand in sentences of the pairs' own kind only.
        fallback: why, in that case.
    """

    toxic_words: Interval
    controls: float
    words: int
    pairs_kind_only: bool
    fallback: str | None


class Pushed(Document):
    """A commit on the Hub.

    Attributes:
        repo_id: the repo.
        commit: its sha.
        url: of the commit.
        pull_request: its URL; None if there is none.
    """

    repo_id: str
    commit: str
    url: str
    pull_request: str | None


class Converted(Made):
    """The gist of the manifest of a conversion. The strength also stands under its own name.

    Attributes:
        output: what was written, as ``--output`` names it.
        method: of the last fit.
        strength: of that method.
        strength_name: what that is, such as ``rank``.
        strengths: of all methods, by name.
        layers: that were edited.
        pairs: that were fitted on.
        instances: where those of a method for defence are from.
        rows_skipped: reason -> how many rows of the pairs could not be used.
        factors: layer -> share of the edit, where it is not whole.
        candidates: directions that were looked at.
        candidates_kept: of these.
        tensors_created: how many that the source lacks.
        files_changed: beside the weights.
        verdict: one sentence.
        headline: None where none is told.
        guard: what it measured; None if it was switched off.
        choice: of the strength.
        evaluation: what --evaluate measured.
        samples: texts before and after.
        mean_relative_change: of the edited matrices.
        max_leakage: of a subspace that was taken out, the share that rounding left.
        bytes_written: of all files.
        forward: how the model was run.
        memory_bytes: largest resident set of each stage.
        peak_memory_bytes: of all.
        published: None unless it was pushed.
    """

    output: str
    method: str
    strength: float
    strength_name: str
    strengths: dict[str, float]
    layers: list[int]
    pairs: int
    instances: str | None
    rows_skipped: dict[str, int]
    factors: dict[str, float]
    candidates: int
    candidates_kept: int
    tensors_created: int
    files_changed: list[str]
    verdict: str
    headline: Headline | None
    guard: GuardRecord | None
    choice: Choice
    evaluation: Evaluation | None
    samples: list[SampleRecord]
    mean_relative_change: float | None
    max_leakage: float | None
    bytes_written: int
    forward: ForwardRecord | None
    memory_bytes: dict[str, int]
    peak_memory_bytes: int
    published: Pushed | None


class PlannedMethod(Document):
    """A method as it would be used.

    Attributes:
        name: as ``--method`` has it.
        strength: the option that says how strong the edit is.
        strengths: of all methods; null where it is to be chosen.
        options: all, defaults resolved.
    """

    name: str
    strength: str
    strengths: dict[str, Any]
    options: dict[str, Any]


class PlannedShard(Document):
    """A shard of the source, its size and tensors."""

    bytes: int
    tensors: int
    edited: int


class ExpectedPeak(Document):
    """Memory in bytes.

    Attributes:
        process: of the program as it is while it plans.
        weights: that the forward pass has in memory at a time.
        forward: these, and what a pass and its gradients take beside.
        edit: of the files.
        total: process, and the larger of forward and edit.
    """

    process: int
    weights: int
    forward: int
    edit: int
    total: int


class TimeBasis(Document):
    """What an estimate of time was measured on: how much text, in how many seconds, where."""

    texts: int
    tokens: int
    seconds: float
    device: str


class PlannedTime(Document):
    """How long a conversion will take.

    Attributes:
        seconds: in all.
        stages: the same by stage.
        basis: what was measured for it.
        not_counted: what else takes time, in words.
    """

    seconds: float
    stages: dict[str, float]
    basis: TimeBasis
    not_counted: list[str]


class Planned(OfModel):
    """What a conversion would do.

    Attributes:
        architecture: class of the model.
        dimensions: sizes of the model.
        method: with its options.
        shards: of the source, by name.
        edited_layers: or, where the fit chooses, those among which it does.
        edited_tensors: likewise.
        edited_at_most: how many of these tensors.
        edited_bytes_at_most: of them.
        created_tensors: that the source lacks.
        changed_files: beside the weights.
        added_files: that the source lacks.
        bytes_to_read: of the source.
        output: as ``--output`` names it.
        bytes_to_write: of the output.
        bytes_on_disk: that must be free.
        originals: files in another format that the source is made from.
        copied_files: as they are.
        extra_weights: copied, not edited.
        left_out: of the source.
        device: for the forward pass.
        forward: how the model would be run.
        continuations: that the guard would have written, or why none.
        self: how pairs would be drawn from the model itself.
        expected_peak_bytes: of memory.
        time: None without --time.
    """

    architecture: str
    dimensions: dict[str, Any]
    method: PlannedMethod
    shards: dict[str, PlannedShard]
    edited_layers: list[int]
    edited_tensors: list[str]
    edited_at_most: int
    edited_bytes_at_most: int
    created_tensors: list[str]
    changed_files: list[str]
    added_files: list[str]
    bytes_to_read: int
    output: str
    bytes_to_write: int
    bytes_on_disk: int
    originals: list[str]
    copied_files: list[str]
    extra_weights: list[str]
    left_out: list[str]
    device: str
    forward: ForwardRecord
    continuations: dict[str, Any]
    self: dict[str, Any] | None
    expected_peak_bytes: ExpectedPeak
    time: PlannedTime | None


class Verified(Document):
    """Whether a folder is what its manifest says.

    Attributes:
        verified: exit code 8 if not.
        problems: a sentence each.
        recorded_not_checked: places in the manifest that nothing proves.
        destination: the folder.
        source: that it was compared with.
        key_sha256: of the public key that it is signed by, if one was given.
    """

    verified: bool
    problems: list[str]
    recorded_not_checked: list[str]
    destination: str
    source: str | None
    key_sha256: str | UnsetType = UNSET


class PushedFolder(Pushed):
    """What was published.

    Attributes:
        destination: the folder.
    """

    destination: str


class UploadedFolder(Document):
    """What was uploaded to an object store.

    Attributes:
        destination: the folder.
        address: of the prefix.
    """

    destination: str
    address: str


class OtherThan(Document):
    """What is not as recorded of the environment."""

    what: str
    recorded: str
    found: str


class Likeness(Document):
    """How much a refitted change is like the recorded one.

    Attributes:
        kind: of the change.
        distance: norm of the difference over that of the recorded change.
        cosine: of the angle between both.
    """

    kind: str
    distance: float
    cosine: float


class Replayed(Made):
    """A conversion made again.

    Attributes:
        manifest: name of the file.
        replay_of: its sha256.
        identical: always true: other weights are an error.
        files_compared: that are byte for byte as recorded.
        other_files: that are not, and are no weights.
        differences: of the environment.
        angles: of a refit, in degrees: basis -> principal angles to the recorded one, ascending.
        changes: of a refit, tensor -> how alike its changes are.
    """

    manifest: str
    replay_of: str
    identical: Literal[True]
    files_compared: int
    other_files: list[str]
    differences: list[OtherThan]
    angles: dict[str, list[float]] | None
    changes: dict[str, Likeness] | None


class Spectrum(Document):
    """The change of one tensor.

    Attributes:
        relative_change: its norm over that of the tensor before.
        rank: of the part that rounding does not explain; None if unknown.
        singular_values: of the change over the norm of the tensor, the leading ones.
        noise: what rounding may reach among them.
        in_span: share of the change in the span of the subspace; None without one.
    """

    relative_change: float | None
    rank: int | None
    singular_values: list[float]
    noise: float
    in_span: float | None


class ChangedTensor(Document):
    """A tensor that differs.

    Attributes:
        name: of the tensor.
        shape: in A and in B.
        dtype: likewise.
        measured: None where it cannot be.
    """

    name: str
    shape: list[list[int]]
    dtype: list[str]
    measured: Spectrum | None


class Counts(Document):
    """How many tensors either has."""

    a: int
    b: int


class FileDifferences(Document):
    """Names of files that hold no tensor of the model, which differ."""

    only_in_a: list[str]
    only_in_b: list[str]
    changed: list[str]


class Differing(OfTwo):
    """What differs between two checkpoints, A and B.

    Attributes:
        tensors: how many each has.
        subspace: file that changes were compared with.
        only_in_a: tensors that B lacks.
        only_in_b: tensors that A lacks.
        changed: tensors that differ.
        files: other files that do.
    """

    tensors: Counts
    subspace: str | None
    only_in_a: list[str]
    only_in_b: list[str]
    changed: list[ChangedTensor]
    files: FileDifferences


class ChangedLeaf(Document):
    """A value that differs: its path, what A has, and what B has; null for nothing."""

    path: str
    a: Any
    b: Any


class DifferingManifests(OfTwo):
    """What differs between two manifests, A and B, measurements apart.

    Attributes:
        changed: values that do.
    """

    changed: list[ChangedLeaf]


class Said(Document):
    """A continuation: the text, masked unless --no-mask was given, and its scores by name."""

    text: str
    scores: dict[str, float]


class SampleSaid(Document):
    """What two models say after a prompt.

    Attributes:
        prompt: masked likewise.
        sample: 0 of the greedy continuation, and from 1 on of sampled ones.
        base: by the unedited model.
        edited: by the other.
    """

    prompt: str
    sample: int
    base: Said
    edited: Said


class Compared(About, frozen=True):
    """What two models say.

    Attributes:
        means: score -> its mean over the continuations of either.
        samples: the texts.
    """

    means: dict[str, list[float]]
    samples: list[SampleSaid]


class FoundBySearch(Document):
    """What a search has found.

    Attributes:
        source: name or place of the model.
        command: the conversion that makes the chosen edit.
        method: of it.
        options: of that method.
        search: what a manifest records of it.
        guard: what it says of the chosen edit; None without it.
        trials: all, in order.
    """

    source: str
    command: str
    method: str
    options: dict[str, str]
    search: SearchRecord
    guard: GuardRecord | None
    trials: list[SearchTrial]


class Reported(Document):
    """A page that was written, and its verdict.

    Attributes:
        report: the file.
        kind: of the verdict.
        verdict: one sentence.
    """

    report: str
    kind: Literal["clear", "weak", "refused", "unmeasured"]
    verdict: str


class Calibrated(CalibrationRecord, kw_only=True):
    """A calibration model: the record that is written beside it, and its folder.

    Attributes:
        destination: the folder.
    """

    destination: str


class TriedArchitecture(Document):
    """A class of transformers.

    Attributes:
        model_type: in a config.
        class: its name.
        auto_class: that loads it.
        proved: whether it can be edited.
        reason: why not.
        down_projections: names of the weights that would be edited.
        layers_without_ffn: numbers of layers.
    """

    model_type: str
    class_: str = msgspec.field(name="class")
    auto_class: str
    proved: bool
    reason: str
    down_projections: list[str]
    layers_without_ffn: list[int]


class DataFile(Document):
    """A draft of a data file for a model, as text."""

    data_file: str


class ListedMethod(MethodTitle, frozen=True):
    """A method, with its default options on a small Llama.

    Attributes:
        name: as ``--method`` has it.
        edit: kinds of its changes.
        outputs: that can hold its edit.
        needs: what its fit asks for first.
        package: that brings it; None of our own.
        fault: why nothing more is known of it.
    """

    name: str
    edit: list[str]
    outputs: list[str]
    needs: list[str]
    package: str | None
    fault: str


class MethodOptions(KnownMethod, frozen=True):
    """The options of a method.

    Attributes:
        name: as ``--method`` has it.
    """

    name: str


class Page(Document):
    """A page of the guide: its topic, None for the list of them, and its text in Markdown."""

    topic: str | None
    text: str


class Written(Document):
    """Files that were written."""

    written: list[str]


class Fault(Document):
    """One thing that is wrong.

    Attributes:
        error: its class in Python.
        message: one sentence.
        exit_code: of the process, if it is the first.
    """

    error: str
    message: str
    exit_code: int


class Failed(Fault):
    """Why a command has failed, whichever it is; its exit code is not 0.

    Attributes:
        others: what else is wrong.
    """

    others: list[Fault] | UnsetType = UNSET


DOCUMENTS: dict[str, tuple[Any, ...]] = {
    "error": (Failed,),
    "architectures": (list[TriedArchitecture], DataFile),
    "calibrate": (Calibrated,),
    "compare": (Compared,),
    "completion": (dict[str, str], Written),
    "convert": (Converted, Planned),
    "diff": (Differing, DifferingManifests),
    "evaluate": (Evaluation,),
    "guide": (Page,),
    "methods": (list[ListedMethod], MethodOptions),
    "plan": (Planned,),
    "push": (PushedFolder, UploadedFolder),
    "recipe": (dict[str, Any],),
    "replay": (Replayed,),
    "report": (Reported,),
    "search": (FoundBySearch,),
    "verify": (Verified,),
}
"""Command -> what it prints with ``--json``, the first or another; ``error`` is what any prints
that fails."""
