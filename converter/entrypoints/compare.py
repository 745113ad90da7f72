"""Compare the continuations of a model and of its edited copy after the same prompts."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

from converter.calibration.word_list import load_words
from converter.checkpoints.architectures.kind import allow_own_code
from converter.checkpoints.plan import read_plan
from converter.checkpoints.resolve import resolve
from converter.entrypoints.made import made
from converter.errors import OptionError
from converter.evaluation.about import About
from converter.evaluation.masks import masks
from converter.evaluation.options import SampleOptions
from converter.evaluation.prompts import load_prompts
from converter.evaluation.samples import Sample, side_by_side, write
from converter.evaluation.scorers import Scorer, load_scorer
from converter.evaluation.systems import System
from converter.hub.addresses import settled
from converter.methods.workbench import Bench
from converter.models.chat import as_prompt
from converter.models.edited import edited, lowest_edited
from converter.models.resident import LanguageModel, choose_device
from converter.recipe import Recipe, Settings, without_folders
from converter.runtime import progress

_PROMPTS = 12
"""Number of prompts by default."""


@dataclass(slots=True)
class Two:
    """A model and its edited copy, which continue prompts.

    Attributes:
        bench: of the unedited model.
        system: the other one.
        hooked: whether it is the unedited model with its edit in hooks.
        asked: how they continue.
        scorers: name -> scorer.
        chat: whether prompts go through the chat template, as a user's message.
        together: whether both stay in memory if the other one has weights of its own.
        loaded: the other one, once it is loaded.
    """

    bench: Bench
    system: System
    hooked: bool
    asked: SampleOptions
    scorers: Mapping[str, Scorer]
    chat: bool
    together: bool
    loaded: LanguageModel | None = None

    def say(self, prompts: Sequence[str]) -> list[Sample]:
        """The continuations of both after prompts.

        Raises:
            OptionError, DataError, SourceError: see ``generate`` and ``as_prompt``.
        """
        bench, words = self.bench, self.bench.words
        before = self._texts(bench.load_measured(), prompts)
        after = self._after(prompts)
        lists = masks(words, mask=bench.recipe.mask)
        return side_by_side(prompts, (before, after), words, self.scorers, lists)

    def _after(self, prompts: Sequence[str]) -> list[list[str]]:
        bench, edit = self.bench, self.system.edit
        if self.hooked and edit is not None:
            model = bench.load_measured()
            hooks: AbstractContextManager[None] = edited(model.module, bench.plan, edit)
            with hooks:
                return self._texts(model, prompts, self.system.suffix)
        if not self.together:
            bench.unload()  # there is room for one of them at a time
        assert self.system.load is not None
        self.loaded = self.loaded or self.system.load()
        return self._texts(self.loaded, prompts)

    def _texts(
        self, model: LanguageModel, prompts: Sequence[str], suffix: str = ""
    ) -> list[list[str]]:
        if self.chat:
            prompts = [as_prompt(model.tokenizer, prompt, suffix) for prompt in prompts]
        return write(model, prompts, self.asked, self.bench.recipe.seed)

    @property
    def about(self) -> About:
        """Which models were compared, and how."""
        recipe, asked = self.bench.recipe, self.asked
        return About(
            base=self.bench.source.name,
            edited=self.system.name,
            how="the edit, in hooks on the base" if self.hooked else "weights of its own",
            seed=recipe.seed,
            max_new_tokens=asked.max_new_tokens,
            top_p=asked.top_p,
            chat=self.chat,
            masked=recipe.mask,
        )


def two_models(
    recipe: Recipe,
    place: str,
    asked: SampleOptions,
    settings: Settings,
    *,
    chat: bool | None,
    interactive: bool,
) -> Two:
    """Find a model and its edited copy. Weights are read only for digests.

    Args:
        recipe: its source is the unedited model; of the rest, seed, word list, device, dtype and
            masks count.
        place: of the edited copy: a folder, an adapter, a manifest or a repo id.
        chat: whether prompts go through the chat template; None: only those of an interactive
            comparison, if there is a template.
        interactive: whether prompts come one by one, so that both models stay in memory.

    Raises:
        ConverterError: one of its children says what is wrong.
    """
    recipe = settled(replace(recipe, forward="resident"))
    device = choose_device(recipe.device)
    scorers = {name: load_scorer(name, device) for name in asked.scorers}
    words = load_words(recipe.word_list)
    allow_own_code(recipe.trust_remote_code)
    with progress.stage("plan", f"reading the headers of {recipe.source}"):
        source = resolve(recipe.source, recipe.subfolder)
        plan = read_plan(source)
    bench = Bench.of(recipe, source, plan, words, device, settings)
    has_template = bool(bench.vocabulary.tokenizer.chat_template)
    if chat and not has_template:
        raise OptionError(
            "--chat", expected="a model with a chat template", found=f"{source.name} without one"
        )
    if chat is None:
        chat = interactive and has_template
    system = made(place, without_folders(place), bench)
    hooked = _is_shown(bench, system)
    if hooked and system.load is not None:
        progress.note(
            f"  {system.name} runs as the edit of its manifest, in hooks on {source.name}; "
            "gloss verify checks its own weights"
        )
    return Two(bench, system, hooked, asked, scorers, chat, interactive)


def _is_shown(bench: Bench, system: System) -> bool:
    """Whether the system runs through hooks on the unedited model.

    Raises OptionError if hooks cannot run it, and it has no weights of its own.
    """
    if system.edit is None or not system.is_of_unedited:
        return False
    try:
        lowest_edited(bench.plan, system.edit)
    except OptionError:
        if system.load is None:
            raise
        return False
    return True


def compare(two: Two, recipe: Recipe, asked: SampleOptions) -> list[Sample]:
    """The continuations of two models after the prompts of a recipe.

    Raises:
        OptionError: there are none.
        DataError, SourceError: they cannot be read; see also ``Two.say``.
    """
    if recipe.prompts == "none":
        raise OptionError("--prompts", expected="prompts to continue", found="none")
    most = None if asked.num_prompts else _PROMPTS
    prompts = load_prompts(recipe.prompts, asked.num_prompts, recipe.seed, most=most).texts
    about = two.about
    with progress.stage(
        "compare", f"{about.base} and {about.edited} continue {len(prompts)} prompts"
    ):
        return two.say(prompts)
