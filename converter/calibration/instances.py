"""What a model is to answer to harmful requests: instances to learn from, and the built-in set."""

import hashlib
import json
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import astuple, dataclass, field
from functools import cache
from importlib.resources import files

from converter.manifest import Origin


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
        held_out: name of a kind of prompt -> a prompt of it that the edit does not see.
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
    """All instances of one origin, in its order; ``sha256`` is of them as they are used."""

    items: tuple[Instance, ...]
    origin: Origin
    sha256: str


@dataclass(frozen=True, slots=True)
class Lesson:
    """What a fit has taught a model.

    Attributes:
        instances: one at least, those that it has seen.
        suffix: S, put behind every message of a user, after a space; empty for none.
    """

    instances: tuple[Instance, ...]
    suffix: str = ""


@dataclass(frozen=True, slots=True)
class DefenceSet:
    """The built-in texts that instances are made of, and that defence is measured on.

    Attributes:
        suffix: S, what is put behind a user's message, after a space.
        refusals: short ones, to measure by.
        safe, unsafe: answers, with ``{topic}`` in them.
        attacks: name -> text with ``{question}`` in it.
        questions: category, question and topic.
        harmless: questions and answers.
        touchy: the same, with words that sound harmful.
    """

    version: int
    suffix: str
    refusals: tuple[str, ...]
    safe: tuple[str, ...]
    unsafe: tuple[str, ...]
    attacks: Mapping[str, str]
    questions: tuple[tuple[str, str, str], ...]
    harmless: tuple[tuple[str, str], ...]
    touchy: tuple[tuple[str, str], ...]

    def instances(self) -> Iterator[Instance]:
        """One of each question; the file says which attack and answers it has."""
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
    """The built-in instances."""
    items = tuple(builtin_set().instances())
    described = Origin(name="builtin", version=builtin_set().version)
    lines = (json.dumps(astuple(item), ensure_ascii=False, sort_keys=True) for item in items)
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    return Instances(items, described, digest)
