"""A finished conversion as one page of HTML, for people: verdict, pictures, samples, numbers.

The page needs no other file and fetches nothing. It is made from a manifest alone, whose texts are
untrusted: they never become markup.
"""

import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from converter.checkpoints.names import MANIFEST
from converter.evaluation.pages import digest_of, page_environment, page_file
from converter.evaluation.samples import RULE, differences
from converter.manifest import Manifest, to_json
from converter.outputs.base import output_of
from converter.release.card import FORMULAS, compress, local_name
from converter.release.report_charts import bar_charts, cost_chart
from converter.release.verdict import verdict
from converter.version import __version__

Cell = str | int | float | None


@dataclass(frozen=True, slots=True)
class Table:
    """A table that the page can sort and save."""

    heads: tuple[str, ...]
    rows: Sequence[tuple[Cell, ...]]


_TERMS = (
    "Perplexity says how much text surprises the model: higher is worse. A control is a random "
    "edit of the same size: an effect counts only if it is well beyond that of the controls. An "
    "interval of 95 % holds the true value in 19 of 20 cases. Toxic words are those of a "
    "list, not all that may hurt."
)

_WHAT = {
    "perplexity": "perplexity of the unedited model on ordinary text",
    "perplexity_ratio": "perplexity on ordinary text, after over before",
    "toxic_change": "change of log p of toxic words, in nats",
    "teacher_forced": "probability of toxic words, after over before",
    "context_ratio": "perplexity of words beside toxic ones, after over before",
    "divergence": "how far the next token's distribution moves, in nats a token",
    "control_divergences": "how far it moves under a control, in nats a token",
    "neutral_energy": "share of what ordinary text writes that the edit takes away",
    "neutral_tokens": "tokens of ordinary text",
    "toxic_words": "toxic words",
    "toxic_prompts": "prompts after which they stand",
    "context_tokens": "tokens beside toxic words",
    "context_limit": "most that the words beside toxic ones may rise",
    "ordinary_tokens": "tokens of ordinary text",
    "prompts": "prompts",
    "budget": "largest perplexity that the guard allows, after over before",
    "margin": "times the drop of controls that is needed",
    "least_drop": "smallest drop of log p that is needed, in nats",
    "harmful": "refusals of harmful requests: change of log p, in nats a token",
    "bare": "the same without an attack",
    "reworded": "the same, refused in unusual words",
    "harmless": "refusals of harmless questions, likewise",
    "touchy": "refusals of harmless questions that sound harmful, likewise",
    "learnt": "answers that were learnt, likewise",
    "strength": "strength",
    "limit": "limit of a gate",
    "measured": "measured for a gate",
}
"""Name of a number in the manifest -> description for people."""


def report_page(manifest: Manifest, digest: str = "") -> str:
    """The page. The same manifest is always the same bytes.

    Args:
        manifest: of the result.
        digest: sha256 of its file.
    """
    style = page_file("compare.css") + page_file("report.css")
    script = page_file("report.js")
    environment = page_environment()
    environment.filters |= {"exact": json.dumps, "rounded": _rounded}
    guard, paper = manifest.guard, manifest.method.paper
    return environment.from_string(page_file("report.html")).render(
        title=f"{manifest.source.name}, {manifest.method.name}",
        verdict=verdict(manifest),
        about=_about(manifest),
        paper=paper if paper.startswith("https://") else "",
        terms=_TERMS,
        bars=[*bar_charts(guard)] if guard else [],
        points=cost_chart(manifest),
        samples=[*_samples(manifest)],
        rule=RULE[:1].upper() + RULE[1:],
        masked=manifest.run.mask,
        edit=_edit_text(manifest),
        layers=_layers(manifest),
        undo=_undo(manifest),
        commands=_commands(manifest),
        numbers=Table(
            ("what it is", "value", "standard error", "low", "high", "place in the manifest"),
            [*_numbers(manifest)],
        ),
        style=style, style_digest=digest_of(style), script=script,
        script_digest=digest_of(script), version=__version__, digest=digest,
    )  # fmt: skip


