"""Parts of the guide that are generated: ``python -m tests.guide`` writes them anew.

A page has each between two comments, the first of which names it. The table of models is not among
them: ``gloss architectures`` takes five minutes.
"""

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from converter.cli.documents import DOCUMENTS
from converter.cli.schema import schema_named
from converter.errors import ConverterError
from converter.release.schema import schema
from tests.builders.invoke import invoke

ROOT = Path(__file__).parents[1]
PAGES = {
    "options": ROOT / "converter/guide/options.md",
    "methods": ROOT / "converter/guide/methods.md",
    "exit-codes": ROOT / "converter/guide/exit-codes.md",
    "manifest": ROOT / "converter/guide/manifest.md",
    "json": ROOT / "converter/guide/json.md",
}
"""Topic -> a page with a generated part."""

_PART = re.compile(r"(<!-- begin: (.*?) -->\n\n)(.*?)(<!-- end -->)", re.DOTALL)
_BEYOND = {"0": ("", "done"), "1": ("", "a bug of ours; please report the traceback")}
_SIGNALS = "| 130, 143, 129 | | stopped by Ctrl-C, SIGTERM, SIGHUP |"


def with_parts(text: str) -> str:
    """A page with its generated parts as they should be."""
    return _PART.sub(lambda found: f"{found[1]}{made(found[2])}\n\n{found[4]}", text)


@cache
def made(name: str) -> str:
    """A generated part, by the name that its comment has."""
    if name.startswith("gloss "):
        return invoke(*name.split()[1:], code=0).stdout.strip()
    made_by = {"exit codes": _exit_codes, "manifest": _fields, "documents": _documents}
    return "\n".join(made_by[name]())


def _exit_codes() -> Iterator[str]:
    yield "| code | in Python | meaning |\n|---|---|---|"
    codes = dict(_BEYOND)
    for kind in ConverterError.__subclasses__():
        codes[str(kind.exit_code)] = (f"`{kind.__name__}`", first_sentence(kind.__doc__))
    yield from (f"| {code} | {name} | {means} |" for code, (name, means) in codes.items())
    yield _SIGNALS


def _fields() -> Iterator[str]:
    yield "| field | required | what it is |\n|---|---|---|"
    whole, parts = schema(), schema()["$defs"]
    manifest = parts[whole["$ref"].rpartition("/")[2]]
    for name, field in manifest["properties"].items():
        kinds = re.findall(r"#/\$defs/(\w+)", str(field))[:1]
        about = [parts[kind]["description"] for kind in kinds] + [field.get("description", "")]
        said = "; ".join(filter(None, map(first_sentence, about))).replace("``", "`")
        must = "yes" if name in manifest["required"] else ""
        yield f"| `{name}` | {must} | {said or 'the version of the format'} |"


def _documents() -> Iterator[str]:
    yield "| schema | what it is of | what that is |\n|---|---|---|"
    for name in (*DOCUMENTS, "manifest"):
        found = schema_named(name)
        kinds = re.findall(r"#/\$defs/(\w+)", str(found.get("anyOf", found.get("$ref"))))
        about = [first_sentence(found["$defs"][kind]["description"]) for kind in kinds]
        of = {"error": "any command that fails", "manifest": "`gloss_manifest.json`"}
        said = "; or: ".join(about) or "options of a recipe by name"
        yield f"| `{name}` | {of.get(name, f'`gloss {name} --json`')} | {said} |"


def first_sentence(text: str | None) -> str:
    """The first paragraph of a docstring in one line, without the full stop."""
    words = " ".join((text or "").partition("\n\n")[0].split()).removesuffix(".")
    return words[:1].lower() + words[1:]


if __name__ == "__main__":
    for page in PAGES.values():
        page.write_text(with_parts(page.read_text("utf-8")), "utf-8")
