"""The tables of a report: every number with its meaning, its unit and its better direction."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from converter.manifest import Manifest, to_json

Cell = str | int | float | None

_RATIO = "times as before; below 1 is better"
_COST = "times as before; near 1 is better"
_LESS_NATS = "nats; below 0 is better"
_MORE_NATS = "nats a token; higher is better"
_FEW_NATS = "nats a token; near 0 is better"
_LIMIT = "limit"

_MEANINGS = {
    "perplexity": ("perplexity on ordinary text", "lower is better"),
    "perplexity_ratio": ("perplexity on ordinary text", _COST),
    "toxic_change": ("log-probability of toxic words", _LESS_NATS),
    "teacher_forced": ("probability of toxic words", _RATIO),
    "context_ratio": ("perplexity of words beside toxic ones", _COST),
    "divergence": ("how far the next token's distribution moves", _FEW_NATS),
    "control_divergences": ("how far the next token's distribution moves", _FEW_NATS),
    "neutral_energy": ("what the edit takes from ordinary text", "share; lower is better"),
    "neutral_tokens": ("ordinary text", "tokens"),
    "toxic_words": ("toxic words", "words"),
    "toxic_prompts": ("prompts followed by toxic words", "prompts"),
    "context_tokens": ("text beside toxic words", "tokens"),
    "context_limit": ("highest perplexity beside toxic words", f"times as before; {_LIMIT}"),
    "ordinary_tokens": ("ordinary text", "tokens"),
    "prompts": ("prompts", "prompts"),
    "passages_per_prompt": ("continuations of a prompt", "texts"),
    "max_new_tokens": ("longest continuation", "tokens"),
    "budget": ("highest perplexity that the guard allows", f"times as before; {_LIMIT}"),
    "margin": ("least drop of toxic words", f"times that of controls; {_LIMIT}"),
    "least_drop": ("least drop of toxic words", f"nats; {_LIMIT}"),
    "least_learnt": ("least rise of learnt answers", f"nats a token; {_LIMIT}"),
    "least_defence": ("least rise of refusals of harmful requests", f"nats a token; {_LIMIT}"),
    "most_over_refusal": ("most that refusals of harmless questions rise", f"share; {_LIMIT}"),
    "loss": ("loss of the answers to learn, unedited", "nats a token"),
    "harmful": ("refusals of harmful requests", _MORE_NATS),
    "bare": ("refusals of harmful requests without an attack", _MORE_NATS),
    "reworded": ("refusals of harmful requests in unusual words", _MORE_NATS),
    "harmless": ("refusals of harmless questions", _FEW_NATS),
    "touchy": ("refusals of harmless questions that sound harmful", _FEW_NATS),
    "learnt": ("answers that were learnt", _MORE_NATS),
    "limit": ("limit of a gate", _LIMIT),
    "measured": ("measured for a gate", ""),
    "toxicity": ("mean toxicity of continuations", "0 to 1; lower is better"),
    "toxicity_change": ("mean toxicity of continuations, change", "below 0 is better"),
    "emt": ("expected maximum toxicity", "0 to 1; lower is better"),
    "tp": ("probability of a toxic continuation", "0 to 1; lower is better"),
}
"""Name of a number in the manifest, or the beginning of it -> its meaning, and its unit."""

_COUNTED = "defence.prompts"
"""Place of numbers of prompts that have the names of measurements."""

_KINDS_WITH_RANK = {"remove-subspace", "weaken-subspace", "remove-oblique"}


@dataclass(frozen=True, slots=True)
class Table:
    """A table that the page can sort and save.

    Attributes:
        caption: explains the columns.
        heads: a title for each column.
        rows: a cell for each column; numbers keep all their digits.
    """

    caption: str
    heads: tuple[str, ...]
    rows: Sequence[tuple[Cell, ...]]

    @property
    def shown(self) -> list[list[tuple[Cell, str]]]:
        """Each cell and its text. The points of a column's numbers stand below each other."""
        columns = [
            zip(column, _aligned(column), strict=True) for column in zip(*self.rows, strict=True)
        ]
        return [list(row) for row in zip(*columns, strict=True)]


def layers_table(manifest: Manifest) -> Table:
    """The edited tensors; a rank is that of a subspace, of which only the largest is recorded."""
    rank = manifest.edit.rank
    return Table(
        "Shares of 1. Relative change: norm of the change over the norm of the tensor; smaller is "
        "gentler. Rounding error: what storing the result cost, over the same norm; lower is "
        "better. Energy removed: share of the squared norm that was taken out. Left along it: what "
        "rounding left of the part that was to go; lower is better.",
        ("layer", "tensor", "rank, at most", "relative change", "rounding error", "energy removed",
         "left along it"),
        [
            (
                entry.layer, entry.name, rank if entry.kind in _KINDS_WITH_RANK else None,
                entry.relative_change, entry.rounding_error, entry.measures.get("energy_removed"),
                entry.measures.get("leakage"),
            )
            for entry in manifest.edited
        ],
    )  # fmt: skip


