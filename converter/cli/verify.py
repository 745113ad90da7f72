"""The command ``gloss verify``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from converter.cli.command import Answer, Console, command, quiet_libraries
from converter.cli.fields import Part
from converter.errors import VerificationError
from converter.option import Option, Options
from converter.recipe import Subfolder, TrustRemoteCode
from converter.runtime import progress
from converter.runtime.console import echo
from converter.text.sanitize import one_line


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyOptions(Options):
    """What is verified, and against what."""

    # fmt: off
    destination: Annotated[Path, Option(
        "Folder with a checkpoint or adapter.", flag="DESTINATION", path="folder", exists=True,
    )]
    source: Annotated[str | None, Option(
        "Model that it was made from, as it was given to gloss-convert.", example="demo",
    )] = None
    subfolder: Subfolder = ""
    key: Annotated[Path | None, Option(
        "Public key in PEM of whoever should have signed it.", example="public.pem",
    )] = None
    trust_remote_code: TrustRemoteCode = False
    # fmt: on


@command("verify", asked=Part(VerifyOptions), console=Part(Console))
def verify_command(asked: VerifyOptions) -> Answer:
    """Check that DESTINATION, checkpoint or adapter, is byte for byte what its manifest says."""
    from converter.checkpoints.names import SIGNATURE
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
    trust = asked.trust_remote_code and not unsigned  # what its owner did not sign is not run
    problems = [*verify(folder, original, trust), *unsigned]
    if not public and (folder / SIGNATURE).exists():
        progress.note(f"{SIGNATURE} was not checked; give --key with the public key of its owner")
    checked = {"destination": str(folder), "source": asked.source}
    if public:
        checked["key_sha256"] = public.fingerprint
    data = {"verified": not problems, "problems": problems, **checked}
    for problem in problems:
        echo(f"error: {one_line(problem)}", err=True)
    if problems:
        return Answer(data, "", VerificationError.exit_code)
    lines = [f"{folder}: verified against its manifest"]
    lines[0] += " and against its source" if asked.source else ""
    if public:
        lines.append(f"signed by the key with sha256 {public.fingerprint}")
    return Answer(data, "\n".join(lines))
