"""The model card: front matter for the Hub, and in plain words what was done to the model."""

from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCardData

from converter import __version__
from converter.architecture import find_architecture
from converter.evaluate.table import markdown
from converter.source import Source

TAGS = ["detoxification", "model-editing"]

BODY = """
# {title}

This is {base} after {method}. The model was edited, not trained: {tensors} of its tensors, the
matrices (and biases) with which the feed-forward networks of layers {layers} write into the
residual stream, no longer write along {subspace} of {rank} dimensions. It was fitted on {count}
pairs of toxic and neutral sentences ({pairs}). Every other {unit} of the weights is that of the
source{origin}.

Method: {paper}

## What was measured

{measured}

## What this does not promise

An edit of this kind lowers the probability of toxic text; it does not rule it out. Measure it on
text that you care about before you use it.

## How it was made, and how to check it

gloss-convert {version} wrote this folder. `gloss_manifest.json` records the source and the sha256
of every file read and written, every option, and for each edited tensor how much it changed.
`gloss_subspace.safetensors` holds the subspace. To check all of it:

    gloss verify THIS_FOLDER --source SOURCE

{form}"""

FORMS = {
    "checkpoint": """## How to undo it

A projection deletes information, so it cannot be inverted from these files alone. Use the source:
{source}. The manifest lists the sha256 of each of its files.
""",
    "adapter": """## How to use it

This is a LoRA adapter: it is loaded on the model that it was made from, {source}.

    from peft import PeftModel
    from transformers import {auto_class}

    model = {auto_class}.from_pretrained("{base}"{revision})
    model = PeftModel.from_pretrained(model, "THIS_FOLDER")

It says exactly the edit, rounded to float32. After `model.merge_and_unload()` the weights are those
of the edited model, in the dtype of the base and rounded to it.

## How to undo it

`model.unload()` gives back the model that it was loaded on, whose files are as they were.
""",
}
"""The last part, for each output."""

FIELDS = {
    "checkpoint": {"library_name": "transformers", "base_model_relation": "finetune"},
    "adapter": {"library_name": "peft", "base_model_relation": "adapter"},
}
"""The part of the front matter that differs between outputs."""


def license_fields(source: Source, base: str | None) -> tuple[dict[str, Any], str | None]:
    """The licence part of the front matter, read from the source's card and never guessed.

    Returns:
        the fields, and a warning when the source does not say.
    """
    card = source.card
    if card.license:
        names = ("license", "license_name", "license_link")
        return {name: value for name in names if (value := getattr(card, name))}, None
    files = [name for name in source.companions if name.upper().startswith(("LICENSE", "LICENCE"))]
    link = files[0] if files else (f"https://huggingface.co/{base}" if base else "README.md")
    return (
        {"license": "other", "license_name": "unknown", "license_link": link},
        f"{source.name} does not state a licence, so the card says 'other'; add it to the front "
        "matter of the source's README.md and convert again",
    )


def make_card(
    source: Source, base: str | None, manifest: Mapping[str, Any]
) -> tuple[str, list[str]]:
    """The text of README.md, and warnings for the terminal.

    Args:
        source: what was edited.
        base: Hub repo id of the base model, or None.
        manifest: everything but the file list.
    """
    fields, warning = license_fields(source, base)
    warnings = [warning] if warning else []
    if base is None:
        warnings.append("the card names no base model; give --base-model with its repo id")
    dataset = manifest["pairs"]["origin"].get("repo_id")
    output = manifest["run"]["output"]
    data = ModelCardData(
        **fields,
        base_model=base,
        base_model_relation=FIELDS[output]["base_model_relation"] if base else None,
        library_name=FIELDS[output]["library_name"],
        pipeline_tag=source.card.pipeline_tag or "text-generation",
        language=source.card.language,
        datasets=[dataset] if dataset else None,
        tags=[*TAGS, manifest["method"]["name"]],
    )
    edited, commit = manifest["edited"], manifest["source"]["commit"]
    layers = sorted({entry["layer"] for entry in edited})
    body = BODY.format(
        measured=measured_text(manifest),
        title=f"{source.name.rpartition('/')[2]}-{manifest['method']['name']}",
        base=source.name + (f" ([{base}](https://huggingface.co/{base}))" if base else ""),
        method=manifest["method"]["title"],
        tensors=len(edited),
        layers=compress(layers),
        subspace="one subspace" if manifest["subspace"]["shared"] else "a subspace, each its own,",
        rank=manifest["subspace"]["rank"],
        count=manifest["pairs"]["count"],
        pairs=dataset or manifest["pairs"]["origin"]["name"],
        unit="number" if source.originals else "byte",
        origin=f", whose files are {', '.join(p.name for p in source.originals)}"
        if source.originals
        else "",
        paper=manifest["method"]["paper"],
        version=__version__,
        form=FORMS[output].format(
            source=f"{source.name} at commit `{commit}`" if commit else source.name,
            auto_class=find_architecture(source.config).auto_class,
            base=base or source.name,
            revision=f', revision="{commit}"'
            if commit and base == manifest["source"]["repo_id"]
            else "",
        ),
    )
    return f"---\n{data.to_yaml()}\n---\n{body}", warnings


def measured_text(manifest: Mapping[str, Any]) -> str:
    """What the guard and the evaluation found, with the controls; or that nothing was measured."""
    guard, results = manifest["guard"], manifest["evaluation"]
    if guard is None and results is None:
        return "Toxicity and perplexity were **not measured** when this checkpoint was made."
    parts = []
    if guard is not None:
        parts.append(guard_text(guard))
    if results is not None:
        parts.append(
            "Continuations of prompts, seeds averaged, with intervals of 95 %; *toxic words* is "
            "their probability relative to the unedited model:\n\n" + markdown(results)
        )
    return "\n\n".join(parts)


def guard_text(guard: Mapping[str, Any]) -> str:
    """The guard's measurements in words."""
    edit, controls = guard["edit"], guard["random"]

    def mean(name: str) -> float:
        values: list[float] = [control[name]["value"] for control in controls]
        return sum(values) / len(values)

    text = (
        f"On held-out text that neither the fit nor the choice of the rank has seen, perplexity is "
        f"{edit['perplexity_ratio']['value']:.3f} times what it was "
        f"({guard['neutral_tokens']:,} neutral tokens), and toxic words are "
        f"{edit['teacher_forced']['value']:.3f} times as probable ({guard['toxic_words']} words). "
        f"Under random subspaces of the same rank and layers it is {mean('perplexity_ratio'):.3f} "
        f"and {mean('teacher_forced'):.3f} times. The toxic words are of the same kind as those of "
        "the pairs; other toxic text may respond less."
    )
    if guard["reasons"]:
        text = f"**The guard refused this edit: {'; '.join(guard['reasons'])}.** {text}"
    return text


def compress(numbers: list[int]) -> str:
    """``[3, 4, 5, 8]`` -> ``3-5, 8``."""
    parts: list[list[int]] = []
    for n in sorted(numbers):
        if parts and n == parts[-1][1] + 1:
            parts[-1][1] = n
        else:
            parts.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
