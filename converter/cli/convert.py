"""The commands ``gloss-convert``, which is ``gloss convert``, and ``gloss plan``."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from converter.cli.command import Answer, command, quiet_libraries, refuse_typed
from converter.cli.fields import Part
from converter.cli.recipe import RecipePart
from converter.cli.summary import forward_text, layers_text, result_data, result_text
from converter.errors import DestinationError, Faults, OptionError
from converter.evaluation.gates import Gates
from converter.evaluation.options import EvaluationOptions, SearchOptions
from converter.hub.store_addresses import is_store, store_address
from converter.option import Option, Options, declared_options
from converter.recipe import CLUSTER, Publication, PublicationOptions, Recipe, Settings
from converter.runtime import progress
from converter.runtime.cache import outgoing
from converter.text import few

if TYPE_CHECKING:
    from converter.entrypoints.delivery import Delivery
    from converter.entrypoints.upload import Published

Destination = Annotated[
    Path, Option("Folder for the result, which does not exist or is empty.", flag="DESTINATION")
]
Overwrite = Annotated[bool, Option("Replace the checkpoint or adapter at DESTINATION.")]


_LOCAL = ("overwrite", "push_to_hub", "stream_to_hub")
"""Options for a DESTINATION that is a folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _DeliveryOptions(Options):
    """Options for the result."""

    # fmt: off
    destination: Annotated[str, Option(
        "Folder for the result, which does not exist or is empty; or the address of an empty "
        "prefix in an object store.",
        flag="DESTINATION", example="s3://bucket/prefix", place=True,
    )]
    overwrite: Overwrite = False
    evaluate: Annotated[bool, Option(
        "Evaluate the edit beyond the guard, before anything is written; see gloss evaluate.",
    )] = False
    systems: Annotated[tuple[str, ...], Option(
        "System that --evaluate measures beside the edit; see gloss evaluate.",
        flag="--system", metavar="NAME", example="profs",
    )] = ("random",)
    search: Annotated[int | None, Option(
        "Number of trials of a search for the options of the method; see gloss search. Typed "
        "options are not searched.",
        by_default="no search", metavar="N", example="60", least=1,
    )] = None
    plots: Annotated[Path | None, Option(
        "Folder for pictures. Inside DESTINATION they belong to the result, and its card shows "
        "them.",
        example="./out/pictures", path="folder",
    )] = None
    report: Annotated[Path | None, Option(
        "File for a report for people, outside of DESTINATION; see gloss report.",
        example="report.html", path="file",
    )] = None
    key: Annotated[Path | None, Option(
        "Private key in PEM to sign with; its password is in GLOSS_SIGN_PASSWORD.",
        flag="--sign", metavar="KEY", example="key.pem",
    )] = None
    push_to_hub: Annotated[str | None, Option(
        "Hub repo to publish the result to; see gloss push.",
        metavar="REPO", example="someone/SmolLM2-detox",
    )] = None
    stream_to_hub: Annotated[bool, Option(
        "With --push-to-hub: upload each shard once it is finished, and delete it here.",
    )] = False
    dry_run: Annotated[bool, Option(
        "Check options, free space and rights, print the plan from the headers, and stop.",
    )] = False
    # fmt: on

    @property
    def store(self) -> str | None:
        """The address that the result is uploaded to, if DESTINATION is one.

        Raises OptionError: it is another address.
        """
        if is_store(self.destination):
            return store_address(self.destination)
        if "://" in self.destination:
            raise OptionError(
                "DESTINATION", expected="a folder, or an address such as s3://bucket/prefix",
                found=self.destination,
            )  # fmt: skip
        return None

    @property
    def folder(self) -> Path:
        """The folder that the result is written to: DESTINATION, or one in the cache."""
        return outgoing(self.store) if self.store else Path(self.destination)


def published_text(published: "Published | None") -> str:
    """A line of the summary."""
    return f"\n  published     {published.pull_request or published.url}" if published else ""


