"""The commands on finished conversions: ``gloss verify``, ``push`` and ``replay``."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from converter.cli.command import Answer, Console, command, quiet_libraries, refuse_typed
from converter.cli.convert import Destination, Overwrite, published_text
from converter.cli.fields import Part
from converter.cli.terminal import echo
from converter.errors import Faults, OptionError, VerificationError
from converter.hub.store_addresses import is_store, store_address
from converter.option import Option, Options, declared_options
from converter.recipe import (
    CLUSTER,
    LocalInputs,
    Publication,
    PublicationOptions,
    Recipe,
    Settings,
    Subfolder,
    TrustRemoteCode,
)
from converter.runtime import progress
from converter.text import one_line

if TYPE_CHECKING:
    from converter.entrypoints.replay import Replayed
    from converter.release.recording import Recording

_REFITTING = (
    "max_angle",
    "pairs",
    "self_prompts",
    "instances",
    "neutral",
    "word_list",
    "prompts",
    "activations",
)
"""Options of a replay that only a refit uses."""

_Folder = Annotated[
    Path,
    Option("Folder with a checkpoint or adapter.", flag="DESTINATION", path="folder", exists=True),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class _VerifyOptions(Options):
    """The folder to verify, and the references."""

    # fmt: off
    destination: _Folder
    source: Annotated[str | None, Option(
        "Model that it was made from, as it was given to gloss-convert.",
        example="demo", place=True,
    )] = None
    subfolder: Subfolder = ""
    key: Annotated[Path | None, Option(
        "Public key in PEM of the expected signer.", example="public.pem",
    )] = None
    trust_remote_code: TrustRemoteCode = False
    # fmt: on


def _look_at_verify(*, asked: _VerifyOptions, faults: Faults) -> None:
    """Find the faults in the arguments of ``gloss verify`` before torch is loaded."""
    from converter.entrypoints import first_look

    first_look.look_at_public_key(asked.key, faults)
    if asked.source is not None:
        recipe = Recipe(
            source=asked.source, subfolder=asked.subfolder,
            trust_remote_code=asked.trust_remote_code,
        )  # fmt: skip
        first_look.look_at_source(recipe, faults)


@command(
    "verify",
    asked=Part(_VerifyOptions),
    console=Part(Console),
    look=_look_at_verify,
    examples=("gloss verify ./out", "gloss verify ./out --source demo --key public.pem"),
)
def verify_command(asked: _VerifyOptions) -> Answer:
    """Check that DESTINATION, checkpoint or adapter, agrees with its manifest, byte for byte."""
    from converter.checkpoints.names import SIGNATURE
    from converter.release.reading import read_manifest

    try:
        read_manifest(asked.destination)
    except VerificationError as error:  # torch has no part in that
        return _answer(asked, {}, [str(error)], {})
    from converter.checkpoints.resolve import resolve
    from converter.entrypoints.verify import verify
    from converter.release.signing import load_public_key

    quiet_libraries()
    folder = asked.destination
    public = load_public_key(asked.key) if asked.key else None
    original = resolve(asked.source, asked.subfolder) if asked.source else None
    if original:
        original.fetch()
    unsigned = public.check(folder) if public else []
    trust = asked.trust_remote_code and not unsigned  # unsigned code does not run
    word: dict[str, str] = {}
    problems = [*verify(folder, original, trust, unchecked=word), *unsigned]
    if not public and (folder / SIGNATURE).exists():
        progress.note(f"{SIGNATURE} was not checked; give --key with the public key of its owner")
    checked = {"key_sha256": public.fingerprint} if public else {}
    return _answer(asked, checked, problems, word)


def _answer(
    asked: _VerifyOptions, checked: dict[str, str], problems: list[str], word: dict[str, str]
) -> Answer:
    """What was found.

    Args:
        asked: for.
        checked: of the key that signs it, if one was given.
        problems: a sentence each.
        word: what is recorded and was not checked: place in the manifest -> what it is.
    """
    data = {
        "verified": not problems, "problems": problems, "recorded_not_checked": sorted(word),
        "destination": str(asked.destination), "source": asked.source, **checked,
    }  # fmt: skip
    for problem in problems:
        echo(f"error: {one_line(problem)}", err=True)
    if problems:
        return Answer(data, "", VerificationError.exit_code)
    text = f"{asked.destination}: verified against its manifest"
    text += " and against its source" if asked.source else ""
    text += f"\nrecorded, not checked: {', '.join(dict.fromkeys(word.values()))}"
    text += "; gloss replay --refit does the fit again"
    if checked:
        text += f"\nsigned by the key with sha256 {checked['key_sha256']}"
    return Answer(data, text)


@dataclass(frozen=True, slots=True, kw_only=True)
class _PushOptions(Options):
    """The folder to publish, and the repo."""

    # fmt: off
    destination: _Folder
    repo_id: Annotated[str, Option(
        "Repo of the Hub, such as owner/name; the owner is that of the token unless it is given. "
        "Or the address of an empty prefix in an object store, such as s3://bucket/prefix.",
        flag="REPO",
    )]
    trust_remote_code: TrustRemoteCode = False
    # fmt: on


def _publication(asked: _PushOptions, how: PublicationOptions) -> Publication:
    return Publication(repo_id=asked.repo_id, **asdict(how))


def _look_at_push(*, asked: _PushOptions, how: PublicationOptions, faults: Faults) -> None:
    """Find what is wrong with what was asked for before torch is loaded or the Hub is asked."""
    from converter.entrypoints import first_look
    from converter.hub.publishing import check_named

    first_look.look_at_finished(asked.destination, "published", faults)
    if is_store(asked.repo_id):
        with faults:
            names = declared_options(PublicationOptions)
            refuse_typed(names, "with the address of a store", "leave it out")
        with faults:
            first_look.look_at_store(store_address(asked.repo_id), asked.destination, faults)
        return
    with faults:
        if not asked.repo_id.strip():
            raise OptionError("REPO", expected="a repo id such as owner/name", found="nothing")
        check_named(_publication(asked, how), "REPO")


@command(
    "push",
    asked=Part(_PushOptions),
    how=Part(PublicationOptions),
    console=Part(Console, without=("cache_dir",)),
    look=_look_at_push,
    examples=("gloss push ./out someone/SmolLM2-detox --create-pr",),
)
def push_command(asked: _PushOptions, how: PublicationOptions) -> Answer:
    """Publish the checkpoint DESTINATION as the model REPO of the Hugging Face Hub, in one commit;
    or upload it to an object store.

    It is verified first. The token is that of HF_TOKEN, of 'hf auth login', or of a job that is a
    trusted publisher; it is never an argument.
    """
    if is_store(asked.repo_id):
        from converter.entrypoints.push import put

        quiet_libraries()
        put(asked.destination, store_address(asked.repo_id), asked.trust_remote_code)
        data = {"destination": str(asked.destination), "address": store_address(asked.repo_id)}
        return Answer(data, f"{data['destination']} -> {data['address']}")
    from converter.hub.publishing import check_rights

    place = check_rights(_publication(asked, how), "REPO")
    from converter.entrypoints.push import push

    quiet_libraries()
    published = push(asked.destination, place, asked.trust_remote_code)
    text = f"{asked.destination}{published_text(published)}"
    return Answer({"destination": str(asked.destination), **asdict(published)}, text)


@dataclass(frozen=True, slots=True, kw_only=True)
class _ReplayOptions(Options):
    """The manifest to replay, and the destination."""

    # fmt: off
    manifest: Annotated[Path, Option(
        "A gloss_manifest.json or a folder with one; the subspace is read from beside it.",
        flag="MANIFEST", exists=True,
    )]
    destination: Destination
    refit: Annotated[bool, Option("Also fit the edit again, and compare it.")] = False
    max_angle: Annotated[float, Option(
        "Largest angle between the subspace of --refit and the recorded one, or the share of a "
        "change's norm that such an angle is. Other batch sizes, threads and devices add in "
        "another order; the same machine gives the same edit.",
        metavar="DEGREES", example="0.1", least=0, most=90,
    )] = 1.0
    overwrite: Overwrite = False
    # fmt: on


def _look_at_replay(
    *, asked: _ReplayOptions, inputs: LocalInputs, settings: Settings, faults: Faults
) -> None:
    """Find what is wrong with what was asked for before torch is loaded."""
    from converter.entrypoints import first_look

    with faults:
        if not asked.refit:
            refuse_typed(_REFITTING, "without --refit", "add --refit")
    first_look.look_at_replay(
        asked.manifest, inputs, asked.destination, faults,
        refit=asked.refit, overwrite=asked.overwrite,
    )  # fmt: skip


@command(
    "replay",
    asked=Part(_ReplayOptions),
    inputs=Part(LocalInputs),
    settings=Part(Settings, without=(*CLUSTER, "keep_source")),
    look=_look_at_replay,
    examples=("gloss replay ./out ./again", "gloss replay run.json ./again --source ./base"),
)
def replay_command(asked: _ReplayOptions, inputs: LocalInputs, settings: Settings) -> Answer:
    """Repeat the conversion that MANIFEST records, into the folder DESTINATION.

    MANIFEST is a gloss_manifest.json or a folder with one; the subspace is read from beside it. The
    source is read at the recorded commit, and the weights must be byte for byte those recorded.
    """
    from converter.entrypoints.replay import replay
    from converter.release.recording import read_recording

    quiet_libraries()
    recording = read_recording(asked.manifest)
    done = replay(
        recording,
        asked.destination,
        inputs,
        settings,
        max_angle=asked.max_angle if asked.refit else None,
        overwrite=asked.overwrite,
    )
    data = _replay_data(recording, done, asked.destination)
    return Answer(data, _replay_text(data))


def _replay_data(recording: "Recording", done: "Replayed", destination: Path) -> dict[str, Any]:
    """The results of a replay, as printed with --json."""
    told, source = progress.current(), done.manifest.source
    return {
        "destination": str(destination),
        "manifest": recording.path.name,
        "replay_of": recording.sha256,
        "source": source.name,
        "commit": source.commit,
        "identical": True,
        "files_compared": done.identical,
        "other_files": done.other,
        "differences": done.differences,
        "angles": done.refitted and done.refitted.angles,
        "changes": done.refitted
        and {name: asdict(alike) for name, alike in done.refitted.changes.items()},
        "tensors_edited": len(done.manifest.edited),
        "verified": True,
        "seconds": {name: round(value, 2) for name, value in told.seconds.items()},
        "warnings": told.warnings,
    }


def _replay_text(data: dict[str, Any]) -> str:
    """The same for people."""
    commit = f" at {data['commit'][:12]}" if data["commit"] else ""
    differs = ", ".join(d["what"] for d in data["differences"])
    lines = [
        f"{data['manifest']} -> {data['destination']}",
        f"  source        {data['source']}{commit}, every file as recorded",
        f"  environment   {'not as recorded: ' + differs if differs else 'as recorded'}",
        f"  edited        {data['tensors_edited']} tensors",
        f"  written       {data['files_compared']} files, byte for byte as recorded, verified",
    ]
    if data["other_files"]:
        lines.append(f"  other bytes   {', '.join(data['other_files'])}")
    for name, angles in (data["angles"] or {}).items():
        lines.append(f"  refitted {name:<4} at most {angles[-1]:.4f} degrees from the recorded one")
    for name, alike in (data["changes"] or {}).items():
        lines.append(
            f"  refitted {name}: its change ({alike['kind']}) differs from the recorded one by "
            f"{alike['distance']:.4%} of its norm, cosine {alike['cosine']:.6f}"
        )
    return "\n".join(lines)
