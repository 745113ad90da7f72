"""Texts of strangers: pairs, prose, words and manifests that are none; names that would steer."""

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from converter.calibration.pairs import load_pairs, load_prose
from converter.calibration.word_list import WordList, load_words
from converter.checkpoints.names import EDIT_FILE, MANIFEST
from converter.checkpoints.source import Source
from converter.cli.terminal import as_json, echo, reporting
from converter.edits.base import Edit
from converter.entrypoints import verify as verification
from converter.entrypoints.verify import verify
from converter.errors import CheckpointError, DataError, VerificationError
from converter.manifest import Manifest
from converter.outputs.checkpoint.additions import check_edit
from converter.recipe import LocalInputs
from converter.release.card import make_card
from converter.release.licences import terms_of
from converter.release.manifest import read_manifest
from converter.release.recording import read_recording, recipe_of
from converter.runtime import progress, strict_json
from converter.runtime.files import MAX_LINE
from converter.text import code, escaped
from tests.builders.errors import refused
from tests.builders.invoke import Cli
from tests.builders.models import Checkpoints, planned
from tests.fuzz import skeleton

ESCAPES = "\x1b[2J\x1b]0;title\x07\x9b31m\r\b\x00\u202e\u2066\u2028\u200b\udcff\U000e0041"
FORGED = f"x{ESCAPES}\nerror: forged\n::set-output name=a::b\n##[error]c"
PAIRS = [(f"that damn clock number {i}", f"that clock number {i}") for i in range(20)]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> WordList:
    path = tmp_path_factory.mktemp("words") / "list.txt"
    path.write_text("damn\n")
    return load_words(str(path))


def jsonl(*rows: tuple[str, str]) -> str:
    return "".join(json.dumps({"toxic": a, "neutral": b}) + "\n" for a, b in rows)


def cannot_steer(text: str) -> bool:
    """No line of it does anything but stand there."""
    lines = text.split("\n")
    orders = any(re.match(r"\s*::", line) or re.search(r"##\w*\[", line) for line in lines)
    return all(line.isprintable() for line in lines) and not orders


def test_nothing_that_is_printed_can_steer(capsys: pytest.CaptureFixture[str]) -> None:
    echo(f"tensor {FORGED}")
    with reporting(quiet=False):
        progress.note(f"reading {FORGED}")
        progress.warn(f"{FORGED} is odd")
        with progress.stage("plan", f"planning {FORGED}"):
            pass
    printed = capsys.readouterr()
    assert cannot_steer(printed.out)
    assert cannot_steer(printed.err)
    assert len(printed.err.splitlines()) == 3  # a note, a warning, a stage: none was forged
    data = {FORGED: [FORGED, 1, "ünï 漢字"]}
    assert cannot_steer(as_json(data).replace("::set", "").replace("##[", ""))
    assert json.loads(as_json(data)) == data
    assert "漢字" in as_json(data)


def test_the_program_prints_no_escapes_of_a_manifest(cli: Cli, tmp_path: Path) -> None:
    made = skeleton.manifest()
    made["method"]["evidence"]["candidates"][0]["tokens"] = [FORGED.replace("\udcff", "")]
    made["edited"][0]["tensors"]["U"] = "\x1b[2J\nerror: forged"
    made["edited"][0]["kind"] = made["environment"]["device"] = "\x1b[2J\nerror: forged"
    made["files"]["\x1b[2J\n::error::x"] = {"sha256": skeleton.ZERO, "bytes": 1}
    folder = tmp_path / "out"
    skeleton.write_output(folder)
    skeleton.seal(folder, json.dumps(made).encode())
    (tmp_path / "b.json").write_text(json.dumps(skeleton.manifest()))
    for args in (
        ("verify", folder),
        ("verify", folder, "--json"),
        ("diff", folder / MANIFEST, tmp_path / "b.json"),
        ("replay", folder, tmp_path / "again"),
    ):
        result = cli(*args)
        assert cannot_steer(result.stdout), args
        assert cannot_steer(result.stderr), args
        assert result.exception is None or isinstance(result.exception, SystemExit)
        assert not [line for line in result.stderr.splitlines() if line.startswith("error: forged")]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{"toxic": "that damn \\ud800 x", "neutral": "that \\ud800 x"}', "unreadable"),
        ('{"toxic": "that damn \\u0000 x", "neutral": "that x"}', "unreadable"),
        ('{"toxic": "that damn \\u001b[2J x", "neutral": "that x"}', "unreadable"),
        ('{"toxic": "that damn \\u009b x", "neutral": "that x"}', "unreadable"),
        ('{"toxic": 1, "neutral": []}', "unreadable"),
        ("[" * 5000, "unreadable"),
        ("9" * 5000, "unreadable"),
        ('{"toxic": "' + "x" * MAX_LINE + '"}', "of more than 1,000,000 characters"),
    ],
    ids=lambda text: text[:20],
)
def test_a_row_that_is_no_text_is_skipped_and_named(
    content: str, problem: str, words: WordList, tmp_path: Path
) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(jsonl(*PAIRS[:10]) + content + "\n" + jsonl(*PAIRS[10:]))
    pairs = load_pairs(str(path), words, None, 0)
    assert len(pairs.pairs) == 20
    assert pairs.skipped == {problem: [11]}


