"""The model card: front matter for the Hub, and a description of the edit in plain words.

The template is ``data/card.md``; this module fills it in. A manifest's ``run.output`` says whether
the card describes a ``checkpoint`` or an ``adapter``.
"""

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote

from huggingface_hub import ModelCardData
from jinja2 import Environment, StrictUndefined

from converter.checkpoints.architectures.find import find_architecture
from converter.checkpoints.chat_template import is_template_file
from converter.checkpoints.front_matter import write_front_matter
from converter.checkpoints.fusing import CODE
from converter.checkpoints.names import weight_files
from converter.checkpoints.source import Source
from converter.evaluation.samples import RULE
from converter.hub.store_addresses import is_store
from converter.manifest import Choice, Manifest, PairsRecord, TextRecord
from converter.outputs.base import output_of
from converter.release.card_results import eval_results, measured_text, pictures
from converter.release.licences import Terms, fitting_name
from converter.release.manifest import hash_line
from converter.release.verdict import verdict
from converter.text import code, escaped, one_line
from converter.version import __version__

_TAGS = ["detoxification", "model-editing"]
_HUB = "https://huggingface.co"

_URL = "/:?&=%#@,;+!$'*~"
"""Characters that a link to a paper may have besides letters and digits."""

FORMULAS = {
    "remove-subspace": "`W - U Uᵀ W`, where `U` is an orthonormal basis of a subspace",
    "weaken-subspace": "`W - a U Uᵀ W`, where `U` is an orthonormal basis of a subspace, and the "
    "factor `a` is below 1",
    "remove-oblique": "`W - a A Uᵀ W`, where `U` is an orthonormal basis of a subspace, `A` has "
    "`Uᵀ A = I`, and `a` is a factor of at most 1",
    "add-low-rank": "`W + B A`, where `B` has few columns and `A` few rows",
    "add-to-rows": "`W` with a vector `v` added to some of its rows",
    "replace": "another matrix of the same size",
    "add-bits": "a matrix whose bit patterns, as integers, are those of `W` plus recorded ones",
}
"""Kind of edit -> the edited matrix, in terms of ``W``."""

_SHOWN = 8
"""Candidate directions in the card; the manifest has all."""


def make_card(
    source: Source, base: str | None, manifest: Manifest, terms: Terms, digest: str
) -> tuple[str, list[str]]:
    """The text of README.md, and warnings for the terminal.

    ``base`` is the Hub repo id of the base model, ``digest`` the sha256 of the manifest's file.
    """
    warnings = list(terms.warnings)
    if base is None:
        named = "card and the adapter name" if manifest.run.output == "adapter" else "card names"
        warnings.append(f"the {named} no base model; give --base-model with its repo id")
    environment = Environment(  # noqa: S701 - it makes Markdown, not HTML
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined
    )
    template = environment.from_string(
        files("converter").joinpath("data/card.md").read_text("utf-8")
    )
    about = _about_source(source, base, manifest)
    text = template.render(
        title=escaped(title_of(source, manifest)),
        built_with=terms.family.built_with if terms.family else "",
        licence=terms.sentences,
        hash_line=hash_line(digest),
        version=__version__,
        verdict=escaped(verdict(manifest).text),
        measured=measured_text(manifest),
        pictures=pictures(manifest),
        sample_rule=RULE[:1].upper() + RULE[1:],
        samples=[
            [escaped(text) or "*nothing*" for text in (each.prompt, each.before, each.after)]
            for each in manifest.samples
        ],
        done=list(_done(about["source"], manifest)),
        **about,
        **_about_edit(manifest),
    )
    fields = front_matter(source, base, manifest, terms).to_dict()  # type: ignore[no-untyped-call]
    front = write_front_matter(fields)
    return f"---\n{front}\n---\n" + re.sub(r"\n{3,}", "\n\n", text), warnings


