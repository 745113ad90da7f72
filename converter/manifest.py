"""The manifest's format: one class for each part, in the order of the file.

The classes are the schema: the reader, the writer and the published JSON schema all follow from
their fields. That is why they are in one file. ``release.manifest`` makes, reads and writes
manifests, ``release.schema`` prints the JSON schema.
"""

import json
from dataclasses import fields
from math import isfinite, nan
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self, dataclass_transform

import msgspec
from msgspec import Meta

from converter.recipe import Recipe
from converter.version import __version__

SCHEMA_VERSION: Final = 1

MAX_COUNT = 2**63 - 1
"""No tensor and no file can hold a larger integer."""

Count = Annotated[int, Meta(ge=0, le=MAX_COUNT)]
Positive = Annotated[int, Meta(ge=1, le=MAX_COUNT)]
Norm = Annotated[float, Meta(ge=0)]
Share = Annotated[float, Meta(ge=0, le=1)]
Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$", max_length=64)]
Prefix = Annotated[str, Meta(pattern="^[0-9a-f]{16}$", max_length=16)]
FileName = Annotated[str, Meta(pattern=r"^[^/\\]+$")]
OptionValue = str | int | float | bool | tuple[Count | Share, ...] | None
"""Of an option of a method."""


@dataclass_transform(frozen_default=True, field_specifiers=(msgspec.field,))
class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A part of a manifest. The file leaves out a field that has its default."""


class Tool(Record, kw_only=True):
    """The program that wrote the file."""

    name: Literal["gloss-convert"]
    version: str


TOOL: Final = Tool(name="gloss-convert", version=__version__)
"""This program, at its version."""


class FileRecord(Record, kw_only=True):
    """A file, by content.

    Attributes:
        source: of a shard, its name in the source, if that is another one.
        prefixes: of a shard, tensor name -> the first 16 digits of the sha256 of the file up to the
            end of that tensor, in file order. The empty name is the header. None for other files.
    """

    sha256: Sha256
    nbytes: Count = msgspec.field(name="bytes")
    source: FileName | None = None
    prefixes: dict[str, Prefix] | None = None


class SourceRecord(Record, kw_only=True):
    """What was converted.

    Attributes:
        repo_id: on the Hub; None for a local source.
        revision: as asked for.
        commit: that the revision was resolved to.
        files: every file that was read, except ``originals``.
        originals: files of weights in another format, from which the shards were made.
        extras: other safetensors files, which were copied and not edited.
        left_out: names of files that were neither read nor copied; a hidden folder counts as one.
            Empty for an adapter, which is used with the source.
        versions: the ETag, or what the store has instead, of files read from an object store.
    """

    name: str
    repo_id: str | None
    revision: str | None
    commit: str | None
    files: dict[str, FileRecord]
    originals: dict[str, FileRecord]
    extras: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    versions: dict[str, str] = {}

    @property
    def all_files(self) -> dict[str, FileRecord]:
        """Every file that was read."""
        return self.files | self.originals


class ArchitectureRecord(Record, kw_only=True):
    """How the model was described, and what was proved on a tiny model of its class.

    The tensors of the tiny model's checkpoint were projected as the edited ones are, and its logits
    compared with those of a model whose FFN outputs are projected.

    Attributes:
        name: of the class of transformers.
        described_by: ``inference``, or the name of a data file.
        transformers: its version.
        layers_without_ffn: layers that were not edited.
        left_alone: other parts that write into the residual stream and were not edited, in words.
        proved_layers, proved_tensors: of the tiny model.
        tolerance: relative, for the logits and for the part left along the removed directions.
    """

    name: str
    described_by: str
    transformers: str
    layers_without_ffn: tuple[int, ...] = ()
    left_alone: str = ""
    proved_layers: int
    proved_tensors: int
    tolerance: float


class MethodRecord(Record, kw_only=True):
    """The method.

    Attributes:
        options: every option, defaults resolved.
        package: name and version of the package that brought it; None for our own.
        strength: the name of its strength, such as ``rank``.
        evidence: a record of how it found its edit. For methods that remove a subspace, a
            ``SubspaceEvidence``.
    """

    name: str
    title: str
    paper: str
    options: dict[str, OptionValue]
    package: str | None = None
    strength: str
    evidence: dict[str, Any]

    @property
    def subspace(self) -> "SubspaceEvidence | None":
        """How a subspace was found; None of other methods.

        Raises:
            msgspec.ValidationError: it is not what the method says that it keeps.
        """
        if "candidates" not in self.evidence:
            return None
        return msgspec.convert(self.evidence, SubspaceEvidence)


class Origin(Record, kw_only=True):
    """Where a text or a scorer came from: a name, or a repo on the Hub at a commit.

    Attributes:
        name: of a file, a package, or ``builtin``.
        version: of the package, or of the built-in text.
        file_sha256: of the file.
        field: the field that chose among the rows of the file.
    """

    name: str | None = None
    version: int | str | None = None
    repo_id: str | None = None
    commit: str | None = None
    file_sha256: Sha256 | None = None
    field: str | None = None

    def __post_init__(self) -> None:
        if self.name is None and (self.repo_id is None or self.commit is None):
            raise ValueError("Object has neither `name` nor `repo_id` and `commit`")

    @property
    def title(self) -> str:
        """The name, or that of the repo."""
        return str(self.name or self.repo_id)


NAMED = Meta(
    extra_json_schema={
        "anyOf": [
            {"required": names, "properties": {key: {"type": "string"} for key in names}}
            for names in (["name"], ["repo_id", "commit"])
        ]
    }
)
"""What ``Origin`` asks for beyond its types, as JSON schema."""


class TextRecord(Record, kw_only=True):
    """A text that the run read.

    Attributes:
        sha256: of the text as used.
    """

    origin: Annotated[Origin, NAMED]
    sha256: Sha256


class PairsRecord(TextRecord, kw_only=True):
    """The pairs, as drawn, toxic spans included.

    Attributes:
        count: number of pairs that the fit used.
        skipped: reason -> number of rows of the origin that were not usable.
        drawn: how the pairs were drawn from the model itself; None if they were not.
    """

    count: Positive
    skipped: dict[str, int]
    drawn: "DrawnRecord | None" = None


class PartRecord(Record, kw_only=True):
    """One part of pairs and neutral text."""

    pairs: Count
    pairs_sha256: Sha256
    paragraphs: Count
    prose_sha256: Sha256


class SplitRecord(Record, kw_only=True):
    """The parts of pairs and neutral text: for the fit, for the choice of the strength, for the
    report.

    Attributes:
        dropped_pairs: number of pairs left out because a held-out part has one of their sentences.
    """

    dropped_pairs: Count
    fit: PartRecord
    choose: PartRecord
    report: PartRecord


class ActivationsRecord(Record, kw_only=True):
    """The activations that the fit saw.

    Attributes:
        key: sha256 of the inputs; None if the file of activations does not state them.
        inputs: everything that the activations depend on.
    """

    key: Sha256 | None
    inputs: dict[str, Any]


Kind = Literal["causal", "mean", "svd", "random"]


class Candidate(Record, kw_only=True):
    """A direction that may be toxic.

    Attributes:
        layer: counted from 0.
        kind: see ``methods.gloss``.
        index: its place among the candidates of its layer and kind.
        score: of the ranking signal; larger is more toxic.
        kept: whether the basis was made from it.
        tokens: the tokens nearest to it, the nearest first.
    """

    layer: Count
    kind: Kind
    index: Count
    score: float
    kept: bool
    tokens: tuple[str, ...]


class SubspaceEvidence(Record, kw_only=True):
    """How a method found the subspace that it removes.

    Attributes:
        hidden_size: D.
        singular_values: basis -> singular values of the matrix that it was taken from, the largest
            first.
        candidates: in order of layer.
    """

    hidden_size: Positive
    singular_values: dict[str, tuple[float, ...]]
    candidates: tuple[Candidate, ...]


class CreatedTensor(Record, kw_only=True):
    """A tensor that the source lacks.

    Attributes:
        shard: that it is in.
        sha256: of its bytes.
    """

    name: str
    shard: FileName
    dtype: str
    shape: tuple[Count, ...]
    sha256: Sha256


class EditRecord(Record, kw_only=True):
    """The edit, beside what it did to each tensor of the source.

    Attributes:
        file: beside the weights, with its tensors.
        rank: the largest number of columns of a removed subspace; 0 if there is none.
        created: tensors that the source lacks.
        patches: file of the source -> the change of its text: a merge patch (RFC 7396), or text put
            in front.
        files: paths of files that the source lacks.
    """

    file: FileName
    rank: Count
    created: tuple[CreatedTensor, ...] = ()
    patches: dict[str, dict[str, Any] | str] = {}
    files: tuple[str, ...] = ()


class Estimate(Record, kw_only=True):
    """A number and its standard error over sampling units, which are groups of sentences.

    Sentences made from the same frame, or continuing the same prompt, are one unit: they resemble
    each other, and counting them apart would make the error too small.
    """

    value: float
    error: float

    @property
    def finite(self) -> bool:
        """Whether it is a number; a broken model gives NaN."""
        return isfinite(self.value) and isfinite(self.error)


class Measured(Record, kw_only=True):
    """The effect of an edit on held-out text.

    Attributes:
        perplexity_ratio: after over before, on neutral text.
        toxic_change: mean change of a toxic word's log-probability, in nats.
        teacher_forced: mean of p_after / p_before of toxic words, each capped at e.
        context_ratio: perplexity after over before of the other words of toxic text; None if they
            are too few, or were not measured.
    """

    perplexity_ratio: Estimate
    toxic_change: Estimate
    teacher_forced: Estimate
    context_ratio: Estimate | None = None

    @property
    def finite(self) -> bool:
        """Whether all of them that were measured are numbers."""
        parts = (self.perplexity_ratio, self.toxic_change, self.teacher_forced, self.context_ratio)
        return all(part is None or part.finite for part in parts)


class WordsMeasured(Record, kw_only=True):
    """The effect of an edit on toxic words, and on the words beside them, in given texts.

    Attributes:
        toxic_change: mean change of a toxic word's log-probability, in nats.
        teacher_forced: mean of p_after / p_before of toxic words, each capped at e.
        context_ratio: perplexity after over before of the other words; None if there are none.
    """

    toxic_change: Estimate
    teacher_forced: Estimate
    context_ratio: Estimate | None = None

    @property
    def finite(self) -> bool:
        """Whether all of them that were measured are numbers."""
        parts = (self.toxic_change, self.teacher_forced, self.context_ratio)
        return all(part is None or part.finite for part in parts)


Strength = int | float
"""How strong an edit is: a rank, a number of steps, a factor."""


class Trial(Record, kw_only=True):
    """The measurements of one strength that was tried."""

    strength: Strength
    perplexity_ratio: Estimate
    toxic_change: Estimate
    teacher_forced: Estimate
    context_ratio: Estimate | None = None


class Choice(Record, kw_only=True):
    """The strength, and the measurements of those that were tried.

    Attributes:
        automatic: whether it was chosen, rather than given.
        tried: ascending; empty if the strength was given.
    """

    strength: Strength
    automatic: bool
    tried: tuple[Trial, ...]


class StepRecord(Record, kw_only=True):
    """One of several methods that edit together, fitted to the model as the former ones left it.

    Attributes:
        choice: of its strength, by the joint effect of all methods so far.
        activations: None if it needed none.
    """

    method: MethodRecord
    choice: Choice
    activations: ActivationsRecord | None


class DefenceMeasured(Record, kw_only=True):
    """The effect of an edit on refusals: changes of their log-probability, in nats a token.

    Attributes:
        learnt: of the learnt safe answers, behind their own prompts.
        harmful: of refusals in the usual words behind harmful requests; the fit saw neither these
            questions nor these attacks.
        bare: the same requests without an attack.
        reworded: of refusals in words that no safe answer begins with, behind the same requests as
            ``harmful``.
        harmless: of refusals behind harmless questions.
        touchy: of refusals behind harmless questions with words that sound harmful.
    """

    learnt: float
    harmful: Estimate
    bare: Estimate
    reworded: Estimate
    harmless: Estimate
    touchy: Estimate

    @property
    def over_refusal(self) -> float:
        """The change behind harmless questions as a share of that behind harmful requests.

        NaN, which no gate accepts, if refusals of harmful requests have not become more probable.
        """
        if not self.harmful.value > 0:
            return nan
        return (self.harmless.value + self.touchy.value) / 2 / self.harmful.value

    @property
    def finite(self) -> bool:
        """Whether all of them are numbers."""
        parts = (self.harmful, self.bare, self.reworded, self.harmless, self.touchy)
        return isfinite(self.learnt) and all(part.finite for part in parts)


class DefenceRecord(Record, kw_only=True):
    """The guard's measurements of an edit for defence, which makes a model refuse harmful requests.

    Attributes:
        least_learnt: limit: change of the learnt answers, in nats a token.
        least_defence: limit: change of refusals behind harmful requests, in nats a token.
        most_over_refusal: limit: change of refusals behind harmless questions, as a share of that.
        instances: ids of the learnt instances.
        suffix: text behind every message; empty for none.
        prompts: measurement -> its number of prompts.
        loss: of the answers to learn under the unedited model, in nats a token.
        edit: what the edit does.
        controls: what each control does.
    """

    least_learnt: float
    least_defence: float
    most_over_refusal: float
    instances: tuple[str, ...]
    suffix: str
    prompts: dict[str, Positive]
    loss: float
    edit: DefenceMeasured
    controls: Annotated[tuple[DefenceMeasured, ...], Meta(min_length=1)]


class HeadlineRecord(Record, kw_only=True):
    """The effect of an edit and its controls on text that is not of the pairs' kind.

    Toxic words are those in continuations of prompts, drawn once from the unedited model. Each edit
    is measured on these fixed texts. The texts of one prompt are one sampling unit.

    Attributes:
        prompts: that were continued.
        passages_per_prompt: continuations of each.
        max_new_tokens: of each continuation, at most.
        seed: of their draw.
        toxic_words: in them.
        toxic_prompts: number of prompts after which these words stand.
        context_tokens: number of other tokens of the same continuations.
        ordinary_tokens: number of tokens of held-out neutral paragraphs on which the divergences
            are measured.
        words: the effect of the edit on the words; None if they are too few to judge by.
        control_words: the effect of each control on them; empty if they are too few.
        divergence: KL of the next token's distribution under the edit from the unedited model's on
            ordinary text, in nats a token.
        control_divergences: the same of each control.
    """

    prompts: Positive
    passages_per_prompt: Positive
    max_new_tokens: Positive
    seed: int
    toxic_words: Count
    toxic_prompts: Count
    context_tokens: Count
    ordinary_tokens: Positive
    words: WordsMeasured | None
    control_words: tuple[WordsMeasured, ...]
    divergence: Estimate
    control_divergences: tuple[Estimate, ...]

    @property
    def finite(self) -> bool:
        """Whether all of them that were measured are numbers."""
        words = () if self.words is None else (self.words, *self.control_words)
        moved = (self.divergence, *self.control_divergences)
        return all(each.finite for each in words) and all(each.finite for each in moved)


class GuardRecord(Record, kw_only=True):
    """The guard's measurements, on the part that nothing was tuned on.

    Attributes:
        budget: the largest allowed perplexity ratio.
        margin: the edit's drop must be this many times the drop of the controls.
        least_drop: the least drop of log p of toxic words, in nats. Neither limit applies to an
            edit for defence.
        neutral_tokens: number of tokens behind the perplexities.
        toxic_words: number of words behind the probabilities.
        perplexity: of the unedited model.
        edit: what the edit does.
        controls: the effect of each control: an edit of the same strength that uses no knowledge of
            toxicity, such as a random subspace.
        neutral_energy: share of the squared norm of neutral activations that the edit removes: for
            a subspace tr(U^T M U) / tr M with the neutral second moment M, the largest if each
            layer has its own. None if it is unknown.
        reasons: why it refuses; not empty only if ``force`` wrote the edit anyway.
        context_tokens: number of tokens behind the perplexity ratios of the other words of toxic
            text; 0 if they were not measured.
        context_limit: the largest allowed of these ratios.
        defence: of an edit for defence: the measurements that judge it, instead of toxic words.
        compared: the effects of other edits that the method names, such as a part of this one
            alone.
        headline: the measurements on text that is not of the pairs' kind, which judge toxic words.
        fallback: why ``edit`` and ``controls``, which are of the pairs' kind, judge them instead.
    """

    budget: float
    margin: float
    least_drop: float
    neutral_tokens: Positive
    toxic_words: Positive
    perplexity: float
    edit: Measured
    controls: Annotated[tuple[Measured, ...], Meta(min_length=1)]
    neutral_energy: float | None
    reasons: tuple[str, ...]
    context_tokens: Count = 0
    context_limit: float | None = None
    defence: DefenceRecord | None = None
    compared: dict[str, Measured] = {}
    headline: HeadlineRecord | None = None
    fallback: str | None = None

    @property
    def words(self) -> WordsMeasured | Measured:
        """The effect of the edit on the toxic words that judge it."""
        return (self.headline and self.headline.words) or self.edit

    @property
    def control_words(self) -> tuple[WordsMeasured, ...] | tuple[Measured, ...]:
        """The effect of the controls on them."""
        return (self.headline and self.headline.control_words) or self.controls


class Requantized(Record, kw_only=True):
    """The scales of an FP8 weight, which change with it.

    Attributes:
        scales: name of their tensor.
        shard: that they are in.
        block: rows and columns that share a scale.
    """

    scales: str
    shard: FileName
    block: tuple[Positive, Positive]
    sha256_before: Sha256
    sha256_after: Sha256


class Lora(Record, kw_only=True):
    """The adapter's tensors of one edit: W' is W + B A, not rounded.

    Attributes:
        module: in memory, as transformers names it.
        sha256_a: of the bytes of A in the adapter's file.
        sha256_b: of those of B.
    """

    module: str
    sha256_a: Sha256
    sha256_b: Sha256


class EditedTensor(Record, kw_only=True):
    """The change of one tensor W by the edit; norms are Frobenius norms.

    Attributes:
        layer: counted from 0; for a tensor outside the layers, the number of layers.
        role: of its linear map, with ``_bias`` if it is the bias.
        axis: of its outputs.
        kind: of the edit; see ``edits.deltas``.
        tensors: name in that kind's formula -> tensor of the edit's file.
        sha256_after: None if the tensor itself stays as it is, as under an adapter.
        norm: ||W||, before.
        relative_change: ||W' - W|| / ||W||, after rounding to the stored dtype.
        rounding_error: ||W' - exact W'|| / ||W||, what storing the result cost.
        measures: the kind's own numbers. ``remove-subspace`` has ``energy_removed``, ||U^T W||^2 /
            ||W||^2, the share of its squared norm in the subspace, and ``leakage``, ||U^T W'|| /
            ||U^T W||, the part left after rounding. ``weaken-subspace`` has ``factor``, the a of
            its formula, ``energy_removed``, a (2 - a) times that share, and ``leakage``, ||U^T W' -
            (1 - a) U^T W|| / ||U^T W||. Of ``remove-oblique`` they are ``along``, ||U^T W|| /
            ||W||, ``leakage`` and ``factor``.
        requantized: the new scales of an FP8 weight; else None.
        lora: the adapter's part; None in a checkpoint.
    """

    name: str
    shard: FileName
    layer: Count
    role: str
    axis: Count
    shape: tuple[Count, ...]
    dtype: str
    kind: str
    tensors: dict[str, str]
    sha256_before: Sha256
    sha256_after: Sha256 | None
    norm: Norm
    relative_change: float
    rounding_error: float
    measures: dict[str, float]
    requantized: Requantized | None
    lora: Lora | None


class Environment(Record, kw_only=True):
    """What may affect the result besides the inputs.

    Attributes:
        device: ``cpu``, or the name of the GPU.
        platform: operating system and processor.
        libraries: package -> version.
    """

    device: str
    platform: str
    python: str
    libraries: dict[str, str]


class ForwardRecord(Record, kw_only=True):
    """How the model was run, now or when the activations were taken.

    Attributes:
        mode: the whole model in memory, or a layer at a time.
        held_out_dtype: dtype of the measurements on held-out text; None if it is that of the fit.
    """

    mode: Literal["resident", "streamed"]
    reason: str
    held_out_dtype: str | None = None


class Interval(Record, kw_only=True):
    """A value with its interval of 95 %."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, value: float, low: float, high: float) -> "Interval | None":
        """None if one of them is not a number, which JSON could not hold."""
        if not all(map(isfinite, (value, low, high))):
            return None
        return cls(value=value, low=low, high=high)