def test_marks_line_ends_and_directions_change_nothing(words: WordList, tmp_path: Path) -> None:
    plain = tmp_path / "plain.jsonl"
    plain.write_text(jsonl(*PAIRS))
    expected = load_pairs(str(plain), words, None, 0).sha256
    other = tmp_path / "other.jsonl"
    other.write_bytes(b"\xef\xbb\xbf" + jsonl(*PAIRS).replace("\n", "\r\n").encode())
    assert load_pairs(str(other), words, None, 0).sha256 == expected
    turned = [(f"{a} \u202eabc", f"{b} \u202eabc") for a, b in PAIRS]  # letters of other scripts
    plain.write_text(jsonl(*turned))
    assert len(load_pairs(str(plain), words, None, 0).pairs) == 20
    plain.write_bytes(b"\xef\xbb\xbfdamn\r\nhell\r\n")
    assert load_words(str(plain)).words == {"damn", "hell"}


def hostile(kind: str, path: Path) -> Path:
    """A file that is no text, or none at all."""
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        text = jsonl(*PAIRS).encode() * 3
        path.write_bytes(
            {"gzip": gzip.compress(text), "utf-16": text.decode().encode("utf-16"),
             "nul": b"\0" * 1000, "line": b"x" * (MAX_LINE + 1), "nothing": b""}[kind]
        )  # fmt: skip
    return path


@pytest.mark.parametrize(
    "kind", ["fifo", "device", "folder", "gzip", "utf-16", "nul", "line", "nothing"]
)
def test_what_is_no_text_is_refused_in_a_sentence(
    kind: str, words: WordList, tmp_path: Path
) -> None:
    for suffix in (".jsonl", ".tsv", ".csv"):
        path = hostile(kind, tmp_path / f"pairs{suffix}")
        with refused(DataError, what=f"pairs ...pairs{suffix}..."):
            load_pairs(str(path), words, None, 0)
    for load, name in ((load_prose, "neutral text"), (load_words, "word list")):
        path = hostile(kind, tmp_path / f"{load.__name__}.txt")
        with refused(DataError, what=f"{name} ...{path.name} ..."):
            load(str(path))


LARGE = """
import sys
from converter.errors import ConverterError
from converter.calibration.pairs import load_pairs, load_prose
from converter.runtime.progress import _forget_peak, peak_memory
from converter.calibration.word_list import load_words
words = load_words("builtin")
for path in sys.argv[1:]:
    with open(path, "w") as file:
        file.write({"t": "toxic\\tneutral\\n", "c": "toxic,neutral\\n"}.get(path[-3], ""))
        for _ in range(100):
            file.write("x" * 1_000_000)
        file.write("\\n")
        if path.endswith("l"):
            for i in range(20):
                print(f'{{"toxic": "that damn clock {i}", "neutral": "a clock {i}"}}', file=file)
    _forget_peak()
    before, said = peak_memory(), "accepted"
    try:
        load_prose(path) if path.endswith("t") else load_pairs(path, words, None, 0)
    except ConverterError as error:
        said = str(error)
    print(peak_memory() - before, said)
"""