def numbers_table(manifest: Manifest) -> Table:
    """All measurements, with their places in the manifest. Empty columns are left out."""
    heads = (
        "what it is", "of", "value", "standard error", "low", "high", "unit",
        "place in the manifest",
    )  # fmt: skip
    rows = [*_numbers(manifest)]
    kept = [n for n in range(len(heads)) if any(row[n] is not None for row in rows)]
    return Table(
        "All measurements in the manifest, rounded; the file has all digits. “Of” names the edit. "
        "Own text is text that the unedited model wrote after prompts. Held-out pairs were used "
        "neither by the fit nor to choose the strength; strengths were tried on a third set of "
        "pairs. “Times as before” is the value after the edit over that before it: 1 is no change.",
        tuple(heads[n] for n in kept),
        [tuple(row[n] for n in kept) for row in rows],
    )


def _numbers(manifest: Manifest) -> Iterator[tuple[Cell, ...]]:
    """A row for each number: meaning, edit, value, error, ends of its interval, unit, place."""
    parts: dict[str, Any] = {
        "guard": manifest.guard, "choice": manifest.choice, "gates": manifest.gates,
        "steps": [step.choice for step in manifest.steps],
        "evaluation.rows": manifest.evaluation.rows if manifest.evaluation else None,
    }  # fmt: skip
    for place, part in parts.items():
        yield from _walk(place, "", to_json(part))


def _walk(place: str, name: str, value: Any, of: str = "") -> Iterator[tuple[Cell, ...]]:
    """The numbers below a place. An estimate or an interval is one row."""
    stem, _, rest = name.partition("/")
    what, unit = _MEANINGS.get(stem, (stem.replace("_", " "), ""))
    if _COUNTED in place:
        unit = "prompts"
    what += f" ({rest.replace('/', ', ')})" if rest else ""
    if isinstance(value, dict) and {"value"} < value.keys() <= {"value", "error", "low", "high"}:
        numbers = (value.get(key) for key in ("value", "error", "low", "high"))
        yield what, of or None, *numbers, unit, place
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _walk(f"{place}.{key}", key, inner, of or _subject(place, key))
    elif isinstance(value, (list, tuple)):
        for number, inner in enumerate(value):
            one = of or _member(place, name, number, inner)
            yield from _walk(f"{place}[{number}]", name, inner, one)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield what, of or None, value, None, None, None, unit, place


def _subject(place: str, key: str) -> str:
    """The edit that all numbers of a field are of; empty if it names none."""
    if place.endswith(".compared"):
        return f"{key}, held-out pairs"
    names = {
        "guard.perplexity": "no edit",
        "guard.edit": "the edit, held-out pairs",
        "choice.strength": "the edit",
        "guard.headline.words": "the edit, own text",
        "guard.headline.divergence": "the edit",
        "guard.defence.edit": "the edit",
    }
    return names.get(f"{place}.{key}", "")


def _member(place: str, name: str, number: int, value: Any) -> str:
    """The edit that all numbers of one entry of a list are of; empty if it names none."""
    if name == "tried":
        return f"strength {value['strength']:g}, tried"
    if place == "evaluation.rows":
        return f"{value['system']} {value['strength']}".strip()
    if place == "gates":
        return str(value["gate"])
    texts = {"control_words": ", own text", "controls": ", held-out pairs"}
    text = "" if "defence" in place else texts.get(name, "")
    return f"control {number + 1}{text}" if name.startswith("control") else ""


def _aligned(column: Sequence[Cell]) -> list[str]:
    """The texts of a column's cells; numbers end in spaces as wide as the digits they lack."""
    texts = [_text(cell) for cell in column]
    digits = [
        len(text.partition(".")[2]) if isinstance(cell, (int, float)) else 0
        for cell, text in zip(column, texts, strict=True)
    ]
    return [
        text + "\u2007" * (max(digits) - own) + ("\u2008" if max(digits) and not own else "")
        if isinstance(cell, (int, float))
        else text
        for cell, text, own in zip(column, texts, digits, strict=True)
    ]


def _text(cell: Cell) -> str:
    """A number to four digits, or a text."""
    if isinstance(cell, int):
        return f"{cell:,}"
    return f"{cell:#.4g}" if isinstance(cell, float) else cell or ""
