"""What a conversion prints when it is done: for people, and with ``--json``."""

from collections.abc import Sequence
from math import isnan
from pathlib import Path
from typing import Any

from converter.manifest import Estimate, ForwardRecord, GuardRecord, Manifest, SampleRecord
from converter.runtime import progress
from converter.text import one_line


def result_data(manifest: Manifest, destination: Path | str) -> dict[str, Any]:
    """The gist of a manifest, as the command line prints it with --json."""
    from converter.release.verdict import verdict

    told = progress.current()
    changes = [e.relative_change for e in manifest.edited if not e.role.endswith("_bias")]
    left = [entry.measures["leakage"] for entry in manifest.edited if "leakage" in entry.measures]
    candidates = manifest.subspace.candidates if manifest.subspace else ()
    return {
        "destination": str(destination),
        "source": manifest.source.name,
        "commit": manifest.source.commit,
        "output": manifest.run.output,
        "method": manifest.method.name,
        "rank": manifest.edit.rank,
        manifest.method.strength: manifest.choice.strength,
        "strength": manifest.choice.strength,
        "strength_name": manifest.method.strength,
        "strengths": {
            (f"{method.name}." if manifest.steps else "") + method.strength: choice.strength
            for method, choice in manifest.methods
        },
        "layers": manifest.layers,
        "pairs": manifest.pairs.count,
        "instances": manifest.instances and manifest.instances.origin.title,
        "rows_skipped": manifest.pairs.skipped,
        "factors": manifest.factors,
        "candidates": len(candidates),
        "candidates_kept": sum(c.kept for c in candidates),
        "tensors_edited": len(manifest.edited),
        "tensors_created": len(manifest.edit.created),
        "files_changed": [*manifest.edit.patches, *manifest.edit.files],
        "verdict": verdict(manifest).text,
        "headline": _headline_data(manifest.guard),
        "guard": manifest.guard,
        "choice": manifest.choice,
        "evaluation": manifest.evaluation,
        "samples": manifest.samples,
        "mean_relative_change": sum(changes) / len(changes) if changes else None,
        "max_leakage": max(left, default=None),
        "bytes_written": sum(file.nbytes for file in manifest.files.values()),
        "verified": True,
        "forward": manifest.forward,
        "seconds": {name: round(value, 2) for name, value in told.seconds.items()},
        "memory_bytes": dict(told.memory),
        "peak_memory_bytes": manifest.measurements.peak_memory_bytes,
        "warnings": told.warnings,
    }


def result_text(result: dict[str, Any], published: str = "") -> str:
    """The same for people; the verdict is at the end."""
    from converter.evaluation.tables import markdown

    seconds = ", ".join(f"{name} {value:.1f}" for name, value in result["seconds"].items())
    memory = ", ".join(f"{name} {n / 1e6:,.0f}" for name, n in result["memory_bytes"].items())
    kept, candidates = result["candidates_kept"], result["candidates"]
    chosen = "" if kept == candidates else f"; {kept} of {candidates} candidate directions kept"
    table = f"\n\n{markdown(result['evaluation'])}" if result["evaluation"] else ""
    return f"""\
{result["source"]} -> {result["destination"]}{_headline(result["guard"])}
  method        {result["method"]}, {_strengths(result)}\
{layers_text(result["layers"])}
{_texts(result)}{chosen}
{_changes(result)}
  written       {result["bytes_written"] / 1e6:,.1f} MB, every file verified
{_effect(result["guard"], "toxicity" if result["instances"] is None else "refusals")}
  forward pass  {forward_text(result["forward"])}
  seconds       {seconds}
  peak MB       {memory}{published}{table}{_samples(result["samples"])}

{one_line(result["verdict"])}"""


def _samples(samples: Sequence[SampleRecord]) -> str:
    """What the model says before and after, and how the prompts were chosen."""
    from converter.evaluation.samples import RULE

    if not samples:
        return ""
    lines = [f"\n\nsamples: {RULE}"]
    for each in samples:
        lines += [f"  {one_line(each.prompt)}"]
        lines += [f"    before  {one_line(each.before)}", f"    after   {one_line(each.after)}"]
    return "\n".join(lines)


def _strengths(result: dict[str, Any]) -> str:
    """What each strength is, such as ``rank 2``, or ``part 0.4 of rank 8``."""
    of = f" of rank {result['rank']}"
    return ", ".join(
        f"{name} {value:g}{of if name.endswith('part') else ''}"
        for name, value in result["strengths"].items()
    )


def _texts(result: dict[str, Any]) -> str:
    """What was fitted on."""
    if result["instances"] is not None:
        return f"  instances     {result['instances']}"
    skipped = sum(result["rows_skipped"].values())
    return f"  pairs         {result['pairs']} fitted on ({skipped} rows not usable)"


def layers_text(layers: list[int], of: str = "layers") -> str:
    """The layers of the edited tensors, called ``of``; nothing if there are none."""
    from converter.release.card import compress

    return f", {of} {compress(layers)}" if layers else ""


def _changes(result: dict[str, Any]) -> str:
    """What was changed, and by how much."""
    from converter.release.card import factors_text

    lines = []
    if result["tensors_edited"]:
        lines.append(f"  edited        {result['tensors_edited']} tensors")
    if (change := result["mean_relative_change"]) is not None:
        lines[-1] += f", changed by {change:.2%} of their norm on average"
    if {*result["factors"].values()} - {result["strength"]}:
        lines.append(f"  factors       {factors_text(result['factors'], result['layers'])}")
    if (left := result["max_leakage"]) is not None:
        beside = ", beside what was to stay" if result["factors"] else ""
        lines.append(f"  left along U  at most {left:.2e} of what was there{beside}")
    if result["tensors_created"]:
        lines.append(f"  created       {result['tensors_created']} tensors")
    if result["files_changed"]:
        lines.append(f"  files         {', '.join(result['files_changed'])} changed or added")
    return "\n".join(lines)


