"""Harmful requests with the answers to learn: instances, and the built-in set."""

import hashlib
import json
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from converter.calibration.datasets import locate, read_entries
from converter.errors import DataError
from converter.manifest import Origin

FORMATS = (".json", ".jsonl")
"""Endings of files in the format of SafeEdit."""

_OTHERS = "generalization test"
"""The field of SafeEdit with prompts that an edit has not seen."""

_NO_TEXT = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
"""Characters that no tokenizer should get: control characters except white space, and surrogate
halves.
"""


@dataclass(frozen=True, slots=True)
class Instance:
    """A harmful request within an attack, the answer to learn, and the one to unlearn.

    Attributes:
        id: in its file; its place there, from 0, if the file has none.
        category: of the harm; empty if it is unknown.
        attack: name of the attack; empty likewise.
        prompt: the attack with the question in it, X.
        question: without the attack; empty if it is unknown.
        safe: answer to learn, Y.
        unsafe: answer that complies.
        general: a harmless question and its answer, which the edit must leave as it is.
        held_out: kind of prompt -> a prompt of that kind that the fit does not see.
    """

    id: str
    category: str
    attack: str
    prompt: str
    question: str
    safe: str
    unsafe: str
    general: tuple[str, str]
    held_out: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Instances:
    """All instances of one origin, in order; ``sha256`` is of the instances as used."""

    items: tuple[Instance, ...]
    origin: Origin
    sha256: str


@dataclass(frozen=True, slots=True)
class Lesson:
    """The lesson of a fit.

    Attributes:
        instances: the instances that the fit has seen, at least one.
        suffix: S, put behind every user message, after a space; empty for none.
    """

    instances: tuple[Instance, ...]
    suffix: str = ""


def together(lessons: Iterable[Lesson | None]) -> Lesson | None:
    """Join lessons: each instance once, with the suffix of the last; None without any."""
    known = [lesson for lesson in lessons if lesson is not None]
    if not known:
        return None
    every = [instance for lesson in known for instance in lesson.instances]
    once = tuple(each for place, each in enumerate(every) if each not in every[:place])
    return Lesson(once, known[-1].suffix)


@dataclass(frozen=True, slots=True)
class DefenceSet:
    """The built-in texts for instances and for the measurement of defence.

    Attributes:
        suffix: S, put behind a user message, after a space.
        refusals: short refusals in the usual words, for measurements.
        rewordings: refusals in words that no safe answer begins with.
        safe, unsafe: answers, with ``{topic}`` in them.
        attacks: name -> text with ``{question}`` in it.
        questions: category, question and topic.
        harmless: questions and answers.
        touchy: harmless questions and answers with words that sound harmful.
    """

    version: int
    suffix: str
    refusals: tuple[str, ...]
    rewordings: tuple[str, ...]
    safe: tuple[str, ...]
    unsafe: tuple[str, ...]
    attacks: Mapping[str, str]
    questions: tuple[tuple[str, str, str], ...]
    harmless: tuple[tuple[str, str], ...]
    touchy: tuple[tuple[str, str], ...]

    def instances(self) -> Iterator[Instance]:
        """An instance for each question; the file names its attack and answers."""
        attacks = list(self.attacks.items())
        for n, (category, question, topic) in enumerate(self.questions):
            name, attack = attacks[n % len(attacks)]
            topics = {"topic": topic, "Topic": topic[0].upper() + topic[1:]}
            yield Instance(
                id=str(n),
                category=category,
                attack=name,
                prompt=attack.format(question=question),
                question=question,
                safe=self.safe[n % len(self.safe)].format(**topics),
                unsafe=self.unsafe[n % len(self.unsafe)].format(**topics),
                general=self.harmless[n % len(self.harmless)],
            )


@cache
def builtin_set() -> DefenceSet:
    """The set in ``data/defence.toml``, which is in English."""
    data = tomllib.loads(files("converter").joinpath("data/defence.toml").read_text("utf-8"))
    return DefenceSet(
        version=data["version"],
        suffix=data["suffix"],
        refusals=tuple(data["refusals"]),
        rewordings=tuple(data["rewordings"]),
        safe=tuple(data["safe"]),
        unsafe=tuple(data["unsafe"]),
        attacks=data["attacks"],
        questions=tuple(
            (category["name"], question, topic)
            for category in data["category"]
            for question, topic in category["questions"]
        ),
        harmless=tuple((question, answer) for question, answer in data["harmless"]),
        touchy=tuple((question, answer) for question, answer in data["touchy"]),
    )


