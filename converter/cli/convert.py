"""``gloss-convert``, which is ``gloss convert``, and ``gloss plan``: commands and summaries."""

from dataclasses import asdict, dataclass, replace
from functools import partial
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from converter.cli.command import Answer, command, quiet_libraries, refuse_typed
from converter.cli.fields import Part
from converter.cli.recipe import RecipePart
from converter.evaluation.gates import Gates
from converter.evaluation.options import EvaluationOptions
from converter.manifest import Estimate, ForwardRecord, GuardRecord, Manifest
from converter.option import Option, Options, declared_options
from converter.recipe import Publication, PublicationOptions, Recipe, Settings
from converter.runtime import progress
from converter.text import few

if TYPE_CHECKING:
    from converter.entrypoints.upload import Published

Destination = Annotated[
    Path, Option("Folder for the result, which does not exist or is empty.", flag="DESTINATION")
]
Overwrite = Annotated[bool, Option("Replace the checkpoint or adapter at DESTINATION.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class _DeliveryOptions(Options):
    """What becomes of the result."""

    # fmt: off
    destination: Destination
    overwrite: Overwrite = False
    evaluate: Annotated[bool, Option(
        "Measure more than the guard does, before anything is written; see gloss evaluate.",
    )] = False
    systems: Annotated[tuple[str, ...], Option(
        "System that --evaluate measures beside the edit; see gloss evaluate.",
        flag="--system", metavar="NAME", example="profs",
    )] = ("random",)
    plots: Annotated[Path | None, Option(
        "Folder for pictures. Inside DESTINATION they belong to the result, and its card shows "
        "them.",
        example="./out/pictures", path="folder",
    )] = None
    key: Annotated[Path | None, Option(
        "Private key in PEM to sign with; its password is in GLOSS_SIGN_PASSWORD.",
        flag="--sign", metavar="KEY", example="key.pem",
    )] = None
    push_to_hub: Annotated[str | None, Option(
        "Repo of the Hub to publish the result to; see gloss push.",
        metavar="REPO", example="someone/SmolLM2-detox",
    )] = None
    stream_to_hub: Annotated[bool, Option(
        "With --push-to-hub: publish each shard once it is finished, and delete it here.",
    )] = False
    dry_run: Annotated[bool, Option(
        "Check the options, the room and the rights, print the plan from the headers, and stop.",
    )] = False
    # fmt: on


def published_text(published: "Published | None") -> str:
    """A line of the summary."""
    return f"\n  published     {published.pull_request or published.url}" if published else ""


def _refuse_unused(recipe: Recipe, asked: _DeliveryOptions | None = None) -> None:
    """Raise OptionError if an option was typed that has no effect beside others."""
    from converter.methods.base import METHODS, aim_of
    from converter.methods.together import SEPARATOR
    from converter.outputs.base import output_of

    kinds = map(METHODS.load, recipe.method.split(SEPARATOR))
    if not any(aim_of(kind) == "defence" for kind in kinds):
        refuse_typed(("instances",), f"with --method {recipe.method}", "leave it out")
    where = f"with --output {recipe.output}"
    refuse_typed(output_of(recipe.output).unused, where, "leave it out")
    if asked and asked.push_to_hub is None:
        names = (*declared_options(PublicationOptions), "stream_to_hub")
        refuse_typed(names, "without --push-to-hub REPO", "add --push-to-hub REPO")
    if asked and not asked.evaluate and not recipe.guard:
        refuse_typed(("prompts",), "with --no-guard and without --evaluate", "add --evaluate")
    if asked and not asked.evaluate:
        names = (*declared_options(EvaluationOptions), "systems")
        refuse_typed(names, "without --evaluate", "add --evaluate")


@command(
    "convert",
    recipe=RecipePart(),
    asked=Part(_DeliveryOptions),
    settings=Part(Settings),
    gates=Part(Gates),
    evaluation=Part(EvaluationOptions),
    publication=Part(PublicationOptions),
)
def convert_command(
    recipe: Recipe,
    asked: _DeliveryOptions,
    settings: Settings,
    gates: Gates,
    evaluation: EvaluationOptions,
    publication: PublicationOptions,
) -> Answer:
    """Write a less toxic copy of the model SOURCE, or an adapter, to the folder DESTINATION.

    SOURCE is a folder with a checkpoint (safetensors, pytorch_model.bin, or Meta's or Mistral's
    consolidated.*), a .gguf file, a Hub repo id with an optional @revision, or the word demo,
    which is SmolLM2-135M-Instruct. A --recipe may name it instead.
    """
    from converter.entrypoints.delivery import Delivery, check_plots, draw
    from converter.entrypoints.evaluate import evaluation_of, own_recipe
    from converter.entrypoints.plan import describe_plan
    from converter.entrypoints.push import Streaming, push
    from converter.entrypoints.resume import convert_once
    from converter.hub.publishing import check_rights
    from converter.release.signing import load_signer

    quiet_libraries()
    _refuse_unused(recipe, asked)
    drawn = asked.evaluate and recipe.prompts != "none" and evaluation.passages > 0
    words = recipe.guard or drawn
    gates.require_measurements(words=words, ratio=asked.evaluate and evaluation.text is not None)
    signer = load_signer(asked.key) if asked.key else None
    inside = check_plots(asked.plots, asked.destination)
    repo = stream = None
    if asked.push_to_hub is not None:
        wanted = Publication(repo_id=asked.push_to_hub, **asdict(publication))
        repo = check_rights(wanted, "--push-to-hub")
        stream = Streaming(repo) if asked.stream_to_hub else None
    delivery = Delivery(
        overwrite=asked.overwrite,
        gates=gates,
        pictures=partial(draw, place=inside) if inside else None,
        signer=signer,
        stream=stream,
    )
    typed = recipe
    if asked.evaluate:
        recipe = own_recipe(typed, asked.systems)
    if asked.dry_run:
        plan = describe_plan(recipe, asked.destination, settings, delivery)
        return Answer(plan, _plan_text(plan))
    if asked.evaluate:
        measures = evaluation_of(evaluation, asked.systems, typed, settings)
        delivery = replace(delivery, evaluation=measures)
    manifest = convert_once(recipe, asked.destination, settings, delivery, inside)
    if asked.plots is not None and not inside:
        draw(manifest, asked.destination, asked.plots.absolute())
    published = stream.published if stream else None
    if repo and not stream:
        published = push(asked.destination, repo, recipe.trust_remote_code, verified=True)
    if signer:
        progress.note(f"  signed by the key whose public half has sha256 {signer.fingerprint}")
    result = _result_data(manifest, asked.destination)
    result["published"] = asdict(published) if published else None
    return Answer(result, _result_text(result) + published_text(published))


@command(
    "plan",
    recipe=RecipePart(),
    settings=Part(Settings, without=("workers", "attention", "keep_source")),
)
def plan_command(recipe: Recipe, settings: Settings) -> Answer:
    """Print what a conversion of SOURCE would do, from its headers alone."""
    from converter.entrypoints.plan import describe_plan

    quiet_libraries()
    _refuse_unused(recipe)
    plan = describe_plan(recipe, settings=settings)
    return Answer(plan, _plan_text(plan))


def _plan_text(plan: dict[str, Any]) -> str:
    """The result of ``describe_plan`` for people."""
    strengths = plan["method"]["strengths"].items()
    chosen = [f"{key} {'chosen by the budget' if x is None else x}" for key, x in strengths]
    peak, needed = plan["expected_peak_bytes"], plan["bytes_on_disk"]
    sizes, experts = plan["dimensions"], ""
    tensors, most = len(plan["edited_tensors"]), plan["edited_at_most"]
    edited, of, to_edit = "edited", "layers", f"{tensors} tensors to edit"
    if most < tensors:  # the fit chooses
        edited, of = "to choose from", "among layers"
        size = plan["edited_bytes_at_most"] / 1e6
        to_edit = f"{most} of {tensors} tensors to edit ({size:,.1f} MB), which the fit chooses"
    if count := sizes["num_experts"]:
        experts = f", {count} experts in {len(sizes['sparse_layers'])} layers"
    if left := sizes["num_hidden_layers"] - len(sizes["ffn_layers"]):
        experts += f", {left} layers without an FFN"
    lines = [
        f"{plan['source']}: {plan['architecture']}, "
        f"{sizes['num_hidden_layers']} layers, hidden size {sizes['hidden_size']}, "
        f"FFN {sizes['intermediate_size']}{experts}",
        *([f"made from {', '.join(plan['originals'])}"] if plan["originals"] else []),
        f"method {plan['method']['name']}, {', '.join(chosen)}{_layers(plan['edited_layers'], of)}",
        *(
            f"  {name}: {entry['bytes'] / 1e6:,.1f} MB, {entry['tensors']} tensors, "
            f"{entry['edited']} {edited}"
            for name, entry in plan["shards"].items()
        ),
        f"copied as they are: {', '.join(plan['copied_files']) or 'no files'}",
        *(
            f"{what}: {few(plan[key])}"
            for key, what in (
                ("extra_weights", "weights copied, not edited"),
                ("left_out", "left out"),
            )
            if plan[key]
        ),
        to_edit
        + (f", {len(plan['created_tensors'])} to create" if plan["created_tensors"] else "")
        + "".join(f", {name} to change" for name in plan["changed_files"])
        + "".join(f", {name} to add" for name in plan["added_files"])
        + "; "
        f"{plan['bytes_to_read'] / 1e6:,.1f} MB to read, {plan['output']} of "
        f"{plan['bytes_to_write'] / 1e6:,.1f} MB to write"
        + (f", in {needed / 1e6:,.1f} MB of disk" if needed != plan["bytes_to_write"] else ""),
        f"forward pass {_forward(plan['forward'])}",
        _continued(plan["continuations"]),
        *([_self_text(plan["self"])] if plan["self"] else []),
        f"peak memory about {peak['forward'] / 1e6:,.0f} MB for the forward pass (weights) and "
        f"{peak['edit'] / 1e6:,.0f} MB for the edit, beside Python itself; device {plan['device']}",
    ]
    return "\n".join(lines)


def _continued(plan: dict[str, Any]) -> str:
    """What the unedited model will be asked to write."""
    if "why" in plan:
        return f"no continuations for the guard: {plan['why']}"
    count = "the" if plan["prompts"] is None else plan["prompts"]
    return (
        f"{plan['samples']} continuations of at most {plan['max_new_tokens']} tokens of each of "
        f"{count} prompts ({plan['origin']}), drawn once from the unedited model for the guard"
    )


def _self_text(drawn: dict[str, Any]) -> str:
    """How pairs will be drawn from the model itself."""
    count, origin = f"{drawn['prompts']:,}", drawn["prompts_origin"]
    judges = "the word list" + (f" and {drawn['scorer']}" if drawn["scorer"] else "")
    return (
        f"pairs drawn from the model itself: up to {drawn['most_continuations']:,} continuations "
        f"of {count} prompts ({origin}), until {judges} find{'' if drawn['scorer'] else 's'} "
        f"{drawn['pairs']:,} pairs"
    )


def _result_data(manifest: Manifest, destination: Path) -> dict[str, Any]:
    """The gist of a manifest, as the command line prints it with --json."""
    told = progress.current()
    changes = [e.relative_change for e in manifest.edited if not e.role.endswith("_bias")]
    left = [entry.measures["leakage"] for entry in manifest.edited if "leakage" in entry.measures]
    candidates = manifest.subspace.candidates if manifest.subspace else ()
    return {
        "destination": str(destination),
        "source": manifest.source.name,
        "commit": manifest.source.commit,
        "output": manifest.run.output,
        "method": manifest.method.name,
        manifest.method.strength: manifest.choice.strength,
        "strength": manifest.choice.strength,
        "strength_name": manifest.method.strength,
        "strengths": {
            (f"{method.name}." if manifest.steps else "") + method.strength: choice.strength
            for method, choice in manifest.methods
        },
        "layers": manifest.layers,
        "pairs": manifest.pairs.count,
        "instances": manifest.instances and manifest.instances.origin.title,
        "rows_skipped": manifest.pairs.skipped,
        "factors": manifest.factors,
        "candidates": len(candidates),
        "candidates_kept": sum(c.kept for c in candidates),
        "tensors_edited": len(manifest.edited),
        "tensors_created": len(manifest.edit.created),
        "files_changed": [*manifest.edit.patches, *manifest.edit.files],
        "guard": manifest.guard,
        "choice": manifest.choice,
        "evaluation": manifest.evaluation,
        "mean_relative_change": sum(changes) / len(changes) if changes else None,
        "max_leakage": max(left, default=None),
        "bytes_written": sum(file.nbytes for file in manifest.files.values()),
        "verified": True,
        "forward": manifest.forward,
        "seconds": {name: round(value, 2) for name, value in told.seconds.items()},
        "memory_bytes": dict(told.memory),
        "peak_memory_bytes": manifest.measurements.peak_memory_bytes,
        "warnings": told.warnings,
    }


def _result_text(result: dict[str, Any]) -> str:
    """The same for people."""
    from converter.evaluation.tables import markdown

    seconds = ", ".join(f"{name} {value:.1f}" for name, value in result["seconds"].items())
    memory = ", ".join(f"{name} {n / 1e6:,.0f}" for name, n in result["memory_bytes"].items())
    kept, candidates = result["candidates_kept"], result["candidates"]
    chosen = "" if kept == candidates else f"; {kept} of {candidates} candidate directions kept"
    table = f"\n\n{markdown(result['evaluation'])}" if result["evaluation"] else ""
    return f"""\
{result["source"]} -> {result["destination"]}{_headline(result["guard"])}
  method        {result["method"]}, {_strengths(result["strengths"])}\
{_layers(result["layers"])}
{_texts(result)}{chosen}
{_changes(result)}
  written       {result["bytes_written"] / 1e6:,.1f} MB, every file verified
{_effect(result["guard"], "toxicity" if result["instances"] is None else "refusals")}
  forward pass  {_forward(result["forward"])}
  seconds       {seconds}
  peak MB       {memory}{table}"""


def _strengths(strengths: dict[str, float]) -> str:
    """What each strength is, such as ``rank 2``."""
    return ", ".join(f"{name} {value:g}" for name, value in strengths.items())


def _texts(result: dict[str, Any]) -> str:
    """What was fitted on."""
    if result["instances"] is not None:
        return f"  instances     {result['instances']}"
    skipped = sum(result["rows_skipped"].values())
    return f"  pairs         {result['pairs']} fitted on ({skipped} rows not usable)"


def _layers(layers: list[int], of: str = "layers") -> str:
    """The layers of the edited tensors, called ``of``; nothing if there are none."""
    from converter.release.card import compress

    return f", {of} {compress(layers)}" if layers else ""


def _changes(result: dict[str, Any]) -> str:
    """What was changed, and by how much."""
    from converter.release.card import factors_text

    lines = []
    if result["tensors_edited"]:
        lines.append(f"  edited        {result['tensors_edited']} tensors")
    if (change := result["mean_relative_change"]) is not None:
        lines[-1] += f", changed by {change:.2%} of their norm on average"
    if result["factors"]:
        lines.append(f"  factors       {factors_text(result['factors'], result['layers'])}")
    if (left := result["max_leakage"]) is not None:
        beside = ", beside what was to stay" if result["factors"] else ""
        lines.append(f"  left along U  at most {left:.2e} of what was there{beside}")
    if result["tensors_created"]:
        lines.append(f"  created       {result['tensors_created']} tensors")
    if result["files_changed"]:
        lines.append(f"  files         {', '.join(result['files_changed'])} changed or added")
    return "\n".join(lines)


def _forward(forward: ForwardRecord | None) -> str:
    """How the model was run, and why so."""
    return "none" if forward is None else f"{forward.mode}: {forward.reason}"


def _effect(guard: GuardRecord | None, what: str) -> str:
    """What the guard measured, of ``what`` too: before and after, with the control beside it."""
    if guard is None:
        return f"  not measured  perplexity, {what} (--no-guard)"
    edit, controls, before = guard.edit, guard.controls, guard.perplexity

    def mean(name: str) -> float:
        values: list[float] = [getattr(control, name).value for control in controls]
        return sum(values) / len(values)

    ratio, words, beside = edit.perplexity_ratio, edit.teacher_forced, ""
    if (context := edit.context_ratio) is not None:
        beside = (
            f"\n                words beside them: perplexity x {context.value:.4f} +- "
            f"{context.error:.4f}, {guard.context_tokens:,} tokens "
            f"(controls: x {mean('context_ratio'):.4f})"
        )
    return f"""\
  perplexity    {before:.2f} -> {before * ratio.value:.2f} on {guard.neutral_tokens:,} \
held-out neutral tokens: x {ratio.value:.4f} +- {ratio.error:.4f} \
(controls: x {mean("perplexity_ratio"):.4f})
  pairs' kind   toxic words x {words.value:.3f} +- {words.error:.3f} as probable, \
{guard.toxic_words} held-out words (controls: x {mean("teacher_forced"):.3f})\
{beside}{_refusals(guard)}"""


def _headline(guard: GuardRecord | None) -> str:
    """What the edit does outside the pairs' kind, or that this is not known; in nats for defence.

    Intervals are of 95 %.
    """
    if guard is None or guard.defence is not None:
        return ""
    told, words = guard.headline, guard.words
    controls = [each.teacher_forced.value for each in guard.control_words]
    control = f"(controls: x {sum(controls) / len(controls):.3f})"
    if told is None or told.words is None:
        lines = [
            f"  toxic words   {_within(words.teacher_forced)} as probable {control}, "
            "in text of the pairs' own kind only; elsewhere",
            f"                the effect is smaller and was not measured: {guard.fallback}",
        ]
    else:
        lines = [
            f"  toxic words   {_within(words.teacher_forced)} as probable {control}: "
            f"{told.toxic_words} words",
            f"                that the model said itself, after {told.toxic_prompts} of "
            f"{told.prompts} prompts that resemble no pair",
        ]
        if words.context_ratio is not None:
            beside = [c.context_ratio.value for c in told.control_words if c.context_ratio]
            lines.append(
                f"  words beside  perplexity {_within(words.context_ratio)}, "
                f"{told.context_tokens:,} other tokens there "
                f"(controls: x {sum(beside) / len(beside):.3f})"
            )
    if told is not None:
        moved = [each.value for each in told.control_divergences]
        lines.append(
            f"  KL            {told.divergence.value:.4f} +- {told.divergence.error:.4f} nats a "
            f"token on {told.ordinary_tokens:,} tokens of ordinary text "
            f"(controls: {sum(moved) / len(moved):.4f})"
        )
    return "\n" + "\n".join(lines)


def _within(estimate: Estimate) -> str:
    """A ratio and its interval of 95 %."""
    from converter.evaluation.results import around

    found = around(estimate)
    return f"x {estimate.value:.3f}" + (f" [{found.low:.3f}, {found.high:.3f}]" if found else "")


def _refusals(guard: GuardRecord) -> str:
    """What the guard measured of refusals; nothing if that is not what the edit is for."""
    if guard.defence is None:
        return ""
    edit, controls = guard.defence.edit, guard.defence.controls
    mean = sum(control.harmful.value for control in controls) / len(controls)
    share = "" if isnan(edit.over_refusal) else f": {edit.over_refusal:.0%} of that"
    return f"""
  refusals      {edit.harmful.value:+.3f} +- {edit.harmful.error:.3f} nats a token on unseen \
harmful requests (controls: {mean:+.3f}), {edit.reworded.value:+.3f} in other words
                {edit.harmless.value:+.3f} on harmless questions, {edit.touchy.value:+.3f} on \
touchy ones{share}
  learnt        {edit.learnt:+.3f} nats a token of the answers in the instances"""
