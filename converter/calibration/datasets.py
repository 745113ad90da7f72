"""Read data files, local or from a Hub dataset, and rows of sentence pairs."""

import csv
import json
import os
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from converter.errors import DataError
from converter.hub.addresses import is_address, looks_like_repo, parse_address
from converter.manifest import Origin
from converter.runtime.cache import sha256_of
from converter.runtime.files import (
    AS_UTF8,
    MAX_LINE,
    check_file,
    decode,
    read_file,
    read_text,
    reason,
    text_lines,
)
from converter.text import readable

NO_FIELDS = "without the fields toxic and neutral"
"""The problem of a row that has other fields."""

FORMATS = {".jsonl": "jsonl", ".tsv": "tsv", ".csv": "csv"}

_T = TypeVar("_T")

Spans = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Row:
    """A row: its number for messages, and either a problem or two sides.

    Rows of one ``group`` were made from the same text.
    """

    number: int
    toxic: str = ""
    neutral: str = ""
    spans: Spans | None = None
    problem: str | None = None
    group: str = ""


def draw(items: Sequence[_T], count: int, seed: int) -> list[_T]:
    """Draw ``count`` items without replacement, in their order, by a seed."""
    places = random.Random(seed).sample(range(len(items)), count)  # noqa: S311 - not a secret
    return [items[place] for place in sorted(places)]


def is_dataset(origin: str, formats: Iterable[str] = FORMATS) -> bool:
    """Whether a name is a Hub dataset id rather than a local file."""
    is_repo = Path(origin).suffix.lower() not in formats and looks_like_repo(origin)
    there = os.path.exists(origin)  # noqa: PTH110 - pathlib's raises if the name is too long
    return is_address(origin) or (is_repo and not there)


def locate(
    origin: str, what: str, formats: Iterable[str] = FORMATS, split: str = "train"
) -> tuple[Origin, Path]:
    """A local file, or the data file of a Hub dataset at a resolved commit.

    Args:
        origin: a path or a dataset id.
        what: contents of the file, for messages.
        formats: suffixes that can be read.
        split: files of a dataset with this in their name are preferred.

    Raises:
        DataError: there is no such file, or none that can be read.
        SourceError: the Hub cannot be read.
    """
    path = Path(origin)
    if not origin:
        raise DataError(what, expected="a file or a Hub dataset id", found="no name")
    if os.path.isdir(origin):  # noqa: PTH112 - as above
        hint = "give a file in it"
        if looks_like_repo(origin):
            hint += f", or https://huggingface.co/datasets/{origin} for the dataset of that name"
        expected = "a file or a Hub dataset id"
        raise DataError(f"{what} {origin} is a folder", expected=expected, hint=hint)
    if not is_dataset(origin, formats):
        if not os.path.isfile(origin):  # noqa: PTH113
            raise DataError(f"{what} file {origin} does not exist", hint="check the path")
        return Origin(name=readable(path.name), file_sha256=_sha256(path, what)), path
    from converter.hub import repos as hub  # half a second, which local files need not take

    place = parse_address(origin, "dataset")
    repo = hub.resolve("dataset", place.name)
    known = [PurePosixPath(n) for n in repo.sizes]  # of all, or of a folder, or the file itself
    names = [str(n) for n in known if n.suffix.lower() in formats and n.is_relative_to(place.path)]
    chosen = min(names, key=lambda name: (split not in name, name), default=None)
    if chosen is None and repo.sizes:
        raise DataError(
            f"dataset {origin} has no file that can be read",
            expected=", ".join(formats),
            found=place.path or ", ".join(sorted({n.suffix for n in known} - {""})),
        )
    folder = repo.download([chosen] if chosen else ["*"], first=True)
    paths = [folder / chosen] if chosen else sorted(folder.rglob("*"))
    inside = (path for path in paths if path.is_relative_to(folder / place.path))
    data = next((path for path in inside if path.suffix.lower() in formats), None)
    if data is None:
        raise DataError(f"dataset {origin} has no readable file in the local cache")
    return Origin(repo_id=repo.repo_id, commit=repo.commit, file_sha256=_sha256(data, what)), data


@contextmanager
def _reading(what: str) -> Iterator[None]:
    """Within this context, raise DataError if a file cannot be read, or is not text."""
    try:
        yield
    except UnicodeError as error:
        raise DataError(
            f"{what} cannot be read", expected="text in UTF-8", found=str(error), hint=AS_UTF8
        ) from error
    except (OSError, ValueError) as error:
        raise DataError(f"{what} cannot be read", found=reason(error)) from error