def front_matter(
    source: Source, base: str | None, manifest: Manifest, terms: Terms
) -> ModelCardData:
    """The metadata. From the base it takes only licence, language and task."""
    output = output_of(manifest.run.output)
    dataset = manifest.pairs.origin.repo_id
    results = eval_results(manifest)
    tags = [*_TAGS, "custom_code"] if CODE in manifest.edit.files else _TAGS
    return ModelCardData(
        **terms.fields,
        base_model=base,
        base_model_relation=output.relation if base else None,
        library_name=output.library,
        pipeline_tag=source.card.pipeline_tag or "text-generation",
        language=source.card.language,
        datasets=[dataset] if dataset else None,
        tags=[*tags, *(method.name for method, _ in manifest.methods)],
        model_name=title_of(source, manifest) if results else None,
        eval_results=results or None,
    )


def title_of(source: Source, manifest: Manifest) -> str:
    """A name for the model, with the beginning that its licence requires."""
    name = f"{source.name.rpartition('/')[2]}-{manifest.method.name}"
    return fitting_name(source.card, name)


def _about_source(source: Source, base: str | None, manifest: Manifest) -> dict[str, Any]:
    """The template's fields on the base, and on how to load the result."""
    repo_id, commit = manifest.source.repo_id, manifest.source.commit
    asked = repo_id or local_name(manifest.run.source)
    name = repo_id or base
    place = f"[{name}]({_HUB}/{name})" if name else escaped(source.name)
    place += f" at commit {code(commit)}" if commit else ""
    subfolder = manifest.run.subfolder
    argument = shlex.quote(f"{asked}@{commit}" if commit else asked)
    if subfolder:
        place += f", subfolder {code(subfolder)}"
        argument += f" --subfolder {shlex.quote(subfolder)}"
    return {
        "output": manifest.run.output,
        "auto_class": find_architecture(source.config, source.folder).auto_class,
        "base": f"[{base}]({_HUB}/{base})" if base else escaped(source.name),
        "base_id": base,
        "base_page": f"{_HUB}/{base}" if base else None,
        "pinned": pinned(source, manifest) if base == repo_id else "",
        "source": place,
        "source_argument": one_line(argument),
        "unit": "number" if source.originals else "byte",
        "originals": f", whose files are {', '.join(escaped(p.name) for p in source.originals)}"
        if source.originals
        else "",
    }


def local_name(source: str) -> str:
    """A recorded source that is no repo, as an argument that cannot be taken for one or for a
    word such as demo.
    """
    clear = source == "demo" or source.startswith("./") or is_store(source)
    return source if clear else f"./{source}"


def pinned(source: Source, manifest: Manifest) -> str:
    """The arguments of transformers, besides the name, that load the edited checkpoint.

    For Meta's own layout it loads the translation, which is at the top of the repo.
    """
    commit, subfolder = manifest.source.commit, manifest.run.subfolder
    arguments = [f'revision="{commit}"'] if commit else []
    if subfolder and not weight_files(path.name for path in source.originals):
        arguments.append(f"subfolder={json.dumps(str(PurePosixPath(subfolder)))}")
    return "".join(f", {argument}" for argument in arguments)