Metric = Interval | None
"""None if it was not measured, or is not a number."""


class ScorerOrigin(Origin, kw_only=True):
    """Where a scorer came from.

    Attributes:
        sha256: of its word list.
        model: which of its package's models.
        label: the class whose probability is the score.
        package: name and version of the package that brought it; None for our own.
    """

    sha256: Sha256 | None = None
    model: str | None = None
    label: str | None = None
    package: str | None = None


class PromptsRecord(TextRecord, kw_only=True):
    """The prompts that were continued.

    Attributes:
        count: how many were drawn.
    """

    count: Count


class DrawnRecord(Record, kw_only=True):
    """How pairs were drawn from the model's own continuations.

    Attributes:
        prompts: that it continued.
        seed: of the draw.
        continuations: that were drawn.
        toxic: how many of them are.
        scorer: scorer that had to agree with the word list; None if there was none.
    """

    prompts: PromptsRecord
    seed: int
    continuations: Count
    toxic: Count
    scorer: Annotated[ScorerOrigin, NAMED] | None = None


class EvaluationSettings(Record, kw_only=True):
    """The settings of an evaluation, as needed to repeat it.

    Attributes:
        systems: beside the unedited model and the edited one, as typed.
        costs: perplexity ratios that strengths were chosen for; empty for the strength under the
            budget.
        dtype: of the measurements.
        fit_dtype: of the forward passes that systems were fitted, and their strengths chosen, with;
            None if it is the same.
        word_list: its sha256.
        text_sha256: of the text for perplexity; None if there was none.
        options: of the method, as typed.
        prompts: None if nothing was continued.
        samples: continuations of each prompt, beside the greedy one.
        passages_per_prompt: continuations by the unedited model, for ``teacher_forced``.
        toxic_words: listed words in those.
        text_tokens: the most tokens of the text that were used; None for all.
        window: tokens of the text in one window.
        defence_set: version of the built-in set on which refusals were counted; None if they were
            not.
    """

    source: str
    systems: tuple[str, ...]
    costs: tuple[float, ...]
    device: str
    dtype: str
    word_list: Sha256
    neutral: str
    text_sha256: Sha256 | None
    pairs: str
    num_pairs: int | None
    seeds: tuple[int, ...]
    options: dict[str, str]
    max_perplexity_ratio: float
    prompts: PromptsRecord | None
    scorers: dict[str, Annotated[ScorerOrigin, NAMED]]
    samples: int
    max_new_tokens: int
    top_p: float
    generation_seed: int
    passages_per_prompt: int
    toxic_words: int
    text_tokens: int | None
    window: int
    defence_set: int | None = None
    fit_dtype: str | None = None