def test_a_line_of_100_MB_takes_no_memory(tmp_path: Path) -> None:
    """In a process of its own, in which nothing else has had that memory before."""
    paths = [str(tmp_path / f"text.{kind}") for kind in ("jsonl", "tsv", "csv", "txt")]
    command = [sys.executable, "-c", LARGE, *paths]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    taken = [line.split(" ", 1) for line in done.stdout.splitlines()]
    assert len(taken) == 4
    assert max(int(count) for count, _ in taken) < 20_000_000
    assert taken[0][1] == "accepted"  # that row is left out
    assert all("more than 1,000,000 characters" in said for _, said in taken[1:])


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ('{"a": 1, "a": 2}', "the key a twice"),
        ('{"a": NaN}', "the number NaN"),
        ('{"a": -Infinity}', "the number -Infinity"),
        ('{"a": 1e999}', "the number 1e999"),
        ('{"a": ' + "9" * 5000 + "}", "an integer beyond 64 bits"),
        ("[" * 101 + "]" * 101, "nested too deeply"),
        ("[" * 100_000, "nested too deeply"),
        ('"\\ud800"', "surrogates not allowed"),
        ('{"\\udfff": 1}', "surrogates not allowed"),
        (b"\xff", "invalid start byte"),
        ("", "Expecting value"),
    ],
    ids=lambda value: str(value)[:15],
)
def test_json_with_two_readings_is_refused(raw: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        strict_json.parse(raw)


def test_json_of_a_million_keys_is_refused_in_time() -> None:
    keys = ",".join(f'"{i}":0' for i in range(200_000))
    with pytest.raises(ValueError, match="the key 7 twice"):
        strict_json.parse("{" + keys + ',"7":1}')
    assert strict_json.parse(b'{"a": ["\\u00e9", 1, -2.5, null]}') == {"a": ["é", 1, -2.5, None]}


@pytest.fixture
def output(tmp_path: Path) -> Path:
    skeleton.write_output(tmp_path / "out")
    return tmp_path / "out"


NAMES = (
    "../x", "/etc/passwd", "a\\..\\x", "C:\\x", "a\0b", "a\x1b[2J", "a\nb", "x" * 300, ".", "..",
    "", "./config.json",
)  # fmt: skip
"""Of no file in a folder."""


@pytest.mark.parametrize("name", NAMES)
def test_a_manifest_names_nothing_outside_of_its_folder(
    name: str, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verification, "_check_loading", lambda *_: iter(()))
    assert verify(output) == []
    for where in ("files", "source", "edit", "added", "patched"):
        made = skeleton.manifest()
        entry = {"sha256": skeleton.ZERO, "bytes": 1}
        if where == "files":
            made["files"][name] = entry
        elif where == "source":
            made["source"]["files"][name] = entry
        elif where == "edit":
            made["edit"]["file"] = name
        elif where == "added":
            made["edit"]["files"] = [name]
        else:
            made["edit"]["patches"] = {name: {}}
        skeleton.seal(output, json.dumps(made).encode())
        problems = verify(output)
        assert problems, where
        assert all(isinstance(problem, str) for problem in problems)
        if where in ("files", "edit"):
            with refused(VerificationError):
                read_recording(output)


@pytest.mark.parametrize("name", NAMES)
def test_an_edit_adds_and_changes_no_file_outside_of_its_folder(
    name: str, checkpoints: Checkpoints
) -> None:
    """Whatever a method asks for, or a manifest that is replayed."""
    source, plan = planned(checkpoints())
    for edit, what in (
        (Edit(files={name: b""}), f"the edit adds a file {name}"),
        (Edit(patches={name: {}}), f"the edit changes the file {name}"),
        (Edit(patches={name: "x"}), f"the edit changes the file {name}"),
    ):
        with refused(CheckpointError, what=what):
            check_edit(edit, plan, source)
    check_edit(Edit(files={"notes.txt": b""}, patches={"config.json": {"x": 1}}), plan, source)


def test_a_run_of_a_manifest_reads_no_other_folder(output: Path) -> None:
    for key, value in (("subfolder", "../../etc"), ("subfolder", "/etc")):
        made = skeleton.manifest()
        made["run"][key] = value
        skeleton.seal(output, json.dumps(made).encode())
        with refused(VerificationError, expected="names of files in a folder", found=value):
            recipe_of(read_recording(output), LocalInputs(source="x"), refit=False)


def test_a_manifest_that_is_a_pipe_or_has_no_end_is_not_read(output: Path) -> None:
    (output / MANIFEST).unlink()
    os.mkfifo(output / MANIFEST)
    with refused(VerificationError, what=f"{output.name} has no {MANIFEST}"):
        read_manifest(output)
    (output / MANIFEST).unlink()
    (output / MANIFEST).symlink_to("/dev/zero")
    with refused(VerificationError, what=f"{output.name} has no {MANIFEST}"):
        read_manifest(output)
    (output / EDIT_FILE).unlink()


@pytest.mark.parametrize(
    "text",
    ["<script>alert(1)</script>", "[a](javascript:x)", "![x](http://x/y.png)", "a | b", "`x`",
     "# x\n\n## y", "```\nx", "**x**", "&lt;b&gt;", "$$x$$", "</td></table>", "<!--", "_x_"],
)  # fmt: skip
def test_names_in_a_card_stay_text(text: str, tmp_path: Path) -> None:
    """What a CommonMark reader makes of them is one piece of text, itself."""
    from markdown_it import MarkdownIt

    reader = MarkdownIt("commonmark").enable("table")
    line = " ".join(text.split())
    for made in (f"x {escaped(text)} y", f"x {escaped(text)}"):
        inline = reader.parse(made)[1]
        assert {child.type for child in inline.children or ()} <= {"text", "text_special"}, made
        assert "".join(child.content for child in inline.children or ()).startswith(f"x {line}")
    cell = reader.parse(f"| a | b |\n|---|---|\n| {escaped(text)} | {code(text)} |\n")
    kinds = [token.type for token in cell]
    assert kinds.count("td_open") == 2
    assert kinds.count("tr_open") == 2
    codes = [c for token in cell for c in token.children or () if c.type == "code_inline"]
    assert len(codes) == 1
    assert not [c for token in cell for c in token.children or () if c.type.startswith("html")]


def test_a_card_has_the_headings_and_links_that_its_template_has(tmp_path: Path) -> None:
    """A hostile folder name, licence, word list, method, token and data set change none of them."""
    from huggingface_hub import ModelCardData

    text = "x\n\n# Forged\n\n<script>y</script> ``` [z](http://evil) | \x1b[2J"
    made, plain = skeleton.manifest(), skeleton.manifest()
    made["method"]["evidence"]["candidates"][0]["tokens"] = [text, "a"]
    made["word_list"]["origin"]["name"] = made["method"]["title"] = text
    made["method"]["paper"] = "http://x/) [z](http://evil"
    made["pairs"]["origin"] = {"name": text}
    made["run"]["source"] = made["run"]["subfolder"] = text
    made["guard"]["reasons"] = [text]
    cards = []
    for manifest, name in ((made, text), (plain, "tiny")):
        source = Source(
            name=name, folder=tmp_path, config=skeleton.CONFIG, shards=(skeleton.SHARD,),
            weight_map=None, companions=(), card=ModelCardData(license=name),
        )  # fmt: skip
        told = Manifest.from_json(manifest)
        cards.append(make_card(source, None, told, terms_of(source, None), skeleton.ZERO)[0])
    headings, links = zip(*map(structure, cards), strict=True)
    assert headings[0][1:] == headings[1][1:]  # the first is the name
    assert len(headings[0]) > 5
    assert not any("evil" in link and "%5B" not in link for link in links[0])
    assert "\x1b" not in cards[0]


def structure(card: str) -> tuple[list[str], list[str]]:
    """Headings and links of a card, which must hold no HTML."""
    from markdown_it import MarkdownIt

    tokens = MarkdownIt("commonmark").enable("table").parse(card.partition("\n---\n")[2])
    inner = [child for token in tokens for child in token.children or ()]
    assert not [token for token in (*tokens, *inner) if token.type.startswith("html")]
    headings = [tokens[i + 1].content for i, t in enumerate(tokens) if t.type == "heading_open"]
    return headings, [str(t.attrs["href"]) for t in inner if t.type == "link_open"]
