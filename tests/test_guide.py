"""README and the guide: commands, links, generated parts, and the command that prints the pages."""

import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from markdown_it import MarkdownIt

import converter
from converter.cli import guide
from converter.cli.command import Command
from converter.cli.fields import Part, faults_of
from converter.cli.guide import GUIDE, page, topics
from converter.cli.main import gloss
from converter.errors import ConverterError, OptionError
from converter.runtime import progress
from tests.builders.errors import refused
from tests.builders.invoke import Cli
from tests.builders.planted import planted_args
from tests.guide import PAGES as GENERATED
from tests.guide import ROOT, with_parts

PAGES = [
    ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "tests/README.md",
    ROOT / "converter/README.md", ROOT / "manifests/README.md", *sorted(GUIDE.glob("*.md")),
]  # fmt: skip
FOR_PEOPLE = [path for path in PAGES if path.name != "CHANGELOG.md"]
_HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
_OPTIONAL = re.compile(r"\[([^\]]*)\]")
_OTHERS_FLAGS = {
    "--data-dir", "--gpus", "--help", "--memory", "--no-deps", "--require-hashes", "--strict",
}  # fmt: skip
"""Flags of other programs that the pages name."""


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def code_of(path: Path) -> tuple[list[str], list[str]]:
    """The blocks of code of a page, and its code within lines."""
    tokens = MarkdownIt("commonmark").enable("table").parse(path.read_text("utf-8"))
    blocks = [token.content for token in tokens if token.type in ("fence", "code_block")]
    inner = itertools.chain.from_iterable(token.children or () for token in tokens)
    return blocks, [token.content for token in inner if token.type == "code_inline"]


def lines_of(path: Path) -> Iterator[list[str]]:
    """The command lines in the blocks of a page, as words; optional words left out, then put in."""
    for line in "\n".join(code_of(path)[0]).replace("\\\n", " ").splitlines():
        typed = re.sub(r"^(- )?(run: |\$ )?", "", line.strip())
        for choice in dict.fromkeys((_OPTIONAL.sub("", typed), _OPTIONAL.sub(r"\1", typed))):
            if not re.match(r"(gloss|gloss-convert|make|pytest|python|GLOSS_\w+=\S+) ", choice):
                continue
            words = shlex.split(choice, comments=True)
            words = words[: words.index(">")] if ">" in words else words
            yield [word.partition("|")[0] if "-" not in word else word for word in words]


def command_of(words: list[str]) -> tuple[Command, list[str]]:
    """The command that a line calls, and its arguments."""
    if words[0] == "gloss-convert":
        words = ["gloss", "convert", *words[1:]]
    found = gloss.commands[words[1]]
    assert isinstance(found, Command)
    return found, words[2:]


@pytest.mark.parametrize("path", FOR_PEOPLE, ids=name_of)
def test_every_command_line_is_one_that_the_program_takes(path: Path) -> None:
    """Its options are there, and have values that they can have; files need not be there."""
    for words in lines_of(path):
        if words[0] not in ("gloss", "gloss-convert"):
            continue
        if words[1:2] in (["-h"], ["--help"]):
            continue
        called, args = command_of(words)
        try:
            with called.make_context(called.name, [*args]) as context:
                for part in called.parts:
                    if not {"recipe_file", "manifest_file"} & given(context):
                        part_is_made(part, context)
                found = map(str, faults_of(context).found)
                assert not [fault for fault in found if "does not exist" not in fault], words
        except click.ClickException as error:
            pytest.fail(f"{shlex.join(words)}: {error.format_message()}")


def given(context: click.Context) -> set[str]:
    return {name for name, value in context.params.items() if value}


def part_is_made(part: Part, context: click.Context) -> None:
    """Values are checked as the command checks them, but for what is read from files."""
    try:
        part.make(context.params)
    except ConverterError as error:
        if "does not exist" not in str(error):
            raise


@pytest.mark.parametrize("path", FOR_PEOPLE, ids=name_of)
def test_every_command_and_option_that_a_sentence_names_is_there(path: Path) -> None:
    flags = {
        flag
        for each in gloss.commands.values()
        for parameter in each.params
        for flag in (*parameter.opts, *parameter.secondary_opts)
    }
    for code in code_of(path)[1]:
        named = re.match(r"(gloss|gloss-convert) (.*)", code)
        if named and named[1] == "gloss":
            assert named[2].split()[0].strip(".,") in {*gloss.commands, "-h", "TOPIC"}, code
        if named or code.startswith("--"):
            for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+", code):
                assert flag in flags | _OTHERS_FLAGS, code