def _about(manifest: Manifest) -> str:
    """The source, the method and the result, in sentences."""
    methods = ", then ".join(method.title for method, _ in manifest.methods)
    of = f" of rank {manifest.edit.rank}"
    strengths = ", ".join(
        f"{method.strength} {choice.strength:g}{of if method.strength == 'part' else ''}"
        for method, choice in manifest.methods
    )
    commit = f" at commit {manifest.source.commit}" if manifest.source.commit else ""
    kind = "An adapter for" if manifest.run.output == "adapter" else "An edited copy of"
    texts = f"{manifest.pairs.count:,} pairs of toxic and neutral sentences"
    if manifest.instances is not None:
        texts = f"instances of harmful requests ({manifest.instances.origin.title})"
    return (
        f"{kind} {manifest.source.repo_id or manifest.source.name}{commit}. Method: {methods}; "
        f"{strengths}. It was fitted on {texts}."
    )


def _samples(manifest: Manifest) -> Iterator[dict[str, Any]]:
    for each in manifest.samples:
        texts = each.before, each.after
        before, after = differences(texts, texts)
        yield {"prompt": each.prompt, "before": before, "after": after}


def _edit_text(manifest: Manifest) -> str:
    """A sentence on the edited tensors and their changes."""
    kinds = sorted({entry.kind for entry in manifest.edited})
    became = "; ".join(FORMULAS[kind].replace("`", "") for kind in kinds if kind in FORMULAS)
    layers = compress(manifest.layers)
    where = f" of layers {layers}, counted from 0" if layers else ""
    formula = f" Each matrix W became {became}." if became else ""
    created = len(manifest.edit.created)
    more = f" {created} tensors were created that the base lacks." if created else ""
    return (
        f"{len(manifest.edited)} tensors{where} changed, all others are those of the base.{formula}"
        f"{more} The relative change is the norm of the change over that of the tensor."
    )


def _layers(manifest: Manifest) -> Table:
    """The edited tensors; a rank is that of a subspace, of which only the largest is recorded."""
    has_rank = {"remove-subspace", "weaken-subspace", "remove-oblique"}
    return Table(
        ("layer", "tensor", "rank, at most", "relative change", "rounding error", "energy removed",
         "left along it"),
        [
            (
                entry.layer, entry.name, manifest.edit.rank if entry.kind in has_rank else None,
                entry.relative_change, entry.rounding_error, entry.measures.get("energy_removed"),
                entry.measures.get("leakage"),
            )
            for entry in manifest.edited
        ],
    )  # fmt: skip


def _undo(manifest: Manifest) -> str:
    """A sentence on where the unedited weights are."""
    place = _source(manifest)
    if output_of(manifest.run.output).relation == "adapter":
        return f"Use the base without the adapter: {place}."
    return (
        f"Use the source, which the conversion did not change: {place}. The manifest has the "
        "sha256 of each of its files."
    )


def _source(manifest: Manifest) -> str:
    """The source as an argument."""
    repo_id, commit = manifest.source.repo_id, manifest.source.commit
    if not repo_id:
        return local_name(manifest.run.source)
    return f"{repo_id}@{commit}" if commit else repo_id


def _commands(manifest: Manifest) -> str:
    """The commands that check, repeat and compare."""
    source, inside = shlex.quote(_source(manifest)), manifest.run.subfolder
    part = f" --subfolder {shlex.quote(inside)}" if inside else ""
    place = "" if manifest.source.repo_id or source == "demo" else f" --source {source}"
    return (
        f"# check every file of this folder\ngloss verify FOLDER --source {source}{part}\n"
        f"# make the same files again\ngloss replay FOLDER/{MANIFEST} OUT{place}\n"
        f"# show what both models say\ngloss compare {source} FOLDER --output page.html"
    )


def _numbers(manifest: Manifest) -> Iterator[tuple[Cell, ...]]:
    """The measurements, and their places in the manifest."""
    parts: dict[str, Any] = {
        "guard": manifest.guard, "choice": manifest.choice, "gates": manifest.gates,
        "steps": [step.choice for step in manifest.steps],
        "evaluation.rows": manifest.evaluation.rows if manifest.evaluation else None,
    }  # fmt: skip
    for place, part in parts.items():
        yield from _walk(place, "", to_json(part))


def _walk(place: str, name: str, value: Any) -> Iterator[tuple[Cell, ...]]:
    """The numbers below a place. An estimate or an interval is one row."""
    what = _WHAT.get(name, name.replace("_", " "))
    if isinstance(value, dict) and {"value"} < value.keys() <= {"value", "error", "low", "high"}:
        yield what, *(value.get(key) for key in ("value", "error", "low", "high")), place
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _walk(f"{place}.{key}", key, inner)
    elif isinstance(value, (list, tuple)):
        for number, inner in enumerate(value):
            yield from _walk(f"{place}[{number}]", name, inner)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield what, value, None, None, None, place


def _rounded(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
