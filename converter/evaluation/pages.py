"""Write a comparison of two models as a file: HTML, Markdown, lines of JSON.

Continuations are untrusted text and never become markup. The same samples always give the same
bytes.
"""

import base64
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from msgspec import structs

from converter.evaluation.about import About
from converter.evaluation.samples import Said, Sample
from converter.text import escaped, is_one_line
from converter.version import __version__


def means(samples: Sequence[Sample]) -> dict[str, tuple[float, float]]:
    """Score -> its mean over the continuations of the base, and over those of the other."""
    names = samples[0].before.scores if samples else {}
    return {
        name: (
            sum(each.before.scores[name] for each in samples) / len(samples),
            sum(each.after.scores[name] for each in samples) / len(samples),
        )
        for name in names
    }


def compared_data(about: About, samples: Sequence[Sample]) -> dict[str, Any]:
    """A comparison as data."""
    return {**structs.asdict(about), "means": means(samples), "samples": [*map(_row, samples)]}


def way(sample: Sample) -> str:
    """How its continuations were made, in words."""
    return f"sample {sample.number}" if sample.number else "greedy"


def scores_text(scores: Mapping[str, float]) -> str:
    """Scores in a line."""
    return ", ".join(f"{name} {value:.3g}" for name, value in scores.items())


def means_text(samples: Sequence[Sample]) -> str:
    """The means of both in a line, and of how many texts they are."""
    found = ", ".join(f"{n} {a:.3g} -> {b:.3g}" for n, (a, b) in means(samples).items())
    return f"means of {len(samples)} continuations: {found}"


def jsonl_page(about: About, samples: Sequence[Sample]) -> str:
    """A line of JSON for each sample, each with the comparison's settings."""
    rows = ({**_row(sample), "of": structs.asdict(about)} for sample in samples)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _row(sample: Sample) -> dict[str, Any]:
    sides = {"base": sample.before, "edited": sample.after}
    return {
        "prompt": sample.prompt,
        "sample": sample.number,
        **{name: {"text": s.text, "scores": dict(s.scores)} for name, s in sides.items()},
    }


def markdown_page(about: About, samples: Sequence[Sample]) -> str:
    """A table; words that the other continuation lacks are bold."""
    lines = [
        f"# {escaped(about.base)} beside {escaped(about.edited)}",
        "",
        f"{escaped(_settings(about))}",
        "",
        f"{escaped(means_text(samples)) if samples else 'No prompts.'}",
        "",
        f"| prompt | | {escaped(about.base)} | {escaped(about.edited)} |",
        "|---|---|---|---|",
    ]
    for sample in samples:
        cells = (
            f"{_marked(said)}<br><small>{escaped(scores_text(said.scores))}</small>"
            for said in (sample.before, sample.after)
        )
        lines.append(f"| {escaped(sample.prompt)} | {way(sample)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _marked(said: Said) -> str:
    """A continuation as Markdown."""
    found = ""
    for piece, differs in said.parts:
        if not (text := escaped(piece)):
            found += " " if piece else ""
            continue
        begin, end = (" " if c.isspace() else "" for c in (piece[0], piece[-1]))
        found += begin + (f"<b>{text}</b>" if differs else text) + end
    return found.strip()


def html_page(about: About, samples: Sequence[Sample]) -> str:
    """A page of HTML that needs no other file and fetches nothing."""
    style = page_file("compare.css")
    environment = page_environment()
    environment.filters |= {"scores": scores_text, "way": way}
    return environment.from_string(page_file("compare.html")).render(
        about=about, samples=samples, style=style, digest=digest_of(style), version=__version__,
        settings=_settings(about), means=means_text(samples) if samples else "No prompts.",
    )  # fmt: skip


def page_file(name: str) -> str:
    """A built-in template, style or script."""
    return files("converter").joinpath("data", name).read_text("utf-8")


def page_environment() -> Environment:
    """The environment of templates: it escapes all text; the filter ``shown`` is for untrusted
    text.
    """
    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined,
        keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters |= {"shown": _shown}
    return environment


def digest_of(text: str) -> str:
    """The policy entry that allows an inline style or script: its sha256 in base64."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _settings(about: About) -> str:
    """How the texts were made, in a sentence."""
    prompts = "Prompts went through the chat template. " if about.chat else ""
    stars = "Words of the word list are starred out. " if about.masked else ""
    return (
        f"{about.edited} is run as {about.how}. At most {about.max_new_tokens} new tokens; samples "
        f"are drawn with seed {about.seed} and top-p {about.top_p:g}. {prompts}{stars}Marked words "
        "are those that the other continuation lacks. What models say here is shown, not endorsed."
    )


def _shown(text: str) -> str:
    """A text with its lines, and with escapes for control characters."""
    return "".join(
        c if c == "\n" or is_one_line(c) else c.encode("unicode_escape").decode() for c in text
    )


PAGES: Mapping[str, Callable[[About, Sequence[Sample]], str]] = {
    ".html": html_page, ".md": markdown_page, ".jsonl": jsonl_page,
}  # fmt: skip
"""Ending of a file -> the function that writes it."""


def write_page(path: Path, about: About, samples: Sequence[Sample]) -> None:
    """Write a file whose ending is one of ``PAGES``. Raises OSError."""
    path.write_text(PAGES[path.suffix.lower()](about, samples), "utf-8", newline="\n")
