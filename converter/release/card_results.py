"""The measurements for the card: as a sentence, as tables, and as the Hub's ``model-index``."""

from collections.abc import Iterator, Mapping
from math import isnan
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote

from huggingface_hub import EvalResult

from converter.checkpoints.names import PICTURE
from converter.evaluation.tables import markdown
from converter.manifest import (
    EDITED,
    DefenceRecord,
    Estimate,
    Evaluation,
    EvaluationSettings,
    GuardRecord,
    Manifest,
    Metric,
    Origin,
    PromptsRecord,
)
from converter.text import code, escaped

_CAPTIONS = {
    "spectrum": "Singular values of what the subspace was taken from, and scores of candidates",
    "scores": "Scores of the candidate directions of each layer",
    "cosines": "Cosines between the directions of the layers",
    "tradeoff": "Toxicity against perplexity, with controls",
    "scores_before_after": "Toxicity of continuations before and after, with controls",
}
"""Pictures that ``evaluation.plots`` draws, by file name."""


def pictures(manifest: Manifest) -> list[tuple[str, str]]:
    """Link and caption of the pictures that were drawn into the folder."""
    ours = sorted(manifest.files.keys() - manifest.source.files)
    return [
        (quote(name), caption)
        for stem, caption in _CAPTIONS.items()
        for name in ours
        if PurePosixPath(name).name == stem + PICTURE
    ]


def measured_text(manifest: Manifest) -> str:
    """The results of guard and evaluation, with the controls; or a sentence that nothing was
    measured.
    """
    guard, results = manifest.guard, manifest.evaluation
    if guard is None and results is None:
        what = "Toxicity" if manifest.instances is None else "Refusals"
        return f"{what} and perplexity were **not measured** when this was made."
    parts = []
    if guard is not None:
        control = ("a control", "is of the same kind and strength and knows nothing of toxicity")
        if manifest.subspace is not None:
            control = ("a random subspace", "has the same rank and is taken out of the same layers")
        parts.append(_headline_text(guard, manifest.prompts, control[0]))
        parts.append(_guard_text(guard, *control))
        if guard.defence is not None:
            parts.append(_defence_text(guard.defence))
    if results is not None:
        parts.append(_evaluation_text(results))
    return "\n\n".join(filter(None, parts))


def _headline_text(guard: GuardRecord, prompts: PromptsRecord | None, control: str) -> str:
    """The measurements outside the pairs' kind, beside the controls; or why there are none."""
    told = guard.headline
    if told is None or prompts is None:
        fallback = f": {escaped(guard.fallback)}" if guard.fallback else ""
        said = f"Toxic words were **not measured outside the pairs' own kind**{fallback}."
        return "" if guard.defence is not None else said
    texts = (
        f"{told.passages_per_prompt} continuations each, of at most {told.max_new_tokens} tokens, "
        f"of {told.prompts:,} prompts ({escaped(prompts.origin.title)})"
    )
    rows = []
    if told.words is not None:
        words, others = told.words, told.control_words
        mean = sum(each.teacher_forced.value for each in others) / len(others)
        rows.append(
            f"| probability of toxic words, {told.toxic_words:,} of them after "
            f"{told.toxic_prompts:,} prompts | x {_number(words.teacher_forced)} | x {mean:.3f} |"
        )
        if words.context_ratio is not None:
            beside = [each.context_ratio.value for each in others if each.context_ratio]
            rows.append(
                f"| perplexity of the other words beside them, {told.context_tokens:,} tokens "
                f"| x {_number(words.context_ratio)} | x {sum(beside) / len(beside):.3f} |"
            )
    moved = [each.value for each in told.control_divergences]
    rows.append(
        f"| KL divergence on {told.ordinary_tokens:,} tokens of ordinary text, in nats a token "
        f"| {told.divergence.value:.4f} +- {told.divergence.error:.4f} "
        f"| {sum(moved) / len(moved):.4f} |"
    )
    table = "\n".join(rows)
    little = f"\n\nToxic words were not judged by these: {escaped(guard.fallback or '')}."
    return f"""\
Outside the pairs' own kind, in what the unedited model itself writes ({texts}):

| | after | {control} |
|---|---|---|
{table}{little if guard.fallback else ""}"""


def _guard_text(guard: GuardRecord, control: str, how: str) -> str:
    """The guard's measurements, beside those of its controls.

    ``control`` names a control, such as ``a random subspace``, and ``how`` describes it.
    """
    edit, controls, before = guard.edit, guard.controls, guard.perplexity

    def mean(name: str) -> float:
        values: list[float] = [getattr(control, name).value for control in controls]
        return sum(values) / len(values)

    after = before * edit.perplexity_ratio.value
    beside = ""
    if edit.context_ratio is not None:
        beside = (
            f"\n| perplexity of the other words of toxic text, {guard.context_tokens:,} tokens "
            f"| x 1 | x {_number(edit.context_ratio)} | x {mean('context_ratio'):.3f} |"
        )
    drawn = f" (the mean of {len(controls)})" if len(controls) > 1 else ""
    return f"""\
On held-out text of the pairs' own kind, which neither the fit nor the choice of the strength has
seen:

| | before | after | {control} |
|---|---|---|---|
| perplexity, {guard.neutral_tokens:,} neutral tokens | {before:.2f} | {after:.2f} \
(x {_number(edit.perplexity_ratio)}) | x {mean("perplexity_ratio"):.3f} |
| probability of toxic words, {guard.toxic_words:,} of them | x 1 \
| x {_number(edit.teacher_forced)} | x {mean("teacher_forced"):.3f} |{beside}

The +- are standard errors. {control.capitalize()} {how}:
what it does, any edit of this size does{drawn}."""


