"""What the command line prints at the end, for people and for programs."""

from pathlib import Path
from typing import Any

from converter.evaluate.table import markdown
from converter.release.card import compress
from converter.runtime.progress import Progress


def plan_text(plan: dict[str, Any]) -> str:
    """The result of ``describe_plan`` for people."""
    options = plan["method"]["options"]
    peak, needed = plan["expected_peak_bytes"], plan["bytes_on_disk"]
    lines = [
        f"{plan['source']}: {plan['architecture']}, "
        f"{plan['dimensions']['num_hidden_layers']} layers, hidden size "
        f"{plan['dimensions']['hidden_size']}, FFN {plan['dimensions']['intermediate_size']}"
        + experts_text(plan["dimensions"]),
        *([f"made from {', '.join(plan['originals'])}"] if plan["originals"] else []),
        f"method {plan['method']['name']}, rank {options['rank'] or 'chosen by the budget'}, "
        f"edited layers {compress(plan['edited_layers'])}",
        *(
            f"  {name}: {entry['bytes'] / 1e6:,.1f} MB, {entry['tensors']} tensors, "
            f"{entry['edited']} edited"
            for name, entry in plan["shards"].items()
        ),
        f"copied as they are: {', '.join(plan['copied_files']) or 'no files'}",
        f"{len(plan['edited_tensors'])} tensors to edit; "
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


def result_of(manifest: dict[str, Any], destination: Path, told: Progress) -> dict[str, Any]:
    """The gist of a manifest, as the command line prints it with --json."""
    edited = [entry for entry in manifest["edited"] if entry["role"] == "down_proj"]
    count = len(edited)
    return {
        "destination": str(destination),
        "source": manifest["source"]["name"],
        "commit": manifest["source"]["commit"],
        "output": manifest["run"]["output"],
        "method": manifest["method"]["name"],
        "rank": manifest["subspace"]["rank"],
        "layers": sorted({entry["layer"] for entry in edited}),
        "pairs": manifest["pairs"]["count"],
        "rows_skipped": manifest["pairs"]["skipped"],
        "basis": manifest["method"]["options"].get("basis"),
        "candidates": len(manifest["subspace"]["candidates"]),
        "candidates_kept": sum(c["kept"] for c in manifest["subspace"]["candidates"]),
        "tensors_edited": len(manifest["edited"]),
        "guard": manifest["guard"],
        "choice": manifest["choice"],
        "evaluation": manifest["evaluation"],
        "mean_relative_change": sum(e["relative_change"] for e in edited) / count,
        "max_leakage": max(e["leakage"] for e in manifest["edited"]),
        "bytes_written": sum(entry["bytes"] for entry in manifest["files"].values()),
        "verified": True,
        "forward": manifest["forward"],
        "seconds": {name: round(value, 2) for name, value in told.seconds.items()},
        "memory_bytes": dict(told.memory),
        "peak_memory_bytes": manifest["measurements"]["peak_memory_bytes"],
        "warnings": told.warnings,
    }


def result_text(result: dict[str, Any]) -> str:
    """The same for people."""
    seconds = ", ".join(f"{name} {value:.1f}" for name, value in result["seconds"].items())
    memory = ", ".join(f"{name} {n / 1e6:,.0f}" for name, n in result["memory_bytes"].items())
    return f"""\
{result["source"]} -> {result["destination"]}
  method        {result["method"]}, rank {result["rank"]}, layers {compress(result["layers"])}
  pairs         {result["pairs"]} fitted on ({sum(result["rows_skipped"].values())} rows not \
usable){candidates_text(result)}
  edited        {result["tensors_edited"]} tensors, changed by \
{result["mean_relative_change"]:.2%} of their norm on average
  left along U  at most {result["max_leakage"]:.2e} of what was there
  written       {result["bytes_written"] / 1e6:,.1f} MB, every file verified
{effect_text(result["guard"])}
  forward pass  {forward_text(result["forward"])}
  seconds       {seconds}
  peak MB       {memory}\
{evaluation_text(result["evaluation"])}"""


def forward_text(forward: dict[str, str] | None) -> str:
    """How the model was run, and why so."""
    return "none" if forward is None else f"{forward['mode']}: {forward['reason']}"


def candidates_text(result: dict[str, Any]) -> str:
    """How many candidates were kept, where there was a choice."""
    if result["basis"] != "candidates":
        return ""
    return f"; {result['candidates_kept']} of {result['candidates']} candidate directions kept"


def evaluation_text(results: dict[str, Any] | None) -> str:
    """The table of --evaluate, under the summary."""
    return "" if results is None else "\n\n" + markdown(results)


def effect_text(guard: dict[str, Any] | None) -> str:
    """What the guard measured, before and after, with the control beside it."""
    if guard is None:
        return "  not measured  perplexity, toxicity (--no-guard)"
    edit, controls, before = guard["edit"], guard["random"], guard["perplexity"]

    def mean(name: str) -> float:
        values: list[float] = [control[name]["value"] for control in controls]
        return sum(values) / len(values)

    ratio, words = edit["perplexity_ratio"], edit["teacher_forced"]
    return f"""\
  perplexity    {before:.2f} -> {before * ratio["value"]:.2f} on {guard["neutral_tokens"]:,} \
held-out neutral tokens: x {ratio["value"]:.4f} +- {ratio["error"]:.4f} \
(random subspaces: x {mean("perplexity_ratio"):.4f})
  toxic words   x {words["value"]:.3f} +- {words["error"]:.3f} as probable, {guard["toxic_words"]} \
held-out words (random subspaces: x {mean("teacher_forced"):.3f})"""
