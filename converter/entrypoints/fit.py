"""From texts to a frozen subspace that has been examined: fit, choose the rank, guard.

One model is loaded at most, when it is first needed, and never written to: every edit that is tried
runs through hooks.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from converter.calibration.collect import activation_inputs, extract
from converter.calibration.pairs import Pairs, Prose
from converter.calibration.split import Part, Parts, split
from converter.calibration.statistics import (
    Activations,
    Request,
    cache_key,
    load_activations,
    save_activations,
    texts_of_file,
)
from converter.calibration.vocabulary import Vocabulary
from converter.calibration.word_list import WordList
from converter.checkpoints.plan import Plan
from converter.checkpoints.source import Source
from converter.edits.base import Projection
from converter.errors import DataError, GuardError
from converter.evaluate.guard import Verdict, examine
from converter.evaluate.heldout import Probe
from converter.evaluate.strength import Choice, choose_rank
from converter.methods.base import Method
from converter.methods.post_norms import Gains, before_norm, read_gains
from converter.methods.subspace import Subspace
from converter.models.build import load_language_model, stored_dtype, stream_language_model
from converter.models.loading import load_tokenizer
from converter.models.placement import Forward, choose_forward
from converter.models.resident import LanguageModel, Model, choose_dtype
from converter.models.streamed import StreamedModel
from converter.recipe import Run
from converter.runtime.progress import Report


@dataclass(frozen=True, slots=True)
class Fitted:
    """What a fit gives.

    Attributes:
        parts: the texts, split.
        activations: that the fit has seen.
        subspace: of the chosen rank.
        edit: its projection.
        choice: how the rank came about.
        verdict: of the guard; None if it was switched off.
    """

    parts: Parts
    activations: Activations
    subspace: Subspace
    edit: Projection
    choice: Choice
    verdict: Verdict | None


@dataclass(slots=True)
class Bench:
    """A fetched source with what fitting a method to it takes; its model is loaded when needed."""

    run: Run
    source: Source
    plan: Plan
    words: WordList
    vocabulary: Vocabulary
    device: str
    dtype: torch.dtype
    cache: Path
    report: Report
    gains: Gains
    forward: Forward
    model: Model | None = None
    has_run: bool = False

    @classmethod
    def of(
        cls,
        run: Run,
        source: Source,
        plan: Plan,
        words: WordList,
        device: str,
        cache: Path,
        report: Report,
        *,
        memory_limit: int | None = None,
    ) -> "Bench":
        """Nothing is read yet but the tokenizer and the norms after the FFN.

        Args:
            memory_limit: bytes that the forward pass is planned with, if less than what there is.
        """
        dtype = choose_dtype(run.forward_dtype, stored_dtype(plan), device)
        vocabulary = Vocabulary(plan, source, load_tokenizer(source.folder, run.trust_remote_code))
        gains = read_gains(plan, source)
        forward = choose_forward(
            run.forward, plan, dtype, device, memory_limit, spread=run.device == "map"
        )
        return cls(
            run, source, plan, words, vocabulary, device, dtype, cache, report, gains, forward
        )

    def load(self) -> Model:
        """The unedited model, loaded at the first call, or made ready to be streamed."""
        if self.model is None:
            if not self.has_run:
                free = f"{self.forward.budget / 1e9:.1f} GB to plan with"
                how = f"forward pass {self.forward.mode}: {self.forward.reason}"
                self.report.note(f"  {how} ({free})")
            self.has_run = True
            self.model = self._stream() if self.forward.mode == "streamed" else self._load()
        return self.model

    def load_resident(self) -> LanguageModel:
        """The same, for who needs it in memory. Raises OptionError or SourceError."""
        self.forward.need_resident()
        model = self.load()
        assert isinstance(model, LanguageModel)
        return model

    def _load(self) -> LanguageModel:
        return load_language_model(
            self.source,
            self.plan,
            self.vocabulary.tokenizer,
            self.dtype,
            self.device,
            spread=self.run.device == "map",
            trust_remote_code=self.run.trust_remote_code,
        )

    def _stream(self) -> StreamedModel:
        return stream_language_model(
            self.source,
            self.plan,
            self.vocabulary.tokenizer,
            self.dtype,
            self.device,
            self.forward.budget,
            self.cache,
            trust_remote_code=self.run.trust_remote_code,
        )

    def unload(self) -> None:
        """Let the model go; the edit of the files does not need it."""
        self.model = None

    def fit(self, method: Method, part: Part) -> tuple[Activations, Subspace]:
        """Take the activations, or find them, and fit; bases are those of down-projections."""
        count = len(part.pairs.pairs) or "unknown"
        with self.report.stage("activations", f"activations of {count} pairs"):
            seen = activations_of(self, method.request, part)
        with self.report.stage("fit", f"fitting {method.title}"):
            warn_about_words(method, self.vocabulary, self.words, self.report)
            subspace = method.fit(seen, self.vocabulary.decode, self.words)
            return seen, before_norm(subspace, self.gains)


def fit(bench: Bench, method: Method, pairs: Pairs, prose: Prose) -> Fitted:
    """Fit a method to a fetched source, choose the rank, examine the edit.

    Raises:
        ConverterError: one of its children; a GuardError if the edit must not be written.
    """
    run, report = bench.run, bench.report
    parts = split(pairs, prose, run.seed)
    if run.activations is not None:
        fitted = Part(*texts_of_file(run.activations, parts.fit.pairs, parts.fit.prose, report))
        parts = replace(parts, fit=fitted)
        if not fitted.pairs.pairs and (run.guard or method.rank is None):
            raise DataError(
                f"{run.activations.name} does not say which pairs it was made from",
                hint="nothing is then known to be held out; give both -o rank and --no-guard",
            )
    seen, subspace = bench.fit(method, parts.fit)
    choice = Choice(subspace.rank, {})
    if method.rank is None:
        with report.stage("choose", "choosing the rank on held-out text"):
            probe = probe_of(bench.load(), parts.choose, report)
            choice = choose_rank(probe, subspace, method, run.max_perplexity_ratio)
        subspace = subspace.truncated(choice.rank)
    edit = Projection(subspace.bases, method.edit_bias)
    verdict = None
    if run.guard:
        with report.stage("guard", "measuring the edit and random ones on other held-out text"):
            verdict = guard(bench, method, edit, seen, parts.report)
    return Fitted(parts, seen, subspace, edit, choice, verdict)


def activations_of(bench: Bench, request: Request, part: Part) -> Activations:
    """From the file that was given, from the cache, or from a forward pass."""
    run, report, hidden_size = bench.run, bench.report, bench.plan.dimensions.hidden_size
    if run.activations is not None:
        return load_activations(run.activations, request, hidden_size)
    inputs = activation_inputs(
        bench.source.digests(bench.cache),
        bench.plan.architecture,
        part.pairs,
        part.prose,
        request,
        device=bench.device,
        dtype=str(bench.dtype).removeprefix("torch."),
        batch_size=run.batch_size,
        mode=bench.forward.mode,
    )
    path = bench.cache / "activations" / f"{cache_key(inputs)}.safetensors"
    if path.exists():
        try:
            found = load_activations(path, request, hidden_size)
        except DataError as error:
            report.warn(f"the cached {error}; running the model again")
        else:
            report.note(f"  cache hit, no forward pass: {path}")
            return found
    report.note("  cache miss, running the model")
    moments = request.directions > 0
    total = (2 + request.gradient + 2 * moments) * len(part.pairs.pairs)
    total += len(part.prose.paragraphs) * (request.second_moment + moments)
    with report.bar("forward", total, "text") as bar:
        seen, dropped = extract(
            bench.load(),
            request,
            part.pairs,
            part.prose,
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
            "vocabulary says little; the other rankings do not depend on it"
        )


def probe_of(model: Model, part: Part, report: Report) -> Probe:
    """The unedited model's view of a held-out part."""
    count = len(part.prose.paragraphs) + 2 * len(part.pairs.pairs)
    with report.bar("unedited", count, "text") as bar:
        return Probe(model, part, bar.update)


def guard(bench: Bench, method: Method, edit: Projection, seen: Activations, part: Part) -> Verdict:
    """Examine an edit and refuse it, or with ``force`` warn, if it does not pass.

    Raises:
        GuardError: it does not pass.
    """
    run, report = bench.run, bench.report
    verdict = examine(
        probe_of(bench.load(), part, report),
        edit,
        method.edit_layers,
        budget=run.max_perplexity_ratio,
        draws=run.guard_draws,
        seed=run.seed,
        moment=seen.second_moment,
        gains=bench.gains,
    )
    for warning in verdict.warnings:
        report.warn(warning)
    if verdict.reasons:
        refusal = GuardError(
            "the edit is refused: " + "; and ".join(verdict.reasons),
            hint="nothing was written; see README, 'When the guard refuses'",
        )
        if not run.force:
            raise refusal
        report.warn(f"--force writes an edit that the guard refuses: {refusal.what}")
    return verdict
