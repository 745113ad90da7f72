"""What the command line prints at the end, for people and for programs."""

from pathlib import Path
from typing import Any

from converter.evaluation.results import markdown
from converter.manifest import Evaluation, ForwardRecord, GuardRecord, Manifest
from converter.release.card import compress
from converter.runtime.progress import Progress


def plan_text(plan: dict[str, Any]) -> str:
    """The result of ``describe_plan`` for people."""
    options = plan["method"]["options"]
    strength = options.get(plan["method"]["strength"])
    peak, needed = plan["expected_peak_bytes"], plan["bytes_on_disk"]
    lines = [
        f"{plan['source']}: {plan['architecture']}, "
        f"{plan['dimensions']['num_hidden_layers']} layers, hidden size "
        f"{plan['dimensions']['hidden_size']}, FFN {plan['dimensions']['intermediate_size']}"
        + experts_text(plan["dimensions"]),
        *([f"made from {', '.join(plan['originals'])}"] if plan["originals"] else []),
        f"method {plan['method']['name']}, {plan['method']['strength']} "
        f"{'chosen by the budget' if strength is None else strength}"
        + layers_text(plan["edited_layers"]),
        *(
            f"  {name}: {entry['bytes'] / 1e6:,.1f} MB, {entry['tensors']} tensors, "
            f"{entry['edited']} edited"
            for name, entry in plan["shards"].items()
        ),
        f"copied as they are: {', '.join(plan['copied_files']) or 'no files'}",
        f"{len(plan['edited_tensors'])} tensors to edit"
        + (f", {len(plan['created_tensors'])} to create" if plan["created_tensors"] else "")
        + "".join(f", {name} to change" for name in plan["changed_files"])
        + "".join(f", {name} to add" for name in plan["added_files"])
        + "; "
        f"{plan['bytes_to_read'] / 1e6:,.1f} MB to read, {plan['output']} of "
        f"{plan['bytes_to_write'] / 1e6:,.1f} MB to write"
        + (f", in {needed / 1e6:,.1f} MB of disk" if needed != plan["bytes_to_write"] else ""),
        f"forward pass {forward_text(plan['forward'])}",
        f"peak memory about {peak['forward'] / 1e6:,.0f} MB for the forward pass (weights) and "
        f"{peak['edit'] / 1e6:,.0f} MB for the edit, beside Python itself; device {plan['device']}",
    ]
    return "\n".join(lines)


def experts_text(sizes: dict[str, Any]) -> str:
    """How many experts there are, for people; nothing if there are none."""
    if not sizes["num_experts"]:
        return ""
    shared = " and shared ones" if sizes["shared_expert_intermediate_size"] else ""
    return f", {sizes['num_experts']} experts{shared} in {len(sizes['sparse_layers'])} layers"


def result_of(manifest: Manifest, destination: Path, told: Progress) -> dict[str, Any]:
    """The gist of a manifest, as the command line prints it with --json."""
    changes = [e.relative_change for e in manifest.edited if not e.role.endswith("_bias")]
    left = [entry.measures["leakage"] for entry in manifest.edited if "leakage" in entry.measures]
    candidates = manifest.subspace.candidates if manifest.subspace else ()
    return {
        "destination": str(destination),
        "source": manifest.source.name,
        "commit": manifest.source.commit,
        "output": manifest.run.output,
        "method": manifest.method.name,
        manifest.method.strength: manifest.choice.strength,
        "strength": manifest.choice.strength,
        "strength_name": manifest.method.strength,
        "layers": manifest.layers,
        "pairs": manifest.pairs.count,
        "rows_skipped": manifest.pairs.skipped,
        "candidates": len(candidates),
        "candidates_kept": sum(c.kept for c in candidates),
        "tensors_edited": len(manifest.edited),
        "tensors_created": len(manifest.edit.created),
        "files_changed": [*manifest.edit.patches, *manifest.edit.files],
        "guard": manifest.guard,
        "choice": manifest.choice,
        "evaluation": manifest.evaluation,
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


def result_text(result: dict[str, Any]) -> str:
    """The same for people."""
    seconds = ", ".join(f"{name} {value:.1f}" for name, value in result["seconds"].items())
    memory = ", ".join(f"{name} {n / 1e6:,.0f}" for name, n in result["memory_bytes"].items())
    return f"""\
{result["source"]} -> {result["destination"]}
  method        {result["method"]}, {result["strength_name"]} {result["strength"]:g}\
{layers_text(result["layers"])}
  pairs         {result["pairs"]} fitted on ({sum(result["rows_skipped"].values())} rows not \
usable){candidates_text(result)}
{changes_text(result)}
  written       {result["bytes_written"] / 1e6:,.1f} MB, every file verified
{effect_text(result["guard"])}
  forward pass  {forward_text(result["forward"])}
  seconds       {seconds}
  peak MB       {memory}\
{evaluation_text(result["evaluation"])}"""


def layers_text(layers: list[int]) -> str:
    """The layers of the edited tensors; nothing if there are none."""
    return f", layers {compress(layers)}" if layers else ""


def changes_text(result: dict[str, Any]) -> str:
    """What was changed, and by how much."""
    lines = []
    if result["tensors_edited"]:
        lines.append(f"  edited        {result['tensors_edited']} tensors")
    if (change := result["mean_relative_change"]) is not None:
        lines[-1] += f", changed by {change:.2%} of their norm on average"
    if (left := result["max_leakage"]) is not None:
        lines.append(f"  left along U  at most {left:.2e} of what was there")
    if result["tensors_created"]:
        lines.append(f"  created       {result['tensors_created']} tensors")
    if result["files_changed"]:
        lines.append(f"  files         {', '.join(result['files_changed'])} changed or added")
    return "\n".join(lines)


def forward_text(forward: ForwardRecord | None) -> str:
    """How the model was run, and why so."""
    return "none" if forward is None else f"{forward.mode}: {forward.reason}"


def candidates_text(result: dict[str, Any]) -> str:
    """How many candidates were kept, where there was a choice."""
    if result["candidates_kept"] == result["candidates"]:
        return ""
    return f"; {result['candidates_kept']} of {result['candidates']} candidate directions kept"


def evaluation_text(results: Evaluation | None) -> str:
    """The table of --evaluate, under the summary."""
    return "" if results is None else "\n\n" + markdown(results)


def effect_text(guard: GuardRecord | None) -> str:
    """What the guard measured, before and after, with the control beside it."""
    if guard is None:
        return "  not measured  perplexity, toxicity (--no-guard)"
    edit, controls, before = guard.edit, guard.controls, guard.perplexity

    def mean(name: str) -> float:
        values: list[float] = [getattr(control, name).value for control in controls]
        return sum(values) / len(values)

    ratio, words = edit.perplexity_ratio, edit.teacher_forced
    return f"""\
  perplexity    {before:.2f} -> {before * ratio.value:.2f} on {guard.neutral_tokens:,} \
held-out neutral tokens: x {ratio.value:.4f} +- {ratio.error:.4f} \
(controls: x {mean("perplexity_ratio"):.4f})
  toxic words   x {words.value:.3f} +- {words.error:.3f} as probable, {guard.toxic_words} \
held-out words (controls: x {mean("teacher_forced"):.3f})"""