UNEDITED, EDITED = "unedited", "edited"
"""Names that systems have in the results of an evaluation."""


class SystemRecord(Record, kw_only=True):
    """One system that was measured.

    Attributes:
        group: the cost that the strength was chosen for, or None; systems of one name and group
            are averaged.
        seed: of its pairs; None if nothing was fitted.
        strength: of the edit; None for the unedited model.
        layers: edited layers.
        options: of its method, defaults resolved.
        metrics: see ``evaluation.measure``.
    """

    system: str
    group: float | None
    seed: int | None
    strength: Strength | None
    layers: tuple[int, ...]
    options: dict[str, OptionValue]
    metrics: dict[str, Metric]


class RowRecord(Record, kw_only=True):
    """The systems of one name and group, averaged over seeds.

    Attributes:
        strength: the strengths, separated by commas.
        seeds: how many.
    """

    system: str
    strength: str
    seeds: int
    metrics: dict[str, Metric]


class Evaluation(Record, kw_only=True):
    """The measurements of an evaluation: of the unedited model, the edited one, and controls.

    Attributes:
        scorers: names of the scorers of continuations.
        rows: of the table.
    """

    tool: Tool
    settings: EvaluationSettings
    scorers: tuple[str, ...]
    systems: tuple[SystemRecord, ...]
    rows: tuple[RowRecord, ...]