def _done(place: str, manifest: Manifest) -> Iterator[tuple[str, str]]:
    """The rows of the table that describes the change of the base."""
    edited = manifest.edited
    changes = [100 * entry.relative_change for entry in edited]
    yield "base", place
    for method, _ in manifest.methods:
        yield "method", f"{escaped(method.title)} ({paper_link(method.paper)})"
    if edited:
        layers = compress(list({entry.layer for entry in edited if entry.role != "lm_head"}))
        where = f" of layers {layers}, counted from 0" if layers else ""
        count = f"{len(edited)} tensor{'' if len(edited) == 1 else 's'}"
        yield "edited", f"{count}: the {_roles_text({entry.role for entry in edited})}{where}"
    if created := manifest.edit.created:
        what = (
            f"{len(created)} tensors" if len(created) > 1 else f"the tensor {code(created[0].name)}"
        )
        yield "created", f"{what} that the base lacks, in {code(created[0].shard)}"
    for name, patch in manifest.edit.patches.items():
        label = None if isinstance(patch, str) else patch.get("model_type")
        yield "changed file", code(name) + (f", now of type {code(str(label))}" if label else "")
    for name in manifest.edit.files:
        yield "added file", code(name)
    for number, (method, choice) in enumerate(manifest.methods, 1):
        budget = 1 + (manifest.run.max_perplexity_ratio - 1) * number / len(manifest.methods)
        strength = f"{choice.strength:g}"
        if method.subspace is not None:
            of = "" if method.strength == "rank" else f"a subspace of {manifest.edit.rank} of "
            strength += f" of {of}{method.subspace.hidden_size} dimensions"
        own = f"{method.strength} of {method.name}" if manifest.steps else method.strength
        yield escaped(own), strength + _chosen_text(choice, budget)
    if (found := manifest.search) is not None:
        kept = ""
        if found.kept is not None:
            kept = (
                f"; text that no trial has seen keeps {found.kept:.0%} of the drop of toxic words"
            )
        yield "options", f"found by a search of {found.trials} trials on held-out text{kept}"
    if (factors := manifest.factors) and {*factors.values()} != {manifest.choice.strength}:
        yield "factors", f"{factors_text(factors, manifest.layers)}: `a` of the formula below"
    if changes:
        mean, least, most = sum(changes) / len(changes), min(changes), max(changes)
        spread = f"{mean:.1f} % of a tensor's norm on average, {least:.1f} to {most:.1f} %"
        yield "change", spread
    if manifest.instances is not None:
        yield "fitted on", _data_link(manifest.instances)
        return
    count = f"{manifest.pairs.count:,} pairs of toxic and neutral sentences"
    yield "fitted on", f"{count} from {_data_link(manifest.pairs)}"


def _chosen_text(choice: Choice, budget: float) -> str:
    """How a strength was chosen; empty if it was given."""
    if not choice.automatic:
        return ""
    tried = [trial.strength for trial in choice.tried]
    whole = [int(each) for each in tried if each == int(each)]
    listed = compress(whole) if len(whole) == len(tried) else ", ".join(f"{n:g}" for n in tried)
    return (
        f"; of {listed} the most effective on held-out text within a perplexity ratio of {budget:g}"
    )


_ROLES = {
    "down_proj": "down-projections", "gate_proj": "gate projections", "up_proj": "up projections",
    "o_proj": "output projections of the attention", "lm_head": "output embedding",
}  # fmt: skip


def _roles_text(roles: set[str]) -> str:
    """The roles of edited tensors in words, such as ``down-projections and their biases``."""
    parts = []
    for role, name in _ROLES.items():
        if role in roles:
            parts.append(name + (" and their biases" if f"{role}_bias" in roles else ""))
        elif f"{role}_bias" in roles:
            parts.append(f"biases of the {name}")
    return ", ".join(parts)


def paper_link(paper: str) -> str:
    """A paper as a link; the Hub makes a tag of one to arXiv."""
    if found := re.search(r"\b(\d{4}\.\d{4,5})(v\d+)?\b", paper):
        return f"[arXiv {found[1]}](https://arxiv.org/abs/{found[1]})"
    return f"[paper]({quote(paper, safe=_URL)})" if paper.startswith("http") else escaped(paper)


def _data_link(record: TextRecord) -> str:
    """Pairs or instances, as a link if they are on the Hub."""
    origin, what = record.origin, "pairs" if isinstance(record, PairsRecord) else "instances"
    if repo_id := origin.repo_id:
        link = f"{_HUB}/datasets/{quote(repo_id)}"
        return f"[{escaped(repo_id)}]({link}) at commit {code(str(origin.commit))}"
    if isinstance(record, PairsRecord) and (drawn := record.drawn):
        return f"what the model itself said after {drawn.prompts.count:,} prompts"
    if origin.name == "builtin":
        return f"the {what} built into gloss-convert"
    return f"the file {escaped(origin.title)}"