def load_instances(origin: str | None = None) -> Instances:
    """Read the instances of a run.

    Args:
        origin: ``builtin`` or None; or, in the format of SafeEdit, a ``.json`` file with a list, a
            ``.jsonl`` file with an object a line, or a Hub dataset, of which a file with ``test``
            in its name is read: its authors edit with that part. Other fields are ignored. Missing
            optional fields are taken from the built-in set or are empty.

    Raises:
        DataError: the file is missing, malformed or empty, or an instance cannot be used; the
            message has its place in the file, from 0.
        SourceError: the Hub cannot be read.
    """
    if origin in (None, "builtin"):
        items = tuple(builtin_set().instances())
        described = Origin(name="builtin", version=builtin_set().version)
    else:
        described, path = locate(str(origin), "instances", FORMATS, split="test")
        items = tuple(_read(path))
    lines = (json.dumps(astuple(item), ensure_ascii=False, sort_keys=True) for item in items)
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    return Instances(items, described, digest)


def _read(path: Path) -> Iterator[Instance]:
    entries = read_entries(path, "instances")
    if not entries:
        raise DataError(f"instances file {path.name}", expected="one at least", found="none")
    for number, entry in enumerate(entries):
        yield _instance(entry, number, f"instances file {path.name}, instance {number}")


def _instance(entry: Any, number: int, what: str) -> Instance:
    """An instance of SafeEdit's format. Raises DataError."""
    if not isinstance(entry, dict):
        raise DataError(what, expected="an object", found=type(entry).__name__)
    prompt, safe, unsafe = (
        _text(entry, name, what)
        for name in ("adversarial prompt", "safe generation", "unsafe generation")
    )
    if safe.strip() == unsafe.strip():
        raise DataError(f"{what}: the safe and the unsafe generation are the same")
    general = builtin_set().harmless[number % len(builtin_set().harmless)]
    if (known := entry.get("knowledge constrain")) is not None:
        if not isinstance(known, dict):
            raise DataError(
                f"{what}: knowledge constrain", found=type(known).__name__,
                expected="an object with the fields prompt and answer",
            )  # fmt: skip
        general = _text(known, "prompt", what), _text(known, "answer", what)
    if general[0].strip() == prompt.strip():
        raise DataError(
            f"{what}: the adversarial prompt and that of knowledge constrain are the same",
            hint="give a harmless prompt, whose answer is to stay as it is",
        )
    others = entry.get(_OTHERS) or {}
    if not isinstance(others, dict):
        raise DataError(f"{what}: {_OTHERS}", expected="an object", found=type(others).__name__)
    return Instance(
        id=_NO_TEXT.sub("?", str(entry.get("id", number)))[:80],
        category=_optional(entry, "unsafety category", what),
        attack=_optional(entry, "attack name", what),
        prompt=prompt,
        question=_optional(entry, "question", what),
        safe=safe,
        unsafe=unsafe,
        general=general,
        held_out={
            name: text
            for name, text in sorted(others.items())
            if isinstance(text, str) and text.strip() and not _NO_TEXT.search(name + text)
        },
    )


def _optional(entry: Mapping[str, Any], name: str, what: str) -> str:
    return _text(entry, name, what) if entry.get(name) else ""


def _text(entry: Mapping[str, Any], name: str, what: str) -> str:
    """A text that is not blank and that a tokenizer accepts. Raises DataError."""
    value = entry.get(name)
    found = None
    if name not in entry:
        found = f"the fields {', '.join(map(str, entry))}"[:200] if entry else "no field"
    elif not isinstance(value, str):
        found = type(value).__name__
    elif not value.strip():
        found = "a blank text"
    elif odd := _NO_TEXT.search(value):
        found = f"the character {odd[0]!a} at place {odd.start()}"
    if found is not None or not isinstance(value, str):
        raise DataError(f"{what}: {name}", expected="a text", found=found)
    return value
