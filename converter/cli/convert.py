"""The commands ``gloss-convert``, which is ``gloss convert``, and ``gloss plan``."""

from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from converter.cli.command import Answer, command, quiet_libraries, refuse_typed
from converter.cli.fields import Part
from converter.cli.recipe_options import RecipePart
from converter.evaluation.gates import Gates
from converter.evaluation.options import EvaluationOptions
from converter.hub.publication import Publication, PublicationOptions
from converter.option import Option, Options, declared_options
from converter.recipe import Recipe, Settings
from converter.runtime import progress

if TYPE_CHECKING:
    from converter.entrypoints.push import Published

Overwrite = Annotated[bool, Option("Replace the checkpoint or adapter at DESTINATION.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeliveryOptions(Options):
    """What becomes of the result."""

    # fmt: off
    destination: Annotated[Path, Option(
        "Folder for the result, which does not exist or is empty.", flag="DESTINATION",
    )]
    overwrite: Overwrite = False
    evaluate: Annotated[bool, Option(
        "Measure more than the guard does, before anything is written; see gloss evaluate.",
    )] = False
    controls: Annotated[str, Option(
        "Methods that --evaluate fits and measures beside the edit.",
        flag="--control", metavar="NAMES", example="random,profs",
    )] = "random"
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


def refuse_unused(recipe: Recipe, asked: DeliveryOptions | None = None) -> None:
    """Raise OptionError if an option was typed that has no effect beside others."""
    from converter.outputs.base import output_of

    where = f"with --output {recipe.output}"
    refuse_typed(output_of(recipe.output).unused, where, "leave it out")
    if asked and asked.push_to_hub is None:
        names = (*declared_options(PublicationOptions), "stream_to_hub")
        refuse_typed(names, "without --push-to-hub REPO", "add --push-to-hub REPO")
    if asked and not asked.evaluate:
        names = (*declared_options(EvaluationOptions), "controls")
        refuse_typed(names, "without --evaluate", "add --evaluate")


@command(
    "convert",
    recipe=RecipePart(),
    asked=Part(DeliveryOptions),
    settings=Part(Settings),
    gates=Part(Gates),
    evaluation=Part(EvaluationOptions),
    publication=Part(PublicationOptions),
)
def convert_command(
    recipe: Recipe,
    asked: DeliveryOptions,
    settings: Settings,
    gates: Gates,
    evaluation: EvaluationOptions,
    publication: PublicationOptions,
) -> Answer:
    """Write a less toxic copy of the model SOURCE, or an adapter, to the folder DESTINATION.

    SOURCE is a folder with a checkpoint (safetensors, pytorch_model.bin, or Meta's
    consolidated.*.pth), a .gguf file, a Hub repo id with an optional @revision, or the word demo,
    which is SmolLM2-135M-Instruct. A --recipe may name it instead.
    """
    from converter.cli.summary_text import plan_text, result_of, result_text
    from converter.entrypoints.delivery import Delivery, no_pictures
    from converter.entrypoints.evaluate import evaluation_of
    from converter.entrypoints.pictures import check_plots, draw
    from converter.entrypoints.plan import describe_plan
    from converter.entrypoints.push import push
    from converter.entrypoints.resume import convert_once
    from converter.entrypoints.stream_push import Streaming
    from converter.hub.publishing import check_rights
    from converter.release.signing import load_signer

    quiet_libraries()
    refuse_unused(recipe, asked)
    words = recipe.guard or (asked.evaluate and evaluation.draws_passages)
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
        pictures=partial(draw, place=inside) if inside else no_pictures,
        signer=signer,
        stream=stream,
    )
    if asked.dry_run:
        plan = describe_plan(recipe, asked.destination, settings, delivery)
        return Answer(plan, plan_text(plan))
    if asked.evaluate:
        measures = evaluation_of(evaluation, asked.controls, recipe)
        delivery = replace(delivery, evaluation=measures)
    manifest = convert_once(recipe, asked.destination, settings, delivery, inside)
    if asked.plots is not None and not inside:
        draw(manifest, asked.destination, asked.plots.absolute())
    published = stream.published if stream else None
    if repo and not stream:
        published = push(asked.destination, repo, recipe.trust_remote_code, verified=True)
    if signer:
        progress.note(f"  signed by the key whose public half has sha256 {signer.fingerprint}")
    result = result_of(manifest, asked.destination, progress.current())
    result["published"] = published.record() if published else None
    return Answer(result, result_text(result) + published_text(published))


@command("plan", recipe=RecipePart(), settings=Part(Settings, only=("memory_limit",)))
def plan_command(recipe: Recipe, settings: Settings) -> Answer:
    """Print what a conversion of SOURCE would do, from its headers alone."""
    from converter.cli.summary_text import plan_text
    from converter.entrypoints.plan import describe_plan

    quiet_libraries()
    refuse_unused(recipe)
    plan = describe_plan(recipe, settings=settings)
    return Answer(plan, plan_text(plan))
