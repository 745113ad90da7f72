"""The commands of a release job: ``gloss replay`` and ``gloss diff``, and the gates' options."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from converter.cli.environment import FromEnvironment
from converter.cli.options import (
    EXIT_CODES,
    Command,
    Finite,
    plain_exit,
    print_json,
    quiet_libraries,
    refuse_settings,
    shared_options,
)
from converter.cli.terminal import reporting
from converter.errors import VerificationError
from converter.runtime.console import say
from converter.runtime.progress import Progress

if TYPE_CHECKING:
    from converter.entrypoints.replay import Replayed
    from converter.release.recording import Recording


def gate_options(command: Command) -> Command:
    """The options that make ``Gates``."""
    options = [
        click.option(
            "--min-toxicity-drop", type=Finite(0, 1), metavar="FRACTION",
            help="Gate: toxic words must lose this share of their probability at least.",
        ),
        click.option(
            "--max-leakage", type=Finite(0), metavar="SHARE",
            help="Gate: no edited tensor may keep more of what it had along the subspace.",
        ),
        click.option(
            "--max-evaluated-perplexity-ratio", type=Finite(0), metavar="RATIO",
            help="Gate: perplexity on the --text of --evaluate, after over before.",
        ),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


REFITTING = ("max_angle", "pairs", "neutral", "word_list", "activations")
"""Parameters of a replay that only a refit looks at."""

GATES = ("min_toxicity_drop", "max_leakage", "max_evaluated_perplexity_ratio")


@click.command("replay", cls=FromEnvironment, epilog=EXIT_CODES)
@click.argument("manifest", type=click.Path(exists=True, path_type=Path))
@click.argument("destination", type=click.Path(path_type=Path))
@click.option("--source", help="Where the recorded source is, if it was a local one or is a copy.")
@click.option("--refit", is_flag=True, help="Fit the subspace again, too, and compare it.")
@click.option(
    "--max-angle", default=1.0, show_default=True, type=Finite(0, 90), metavar="DEGREES",
    help="Between the subspace of --refit and the recorded one.",
)  # fmt: skip
@click.option("--pairs", help="With --refit: where the recorded file of pairs is.")
@click.option("--neutral", help="With --refit: where the recorded neutral text is.")
@click.option("--word-list", help="With --refit: where the recorded word list is.")
@click.option(
    "--activations", type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="With --refit: the activations that the recorded fit was given.",
)  # fmt: skip
@click.option("--trust-remote-code", is_flag=True, help="Execute code of the source, as recorded.")
@click.option("--overwrite", is_flag=True, help="Replace a checkpoint at DESTINATION.")
@click.option(
    "--workers", default=0, type=click.IntRange(0),
    help="Shards to edit at a time.  [default: processors, at most 4]",
)  # fmt: skip
@click.option(
    "--memory-limit", metavar="SIZE",
    help="Memory to plan with, such as 4GB.  [default: what is available]",
)  # fmt: skip
@shared_options
def replay_command(
    manifest: Path,
    destination: Path,
    refit: bool,
    max_angle: float,
    overwrite: bool,
    workers: int,
    memory_limit: str | None,
    cache_dir: Path | None,
    as_json: bool,
    quiet: bool,
    **inputs: Any,
) -> None:
    """Write the checkpoint that MANIFEST records once more, to the folder DESTINATION.

    MANIFEST is a gloss_manifest.json or a folder with one; the subspace lies beside it. The source
    is read at the recorded commit, and the weights must be byte for byte those recorded.
    """
    with plain_exit(as_json), reporting(quiet=quiet, cache_dir=cache_dir) as told:
        from converter.entrypoints.replay import replay
        from converter.release.recording import Given, read_recording
        from converter.runtime.memory import parse_size

        quiet_libraries()
        if not refit:
            refuse_settings(REFITTING, "without --refit", "add --refit")
        limit = parse_size(memory_limit)
        recording = read_recording(manifest)
        done = replay(
            recording,
            destination,
            Given(**inputs),
            refit=refit,
            max_angle=max_angle,
            overwrite=overwrite,
            workers=workers,
            memory_limit=limit,
        )
        result = replay_result(recording, done, destination, told)
        print_json(result) if as_json else say(replay_text(result))


def replay_result(
    recording: "Recording", done: "Replayed", destination: Path, told: Progress
) -> dict[str, Any]:
    """What a replay found, as printed with --json."""
    return {
        "destination": str(destination),
        "manifest": recording.path.name,
        "replay_of": recording.sha256,
        "source": done.manifest["source"]["name"],
        "commit": done.manifest["source"]["commit"],
        "identical": True,
        "files_compared": done.identical,
        "other_files": done.other,
        "differences": done.differences,
        "angles": done.angles,
        "tensors_edited": len(done.manifest["edited"]),
        "verified": True,
        "seconds": {name: round(value, 2) for name, value in told.seconds.items()},
        "warnings": told.warnings,
    }


def replay_text(result: dict[str, Any]) -> str:
    """The same for people."""
    commit = f" at {result['commit'][:12]}" if result["commit"] else ""
    differs = ", ".join(d["what"] for d in result["differences"])
    lines = [
        f"{result['manifest']} -> {result['destination']}",
        f"  source        {result['source']}{commit}, every file as recorded",
        f"  environment   {'not as recorded: ' + differs if differs else 'as recorded'}",
        f"  edited        {result['tensors_edited']} tensors",
        f"  written       {result['files_compared']} files, byte for byte as recorded, verified",
    ]
    if result["other_files"]:
        lines.append(f"  other bytes   {', '.join(result['other_files'])}")
    for name, angles in (result["angles"] or {}).items():
        lines.append(f"  refitted {name:<4} at most {angles[-1]:.4f} degrees from the recorded one")
    return "\n".join(lines)


@click.command("diff", cls=FromEnvironment, epilog=EXIT_CODES)
@click.argument("a")
@click.argument("b")
@click.option(
    "--subspace", type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Bases to compare changes with.  [default: the gloss_subspace.safetensors of B, or of A]",
)  # fmt: skip
@click.option("--exit-code", is_flag=True, help="Exit with 8 if they differ.")
@shared_options
def diff_command(
    a: str,
    b: str,
    subspace: Path | None,
    exit_code: bool,
    cache_dir: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Print what differs between the checkpoints A and B, or between two manifests.

    A and B are anything that can be converted, or two files of JSON. Of each tensor that differs:
    the norm of the change over that of A's tensor, the rank of the part that rounding does not
    explain, and the share of the change's squared norm in the span of a subspace.
    """
    with plain_exit(as_json), reporting(quiet=quiet, cache_dir=cache_dir):
        from converter.cli.diff_text import diff_text
        from converter.entrypoints.diff import diff

        quiet_libraries()
        found = diff(a, b, subspace)
        print_json(found) if as_json else say(diff_text(found))
        if exit_code and not found["equal"]:
            sys.exit(VerificationError.exit_code)