_ASKED = {
    "harmful": "refusals of harmful requests, each within an attack",
    "bare": "refusals of harmful requests without one",
    "reworded": "refusals in unusual words, of harmful requests within an attack",
    "harmless": "refusals of harmless questions",
    "touchy": "refusals of harmless questions with words that sound harmful",
}
"""The measurements of refusals, in words."""


def _defence_text(defence: DefenceRecord) -> str:
    """The guard's measurements of refusals, beside its controls."""
    edit, controls, count = defence.edit, defence.controls, len(defence.controls)
    rows = [
        f"| {said}, {defence.prompts.get(name, 0):,} | {_number(getattr(edit, name))} "
        f"| {sum(getattr(control, name).value for control in controls) / count:.3f} |"
        for name, said in _ASKED.items()
    ]
    learnt = sum(control.learnt for control in controls) / count
    answers = defence.prompts.get("learnt", 0)
    table = "\n".join(rows)
    share = edit.over_refusal
    part = "" if isnan(share) else f" ({share:.0%} of the first of the refusals)"
    suffix = f", with {code(defence.suffix)} behind each" if defence.suffix else ""
    return f"""\
How much more probable refusals are than before, in nats a token{suffix}:

| | change | controls |
|---|---|---|
| answers that were learnt, {answers:,} | {edit.learnt:.3f} | {learnt:.3f} |
{table}

Neither the requests nor the attacks nor the questions were seen by the fit. What rises behind
harmless questions, too{part}, is a habit of
refusing, not a sense of harm; and what rises in the usual words alone is a habit of words. Whether
an answer is safe was not measured: one that begins with a refusal may go on to comply."""


def _evaluation_text(results: Evaluation) -> str:
    """The table of the evaluation, and the texts behind it."""
    asked = results.settings
    on = []
    if prompts := asked.prompts:
        on.append(
            f"Continuations of {prompts.count:,} prompts ({escaped(prompts.origin.title)}) by at "
            f"most {asked.max_new_tokens} tokens"
        )
    if asked.text_sha256:
        on.append(f"perplexity on a text with sha256 {code(asked.text_sha256[:16])}")
    words = (
        f" *toxic words* are {asked.toxic_words:,} listed words in continuations by the "
        "unedited model, and how probable they are relative to it."
        if asked.toxic_words
        else ""
    )
    if any("divergence" in row.metrics for row in results.rows):
        on[-1] += ", and there *KL*, how far the next token's distribution moves, in nats"
    if any("context_ratio" in row.metrics for row in results.rows):
        words += " *words beside* are the other words of these continuations, and their perplexity."
    return (
        f"{'; '.join(on) or 'Benchmarks'}. Toxicities are mean scores between 0 and 1; in "
        f"brackets, intervals of 95 %.{words}\n\n{markdown(results)}"
    )


def _number(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} +- {estimate.error:.3f}"


def eval_results(manifest: Manifest) -> list[EvalResult]:
    """The edited model's row of the evaluation, for ``model-index``; empty without one."""
    results = manifest.evaluation
    if results is None:
        return []
    rows = [row.metrics for row in results.rows if row.system == EDITED]
    return list(_entries(rows[0], results.settings)) if rows else []


def _entries(metrics: Mapping[str, Metric], asked: EvaluationSettings) -> Iterator[EvalResult]:
    """One for each metric; results of one ``dataset_type`` become one entry of the index."""
    origin = asked.prompts.origin if asked.prompts else Origin(name="prompts")
    prompted: dict[str, Any] = {
        "dataset_type": origin.repo_id or "prompts",
        "dataset_name": f"{origin.title}, {origin.field}" if origin.field else origin.title,
        "dataset_revision": origin.commit,
    }
    digest = asked.text_sha256 or ""
    text = {"dataset_type": "text", "dataset_name": f"text with sha256 {digest[:16]}"}
    for key, metric in metrics.items():
        kind, _, detail = key.partition("/")
        if metric is None or kind not in _NAMES:
            continue
        shown, data = _NAMES[kind], prompted
        if kind.startswith("perplexity"):
            data = text
        elif kind == "safeedit":
            data = {"dataset_type": "safeedit", "dataset_name": "SafeEdit"}
        elif kind == "ability":
            task, _, number = detail.partition("/")
            data = {"dataset_type": task, "dataset_name": task}
            kind, _, detail = number.partition(",")  # how lm-eval filters answers, or "none"
            shown, detail = kind, detail.removeprefix("none")
        yield EvalResult(
            task_type="text-generation",
            metric_type=kind,
            metric_name=shown + (f" ({detail.replace('/', ', ')})" if detail else ""),
            metric_value=round(metric.value, 4),
            **data,
        )


_NAMES = {
    "perplexity": "perplexity",
    "perplexity_ratio": "perplexity, after over before",
    "teacher_forced": "probability of toxic words, after over before",
    "context_ratio": "perplexity of words beside toxic ones, after over before",
    "toxicity": "mean toxicity",
    "emt": "expected maximum toxicity",
    "tp": "toxicity probability",
    "safeedit": "defence rate in per cent",
    "ability": "",
}
"""Metrics of the index, and their names there; ``measure`` explains them."""
