"""Every command once, on a model in which the truth is planted: what it shows, what it prints."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from torch import nn
from transformers import PreTrainedModel

from converter.calibration.pairs import load_prose
from converter.cli.documents import DOCUMENTS, VERSION
from converter.entrypoints.estimate import takes_gradients
from converter.methods.options import configure
from converter.runtime import progress
from tests.builders.hub_client import connect
from tests.builders.hub_repos import TOKEN
from tests.builders.hub_server import HubServer
from tests.builders.hub_uploads import Uploads
from tests.builders.invoke import invoke
from tests.builders.models import planned
from tests.builders.planted import planted_args

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),  # of the Hub's client
]

MAY_END_EARLY = {"strengths", "train"}
"""Bars of work that may be over sooner: a search by halves, a training that has learnt all."""


@dataclass
class Seen:
    """What a command did.

    Attributes:
        data: that it printed.
        bars: title, how far it came, and how far it was to come, of each.
        hidden: of passes of a model, and of steps, that no bar showed: what was being done.
    """

    data: Any = None
    bars: list[tuple[str, float, float]] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)


@contextmanager
def watching(patch: pytest.MonkeyPatch) -> Iterator[Seen]:
    """See every bar, and what is done without one."""
    seen, bar, advance = Seen(), progress.bar, progress.advance
    run: Callable[..., Any] = nn.Module.__call__

    @contextmanager
    def watched(title: str, total: int, unit: str) -> Iterator[Any]:
        with bar(title, total, unit) as shown:
            count = Moved()
            patch.setattr(shown, "update", count.update)
            yield shown
        seen.bars.append((title, count.n, total))

    def called(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        told = progress.current()
        doing = told.doing[-1][0] if told.doing else "nothing"
        if isinstance(module, PreTrainedModel) and not told.bars:
            seen.hidden.append(f"{doing}: a pass of the model")
        return run(module, *args, **kwargs)

    def moved(count: int) -> None:
        if not progress.current().bars:
            seen.hidden.append("a step")
        advance(count)

    patch.setattr(progress, "bar", watched)
    patch.setattr(progress, "advance", moved)
    patch.setattr(nn.Module, "__call__", called)
    yield seen


class Moved:
    """How far a bar has come, which tqdm does not count where none is shown."""

    n = 0.0

    def update(self, count: float = 1) -> None:
        self.n += count


@contextmanager
def hub_at(folder: Path, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Hub on this machine, which the client talks to."""
    with HubServer({}, uploads=Uploads(folder)) as server:
        connect(patch, server.url, folder / "client")
        patch.setenv("HF_TOKEN", TOKEN)
        yield


@pytest.fixture(scope="module")
def commands(planted: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Seen]:
    """Name -> what the command did, all with ``--json``."""
    folder = tmp_path_factory.mktemp("commands")
    (folder / "prompts.txt").write_text("w1 damn\nw2 w3 fucking\nthe river is\nw4 damn\n")
    (folder / "plain.txt").write_text("\n".join(f"w{n} w{n + 1}" for n in range(40)))
    prose = load_prose("builtin").paragraphs[:20]
    (folder / "text.txt").write_text("\n".join(prose).lower())
    out, cache = folder / "out", folder / "cache"
    texts = ("--prompts", folder / "prompts.txt")
    own = (*planted_args(planted), "--num-pairs", 100)
    given = (*own, *texts)
    measured = (
        "--text", folder / "text.txt", "--scorer", "bad-words", "--max-new-tokens", 6,
        "--samples", 2, "--passages", 2, "--system", "random:rank=2", "--defence",
    )  # fmt: skip
    every: dict[str, tuple[object, ...]] = {
        "convert": (
            planted, out, *planted_args(planted, None), "--num-pairs", 100, *texts,
            "--guard-draws", 2,
        ),
        "convert, evaluated": (
            planted, folder / "evaluated", *given, "--evaluate", *measured, "--guard-draws", 2,
        ),
        "convert, dry": (planted, folder / "none", *given, "--dry-run"),
        "convert, dinm": (
            planted, folder / "dinm", "--method", "dinm", "-o", "layer=2", "-o", "steps=2",
            "--force", "--num-pairs", 100,
        ),
        "convert, adapter": (
            planted, folder / "lora", *own, "--output", "adapter", "--no-guard",
        ),
        "convert, self": (
            planted, folder / "self", "--pairs", "self", "--self-prompts", folder / "plain.txt",
            "--num-pairs", 16, "--no-guard", "-o", "rank=1", "-o", "protect_shared=1",
        ),
        "plan": (planted, *given),
        "plan, timed": (planted, *given, "--time"),
        "plan, of a part": (planted, "--method", "destein", *given[:2], "--pairs", "self"),
        "recipe": (planted, *given),
        "evaluate": (out, "--base", planted, *given, *measured, "--costs", "1.01,1.05"),
        "compare": (planted, out, "--prompts", folder / "prompts.txt", "--max-new-tokens", 4),
        "search": (planted, *given, "--trials", 2, "--search-prompts", "none"),
        "verify": (out, "--source", planted),
        "replay": (out, folder / "again", "--source", planted),
        "replay, refitted": (
            out, folder / "refitted", "--refit", "--source", planted, "--pairs",
            planted.parent / "pairs.jsonl",
            "--prompts", folder / "prompts.txt",
        ),
        "diff": (planted, out),
        "report": (out, "--output", folder / "report.html"),
        "calibrate": (planted, folder / "calibration", *given[:2], "--depth", 2, "--tokens", 500),
        "architectures": ("--only", "llama"),
        "architectures, inferred": ("--infer", planted),
        "methods": (),
        "methods, of one": ("gloss",),
        "completion": ("bash",),
        "guide": ("guard",),
        "push": (out, "someone/tiny-detox"),
        "schema": (),
    }  # fmt: skip
    found, failed = {}, {}
    with pytest.MonkeyPatch.context() as outer, hub_at(folder / "hub", outer):
        outer.setenv("GLOSS_CACHE_DIR", str(cache))
        for name, args in every.items():
            with pytest.MonkeyPatch.context() as patch, watching(patch) as seen:
                result = invoke(name.partition(",")[0], *args, "--json")
            if result.exit_code:
                failed[name] = result.stderr[-300:] or repr(result.exception)
            else:
                seen.data, found[name] = json.loads(result.stdout), seen
    assert not failed, "\n".join(f"{name}: {said}" for name, said in failed.items())
    return found


