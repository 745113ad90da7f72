"""Search the options of a method: the least toxic words for the least change of the model.

    fewest nats of toxic words  against  KL on ordinary text,
    with perplexity on neutral text and of the words beside toxic ones within their limits

Every trial runs through hooks on a model that is loaded once, on text that is neither fitted nor
reported on (``search_texts``). Trials come from Optuna's TPE; several methods take turns. The first
of each method is what it does by default, and is measured on all of the text. Others are measured
on growing shares of it, and stopped after one

    if a ratio is over its limit by two standard errors, or
    if an earlier trial, within its limits and measured on everything, is better in both objectives
        by two standard errors, on the same share

The best of many looks better than it is. So the chosen trial is measured again on text that the
search has not seen, and ``kept`` says how much of the effect is left.
"""

import fcntl
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec.structs import replace

from converter.calibration.split import Parts
from converter.errors import DestinationError, GuardError, OptionError
from converter.evaluation.heldout import choose_strength, excess, limits, probe_of
from converter.evaluation.search_space import Point, Space
from converter.evaluation.search_texts import SHARES, SearchTexts
from converter.manifest import Estimate, GuardRecord, Measured, SearchRecord, SearchTrial, to_json
from converter.methods.base import Method, Proposal
from converter.methods.workbench import Bench
from converter.runtime import progress
from converter.runtime.cache import cache_error

if TYPE_CHECKING:
    from optuna import Study
    from optuna.storages import JournalStorage
    from optuna.trial import Trial

_DRAWN = 10
"""Number of random trials of a method, before the sampler learns from them."""

_BROKEN = 1e9
"""Excess over a limit of an edited model that gives no numbers."""

_OVER, _WORSE, _NONE = "over a limit", "worse than another", "no numbers"
"""Why a trial is stopped."""

_CERTAIN = 2
"""Standard errors."""

Shares = Sequence[tuple[float, float]]
"""Change of toxic words and divergence on each share that was measured."""


@dataclass(frozen=True, slots=True)
class Tried:
    """A trial, and its objectives on the shares."""

    trial: SearchTrial
    shares: Shares


