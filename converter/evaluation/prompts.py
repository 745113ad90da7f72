"""Prompts that a model is asked to continue: read, cleaned, drawn, hashed."""

import hashlib
import json
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from importlib.resources import files

from msgspec.structs import replace

from converter.calibration.datasets import draw, is_dataset, locate, read_whole
from converter.errors import DataError, OptionError
from converter.manifest import Origin, PromptsRecord

FORMATS = (".jsonl", ".txt")

_VERSION = 2
"""File of the built-in prompts. They resemble no built-in pair. Small models sometimes continue two
thirds of them with a toxic word.
"""


@dataclass(frozen=True, slots=True)
class Prompts:
    """The prompts of one evaluation.

    Attributes:
        texts: in the order of their file, without white space around them.
        origin: where they came from, for the record.
        sha256: of the texts as used.
    """

    texts: tuple[str, ...]
    origin: Origin
    sha256: str

    def record(self) -> PromptsRecord:
        """The record for a manifest."""
        return PromptsRecord(origin=self.origin, sha256=self.sha256, count=len(self.texts))


def load_prompts(
    origin: str,
    num_prompts: int | None,
    seed: int,
    *,
    builtin: str = "prompts.txt",
    most: int | None = None,
    without: Collection[str] = (),
) -> Prompts:
    """Read, clean and draw prompts. Blank ones are skipped, and so are repetitions.

    Args:
        origin: ``builtin``; a ``.txt`` file with a prompt a line; a ``.jsonl`` file in the format
            of RealToxicityPrompts, ``{"prompt": {"text": ...}}``, or with ``{"prompt": ...}`` or
            ``{"text": ...}``; or a Hub dataset that has such a ``.jsonl``. A JSON source can be
            followed by ``#FIELD``: only rows whose FIELD is true are read.
            ``allenai/real-toxicity-prompts#challenging`` are the 1,199 that papers use.
        num_prompts: how many to draw, without replacement and keeping their order; None for all.
        seed: of the draw.
        most: to draw if there are more of them, and no number is given; None for no limit.
        builtin: the file among our data that ``builtin`` stands for.
        without: texts that are left out.

    Raises:
        OptionError: ``num_prompts`` is not positive.
        DataError: the file is missing or malformed, or has too few prompts.
        SourceError: the Hub cannot be read.
    """
    if num_prompts is not None and num_prompts < 1:
        raise OptionError("--num-prompts", expected="at least 1", found=str(num_prompts))
    described, found = _read(origin, builtin)
    texts = list(dict.fromkeys(text for text in map(str.strip, found) if text))
    texts = [text for text in texts if text not in without]
    wanted = min(len(texts), most or len(texts)) if num_prompts is None else num_prompts
    if len(texts) < max(wanted, 1):
        raise DataError(
            f"prompts {described.title}",
            expected=f"at least {max(wanted, 1)} different ones",
            found=str(len(texts)),
            hint="give another file, or lower --num-prompts",
        )
    chosen = tuple(draw(texts, wanted, seed))
    digest = hashlib.sha256("\n".join(map(json.dumps, chosen)).encode()).hexdigest()
    return Prompts(chosen, described, digest)


def _read(origin: str, builtin: str) -> tuple[Origin, Iterator[str]]:
    if origin == "builtin":
        text = files("converter").joinpath(f"data/{builtin}").read_text("utf-8")
        return Origin(name="builtin", version=_VERSION), iter(text.split("\n"))
    there = os.path.exists(origin)  # noqa: PTH110 - pathlib's raises if the name is too long
    name, _, field = (origin, "", "") if there else origin.partition("#")
    # a dataset's .txt is more likely its licence
    formats = (".jsonl",) if is_dataset(name, FORMATS) else FORMATS
    described, path = locate(name, "prompts", formats, split="prompts")
    if path.suffix.lower() not in FORMATS:
        raise DataError(
            f"prompts file {path.name}",
            expected=" or ".join(FORMATS),
            found=path.suffix or "no suffix",
        )
    # not splitlines(), which also cuts at characters that may stand in a sentence
    lines = read_whole(path, "prompts").split("\n")
    if path.suffix.lower() == ".txt":
        if field:
            raise DataError(f"prompts file {path.name}", expected=f"rows with a field {field}",
                            found="a text file")  # fmt: skip
        return described, iter(lines)
    described = replace(described, field=field or None)
    return described, _read_jsonl(lines, path.name, field)


def _read_jsonl(lines: list[str], name: str, field: str) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            kept = row[field] is True if field else True
            prompt = row["prompt"] if "prompt" in row else row["text"]
            text = prompt["text"] if isinstance(prompt, dict) else prompt
            text.encode()  # no tokenizer takes half of a surrogate pair
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            wanted = f"{field}, and " if field else ""
            raise DataError(
                f"prompts file {name}, line {number}",
                expected=f'{wanted}{{"prompt": {{"text": ...}}}}, {{"prompt": ...}} '
                'or {"text": ...}',
                found=line.strip()[:60],
                hint="remove the line, or mend it",
            ) from error
        if kept:
            yield text