def forward_text(forward: ForwardRecord | None) -> str:
    """How the model was run, and why so."""
    return "none" if forward is None else f"{forward.mode}: {forward.reason}"


def _effect(guard: GuardRecord | None, what: str) -> str:
    """What the guard measured, of ``what`` too: before and after, with the control beside it."""
    if guard is None:
        return f"  not measured  perplexity, {what} (--no-guard)"
    edit, controls, before = guard.edit, guard.controls, guard.perplexity

    def mean(name: str) -> float:
        values: list[float] = [getattr(control, name).value for control in controls]
        return sum(values) / len(values)

    ratio, words = edit.perplexity_ratio, edit.teacher_forced
    lines = [
        f"  perplexity    {before:.2f} -> {before * ratio.value:.2f} on {guard.neutral_tokens:,} "
        f"held-out neutral tokens: x {ratio.value:.4f} +- {ratio.error:.4f} "
        f"(controls: x {mean('perplexity_ratio'):.4f})"
    ]
    if guard.words is not edit or guard.defence is not None:  # or the headline has said it
        lines.append(
            f"  pairs' kind   toxic words x {words.value:.3f} +- {words.error:.3f} as probable, "
            f"{guard.toxic_words} held-out words (controls: x {mean('teacher_forced'):.3f})"
        )
    if (context := edit.context_ratio) is not None:
        label = " " * 14 if len(lines) > 1 else "  pairs' kind "
        lines.append(
            f"{label}  words beside them: perplexity x {context.value:.4f} +- "
            f"{context.error:.4f}, {guard.context_tokens:,} tokens "
            f"(controls: x {mean('context_ratio'):.4f})"
        )
    return "\n".join(lines) + _refusals(guard)


def _headline_data(guard: GuardRecord | None) -> dict[str, Any] | None:
    """The headline as data, with an interval of 95 %; None where none is told."""
    from converter.evaluation.results import around  # it needs numpy

    if guard is None or guard.defence is not None:
        return None
    told, words = guard.headline, guard.words
    controls = [each.teacher_forced.value for each in guard.control_words]
    own = told is not None and told.words is not None
    return {
        "toxic_words": around(words.teacher_forced),
        "controls": sum(controls) / len(controls),
        "words": told.toxic_words if told is not None and own else guard.toxic_words,
        "pairs_kind_only": not own,
        "fallback": guard.fallback,
    }


def _headline(guard: GuardRecord | None) -> str:
    """What the edit does outside the pairs' kind, or that this is not known; in nats for defence.

    Intervals are of 95 %.
    """
    if guard is None or guard.defence is not None:
        return ""
    told, words = guard.headline, guard.words
    controls = [each.teacher_forced.value for each in guard.control_words]
    control = f"(controls: x {sum(controls) / len(controls):.3f})"
    if told is None or told.words is None:
        lines = [
            f"  toxic words   {_within(words.teacher_forced)} as probable {control}: "
            f"{guard.toxic_words} held-out words",
            "                of the pairs' own kind only",
        ]
    else:
        lines = [
            f"  toxic words   {_within(words.teacher_forced)} as probable {control}: "
            f"{told.toxic_words} words",
            f"                that the model said itself, after {told.toxic_prompts} of "
            f"{told.prompts} prompts that resemble no pair",
        ]
        if words.context_ratio is not None:
            beside = [c.context_ratio.value for c in told.control_words if c.context_ratio]
            lines.append(
                f"  words beside  perplexity {_within(words.context_ratio)}, "
                f"{told.context_tokens:,} other tokens there "
                f"(controls: x {sum(beside) / len(beside):.3f})"
            )
    if told is not None:
        moved = [each.value for each in told.control_divergences]
        lines.append(
            f"  KL            {told.divergence.value:.4f} +- {told.divergence.error:.4f} nats a "
            f"token on {told.ordinary_tokens:,} tokens of ordinary text "
            f"(controls: {sum(moved) / len(moved):.4f})"
        )
    return "\n" + "\n".join(lines)


def _within(estimate: Estimate) -> str:
    """A ratio and its interval of 95 %."""
    from converter.evaluation.results import around  # it needs numpy

    found = around(estimate)
    return f"x {estimate.value:.3f}" + (f" [{found.low:.3f}, {found.high:.3f}]" if found else "")


def _refusals(guard: GuardRecord) -> str:
    """The guard's measurements of refusals; empty if the edit is not for defence."""
    if guard.defence is None:
        return ""
    edit, controls = guard.defence.edit, guard.defence.controls
    mean = sum(control.harmful.value for control in controls) / len(controls)
    share = "" if isnan(edit.over_refusal) else f": {edit.over_refusal:.0%} of that"
    return f"""
  refusals      {edit.harmful.value:+.3f} +- {edit.harmful.error:.3f} nats a token on unseen \
harmful requests (controls: {mean:+.3f}), {edit.reworded.value:+.3f} in other words
                {edit.harmless.value:+.3f} on harmless questions, {edit.touchy.value:+.3f} on \
touchy ones{share}
  learnt        {edit.learnt:+.3f} nats a token of the answers in the instances"""
