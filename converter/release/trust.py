"""How far the number of a verdict can be trusted: questions and answers, from a manifest.

The answers say what the manifest records. Where it records nothing, they say so.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from converter.checkpoints.names import SIGNATURE
from converter.evaluation.results import around
from converter.manifest import EDITED, GuardRecord, Manifest
from converter.release.verdict import factor, mean, more, span

_ONLY_EVALUATED = {
    "toxicity": "the toxicity of text that the edited model writes",
    "ability": "its abilities in benchmarks",
    "refusals": "how often it refuses",
    "safeedit": "whether its answers to attacks are safe",
}
"""Beginning of a metric's name -> what it measures; the guard measures none of these."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A question of a careful reader, and the answer, which contains untrusted text."""

    question: str
    text: str


def trust(manifest: Manifest, verify: str) -> Iterator[Answer]:
    """The questions, the most important one first.

    Args:
        manifest: of the result.
        verify: the command that verifies it.
    """
    guard = manifest.guard
    if guard is not None:
        yield Answer("How much text is behind the number?", _basis(manifest, guard))
        yield Answer("Would any edit of this size do that?", _controls(manifest, guard))
        yield Answer("Did the fit see that text?", _held_out(manifest, guard))
    yield Answer("What was measured, and what was not?", _measured(manifest))
    yield Answer("Which model was edited?", _source(manifest))
    yield Answer("Are these the files?", _files(manifest, verify))


def _basis(manifest: Manifest, guard: GuardRecord) -> str:
    """The sampling units, and the interval."""
    told, defence = guard.headline, guard.defence
    if defence is not None:
        texts = f"Refusals of {defence.prompts.get('harmful', 0):,} harmful requests."
        found = around(defence.edit.harmful)
        ends = found and span(factor(found.low), factor(found.high))
    else:
        texts = (
            f"{guard.toxic_words:,} toxic words in {manifest.split.report.pairs:,} held-out pairs."
        )
        if told is not None and told.words is not None:
            texts = (
                f"{told.toxic_words:,} toxic words, which the unedited model wrote after "
                f"{told.toxic_prompts:,} of {told.prompts:,} prompts, continuing each "
                f"{_times(told.passages_per_prompt)}."
            )
        found = around(guard.words.teacher_forced)
        ends = found and span(found.low - 1, found.high - 1)
    sure = f"The 95 % interval is {ends} probable." if ends else "It has no interval."
    return f"{texts} {sure} On other text the effect may be larger or smaller."


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


def _controls(manifest: Manifest, guard: GuardRecord) -> str:
    """The effect of each control, beside that of the edit."""
    if guard.defence is not None:
        what = "a token of a refusal"
        edits = guard.defence.edit, *guard.defence.controls
        changes = [factor(each.harmful.value) for each in edits]
    else:
        what, measured = "a toxic word", (guard.words, *guard.control_words)
        changes = [each.teacher_forced.value - 1 for each in measured]
    kind = "an edit of the same size that uses no knowledge of toxicity"
    if manifest.subspace is not None:
        kind = "a random subspace of the same rank, weakened as much in the same layers"
    many = len(changes) - 1
    s, moved = "" if many == 1 else "s", ""
    if (told := guard.headline) and told.control_divergences:
        moved = (
            " On ordinary text the edit moves the distribution of the next token by "
            f"{told.divergence.value:.3f} nats, the control{s} by "
            f"{mean(told.control_divergences):.3f}; the closer they are, the fairer the controls."
        )
    kept = "" if guard.reasons else "The guard's limits were kept, which says nothing about safety."
    return (
        f"It was compared with {many} control{s}, each {kind}. Under the edit {what} is "
        f"{more(changes[0])} probable, under the control{s} {', '.join(map(more, changes[1:]))}. "
        f"{kept}{moved}"
    )


def _held_out(manifest: Manifest, guard: GuardRecord) -> str:
    """Whether fit and measurement share texts."""
    split, drawn, prompts = manifest.split, manifest.pairs.drawn, manifest.prompts
    parts = (
        f"Pairs and ordinary text were divided before the fit: {split.fit.pairs:,} pairs to fit, "
        f"{split.choose.pairs:,} to choose the strength, {split.report.pairs:,} to measure. No "
        "sentence of a pair is in two parts."
    )
    if manifest.search is not None:
        parts += f" The options were the best of {manifest.search.trials:,} trials on other text."
    if guard.defence is not None:
        return "No: the requests whose refusals were measured are not those of the fit."
    if guard.headline is None or guard.headline.words is None:
        return f"No. {parts} But it is text of the same kind as the pairs."
    if prompts is not None and manifest.pairs.origin.name == prompts.origin.name == "builtin":
        own = "The unedited model wrote it, after prompts that resemble none of the pairs."
        return f"No. {own} {parts}"
    if drawn is not None and prompts is not None and drawn.prompts.sha256 == prompts.sha256:
        return f"In part: the pairs were drawn from the model with the same prompts. {parts}"
    return f"Whether its prompts resemble the pairs was not checked. {parts}"


def _measured(manifest: Manifest) -> str:
    """The kinds of measurements that there are, and those that are missing."""
    guard, results = manifest.guard, manifest.evaluation
    done, missing = [], []
    if guard is None:
        missing.append("effect, cost and controls, since the guard was switched off (--no-guard)")
    else:
        effect = "the probability of toxic words in fixed texts"
        if guard.defence is not None:
            effect = "the probability of fixed refusals"
        done += [effect, f"perplexity on {guard.neutral_tokens:,} tokens of ordinary text"]
        if guard.words.context_ratio is not None:
            done.append("perplexity of the words beside toxic ones")
    rows = results.rows if results is not None else ()
    metrics = [item for row in rows if row.system == EDITED for item in row.metrics.items()]
    known = {name.partition("/")[0] for name, value in metrics if value is not None}
    for name, what in _ONLY_EVALUATED.items():
        (done if name in known else missing).append(what)
    end = " No benchmark or safety evaluation was made." if results is None else ""
    return (
        f"Measured: {'; '.join(done) or 'nothing'}. "
        f"Not measured: {'; '.join(missing) or 'nothing of these'}.{end}"
    )


def _source(manifest: Manifest) -> str:
    """The name and revision of the source, and what is recorded of its files."""
    source = manifest.source
    name = source.repo_id or source.name
    if source.commit:
        where = f"{name} on the Hub, at commit {source.commit}."
    else:
        where = f"{name}, a local copy without a recorded revision."
    count = len(source.all_files)
    return f"{where} The manifest has the sha256 of the {count:,} files that were read from it."


def _files(manifest: Manifest, verify: str) -> str:
    """How to check the files, which a manifest cannot do."""
    replayed = ""
    if manifest.replay_of is not None:
        replayed = (
            f" It is a replay of the manifest with sha256 {manifest.replay_of}, whose measurements "
            "it repeats."
        )
    return (
        f"The manifest lists {len(manifest.files):,} files with their sha256. This page was made "
        "from the manifest alone, so it cannot say whether the files agree with it, or who signed "
        f"them. To check the files: {verify}. If there is a {SIGNATURE}, --key PUBLIC_KEY checks "
        f"it, too."
        f"{replayed}"
    )