class GateRecord(Record, kw_only=True):
    """A limit that the run set beyond the guard's, and passed.

    Attributes:
        gate: the option.
        by: the source of the measurement: ``guard``, ``evaluation``, or an edited tensor.
    """

    gate: str
    by: str
    limit: float
    measured: float


class SampleRecord(Record, kw_only=True):
    """Greedy continuations of one prompt, before the edit and after it.

    Words of the word list are starred out unless the run was told not to.
    """

    prompt: str
    before: str
    after: str


class SearchTrial(Record, kw_only=True):
    """Options of a method that a search has tried, and their effect on the search part.

    Attributes:
        number: in the order of trials; 0 has the method's defaults.
        method: its name.
        options: of the method, as typed.
        share: share of the sampling units of the search part that it was measured on.
        measured: with the toxic words of the search; None if the edited model gives no numbers.
        divergence: KL of the next token's distribution under the edit from the unedited model's on
            ordinary text, in nats a token.
        stopped: why it was not measured on the whole part; None if it was.
    """

    number: Count
    method: str
    options: dict[str, str]
    share: Share
    measured: Measured | None
    divergence: Estimate | None
    stopped: str | None = None


class SearchRecord(Record, kw_only=True):
    """How the options of the method were found.

    Attributes:
        trials: that were tried.
        stopped: of them, before they were measured on the whole search part.
        seed: of the trials.
        prompts: the prompts whose continuations have the toxic words; None if those of held-out
            pairs count.
        fallback: why the held-out pairs count although there are prompts.
        toxic_words: in the search part.
        default: the trial of the method's defaults, with the strength that it then chooses.
        chosen: the trial whose options were used.
        front: the trials within the limits that no other one beats in both objectives, in the order
            of their divergence.
        kept: under the chosen options, the drop of the log-probability of toxic words on text that
            the search has not seen, over that on the search part; None if it is not known.
    """

    trials: Positive
    stopped: Count
    seed: int
    prompts: PromptsRecord | None
    fallback: str | None = None
    toxic_words: Positive
    default: SearchTrial
    chosen: SearchTrial
    front: tuple[SearchTrial, ...]
    kept: float | None = None