def _about_edit(manifest: Manifest) -> dict[str, Any]:
    """The template's fields on the edit, its directions and its words."""
    subspace = manifest.subspace
    candidates = subspace.candidates if subspace else ()
    kept = [c for c in candidates if c.kept and any(c.tokens)]
    best = sorted(kept, key=lambda c: -c.score)[:_SHOWN]
    number = f"the first {len(best)} of {len(kept)}" if len(kept) > len(best) else "all"
    listed = manifest.word_list.origin.title
    english = "builtin" in (manifest.pairs.origin.name, manifest.run.word_list)
    rank, bases = manifest.edit.rank, {t.tensors.get("U") for t in manifest.edited}
    return {
        "method": ", then ".join(_short(method.title) for method, _ in manifest.methods),
        "control": any(c.kind == "random" for c in candidates),
        "subspace": subspace is not None,
        "weakened": bool(manifest.factors),
        "dimensions": f"{rank} dimension{'' if rank == 1 else 's'}",
        "where": "the same for all edited layers" if len(bases) == 1 else "for each layer its own",
        "formulas": [FORMULAS.get(kind, "") for kind in sorted({t.kind for t in manifest.edited})],
        "changed": bool(manifest.edit.patches or manifest.edit.created),
        "created": _created_size(manifest),
        "fused": CODE if CODE in manifest.edit.files else "",
        "mask": manifest.run.mask,
        "defence": manifest.instances is not None,
        "judged": manifest.guard is not None,
        **_suffix(manifest),
        "instances": _data_link(manifest.instances) if manifest.instances else "",
        "candidates": (
            "The subspace was sought in all fitted layers together; to show what there is, these "
            "are the strongest directions of single layers."
            if manifest.method.name == "gloss"
            else f"Of the directions that the subspace was made from, these are {number}."
        ),
        "tokens": [
            {
                "layer": c.layer,
                "kind": c.kind,
                "score": f"{c.score:.3g}",
                "tokens": ", ".join(filter(None, map(code, c.tokens))),
            }
            for c in best
        ],
        "data": f"{_data_link(manifest.pairs)}, and the word list {code(listed)}"
        + (", in English" if english else ""),
    }


def _suffix(manifest: Manifest) -> dict[str, Any]:
    """The template's fields on a text behind user messages."""
    defence = manifest.guard.defence if manifest.guard else None
    found = defence.suffix if defence else manifest.method.evidence.get("suffix")
    return {
        "suffix": code(found) if isinstance(found, str) and found else "",
        "puts_suffix": any(map(is_template_file, manifest.edit.patches)),
    }


def _short(title: str) -> str:
    """The title of a method within a sentence: ``GloSS (global toxic subspace suppression)``."""
    name, _, rest = title.partition(", ")
    return escaped(f"{name} ({rest})" if rest else name)


def _created_size(manifest: Manifest) -> str:
    """Megabytes of the created tensors; empty if there are none."""
    shards = {tensor.shard for tensor in manifest.edit.created}
    return f"{sum(manifest.files[name].nbytes for name in shards) / 1e6:.2g}" if shards else ""


def factors_text(factors: Mapping[int, float], layers: Sequence[int]) -> str:
    """Factors of layers in words: ``0.5 in layers 4-8, 0.9 in layer 9; 1 in the others``."""
    parts = []
    for a in dict.fromkeys(factors.values()):
        mine = [layer for layer in factors if factors[layer] == a]
        parts.append(f"{a:g} in layer{'s' if len(mine) > 1 else ''} {compress(mine)}")
    return ", ".join(parts) + ("; 1 in the others" if len(factors) < len(layers) else "")


def compress(numbers: list[int]) -> str:
    """``[3, 4, 5, 8]`` -> ``3-5, 8``."""
    parts: list[list[int]] = []
    for n in sorted(numbers):
        if parts and n == parts[-1][1] + 1:
            parts[-1][1] = n
        else:
            parts.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