def _look_at_unused(recipe: Recipe, faults: Faults, asked: _DeliveryOptions | None = None) -> None:
    """Collect typed options that have no effect beside others."""
    from converter.methods.known import SEPARATOR, described
    from converter.outputs.known import UNUSED

    known = [described().get(name) for name in recipe.method.split(SEPARATOR)]
    if all(each and each.aim != "defence" for each in known):
        with faults:
            refuse_typed(("instances",), f"with --method {recipe.method}", "leave it out")
    with faults:
        unused = UNUSED.get(recipe.output, ())
        refuse_typed(unused, f"with --output {recipe.output}", "leave it out")
    if asked is None:
        return
    with faults:
        if asked.push_to_hub is None:
            names = (*declared_options(PublicationOptions), "stream_to_hub")
            refuse_typed(names, "without --push-to-hub REPO", "add --push-to-hub REPO")
    with faults:
        if not asked.evaluate and not recipe.guard and recipe.prompts != "none":
            where = "with --no-guard and without --evaluate"
            refuse_typed(("prompts",), where, "add --evaluate")
    with faults:
        if not asked.evaluate:
            names = (*declared_options(EvaluationOptions), "systems")
            refuse_typed(names, "without --evaluate", "add --evaluate")
    with faults:
        if not asked.search:
            refuse_typed(("search_prompts",), "without --search", "add --search N")


def _refuse_unused(recipe: Recipe) -> None:
    """Raise OptionError for options without effect with the method or output of a package."""
    from converter.methods.base import aim_of
    from converter.methods.known import METHODS, SEPARATOR
    from converter.outputs.base import output_of

    kinds = map(METHODS.load, recipe.method.split(SEPARATOR))
    if not any(aim_of(kind) == "defence" for kind in kinds):
        refuse_typed(("instances",), f"with --method {recipe.method}", "leave it out")
    unused = output_of(recipe.output).unused
    refuse_typed(unused, f"with --output {recipe.output}", "leave it out")


def _look(
    *,
    recipe: Recipe,
    asked: _DeliveryOptions,
    settings: Settings,
    gates: Gates,
    evaluation: EvaluationOptions,
    publication: PublicationOptions,
    searching: SearchOptions,
    faults: Faults,
) -> None:
    """Find all mistakes in the request before torch is loaded."""
    from converter.entrypoints import first_look
    from converter.evaluation.comparison import Comparison, parse_systems
    from converter.outputs.destination import check_beside

    typed = own = recipe
    if asked.search:
        typed = own = first_look.look_at_search("--search", recipe, searching, faults)
    if asked.evaluate:
        with faults:
            compared = Comparison(parse_systems(asked.systems), [recipe.seed])
            own = replace(typed, options=compared.typed(typed.method, typed))
            first_look.look_at_systems(compared, typed, faults)
        first_look.look_at_evaluation(evaluation, recipe.prompts, faults)
    asks = asked.push_to_hub is None  # the rights to write come before a source that is there
    first_look.look_at_recipe(own, settings, faults, asks_hub=asks)
    _look_at_unused(typed, faults, asked)
    with faults:
        if asked.search and asked.evaluate and recipe.options and typed.method != recipe.method:
            raise OptionError(
                "--evaluate", expected="a single --method, where --search has -o beside it",
                found=recipe.method, hint="use gloss evaluate on the result",
            )  # fmt: skip
    if asked.store:
        with faults:
            refuse_typed(_LOCAL, f"with the address {asked.store} as DESTINATION", "leave it out")
        with faults:
            if f"{asked.store}/".startswith(f"{recipe.source.rstrip('/')}/"):
                raise DestinationError(
                    f"destination {asked.store} is the source or lies inside it",
                    hint="choose another prefix",
                )
        first_look.look_at_store(asked.store, asked.folder, faults)
    first_look.look_at_destination(recipe, asked.folder, asked.overwrite, faults)
    first_look.look_at_plots(asked.plots, asked.folder, faults)
    if asked.report is not None:
        with faults:
            check_beside("--report", asked.report, asked.folder)
    first_look.look_at_key(asked.key, faults)
    with faults:
        gates.require_measurements(
            words=recipe.guard or _draws(recipe, asked, evaluation),
            ratio=asked.evaluate and evaluation.text is not None,
        )
    if asked.push_to_hub is not None:
        from converter.hub.publishing import check_named

        with faults:
            check_named(_publication(asked, publication), "--push-to-hub")


