"""The command ``gloss replay``."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from converter.cli.command import Answer, command, quiet_libraries, refuse_typed
from converter.cli.convert import Overwrite
from converter.cli.fields import Part
from converter.option import Option, Options
from converter.recipe import Settings
from converter.release.local_inputs import LocalInputs
from converter.runtime import progress
from converter.runtime.progress import Progress

if TYPE_CHECKING:
    from converter.entrypoints.replay import Replayed
    from converter.release.recording import Recording

REFITTING = ("max_angle", "pairs", "neutral", "word_list", "activations")
"""Options of a replay that only a refit looks at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayOptions(Options):
    """What is replayed, and where to."""

    # fmt: off
    manifest: Annotated[Path, Option(
        "A gloss_manifest.json or a folder with one; the subspace lies beside it.",
        flag="MANIFEST", exists=True,
    )]
    destination: Annotated[Path, Option(
        "Folder for the result, which does not exist or is empty.", flag="DESTINATION",
    )]
    refit: Annotated[bool, Option("Fit the subspace again, too, and compare it.")] = False
    max_angle: Annotated[float, Option(
        "Largest angle between the subspace of --refit and the recorded one. Other batch sizes, "
        "threads and devices add in another order; the same machine gives the same subspace.",
        metavar="DEGREES", example="0.1", least=0, most=90,
    )] = 1.0
    overwrite: Overwrite = False
    # fmt: on


@command(
    "replay",
    asked=Part(ReplayOptions),
    inputs=Part(LocalInputs),
    settings=Part(Settings, without=("keep_source",)),
)
def replay_command(asked: ReplayOptions, inputs: LocalInputs, settings: Settings) -> Answer:
    """Write the checkpoint that MANIFEST records once more, to the folder DESTINATION.

    MANIFEST is a gloss_manifest.json or a folder with one; the subspace lies beside it. The source
    is read at the recorded commit, and the weights must be byte for byte those recorded.
    """
    from converter.entrypoints.replay import replay
    from converter.release.recording import read_recording

    quiet_libraries()
    if not asked.refit:
        refuse_typed(REFITTING, "without --refit", "add --refit")
    recording = read_recording(asked.manifest)
    done = replay(
        recording,
        asked.destination,
        inputs,
        settings,
        max_angle=asked.max_angle if asked.refit else None,
        overwrite=asked.overwrite,
    )
    result = replay_result(recording, done, asked.destination, progress.current())
    return Answer(result, replay_text(result))


def replay_result(
    recording: "Recording", done: "Replayed", destination: Path, told: Progress
) -> dict[str, Any]:
    """What a replay found, as printed with --json."""
    return {
        "destination": str(destination),
        "manifest": recording.path.name,
        "replay_of": recording.sha256,
        "source": done.manifest.source.name,
        "commit": done.manifest.source.commit,
        "identical": True,
        "files_compared": done.identical,
        "other_files": done.other,
        "differences": done.differences,
        "angles": done.angles,
        "tensors_edited": len(done.manifest.edited),
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
