"""Where the inputs of a recorded conversion are: a manifest records no path."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from converter.option import Option, Options
from converter.recipe import TrustRemoteCode


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalInputs(Options):
    """Where the inputs of a recorded conversion are.

    None where that is not needed. ``trust_remote_code`` is never taken from a manifest.
    """

    # fmt: off
    source: Annotated[str | None, Option(
        "Place of the recorded source, if it was a local one or is a copy now.", example="./base",
        place=True,
    )] = None
    pairs: Annotated[str | None, Option(
        "With --refit: place of the recorded file of pairs.", example="pairs.tsv", place=True,
    )] = None
    neutral: Annotated[str | None, Option(
        "With --refit: place of the recorded neutral text.", example="prose.txt", place=True,
    )] = None
    word_list: Annotated[str | None, Option(
        "With --refit: place of the recorded word list.", example="words.txt", place=True,
    )] = None
    activations: Annotated[Path | None, Option(
        "With --refit: file of activations that the recorded fit was given.",
        example="activations.safetensors", path="file", exists=True,
    )] = None
    trust_remote_code: TrustRemoteCode = False
    # fmt: on
