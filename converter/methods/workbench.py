"""The workbench of a source: everything that a fit needs. Its model is loaded when needed."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from converter.calibration.calibration_models import (
    Calibration,
    Contrast,
    Training,
    calibrate,
    contrast,
)
from converter.calibration.collect import activation_inputs, extract
from converter.calibration.given import given_calibration
from converter.calibration.instances import Instances, load_instances
from converter.calibration.pairs import Pairs, Prose
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
from converter.checkpoints.weights import Weight
from converter.edits.base import Edit
from converter.edits.storage import read_weight
from converter.errors import DataError, OptionError
from converter.manifest import TOOL, Origin
from converter.methods.base import Method, Proposal, proposal_of
from converter.models.edited import edited
from converter.models.loading import (
    load_language_model,
    load_tokenizer,
    stream_language_model,
)
from converter.models.pieces import Pieces, keeping
from converter.models.placement import Forward, choose_forward
from converter.models.resident import LanguageModel, Model, choose_dtype, held_out_dtype
from converter.models.transformers_loader import Loading
from converter.recipe import Recipe, Settings
from converter.runtime import progress
from converter.runtime.cache import cache_folder

TRAINING = "calibration models are trained, for which"
TRAINING_HINT = "give --forward resident, or choose another method"
"""The reason why the model must be in memory, and the hint."""

_NOWHERE = Origin(name="nowhere")
_NO_TEXTS = Part(Pairs((), _NOWHERE, ""), Prose((), _NOWHERE, ""))


@dataclass(slots=True)
class Bench:
    """The ``Workbench`` of a fetched source; its model is loaded when it is needed.

    Attributes:
        part: the texts that the current fit may use.
        seen: the activations that it last asked for.
        former: the edit of earlier methods, which a fit must take into account.
        taught: the instances, once they are read.
        held_out: dtype of the measurements on held-out text; ``dtype`` is that of the fit.
        loaded: the dtype of ``model``.
        pieces: the model's results so far, if they are kept.
    """

    recipe: Recipe
    source: Source
    plan: Plan
    words: WordList
    vocabulary: Vocabulary
    device: str
    dtype: torch.dtype
    gains: Mapping[int, Tensor]
    forward: Forward
    how: Loading
    held_out: torch.dtype
    model: Model | None = None
    has_run: bool = False
    part: Part = _NO_TEXTS
    seen: Activations | None = None
    former: Edit | None = None
    taught: Instances | None = None
    loaded: torch.dtype = torch.float32
    pieces: Pieces | None = None

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        source: Source,
        plan: Plan,
        words: WordList,
        device: str,
        settings: Settings = Settings(),
    ) -> "Bench":
        """Only the tokenizer and the norms after the FFN are read at first.

        The forward pass is planned with the memory limit of the settings, or the available memory
        if that is less.
        """
        dtype = choose_dtype(recipe.forward_dtype, plan, device)
        tokenizer = load_tokenizer(source.folder, recipe.trust_remote_code)
        vocabulary = Vocabulary(plan, source, tokenizer)
        gains = {
            layer: source.read(shard, info).float() + plan.norm_offset(layer)
            for layer, (shard, info) in plan.post_norms.items()
        }
        how = Loading(settings.attention, recipe.trust_remote_code, recipe.device == "map")
        forward = choose_forward(
            recipe.forward, plan, dtype, device, settings.memory_limit, spread=how.spread
        )
        held_out = held_out_dtype(recipe.forward_dtype, plan, device)
        return cls(
            recipe, source, plan, words, vocabulary, device, dtype, gains, forward, how, held_out
        )

    def load(self, dtype: torch.dtype | None = None) -> Model:
        """The unedited model, loaded at the first call, or prepared for streaming.

        Args:
            dtype: by default that of the fit. Only one model is held: one that was loaded in
                another dtype is released first.
        """
        dtype = dtype or self.dtype
        if self.model is None or self.loaded != dtype:
            self.unload()
            self.loaded = dtype
            if not self.has_run:
                free = f"{self.forward.budget / 1e9:.1f} GB to plan with"
                how = f"forward pass {self.forward.mode}: {self.forward.reason}"
                progress.note(f"  {how} ({free})")
            self.has_run = True
            what = (self.source, self.plan, self.vocabulary.tokenizer, dtype, self.device)
            with progress.doing("loading the model"):
                if self.forward.mode == "streamed":
                    self.model = stream_language_model(*what, self.forward.budget, self.how)
                else:
                    self.model = load_language_model(*what, self.how)
        if self.pieces:
            self.pieces.module = self.model.module
        return self.model

    def load_resident(self) -> LanguageModel:
        """The model of the fit, in memory as a whole. Raises OptionError or SourceError."""
        return self._resident(self.dtype)

    def load_measured(self) -> LanguageModel:
        """The same in the dtype of measurements on held-out text."""
        return self._resident(self.held_out)

    def _resident(self, dtype: torch.dtype) -> LanguageModel:
        self.forward.need_resident()
        model = self.load(dtype)
        assert isinstance(model, LanguageModel)
        return model

    @contextmanager
    def as_left(self) -> Iterator[None]:
        """Within this context, the model computes as the former methods left it, through hooks."""
        if self.former is None:
            yield
        else:
            with edited(self.load().module, self.plan, self.former):
                yield

    def unload(self) -> None:
        """Release the model."""
        self.model = None
        if self.pieces:
            self.pieces.module = None

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Within this context, keep the model's results, and use those of a stopped run.

        Raises:
            CheckpointError, SourceError: the source cannot be read.
            DestinationError: the cache cannot be written.
        """
        recipe = self.recipe
        if recipe.activations and not recipe.guard:  # little is run, and no digest is needed
            yield
            return
        run = {
            "tool": TOOL.version,
            "files": self.source.digests(),
            "recipe": repr(recipe.record()),
            "device": self.device,
            "forward": self.forward.mode,
            "attention": self.how.attention,
            "libraries": {name: version(name) for name in ("tokenizers", "torch", "transformers")},
        }
        try:
            with keeping(cache_key(run)) as self.pieces:
                yield
        finally:
            self.pieces = None

    def fit(self, method: Method, part: Part) -> Proposal:
        """Fit a method to texts, and to the model as the former methods left it."""
        self.part, self.seen = part, None
        with progress.stage("fit", f"fitting {method.title}"), self.as_left():
            found = proposal_of(method, self)
        as_now = partial(self._as_left_by, self.former)
        return replace(found, edit=as_now(found.edit), control=as_now(found.control))

    def _as_left_by(self, former: Edit | None, make: Callable[..., Edit]) -> Callable[..., Edit]:
        """``make``, wrapped so that it always sees the weights as ``former`` left them."""

        def made(*given: Any) -> Edit:
            now, self.former = self.former, former
            try:
                return make(*given)
            finally:
                self.former = now

        return made

    def activations(self, request: Request) -> Activations:
        """The activations: from the given file, from the cache, or from a forward pass."""
        count = len(self.part.pairs.pairs) or "unknown"
        with progress.stage("activations", f"activations of {count} pairs"):
            if given := self.recipe.activations:
                size = self.plan.dimensions.hidden_size
                self.seen = load_activations(given, request, size)
            else:
                self.seen = self._taken(request)
        return self.seen

    def _taken(self, request: Request) -> Activations:
        """The activations from the cache, or from a forward pass."""
        part, batch_size = self.part, self.recipe.batch_size
        inputs = activation_inputs(
            self.source.digests(),
            self.plan.architecture,
            part,
            request,
            device=self.device,
            dtype=str(self.dtype).removeprefix("torch."),
            batch_size=batch_size,
            mode=self.forward.mode,
        )
        if self.former is not None:
            inputs["former"] = self.former.digest()
        if self.how.attention != "auto":
            inputs["attention"] = self.how.attention
        path = cache_folder() / "activations" / f"{cache_key(inputs)}.safetensors"
        if path.exists():
            try:
                found = load_activations(path, request, self.plan.dimensions.hidden_size)
            except DataError as error:
                progress.warn(f"the cached {error}; running the model again")
            else:
                progress.note(f"  cache hit, no forward pass: {path}")
                return found
        progress.note("  cache miss, running the model")
        seen, dropped = extract(self.load(), request, part.pairs, part.prose, batch_size=batch_size)
        if dropped:
            progress.warn(
                f"{dropped} pairs have no token that predicts a toxic one and were left out"
            )
        seen = replace(seen, inputs=inputs)
        save_activations(seen, path)
        progress.note(f"  kept in {path}")
        return seen

    @property
    def instances(self) -> Instances:
        """See ``Workbench``; read at the first call. Raises DataError or SourceError."""
        if self.taught is None:
            self.taught = load_instances(self.recipe.instances)
        return self.taught

    def contrast(self, training: Training) -> Contrast:
        """See ``Workbench``."""
        self._need_one_device()
        with progress.stage("calibrate", "training calibration models"):
            return contrast(self.load_resident(), self.part.pairs, training, self.recipe.seed)

    def calibrate(self, training: Training, names: Collection[str]) -> Mapping[str, Calibration]:
        """See ``Workbench``."""
        self._need_one_device()
        pairs, found = self.part.pairs, dict[str, Calibration]()
        for side in ("neutral", "toxic"):
            if side == "neutral" and self.recipe.calibration is not None:
                found[side] = given_calibration(self.recipe.calibration, names, pairs)
                continue
            texts = [getattr(pair, side) for pair in pairs.pairs]
            with progress.stage("calibrate", f"training a calibration model of {side} text"):
                made = calibrate(self.load_resident(), texts, training, self.recipe.seed, side)
            state = made.module.state_dict()
            about = {"losses": list(made.losses), "tokens": made.tokens}
            found[side] = Calibration({name: state[name].cpu() for name in names}, about)
        return found

    def _need_one_device(self) -> None:
        """Raise OptionError or SourceError unless the model is in memory, on one device."""
        if self.how.spread:
            raise OptionError(f"{TRAINING} the model must be on one device", found="--device map")
        self.forward.need_resident(TRAINING, TRAINING_HINT)

    def weight(self, weight: Weight) -> Tensor:
        """See ``Workbench``; as former methods left it."""
        W = read_weight(self.source.read, weight)
        delta = self.former.tensors.get(weight.info.name) if self.former else None
        return W if delta is None else delta.whole(W)

    def decode(self, directions: Tensor, count: int) -> list[tuple[str, ...]]:
        """See ``Vocabulary.decode``."""
        return self.vocabulary.decode(directions, count)

    def single_token_share(self) -> float:
        """Which share of the word list are single tokens of the model."""
        return self.vocabulary.single_token_share(self.words)

    def masked(self, token: str) -> str:
        """A token, with stars if it is offensive and the run masks words."""
        return self.words.mask(token) if self.recipe.mask else token
