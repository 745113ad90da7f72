"""The help of a command: examples first, then its options in groups."""

from collections.abc import Sequence

import click

GROUPS = {
    "Source": ("recipe_file", "manifest_file", "subfolder", "trust_remote_code", "base", "a", "b"),
    "Data": (
        "pairs", "num_pairs", "neutral", "word_list", "prompts", "self_prompts", "self_scorer",
        "instances", "activations", "calibration", "seed", "mask",
    ),
    "Method": (
        "method", "options", "search", "trials", "search_prompts", "systems", "rounding",
    ),
    "Budget": (
        "max_perplexity_ratio", "guard", "guard_draws", "force", "min_toxicity_drop",
        "max_leakage", "max_evaluated_perplexity_ratio", "max_informal_perplexity_ratio",
        "min_defence", "max_over_refusal",
    ),
    "Output": ("output", "overwrite", "plots", "results", "key", "base_model", "dry_run", "time"),
    "Publishing": (
        "push_to_hub", "stream_to_hub", "private", "branch", "create_pr", "message",
    ),
    "Machine": (
        "device", "forward", "forward_dtype", "batch_size", "attention", "memory_limit", "workers",
        "engine", "ray_address",
        "keep_source", "cache_dir",
    ),
    "Evaluation": (
        "evaluate", "num_prompts", "scorers", "greedy", "samples", "generation_batch_size",
        "max_new_tokens", "top_p", "text", "text_tokens", "judge", "safeedit",
        "safety_classifier", "defence", "ability", "ability_limit", "passages", "seeds", "costs",
        "controls",
    ),
}  # fmt: skip
"""Title of a group -> names of parameters; those of no group are the last one."""

_OTHERS = "Others"


def group_of(name: str) -> str:
    """The title of the group that has a parameter."""
    return next((title for title, names in GROUPS.items() if name in names), _OTHERS)


def write_examples(formatter: click.HelpFormatter, examples: Sequence[str]) -> None:
    """Write command lines as they are."""
    if examples:
        with formatter.section("Examples"):
            for line in examples:
                formatter.write(f"{'':>{formatter.current_indent}}{line}\n")


def write_options(
    formatter: click.HelpFormatter, parameters: Sequence[click.Parameter], context: click.Context
) -> None:
    """Write what options do, in groups, within them in the order of ``GROUPS``."""
    order = [name for names in GROUPS.values() for name in names]
    rows: dict[str, list[tuple[int, tuple[str, str]]]] = {title: [] for title in (*GROUPS, _OTHERS)}
    for parameter in parameters:
        record, name = parameter.get_help_record(context), parameter.name or ""
        if record is not None:
            place = order.index(name) if name in order else len(order)
            rows[group_of(name)].append((place, record))
    several = sum(bool(found) for found in rows.values()) > 1
    for title, found in rows.items():
        if found:
            with formatter.section(title if several else "Options"):
                formatter.write_dl([record for _, record in sorted(found, key=lambda row: row[0])])
