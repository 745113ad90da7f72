"""The duties of the source's licence for an edited model, by licence family.

``data/licences.toml`` describes each family. A family is recognised only by the word in the
source's card. A file that the source lacks is never made up: the terminal and the card say that it
is missing.
"""

import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import ModelCardData

from converter.checkpoints.names import papers
from converter.checkpoints.source import Source
from converter.recipe import Publication
from converter.runtime import progress
from converter.text import code, escaped

NOTICE = "Notice"
"""The text file that Llama's licences and the Gemma terms require, in their spelling."""

_CALLED = {"agreement": "the licence itself", "policy": "the use policy", "notice": "the notice"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A licence family; ``data/licences.toml`` explains the fields."""

    title: str
    link: str
    papers: tuple[str, ...]
    notice: str = ""
    built_with: str = ""
    prefix: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """The duties of a licence for one output.

    Attributes:
        fields: ``license``, ``license_name`` and ``license_link`` of the front matter.
        family: None if nothing is known of this licence.
        sentences: for the card, each a list item in Markdown.
        warnings: for the terminal.
        notice: the text of the file ``NOTICE`` to write; empty for none.
    """

    fields: Mapping[str, Any]
    family: Family | None
    sentences: tuple[str, ...]
    warnings: tuple[str, ...]
    notice: str = ""


@cache
def families() -> dict[str, Family]:
    """The word of a card -> the licence family."""
    text = files("converter").joinpath("data/licences.toml").read_text("utf-8")
    return {
        name: Family(**{**entry, "papers": tuple(entry["papers"])})
        for name, entry in tomllib.loads(text).items()
    }


def licence_name(card: ModelCardData) -> str | None:
    """The word in a card that names the licence; None if there is none."""
    said = card.get("license")
    if isinstance(said, list):  # the Hub allows several; a licence with duties comes first
        names = [name for name in said if isinstance(name, str)]
        said = next((name for name in names if name in families()), names[0] if names else None)
    if said == "other":
        said = card.get("license_name")
    return said if isinstance(said, str) and said and said != "unknown" else None


def check_name(license: str | None, repo_id: str) -> list[str]:  # noqa: A002
    """A sentence if a licence, by its ``licence_name``, requires another name of the repository."""
    family, name = families().get(license or ""), repo_id.rpartition("/")[2]
    if family is None or not family.prefix or _prefix(family).match(name):
        return []
    return [
        f"the {family.title} asks that the name of a derived model begin with "
        f"'{family.prefix.replace(' ', '-')}', which {name} does not"
    ]


def _prefix(family: Family) -> re.Pattern[str]:
    """``Llama 3`` is also written ``Llama-3`` and ``Llama3``; a repo id cannot have a space."""
    return re.compile(r"[-_. ]?".join(map(re.escape, family.prefix.split())))


def fitting_name(card: ModelCardData, name: str) -> str:
    """``name``, with the beginning that the card's licence requires."""
    family = families().get(licence_name(card) or "")
    if family is None or not family.prefix:
        return name
    found = _prefix(family).search(name)
    return name[found.start() :] if found else f"{family.prefix.replace(' ', '-')}-{name}"


def terms_of(source: Source, base: str | None) -> Terms:
    """Compare the duties of a source's licence with the source's card and small files.

    ``base`` is the Hub repo id of the base model.
    """
    found = papers(source.small)
    name = licence_name(source.card)
    family = families().get(name or "")
    fields, warnings = _fields(source, base, found["agreement"], name)
    sentences = [_under(source, name, family)]
    for kind, names in found.items():
        if names:
            links = ", ".join(f"[{escaped(name)}]({quote(name)})" for name in names)
            sentences.append(f"{_CALLED[kind].capitalize()}: {links}, as in the source.")
    notice = ""
    if family:
        for kind in (kind for kind in family.papers if not found[kind]):
            sentences.append(
                f"**{_CALLED[kind].capitalize()} was not in the source.** Add it before you "
                "publish this folder: a copy has to go along ([where it is published]"
                f"({family.link}))."
            )
            warnings.append(
                f"{source.name} is under the {family.title} and comes without {_CALLED[kind]}, "
                f"which has to go along; add it before you publish, from {family.link}"
            )
        line, notices = family.notice, found["notice"]
        if line and not notices:
            notice = line
            sentences.append(f"[{NOTICE}]({NOTICE}) holds the line that the licence asks for.")
        elif line and not _says(source, notices, line):
            sentences.append(f"**{notices[0]} lacks the line that the licence asks for**: {line}")
            warnings.append(f"{notices[0]} lacks the line that the {family.title} asks for: {line}")
        if family.prefix:
            sentences.append(
                f"The licence asks that the name of a derived model begin with `{family.prefix}`."
            )
    if source.gated:
        sentences.append(
            "The base is gated: its terms have to be accepted before it can be downloaded. A "
            "repository made from this folder is not, unless its owner turns that on."
        )
        warnings.append(
            f"{base or source.name} is gated, and a repository made from this folder is not by "
            "itself; keep it private, or turn gating on there"
        )
    return Terms(
        fields=fields,
        family=family,
        sentences=tuple(sentences),
        warnings=tuple(warnings),
        notice=notice,
    )


def write_notice(terms: Terms, folder: Path) -> list[str]:
    """Write the notice that the licence prescribes and the source lacks; the files written."""
    if not terms.notice:
        return []
    (folder / NOTICE).write_text(terms.notice + "\n", "utf-8")
    return [NOTICE]


def _fields(
    source: Source, base: str | None, agreements: list[str], name: str | None
) -> tuple[dict[str, Any], list[str]]:
    """The licence part of the front matter, read from the source's card and never guessed."""
    page = f"https://huggingface.co/{base}" if base else None
    if name is None:
        link = agreements[0] if agreements else page or "README.md"
        return {"license": "other", "license_name": "unknown", "license_link": link}, [
            f"{source.name} does not state a licence, so the card says 'other'; add it to the "
            "front matter of the source's README.md and convert again"
        ]
    keys = ("license", "license_name", "license_link")
    fields = {key: value for key in keys if (value := source.card.get(key))}
    link = str(fields.get("license_link", ""))
    if link and page and "://" not in link and link not in source.small:
        fields["license_link"] = f"{page}/blob/main/{link}"  # it was relative to the base
    return fields, []


def _under(source: Source, name: str | None, family: Family | None) -> str:
    """A sentence that names the licence."""
    if name is None:
        return (
            "The source does not state a licence. Find out which one it has before you use or "
            "publish this model."
        )
    if family is None:
        return (
            f"The licence is {code(name)}, as the source's card says. gloss-convert knows nothing "
            "of what it asks for: read it before you publish this model."
        )
    return (
        f"[{family.title}]({family.link}), as the source. The weights were modified, as described "
        "above."
    )


def _says(source: Source, names: Iterable[str], line: str) -> bool:
    """Whether one of these files holds a line, in any line breaks."""
    texts = (source.small[name].read_text("utf-8", "replace") for name in names)
    return any(" ".join(line.split()) in " ".join(text.split()) for text in texts)


def warn_of_name(licence: str | None, place: Publication) -> None:
    """Warn if the licence of the base requires another name of the repo."""
    for text in check_name(licence, place.repo_id):
        progress.warn(text)