@dataclass(slots=True)
class Search:
    """Trials of several methods on one model.

    Attributes:
        bench: of the model.
        spaces: of the methods.
        parts: of the texts; methods are fitted on ``fit``, and default strengths chosen on
            ``choose``.
        texts: makes the search part, when it is first needed.
        journal: file of the kept trials, from which a search continues.
        tried: so far, in order.
    """

    bench: Bench
    spaces: Sequence[Space]
    parts: Parts
    texts: Callable[[], SearchTexts]
    journal: Path
    tried: list[Tried] = field(default_factory=list)
    _fits: dict[tuple[str, Method], Proposal] = field(default_factory=dict)

    def run(self, count: int) -> list[Tried]:
        """Run trials until there are this many, kept ones included.

        Raises:
            ConverterError: one of its children; a GuardError if no strength of a default can be
                measured.
            DestinationError: the journal cannot be written, or another search writes it.
        """
        with _journal(self.journal) as storage:
            studies = {space.name: _study(storage, space.name) for space in self.spaces}
            self.tried = _kept(studies.values())
            if self.tried:
                progress.note(f"  {len(self.tried)} trials are there from before: {self.journal}")
            with progress.bar("trials", count, "trial") as shown:
                shown.update(min(len(self.tried), count))
                while len(self.tried) < count:
                    shown.set_postfix_str(self._best())
                    space = self.spaces[len(self.tried) % len(self.spaces)]
                    self.tried.append(self._try(studies[space.name], space))
                    shown.update(1)
        return self.tried[:count]

    def _best(self) -> str:
        """The best so far, in words."""
        found = best_of([each.trial for each in self.tried], self._budget)
        if found is None or found.measured is None:
            return "none is within the limits so far"
        measured = found.measured
        return (
            f"best x {measured.teacher_forced.value:.3f} at perplexity "
            f"x {measured.perplexity_ratio.value:.3f}"
        )

    @property
    def _budget(self) -> float:
        return self.bench.recipe.max_perplexity_ratio

    def _try(self, study: "Study", space: Space) -> Tried:
        """Run one more trial, and report it to its study."""
        number = len(self.tried)
        done = sum(each.trial.method == space.name for each in self.tried)
        proposal = self._fit(space, space.default)
        strengths = proposal.strengths if proposal.is_free else ()
        axes = space.axes(strengths)
        if not axes:
            raise OptionError(
                "a search", expected=f"an option of {space.name} that is left to it",
                found="none", hint="leave out an -o, or the search",
            )  # fmt: skip
        first = None if done else self._default(space, proposal)
        with _telling(self.journal):
            asked, point = _ask(study, f"{self.bench.recipe.seed} {space.name} {done}", axes, first)
        lasting = space.default_point(strengths[-1] if strengths else None)
        tried = self._measured(number, space, space.options({**lasting, **point}))
        with _telling(self.journal):
            asked.set_user_attr("trial", to_json(tried.trial))
            asked.set_user_attr("shares", tried.shares)
            asked.set_constraint("limits", _over(tried.trial, self._budget))
            study.tell(asked, tried.shares[-1])
        return tried

    def _default(self, space: Space, proposal: Proposal) -> Point:
        """The method's defaults, with the strength chosen as without a search."""
        own = space.narrowed(proposal, space.default)
        if not own.is_free:
            return space.default_point(None)
        with progress.stage("choose", f"choosing the {space.default.strength} of the default"):
            probe = probe_of(self.bench, self.parts.choose, dtype=self.bench.held_out)
            try:
                strength = choose_strength(probe, own, self._budget).strength
            except GuardError as error:
                progress.warn(f"{space.name} by default: {error.what}")
                strength = own.strengths[0]
        return space.default_point(strength)

    def _fit(self, space: Space, method: Method) -> Proposal:
        """The proposal of one fit, for all trials with these values of its options."""
        widest = space.widest(method)
        if (key := (space.name, widest)) not in self._fits:
            self._fits[key] = self.bench.fit(widest, self.parts.fit)
        return self._fits[key]

    def _measured(self, number: int, space: Space, options: dict[str, str]) -> Tried:
        """Measure options, unless they were tried before.

        The default, with which every other trial is compared, is never stopped early.
        """
        is_first = all(each.trial.method != space.name for each in self.tried)
        for each in self.tried:
            if (each.trial.method, each.trial.options) == (space.name, options):
                return Tried(replace(each.trial, number=number), each.shares)
        method = space.method(options)
        proposal = space.narrowed(self._fit(space, method), method)
        strength = getattr(method, method.strength, None)
        edit = proposal.edit(proposal.strengths[-1] if strength is None else strength)
        shares, stopped = list[tuple[float, float]](), None
        measured: Measured | None = None
        moved: Estimate | None = None
        for step in self.texts().measure(edit):
            share, measured, moved = step
            values = (measured.toxic_change.value, moved.value)
            if not all(map(isfinite, (*values, measured.perplexity_ratio.value))):
                shares, stopped, measured, moved = [(0.0, 0.0)], _NONE, None, None
                break
            shares.append(values)
            stopped = self._stopped(measured, moved, len(shares))
            if stopped and not is_first:
                break
        early = share < SHARES[-1] or measured is None
        trial = SearchTrial(
            number=number, method=space.name, options=options, share=share,
            measured=measured, divergence=moved, stopped=stopped if early else None,
        )  # fmt: skip
        return Tried(trial, shares)

    def _stopped(self, measured: Measured, moved: Estimate, shares: int) -> str | None:
        """Why a trial is stopped before the rest of the texts; None if it is not. See the module's
        rules.
        """
        for _, most, ratio in limits(measured, self._budget):
            if ratio.value - _CERTAIN * ratio.error > most:
                return _OVER
        words = measured.toxic_change.value - _CERTAIN * measured.toxic_change.error
        divergence = moved.value - _CERTAIN * moved.error
        for each in self.tried:
            if within(each.trial, self._budget):
                toxic, far = each.shares[shares - 1]
                if toxic < words and far < divergence:
                    return _WORSE
        return None


def within(trial: SearchTrial, budget: float) -> bool:
    """Whether a trial was measured on everything, and keeps its limits by a standard error."""
    return not trial.stopped and trial.measured is not None and not excess(trial.measured, budget)


def best_of(trials: Sequence[SearchTrial], budget: float) -> SearchTrial | None:
    """The most effective of the trials within the limits, as a strength is chosen; or None."""
    return min((t for t in trials if within(t, budget)), key=_objectives, default=None)


def front_of(trials: Sequence[SearchTrial], budget: float) -> list[SearchTrial]:
    """The trials within the limits that no other beats in both objectives.

    In the order of their divergence, the least first.
    """
    found: list[SearchTrial] = []
    inside = {_objectives(t): t for t in reversed(trials) if within(t, budget)}
    for (toxic, _), trial in sorted(inside.items(), key=lambda item: item[0][::-1]):
        if not found or toxic < _objectives(found[-1])[0]:
            found.append(trial)
    return found


def _objectives(trial: SearchTrial) -> tuple[float, float]:
    assert trial.measured is not None
    assert trial.divergence is not None
    return trial.measured.toxic_change.value, trial.divergence.value