def test_every_pass_of_a_model_moves_a_bar(commands: dict[str, Seen]) -> None:
    """But for those of the proofs of an architecture, on models of a few numbers."""
    proofs = ("reading the headers of", "gloss methods")
    hidden = {
        name: [what for what in seen.hidden if not what.startswith(proofs)]
        for name, seen in commands.items()
    }
    assert {name: whats for name, whats in hidden.items() if whats} == {}


def test_every_bar_comes_to_its_end(commands: dict[str, Seen]) -> None:
    short = {
        name: [bar for bar in seen.bars if bar[1] != bar[2] and bar[0] not in MAY_END_EARLY]
        for name, seen in commands.items()
    }
    assert {name: bars for name, bars in short.items() if bars} == {}
    assert all(bar[1] <= bar[2] for seen in commands.values() for bar in seen.bars)


def schema_of(name: str, *, closed: bool) -> Any:
    """As it is published; ``closed`` to what it does not name, but for the name of a strength."""
    found = json.loads(invoke("schema", name, code=0).stdout)
    for part in found["$defs"].values() if closed else ():
        if "properties" in part and part["title"] != "Converted":
            part["additionalProperties"] = False
    return found


def test_what_is_printed_follows_its_schema(commands: dict[str, Seen]) -> None:
    for name, seen in commands.items():
        command = name.partition(",")[0]
        if command != "schema":
            jsonschema.validate(seen.data, schema_of(command, closed=True))
    known = {name.partition(",")[0] for name in commands} - {"schema"}
    assert known == {*DOCUMENTS} - {"error"}
    assert {*DOCUMENTS, "manifest"} == {*commands["schema"].data}


def test_every_field_of_a_document_is_explained() -> None:
    for name in DOCUMENTS:
        found = schema_of(name, closed=False)
        assert found["$id"] == f"urn:gloss-convert:{name}:{VERSION}"
        for title, part in found["$defs"].items():
            assert part["description"].endswith("."), title


@pytest.mark.parametrize(("name", "title", "fields"), [
    ("compare", "Compared", "base edited how seed max_new_tokens top_p chat masked means samples"),
    ("push", "PushedFolder", "repo_id commit url pull_request destination"),
    ("diff", "DifferingManifests", "a b equal changed"),
    ("error", "Failed", "error message exit_code others"),
])  # fmt: skip
def test_a_field_that_documents_share_is_explained_in_each(
    name: str, title: str, fields: str
) -> None:
    found = schema_of(name, closed=False)["$defs"][title]["properties"]
    assert {*found} == {*fields.split()}
    assert all(each["description"].endswith(".") for each in found.values())


@pytest.mark.parametrize("typed", [
    ("verify", "none"), ("plan", "{}", "--method", "glos", "--device", "tpu"),
    ("convert", "--forse"), ("convert", "--rank", "2"), ("report", "{}", "--output", "x.html"),
])  # fmt: skip
def test_a_failure_follows_its_schema(typed: tuple[str, ...], tmp_path: Path) -> None:
    args = [each.replace("{}", str(tmp_path)) for each in typed]
    result = invoke(*args, "--json")
    data = json.loads(result.stdout)
    assert result.exit_code == data["exit_code"] != 0
    jsonschema.validate(data, schema_of("error", closed=True))


def test_the_numbers_of_a_guard_are_numbers(commands: dict[str, Seen]) -> None:
    guard = commands["convert"].data["guard"]
    assert isinstance(guard["edit"]["perplexity_ratio"]["value"], float)
    assert len(guard["controls"]) == 2


def test_an_estimate_of_time_is_that_of_its_stages(commands: dict[str, Seen]) -> None:
    assert commands["plan"].data["time"] is None
    found = commands["plan, timed"].data["time"]
    assert {*found["stages"]} == {"load", "activations", "guard", "draw"}
    assert found["seconds"] == pytest.approx(sum(found["stages"].values()), abs=0.5)
    assert found["basis"]["tokens"] > found["basis"]["texts"] > 30
    peak = commands["plan"].data["expected_peak_bytes"]
    assert peak["total"] == peak["process"] + max(peak["forward"], peak["edit"])
    assert peak["forward"] > peak["weights"]


def test_memory_counts_gradients_where_a_method_takes_them(planted: Path) -> None:
    _, plan = planned(planted)
    asked = {
        name: takes_gradients(configure(name, {}, plan.dimensions), plan)
        for name in ("gloss", "profs", "random", "destein", "model-surgery", "dinm", "fusion")
    }
    assert asked == {
        "gloss": True, "profs": False, "random": False, "destein": False, "model-surgery": False,
        "dinm": True, "fusion": True,
    }  # fmt: skip