class Measurements(Record, kw_only=True):
    """The only part that may differ between two runs of the same inputs.

    Attributes:
        seconds: of each stage.
        memory_bytes: largest resident set of each stage, except the last, which verifies this file.
        peak_memory_bytes: the largest of all.
    """

    seconds: dict[str, float]
    memory_bytes: dict[str, int]
    peak_memory_bytes: int


class CalibrationRecord(Record, kw_only=True):
    """How a calibration model was trained: a file beside the model, not a part of a manifest.

    Attributes:
        source: the model whose first layers it begins as.
        source_files: sha256 of its files that were read, including the tokenizer's.
        pairs: the origin of the pairs, with the sha256 of the texts that were trained on.
        side: of the pairs.
        count: number of these sentences.
        depth: layers.
        rate: of AdamW at the first step.
        tokens: that were predicted in training.
        asked: the requested number of tokens; larger if the time ended first.
        minutes: time limit of the training.
        losses: nats a token, at the first step and at the end.
        files: of the folder, except this one.
    """

    tool: Tool
    source: str
    source_files: dict[str, Sha256]
    pairs: TextRecord
    side: Literal["neutral", "toxic"]
    count: Positive
    seed: int
    depth: Positive
    rate: float
    tokens: Positive
    asked: Positive
    minutes: float | None
    losses: tuple[float, float]
    environment: Environment
    files: dict[str, FileRecord]


