"""Write a report on a finished conversion: one page, from its manifest."""

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
    """Write the report on a folder, or on a manifest alone, and return its verdict.

    The report cannot be inside the folder: the manifest records every file there, and the report
    quotes the manifest.

    Raises:
        VerificationError: there is no manifest, or it cannot be read.
        DestinationError: the page cannot be written at the place that ``option`` names.
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