def _sha256(path: Path, what: str) -> str:
    with _reading(f"{what} file {path.name}"):
        check_file(path)
        return sha256_of(path)


def read_whole(path: Path, what: str) -> str:
    """The whole text of a file, with its own line ends. Raises DataError."""
    with _reading(f"{what} file {path.name}"):
        return decode(read_file(path))


def read_entries(path: Path, what: str) -> list[Any]:
    """The values in a ``.jsonl`` file, one a line, or in the list of another JSON file.

    Raises:
        DataError: the file cannot be read, is not JSON, or holds no list.
    """
    file = f"{what} file {path.name}"
    if path.suffix.lower() != ".jsonl":
        entries = _parsed(read_whole(path, what), file)
        if not isinstance(entries, list):
            raise DataError(file, expected="a list", found=type(entries).__name__)
        return entries
    with _reading(file):
        lines = list(text_lines(path, "\n"))
    if None in lines:
        place = f"{file}, line {lines.index(None) + 1}"
        raise DataError(place, found=f"more than {MAX_LINE:,} characters")
    numbered = ((n, line) for n, line in enumerate(lines, 1) if line and line.strip())
    return [_parsed(line, f"{file}, line {number}") for number, line in numbered]


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(place, expected="JSON in UTF-8", found=str(error)) from error


def read_given(origin: str, what: str) -> str:
    """The text of a file that the user names. Raises DataError."""
    with _reading(f"{what} {origin}"):
        return read_text(Path(origin))


def read_rows(path: Path) -> Iterator[Row]:
    """Rows of a file; an unreadable row carries its problem.

    Raises:
        DataError: the file as a whole cannot be read, or lacks the columns.
    """
    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        raise DataError(
            f"pairs file {path.name}", expected=", ".join(FORMATS), found=path.suffix or "no suffix"
        )
    # JSON lines end at line feeds only: others may stand in a sentence
    newline = "\n" if kind == "jsonl" else ""
    with _reading(f"pairs file {path.name}"):
        lines = text_lines(path, newline)
        yield from _read_jsonl(lines) if kind == "jsonl" else _read_table(lines, kind, path.name)


def _read_jsonl(lines: Iterable[str | None]) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        if line is None:
            yield Row(number, problem=f"of more than {MAX_LINE:,} characters")
            continue
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            sides = entry["toxic"], entry["neutral"]
        except KeyError:
            yield Row(number, problem=NO_FIELDS)
        except (ValueError, TypeError, RecursionError):
            yield Row(number, problem="unreadable")
        else:
            yield _row(number, *sides)


def _cells(lines: Iterable[str | None]) -> Iterator[str]:
    """Lines for the reader of tables, which may join several to one row. Raises csv.Error."""
    for line in lines:
        if line is None:
            raise csv.Error(f"a line has more than {MAX_LINE:,} characters")
        yield line


def _read_table(lines: Iterable[str | None], kind: str, name: str) -> Iterator[Row]:
    """ParaDetox names its paraphrases neutral1, neutral2, ...; the first one present is taken."""
    cells = _cells(lines)
    try:
        first = next(cells, "")
        if kind == "tsv":
            style: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
        else:  # spreadsheets write semicolons in locales with decimal commas
            style = {"delimiter": max(",;\t", key=first.count)}
        reader = csv.reader(chain([first], cells), **style)
        columns = [column.strip().lower() for column in next(reader, [])]
        neutral = [i for i, column in enumerate(columns) if re.fullmatch(r"neutral\d*", column)]
        if "toxic" not in columns or not neutral:
            raise DataError(
                f"pairs file {name}",
                expected="a first line with the columns toxic and neutral",
                found=", ".join(columns)[:200] or "an empty file",
            )
        toxic = columns.index("toxic")
        for row in reader:
            number = reader.line_num
            if not max(toxic, neutral[0]) < len(row) <= len(columns):
                yield Row(number, problem=f"of another number of cells than {len(columns)}")
                continue
            sides = [row[i] for i in neutral if i < len(row) and row[i].strip()]
            yield _row(number, row[toxic], sides[0] if sides else "")
    except csv.Error as error:
        raise DataError(f"pairs file {name} is malformed", found=str(error)) from error


NO_TEXT = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ud800-\udfff\ufffd]")
"""Characters of no sentence: control characters, surrogate halves, the replacement character."""


def _row(number: int, toxic: Any, neutral: Any) -> Row:
    texts = isinstance(toxic, str) and isinstance(neutral, str)
    if not texts or NO_TEXT.search(toxic + neutral):
        return Row(number, problem="unreadable")
    return Row(number, toxic, neutral)