def record_of(tried: Sequence[Tried], texts: SearchTexts, bench: Bench) -> SearchRecord:
    """The record of a search for a manifest; ``kept`` is not known yet.

    Raises:
        GuardError: no trial is within the limits.
    """
    trials, recipe = [each.trial for each in tried], bench.recipe
    chosen = best_of(trials, recipe.max_perplexity_ratio)
    if chosen is None:
        raise GuardError(
            f"none of {len(trials)} trials keeps within the perplexity budget",
            expected=f"a perplexity ratio of at most {recipe.max_perplexity_ratio:g}",
            found="more in each, or too much of the words beside toxic ones",
            hint="raise --max-perplexity-ratio, give more pairs, or try more",
        )
    return SearchRecord(
        trials=len(trials),
        stopped=sum(trial.stopped is not None for trial in trials),
        seed=recipe.seed,
        prompts=texts.prompts.record() if texts.prompts else None,
        fallback=texts.fallback,
        toxic_words=texts.toxic_words,
        default=trials[0],
        chosen=chosen,
        front=tuple(front_of(trials, recipe.max_perplexity_ratio)),
    )


def with_kept(record: SearchRecord, guard: GuardRecord | None) -> SearchRecord:
    """A record with ``kept``, if guard and search judged the same kind of words."""
    own = record.prompts is not None and record.fallback is None
    if guard is None or record.chosen.measured is None:
        return record
    told = guard.headline.words if guard.headline else None
    unseen = told if own else guard.edit
    gain = -record.chosen.measured.toxic_change.value
    if unseen is None or not gain > 0:
        return record
    return replace(record, kept=-unseen.toxic_change.value / gain)


def _over(trial: SearchTrial, budget: float) -> float:
    """The excess of a trial over its limits; 0 or less if it keeps them."""
    if trial.measured is None:
        return _BROKEN
    found = limits(trial.measured, budget)
    over = max(ratio.value + ratio.error - most for _, most, ratio in found)
    return over if isfinite(over) else _BROKEN


@contextmanager
def _journal(path: Path) -> Iterator["JournalStorage"]:
    """Lock and open the journal of a search. Raises DestinationError."""
    from optuna.logging import ERROR, set_verbosity
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    set_verbosity(ERROR)
    with ExitStack() as opened:
        with _telling(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            held = opened.enter_context(open(path.with_suffix(".held"), "ab"))  # noqa: PTH123
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DestinationError(
                    "the same search is running already", hint="wait until it has ended"
                ) from None
            _mend(path)
            storage = JournalStorage(JournalFileBackend(str(path), JournalFileOpenLock(str(path))))
        yield storage


def _mend(path: Path) -> None:
    """Remove the leftovers of a killed search: half a line, Optuna's lock."""
    if path.exists():
        with open(path, "rb+") as file:  # noqa: PTH123
            file.truncate(file.read().rfind(b"\n") + 1)
    Path(f"{path}.lock").unlink(missing_ok=True)


@contextmanager
def _telling(path: Path) -> Iterator[None]:
    """Raise DestinationError if the journal cannot be read or written."""
    try:
        yield
    except OSError as error:
        raise cache_error(path, error) from error


def _study(storage: "JournalStorage", name: str) -> "Study":
    """The study of one method; its unfinished trials count as failed."""
    import optuna

    study = optuna.create_study(
        study_name=name, storage=storage, directions=["minimize"] * 2, load_if_exists=True
    )
    running = optuna.trial.TrialState.RUNNING
    for trial in study.get_trials(deepcopy=False, states=[running]):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    return study


def _kept(studies: Iterable["Study"]) -> list[Tried]:
    """The trials that were finished, in order."""
    found = [
        Tried(msgspec.convert(trial.user_attrs["trial"], SearchTrial), trial.user_attrs["shares"])
        for study in studies
        for trial in study.get_trials(deepcopy=False)
        if trial.values
    ]
    return sorted(found, key=lambda each: each.trial.number)


def _ask(
    study: "Study", seed: str, axes: Mapping[str, Sequence[Any]], first: Point | None
) -> tuple["Trial", Point]:
    """The next trial of a study, and its place: the given one, or the one that TPE proposes.

    The sampler is made anew for each trial, so that it does not matter how often a search was
    interrupted.
    """
    from optuna.samplers import TPESampler
    from optuna.trial import TrialState

    if first and not study.get_trials(deepcopy=False, states=[TrialState.WAITING]):
        study.enqueue_trial({name: list(axis).index(first[name]) for name, axis in axes.items()})
    study.sampler = TPESampler(
        seed=random.Random(seed).getrandbits(32),  # noqa: S311 - not a secret
        n_startup_trials=_DRAWN, multivariate=True, constant_liar=False,
    )  # fmt: skip
    asked = study.ask()
    return asked, {
        name: axis[asked.suggest_int(name, 0, len(axis) - 1)] for name, axis in axes.items()
    }
