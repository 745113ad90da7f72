"""A finished conversion as one page of HTML, for people: verdict, pictures, samples, numbers.

The page needs no other file and fetches nothing. It is made from a manifest alone, whose texts are
untrusted: they never become markup.
"""

import json
import shlex
from collections.abc import Iterator
from typing import Any

from converter.checkpoints.names import MANIFEST
from converter.evaluation.pages import digest_of, page_environment, page_file
from converter.evaluation.samples import RULE, differences
from converter.manifest import Manifest
from converter.outputs.base import output_of
from converter.release.card import FORMULAS, compress, local_name
from converter.release.report_charts import bar_charts, cost_chart
from converter.release.report_tables import layers_table, numbers_table
from converter.release.trust import trust
from converter.release.verdict import verdict
from converter.version import __version__

_TERMS = (
    "Perplexity says how badly the model predicts a text: higher is worse. A control is a random "
    "edit of the same size: an effect counts only if it is well beyond that of the controls. An "
    "interval of 95 % holds the true value in 19 of 20 cases. Toxic words are the words of a list; "
    "other words can hurt, too."
)


def report_page(manifest: Manifest, digest: str = "") -> str:
    """The page. The same manifest is always the same bytes.

    Args:
        manifest: of the result.
        digest: sha256 of its file.
    """
    style = page_file("compare.css") + page_file("report.css")
    script = page_file("report.js")
    environment = page_environment()
    environment.filters |= {"exact": json.dumps, "unbroken": _unbroken}
    guard, paper = manifest.guard, manifest.method.paper
    return environment.from_string(page_file("report.html")).render(
        title=f"{manifest.source.name}, {manifest.method.name}",
        verdict=verdict(manifest),
        answers=[*trust(manifest, _verify(manifest))],
        about=_about(manifest),
        paper=paper if paper.startswith("https://") else "",
        terms=_TERMS,
        bars=[*bar_charts(guard)] if guard else [],
        points=cost_chart(manifest),
        samples=[*_samples(manifest)],
        rule=RULE[:1].upper() + RULE[1:],
        masked=manifest.run.mask,
        edit=_edit_text(manifest),
        layers=layers_table(manifest),
        undo=_undo(manifest),
        commands=_commands(manifest),
        numbers=numbers_table(manifest),
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
    many = "" if len(manifest.layers) == 1 else "s"
    where = f" of layer{many} {layers}, counted from 0," if layers else ""
    formula = f" Each matrix W became {became}." if became else ""
    created = len(manifest.edit.created)
    more = f" {created} tensors were created that the base lacks." if created else ""
    return (
        f"{len(manifest.edited)} tensor{'' if len(manifest.edited) == 1 else 's'}{where} changed; "
        f"all others are those of the base.{formula}{more}"
    )


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


def _verify(manifest: Manifest) -> str:
    """The command that checks the folder."""
    inside = manifest.run.subfolder
    part = f" --subfolder {shlex.quote(inside)}" if inside else ""
    return f"gloss verify FOLDER --source {shlex.quote(_source(manifest))}{part}"


def _commands(manifest: Manifest) -> str:
    """The commands that check, repeat and compare."""
    source = shlex.quote(_source(manifest))
    place = "" if manifest.source.repo_id or source == "demo" else f" --source {source}"
    return (
        f"# check every file of this folder\n{_verify(manifest)}\n"
        f"# make the same files again\ngloss replay FOLDER/{MANIFEST} OUT{place}\n"
        f"# show what both models say\ngloss compare {source} FOLDER --output page.html"
    )


def _unbroken(text: str) -> str:
    """A text in which no line ends between a number and its per cent sign."""
    return text.replace(" %", "\u00a0%")
