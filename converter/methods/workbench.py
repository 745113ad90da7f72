"""A source with everything that fitting a method to it takes; its model is loaded when needed."""

from dataclasses import dataclass, replace

import torch

from converter.calibration.collect import activation_inputs, extract
from converter.calibration.split import Part
from converter.calibration.statistics import (
    Activations,
    Request,
    cache_key,
    load_activations,
    save_activations,
)
from converter.calibration.vocabulary import Vocabulary
from converter.calibration.word_list import WordList
from converter.checkpoints.plan import Plan
from converter.checkpoints.source import Source
from converter.errors import DataError
from converter.methods.base import Method
from converter.methods.post_norms import Gains, before_norm, read_gains
from converter.methods.subspace import Subspace
from converter.models.build import load_language_model, stored_dtype, stream_language_model
from converter.models.loading import load_tokenizer
from converter.models.placement import Forward, choose_forward
from converter.models.resident import LanguageModel, Model, choose_dtype
from converter.models.streamed import StreamedModel
from converter.recipe import Run
from converter.runtime import progress
from converter.runtime.cache import cache_folder


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
        return cls(run, source, plan, words, vocabulary, device, dtype, gains, forward)

    def load(self) -> Model:
        """The unedited model, loaded at the first call, or made ready to be streamed."""
        if self.model is None:
            if not self.has_run:
                free = f"{self.forward.budget / 1e9:.1f} GB to plan with"
                how = f"forward pass {self.forward.mode}: {self.forward.reason}"
                progress.note(f"  {how} ({free})")
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
            trust_remote_code=self.run.trust_remote_code,
        )

    def unload(self) -> None:
        """Let the model go; the edit of the files does not need it."""
        self.model = None

    def fit(self, method: Method, part: Part) -> tuple[Activations, Subspace]:
        """Take the activations, or find them, and fit; bases are those of down-projections."""
        count = len(part.pairs.pairs) or "unknown"
        with progress.stage("activations", f"activations of {count} pairs"):
            seen = activations_of(self, method.request, part)
        with progress.stage("fit", f"fitting {method.title}"):
            warn_about_words(method, self.vocabulary, self.words)
            subspace = method.fit(seen, self.vocabulary.decode, self.words)
            return seen, before_norm(subspace, self.gains)


def activations_of(bench: Bench, request: Request, part: Part) -> Activations:
    """From the file that was given, from the cache, or from a forward pass."""
    run, hidden_size = bench.run, bench.plan.dimensions.hidden_size
    if run.activations is not None:
        return load_activations(run.activations, request, hidden_size)
    inputs = activation_inputs(
        bench.source.digests(),
        bench.plan.architecture,
        part.pairs,
        part.prose,
        request,
        device=bench.device,
        dtype=str(bench.dtype).removeprefix("torch."),
        batch_size=run.batch_size,
        mode=bench.forward.mode,
    )
    path = cache_folder() / "activations" / f"{cache_key(inputs)}.safetensors"
    if path.exists():
        try:
            found = load_activations(path, request, hidden_size)
        except DataError as error:
            progress.warn(f"the cached {error}; running the model again")
        else:
            progress.note(f"  cache hit, no forward pass: {path}")
            return found
    progress.note("  cache miss, running the model")
    moments = request.directions > 0
    total = (2 + request.gradient + 2 * moments) * len(part.pairs.pairs)
    total += len(part.prose.paragraphs) * (request.second_moment + moments)
    with progress.bar("forward", total, "text"):
        seen, dropped = extract(
            bench.load(),
            request,
            part.pairs,
            part.prose,
            batch_size=run.batch_size,
        )
    if dropped:
        progress.warn(f"{dropped} pairs have no token that predicts a toxic one and were left out")
    seen = replace(seen, inputs=inputs)
    save_activations(seen, path)
    progress.note(f"  kept in {path}")
    return seen


def warn_about_words(method: Method, vocabulary: Vocabulary, words: WordList) -> None:
    """A ranking by vocabulary is worth little if the vocabulary splits the listed words."""
    if getattr(method, "ranking", None) != "vocabulary":
        return
    share = vocabulary.single_token_share(words)
    if share < 0.5:
        progress.warn(
            f"only {share:.0%} of the word list are single tokens of this model, so ranking by "
            "vocabulary says little; the other rankings do not depend on it"
        )
