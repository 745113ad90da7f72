"""Tell people of a finished conversion: one page, from its manifest."""

from pathlib import Path

from converter.checkpoints.names import MANIFEST
from converter.errors import DestinationError
from converter.outputs.destination import check_beside
from converter.release.manifest import read_manifest_bytes
from converter.release.report import report_page
from converter.release.verdict import Verdict, verdict
from converter.runtime import progress
from converter.runtime.files import reason


def report(place: Path, output: Path, option: str = "--output") -> Verdict:
    """Write the report on a folder, or on a manifest alone; its verdict.

    Every file of a folder is recorded in its manifest, which the report quotes, so the report
    cannot be one of them.

    Raises:
        VerificationError: there is no manifest, or it cannot be read.
        DestinationError: the page cannot be written there, which is what ``option`` says.
    """
    check_beside(option, output, place.parent if place.name == MANIFEST else place)
    manifest, digest = read_manifest_bytes(place)
    try:
        output.write_text(report_page(manifest, digest), "utf-8", newline="\n")
    except OSError as error:
        raise DestinationError(
            f"{option} {output} cannot be written", found=reason(error)
        ) from error
    progress.note(f"  written: {output}")
    return verdict(manifest)