def _publication(asked: _DeliveryOptions, how: PublicationOptions) -> Publication:
    return Publication(repo_id=str(asked.push_to_hub), **asdict(how))


def _draws(recipe: Recipe, asked: _DeliveryOptions, evaluation: EvaluationOptions) -> bool:
    """Whether --evaluate draws continuations."""
    return asked.evaluate and recipe.prompts != "none" and evaluation.passages > 0


@command(
    "convert",
    recipe=RecipePart(),
    asked=Part(_DeliveryOptions),
    settings=Part(Settings),
    gates=Part(Gates),
    evaluation=Part(EvaluationOptions),
    publication=Part(PublicationOptions),
    searching=Part(SearchOptions, without=("trials",)),
    look=_look,
    examples=(
        "gloss-convert demo ./out",
        "gloss-convert HuggingFaceTB/SmolLM2-360M ./out --pairs s-nlp/paradetox --num-pairs 1000",
        "gloss-convert SOURCE ./out --method profs -o rank=4 -o layers=10-24",
        "gloss-convert SOURCE ./out --output adapter --push-to-hub someone/detox",
        "gloss-convert SOURCE ./out --search 60",
        "gloss-convert SOURCE ./out --like ./before --seed 1",
        "gloss-convert SOURCE ./out --dry-run",
    ),
)
def convert_command(
    recipe: Recipe,
    asked: _DeliveryOptions,
    settings: Settings,
    gates: Gates,
    evaluation: EvaluationOptions,
    publication: PublicationOptions,
    searching: SearchOptions,
) -> Answer:
    """Write a less toxic copy of the model SOURCE, or an adapter, to the folder DESTINATION.

    SOURCE is a folder with a checkpoint (safetensors, pytorch_model.bin, or Meta's or Mistral's
    consolidated.*), a .gguf file, a Hub repo id with an optional @revision, the address of a
    prefix in an object store, or the word demo, which is SmolLM2-135M-Instruct. A --recipe may
    name it instead. DESTINATION may be such an address, too.
    """
    repo = stream = None
    if asked.push_to_hub is not None:  # the Hub is asked before torch is loaded
        from converter.hub.publishing import check_rights

        repo = check_rights(_publication(asked, publication), "--push-to-hub")
    from converter.entrypoints.delivery import Delivery, check_plots, draw
    from converter.entrypoints.evaluate import evaluation_of, own_recipe
    from converter.entrypoints.plan import describe_plan
    from converter.entrypoints.push import Streaming, push, put_and_drop
    from converter.entrypoints.report import report
    from converter.entrypoints.resume import convert_once
    from converter.release.signing import load_signer

    quiet_libraries()
    if not asked.search:
        _refuse_unused(recipe)
    signer = load_signer(asked.key) if asked.key else None
    inside = check_plots(asked.plots, asked.folder)
    if repo and asked.stream_to_hub:
        stream = Streaming(repo)
    delivery = Delivery(
        overwrite=asked.overwrite,
        scratch=asked.store is not None,
        gates=gates,
        pictures=partial(draw, place=inside) if inside else None,
        signer=signer,
        stream=stream,
    )
    typed = recipe
    if asked.evaluate:
        recipe = own_recipe(typed, asked.systems)
    if asked.search:
        recipe, delivery = _searched(recipe, asked, settings, delivery, searching)
    if asked.dry_run:
        plan = describe_plan(recipe, asked.folder, settings, delivery)
        return Answer(plan, _plan_text(plan))
    if asked.evaluate:
        measures = evaluation_of(evaluation, asked.systems, typed, settings)
        delivery = replace(delivery, evaluation=measures)
    with _told_of_cache(asked.store):
        manifest = convert_once(recipe, asked.folder, settings, delivery, inside)
    if asked.plots is not None and not inside:
        draw(manifest, asked.folder, asked.plots.absolute())
    if asked.report is not None:
        report(asked.folder, asked.report, "--report")
    published = stream.published if stream else None
    if repo and not stream:
        published = push(asked.folder, repo, recipe.trust_remote_code, verified=True)
    if signer:
        progress.note(f"  signed by the key whose public half has sha256 {signer.fingerprint}")
    if asked.store:
        put_and_drop(asked.folder, asked.store, recipe.trust_remote_code)
    result = result_data(manifest, asked.destination)
    result["published"] = asdict(published) if published else None
    return Answer(result, result_text(result, published_text(published)))