@pytest.mark.parametrize("path", FOR_PEOPLE, ids=name_of)
def test_what_the_pages_run_besides_is_there(path: Path) -> None:
    """Targets of make, scripts, modules and files of tests."""
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    inline = [code.split() for code in code_of(path)[1] if "\n" not in code and " " in code]
    for words in [*lines_of(path), *inline]:
        if words[0] == "make":
            assert words[1] in targets, words
        elif words[0] == "pytest" or words[1:3] == ["-m", "pytest"]:
            files = [word for word in words if word.startswith("tests")]
            assert all((ROOT / file).exists() for file in files), words
        elif words[0] == "python" and words[1] == "-m":
            place = ROOT / words[2].replace(".", "/")
            assert place.is_dir() or place.with_suffix(".py").exists(), words
        elif words[0] == "python" and words[1].endswith(".py"):
            assert (ROOT / words[1]).exists(), words


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_the_links_of_a_page_lead_somewhere(path: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)]*)\)", path.read_text("utf-8")):
        place, _, anchor = link.partition("#")
        target = path.parent / place if place else path
        assert target.exists(), link
        if anchor:
            headings = _HEADING.findall(target.read_text("utf-8").lower())
            assert anchor in {re.sub(r"[^\w\- ]", "", h).replace(" ", "-") for h in headings}, link


def test_the_readme_is_read_in_five_minutes() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 250


@pytest.mark.parametrize("topic", GENERATED)
def test_generated_parts_are_current(topic: str) -> None:
    text = GENERATED[topic].read_text("utf-8")
    assert "<!-- begin: " in text
    assert with_parts(text) == text, "run python -m tests.guide"


def test_the_list_has_every_page() -> None:
    listed = re.findall(r"^- \[([\w-]+)\]\(", page(None), re.MULTILINE)
    assert sorted(listed) == topics()
    assert len(set(listed)) == len(listed)
    for topic in topics():
        assert re.match(r"# [^\n]+\n\n[^\n]+\.\n", page(topic)), topic


@pytest.mark.parametrize("topic", topics())
def test_a_pipe_gets_a_page_as_it_is(topic: str, cli: Cli) -> None:
    assert cli("guide", topic, code=0).stdout == page(topic) + "\n"
    assert "<!--" not in page(topic)


def test_a_terminal_gets_it_styled_and_a_screen_at_a_time(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []

    def paged(text: str, color: bool) -> None:
        shown.append(text)
        assert progress.current().doing[-1][0] == ""  # nothing is drawn over the pager

    monkeypatch.setattr(click, "echo_via_pager", paged)
    monkeypatch.setattr(guide, "_is_terminal", lambda: True)
    assert cli("guide", "guard", code=0).stdout == ""
    assert "\x1b[" in shown[0]
    assert "## " not in shown[0]
    assert '"topic": "guard"' in cli("guide", "guard", "--json", code=0).stdout


def test_a_topic_that_is_not_there_is_told_with_the_nearest() -> None:
    with refused(OptionError, what="TOPIC", expected="ci or ...", found="gard", hint="...guard?"):
        page("gard")


@pytest.mark.slow
def test_the_commands_of_the_readme_run_on_a_tiny_model(
    planted: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they stand there, with a tiny model and its pairs in the place of what they name."""
    monkeypatch.chdir(tmp_path)
    typed = ("gloss-convert MODEL ./out", "gloss verify ./out --source MODEL",
             "gloss compare demo ./out", "gloss plan MODEL", "gloss recipe [SOURCE]",
             "gloss diff A B", "gloss methods [NAME]", "gloss guide [TOPIC]")  # fmt: skip
    text = (ROOT / "README.md").read_text("utf-8")
    places = {"MODEL": planted, "demo": planted, "[SOURCE]": planted, "A": planted, "B": "out"}
    places |= {"[NAME]": "gloss", "[TOPIC]": "guard"}
    for line in typed:
        assert line in text, line
        words = [places.get(word, word) for word in line.split()]
        more: tuple[object, ...] = ()
        if words[0] == "gloss-convert":
            words, more = ["gloss", "convert", *words[1:]], planted_args(planted)
        if words[1] == "compare":
            more = ("--num-prompts", 2, "--max-new-tokens", 4)
        cli(*words[1:], *more, code=0)
    replayed = "gloss replay ./out ./again --json"
    assert replayed in text
    cli(*replayed.split()[1:], "--source", planted, code=0)


@pytest.mark.slow
def test_the_walk_through_in_python_runs(
    planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first, *blocks = code_of(GUIDE / "python.md")[0]
    assert {"source", "pairs", "options", "out"} == set(re.findall(r"^(\w+) = ", first, re.M))
    known = {
        "source": str(planted), "pairs": str(planted.parent / "pairs.jsonl"), "out": Path("out"),
        "options": {"rank": "1", "protect_shared": "1", "protect_own": "1"},
    }  # fmt: skip
    assert len(blocks) > 5
    for block in blocks:
        exec(block, known)
    assert converter.verify("again", planted) == []
    assert not Path("other").exists()
    assert {path.name for path in Path().iterdir()} == {"again", "out"}