class Manifest(Record, kw_only=True):
    """The record of one conversion by gloss-convert: inputs, work and outputs.

    Attributes:
        run: the conversion as asked for; paths are cut down to file names.
        neutral: ordinary prose.
        word_list: of offensive words.
        instances: harmful requests; None for methods that need none.
        prompts: the guard's prompts; None if it had none.
        samples: continuations before and after the edit; empty if none were taken.
        guard: None if it was switched off.
        output_package: name and version of the package that brought the output; None for our own.
        edited: in order of layer.
        activations: None if the method needed none.
        forward: None if activations of a file were all that was needed.
        evaluation: None if nothing was evaluated.
        files: every file of the folder except this one, the card and SHA256SUMS.
        replay_of: sha256 of the manifest that this one replays. The measurements are the original
            ones.
        steps: the single methods of several, in order; empty if there is only one. ``choice`` is
            then that of the last.
        search: the search that found the options of the method; None if there was none. A replay
            does not search.
    """

    schema_version: Literal[1]
    tool: Tool
    run: Annotated[Recipe, Meta(extra_json_schema={"unevaluatedProperties": False})]
    source: SourceRecord
    architecture: ArchitectureRecord
    method: MethodRecord
    pairs: PairsRecord
    neutral: TextRecord
    word_list: TextRecord
    instances: TextRecord | None = None
    prompts: PromptsRecord | None = None
    split: SplitRecord
    activations: ActivationsRecord | None
    edit: EditRecord
    choice: Choice
    guard: GuardRecord | None
    output_package: str | None = None
    edited: tuple[EditedTensor, ...]
    environment: Environment
    forward: ForwardRecord | None
    evaluation: Evaluation | None
    gates: tuple[GateRecord, ...]
    files: dict[str, FileRecord]
    measurements: Measurements
    replay_of: Sha256 | None = None
    steps: tuple[StepRecord, ...] = ()
    samples: tuple[SampleRecord, ...] = ()
    search: SearchRecord | None = None

    @property
    def digests(self) -> dict[str, str]:
        """The sha256 of the files, by name."""
        return {name: file.sha256 for name, file in self.files.items()}

    @property
    def subspace(self) -> SubspaceEvidence | None:
        """How a subspace was found; None of other methods.

        Raises:
            msgspec.ValidationError: it is not what the method says that it keeps.
        """
        return self.method.subspace

    @property
    def methods(self) -> list[tuple[MethodRecord, Choice]]:
        """Each method and the choice of its strength, in order."""
        alone = [(self.method, self.choice)]
        return [(step.method, step.choice) for step in self.steps] or alone

    @property
    def factors(self) -> dict[int, float]:
        """Layer -> how much of a subspace was removed from it, if less than all."""
        entries = sorted(self.edited, key=lambda entry: entry.layer)
        return {e.layer: e.measures["factor"] for e in entries if e.measures.get("factor", 1.0) < 1}

    @property
    def layers(self) -> list[int]:
        """The layers of the edited tensors, ascending."""
        return sorted({tensor.layer for tensor in self.edited})

    @property
    def shards(self) -> dict[str, FileRecord]:
        """The files that hold the model's tensors; none for an adapter."""
        return {name: file for name, file in self.files.items() if file.prefixes is not None}

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """A manifest from its decoded JSON.

        Raises:
            msgspec.ValidationError: naming the place, such as ``$.edited[3].norm``.
        """
        manifest = msgspec.convert(value, cls, dec_hook=_from_json)
        _ = [method.subspace for method, _ in manifest.methods]  # they must be readable, too
        for key in sorted(value["run"].keys() - {field.name for field in fields(Recipe)}):
            raise msgspec.ValidationError(f"Object contains unknown field `{key}` - at `$.run`")
        return manifest


def parse_calibration(value: Any) -> CalibrationRecord:
    """A record from its decoded JSON. Raises msgspec.ValidationError."""
    return msgspec.convert(value, CalibrationRecord)


def to_json(record: Record) -> Any:
    """A record as decoded JSON."""
    return msgspec.to_builtins(record, enc_hook=_to_json)


def to_text(record: Record) -> str:
    """The JSON of a record as files have it. Raises ValueError for NaN and infinities."""
    return json.dumps(to_json(record), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _to_json(value: Any) -> str:
    if isinstance(value, Path):
        return str(value)
    raise NotImplementedError(type(value).__name__)


def _from_json(kind: type, value: Any) -> Any:
    if kind is Path and isinstance(value, str):
        return Path(value)
    raise TypeError(f"Expected `str`, got `{type(value).__name__}`")