@contextmanager
def _told_of_cache(store: str | None) -> Iterator[None]:
    """An error about the folder of a result for a store says how to choose another one."""
    try:
        yield
    except DestinationError as error:
        if store:
            made = f"the result for {store} is made in the cache, which --cache-dir chooses"
            error.hint = "; ".join(filter(None, [error.hint, made]))
        raise


def _searched(
    recipe: Recipe,
    asked: _DeliveryOptions,
    settings: Settings,
    delivery: "Delivery",
    searching: SearchOptions,
) -> "tuple[Recipe, Delivery]":
    """The result of a search, after all checks that are possible before it. With --dry-run, only
    these checks, and the recipe of the first method.
    """
    from converter.entrypoints.convert import prepare_to_write
    from converter.entrypoints.resume import made_before
    from converter.entrypoints.search import check_search, search_recipe
    from converter.evaluation.searchable import each_method

    first, *others = each_method(recipe)
    for each in (first, *others):
        _refuse_unused(each)
    check_search(recipe, settings)
    place = None if made_before(asked.folder) else asked.folder  # maybe it is the result
    prepare_to_write(first, place, settings, delivery)
    if asked.dry_run:
        return first, delivery
    assert asked.search is not None
    found = search_recipe(recipe, replace(searching, trials=asked.search), settings)
    progress.note(f"  chosen: {found.command}")
    return found.recipe, replace(delivery, search=found.record)


@dataclass(frozen=True, slots=True, kw_only=True)
class _PlanOptions(Options):
    """What is found out beyond the headers."""

    # fmt: off
    time: Annotated[bool, Option(
        "Load the model, measure passes of a few texts, and print how long the conversion will "
        "take.",
    )] = False
    # fmt: on


def _look_at_plan(
    *, recipe: Recipe, asked: _PlanOptions, settings: Settings, faults: Faults
) -> None:
    """Find the faults in the arguments of ``gloss plan`` before torch is loaded."""
    from converter.entrypoints import first_look

    first_look.look_at_recipe(recipe, settings, faults)
    _look_at_unused(recipe, faults)


@command(
    "plan",
    recipe=RecipePart(),
    asked=Part(_PlanOptions),
    settings=Part(Settings, without=("workers", *CLUSTER, "attention", "keep_source")),
    look=_look_at_plan,
    examples=(
        "gloss plan demo",
        "gloss plan demo --time",
        "gloss plan HuggingFaceTB/SmolLM2-360M --method destein+gloss",
    ),
)
def plan_command(recipe: Recipe, asked: _PlanOptions, settings: Settings) -> Answer:
    """Print what a conversion of SOURCE would do, from its headers alone unless --time is given."""
    from converter.entrypoints.plan import describe_plan

    quiet_libraries()
    _refuse_unused(recipe)
    plan = describe_plan(recipe, settings=settings, time=asked.time)
    return Answer(plan, _plan_text(plan))


def _plan_text(plan: dict[str, Any]) -> str:
    """The result of ``describe_plan`` for people."""
    from converter.entrypoints.estimate import time_text

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
        f"method {plan['method']['name']}, {', '.join(chosen)}"
        f"{layers_text(plan['edited_layers'], of)}",
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
        f"forward pass {forward_text(plan['forward'])}",
        _continued(plan["continuations"]),
        *([_self_text(plan["self"])] if plan["self"] else []),
        f"peak memory about {peak['total'] / 1e6:,.0f} MB: {peak['process'] / 1e6:,.0f} MB of the "
        f"program itself, beside {peak['forward'] / 1e6:,.0f} MB for the forward pass "
        f"({peak['weights'] / 1e6:,.0f} MB of weights) or {peak['edit'] / 1e6:,.0f} MB for the "
        f"edit; device {plan['device']}",
        *([time_text(plan["time"])] if plan["time"] else []),
    ]
    return "\n".join(lines)


def _continued(plan: dict[str, Any]) -> str:
    """The continuations that the unedited model will write."""
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
