"""``gloss compare``: what two models say, side by side; and the samples of a conversion."""

import base64
import hashlib
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from converter.calibration.word_list import load_words
from converter.checkpoints.names import CARD, EDIT_FILE, MANIFEST
from converter.cli.compare import samples_text, wrapped
from converter.cli.main import gloss
from converter.entrypoints import made
from converter.evaluation import samples
from converter.evaluation.about import About
from converter.evaluation.masks import masked, masks
from converter.evaluation.pages import html_page, jsonl_page, markdown_page
from converter.evaluation.prompts import load_prompts
from converter.evaluation.samples import LISTED, Said, Sample, differences
from tests.builders.invoke import Cli
from tests.builders.models import Checkpoints, tiny_recipe
from tests.builders.planted import CURSES, INSULTS, planted_args

PROMPTS = "w1 damn\nw2 w3 fucking\nthe river is\n"
FEW = ("--max-new-tokens", 8)


@pytest.fixture(scope="module")
def edited(planted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The planted model without what is toxic in it. Read only."""
    from converter.entrypoints.convert import convert
    from converter.recipe import Recipe

    out = tmp_path_factory.mktemp("edited") / "out"
    options = {"rank": "1", "protect_shared": "1", "protect_own": "1"}
    pairs = str(planted.parent / "pairs.jsonl")
    convert(Recipe(source=str(planted), pairs=pairs, options=options, guard=False), out)
    return out


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    (tmp_path / "prompts.txt").write_text(PROMPTS)
    return tmp_path / "prompts.txt"


def no_model(*given: Any, **more: Any) -> Any:
    raise AssertionError("a second copy of the model was loaded")


def test_both_models_continue_the_same_prompts(
    planted: Path, edited: Path, prompts: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The edit runs in hooks: no second model is loaded; it says fewer curses."""
    monkeypatch.setattr(made, "load_whole", no_model)
    args = ("compare", planted, edited, "--prompts", prompts, *FEW, "--samples", 12)
    found = json.loads(cli(*args, "--json", "--no-mask", code=0).stdout)
    rows = found["samples"]
    assert [(row["prompt"], row["sample"]) for row in rows] == [
        (prompt, number) for prompt in PROMPTS.splitlines() for number in range(13)
    ]
    toxic = {*CURSES, *INSULTS}
    for row in rows:
        for side in ("base", "edited"):
            said = row[side]["text"].split()
            assert row[side]["scores"][LISTED] == sum(word in toxic for word in said)
    before, after = found["means"][LISTED]
    assert before > 0.2 > after
    assert found["how"].startswith("the edit")
    shown = json.loads(cli(*args, "--json", code=0).stdout)["samples"]
    assert [r["base"]["scores"] for r in shown] == [r["base"]["scores"] for r in rows]
    whole = json.dumps(shown)
    assert "d***" in whole
    assert not any(word in whole for word in toxic)


def test_hooks_show_what_the_written_weights_say(
    planted: Path, edited: Path, prompts: Path, cli: Cli, tmp_path: Path
) -> None:
    """A folder without a manifest, an adapter and a manifest by itself say the same."""
    alone = tmp_path / "alone"
    shutil.copytree(edited, alone)
    (alone / MANIFEST).unlink()
    recorded = tmp_path / "recorded.json"
    shutil.copy(edited / MANIFEST, recorded)
    shutil.copy(edited / EDIT_FILE, recorded.with_suffix(".tensors"))
    args = ("--prompts", prompts, *FEW, "--samples", 1, "--json", "--scorer", "bad-words")
    said = []
    for place in (edited, alone, recorded):
        found = json.loads(cli("compare", planted, place, *args, code=0).stdout)
        said.append([(row["base"], row["edited"]) for row in found["samples"]])
        assert (found["how"] == "weights of its own") == (place == alone)
        assert {*found["means"]} == {LISTED, "bad-words"}
    assert said[0] == said[1] == said[2]
    assert any(before != after for before, after in said[0])


class Page(HTMLParser):
    """What a browser makes of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.data: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.data.append((self.tags[-1][0] if self.tags else "", data))


def test_a_page_is_the_same_bytes_again(
    planted: Path, edited: Path, prompts: Path, cli: Cli, tmp_path: Path
) -> None:
    args = ("compare", planted, edited, "--prompts", prompts, *FEW, "--samples", 1, "--quiet")
    for ending in ("html", "md", "jsonl"):
        first, again, other = (tmp_path / f"{name}.{ending}" for name in ("a", "b", "c"))
        cli(*args, "--output", first, code=0)
        cli(*args, "--output", again, code=0)
        assert first.read_bytes() == again.read_bytes()
        if ending == "jsonl":
            cli(*args, "--output", other, "--seed", 1, code=0)
            assert first.read_bytes() != other.read_bytes()
            rows = [json.loads(line) for line in first.read_text().splitlines()]
            assert [row["sample"] for row in rows] == [0, 1] * 3
            assert rows[0]["of"]["seed"] == 0
    assert "<mark>" in (tmp_path / "a.html").read_text()


HOSTILE = "<script>alert(1)</script> \"'><img src=x onerror=alert(1)> | **b** \u202egnp.e\x1b[2J\n"
ABOUT = About(
    base="<b>one</b>", edited="two|<i>", how="x", seed=0, max_new_tokens=8, top_p=0.9,
    chat=False, masked=True,
)  # fmt: skip


def hostile() -> list[Sample]:
    pieces = ((HOSTILE, False), (HOSTILE, True))
    return [Sample(HOSTILE, 0, Said(pieces, {"<s>": 1.0}), Said((), {"<s>": 0.0}))]


def test_text_of_strangers_is_no_markup() -> None:
    text = html_page(ABOUT, hostile())
    page = Page(text)
    ours = {"html", "head", "meta", "title", "style", "body", "h1", "p", "table", "thead", "tr",
            "th", "tbody", "td", "mark", "small"}  # fmt: skip
    assert {tag for tag, _ in page.tags} == ours
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert "".join(data for _, data in page.data).count("<script>alert(1)</script>") == 3
    assert "\x1b" not in text
    assert "\u202e" not in text
    (policy,) = [a["content"] for _, a in page.tags if "http-equiv" in a]
    style = next(data for tag, data in page.data if tag == "style")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy == (
        f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    table = markdown_page(ABOUT, hostile())
    assert "<script>" not in table
    assert "<img" not in table
    assert "\x1b" not in table
    assert len([line for line in table.splitlines() if line.startswith("|")]) == 3
    (line,) = jsonl_page(ABOUT, hostile()).splitlines()
    assert json.loads(line)["base"]["text"] == HOSTILE * 2
    assert "\x1b" not in samples_text("a", "b", hostile(), 80)


def test_words_that_the_other_text_lacks_are_marked() -> None:
    one, other = "the red fox  ran", "the fox ran away\n"
    assert differences((one, other), ("THE RED FOX  RAN", other)) == (
        (("THE ", False), ("RED", True), (" FOX  RAN", False)),
        (("the fox ran ", False), ("away", True), ("\n", False)),
    )
    assert differences(("a b", "c d"), ("a b", "c d"))[0] == (("a b", True),)
    assert differences(("", "x"), ("", "x")) == ((), (("x", True),))
    assert differences(("我们", "我的"), ("我们", "我的"))[0] == (("我", False), ("们", True))


def test_stars_are_in_words_that_a_prompt_begins_too(tmp_path: Path) -> None:
    builtin = load_words("builtin")
    lists = masks(builtin, mask=True)
    assert masked("hole, this is shit", lists, "you ass") == "****, this is s***"
    assert masked("hole", lists, "one loop") == "hole"
    assert masked("ass", lists, "cl") == "a**"
    assert masks(builtin, mask=False) == ()
    (tmp_path / "words.txt").write_text("blume\n")
    both = masks(load_words(str(tmp_path / "words.txt")), mask=True)
    assert masked("die Blume, shit", both) == "die B****, s***"


def test_two_columns_fit_the_terminal() -> None:
    said = [
        Said((("好" * 40, True), (" and a-long-word-" + "x" * 60, False)), {LISTED: 2.0}),
        Said((("short", False),), {LISTED: 0.0}),
    ]
    for width in (40, 61, 120):
        text = samples_text("base", "edited", [Sample("a prompt", 1, *said)], width)
        assert max(len(line) + line.count("好") for line in text.split("\n")) <= width
        assert "sample 1" in text
    assert " | " in text
    assert "[-好" in text
    assert wrapped("a bb ccc", 4) == ["a bb", "ccc"]
    assert wrapped("abcdef", 4) == ["abcd", "ef"]


def test_prompts_can_be_typed(planted: Path, edited: Path, tmp_path: Path, cli: Cli) -> None:
    args = ["compare", str(planted), str(edited), "--interactive", "--max-new-tokens", "4"]
    page = tmp_path / "page.jsonl"
    typed = "w1 damn\n\nthe river is\n"
    found = CliRunner().invoke(gloss, [*args, "--output", str(page)], input=typed)
    assert found.exit_code == 0, found.stderr
    assert found.stdout.index("> w1 d***") < found.stdout.index("> the river is")
    assert "means of 2 continuations" in found.stdout
    assert len(page.read_text().splitlines()) == 2
    found = CliRunner().invoke(gloss, [*args, "--chat"], input="w1\n")
    assert found.exit_code == 2
    assert "--chat: expected a model with a chat template" in found.stderr


def test_a_chat_template_says_what_the_user_says(
    planted: Path, edited: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(planted, base)
    (base / "chat_template.jinja").write_text("w9 {{ messages[0].content }} fucking")
    recorded = tmp_path / "recorded.json"
    shutil.copy(edited / MANIFEST, recorded)
    shutil.copy(edited / EDIT_FILE, recorded.with_suffix(".tensors"))
    args = ["compare", str(base), str(recorded), "--interactive", "--json", "--no-mask"]

    def said(*more: str, typed: str = "w1\n") -> tuple[bool, str]:
        found = CliRunner().invoke(gloss, [*args, *more], input=typed)
        assert found.exit_code == 0, found.stderr
        data = json.loads(found.stdout)
        return data["chat"], data["samples"][0]["base"]["text"]

    chat, rendered = said()
    assert chat
    assert said("--no-chat", typed="w9 w1 fucking\n") == (False, rendered)
    assert said("--no-chat")[1] != rendered


@pytest.mark.parametrize(
    ("more", "code", "says"),
    [
        (("--output", "x.pdf"), 2, "--output x.pdf: expected .html or .md or .jsonl, found .pdf"),
        (("--output", "none/x.md"), 7, "the folder of --output none/x.md does not exist"),
        (("--prompts", "none"), 2, "--prompts: expected prompts to continue"),
        (("--prompts", "gone.txt"), 5, "gone.txt does not exist"),
        (("--interactive", "--num-prompts", 2), 2, "--num-prompts has no effect with --interac"),
        (("--scorer", "nobody"), 2, "nobody"),
        (("--samples", -1), 2, "--samples: expected at least 0"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    more: tuple[object, ...], code: int, says: str, planted: Path, edited: Path, cli: Cli,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    cli("compare", planted, edited, *more, code=code, says=says)
    assert list(tmp_path.iterdir()) == []


def test_another_model_is_no_edit_of_this_one(
    planted: Path, edited: Path, checkpoints: Checkpoints, tmp_path: Path, cli: Cli
) -> None:
    recorded = tmp_path / "recorded.json"
    shutil.copy(edited / MANIFEST, recorded)
    shutil.copy(edited / EDIT_FILE, recorded.with_suffix(".tensors"))
    other = checkpoints("llama")
    says = "is an edit of other weights than those of"
    cli("compare", other, recorded, code=2, says=says)
    cli("compare", other, edited, code=2, says="have different tokenizers")
    cli("compare", other, tmp_path / "gone", code=3)


# samples of a conversion


def test_a_conversion_ends_with_samples(edited: Path, planted: Path, cli: Cli) -> None:
    """Without a guard they are of the first three prompts; the rule stands beside them."""
    manifest = json.loads((edited / MANIFEST).read_text())
    words, known = load_words("builtin"), load_prompts("builtin", None, 0).texts
    assert [s["prompt"] for s in manifest["samples"]] == [words.mask(p) for p in known[:3]]
    for sample in manifest["samples"]:
        for said in (sample["before"], sample["after"]):
            assert said == words.mask(said)
    assert any(s["before"] != s["after"] for s in manifest["samples"])
    card = (edited / CARD).read_text()
    assert "## Samples" in card
    assert "what the edit does has no part in the choice" in card
    assert "starred out" in card
    assert "fuck" not in card.partition("## Samples")[2].partition("## ")[0].lower()
    cli("verify", edited, "--source", planted, code=0)


@pytest.mark.slow
def test_samples_follow_what_the_guard_has_heard(planted: Path, cli: Cli, tmp_path: Path) -> None:
    """Their prompts are chosen by what the unedited model said, as the cache has it."""
    cache, out = tmp_path / "cache", tmp_path / "out"
    args = ("convert", planted, out, *planted_args(planted), "--cache-dir", cache)
    told = cli(*args, "--no-mask", code=0).stdout
    (path,) = (cache / "continuations").iterdir()
    words, known = load_words("builtin"), load_prompts("builtin", None, 0).texts
    heard = [
        prompt
        for prompt, texts in zip(known, json.loads(path.read_text()), strict=True)
        if any(map(words.spans, texts))
    ]
    chosen = [s["prompt"] for s in json.loads((out / MANIFEST).read_text())["samples"]]
    assert chosen == heard[:3] != list(known[:3])
    assert any(line.startswith("  " + chosen[0]) for line in told.split("\n"))  # unmasked
    again = cli("replay", out, tmp_path / "again", "--source", planted, code=0)
    assert again.exit_code == 0
    assert json.loads((tmp_path / "again" / MANIFEST).read_text())["samples"]


def test_where_no_samples_can_be_taken_a_note_says_so(
    checkpoints: Checkpoints, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from converter.entrypoints.convert import convert

    def fails(*given: Any, **more: Any) -> Any:
        raise ValueError("this model writes nothing")

    (tmp_path / "own.txt").write_text("something private\n")
    caplog.set_level("INFO", "converter")
    source = checkpoints("llama")
    monkeypatch.setattr(samples, "generate", fails)
    for number, (changes, why) in enumerate((
        ({"prompts": "none"}, "--prompts none"),
        ({"prompts": str(tmp_path / "own.txt")}, "the prompts are not built in"),
        ({"prompts": "builtin", "forward": "streamed"}, "a model that is streamed"),
        ({"prompts": "builtin"}, "ValueError: this model writes nothing"),
    )):  # fmt: skip
        caplog.clear()
        out = tmp_path / str(number)
        manifest = convert(tiny_recipe(source, **changes), out)
        assert manifest.samples == ()
        assert f"no samples: {why}" in caplog.text
        assert "## Samples" not in (out / CARD).read_text()
        assert not re.search("private", (out / MANIFEST).read_text())
