"""The commands: options become a ``Run``, and what they find is printed."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import click

from converter import __version__
from converter.cli.environment import FromEnvironment
from converter.cli.evaluate import (
    SETTINGS,
    draw,
    evaluate_command,
    evaluation_of,
    evaluation_options,
    inside,
    need_matplotlib,
)
from converter.cli.options import (
    EXIT_CODES,
    make_run,
    output_option,
    plain_exit,
    print_json,
    quiet_libraries,
    refuse_settings,
    refuse_unused,
    run_options,
)
from converter.cli.push import DETAILS, Publishing, hub_options, published_text, push_command
from converter.cli.release import GATES, diff_command, gate_options, replay_command
from converter.cli.terminal import reporting
from converter.errors import VerificationError
from converter.runtime import progress
from converter.runtime.console import say
from converter.text.sanitize import shown


@click.command("convert", cls=FromEnvironment, epilog=EXIT_CODES)
@run_options
@output_option
@click.argument("destination", type=click.Path(path_type=Path))
@click.option("--overwrite", is_flag=True, help="Replace a checkpoint at DESTINATION.")
@click.option(
    "--keep-source/--no-keep-source",
    default=True,
    show_default=True,
    help="Keep what is fetched from the Hub, or delete each shard once it is edited.",
)
@click.option(
    "--workers",
    default=0,
    type=click.IntRange(0),
    help="Shards to edit at a time.  [default: processors, at most 4]",
)
@click.option(
    "--evaluate", is_flag=True, help="Measure more than the guard does; see gloss evaluate."
)
@evaluation_options
@gate_options
@click.option(
    "--control",
    "controls",
    default="random",
    show_default=True,
    metavar="NAMES",
    help="Methods that --evaluate fits and measures beside.",
)
@click.option(
    "--plots",
    type=click.Path(file_okay=False, path_type=Path),
    help="A folder for pictures; the card shows those inside DESTINATION.",
)
@click.option(
    "--sign",
    "key",
    type=click.Path(path_type=Path),
    metavar="KEY",
    help="A private key in PEM to sign with; its password is in GLOSS_SIGN_PASSWORD.",
)
@hub_options
@click.option("--dry-run", is_flag=True, help="Print the plan from the headers; touch nothing.")
@click.version_option(__version__, prog_name="gloss-convert")
def convert_command(
    source: str,
    destination: Path,
    options: tuple[str, ...],
    cache_dir: Path | None,
    memory_limit: str | None,
    as_json: bool,
    quiet: bool,
    overwrite: bool,
    keep_source: bool,
    workers: int,
    dry_run: bool,
    evaluate: bool,
    controls: str,
    passages: int,
    plots: Path | None,
    key: Path | None,
    push_to_hub: str | None,
    stream_to_hub: bool,
    **fields: Any,
) -> None:
    """Write a less toxic copy of the model SOURCE, or an adapter, to the folder DESTINATION.

    SOURCE is a folder with a checkpoint (safetensors, pytorch_model.bin, or Meta's
    consolidated.*.pth), a .gguf file, a Hub repo id with an optional @revision, or the word demo,
    which is SmolLM2-135M-Instruct.
    """
    with plain_exit(as_json), reporting(quiet=quiet, cache_dir=cache_dir) as told:
        from converter.cli.summary_text import plan_text, result_of, result_text
        from converter.entrypoints.convert import convert, no_pictures
        from converter.entrypoints.plan import describe_plan
        from converter.entrypoints.resume import done_before, settle
        from converter.evaluate.gates import Gates
        from converter.models.resident import choose_device
        from converter.outputs.destination import check_folder
        from converter.release.signing import load_signer
        from converter.runtime.memory import parse_size

        quiet_libraries()
        if plots is not None:
            need_matplotlib()
        asked = {name: fields.pop(name) for name in SETTINGS}
        gates = Gates(**{name: fields.pop(name) for name in GATES})
        details = {name: fields.pop(name) for name in DETAILS}
        run, limit = make_run(source, options, fields), parse_size(memory_limit)
        refuse_unused(run)
        drawn = evaluate and asked["prompts"] != "none" and passages > 0
        gates.need(words=run.guard or drawn, ratio=evaluate and asked["text"] is not None)
        signer = load_signer(key) if key else None
        place = plots and inside(plots, destination)
        if plots is not None and not place:
            check_folder(plots)
        pictures = partial(draw, place=place) if place else no_pictures
        publishing = Publishing(push_to_hub, stream_to_hub, details)
        how: dict[str, Any] = {
            "overwrite": overwrite, "keep_source": keep_source, "workers": workers,
            "signer": signer, "memory_limit": limit, "stream": publishing.stream,
        }  # fmt: skip
        if not evaluate:
            refuse_settings(
                (*SETTINGS, "controls", "passages"), "without --evaluate", "add --evaluate"
            )
        if dry_run:
            plan = describe_plan(run, destination=destination, **how)
            print_json(plan) if as_json else say(plan_text(plan))
            return
        evaluation = None
        if evaluate:
            device = choose_device(run.device)
            evaluation = evaluation_of(asked, controls, passages, device, run.seed)
        before = None
        if publishing.may_be_done and not overwrite and not evaluate:
            before = done_before(run, destination, bool(signer), gates, place or None)
        if before:
            settle(run, destination, before, signer)
        manifest = before or convert(
            run,
            destination,
            evaluation=evaluation,
            gates=gates,
            pictures=pictures,
            **how,
        )
        if plots is not None and not place:
            draw(manifest, destination, plots.absolute())
        published = publishing.finish(destination, run.trust_remote_code)
        if signer:
            progress.note(f"  signed by the key whose public half has sha256 {signer.fingerprint}")
        result = result_of(manifest, destination, told)
        result["published"] = published.record() if published else None
        text = result_text(result) + published_text(published)
        print_json(result) if as_json else say(text)


@click.command("plan", cls=FromEnvironment, epilog=EXIT_CODES)
@run_options
@output_option
def plan_command(
    source: str,
    options: tuple[str, ...],
    cache_dir: Path | None,
    memory_limit: str | None,
    as_json: bool,
    quiet: bool,
    **fields: Any,
) -> None:
    """Print what a conversion of SOURCE would do, from its headers alone."""
    with plain_exit(as_json), reporting(quiet=quiet, cache_dir=cache_dir):
        from converter.cli.summary_text import plan_text
        from converter.entrypoints.plan import describe_plan
        from converter.runtime.memory import parse_size

        quiet_libraries()
        run, limit = make_run(source, options, fields), parse_size(memory_limit)
        refuse_unused(run)
        plan = describe_plan(run, memory_limit=limit)
        print_json(plan) if as_json else say(plan_text(plan))


@click.command("verify", cls=FromEnvironment, epilog=EXIT_CODES)
@click.argument("destination", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--source", help="What it was made from, as it was given to gloss-convert.")
@click.option("--subfolder", default="", help="Of --source, that the checkpoint is in.")
@click.option(
    "--key",
    type=click.Path(path_type=Path),
    help="The public key in PEM of who should have signed it.",
)
@click.option("--trust-remote-code", is_flag=True, help="Execute code of the checkpoint.")
@click.option(
    "--cache-dir", type=click.Path(file_okay=False, path_type=Path), help="Kept between runs."
)
@click.option("--json", "as_json", is_flag=True, help="Print results as JSON.")
@click.option("--quiet", is_flag=True, help="No progress, only results.")
def verify_command(
    destination: Path,
    source: str | None,
    subfolder: str,
    key: Path | None,
    trust_remote_code: bool,
    cache_dir: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Check that DESTINATION, checkpoint or adapter, is byte for byte what its manifest says."""
    with plain_exit(as_json), reporting(quiet=quiet, cache_dir=cache_dir):
        from converter.checkpoints.names import SIGNATURE
        from converter.checkpoints.resolve import resolve
        from converter.entrypoints.verify import verify
        from converter.release.signing import load_public_key

        quiet_libraries()
        public = load_public_key(key) if key else None
        original = resolve(source, subfolder) if source else None
        if original:
            original.fetch()
        unsigned = public.check(destination) if public else []
        trust = trust_remote_code and not unsigned  # what its owner did not sign is not run
        problems = [*verify(destination, original, trust), *unsigned]
        if not public and (destination / SIGNATURE).exists():
            progress.note(
                f"{SIGNATURE} was not checked; give --key with the public key of its owner"
            )
        if as_json:
            checked = {"destination": str(destination), "source": source}
            if public:
                checked["key_sha256"] = public.fingerprint
            print_json({"verified": not problems, "problems": problems, **checked})
        for problem in problems:
            say(f"error: {shown(problem)}", err=True)
        if problems:
            sys.exit(VerificationError.exit_code)
        if not as_json:
            against = " and against its source" if source else ""
            say(f"{destination}: verified against its manifest{against}")
            if public:
                say(f"signed by the key with sha256 {public.fingerprint}")


@click.command("architectures", cls=FromEnvironment)
def architectures_command() -> None:
    """Print which models are supported, as a Markdown table."""
    from converter.checkpoints.architectures.architecture import architecture_table

    say(architecture_table())


@click.group()
@click.version_option(__version__, prog_name="gloss")
def gloss() -> None:
    """Make language models less toxic by editing their checkpoints."""


gloss.add_command(convert_command)
gloss.add_command(plan_command)
gloss.add_command(verify_command)
gloss.add_command(push_command)
gloss.add_command(replay_command)
gloss.add_command(diff_command)
gloss.add_command(evaluate_command)
gloss.add_command(architectures_command)
